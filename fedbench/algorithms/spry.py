"""SPRY: forward-mode gradients of a few tensors a device (methods.md 2.10).

    cloud:  tensors in groups (a LoRA pair, or one tensor) go round-robin to the sampled devices
    device: v_p keyed on ITS tensors, 0 elsewhere;  a_p = d/dt f(w_i + t v_p; B) at t = 0;  g = mean_p(a_p v_p)
            repeat S: w_i <- step(w_i, g) by SGD or AdamW, whose state lasts one round
    cloud:  Delta = per tensor the mean of w_i - w over the devices that own it
    all:    w <- w + Delta, or Yogi's step: m <- b1 m + (1 - b1) Delta;  v <- v - (1 - b2) Delta^2 sign(v - Delta^2);
            w <- w + eta m / (sqrt(v) + tau)

Noise falls with the entries that a device owns. The assignment turns by one device a round, so that a device's data
reaches all tensors; where there are more devices than groups, groups have several owners.

`derivative = jvp` carries a tangent through one forward, by the attention kernel that has forward derivatives; it counts
as 2 C, though torch also multiplies the zero tangents of the others' matrices, up to C more. `central` is the difference along
the same v and costs 2 C. Deviations: SGD by default, as in every method
here, where the published code has AdamW; classifiers are averaged like other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedbench.algorithms.backprop import Kind, Optimiser, walking
from fedbench.algorithms.base import Algorithm, CatchUp, Lab, Reply, Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import ConfigError
from fedbench.data.rows import Batch
from fedbench.models.trainable import Tensor
from fedbench.zo.direction import Direction
from fedbench.zo.draw import entries
from fedbench.zo.estimate import central
from fedbench.zo.ranges import OnDemand
from fedbench.zo.tangent import JVP_FORWARDS, jvp

#: Yogi's step, decay rates and least spread.
_ETA, _B1, _B2, _TAU = 0.01, 0.9, 0.99, 1e-3


class Settings(BaseSettings):
    """SPRY's settings."""

    lr: StepSize = 2e-3
    tensors_per_device: int = Field(
        0, ge=0, description="groups of tensors that a device owns in a round; 0: as few as reach all of them"
    )
    derivative: Literal["jvp", "central"] = Field(
        "jvp", description="forward-mode derivative, or the central difference along the same direction"
    )
    optimizer: Kind = Field("sgd", description="rule of the local steps; adamw's state lasts one round")
    server: Literal["mean", "yogi"] = Field("mean", description="how the cloud applies the mean change")


