"""The probe: what a logistic regression on the start model's frozen features of the public rows would reach."""

from __future__ import annotations

import numpy as np
import torch

#: Weight of the squared norm beside the mean loss, on features of unit variance.
_RIDGE = 1e-2
_STEPS = 200


def logistic_accuracy(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray, classes: int
) -> float:
    """Return the test accuracy 0..1 of a ridge-penalised logistic regression (L-BFGS in float64)."""
    mean, spread = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64) + 1e-6
    x, test = (torch.from_numpy((f - mean) / spread) for f in (features, test_features))
    y = torch.tensor(labels)
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + _RIDGE * weight.square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(((test @ weight + bias).argmax(1).numpy() == test_labels).mean())
