"""FedSPZO: the network in two blocks, more directions for the second (methods.md 2.14, fedspzo.md).

    y: embedding and the first `split` layers, cost Cy;  z: the rest and the head, cost Cz;  C = Cy + Cz
    A:   h+- = block1(y +- eps u_p);  d_pq = [block2(h+, z + eps v_pq) - block2(h-, z - eps v_pq)] / (2 eps)
         g_y = mean_p (mean_q d_pq) u_p,  g_z = mean_pq d_pq v_pq                         2 P1 (Cy + P2 Cz)
    Ac:  A with g_z = mean_p sum_q (d_pq - mean_q d_pq) v_pq / (P2 - 1)                   2 P1 (Cy + P2 Cz)
    D:   A with v_pq on both sides of each h+-, derivatives along u and v apart           P1 (2 Cy + 4 P2 Cz)
    B:   h0 = block1(y);  z two-sided from h0, y two-sided through the whole model        Cy + 2 P2 Cz + 2 P1 C
    B1:  B one-sided against l0 = block2(h0, z)                                           (1 + P1) C + P2 Cz
    all: y <- y - lr mean_i g_y,  z <- z - lr lr_ratio mean_i g_z

One synchronous update per local step. A with P1 = P and P2 = 1 is FedMeZO with P directions; A with P1 = P2 = 1 and
a ratio other than 1 is MeZO with block-wise steps. `freeze_first` is B1 without any u: z alone, y stays. `auto` probes
three regions every `reprobe` rounds and sets split, P2, ratio and a factor of y's step (zo/autosplit.py). The published
estimator isn't known; these are readings of its abstract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import Lab, Reply, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import ConfigError
from fedbench.zo import autosplit, twoblock
from fedbench.zo.direction import Terms
from fedbench.zo.update import subtract

#: The probing step of `auto` over the method's own: second differences need a larger one.
PROBE_STEP = 2.0


class Settings(BaseSettings):
    """FedSPZO's settings."""

    lr: StepSize = 1e-3
    lr_ratio: float = Field(10.0, gt=0, description="step size of block 2 over that of block 1, which is lr")
    estimator: twoblock.Estimator = Field("B1", description="how directions of both blocks meet: A, Ac, B, B1 or D")
    split: int = Field(
        -1,
        description="layers in block 1; negative counts from the end (-1: all but the last); all: the head is block 2",
    )
    p1: int = Field(1, ge=1, description="directions of block 1 in a step")
    p2: int = Field(6, ge=1, description="directions of block 2 (A, Ac, D: for each one of block 1); Ac needs 2")
    freeze_first: bool = Field(False, description="block 2 alone on clean activations (B1 without block 1's part)")
    auto: bool = Field(False, description="choose split, p2 and lr_ratio by probes (B1); given ones until they tell")
    reprobe: int = Field(25, ge=1, description="rounds from one probe to the next with auto")
    probes: int = Field(2, ge=1, description="directions in each region that a device probes with auto")


