"""CooperLLM: zeroth-order steps along guided perturbations (methods.md 2.15, ZGR), with its variants and controls.

    cloud:  G = mean over public rows of grad f_pub(w);  V_1 .. V_m orthonormal, made from G (m = 1: V = G / |G|)
    device: u = beta (sqrt(alpha/n) z + sqrt((1-alpha)/m) sum_j s_j V_j),  n trainable entries, s_j = +-1
            a = [f(w + h u) - f(w - h u)] / (2 h)
    all:    w <- w - lr kappa mean_ip(a_ip u_ip)                                   estimator = guided
            w <- w - lr mean_ip(a_ip Sigma^-1 u_ip)                                estimator = corrected
            w <- w - lr (mix G + (1 - mix) mean_ip(a_ip z_ip)),  u = z             estimator = mixing
    with Sigma = E u u' = beta^2 (alpha/n I + (1-alpha)/m sum_j V_j V_j'), and kappa = 1 (scale = legacy) or 1 over
    Sigma's largest eigenvalue (scale = normalised), so that the best known direction is estimated at its full length.

Guides are made every `guide_every` rounds; every local step is one synchronous update on them. Devices keep the
guide as it travelled until the update, so it crosses the network once. With m = 1 the estimator is even in u, and
the round's sign stands in the guide itself (the published form). alpha = 0 is a line search on the guides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import Lab, Reply, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.algorithms.guided import Guides, GuideSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import ConfigError
from fedbench.zo.direction import Direction, Terms
from fedbench.zo.estimate import central
from fedbench.zo.update import subtract


class Settings(GuideSettings):
    """CooperLLM's settings."""

    lr: StepSize = 0.1
    alpha: float = Field(0.5, ge=0, le=1, description="share of the isotropic direction; 0: a line search on the guide")
    beta: float = Field(1.0, gt=0, description="length of the direction")
    h: float = Field(0.01, gt=0, description="probing step along u, which is about beta long")
    estimator: Literal["guided", "corrected", "mixing"] = Field(
        "guided",
        description="guided: the published one; corrected: its covariance undone; mixing: public gradient beside plain ZO",
    )
    scale: Literal["legacy", "normalised"] = Field(
        "legacy", description="normalised: the estimate divided by the largest eigenvalue of the directions' covariance"
    )
    mix: float = Field(0.5, ge=0, le=1, description="weight of the public gradient in estimator = mixing")


