"""`bench overlap`: a guide streams to a device that computes meanwhile, on a paced link, beside what neither hides.

    compute     the probe on a guide that is there already           transfer  the guide alone
    both        the probe while the guide arrives                    sequential  the whole guide, then the probe
    hidden_fraction = (transfer + compute - both) / min(transfer, compute), cut to 0..1       (three-run control)
    over_ideal = both / (max(transfer, compute) + one unit's fill)

Rank 0 is the cloud and codes while it sends; rank 1 is the device, whose times count. All arms take turns within a
repetition; codecs are `adaptive`, from the link's rate and from when the device read each unit in `compute` before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedbench.bench import harness, ranks
from fedbench.bench.harness import Options
from fedbench.bench.streamed import Play, check
from fedbench.codec import frame
from fedbench.codec.coding import Codec
from fedbench.comm.base import Transport

ARMS = ("compute", "transfer", "both", "sequential")


def run(options: Options) -> dict[str, Any] | None:
    """Return hidden fraction, ratio to the ideal and their samples; None on other ranks than 0."""
    check(options)
    return ranks.measured("overlap", options)


def measure(transport: Transport, options: Options) -> dict[str, Any]:
    """Return the figures of the adaptive codec on rank 0."""
    play = Play(transport, options)
    codecs = play.adaptive()
    result = figures(play, codecs)
    play.finish()
    return result


def figures(play: Play, codecs: Sequence[Codec]) -> dict[str, Any]:
    """Return what `bench overlap` says of units in given codecs (rank 0), from as many rounds of each arm as asked for."""
    samples: dict[str, list[float]] = {arm: [] for arm in ARMS}
    waits: list[float] = []
    for number in range(max(6, play.options.repeats)):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            samples[arm].append(play.once(arm, codecs))
            waits += [play.wait_s] if arm == "both" else []
    link, framed = play.link_bit_s, [8.0 * frame.bound(u, c) for c, u in zip(codecs, play.units, strict=True)]
    payload = [8.0 * frame.coded_bytes(u, c) for c, u in zip(codecs, play.units, strict=True)]
    fill_s = max(framed) / link
    compute, transfer, both, sequential = (np.array(samples[arm]) for arm in ARMS)
    ideal = np.maximum(compute, transfer) + fill_s
    hidden = np.clip((transfer + compute - both) / np.minimum(transfer, compute), 0.0, 1.0)
    used: dict[str, int] = {}
    for codec in codecs:
        used[codec.name] = used.get(codec.name, 0) + 1
    return {
        "hidden_fraction": float(np.median(hidden)),
        "over_ideal": float(np.median(both / ideal)),
        "sequential_over_ideal": float(np.median(sequential / ideal)),
        "intervals": {
            "over_ideal": harness.ratio(both.tolist(), ideal.tolist()),
            "sequential_over_ideal": harness.ratio(sequential.tolist(), ideal.tolist()),
        },
        "rounds": len(both),
        "link_bit_s": link,
        "fill_s": fill_s,
        "nominal_transfer_s": sum(framed) / link,
        "units": len(framed),
        "units_by_codec": used,
        "bits_per_entry": sum(payload) / sum(unit.entries for unit in play.units),
        "medians_s": harness.medians(samples),
        "wait_s": float(np.median(waits)),
        "samples_hidden": hidden.tolist(),
        "samples_wait_s": waits,
        "samples_s": samples,
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of several codecs as one tree without their samples."""
    return {name: {k: v for k, v in row.items() if not k.startswith("samples")} for name, row in rows.items()}
