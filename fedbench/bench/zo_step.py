"""`bench zo-step`: one zeroth-order step with its update, beside what it is measured against.

All arms see the same batch, the same head rows and the same attention. `zo_step` probes once
and updates every trainable tensor. References: two plain inference forwards; MeZO in place,
which draws its direction four times with `torch.randn`; backpropagation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from fedbench.bench import harness
from fedbench.bench.harness import Options
from fedbench.bench.models import Subject, subject
from fedbench.models.cut import State
from fedbench.zo.direction import Direction, Terms, as_keys, direction_key
from fedbench.zo.estimate import central
from fedbench.zo.update import subtract

_H = 1e-3
_LR = 1e-7

#: Backpropagation is only there to compare with: fewer repetitions of it.
_BACKPROP_REPEATS = 2


class Steps:
    """The arms, each one step on the same weights."""

    def __init__(self, on: Subject) -> None:
        self._on = on
        self._keys = as_keys([direction_key(0, 0, 0, 0, 0)])
        self.direction = Direction(self._keys[0])
        self._seed = torch.Generator()
        self._optimisers: dict[str, torch.optim.Optimizer] = {}

    def _loss(self) -> torch.Tensor:
        return self._mean_loss(self._on.cut(self._on.batch))

    def _mean_loss(self, out: torch.Tensor) -> torch.Tensor:
        return self._on.cut.head.losses(out, self._on.batch).mean()

    @torch.inference_mode()
    def two_forwards(self) -> None:
        """Two plain inference forwards with their losses."""
        for _ in range(2):
            float(self._loss())

    def zo_step(self) -> None:
        """One probe in both directions and the update."""
        on = self._on
        slope = central(*on.stream.losses(on.batch, self.direction, _H), _H)
        subtract(on.trainable, Terms(self._keys, np.array([_LR * slope], np.float32)), gaussian=False)

    @torch.inference_mode()
    def mezo(self) -> None:
        """MeZO in place: +eps z, -2 eps z, +eps z and the update, z drawn anew from its seed in each of the four passes."""
        self._walk(_H)
        plus = float(self._loss())
        self._walk(-2 * _H)
        minus = float(self._loss())
        self._walk(_H)
        self._walk(-_LR * (plus - minus) / (2 * _H))

    def _walk(self, step: float) -> None:
        self._seed.manual_seed(0)
        for parameter in self._on.trainable.parameters:
            parameter.data.add_(torch.randn(parameter.shape, generator=self._seed), alpha=step)

    def sgd(self) -> None:
        """Backpropagation with plain SGD."""
        self._backprop("SGD", self._loss())

    def adamw(self) -> None:
        """Backpropagation with AdamW."""
        self._backprop("AdamW", self._loss())

    def adamw_checkpointing(self) -> None:
        """Backpropagation with AdamW, each block's activations computed again on the way back."""
        cut, batch = self._on.cut, self._on.batch
        state = cut.run_stage(0, batch)
        for stage in range(1, cut.stages):
            state = checkpoint(cut.run_stage, stage, state, use_reentrant=False)
        assert not isinstance(state, State)
        self._backprop("AdamW", self._mean_loss(state))

    def _backprop(self, name: str, loss: torch.Tensor) -> None:
        if name not in self._optimisers:
            self._optimisers[name] = getattr(torch.optim, name)(self._on.trainable.parameters, lr=_LR)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimisers[name].step()
        self._optimisers[name].zero_grad()


def run(options: Options) -> dict[str, Any]:
    """Return the ratio to two forwards, the speed-up over MeZO in place, all samples and the roofline.

    `speedup_over_mezo_bound` is what a step would reach whose perturbations and update cost nothing.
    """
    on = subject(options)
    return harness.by_threads(options, lambda asked: _with_threads(on, asked))


def _with_threads(on: Subject, options: Options) -> dict[str, Any]:
    steps = Steps(on)
    samples = harness.measure(
        {"two_forwards": steps.two_forwards, "zo_step": steps.zo_step, "mezo": steps.mezo}, options.repeats
    )
    back = harness.measure(
        {"backprop_sgd": steps.sgd, "backprop_adamw": steps.adamw, "adamw_checkpointing": steps.adamw_checkpointing},
        _BACKPROP_REPEATS,
    )
    over_forwards = harness.ratio(samples["zo_step"], samples["two_forwards"])
    over_mezo = harness.ratio(samples["mezo"], samples["zo_step"])
    every = {**samples, **back}
    return {
        "ratio_two_forwards": over_forwards["value"],
        "speedup_over_mezo": over_mezo["value"],
        "speedup_over_mezo_bound": harness.ratio(samples["mezo"], samples["two_forwards"])["value"],
        "intervals": {"ratio_two_forwards": over_forwards, "speedup_over_mezo": over_mezo},
        "medians_s": harness.medians(every),
        "roofline": _roofline(on, options, float(np.median(samples["zo_step"]))),
        "samples_s": every,
    }


def _roofline(on: Subject, options: Options, seconds: float) -> dict[str, float]:
    """Return FLOPs and bytes of one step against this machine's measured limits.

    Bytes: each trainable entry read by the probe, read and written by the update; lookups aside.
    """
    machine = harness.limits()
    flops = 2 * on.cut.forward_flops(options.batch, options.length)
    moved = 12.0 * on.trainable.size
    bound = flops / machine["flops_per_s"] + moved / machine["bytes_per_s"]
    return {**machine, "flops": flops, "bytes": moved, "bound_s": bound, "of_bound": bound / seconds}
