"""One row a method: what methods.md says that it sends, computes and rebuilds, and a replay that shares no code with it.

A new method gets a row here; `test_methods.py` holds every row against real rounds. Formulas are those of methods.md
2.17 for the settings of `COUNTED`, in which no count is 1 by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tinyruns import drawn

from fedbench.algorithms.base import Round
from fedbench.base.arrays import Arrays
from fedbench.base.rng import key
from fedbench.data.embedded import LENGTH
from fedbench.run.build import Built

SCALAR = 4  # bytes of one number on the wire
STEPS, PERTURBATIONS, P1, P2, BATCH = 2, 3, 2, 3, 2
DENSITY = 0.02  # of meerkat's mask

COUNTED: dict[str, Any] = {
    "run.rounds": 5,
    "federation.local_steps": STEPS,
    "federation.batch_size": BATCH,
    "zo.perturbations": PERTURBATIONS,
    "method.fedspzo.p1": P1,
    "method.fedspzo.p2": P2,
    "model.trainable": "bitfit",
}

#: One round as an outsider on the wire would see it: round, plan, reply.
Entry = tuple[Round, Arrays, Arrays]
Weights = dict[str, torch.Tensor]


class Costs:
    """What the formulas are made of, in a run with the settings of `COUNTED`."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.settings: Any = built.job.settings
        self.entries = built.trainable.size  # d
        self.model_bytes = SCALAR * self.entries
        self.sampled = len(built.sampled(0))  # M
        stages = [built.cut.stage_flops(stage, BATCH, LENGTH) for stage in range(built.cut.stages)]
        self.forward = sum(stages)  # C
        self.boundary = len(built.cut.blocks)  # fedspzo's default split: all layers but the last stand in block 1
        self.first, self.second = sum(stages[: self.boundary]), sum(stages[self.boundary :])  # Cy, Cz
        self.public_forward = built.cut.forward_flops(len(built.splits.public), LENGTH)

    def spry_uplinks(self, number: int) -> list[int]:
        """Return the bytes of each sampled device's tensors: one group a tensor, shared out in turn, shifted each round."""
        sizes = [t.size for t in self.built.trainable]
        each = -(-len(sizes) // self.sampled)
        found = []
        for place in range(self.sampled):
            slot = (place + number) % self.sampled
            owned = {(slot + turn * self.sampled) % len(sizes) for turn in range(each)}
            found.append(SCALAR * sum(sizes[g] for g in owned))
        return found

    def ferret_groups(self) -> int:
        """Return how many groups Ferret packs the tensors into."""
        sizes = [t.size for t in self.built.trainable]
        return len(ferret_packed(sizes))

    def agzo_bases(self) -> list[tuple[int, int, int]]:
        """Return (rows of H, inputs, outputs) of every matrix of the embedded model."""
        last = f"blocks.{self.boundary - 1}."
        found = []
        for tensor in self.built.trainable:
            if tensor.parameter.dim() == 2 and "tokens" not in tensor.name and "positions" not in tensor.name:
                whole = last not in tensor.name or ".key." in tensor.name or ".value." in tensor.name
                rows = BATCH * LENGTH if whole and "lm_head" not in tensor.name else BATCH  # the last layer is folded
                found.append((rows, tensor.parameter.shape[1], tensor.parameter.shape[0]))
        return found

    def agzo_flops(self) -> float:
        """Return the FLOPs of all bases of one batch: 3 power iterations of rank 4."""
        return sum(3 * (4 * rows * inputs * 4 + 4 * inputs * 4**2) for rows, inputs, _ in self.agzo_bases())

    def agzo_entries(self) -> int:
        """Return the entries drawn for one direction."""
        matrices = sum(outputs * inputs for _, inputs, outputs in self.agzo_bases())
        return self.entries - matrices + sum(outputs * 4 for _, _, outputs in self.agzo_bases())

    def entries_of(self, first: bool) -> int:
        """Return the trainable entries of block 1, or of block 2."""
        return sum(t.size for t in self.built.trainable if (t.stage < self.boundary) == first)


Count = Callable[[Costs], float]
#: From the start weights (float64) and what was on the wire: the weights in the end, by plain torch.
Replay = Callable[[Built, Weights, list[Entry]], Weights]


def nothing(costs: Costs) -> float:
    """Return 0: it doesn't happen."""
    return 0.0


@dataclass(frozen=True)
class Row:
    """Bytes of one device's upload, of the plan and of the reply, FLOPs, entries of directions rebuilt; all a round."""

    uplink: Count
    plan: Count
    reply: Count
    device_flops: Count
    cloud_flops: Count
    rebuilt: Count
    replay: Replay | None
    exchanges: int = 1
    #: Whether the cloud plans in the first round alone.
    once: bool = False
    #: Where devices send different amounts: the bytes of each sampled device in a round.
    uplinks: Callable[[Costs, int], list[int]] | None = None
    #: Whether the method takes a step size that changes from round to round.
    linear: bool = True
    settings: Mapping[str, Any] | None = None


def steps_of(built: Built, entries: list[Entry]) -> Iterator[tuple[Round, Arrays, int, torch.Tensor, Weights, int]]:
    """Yield (round, plan, device's scalars' index k, scalars of the device, z by tensor, number of devices)."""
    method, lab = built.job.config.method_name, built.lab
    settings: Any = built.job.settings
    for round_, plan, reply in entries:
        scalars = torch.from_numpy(reply["scalars"]).double()
        for device, row in zip(round_.devices, scalars, strict=True):
            steps = (
                range(lab.local_steps)
                if method in ("fedmezo", "meerkat")
                else range(round_.exchange, round_.exchange + 1)
            )
            count = settings.p1 * settings.p2 if method == "fedspzo" else lab.perturbations
            for k, named in enumerate(lab.directions(round_.number, device, steps, count)):
                z = {name: torch.from_numpy(entry).double() for name, entry in drawn(built.trainable, named).items()}
                yield round_, plan, k, row, z, len(round_.devices)


def replay_fedmezo(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w <- w - lr / (M P) sum a z."""
    for round_, _, k, a, z, devices in steps_of(built, entries):
        for name in z:
            w[name] = w[name] - round_.lr * a[k] / (devices * built.lab.perturbations) * z[name]
    return w


def replay_fedspzo(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """Estimator A: z moves by all d v, y by the means over q of d times the first v of each p."""
    settings: Any = built.job.settings
    boundary = len(built.cut.blocks)
    stages = {t.name: t.stage for t in built.trainable}
    for round_, _, k, d, v, devices in steps_of(built, entries):
        for name in v:
            if stages[name] >= boundary:
                weight = settings.lr_ratio * d[k] / (devices * settings.p1 * settings.p2)
            elif k % settings.p2 == 0:
                weight = d[k : k + settings.p2].mean() / (devices * settings.p1)
            else:
                continue
            w[name] = w[name] - round_.lr * weight * v[name]
    return w


def replay_cooperllm(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """u = beta (sqrt(alpha/n) z + sqrt(1-alpha) guide);  w <- w - lr mean(a u)."""
    settings: Any = built.job.settings
    for round_, plan, k, a, z, devices in steps_of(built, entries):
        for name in z:
            guide = torch.from_numpy(plan[name].reshape(-1)).double()
            isotropic = (settings.alpha / built.trainable.size) ** 0.5 * z[name]
            u = settings.beta * (isotropic + (1 - settings.alpha) ** 0.5 * guide)
            w[name] = w[name] - round_.lr * a[k] / (devices * built.lab.perturbations) * u
    return w


def replay_meerkat(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w <- w - lr / (M P) sum a z, where z's j-th entry in a tensor belongs to the tensor's j-th masked place."""
    mask = torch.zeros(built.trainable.size, dtype=torch.bool)
    mask[torch.from_numpy(entries[0][1]["mask"].astype("int64"))] = True
    sizes = [t.size for t in built.trainable]
    inside = {t.name: part.nonzero()[:, 0] for t, part in zip(built.trainable, mask.split(sizes), strict=True)}
    for round_, _, k, a, z, devices in steps_of(built, entries):
        for name in z:
            step = round_.lr * a[k] / (devices * built.lab.perturbations)
            w[name] = w[name].index_add(0, inside[name], -step * z[name][: len(inside[name])])
    return w


def replay_means(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w <- w + the change that travelled."""
    for _, _, reply in entries:
        for name in w:
            w[name] = w[name] + torch.from_numpy(reply[name].reshape(-1)).double()
    return w


def ferret_packed(sizes: list[int]) -> list[list[int]]:
    """Return the places of consecutive tensors in groups of about 0.9 times the median size."""
    packed: list[list[int]] = []
    room = 0.0
    for place, size in enumerate(sizes):
        if room <= 0:
            packed.append([])
            room = 0.9 * float(torch.tensor(sizes, dtype=torch.float64).quantile(0.5))
        packed[-1].append(place)
        room -= size
    return packed


def replay_ferret(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w_l <- w_l - server_lr sum_k clipped(pool[l, k]) z_k / sqrt(d_l)."""
    settings: Any = built.job.settings
    tensors = built.trainable.tensors
    for _, _, reply in entries:
        pool = torch.from_numpy(reply["pool"]).double()
        for coefs, places in zip(pool, ferret_packed([t.size for t in tensors]), strict=True):
            size = sum(tensors[place].size for place in places)
            for k, c in enumerate(coefs):
                z = drawn(built.trainable, np.array(key(built.lab.seed, "ferret candidate", k), np.uint64))
                length = float(c.abs())
                for name in (tensors[place].name for place in places):
                    step = settings.server_lr * c * min(1.0, settings.clip / max(length, 1e-30)) / size**0.5
                    w[name] = w[name] - step * torch.from_numpy(z[name]).double()
    return w


AVERAGED = Row(
    uplink=lambda c: c.model_bytes,
    plan=nothing,
    reply=lambda c: c.model_bytes,
    device_flops=lambda c: 3 * c.forward * STEPS,
    cloud_flops=nothing,
    rebuilt=nothing,
    replay=replay_means,
)

ROWS: dict[str, Row] = {
    "fedavg": AVERAGED,
    "fedavg_lora": AVERAGED,
    "bitfit": AVERAGED,
    "fedmezo": Row(
        uplink=lambda c: SCALAR * STEPS * PERTURBATIONS,
        plan=nothing,
        reply=lambda c: SCALAR * c.sampled * STEPS * PERTURBATIONS,
        device_flops=lambda c: 2 * c.forward * STEPS * PERTURBATIONS,
        cloud_flops=nothing,
        rebuilt=lambda c: c.sampled * STEPS * PERTURBATIONS * c.entries,
        replay=replay_fedmezo,
    ),
    "meerkat": Row(
        uplink=lambda c: SCALAR * STEPS * PERTURBATIONS,
        plan=lambda c: 4 * round(DENSITY * c.entries),
        reply=lambda c: SCALAR * c.sampled * STEPS * PERTURBATIONS,
        device_flops=lambda c: 2 * c.forward * STEPS * PERTURBATIONS,
        cloud_flops=lambda c: 3 * c.public_forward,
        rebuilt=lambda c: c.sampled * STEPS * PERTURBATIONS * round(DENSITY * c.entries),
        replay=replay_meerkat,
        once=True,
        settings={"method.meerkat.density": DENSITY},
    ),
    "spry": Row(
        uplink=lambda c: sum(c.spry_uplinks(0)) / c.sampled,
        uplinks=Costs.spry_uplinks,
        plan=nothing,
        reply=lambda c: c.model_bytes,
        device_flops=lambda c: 2 * c.forward * STEPS * PERTURBATIONS,
        cloud_flops=nothing,
        rebuilt=nothing,
        replay=replay_means,
    ),
    "ferret": Row(
        uplink=lambda c: (SCALAR + 4) * 2 * c.ferret_groups(),  # with 2 candidates every group is projected on both
        plan=nothing,
        reply=lambda c: SCALAR * 2 * c.ferret_groups(),
        device_flops=lambda c: 3 * c.forward * STEPS + 2 * 2 * c.entries,
        cloud_flops=nothing,
        rebuilt=lambda c: 2 * c.entries,
        replay=replay_ferret,
        settings={"method.ferret.candidates": 2, "method.ferret.clip": 0.05},
    ),
    "agzo": Row(
        uplink=lambda c: SCALAR * STEPS * (PERTURBATIONS + 4 * sum(inputs for _, inputs, _ in c.agzo_bases())),
        plan=nothing,
        reply=lambda c: STEPS * c.model_bytes,
        device_flops=lambda c: STEPS * (c.forward * (1 + PERTURBATIONS) + c.agzo_flops()),
        cloud_flops=nothing,
        rebuilt=lambda c: c.sampled * STEPS * PERTURBATIONS * c.agzo_entries(),
        replay=replay_means,
        exchanges=STEPS,
        settings={"model.trainable": "full"},
    ),
    "fedspzo": Row(
        uplink=lambda c: SCALAR * STEPS * P1 * P2,
        plan=nothing,
        reply=lambda c: SCALAR * c.sampled * STEPS * P1 * P2,
        device_flops=lambda c: STEPS * 2 * P1 * (c.first + P2 * c.second),
        cloud_flops=nothing,
        rebuilt=lambda c: c.sampled * STEPS * P1 * (c.entries_of(True) + P2 * c.entries_of(False)),
        replay=replay_fedspzo,
        exchanges=STEPS,
        settings={"method.fedspzo.lr_ratio": 1.7},
    ),
    "cooperllm": Row(
        uplink=lambda c: SCALAR * STEPS * PERTURBATIONS,
        plan=lambda c: c.model_bytes,
        reply=lambda c: SCALAR * c.sampled * STEPS * PERTURBATIONS,
        device_flops=lambda c: 2 * c.forward * STEPS * PERTURBATIONS,
        cloud_flops=lambda c: 3 * c.public_forward,
        rebuilt=lambda c: c.sampled * STEPS * PERTURBATIONS * c.entries,
        replay=replay_cooperllm,
        exchanges=STEPS,
    ),
    "public_only": Row(
        uplink=nothing,
        plan=nothing,
        reply=nothing,
        device_flops=nothing,
        cloud_flops=lambda c: 3 * c.public_forward,
        rebuilt=nothing,
        replay=None,
    ),
}
