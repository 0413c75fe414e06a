"""One row a method: what methods.md says that it sends, computes and rebuilds, and a replay that shares no code with it.

A new method gets a row here; `test_methods.py` holds every row against real rounds. Formulas are those of methods.md
2.17 for the settings of `COUNTED`, in which no count is 1 by chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tinyruns import drawn

from fedbench.algorithms.base import Round
from fedbench.base import rng
from fedbench.base.arrays import Arrays
from fedbench.data.embedded import LENGTH
from fedbench.run.build import Built
from fedbench.zo.direction import shared_keys

SCALAR, SEED = 4, 8  # bytes of one number and of one seed on the wire
STEPS, PERTURBATIONS, P1, P2, BATCH = 2, 3, 2, 3, 2
DENSITY = 0.02  # of meerkat's mask
K = 4  # BAFFLE's directions
MORE = 2  # directions that FwdLLM's devices are asked for again in every step
CANDIDATES, INDEX = 64, 2  # FedKSeed's directions, and bytes of the number of one

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
        self.round = 0
        self.entries = built.trainable.size  # d
        self.model_bytes = SCALAR * self.entries
        self.sampled = len(built.sampled(0))  # M
        stages = [built.cut.stage_flops(stage, BATCH, LENGTH) for stage in range(built.cut.stages)]
        self.forward = sum(stages)  # C
        self.boundary = len(built.cut.blocks)  # fedspzo's default split: all layers but the last stand in block 1
        self.first, self.second = sum(stages[: self.boundary]), sum(stages[self.boundary :])  # Cy, Cz
        self.public_forward = built.cut.forward_flops(len(built.splits.public), LENGTH)

    def guide_bytes(self) -> int:
        """Return the bytes of a guide: of tokens and label words, only the rows that public texts and classes use."""
        names = {t.name for t in self.built.trainable}
        table, width = self.built.cut.backbone.tokens.weight.shape
        used = {"tokens": len(np.unique(self.built.splits.public.ids)), "lm_head": self.built.cut.classes}
        sent = self.entries
        for name, rows in used.items():
            if f"backbone.{name}.weight" in names:
                sent -= (table - rows) * width - rows
        return SCALAR * sent

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

    def drawn_candidates(self) -> int:
        """Return how many of FedKSeed's candidates all devices draw together in `round`."""
        run = self.built.job.config.run
        devices = itertools.product(range(STEPS), self.built.sampled(self.round))
        streams = [rng.generator(run.seed, "kseed", self.round, step, device) for step, device in devices]
        return len({int(k) for stream in streams for k in stream.choice(CANDIDATES, PERTURBATIONS)})

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
    #: None where it follows from what devices found.
    rebuilt: Count | None
    replay: Replay | None
    exchanges: int = 1
    #: Whether the cloud plans in the first round alone.
    once: bool = False
    #: Where devices send different amounts: the bytes of each sampled device in a round.
    uplinks: Callable[[Costs, int], list[int]] | None = None
    #: Whether the method takes a step size that changes from round to round.
    linear: bool = True
    settings: Mapping[str, Any] | None = None


def isotropic(built: Built, key: np.ndarray) -> Weights:
    """Return the direction of a key in float64, by tensor."""
    return {name: torch.from_numpy(entries).double() for name, entries in drawn(built.trainable, key).items()}


def steps_of(built: Built, entries: list[Entry]) -> Iterator[tuple[Round, Arrays, int, torch.Tensor, Weights, int]]:
    """Yield (round, plan, device's scalars' index k, scalars of the device, z by tensor, number of devices)."""
    method, lab = built.job.config.method_name, built.lab
    for round_, plan, reply in entries:
        scalars = torch.from_numpy(reply["scalars"]).double()
        for device, row in zip(round_.devices, scalars, strict=True):
            whole_walk = method in ("fedmezo", "meerkat")
            steps = range(lab.local_steps) if whole_walk else range(round_.exchange, round_.exchange + 1)
            for k, key in enumerate(lab.directions(round_.number, device, steps, lab.perturbations)):
                yield round_, plan, k, row, isotropic(built, key), len(round_.devices)


