"""Estimators in two blocks: what devices measure, and what their scalars weigh (methods.md 2.14).

Block 1 (weights y) ends at a stage boundary, block 2 (weights z) is the rest; u_p are directions of y and v those
of z. Each estimate is a mean: g_y = mean_p a_p u_p, g_z = mean b v. Nothing here draws a key or moves a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from fedbench.base.errors import ConfigError
from fedbench.data.rows import Batch
from fedbench.zo.direction import Direction
from fedbench.zo.estimate import central, forward
from fedbench.zo.stream import Front, Probe, Stream

Estimator = Literal["A", "Ac", "B", "B1", "D"]

#: Estimators in which every u_p has P2 directions v_pq of its own.
CHAINED = ("A", "Ac", "D")


def layers_before(split: int, layers: int, setting: str) -> int:
    """Return the layers in block 1 from a setting that counts from the end where it is negative; ConfigError names it."""
    first = split if split >= 0 else layers + split
    if not 0 <= first <= layers:
        raise ConfigError(f"{setting}: found {split}; allowed: {-layers} .. {layers}.")
    return first


def scalar_count(estimator: Estimator, p1: int, p2: int) -> int:
    """Return how many scalars an estimate is made of."""
    return {"A": p1 * p2, "Ac": p1 * p2, "D": p1 + p1 * p2, "B": p1 + p2, "B1": p1 + p2}[estimator]


def picks(estimator: Estimator, keys: np.ndarray, p1: int, p2: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of all u and of all v out of a step's keys; one key serves both, since no tensor is in both."""
    return (keys[: p1 * p2 : p2], keys[: p1 * p2]) if estimator in CHAINED else (keys[:p1], keys[:p2])


def derivatives(estimator: Estimator, scalars: np.ndarray, p1: int, p2: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a [M, P1] and b [M, directions of z] of estimates' scalars [M, n], float32.

    A:      a_p = mean_q d_pq,  b_pq = d_pq
    Ac:     a_p = mean_q d_pq,  b_pq = (d_pq - a_p) P2 / (P2 - 1): what y adds to d_pq is the same for all q
    B, B1:  a, b as measured
    D:      a_p = mean_q dy_pq, b_pq = dz_pq, as measured
    """
    if estimator not in ("A", "Ac"):
        return scalars[:, :p1], scalars[:, p1:]
    d = scalars.reshape(-1, p1, p2)
    a = d.mean(2, dtype=np.float64)
    b = d if estimator == "A" else ((d - a[:, :, None]) * (p2 / (p2 - 1))).astype(np.float32)
    return a.astype(np.float32), b.reshape(len(d), -1)


def crossed(pp: float, pm: float, mp: float, mm: float, h: float) -> tuple[np.float32, np.float32]:
    """Return the derivatives along u and along v from the losses at (+-h u, +-h v); mixed terms cancel to first order."""
    return central((pp + pm) / 2, (mp + mm) / 2, h), central((pp + mp) / 2, (pm + mm) / 2, h)


class Measured(NamedTuple):
    """Scalars float32 [n] of one batch and its mean loss."""

    scalars: np.ndarray
    loss: float


@dataclass(frozen=True)
class Blocks:
    """A model in two blocks, the second from stage `boundary` on, and the probing step."""

    stream: Stream
    boundary: int
    epsilon: float

    def measure(self, estimator: Estimator, batch: Batch, u: np.ndarray, v: np.ndarray) -> Measured:
        """Return an estimator's scalars along the directions of some keys, uint64 [P1, 2] and [directions of z, 2]."""
        if estimator == "B1":
            return self.one_sided(batch, u, v)
        if estimator == "B":
            return self._separate(batch, u, v)
        return self._chained(batch, u, v) if estimator != "D" else self._crossed(batch, u, v)

    def one_sided(self, batch: Batch, u: np.ndarray, v: np.ndarray) -> Measured:
        """h0 = block1(y), l0 = block2(h0, z);  b_q = [block2(h0, z + eps v_q) - l0] / eps;  a_p = [f(y + eps u_p) - l0] / eps.

        One boundary state; without any u block 1 runs once and y stays where it is.
        """
        stream, eps = self.stream, self.epsilon
        still = self._probe(v[0], 0.0, v[0], 0.0, 1)
        h0 = stream.run(stream.begin(batch, 1), range(self.boundary), still)
        (l0,) = stream.end(h0, self.boundary, still)
        moved = [stream.end(h0, self.boundary, self._probe(k, 0.0, k, eps, 1))[0] for k in v]
        before = [stream.end(stream.begin(batch, 1), 0, self._probe(k, eps, k, 0.0, 1))[0] for k in u]
        return Measured(np.array([forward(loss, l0, eps) for loss in before + moved], np.float32), l0)

    def _separate(self, batch: Batch, u: np.ndarray, v: np.ndarray) -> Measured:
        """As one-sided, with both sides of every direction and without l0."""
        stream, eps = self.stream, self.epsilon
        clean = stream.run(stream.begin(batch, 1), range(self.boundary), self._probe(v[0], 0.0, v[0], 0.0, 1))
        both = stream.both(clean)
        moved = [stream.end(both, self.boundary, self._probe(k, 0.0, k, eps)) for k in v]
        before = [stream.end(stream.begin(batch), 0, self._probe(k, eps, k, 0.0)) for k in u]
        d = [central(plus, minus, eps) for plus, minus in before + moved]
        return Measured(np.array(d, np.float32), float(np.mean(before + moved)))

    def _chained(self, batch: Batch, u: np.ndarray, v: np.ndarray) -> Measured:
        """h+- = block1(y +- eps u_p);  d_pq = [block2(h+, z + eps v_pq) - block2(h-, z - eps v_pq)] / (2 eps)."""
        stream, eps = self.stream, self.epsilon
        d, losses = [], []
        for y, zs in zip(u, np.split(v, len(u)), strict=True):
            state = stream.run(stream.begin(batch), range(self.boundary), self._probe(y, eps, y, 0.0))
            for z in zs:
                plus, minus = stream.end(state, self.boundary, self._probe(y, eps, z, eps))
                d.append(central(plus, minus, eps))
                losses.append((plus + minus) / 2)
        return Measured(np.array(d, np.float32), float(np.mean(losses)))

    def _crossed(self, batch: Batch, u: np.ndarray, v: np.ndarray) -> Measured:
        """As chained, with z + eps v_pq and z - eps v_pq behind each of h+ and h-: mean_q dy_pq, then all dz_pq."""
        stream, eps = self.stream, self.epsilon
        along_y, along_z, losses = [], [], []
        for y, zs in zip(u, np.split(v, len(u)), strict=True):
            state = stream.run(stream.begin(batch), range(self.boundary), self._probe(y, eps, y, 0.0))
            dy = []
            for z in zs:
                pp, mm = stream.end(state, self.boundary, self._probe(y, eps, z, eps))
                pm, mp = stream.end(state, self.boundary, self._probe(y, eps, z, -eps))
                a, b = crossed(pp, pm, mp, mm, eps)
                dy.append(a)
                along_z.append(b)
                losses.append((pp + pm + mp + mm) / 4)
            along_y.append(np.mean(dy, dtype=np.float64))
        return Measured(np.array(along_y + along_z, np.float32), float(np.mean(losses)))

    def _probe(self, y: np.ndarray, h_y: float, z: np.ndarray, h_z: float, sides: int = 2) -> Probe:
        """Return the probe y + h_y u, z + h_z v, with the keys of u and v; two sides are that and its mirror image."""
        return Probe(Direction(z), h_z, sides=sides, front=Front(self.boundary, Direction(y), h_y))