class FedSPZO(ScalarMethod):
    """Split perturbation: what block 1 computes serves several directions of block 2."""

    name = "fedspzo"
    summary = "zeroth-order in two blocks, boundary activations reused"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        s, layers = self.settings, len(lab.cut.blocks)
        first = twoblock.layers_before(s.split, layers, "method.fedspzo.split")
        if s.estimator == "Ac" and s.p2 < 2:
            raise ConfigError(f"method.fedspzo.p2: found {s.p2}; estimator Ac centres over q and needs at least 2.")
        if (s.auto or s.freeze_first) and (s.estimator != "B1" or s.auto == s.freeze_first):
            raise ConfigError(
                "method.fedspzo: auto and freeze_first are two kinds of estimator B1; choose one of them."
            )
        self._trained = {t.stage for t in lab.trainable}
        empty = self._empty_block(first + 1)
        if empty and not (empty == 1 and s.freeze_first):
            raise ConfigError(
                f"method.fedspzo.split: with split = {first} and the part {lab.trainable.part!r}, "
                f"block {empty} has nothing to train."
            )
        self._p1 = 0 if s.freeze_first else s.p1
        self._cuts = {cut: layers + cut for cut in (0, 1) if layers + cut > 0 and not self._empty_block(layers + cut)}
        self._choice = autosplit.Choice(first + 1, s.p2, s.lr_ratio)

    def scalars(self, round_: Round) -> int:
        """A, Ac: P1 P2;  B, B1: P1 + P2;  D: P1 + P1 P2, in each of one exchange per local step."""
        return twoblock.scalar_count(self.settings.estimator, self._p1, self._choice.p2)

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """One vector; first in a round of probes the derivatives (region, direction, order) and what block 2 costs."""
        return self._probe_units(()) if self._is_probe(round_) else super().upload_units(round_, device)

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """All sampled devices' units, in device order."""
        return self._probe_units((len(round_.devices),)) if self._is_probe(round_) else super().reply_units(round_)

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return the estimator's scalars at the replica's weights, or probes of them."""
        lab = self.lab
        if self._is_probe(round_):
            return self._probed(round_, device)
        batch = lab.private(round_.number, self._step(round_), device)
        blocks = twoblock.Blocks(lab.stream, self._choice.boundary, lab.epsilon)
        measured = blocks.measure(self.settings.estimator, batch, *self._directions(round_, device))
        return Upload({"scalars": measured.scalars}, measured.loss)

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return all that came; one more exchange for each local step left."""
        names = [unit.name for unit in self.reply_units(round_)]
        reply = {name: np.stack([arrays[name] for arrays in uploads.values()]) for name in names}
        return Reply(reply, again=self._step(round_) + 1 < self.lab.local_steps)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """y <- y - lr_y mean_ip(a u),  z <- z - lr_z mean_i(b v); probes change what comes and no weight."""
        if self._is_probe(round_):
            self._choice = autosplit.choose(self._choice, reply["probes"], reply["costs"], self._p1, self._cuts)
            return
        choice, lr = self._choice, round_.lr * self._choice.y_scale
        a, b = twoblock.derivatives(self.settings.estimator, reply["scalars"], self._p1, choice.p2)
        keys = [self._directions(round_, device) for device in round_.devices]
        y = [t for t in self.lab.trainable if t.stage < choice.boundary]
        z = [t for t in self.lab.trainable if t.stage >= choice.boundary]
        for tensors, block, weights, step in ((y, 0, a, lr), (z, 1, b, lr * choice.ratio)):
            if weights.size:
                coef = (step / weights.size * weights.reshape(-1)).astype(np.float32)
                terms = Terms(np.concatenate([pair[block] for pair in keys]), coef)
                self.replay_ops += subtract(tensors, terms, gaussian=self.lab.gaussian)

    def state(self) -> dict[str, np.ndarray]:
        """Return what probes have chosen."""
        return {"choice": self._choice.array()} if self.settings.auto else {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned."""
        if self.settings.auto:
            self._choice = autosplit.Choice.of(state["choice"])

    def _empty_block(self, boundary: int) -> int:
        """Return the number of the block without anything to train, 0 where both have."""
        return 1 if min(self._trained) >= boundary else 2 if max(self._trained) < boundary else 0

    def _probes(self, round_: Round) -> int:
        return int(self.settings.auto and round_.number % self.settings.reprobe == 0)

    def _step(self, round_: Round) -> int:
        """Return the local step, -1 for probes."""
        return round_.exchange - self._probes(round_)

    def _is_probe(self, round_: Round) -> bool:
        return self._step(round_) < 0

    def _directions(self, round_: Round, device: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys of u and of v; u_p has the key of v_p0 (or of v_p), in other tensors."""
        estimator, p1, p2 = self.settings.estimator, self._p1, self._choice.p2
        step = self._step(round_)
        count = p1 * p2 if estimator in twoblock.CHAINED else max(p1, p2)
        return twoblock.picks(
            estimator, self.lab.directions(round_.number, device, range(step, step + 1), count), p1, p2
        )

    def _probe_units(self, each: tuple[int, ...]) -> Sequence[Unit]:
        return Unit("probes", (*each, 3, self.settings.probes, 2)), Unit("costs", (*each, 2))

    def _probed(self, round_: Round, device: int) -> Upload:
        """Return derivatives in three regions on the first step's batch, and block 2's share of its cost by cut."""
        lab, steps = self.lab, self.lab.local_steps
        batch = lab.private(round_.number, 0, device)
        keys = lab.directions(round_.number, device, range(steps, steps + 1), self.settings.probes)
        found, loss = autosplit.probe(lab.stream, batch, keys, PROBE_STEP * lab.epsilon, self._trained)
        costs = np.array([lab.cut.stage_flops(stage, *batch.ids.shape) for stage in range(lab.cut.stages)])
        shares = np.array([costs[-2:].sum(), costs[-1]], np.float64) / costs.sum()
        return Upload({"probes": found, "costs": shares.astype(np.float32)}, loss)
