"""The local steps of zeroth-order methods: probes along a walk that stays laid over the weights.

It knows estimators of one and of two sides and no protocol: which directions, and what becomes of the scalars, is the
business of the method. Weights are never changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedbench.algorithms.base import Lab, Round, Upload
from fedbench.zo.direction import AT_WEIGHTS, Direction, Terms
from fedbench.zo.estimate import central, forward


def local_steps(
    lab: Lab, round_: Round, device: int, directions: Sequence[Direction], *, one_sided: bool = False
) -> tuple[Upload, Terms]:
    """Return the scalars a [S P] of S local steps of P directions u each, and the walk that they add up to.

    w_i = w; repeat S: a_p = [f(w_i + eps u_p; B) - f(w_i - eps u_p; B)] / (2 eps), or with one side
    [f(w_i + eps u_p; B) - f(w_i; B)] / eps;  w_i <- w_i - lr mean_p(a_p u_p).
    """
    count = len(directions) // lab.local_steps
    keys = np.stack([u.key for u in directions])
    scale = np.array([u.z_scale for u in directions], np.float32)
    a = np.empty(len(keys), np.float32)
    losses = []
    walk = AT_WEIGHTS
    for step in range(lab.local_steps):
        batch = lab.private(round_.number, step, device)
        done, ahead = step * count, (step + 1) * count
        centre = lab.stream.loss(batch, directions[done], 0.0, walk) if one_sided else 0.0
        for k in range(done, ahead):
            if one_sided:
                a[k] = forward(lab.stream.loss(batch, directions[k], lab.epsilon, walk), centre, lab.epsilon)
                losses.append(centre)
            else:
                plus, minus = lab.stream.losses(batch, directions[k], lab.epsilon, walk)
                a[k] = central(plus, minus, lab.epsilon)
                losses.append((plus + minus) / 2)
        walk = Terms(keys[:ahead], (round_.lr / count * a[:ahead] * scale[:ahead]).astype(np.float32))
    return Upload({"scalars": a}, float(np.mean(losses))), walk
