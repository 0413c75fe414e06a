"""Where to cut a model in two for one-sided steps, and how large they should be, from a few probes at the weights.

Probed are three regions by themselves: all before the last layer, the last layer, the head. With d and c the first and
second derivatives along a random u of a region, n = mean d^2 is a device's squared gradient (signal and noise), and
T = mean c the trace of its curvature. Nothing here keeps a state or moves a weight.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np

from fedbench.data.rows import Batch
from fedbench.zo.direction import Direction
from fedbench.zo.estimate import central
from fedbench.zo.stream import Front, Probe, Stream

#: Directions at which noise equals the signal's own curvature, n T / (M q): q can't be probed, and 7 is a middle value.
SATURATION = 7.0
MOST_P2 = 64


@dataclass(frozen=True)
class Choice:
    """What a split method works with: first stage of block 2, P2, block 2's step over block 1's, a factor of block 1's.

    `n_start` and `t_start` are n and T of the first region at the first probe, NaN before.
    """

    boundary: int
    p2: int
    ratio: float
    y_scale: float = 1.0
    n_start: float = math.nan
    t_start: float = math.nan

    def array(self) -> np.ndarray:
        """Return all values as float64 [6]."""
        return np.array(astuple(self), np.float64)

    @classmethod
    def of(cls, array: np.ndarray) -> Choice:
        """Return the choice that `array` made."""
        boundary, p2, *rest = array.tolist()
        return cls(int(boundary), int(p2), *rest)


def regions(stages: int) -> list[range]:
    """Return the stages of all before the last layer, of the last layer and of the head; cuts are where one ends."""
    return [range(stages - 2), range(stages - 2, stages - 1), range(stages - 1, stages)]


def probe(stream: Stream, batch: Batch, keys: np.ndarray, h: float, trained: set[int]) -> tuple[np.ndarray, float]:
    """Return d and c, float32 [3, Q, 2], along Q directions in each region, and the clean loss l0.

    d = (l+ - l-) / (2 h) and c = (l+ + l- - 2 l0) / h^2; a region whose stages hold nothing in `trained` stays 0.
    """
    found = np.zeros((3, len(keys), 2), np.float32)
    still = Probe(Direction(keys[0]), 0.0, sides=1)
    first, last, head = regions(stream.cut.stages)
    at_last = stream.run(stream.begin(batch, 1), first, still)
    at_head = stream.run(at_last, last, still)
    (l0,) = stream.end(at_head, head.start, still)
    for index, region in enumerate((first, last, head)):
        if trained.isdisjoint(region):
            continue
        start = stream.begin(batch) if region is first else stream.both(at_last if region is last else at_head)
        for q, key in enumerate(keys):
            u = Direction(key)
            here = Probe(u, h, front=Front(region.start, u, 0.0))
            behind = Probe(u, 0.0, front=Front(region.stop, u, h if region is first else 0.0))
            if region is head:
                plus, minus = stream.end(start, head.start, here)
            else:
                plus, minus = stream.end(stream.run(start, region, here), region.stop, behind)
            found[index, q] = central(plus, minus, h), (plus + minus - 2 * l0) / h**2
    return found, l0


def choose(before: Choice, probes: np.ndarray, costs: np.ndarray, p1: int, cuts: dict[int, int]) -> Choice:
    """Return the choice for the coming rounds from all devices' probes [M, 3, Q, 2] and cost shares of block 2 [M, 2].

    `cuts` maps a cut's index to its boundary. For each cut, with y the regions before it and z those behind:

        P2 = sqrt(7 / cz), 1 to 64
        R  = [n_y / T_y / (1/7 + 1/P1) + n_z / T_z / (1/7 + 1/P2)] / (1 + P1 + P2 cz),  progress per compute with s = n
        eta_z / eta_y = P2 T_y / (P1 T_z)

    The cut of the largest R is taken. One where a T isn't above its standard error is left out; without any the cut, P2
    and the ratio stay. Block 1's step never grows above its start: y_scale = min(1, sqrt(n_start / n), t_start / T).
    """
    d, c = (np.moveaxis(probes[..., i].astype(np.float64), 1, 0).reshape(3, -1) for i in (0, 1))
    n, t, variance = np.square(d).mean(1), c.mean(1), c.var(1) / max(1, c.shape[1] - 1)
    best, boundary, p2, ratio = 0.0, before.boundary, before.p2, before.ratio
    for cut, stage in cuts.items():
        share = float(costs[:, cut].mean(dtype=np.float64))
        most = _directions(share)
        blocks = slice(0, cut + 1), slice(cut + 1, 3)
        (n_y, t_y), (n_z, t_z) = ((float(n[block].sum()), float(t[block].sum())) for block in blocks)
        if any(t[block].sum() <= math.sqrt(variance[block].sum()) for block in blocks):
            continue
        progress = n_y / t_y / (1 / SATURATION + 1 / p1) + n_z / t_z / (1 / SATURATION + 1 / most)
        rate = progress / (1 + p1 + most * share)
        if rate > best:
            best, boundary, p2, ratio = rate, stage, most, most * t_y / (p1 * t_z)
    n_now, t_now = float(n[0]), float(t[0]) if t[0] > math.sqrt(variance[0]) else math.nan
    n_start = n_now if math.isnan(before.n_start) else before.n_start
    t_start = t_now if math.isnan(before.t_start) else before.t_start
    factors = [math.sqrt(n_start / n_now) if n_now > 0 else math.nan, t_start / t_now]
    y_scale = min([1.0, *(factor for factor in factors if not math.isnan(factor))])
    return Choice(boundary, p2, ratio, y_scale, n_start, t_start)


def _directions(share: float) -> int:
    return max(1, min(MOST_P2, round(math.sqrt(SATURATION / share)))) if share > 0 else MOST_P2
