"""Draws one round of one run: what the cloud, the link and the devices' ranks do when, from the agreed start on.

Bars are painted on a grid, inner spans over outer ones; what is shorter than a cell may vanish, never grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedbench.base.lanes import Lane, lanes
from fedbench.base.records import Run
from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.canvas import Drawing, canvas, legend, marks, rules
from fedbench.report.flights import CHANNELS, Flight, flights
from fedbench.report.looks import Theme
from fedbench.report.parts import hosts, part_of

#: What bars stand for, in the order of the theme's colours for them.
KINDS = ("compute", "cloud", "encode", "decode", "send", "apply", "account", "wait")

_CELLS = 4000
_MOST_LANES = 4
_LANE_IN, _BAR, _LINK = 0.56, 0.6, 1.5
_NAMED, _LAYER = 0.075, 0.004  # of the round: bars wide enough for their name, layers for an edge


class _Shown(NamedTuple):
    """A round: lanes of the ranks that are drawn, cloud first; where training ends; how many others have devices."""

    run: Run
    lanes: list[Lane]
    end_s: float
    ranks: int


def timeline(arms: Sequence[Arm], theme: Theme) -> Drawing | None:
    """Return a round of median length of the first arm with spans, one of several ranks if there is one; or None."""
    shown = _chosen(arms)
    if shown is None:
        return None
    cloud, *devices = shown.lanes
    moving = flights(cloud, devices)
    rows = len(shown.lanes) + (_LINK if moving else 0)
    title = "Timeline of one round"
    figure, (axes,) = canvas(theme, title, 1.35 + _LANE_IN * rows)
    places, names = [], []
    top, seen = 0.0, set[str]()
    for lane in shown.lanes:
        seen |= _bars(axes, lane, top + 0.5, shown.end_s, theme)
        places.append(top + 0.5)
        names.append(_name(shown, lane))
        top += 1
        if lane is cloud and moving:
            _link(axes, moving, top, theme)
            places.append(top + _LINK / 2)
            names.append("link")
            top += _LINK
    _axis(axes, places, names, top, shown.end_s, theme)
    _legend(figure, axes, seen, moving, theme)
    return Drawing(figure, "timeline", title, _caption(shown, moving), _alt(shown))


def _chosen(arms: Sequence[Arm]) -> _Shown | None:
    """Return the round to draw: of the kept ones, the run's first apart, that whose training is of median length."""
    runs = [run for arm in arms for run in arm.runs if run.spans and len(run.spans["rank"])]
    run = next((run for run in runs if run.summary.ranks > 1), runs[0] if runs else None)
    if run is None:
        return None
    rounds: dict[int, list[Lane]] = {}
    for lane in lanes(run.spans):
        rounds.setdefault(lane.round, []).append(lane)
    rounds = {number: found for number, found in rounds.items() if len(found) == run.summary.ranks}
    ends = sorted((max(map(_trained, found)), number) for number, found in rounds.items())
    ends = [pair for pair in ends if pair[0] > 0]
    steady = [pair for pair in ends if pair[1] > 0] or ends
    if not steady:
        return None
    end_s, number = steady[(len(steady) - 1) // 2]
    found = rounds[number]
    own = [lane for lane in found[1:] if lane.rank in hosts(run)]
    busiest = sorted(own, key=lambda lane: -lane.own_s[lane.kind == "compute"].sum())[:_MOST_LANES]
    return _Shown(run, [found[0], *sorted(busiest, key=lambda lane: lane.rank)], end_s, len(own))


def _trained(lane: Lane) -> float:
    """Return when a rank's part in training ended: what follows is evaluation and the agreement to go on."""
    training = np.isin(lane.kind, ("compute", "apply", "cloud"))
    return float(lane.end_s[training].max()) if training.any() else 0.0


def _bars(axes: Axes, lane: Lane, y: float, end_s: float, theme: Theme) -> set[str]:
    """Paint a lane's spans by kind, with edges between layers and devices, and a name above what is wide; return the kinds."""
    grid = np.full(_CELLS, -1)
    cells = np.rint(np.clip(np.stack([lane.start_s, lane.end_s]) / end_s, 0, 1) * _CELLS).astype(int)
    for i, kind in enumerate(lane.kind.tolist()):
        if kind in KINDS:
            grid[cells[0, i] : cells[1, i]] = KINDS.index(kind)
    cuts = np.flatnonzero(np.diff(grid, prepend=-2, append=-2))
    for low, high in pairwise(cuts.tolist()):
        if grid[low] >= 0:
            bar = ([(low * end_s / _CELLS, (high - low) * end_s / _CELLS)], (y - _BAR / 2, _BAR))
            axes.broken_barh(*bar, facecolors=theme.kinds[grid[low]], linewidth=0)
    width = (lane.end_s - lane.start_s) / end_s
    inner = (lane.kind == "compute") & (lane.depth > 0) & (width > _LAYER)
    axes.vlines(lane.start_s[inner], y - _BAR / 2, y + _BAR / 2, color=theme.surface, linewidth=0.7)
    outer = np.isin(lane.kind, ("compute", "cloud")) & (lane.depth == 0)
    axes.vlines(lane.start_s[outer], y - _BAR / 2, y + _BAR / 2, color=theme.surface, linewidth=1.6)
    for i in np.flatnonzero(outer & (width > _NAMED)).tolist():
        place = (float(lane.start_s[i]), y - _BAR / 2)
        axes.annotate(
            str(lane.unit[i]), place, (1, 1), textcoords="offset points", va="bottom", fontsize=8, color=theme.muted
        )
    return {KINDS[i] for i in np.unique(grid) if i >= 0}


def _link(axes: Axes, moving: Sequence[Flight], top: float, theme: Theme) -> None:
    """Draw one thin bar per message in the order in which messages leave, a band per channel."""
    bands = [channel for channel in CHANNELS if any(f.channel == channel for f in moving)]
    share = (_LINK - 0.3) / len(bands)
    for band, channel in enumerate(bands):
        own = sorted((f for f in moving if f.channel == channel), key=lambda f: (f.left_s, f.taken_s))
        step = min(0.16, share * 0.86 / len(own))
        first = top + 0.15 + band * share + (share - step * len(own)) / 2
        colour = theme.channels[CHANNELS.index(channel)]
        for i, flight in enumerate(own):
            bar: dict[str, Any] = {"facecolors": colour, "linewidth": 0}
            axes.broken_barh([(flight.left_s, flight.taken_s - flight.left_s)], (first + i * step, step * 0.9), **bar)


def _axis(axes: Axes, places: Sequence[float], names: Sequence[str], bottom: float, end_s: float, theme: Theme) -> None:
    axes.set_yticks(places, names, color=theme.ink)
    axes.set_ylim(bottom, 0)
    marks(axes, "s")
    axes.set_xlim(0, end_s * 1.005)
    axes.set_xlabel("time since the agreed start of the round", color=theme.muted)
    rules(axes, theme, "x")


def _legend(figure: Figure, axes: Axes, seen: set[str], moving: Sequence[Flight], theme: Theme) -> None:
    """Name the colours that occur."""
    named = [(kind, colour) for kind, colour in zip(KINDS, theme.kinds, strict=True) if kind in seen]
    gone = {flight.channel for flight in moving}
    named += [(f"{c} under way", colour) for c, colour in zip(CHANNELS, theme.channels, strict=True) if c in gone]
    for name, colour in named:
        axes.broken_barh([(0, 0)], (0, 0), facecolors=colour, label=name)
    legend(figure, [name for name, _ in named], theme, lines=False)


def _name(shown: _Shown, lane: Lane) -> str:
    part = part_of(shown.run, lane.rank)
    if lane.rank == 0:
        return part.replace(" and ", " and\n")
    return f"edge\nrank {lane.rank}" if part == "edge" else f"devices of\nrank {lane.rank}"


def _caption(shown: _Shown, moving: Sequence[Flight]) -> str:
    first = shown.lanes[0]
    text = (
        f"Round {first.round} of {shown.run.summary.run_id}, of median length among those whose spans were kept. "
        "Lanes share the agreed start of the round alone, which ranks learn of within about 2 ms; clocks of two hosts "
        "are never compared. Evaluation is not drawn. Edges in compute are layers."
    )
    if moving:
        text += " Link: one thin bar per message, from when it was coded until its receiver takes it."
    if shown.ranks >= len(shown.lanes):
        text += f" The {len(shown.lanes) - 1} busiest of {shown.ranks} ranks with devices are drawn."
    return text


def _alt(shown: _Shown) -> str:
    parts = []
    for lane in shown.lanes:
        sums = {kind: lane.own_s[(lane.kind == kind) & (lane.start_s < shown.end_s)].sum() for kind in KINDS}
        told = ", ".join(f"{kind} {units.quantity(float(s), 's')}" for kind, s in sums.items() if s > 0)
        parts.append(f"{_name(shown, lane)}: {told}".replace("\n", " "))
    return f"Timeline of round {shown.lanes[0].round}, {units.quantity(shown.end_s, 's')}. {'; '.join(parts)}."
