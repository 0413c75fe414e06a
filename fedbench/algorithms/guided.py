"""What guided methods share: where guides come from, when they are made, and the signs that they are probed with.

The cloud makes them (`make`), every replica keeps them until the next ones (`span`). No rule of a method stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from fedbench.algorithms.base import CLOUD, Lab, Round
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Coded, Unit
from fedbench.base.errors import ConfigError, NumericsError
from fedbench.base.rng import generator, key
from fedbench.data.rows import Batch
from fedbench.zo.guide import by_class, mean_gradient, unit_guides
from fedbench.zo.layout import Cutting, Layout, row_sparse
from fedbench.zo.span import Span

#: How the names of their state begin: units as they travelled, their outline, and guides that only the cloud has.
_GUIDE, _OUTLINE, _AHEAD = "guide/", "outline/", CLOUD + "ahead/"


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


class _Made(NamedTuple):
    """Guides as units with their outline, for a round, and the public loss at the weights that they were made from."""

    round: int
    loss: float
    units: Arrays


class Guides:
    """The guides of a run on one replica; `unit` says that they are orthonormal, else the gradient travels as it is."""

    def __init__(self, settings: GuideSettings, lab: Lab, *, unit: bool = True) -> None:
        if lab.guide_reuse == "resend" and settings.guide_every != 1:
            raise ConfigError(
                f"comm.guide_reuse: found 'resend' with guide_every = {settings.guide_every}; a guide that serves several "
                "rounds is kept. Allowed with 'resend': guide_every = 1."
            )
        self._settings = settings
        self._lab = lab
        self._unit = unit
        counts = {"batches": settings.guides, "classes": lab.cut.classes}
        self.layout = Layout(
            lab.trainable,
            counts.get(settings.guide, 1),
            by_layer=settings.guide == "layers",
            sparse=row_sparse(lab.cut, lab.trainable),
        )
        self._cutting = Cutting(self.layout)
        self._span: Span | None = None
        self._ahead: _Made | None = None

    @property
    def count(self) -> int:
        """Number of guides m."""
        return self.layout.count

    def outline_units(self, round_: Round) -> Sequence[Unit]:
        """Return what goes ahead of new guides."""
        return self.layout.outline_units() if self._new(round_) else ()

    def learn(self, outline: Arrays) -> None:
        """Take the outline of the guides that come next."""
        self._cutting = Cutting(self.layout, outline)

    def units(self, round_: Round) -> Sequence[Unit]:
        """Return what travels in an exchange."""
        return self._cutting.units() if self._new(round_) else ()

    def stages(self) -> Sequence[int]:
        """Return the stage that reads each unit first."""
        return self._cutting.stages()

    def unit_rows(self) -> Mapping[str, np.ndarray]:
        """Return the rows that each unit holds of a table that travels as rows."""
        return self._cutting.unit_rows()

    def make(self, round_: Round) -> tuple[float, Arrays]:
        """Return the public loss (NaN for the random control) and new guides with their outline (cloud only).

        With a lag they are those that were made in the round before, at its weights; the first ones are new.
        """
        made, self._ahead = self._ahead, None
        if made is None or made.round != round_.number:
            made = self._made(round_)
        return made.loss, made.units

    def make_ahead(self, round_: Round) -> None:
        """Make the guides of the next round at the weights of this one, where there is a lag (cloud only)."""
        after = round_._replace(number=round_.number + 1, exchange=0)
        if self._lab.guide_lag and round_.exchange == 0 and after.number < self._lab.rounds and self._new(after):
            self._ahead = self._made(after)

    def whole(self, round_: Round) -> tuple[float, Arrays]:
        """Return the public loss and new guides at the present weights as whole arrays, by the layout's names."""
        lab, kind = self._lab, self._settings.guide
        if kind == "random":
            loss, gradients = float("nan"), [self._random(round_)]
        elif kind == "classes":
            loss, gradients = self._means(by_class(self._rows(round_), lab.cut.classes))
        elif kind == "batches":
            batches = [lab.public(round_.number, b) for b in range(self._settings.guides)]
            loss, gradients = self._means([[batch] for batch in batches])
        else:
            loss, grads = mean_gradient(lab.cut, lab.trainable, self._rows(round_), lab.meter, lab.stream.poll)
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
        if plan and (self._span is None or self._span.units is not plan):
            self._span = Span(self._cutting, plan)
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
        """Return the guides in force, as they travelled, where they serve several rounds; and those made ahead."""
        state: dict[str, np.ndarray] = {}
        span = self._span
        if self._settings.guide_every != 1 and span is not None:
            assert isinstance(span.units, Coded)
            state |= {_GUIDE + name: frame for name, frame in span.units.coded().items()}
            state |= {_OUTLINE + name: rows for name, rows in span.cutting.outline.items()}
        if self._ahead is not None:
            number, loss, units = self._ahead
            state |= {_AHEAD + name: array for name, array in units.items()}
            state[_AHEAD] = np.array([number, loss])
        return state

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the guides back."""
        frames, outline, ahead = (
            {name.removeprefix(start): a for name, a in state.items() if name.startswith(start)}
            for start in (_GUIDE, _OUTLINE, _AHEAD)
        )
        if frames:
            cutting = Cutting(self.layout, outline)
            self._span = Span(cutting, self._lab.kept(cutting.units(), frames))
        if ahead:
            number, loss = ahead.pop("")
            self._ahead = _Made(int(number), float(loss), ahead)

    def _new(self, round_: Round) -> bool:
        """Whether new guides travel in an exchange."""
        every = self._settings.guide_every
        return round_.exchange == 0 and (round_.number % every == 0 if every else round_.number == 0)

    def _made(self, round_: Round) -> _Made:
        loss, guides = self.whole(round_)
        outline = self.layout.outline(guides)
        return _Made(round_.number, loss, {**outline, **Cutting(self.layout, outline).cut(guides)})

    def _rows(self, round_: Round) -> Sequence[Batch]:
        lab, batches = self._lab, self._settings.public_batches
        return [lab.public(round_.number, b) for b in range(batches)] if batches else lab.public_rows()

    def _means(self, groups: Iterable[Iterable[Batch]]) -> tuple[float, list[list[torch.Tensor]]]:
        """Return the mean of the groups' losses and each group's mean gradient."""
        lab = self._lab
        found = [mean_gradient(lab.cut, lab.trainable, group, lab.meter, lab.stream.poll) for group in groups]
        if len(found) != self.count:
            raise NumericsError(f"{len(found)} classes have public rows; guide = 'classes' needs all {self.count}.")
        return float(np.mean([loss for loss, _ in found])), [grads for _, grads in found]

    def _random(self, round_: Round) -> list[torch.Tensor]:
        stream = generator(self._lab.seed, "random guide", round_.number)
        return [
            torch.from_numpy(stream.standard_normal(tuple(t.parameter.shape), np.float32)).to(t.parameter.device)
            for t in self._lab.trainable
        ]
