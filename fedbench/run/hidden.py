"""How much of a plan's transfer ran behind the devices' compute, from spans and the link's nominal rate.

    T = time of a round's plan on a device's link,  C = compute of a device rank
    W = its waits for units of the plan, as far as they lie after the cloud had the first one ready
    hidden = 1 - W / min(T, C), cut to 0..1

T is known where the link is paced; without a rate nothing is guessed. Waiting until the first unit is ready is the
cloud's compute, not transfer; both are told since the agreed start of the round, so no two clocks are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from fedbench.base.lanes import Lane, lanes

#: Where a round transfers or computes for less (seconds), nothing is said about overlap.
SHORTEST_S = 0.05

#: How units of a plan are named in spans.
PLAN = "plan/"


class Part(NamedTuple):
    """One device rank in one round: compute C, exposed wait W, seconds."""

    compute_s: float
    exposed_s: float


def hidden_fraction(
    spans: Mapping[str, np.ndarray], transfer_s: Mapping[int, float], hosts: Collection[int]
) -> float | None:
    """Return the median over the rounds kept of the slowest device rank's hidden part; `transfer_s` maps rounds to T.

    `hosts` are the ranks with devices; a round counts where the cloud and all of them kept it, and where they compute.
    The run's first round is left out where there is another: buffers are made in it. None where T is not known, or
    where the median of T or of C is below SHORTEST_S.
    """
    parts = _slowest(spans, hosts)
    rounds = [r for r in parts if transfer_s.get(r, 0.0) > 0]
    rounds = [r for r in rounds if r > 0] or rounds
    if not rounds:
        return None
    transfer = np.array([transfer_s[r] for r in rounds])
    compute, exposed = np.array([parts[r] for r in rounds]).T
    if min(np.median(transfer), np.median(compute)) < SHORTEST_S:
        return None
    return float(np.median(np.clip(1.0 - exposed / np.minimum(transfer, compute), 0.0, 1.0)))


def _slowest(spans: Mapping[str, np.ndarray], hosts: Collection[int]) -> dict[int, Part]:
    """Return per round the device rank on which compute and exposed wait take longest together."""
    found = list(lanes(spans))
    own = [lane for lane in found if lane.rank in hosts and lane.rank > 0]
    kept = Counter(lane.round for lane in own)
    ready = {lane.round: _first_ready(lane) for lane in found if lane.rank == 0}
    parts: dict[int, Part] = {}
    for lane in own:
        if lane.round not in ready or kept[lane.round] < len(hosts):
            continue
        waits = (lane.kind == "wait") & np.char.startswith(lane.unit, PLAN)
        exposed = np.maximum(0.0, lane.end_s - np.maximum(lane.start_s, ready[lane.round]))[waits].sum()
        part = Part(float(lane.own_s[lane.kind == "compute"].sum()), float(exposed))
        if sum(part) >= sum(parts.get(lane.round, (0.0, 0.0))):
            parts[lane.round] = part
    return {number: part for number, part in parts.items() if part.compute_s > 0}


def _first_ready(cloud: Lane) -> float:
    """Return when the cloud had coded the first unit of its plan, after the round's start; 0 where it sent none."""
    coded = (cloud.kind == "encode") & np.char.startswith(cloud.unit, PLAN)
    return float(cloud.end_s[coded].min()) if coded.any() else 0.0
