"""CooperLLM plus: the guide's coefficient regressed out of isotropic probes, and many cheap directions of the last block.

    cloud:  V_1 .. V_m orthonormal, from the public gradient (cooperllm.py)
    y: embedding and the first `split` layers;  z: the rest and the head, as in fedspzo.py;  Q = M P queries
    device: h0 = block1(y), l0 = block2(h0, z)                                                     once
            u_p = e_p + b sum_j s_pj V_j,  e_p isotropic in y,  s = +-1:  d_p = [f(w + eps u_p) - l0] / eps
            b_q = [block2(h0, z + eps v_q) - l0] / eps                                             P2 of them
    all:    c_j = mean_i s_ij d_i / b,  r_i = d_i - b sum_j s_ij c_j^(-i)   (c^(-i) over the other queries)
            k_j = max(0, 1 - var(c_j) / c_j^2)                              (1 with shrink = false)
            w <- w - lr guide_ratio sum_j k_j c_j V_j
            y <- y - lr mean_i r_i e_i,   z <- z - lr lr_ratio mean_iq b_iq v_iq

A guide of weight b (about 2, not sqrt(n)) leaves the isotropic signal alive, so private data go on teaching where the
public set has nothing left to say: there c_j drowns in its own scatter and k_j closes the guide. One full probe serves
both parts; block 2's directions cost block 2. Uplink: P + P2 scalars a step. P2 = 0: no split, e_p in all weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import Lab, Reply, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.algorithms.guided import Guides, GuideSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import ConfigError
from fedbench.zo.direction import Direction, Terms
from fedbench.zo.estimate import forward, regressed
from fedbench.zo.ranges import Guide
from fedbench.zo.stream import Front, Probe
from fedbench.zo.twoblock import layers_before
from fedbench.zo.update import subtract


class Settings(GuideSettings):
    """CooperLLM plus's settings."""

    lr: StepSize = 3e-4
    lr_ratio: float = Field(60.0, gt=0, description="step size of block 2 over that of block 1, which is lr")
    guide_ratio: float = Field(150.0, ge=0, description="step size along the guides over lr; 0: no guidance (control)")
    b: float = Field(2.0, gt=0, description="weight of each guide in a direction whose isotropic entries are of size 1")
    split: int | None = Field(
        None,
        description="layers in block 1, negative counts from the end; unset: all but a last layer that runs at one position "
        "alone, else all (block 2 is the head)",
    )
    p2: int = Field(32, ge=0, description="directions of block 2 in a step; 0: one block")
    shrink: bool = Field(True, description="shorten each guide's step by how uncertain its coefficient is")