class CooperLLM(ScalarMethod):
    """Devices probe along the cloud's gradient direction plus noise; the cloud never sees private rows."""

    name = "cooperllm"
    summary = "zeroth-order along perturbations guided by the cloud's public gradient"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    keeps_plan = True
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        s = self.settings
        if s.estimator == "corrected" and s.alpha == 0:
            raise ConfigError(
                "method.cooperllm.estimator: 'corrected' undoes the directions' covariance, which alpha = 0 makes "
                "singular; allowed with it: alpha above 0."
            )
        if s.estimator == "mixing" and s.guide not in ("public", "random"):
            raise ConfigError(
                f"method.cooperllm.guide: found {s.guide!r} with estimator = 'mixing', which mixes one public gradient; "
                "allowed with it: 'public', 'random'."
            )
        self._guides = Guides(s, lab, unit=s.estimator != "mixing")

    @property
    def _z_scale(self) -> float:
        if self.settings.estimator == "mixing":
            return 1.0
        return self.settings.beta * math.sqrt(self.settings.alpha / self.lab.trainable.size)

    @property
    def _guide_scale(self) -> float:
        if self.settings.estimator == "mixing":
            return 0.0
        return self.settings.beta * math.sqrt((1.0 - self.settings.alpha) / self._guides.count)

    @property
    def _h(self) -> float:
        return self.lab.epsilon if self.settings.estimator == "mixing" else self.settings.h

    @property
    def query_radius(self) -> float:
        """h |u| / sqrt(n), with |u| about beta; epsilon where plain directions are mixed with the gradient."""
        if self.settings.estimator == "mixing":
            return self.lab.epsilon
        return self.settings.h * self.settings.beta / math.sqrt(self.lab.trainable.size)

    def outline_units(self, round_: Round) -> Sequence[Unit]:
        """Which rows of embeddings the guides hold."""
        return self._guides.outline_units(round_)

    def learn(self, outline: Arrays) -> None:
        """Take the outline."""
        self._guides.learn(outline)

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """The guides, stage by stage, in the first exchange of a round that makes new ones."""
        return self._guides.units(round_)

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

    def ahead(self, round_: Round) -> None:
        """Make the next round's guides where they may lag."""
        self._guides.make_ahead(round_)

    def plan_sign(self, round_: Round) -> float:
        """The sign that stands in a lone guide."""
        return self._guides.sign(round_)

    def scalars(self, round_: Round) -> int:
        """P in each exchange, one exchange per local step."""
        return self.lab.perturbations

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return a [P] along the device's guided directions."""
        lab, span, h = self.lab, self._guides.span(plan), self._h
        batch = lab.private(round_.number, round_.exchange, device)
        a = np.empty(lab.perturbations, np.float32)
        losses = []
        signs = self._guides.signs(round_, device)
        for p, z in enumerate(self._keys(round_, device)):
            guide, factor = span.mix(signs[p])
            scale = factor * self._guide_scale
            direction = Direction(z, self._z_scale, guide, scale) if scale else Direction(z, self._z_scale)
            plus, minus = lab.stream.losses(batch, direction, h)
            a[p] = central(plus, minus, h)
            losses.append((plus + minus) / 2)
        return Upload({"scalars": a}, float(np.mean(losses)))

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return all scalars; one more exchange for each local step left."""
        return super().combine(round_, uploads)._replace(again=round_.exchange + 1 < self.lab.local_steps)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """Subtract the step: one coefficient a direction, one a guide."""
        a = reply["scalars"].reshape(-1).astype(np.float64)
        keys = np.concatenate([self._keys(round_, device) for device in round_.devices])
        signs = np.concatenate([self._guides.signs(round_, device) for device in round_.devices])
        z_coef, guide_coef = self._coefficients(a, keys, signs, plan)
        guide, factor = self._guides.span(plan).mix(round_.lr * guide_coef)
        terms = Terms(keys, (round_.lr * z_coef).astype(np.float32), guide, factor)
        self.replay_ops += subtract(self.lab.trainable, terms, gaussian=self.lab.gaussian, poll=self.lab.stream.poll)

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

    def _coefficients(
        self, a: np.ndarray, keys: np.ndarray, signs: np.ndarray, plan: Arrays
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what the step holds of each z and of each guide, float64 [Q] and [m], from a [Q] and signs [Q, m]."""
        s, n, m, count = self.settings, self.lab.trainable.size, self._guides.count, len(a)
        if s.estimator == "mixing":
            return (1 - s.mix) / count * a, np.full(m, s.mix)
        isotropic, along = s.beta**2 * s.alpha / n, s.beta**2 * (1 - s.alpha) / m  # Sigma's parts
        if s.estimator == "guided":
            kappa = 1.0 if s.scale == "legacy" else 1.0 / (isotropic + along)
            return kappa * self._z_scale / count * a, kappa * self._guide_scale * (a @ signs) / count
        products = self._guides.span(plan).products(keys, gaussian=self.lab.gaussian)  # V_j . z
        self.replay_ops += float(len(keys)) * n
        inside = self._z_scale * products + self._guide_scale * signs  # V_j . u
        outside = self._z_scale * products
        return self._z_scale / isotropic / count * a, (a @ (inside / (isotropic + along) - outside / isotropic)) / count

    def _keys(self, round_: Round, device: int) -> np.ndarray:
        step = range(round_.exchange, round_.exchange + 1)
        return self.lab.directions(round_.number, device, step, self.lab.perturbations)
