"""AGZO: zeroth-order steps in the subspace of each layer's input activations, federated by us (methods.md 2.13).

    clean forward: f0 = f(w; B) and, at every trainable matrix W [out, in], its inputs H [tokens, in]
    A = orthonormal [in, r]: `power_iterations` times A <- qr(H' (H A)), from a keyed Gaussian start
    Delta_p = R_p A' for matrices, R_p keyed [out, r];  Delta_p = z_p, isotropic, for all other tensors
    a_p = [f(w + mu Delta_p; B) - f0] / mu
    all: w <- w - lr mean_ip(a_ip Delta_ip)

The gradient of a matrix lies in the span of its inputs, so g_hat has mean G A A' and r out entries' noise instead of
in out. One synchronous update per local step; a tensor that is also looked up as an embedding counts as other.

- `basis = private`: A comes from the device's own batch, differs from device to device and must travel: every step
  sends P scalars and all bases, and the cloud answers with the mean change. Bases are made of activations and tell the
  subspace that private texts span: this leaks more than scalars do.
- `basis = public`: the cloud makes A of one public batch at the round's weights and sends it down; devices send scalars.

FLOPs beside the 1 + P forwards: a power iteration takes 4 T in r (T rows of H, padding included) and its factorisation
4 in r^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedbench.algorithms.base import Algorithm, CatchUp, Lab, Reply, Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.rng import generator
from fedbench.data.rows import Batch
from fedbench.models.trainable import Tensor
from fedbench.zo.activations import Matrix, captured, matrices
from fedbench.zo.direction import Direction
from fedbench.zo.draw import entries
from fedbench.zo.estimate import forward
from fedbench.zo.ranges import OnDemand


class Settings(BaseSettings):
    """AGZO's settings."""

    lr: StepSize = 2e-3
    rank: int = Field(4, ge=1, description="columns of a basis (r), at most the matrix's input features")
    power_iterations: int = Field(3, ge=1, description="power iterations on H' H that a basis is made with")
    basis: Literal["private", "public"] = Field("private", description="whose activations span the bases")