class CooperLLMPlus(ScalarMethod):
    """Guided zeroth-order steps that go on learning what the public set lacks."""

    name = "cooperllm_plus"
    summary = "guide's coefficient regressed out of isotropic probes, many cheap directions of the last block"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    sides = 1
    keeps_plan = True
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        s = self.settings
        first = self._first_block(lab) if s.p2 else lab.cut.stages - 1
        self._boundary = first + 1
        self._y = [t for t in lab.trainable if t.stage < self._boundary]
        self._z = [t for t in lab.trainable if t.stage >= self._boundary]
        if s.p2 and not self._z:
            raise ConfigError(
                f"method.cooperllm_plus.split: with split = {first} and the part {lab.trainable.part!r}, block 2 has "
                "nothing to train; p2 = 0 trains one block."
            )
        self._guides = Guides(s, lab)

    def _first_block(self, lab: Lab) -> int:
        """Return the layers in block 1; unset, block 2 is cheap: it runs at one position of a text."""
        layers, trained = len(lab.cut.blocks), {t.stage for t in lab.trainable}
        if self.settings.split is not None:
            return layers_before(self.settings.split, layers, "method.cooperllm_plus.split")
        return layers if lab.cut.last is None and layers + 1 in trained else layers - 1

    def outline_units(self, round_: Round) -> Sequence[Unit]:
        """Which rows of embeddings the guides hold."""
        return self._guides.outline_units(round_) if self.settings.guide_ratio else ()

    def learn(self, outline: Arrays) -> None:
        """Take the outline."""
        self._guides.learn(outline)

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """The guides, in the first exchange of a round that makes new ones."""
        return self._guides.units(round_) if self.settings.guide_ratio else ()

    def plan(self, round_: Round) -> Arrays:
        """Return the guides at the present weights."""
        self.cloud_loss, arrays = self._guides.make(round_)
        return arrays

    def plan_stages(self, round_: Round) -> Sequence[int]:
        """The stages of the guides' tensors."""
        return self._guides.stages()

    def plan_rows(self, round_: Round) -> Mapping[str, np.ndarray]:
        """The rows of tables that are nearly empty."""
        return self._guides.unit_rows()

    def flops_before_plan(self, rows: int, length: int) -> float:
        """The clean forward, and block 2's own directions."""
        if not self.settings.p2:
            return self.lab.cut.forward_flops(rows, length)
        tail = range(self._boundary, self.lab.cut.stages)
        block = sum(self.lab.cut.stage_flops(stage, rows, length) for stage in tail)
        return self.lab.cut.forward_flops(rows, length) + self.settings.p2 * block

    def ahead(self, round_: Round) -> None:
        """Make the next round's guides where they may lag."""
        if self.settings.guide_ratio:
            self._guides.make_ahead(round_)

    def plan_sign(self, round_: Round) -> float:
        """The sign that stands in a lone guide."""
        return self._guides.sign(round_)

    def scalars(self, round_: Round) -> int:
        """P + P2 in each exchange, one exchange per local step."""
        return self.lab.perturbations + self.settings.p2

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return d [P] and b [P2] at the replica's weights."""
        lab, eps, boundary = self.lab, self.lab.epsilon, self._boundary
        stream, batch = lab.stream, lab.private(round_.number, round_.exchange, device)
        keys, still = self._keys(round_, device), Direction(self._keys(round_, device)[0])
        clean = Probe(still, 0.0, sides=1)
        state = (
            stream.run(stream.begin(batch, 1), range(boundary), clean) if self.settings.p2 else stream.begin(batch, 1)
        )
        first = boundary if self.settings.p2 else 0
        (l0,) = stream.end(state, first, clean)
        moved = [stream.end(state, first, Probe(Direction(v), eps, sides=1))[0] for v in keys[: self.settings.p2]]
        full = []
        for e, signs in zip(keys, self._guides.signs(round_, device, alone=True), strict=False):
            guide, weight = self._mixed(plan, self.settings.b * signs)
            in_y, in_z = Direction(e, 1.0, guide, weight), Direction(e, 0.0, guide, weight)
            probe = Probe(in_z, eps, sides=1, front=Front(boundary, in_y, eps))
            full.append(stream.end(stream.begin(batch, 1), 0, probe)[0])
        d = [forward(loss, l0, eps) for loss in full + moved]
        return Upload({"scalars": np.array(d, np.float32)}, l0)

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return all scalars; one more exchange for each local step left."""
        return super().combine(round_, uploads)._replace(again=round_.exchange + 1 < self.lab.local_steps)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """Take the guides' step, y's and z's."""
        lab, s, count = self.lab, self.settings, self.lab.perturbations
        d, b = reply["scalars"][:, :count].astype(np.float64).reshape(-1), reply["scalars"][:, count:]
        keys = [self._keys(round_, device) for device in round_.devices]
        e, v = (np.concatenate([own[:n] for own in keys]) for n in (count, s.p2))
        if s.guide_ratio:
            signs = np.concatenate([self._guides.signs(round_, device, alone=True) for device in round_.devices])
            c, shrunk, r = regressed(d, signs, s.b)
            guide, factor = self._mixed(plan, round_.lr * s.guide_ratio * (shrunk if s.shrink else c))
        else:
            r, guide, factor = d, None, 0.0
        y_terms = Terms(e, (round_.lr / len(r) * r).astype(np.float32), guide, factor)
        z_coef = (round_.lr * s.lr_ratio / max(1, b.size) * b.reshape(-1)).astype(np.float32)
        self.replay_ops += subtract(self._y, y_terms, gaussian=lab.gaussian, poll=lab.stream.poll)
        self.replay_ops += subtract(
            self._z, Terms(v, z_coef, guide, factor), gaussian=lab.gaussian, poll=lab.stream.poll
        )

    def skip(self, round_: Round, plan: Arrays) -> None:
        """Keep the guides, which may serve later rounds."""
        if plan:
            self._guides.span(plan)

    def state(self) -> dict[str, np.ndarray]:
        """Return the guides that later rounds need."""
        return self._guides.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the guides back."""
        self._guides.restore(state)

    def _mixed(self, plan: Arrays, coef: np.ndarray) -> tuple[Guide | None, float]:
        return self._guides.span(plan).mix(coef) if self.settings.guide_ratio else (None, 0.0)

    def _keys(self, round_: Round, device: int) -> np.ndarray:
        """Return keys that serve e_p and v_q alike: no tensor is moved by both."""
        step = range(round_.exchange, round_.exchange + 1)
        return self.lab.directions(round_.number, device, step, max(self.lab.perturbations, self.settings.p2))
