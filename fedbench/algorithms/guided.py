"""What guided methods share: where guides come from, when they are made, and the signs that they are probed with.

The cloud makes them (`make`), every replica keeps them until the next ones (`span`). No rule of a method stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from fedbench.algorithms.base import Lab, Round
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import NumericsError
from fedbench.base.rng import generator, key
from fedbench.data.rows import Batch
from fedbench.zo.guide import by_class, mean_gradient, unit_guides
from fedbench.zo.span import Layout, Span


class GuideSettings(BaseSettings):
    """Settings of every guided method."""

    guide: Literal["public", "batches", "classes", "layers", "random"] = Field(
        "public",
        description="one guide from the public gradient; one each from `guides` public batches, from each class, or from "
        "each layer's share of the gradient; or a random unit vector (control)",
    )
    guides: int = Field(2, ge=2, description="number of guides of guide = 'batches'")
    public_batches: int = Field(0, ge=0, description="public batches a round for the guide; 0 is the whole public set")
    guide_every: int = Field(1, ge=0, description="rounds between new guides; 0: those of the first round for ever")


class Guides:
    """The guides of a run on one replica; `unit` says that they are orthonormal, else the gradient travels as it is."""

    def __init__(self, settings: GuideSettings, lab: Lab, *, unit: bool = True) -> None:
        self._settings = settings
        self._lab = lab
        self._unit = unit
        counts = {"batches": settings.guides, "classes": lab.cut.classes}
        self.layout = Layout(lab.trainable, counts.get(settings.guide, 1), by_layer=settings.guide == "layers")
        self._span: Span | None = None

    @property
    def count(self) -> int:
        """Number of guides m."""
        return self.layout.count

    def units(self, round_: Round) -> Sequence[Unit]:
        """Return what travels in an exchange."""
        every = self._settings.guide_every
        new = round_.number % every == 0 if every else round_.number == 0
        return self.layout.units() if new and round_.exchange == 0 else ()

    def make(self, round_: Round) -> tuple[float, Arrays]:
        """Return the public loss (NaN for the random control) and new guides at the present weights (cloud only)."""
        lab, kind = self._lab, self._settings.guide
        if kind == "random":
            loss, gradients = float("nan"), [self._random(round_)]
        elif kind == "classes":
            loss, gradients = self._means(by_class(self._rows(round_), lab.cut.classes))
        elif kind == "batches":
            batches = [lab.public(round_.number, b) for b in range(self._settings.guides)]
            loss, gradients = self._means([[batch] for batch in batches])
        else:
            loss, grads = mean_gradient(lab.cut, lab.trainable, self._rows(round_), lab.meter)
            gradients = [grads]
        if not self._unit:
            return loss, {t.name: g.cpu().numpy() for t, g in zip(lab.trainable, gradients[0], strict=True)}
        if self.count == 1:
            sign = self.sign(round_)
            gradients = [[grad.mul_(sign) for grad in gradients[0]]]
        return loss, unit_guides(self.layout, gradients)

    def sign(self, round_: Round) -> float:
        """Return the sign that a lone guide of unit length is made with; 1 for others."""
        if not self._unit or self.count > 1:
            return 1.0
        return 1.0 if key(self._lab.seed, "guide sign", round_.number)[0] & 1 else -1.0

    def span(self, plan: Arrays) -> Span:
        """Return the guides in force: those of the plan, or the latest where it brought none."""
        if plan:
            self._span = Span(self.layout, plan)
        assert self._span is not None
        return self._span

    def signs(self, round_: Round, device: int, *, alone: bool = False) -> np.ndarray:
        """Return the signs that a device's P directions weigh the guides with, float64 [P, m].

        A lone guide has its sign in itself and takes 1, unless `alone` says that every direction draws one.
        """
        shape = (self._lab.perturbations, self.count)
        if self.count == 1 and not alone:
            return np.ones(shape)
        stream = generator(self._lab.seed, "guide signs", round_.number, round_.exchange, device)
        return 1.0 - 2.0 * stream.integers(0, 2, shape)

    def state(self) -> dict[str, np.ndarray]:
        """Return the guides in force where they serve several rounds."""
        if self._settings.guide_every == 1 or self._span is None:
            return {}
        host = self._lab.cut.residency.host
        arrays = self._span.arrays
        return {f"guide/{unit.name}": np.array(host(arrays[unit.name])) for unit in self.layout.units()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the guides back."""
        own = {name.removeprefix("guide/"): a for name, a in state.items() if name.startswith("guide/")}
        if own:
            shapes = {unit.name: unit.shape for unit in self.layout.units()}
            arrays = {name: array.reshape(shapes[name]) for name, array in own.items()}
            self._span = Span(self.layout, self._lab.cut.residency.arrays(arrays))

    def _rows(self, round_: Round) -> Sequence[Batch]:
        lab, batches = self._lab, self._settings.public_batches
        return [lab.public(round_.number, b) for b in range(batches)] if batches else lab.public_rows()

    def _means(self, groups: Iterable[Iterable[Batch]]) -> tuple[float, list[list[torch.Tensor]]]:
        """Return the mean of the groups' losses and each group's mean gradient."""
        lab = self._lab
        found = [mean_gradient(lab.cut, lab.trainable, group, lab.meter) for group in groups]
        if len(found) != self.count:
            raise NumericsError(f"{len(found)} classes have public rows; guide = 'classes' needs all {self.count}.")
        return float(np.mean([loss for loss, _ in found])), [grads for _, grads in found]

    def _random(self, round_: Round) -> list[torch.Tensor]:
        stream = generator(self._lab.seed, "random guide", round_.number)
        return [
            torch.from_numpy(stream.standard_normal(tuple(t.parameter.shape), np.float32)).to(t.parameter.device)
            for t in self._lab.trainable
        ]