class AGZO(Algorithm):
    """One-sided zeroth-order along directions of low rank that follow the activations of a clean forward."""

    name = "agzo"
    summary = "zeroth-order in the subspaces of the layers' input activations"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        self._matrices = {m.tensor.name: m for m in matrices(lab.cut, lab.trainable)}
        self._tensors = {t.name: t for t in lab.trainable}
        self._private = self.settings.basis == "private"
        self.catch_up = CatchUp.REPLAY if self._private else CatchUp.REPLAY_OF_DEVICES

    @property
    def query_radius(self) -> float:
        """Mu sqrt(E|Delta|^2 / d): A is orthonormal, so a matrix's part has out r in the mean."""
        drawn = sum(self._count(t) for t in self.lab.trainable)
        return self.lab.epsilon * float(np.sqrt(drawn / self.lab.trainable.size))

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """The public bases in the first exchange of a round."""
        return [] if self._private or round_.exchange > 0 else self._basis_units()

    def plan(self, round_: Round) -> Arrays:
        """Return A of one public batch at the present weights."""
        if self._private:
            return {}
        self.cloud_loss, bases = self._clean(self.lab.public(round_.number, 0), round_.number, 0, -1)
        return bases

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """P scalars, and the bases where they are the device's own."""
        scalars = Unit("scalars", (self.lab.perturbations,))
        return [scalars, *self._basis_units()] if self._private else [scalars]

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return a [P] and, where they are private, the bases A of the device's batch."""
        lab = self.lab
        batch = lab.private(round_.number, round_.exchange, device)
        if self._private:
            base, bases = self._clean(batch, round_.number, round_.exchange, device)
        else:
            bases = {name: plan[name] for name in self._matrices}
            base = lab.stream.loss(batch, Direction(self._keys(round_, device)[0]), 0.0)
        a = np.empty(lab.perturbations, np.float32)
        for p, key in enumerate(self._keys(round_, device)):
            u = Direction(key, 0.0, OnDemand(self._delta(key, bases)), 1.0)
            a[p] = forward(lab.stream.loss(batch, u, lab.epsilon), base, lab.epsilon)
        return Upload({"scalars": a} | (bases if self._private else {}), base)

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """The mean change of every tensor, or everybody's scalars where all replicas know the bases."""
        if self._private:
            return [Unit(t.name, (t.size,)) for t in self.lab.trainable]
        return (Unit("scalars", (len(round_.devices), self.lab.perturbations)),)

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return the scalars as they came, or the change that they and the devices' bases make."""
        again = round_.exchange + 1 < self.lab.local_steps
        a = np.stack([arrays["scalars"] for arrays in uploads.values()])
        if not self._private:
            return Reply({"scalars": a}, again)
        return Reply(dict(self._change(round_, a, list(uploads.values()))), again)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w - lr mean_ip(a_ip Delta_ip)."""
        if self._private:
            change: Iterator[tuple[str, np.ndarray]] = ((t.name, reply[t.name]) for t in self.lab.trainable)
        else:
            bases = {name: plan[name] for name in self._matrices}
            change = self._change(round_, reply["scalars"], [bases] * len(round_.devices))
        for name, values in change:
            self._tensors[name].add(values)

    def _change(self, round_: Round, a: np.ndarray, bases: Sequence[Arrays]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each tensor's -lr mean_ip(a_ip Delta_ip), flat float32, summed in device order."""
        coef = (round_.lr / a.size * a).astype(np.float32)
        for tensor in self.lab.trainable:
            total = np.zeros(tensor.size, np.float32)
            for row, device, own in zip(coef, round_.devices, bases, strict=True):
                for c, key in zip(row, self._keys(round_, device), strict=True):
                    total -= c * self._delta(key, own)(tensor.name)
                    self.replay_ops += self._count(tensor)
            yield tensor.name, total

    def _delta(self, key: np.ndarray, bases: Arrays) -> Callable[[str], np.ndarray]:
        """Return the function from a tensor's name to Delta, flat float32."""

        def make(name: str) -> np.ndarray:
            tensor = self._tensors[name]
            drawn = entries(tensor, key, gaussian=self.lab.gaussian, count=self._count(tensor))
            matrix = self._matrices.get(name)
            return drawn if matrix is None else low_rank(drawn, bases[name], transposed=matrix.transposed)

        return make

    def _clean(self, batch: Batch, round_: int, step: int, device: int) -> tuple[float, dict[str, np.ndarray]]:
        """Return f0 and the bases of a batch at the weights; `device` is -1 for the cloud."""
        lab = self.lab
        nowhere = Direction(lab.directions(round_, 0, range(1), 1)[0])
        with captured(self._matrices.values()) as seen:
            base = lab.stream.loss(batch, nowhere, 0.0)
        bases = {}
        for name, matrix in self._matrices.items():
            draw = generator(lab.seed, "agzo basis", round_, step, device, tensor_number(matrix.tensor))
            start = draw.standard_normal((matrix.inputs, self._rank(matrix)))
            inputs = torch.cat([part.reshape(-1, matrix.inputs) for part in seen.pop(name)])
            bases[name] = power_basis(inputs, start, self.settings.power_iterations)
            lab.meter.add(self.settings.power_iterations * iteration_flops(len(inputs), *start.shape))
        return base, bases

    def _basis_units(self) -> list[Unit]:
        return [Unit(name, (m.inputs, self._rank(m))) for name, m in self._matrices.items()]

    def _rank(self, matrix: Matrix) -> int:
        return min(self.settings.rank, matrix.inputs)

    def _count(self, tensor: Tensor) -> int:
        """Return the entries drawn for a tensor in one direction."""
        matrix = self._matrices.get(tensor.name)
        return tensor.size if matrix is None else matrix.outputs * self._rank(matrix)

    def _keys(self, round_: Round, device: int) -> np.ndarray:
        step = range(round_.exchange, round_.exchange + 1)
        return self.lab.directions(round_.number, device, step, self.lab.perturbations)


def iteration_flops(rows: int, inputs: int, rank: int) -> float:
    """Return the FLOPs of one power iteration: two products with H and a thin factorisation."""
    return 4.0 * rows * inputs * rank + 4.0 * inputs * rank**2


def tensor_number(tensor: Tensor) -> int:
    """Return a tensor's key as a signed 64-bit number."""
    return tensor.key - (1 << 63)


def power_basis(inputs: torch.Tensor, start: np.ndarray, iterations: int) -> np.ndarray:
    """Return A float32 [in, r], orthonormal: A <- qr(H' (H A)); products in float32, factorisations in float64."""
    basis = torch.linalg.qr(torch.from_numpy(start).to(inputs.device)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr((inputs.t() @ (inputs @ basis.float())).double()).Q
    return np.ascontiguousarray(basis.float().cpu().numpy())


def low_rank(drawn: np.ndarray, basis: np.ndarray, *, transposed: bool) -> np.ndarray:
    """Return R A' as the tensor's entries, flat float32; column by column, so that every machine adds in one order."""
    r = drawn.reshape(-1, basis.shape[1])
    left, right = (basis, r) if transposed else (r, basis)
    out = left[:, :1] * right[:, 0]
    for k in range(1, basis.shape[1]):
        out += left[:, k : k + 1] * right[:, k]
    return out.reshape(-1)
