"""The probe's fit against L-BFGS on the same objective, and what a run must not import for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedbench.models import probe

JOB = Path(__file__).parents[2] / "jobs" / "demo.toml"


def by_lbfgs(x: np.ndarray, y: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """Return the classes that torch's L-BFGS predicts for `test`, from the same objective."""
    mean, spread = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64) + 1e-6
    here, there = (torch.from_numpy((f - mean) / spread) for f in (x, test))
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(here @ weight + bias, torch.tensor(y))
        loss = loss + 1e-2 * weight.square().sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return (there @ weight + bias).argmax(1).numpy()


@pytest.mark.parametrize(
    ("rows", "width", "classes", "gap"), [(128, 64, 4, 0.25), (24, 384, 6, 0.3), (400, 20, 2, 3.0)]
)
def test_the_fit_predicts_what_lbfgs_predicts(rows: int, width: int, classes: int, gap: float) -> None:
    draw = np.random.default_rng(rows)
    centres, scale = draw.normal(size=(classes, width)) * gap, draw.uniform(0.1, 5, width)
    labels = draw.integers(0, classes, rows + 1000)
    features = ((centres[labels] + draw.normal(size=(rows + 1000, width))) * scale).astype(np.float32)
    wanted = by_lbfgs(features[:rows], labels[:rows], features[rows:], classes)
    # Against the predictions themselves, an accuracy of 1 says that row after row is the same.
    assert probe.logistic_accuracy(features[:rows], labels[:rows], features[rows:], wanted, classes) > 0.997


def test_a_run_does_not_import_the_compiler(tmp_path: Path) -> None:
    words = ["run", str(JOB), "--set", "run.rounds=1", "--results", str(tmp_path)]
    code = (
        "import sys; from fedbench.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch._dynamo is imported' if 'torch._dynamo' in sys.modules else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
