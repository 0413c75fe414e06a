"""Scores of a finished grid over step sizes, by the dev split alone: one curve per method, model, part and public set.

Runs that differ in step size, probing step and seed alone are one curve. Nothing is run here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from fedbench.base import config, identity
from fedbench.base.errors import ConfigError
from fedbench.base.stats import mean_sd
from fedbench.batch import failures
from fedbench.batch.failures import Failure
from fedbench.batch.manifest import Line, Sweep
from fedbench.results import reader

By = Literal["accuracy", "loss"]

#: What is tuned, as keys of a resolved config, in the order of a Point; and what repeats differ in.
TUNED = ("method.settings.lr", "zo.epsilon")
_REPEATED = ("run.seed",)

#: Keys that every curve is told with; of the others those that tell one curve of a method from another.
_TOLD = ("method.name", "model.name", "model.trainable", "data.public")

#: Mean accuracies this close are no better or worse than each other (a dev split of 512 rows has a standard error of
#: .012): of their step sizes the smallest is taken, since the ones above it are the first to collapse in longer runs.
_TIE = 0.003

#: Values that one widening adds.
_NEW_VALUES = 2


class Point(NamedTuple):
    """A place of the grid."""

    lr: float
    epsilon: float


@dataclass
class Curve:
    """The scores of one setting.

    `rest` is the flat config without what is tuned or repeated, `scores` maps a point to one score a seed (-inf where
    the run diverged), `by_seed` has one line of each seed, `parts` says in which of the merged sweeps there are runs.
    """

    rest: Mapping[str, Any]
    by: By = "accuracy"
    scores: dict[Point, list[float]] = field(default_factory=dict)
    by_seed: dict[int, Line] = field(default_factory=dict)
    parts: set[int] = field(default_factory=set)

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.rest["method.name"])

    @property
    def best(self) -> Point:
        """The point with the best score; of equal ones, and of accuracies that are as good as equal, the smallest."""
        highest = max(map(self.mean, self.scores))
        near = highest - (_TIE if self.by == "accuracy" else 0.0)
        return min(point for point in self.scores if self.mean(point) >= near)

    def mean(self, point: Point) -> float:
        """Return a point's score over its seeds; -inf where one of them diverged."""
        own = self.scores[point]
        return -math.inf if -math.inf in own else mean_sd(own).mean

    def axis(self, number: int) -> list[float]:
        """Return the values of a coordinate of the points, in ascending order."""
        return sorted({point[number] for point in self.scores})

    def wider(self) -> list[Point]:
        """Return the points that continue the grid where its best lies on an edge; none where it lies inside."""
        axes = [self.axis(number) for number in range(len(TUNED))]
        new: list[Point] = []
        for number, axis in enumerate(axes):
            across = [beyond(axis, self.best[number]) if other == number else own for other, own in enumerate(axes)]
            new += [Point(*values) for values in itertools.product(*across)]
        return new


def read_curves(sweeps: Sequence[Sweep], by: By) -> list[Curve]:
    """Return the curves of finished sweeps, merged; ConfigError where runs are not finished or nothing is varied."""
    curves: dict[str, Curve] = {}
    for number, swept in enumerate(sweeps):
        why = failures.read(swept.folder)
        for line in swept.lines:
            flat = config.flatten(line.config)
            rest = {key: value for key, value in flat.items() if key not in (*TUNED, *_REPEATED)}
            curve = curves.setdefault(identity.canonical_json(rest), Curve(rest, by))
            point = Point(*(float(flat[key]) for key in TUNED))
            curve.scores.setdefault(point, []).append(_score(swept, line, why.get(line.run_id), by))
            curve.by_seed.setdefault(line.seed, line)
            curve.parts.add(number)
    if not any(len(curve.scores) > 1 for curve in curves.values()):
        raise ConfigError(
            f"{sweeps[0].folder}: nothing to tune: no method has runs at two step sizes. A grid has them, such as "
            f"--grid method.lr=x0.22,x0.46,x1,x2.2,x4.6."
        )
    return list(curves.values())


def told_apart(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return what each curve is told with: method, model, part, public set, and what else differs within a method."""
    told = []
    for curve in curves:
        others = [other.rest for other in curves if other.method == curve.method]
        differing = [key for key in curve.rest if any(rest.get(key) != curve.rest[key] for rest in others)]
        told.append({key: curve.rest[key] for key in dict.fromkeys((*_TOLD, *differing))})
    return told


def beyond(axis: Sequence[float], best: float) -> list[float]:
    """Return the geometric continuation of an ascending axis behind the end that `best` is, to 2 significant digits.

    Nothing where `best` lies inside, or where the axis has one value and so no direction.
    """
    if len(axis) < 2 or best not in (axis[0], axis[-1]):
        return []
    ratio = (axis[-1] / axis[0]) ** (1 / (len(axis) - 1))
    step = ratio if best == axis[-1] else 1 / ratio
    return sorted({float(f"{best * step**n:.2g}") for n in range(1, _NEW_VALUES + 1)} - {best})


def _score(swept: Sweep, line: Line, failure: Failure | None, by: By) -> float:
    """Return one run's mean over its evaluations of dev accuracy, or of minus the dev loss; -inf where it diverged."""
    path = swept.run_file(line)
    verdict = reader.inspect(path, line.run_id)
    if not verdict.done:
        if failure is not None and failure.kind == failures.DIVERGED:
            return -math.inf
        raise ConfigError(
            f"{verdict.reason} A grid is tuned when all of its runs are done or diverged: fedbench sweep submit "
            f"{swept.folder} --local."
        )
    rounds = reader.read(path).rounds
    evaluated = ~np.isnan(rounds["dev_accuracy"])
    score = float(np.mean((rounds["dev_accuracy"] if by == "accuracy" else -rounds["dev_loss"])[evaluated]))
    return score if math.isfinite(score) else -math.inf
