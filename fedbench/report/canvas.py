"""What all figures share: the empty figure in a theme's colours, legend, axis marks, and how a figure becomes bytes.

Only matplotlib's object API is used: no window, no state that other code could see.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from fedbench.report.looks import Look, Theme

_WIDTH_IN = 10.0
_DPI = 150
_LEGEND_CHARACTERS = 135
_LEGEND_ROW_IN = 0.2
_MOST_MARKERS = 9


class Drawing(NamedTuple):
    """A figure with its file name and the words that go with it."""

    figure: Figure
    name: str
    title: str
    caption: str
    alt: str


def canvas(theme: Theme, title: str, height_in: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with a row of empty axes that share their y axis."""
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained", facecolor=theme.surface)
    figure.suptitle(title, x=0.008, ha="left", fontsize=12.5, fontweight="bold", color=theme.ink)
    grid = figure.subplots(1, columns, sharey=True, squeeze=False)
    for axes in grid[0]:
        axes.set_facecolor(theme.surface)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=theme.muted, linewidth=0.8)
        axes.tick_params(colors=theme.muted, length=0, labelsize=9)
        axes.set_axisbelow(True)
    return figure, list(grid[0])


def line(axes: Axes, x: np.ndarray, y: np.ndarray, look: Look, theme: Theme) -> Line2D:
    """Draw an arm's line, with markers at points of its own: evenly over them, the first and the last among them."""
    at = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_MARKERS)).round().astype(int)).tolist()
    marker: dict[str, Any] = {"marker": look.marker, "markersize": 7, "markeredgecolor": theme.surface, "markevery": at}
    (drawn,) = axes.plot(x, y, color=theme.arms[look.colour], linestyle=look.dash, linewidth=1.9, **marker)
    return drawn


def marks(axes: Axes, unit: str, *, log: bool = False, whole: bool = False) -> None:
    """Give the x axis round values with their unit, from 0 unless it is logarithmic."""
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10]))
    if unit:
        axes.xaxis.set_major_formatter(EngFormatter(unit=unit, sep=" "))


def rules(axes: Axes, theme: Theme, axis: Literal["x", "y"]) -> None:
    """Draw thin lines at the marks of one axis."""
    axes.grid(axis=axis, color=theme.rule, linewidth=0.9)


def legend(figure: Figure, labels: Sequence[str], theme: Theme, *, lines: bool) -> None:
    """Put a legend under the axes, in as many columns as its labels leave room for; the figure grows with its rows."""
    characters = max(len(label) for label in labels) + 7
    columns = max(1, min(len(labels), math.floor(_LEGEND_CHARACTERS / characters)))
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW_IN * math.ceil(len(labels) / columns))
    options: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": theme.ink, "columnspacing": 1.6}
    figure.legend(loc="outside lower left", ncols=columns, handlelength=3.2 if lines else 1.2, **options)


def png(figure: Figure) -> bytes:
    """Return the figure as PNG; the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
    return out.getvalue()


def svg(figure: Figure) -> bytes:
    """Return the figure as SVG with text as outlines, so that it looks the same everywhere."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fedbench", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