def replay_fedmezo(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w <- w - lr / (M P) sum a z."""
    for round_, _, k, a, z, devices in steps_of(built, entries):
        for name in z:
            w[name] = w[name] - round_.lr * a[k] / (devices * built.lab.perturbations) * z[name]
    return w


def replay_fedspzo(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """All estimators of fedspzo without probes: y <- y - lr mean_i g_y, z <- z - lr ratio mean_i g_z."""
    settings: Any = built.job.settings
    estimator, p1, p2 = settings.estimator, 0 if settings.freeze_first else settings.p1, settings.p2
    layers = len(built.cut.blocks)
    boundary = settings.split % layers + 1 if settings.split < 0 else settings.split + 1
    stages = {t.name: t.stage for t in built.trainable}
    chained = estimator in ("A", "Ac", "D")
    for round_, _, reply in entries:
        step = range(round_.exchange, round_.exchange + 1)
        for device, row in zip(round_.devices, torch.from_numpy(reply["scalars"]).double(), strict=True):
            keys = built.lab.directions(round_.number, device, step, p1 * p2 if chained else max(p1, p2))
            draws = [isotropic(built, key) for key in keys]
            d_y, d_z = (row, row) if estimator in ("A", "Ac") else (row[:p1], row[p1:])
            for p in range(p1):
                slope = d_y[p * p2 : (p + 1) * p2].mean() if estimator in ("A", "Ac") else d_y[p]
                for name in (name for name in w if stages[name] < boundary):
                    move = round_.lr * slope / (p1 * len(round_.devices))
                    w[name] = w[name] - move * draws[p * p2 if chained else p][name]
            for k, slope in enumerate(d_z):
                first = k // p2 * p2
                mean = d_z[first : first + p2].mean()
                centred = (slope - mean) * p2 / (p2 - 1) if estimator == "Ac" else slope
                for name in (name for name in w if stages[name] >= boundary):
                    move = round_.lr * settings.lr_ratio * centred / (len(d_z) * len(round_.devices))
                    w[name] = w[name] - move * draws[k][name]
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


def replay_plus(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w <- w - lr guide_ratio k c V;  y <- y - lr mean_i r_i e_i;  z <- z - lr ratio mean b v, with loops for sums."""
    settings: Any = built.job.settings
    count, boundary = built.lab.perturbations, len(built.cut.blocks)
    stages = {t.name: t.stage for t in built.trainable}
    for round_, plan, reply in entries:
        step = range(round_.exchange, round_.exchange + 1)
        rows = torch.from_numpy(reply["scalars"]).double()
        queries = []
        for device, row in zip(round_.devices, rows, strict=True):
            stream = rng.generator(built.job.config.run.seed, "guide signs", round_.number, round_.exchange, device)
            signs = 1 - 2 * stream.integers(0, 2, (count, 1))[:, 0]
            keys = built.lab.directions(round_.number, device, step, max(count, settings.p2))
            draws = [isotropic(built, key) for key in keys]
            queries += [(float(s), row[p], draws[p]) for p, s in enumerate(signs)]
            for q in range(settings.p2):
                for name in (name for name in w if stages[name] >= boundary):
                    move = round_.lr * settings.lr_ratio * row[count + q] / (settings.p2 * len(rows))
                    w[name] = w[name] - move * draws[q][name]
        found = torch.stack([s * d / settings.b for s, d, _ in queries])
        c, total = found.mean(), found.sum()
        keep = max(0.0, 1 - float(found.var() / len(found) / c**2))
        for i, (s, d, e) in enumerate(queries):
            r = d - settings.b * s * (total - found[i]) / (len(found) - 1)
            for name in (name for name in w if stages[name] < boundary):
                w[name] = w[name] - round_.lr / len(found) * r * e[name]
        for name in w:
            guide = torch.from_numpy(plan[name].reshape(-1)).double()
            w[name] = w[name] - round_.lr * settings.guide_ratio * keep * c * guide
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
                z = drawn(built.trainable, np.array(rng.key(built.lab.seed, "ferret candidate", k), np.uint64))
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


def replay_decomfl(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w <- w - lr / P sum a z, with z from the seeds that travelled and a the means."""
    count = built.lab.perturbations
    for round_, plan, reply in entries:
        a = reply["scalars"].reshape(-1).astype(float)
        for k, key in enumerate(shared_keys(plan["seeds"], count)):
            for name, z in isotropic(built, key).items():
                w[name] = w[name] - round_.lr / count * a[k] * z
    return w


def replay_baffle(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w <- w - lr mean_k(D_k delta_k) / sigma^2 with delta = sigma z."""
    sigma = built.lab.epsilon
    for round_, plan, reply in entries:
        d = reply["scalars"].astype(float)
        for k, key in enumerate(shared_keys(plan["seeds"], len(d))):
            for name, z in isotropic(built, key).items():
                w[name] = w[name] - round_.lr / len(d) * d[k] * sigma * z / sigma**2
    return w


def replay_fedkseed(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w = w0 - lr sum_k A_k z_k, from the newest A and nothing before it."""
    round_, _, reply = entries[-1]
    for k in np.flatnonzero(reply["a"]):
        z = isotropic(built, np.array(rng.key(built.lab.seed, "candidate", int(k)), np.uint64))
        for name in w:
            w[name] = w[name] - round_.lr * float(reply["a"][k]) * z[name]
    return w


def replay_fwdllm(built: Built, w: Weights, entries: list[Entry]) -> Weights:
    """w <- w - lr mean(a v) once all of a step has come; in odd rounds v is the nearest of 10 draws to the last mean."""
    last = {name: torch.zeros_like(values) for name, values in w.items()}
    for first in range(0, len(entries), MORE + 1):
        step = entries[first : first + MORE + 1]
        total, count, done = {name: torch.zeros_like(values) for name, values in w.items()}, 0, 0
        for round_, _, reply in step:
            at = range(round_.exchange // (MORE + 1), round_.exchange // (MORE + 1) + 1)
            for device, row in zip(round_.devices, reply["scalars"].astype(float), strict=True):
                for k, a in enumerate(row, start=done):
                    tries = range(10 * k, 10 * k + 10) if round_.number % 2 else range(k, k + 1)
                    keys = built.lab.directions(round_.number, device, at, tries.stop)[tries.start :]
                    among = [isotropic(built, key) for key in keys]
                    for name in w:
                        v = max(
                            (z[name] for z in among), key=lambda z, name=name: float(z @ last[name]) / float(z.norm())
                        )
                        total[name] += a * v
                    count += 1
            done += reply["scalars"].shape[1]
        last = {name: values / count for name, values in total.items()}
        for name in w:
            w[name] = w[name] - step[0][0].lr * last[name]
    return w


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
        uplink=lambda c: SCALAR * STEPS * (P1 + P2),
        plan=nothing,
        reply=lambda c: SCALAR * c.sampled * STEPS * (P1 + P2),
        device_flops=lambda c: STEPS * ((1 + P1) * c.forward + P2 * c.second),
        cloud_flops=nothing,
        rebuilt=lambda c: c.sampled * STEPS * (P1 * c.entries_of(True) + P2 * c.entries_of(False)),
        replay=replay_fedspzo,
        exchanges=STEPS,
        settings={"method.fedspzo.lr_ratio": 1.7},
    ),
    "cooperllm": Row(
        uplink=lambda c: SCALAR * STEPS * PERTURBATIONS,
        plan=lambda c: c.guide_bytes(),
        reply=lambda c: SCALAR * c.sampled * STEPS * PERTURBATIONS,
        device_flops=lambda c: 2 * c.forward * STEPS * PERTURBATIONS,
        cloud_flops=lambda c: 3 * c.public_forward,
        rebuilt=lambda c: c.sampled * STEPS * PERTURBATIONS * c.entries,
        replay=replay_cooperllm,
        exchanges=STEPS,
    ),
    "cooperllm_plus": Row(
        uplink=lambda c: SCALAR * STEPS * (PERTURBATIONS + P2),
        plan=lambda c: c.guide_bytes(),
        reply=lambda c: SCALAR * c.sampled * STEPS * (PERTURBATIONS + P2),
        device_flops=lambda c: STEPS * ((1 + PERTURBATIONS) * c.forward + P2 * c.second),
        cloud_flops=lambda c: 3 * c.public_forward,
        rebuilt=lambda c: c.sampled * STEPS * (PERTURBATIONS * c.entries_of(True) + P2 * c.entries_of(False)),
        replay=replay_plus,
        exchanges=STEPS,
        settings={"method.cooperllm_plus.p2": P2, "method.cooperllm_plus.shrink": True},
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
    "decomfl": Row(
        uplink=lambda c: SCALAR * STEPS * PERTURBATIONS,
        plan=lambda c: SEED * STEPS,
        reply=lambda c: SCALAR * STEPS * PERTURBATIONS,
        device_flops=lambda c: 2 * c.forward * STEPS * PERTURBATIONS,
        cloud_flops=nothing,
        rebuilt=lambda c: STEPS * PERTURBATIONS * c.entries,
        replay=replay_decomfl,
    ),
    "baffle": Row(
        uplink=lambda c: SCALAR * STEPS * K,
        plan=lambda c: SEED * STEPS,
        reply=lambda c: SCALAR * STEPS * K,
        device_flops=lambda c: STEPS * (K + 1) * c.forward,
        cloud_flops=nothing,
        rebuilt=lambda c: STEPS * K * c.entries,
        replay=replay_baffle,
        exchanges=STEPS,
        settings={"method.baffle.k": K},
    ),
    "fedzo": Row(
        uplink=lambda c: c.model_bytes,
        plan=nothing,
        reply=lambda c: c.model_bytes,
        device_flops=lambda c: STEPS * (PERTURBATIONS + 1) * c.forward,
        cloud_flops=nothing,
        rebuilt=nothing,
        replay=replay_means,
    ),
    "fedkseed": Row(
        uplink=lambda c: (SCALAR + INDEX) * STEPS * PERTURBATIONS,
        plan=nothing,
        reply=lambda c: SCALAR * CANDIDATES,
        device_flops=lambda c: 2 * c.forward * STEPS * PERTURBATIONS,
        cloud_flops=nothing,
        rebuilt=lambda c: c.drawn_candidates() * c.entries,
        replay=replay_fedkseed,
        linear=False,
        settings={"method.fedkseed.candidates": CANDIDATES},
    ),
    "fedkseed_pro": Row(
        uplink=lambda c: (SCALAR + INDEX) * STEPS * PERTURBATIONS,
        plan=lambda c: SCALAR * CANDIDATES,
        reply=lambda c: SCALAR * CANDIDATES,
        device_flops=lambda c: 2 * c.forward * STEPS * PERTURBATIONS,
        cloud_flops=nothing,
        rebuilt=None,
        replay=replay_fedkseed,
        linear=False,
        settings={"method.fedkseed_pro.candidates": CANDIDATES},
    ),
    "fwdllm": Row(
        uplink=lambda c: SCALAR * STEPS * (PERTURBATIONS + MORE),
        plan=nothing,
        reply=lambda c: SCALAR * c.sampled * STEPS * (PERTURBATIONS + MORE),
        device_flops=lambda c: 2 * c.forward * STEPS * (PERTURBATIONS + MORE),
        cloud_flops=nothing,
        rebuilt=lambda c: c.sampled * STEPS * (PERTURBATIONS + MORE) * c.entries * (11 if c.round % 2 else 1),
        replay=replay_fwdllm,
        exchanges=STEPS * (1 + MORE),
        settings={"method.fwdllm.variance_threshold": 1e-30, "method.fwdllm.max_directions": MORE},
    ),
}
