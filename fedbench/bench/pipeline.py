"""`bench pipeline`: a guide's way to the device layer by layer, in fixed codecs and adaptive, against the ideal bound.

    over_ideal = pipeline / (max(sum of transfers, sum of computes) + one unit's fill)

The arms and times are those of `overlap.py`; here every codec has its own, so that it shows what the adaptive one gains.
`memory_bytes` is the device's peak with and without streaming: its probe alone, with units decoded as they are read, and
with the whole guide decoded before.
"""

from __future__ import annotations

from typing import Any

from fedbench.bench import ranks
from fedbench.bench.harness import Options
from fedbench.bench.overlap import figures, table
from fedbench.bench.streamed import Play, check
from fedbench.codec.codecs import CODECS
from fedbench.comm.base import Transport

#: Codecs beside the adaptive one; raw would take longest by far on most links.
FIXED = ("int8", "int2")


def run(options: Options) -> dict[str, Any] | None:
    """Return the ratio to the ideal bound by codec; None on other ranks than 0."""
    check(options)
    return ranks.measured("pipeline", options)


def measure(transport: Transport, options: Options) -> dict[str, Any]:
    """Return the adaptive codec's ratio, all codecs' figures, and the adaptive time over that of the fastest."""
    play = Play(transport, options)
    chosen = {"adaptive": play.adaptive()} | {name: [CODECS[name]] * len(play.units) for name in FIXED}
    found = {name: figures(play, codecs) for name, codecs in chosen.items()}
    memory = play.memory(chosen["adaptive"])
    play.finish()
    times = {name: float(row["medians_s"]["both"]) for name, row in found.items()}
    return {
        "over_ideal": found["adaptive"]["over_ideal"],
        "over_sequential": times["adaptive"] / found["adaptive"]["medians_s"]["sequential"],
        "over_best_fixed": times["adaptive"] / min(times[name] for name in FIXED),
        "memory_bytes": memory,
        "by_codec": table(found),
        "samples_s": {name: row["samples_s"] for name, row in found.items()},
    }
