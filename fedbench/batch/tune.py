"""From a finished grid over step sizes to the best point of every method.

A best point on the edge of its grid says nothing about what lies beyond, so the grid is widened there, at the same
budget a point, until the best lies inside or the bound is reached, and then it says so. No job file is changed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedbench.base import config, fsio
from fedbench.base.config import Setting
from fedbench.batch import manifest
from fedbench.batch.curves import TUNED, By, Curve, read_curves, told_apart
from fedbench.batch.manifest import Line, Sweep
from fedbench.run.build import resolve

#: How often a curve is widened at most.
WIDENINGS = 4

NAME = "tune.json"


def tune(swept: Sweep, by: By, run: Callable[[Sweep], None]) -> list[dict[str, Any]]:
    """Return the curves of a finished grid, widened and merged, as trees; they are kept in `DIR/tune.json`.

    `run` runs what is not done of a sweep. The wider grids are sweeps in `DIR-wide`, `DIR-wide-2`, ...; those that an
    earlier tuning left are taken up.
    """
    sweeps = [swept]
    while (_wide(swept, len(sweeps)) / manifest.NAME).exists():
        sweeps.append(manifest.read(_wide(swept, len(sweeps))))
        run(sweeps[-1])
    curves = read_curves(sweeps, by)
    while lines := list(_widening(curves)):
        sweeps.append(manifest.write(_wide(swept, len(sweeps)), lines))
        run(sweeps[-1])
        curves = read_curves(sweeps, by)
    trees = [_tree(curve, told, by) for curve, told in zip(curves, told_apart(curves), strict=True)]
    fsio.write_text(swept.folder / NAME, json.dumps(trees, indent=2) + "\n")
    return trees


def as_toml(tree: dict[str, Any]) -> str:
    """Return a curve's best step size as a table of the job file, with the curve and what it is of as comments."""
    setting = ", ".join(f"{key} = {value}" for key, value in tree["setting"].items() if key != "method.name")
    several = len({point["epsilon"] for point in tree["points"]}) > 1

    def told(point: dict[str, Any]) -> str:
        at = f"{point['lr']:g}" + (f" (epsilon {point['epsilon']:g})" if several else "")
        return f"{at}: " + ("diverged" if point["score"] is None else f"{point['score']:.4g}")

    lines = [f"# {setting}", f"# {tree['by']} on dev by lr: {', '.join(map(told, tree['points']))}"]
    if tree["on_edge"]:
        lines.append(f"# the best lies on the edge of the grid, after {tree['widenings']} widening(s)")
    if several:
        lines.append(f"# with zo.epsilon = {tree['best']['epsilon']:g}")
    return "\n".join([*lines, f"[method.{tree['setting']['method.name']}]", f"lr = {tree['best']['lr']:g}", ""])


def _wide(swept: Sweep, number: int) -> Path:
    """Return the folder of a widening, counted from 1."""
    return swept.folder.with_name(f"{swept.folder.name}-wide" + (f"-{number}" if number > 1 else ""))


def _widening(curves: Sequence[Curve]) -> Iterator[Line]:
    """Yield the lines that continue those curves whose best lies on an edge, with the seeds that they have."""
    number = 0
    for curve in curves:
        points = curve.wider() if len(curve.parts) <= WIDENINGS else []
        for point in points:
            for line in curve.by_seed.values():
                yield _moved(line, dict(zip(TUNED, point, strict=True)), number)
                number += 1


def _moved(line: Line, values: dict[str, float], number: int) -> Line:
    """Return the line of the same run at another point."""
    tree = copy.deepcopy(dict(line.config))
    overrides = dict(line.overrides)
    for key, value in values.items():
        config.put(tree, Setting(tuple(key.split(".")), value))
        overrides[key.replace("settings", line.method)] = value
    job = resolve(config.check(manifest.as_job_file(tree), source=manifest.NAME), manifest.NAME)
    return Line(number, job.run_id, overrides, job.tree)


def _tree(curve: Curve, setting: dict[str, Any], by: By) -> dict[str, Any]:
    """Return a curve as JSON can hold it; the score of what diverged is null."""
    means = {point: curve.mean(point) for point in sorted(curve.scores)}
    return {
        "setting": setting,
        "by": by,
        "points": [
            {**point._asdict(), "score": None if math.isinf(mean) else mean, "seeds": len(curve.scores[point])}
            for point, mean in means.items()
        ],
        "best": curve.best._asdict(),
        "on_edge": bool(curve.wider()),
        "widenings": len(curve.parts) - 1,
    }