class Spry(Algorithm):
    """Forward-mode gradients with the tensors shared out between devices: little memory, less noise than one device's."""

    name = "spry"
    summary = "forward-mode gradients, every device its own few tensors"
    catch_up = CatchUp.REPLAY
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        self._groups = groups(lab.trainable.tensors)
        yogi = [t for t in lab.trainable if self.settings.server == "yogi"]
        self._m = {t.name: np.zeros(t.size, np.float32) for t in yogi}
        self._v = {t.name: np.zeros(t.size, np.float32) for t in yogi}
        if self.settings.derivative == "jvp" and lab.cut.residency.piece:
            raise ConfigError(
                "method.spry.derivative: found 'jvp' with model.mapped = true, whose rows carry no tangent; "
                "allowed: 'central'."
            )

    @property
    def query_radius(self) -> float:
        """Epsilon for differences; forward mode probes nothing."""
        return self.lab.epsilon if self.settings.derivative == "central" else float("nan")

    def owned(self, round_: Round, device: int) -> list[Tensor]:
        """Return a device's tensors in a round, in forward order."""
        devices, count = len(round_.devices), len(self._groups)
        each = self.settings.tensors_per_device or -(-count // devices)
        if each * devices < count:
            raise ConfigError(
                f"method.spry.tensors_per_device: found {each}, which leaves {count - each * devices} of {count} groups "
                f"without any of {devices} devices; allowed: 0, or from {-(-count // devices)}."
            )
        slot = (round_.devices.index(device) + round_.number) % devices
        mine = {i % count for i in range(slot, each * devices, devices)}
        return [tensor for group in sorted(mine) for tensor in self._groups[group]]

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """The change of the device's own tensors."""
        return [Unit(t.name, (t.size,)) for t in self.owned(round_, device)]

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return w_i - w of the device's tensors."""
        lab, count = self.lab, self.lab.perturbations
        mine = self.owned(round_, device)
        losses = []
        with walking(mine) as start:
            optimiser = Optimiser(self.settings.optimizer, [t.parameter for t in mine], round_.lr)
            for step in range(lab.local_steps):
                batch = lab.private(round_.number, step, device)
                grads = [torch.zeros_like(t.parameter, requires_grad=False) for t in mine]
                for key in lab.directions(round_.number, device, range(step, step + 1), count):
                    loss, a = self._slope(batch, mine, key)
                    losses.append(loss)
                    for tensor, grad in zip(mine, grads, strict=True):
                        grad.add_(self._entries(tensor, key), alpha=a / count)
                optimiser.step(grads)
            change = [(t.name, t.parameter.detach() - before) for t, before in zip(mine, start, strict=True)]
        return Upload({name: c.reshape(-1).cpu().numpy() for name, c in change}, float(np.mean(losses)))

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """The change of every tensor."""
        return [Unit(t.name, (t.size,)) for t in self.lab.trainable]

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return each tensor's mean change over its owners, in device order, or Yogi's step along it."""
        change = {}
        for tensor in self.lab.trainable:
            theirs = [arrays[tensor.name] for arrays in uploads.values() if tensor.name in arrays]
            total = np.zeros(tensor.size, np.float32)
            for array in theirs:
                total += array
            change[tensor.name] = total / np.float32(len(theirs))
        return Reply(change if self.settings.server == "mean" else {n: self._yogi(n, d) for n, d in change.items()})

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w + the change that came."""
        for tensor in self.lab.trainable:
            tensor.add(reply[tensor.name])

    def state(self) -> dict[str, np.ndarray]:
        """Return Yogi's means and spreads, on which the cloud's steps depend."""
        return {f"m/{name}": m for name, m in self._m.items()} | {f"v/{name}": v for name, v in self._v.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take them back."""
        for kind, kept in (("m/", self._m), ("v/", self._v)):
            kept.update({name: np.array(state[kind + name]) for name in kept})

    def _slope(self, batch: Batch, mine: Sequence[Tensor], key: np.ndarray) -> tuple[float, float]:
        """Return the loss of a batch and its derivative along v."""
        lab = self.lab
        if self.settings.derivative == "jvp":
            loss, a = jvp(lab.cut, batch, {id(t.parameter): self._entries(t, key) for t in mine})
            lab.meter.add(JVP_FORWARDS * lab.cut.forward_flops(*batch.ids.shape))
            return loss, float(np.float32(a))
        tensors, own = {t.name: t for t in lab.trainable}, {t.name for t in mine}

        def make(name: str) -> np.ndarray:
            tensor = tensors[name]
            if name not in own:
                return np.zeros(tensor.size, np.float32)
            return entries(tensor, key, gaussian=lab.gaussian)

        guide = OnDemand(make)
        plus, minus = lab.stream.losses(batch, Direction(key, 0.0, guide, 1.0), lab.epsilon)
        return (plus + minus) / 2, float(central(plus, minus, lab.epsilon))

    def _entries(self, tensor: Tensor, key: np.ndarray) -> torch.Tensor:
        """Return v in a tensor, in its shape and where it lies."""
        drawn = torch.from_numpy(entries(tensor, key, gaussian=self.lab.gaussian))
        return drawn.view(tensor.parameter.shape).to(tensor.parameter.device)

    def _yogi(self, name: str, delta: np.ndarray) -> np.ndarray:
        """Return Yogi's step along the mean change of a tensor."""
        m, v, square = self._m[name], self._v[name], np.square(delta)
        m[:] = np.float32(_B1) * m + np.float32(1 - _B1) * delta
        v -= np.float32(1 - _B2) * square * np.sign(v - square)
        step: np.ndarray = np.float32(_ETA) * m / (np.sqrt(v) + np.float32(_TAU))
        return step


def groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return what is shared out, in forward order: a LoRA pair together, every other tensor by itself."""
    made: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        made.setdefault(tensor.name.replace("lora_B", "lora_A"), []).append(tensor)
    return list(made.values())
