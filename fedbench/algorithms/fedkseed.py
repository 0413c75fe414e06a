"""FedKSeed: all steps of all devices lie along K directions that are fixed for the run (methods.md 2.6).

    all:    w = w0 - lr sum_k A_k z_k,  A = 0 at first;  z_k follows from the run's key and k < K
    device: w_i = w; repeat S: draw P candidates k;  a = [f(w_i + eps z_k; B) - f(w_i - eps z_k; B)] / (2 eps)
                               w_i <- w_i - lr mean(a z_k);  H_ik <- H_ik + a / P
    cloud:  A <- A + mean_i H_i

The newest A stands for the whole history, whenever a device was last there. Replicas hold w and apply what A has changed
by. That needs one step size for the whole run. tau = S P pairs (k, a) travel up, or H_i where that is less. The
published code makes tau steps of one direction each and weighs devices by their number of batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import Algorithm, CatchUp, Lab, Reply, Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.algorithms.walk import local_steps
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import ConfigError
from fedbench.base.rng import generator, key
from fedbench.zo.direction import Direction, Terms, as_keys
from fedbench.zo.update import subtract


class Settings(BaseSettings):
    """FedKSeed's settings."""

    lr: StepSize = 2e-3
    candidates: int = Field(4096, ge=1, le=1 << 16, description="directions of the whole run (K)")


class FedKSeed(Algorithm):
    """Downloads that don't grow with the rounds missed: K accumulated scalars are the model."""

    name = "fedkseed"
    summary = "zeroth-order along K fixed directions, accumulated scalars are the model"
    catch_up = CatchUp.NEWEST
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        if settings.schedule != "constant":
            raise ConfigError(
                f"method.{self.name}.schedule: found {settings.schedule!r}; allowed: 'constant', since a device rebuilds "
                "w0 - lr sum A z from sums over all rounds, which leaves one step size for all of them."
            )
        self._a = np.zeros(self.settings.candidates, np.float32)

    @property
    def query_radius(self) -> float:
        """Epsilon: entries of z have mean square 1."""
        return self.lab.epsilon

    @property
    def _sends_pairs(self) -> bool:
        """Whether tau pairs of 2 and 4 bytes are no more than K numbers."""
        return 6 * self.lab.local_steps * self.lab.perturbations <= 4 * self.settings.candidates

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """The pairs (k, a), or H."""
        tau = self.lab.local_steps * self.lab.perturbations
        if self._sends_pairs:
            return Unit("index", (tau,), "<u2"), Unit("scalars", (tau,))
        return (Unit("sums", (self.settings.candidates,)),)

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return what the device found along the candidates that it drew, on its own walk."""
        lab, p = self.lab, self.probabilities(plan)
        numbers = [(lab.seed, "kseed", round_.number, step, device) for step in range(lab.local_steps)]
        drawn = [generator(*n).choice(self.settings.candidates, lab.perturbations, p=p) for n in numbers]
        index = np.concatenate(drawn).astype(np.uint16)
        upload, _ = local_steps(lab, round_, device, [Direction(z) for z in self._keys(index)])
        scalars = upload.arrays["scalars"]
        if self._sends_pairs:
            return Upload({"index": index, "scalars": scalars}, upload.loss)
        return Upload({"sums": self._sums(index, scalars).astype(np.float32)}, upload.loss)

    def probabilities(self, plan: Arrays) -> np.ndarray | None:
        """Return p [K] by which candidates are drawn; None is all alike."""
        return None

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """A."""
        return (Unit("a", (self.settings.candidates,)),)

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return A + mean_i H_i."""
        sums = [u["sums"] if "sums" in u else self._sums(u["index"], u["scalars"]) for u in uploads.values()]
        return Reply({"a": (self._a + np.mean(sums, 0, np.float64)).astype(np.float32)})

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w - lr sum_k (A_new - A_old)_k z_k."""
        change = reply["a"].astype(np.float64) - self._a
        changed = np.flatnonzero(change)
        terms = Terms(self._keys(changed), (round_.lr * change[changed]).astype(np.float32))
        self.replay_ops += subtract(self.lab.trainable, terms, gaussian=self.lab.gaussian)
        self._a = np.array(reply["a"])

    def state(self) -> dict[str, np.ndarray]:
        """A."""
        return {"a": self._a}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take A back."""
        self._a = np.array(state["a"])

    def _keys(self, index: np.ndarray) -> np.ndarray:
        return as_keys([key(self.lab.seed, "candidate", int(k)) for k in index])

    def _sums(self, index: np.ndarray, scalars: np.ndarray) -> np.ndarray:
        """Return H [K] float64: a / P summed by candidate."""
        weights = scalars.astype(np.float64) / self.lab.perturbations
        return np.bincount(index, weights, self.settings.candidates)
