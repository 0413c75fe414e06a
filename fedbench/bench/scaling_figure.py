"""The table and the figure of `bench scaling`: efficiency over ranks, strong and weak. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedbench.base import fsio
from fedbench.base.errors import ConfigError
from fedbench.report import canvas
from fedbench.report.looks import LIGHT, Theme
from fedbench.report.table import Grid
from fedbench.report.units import NOTHING, quantity

_FORMS = {".png": canvas.png, ".svg": canvas.svg}
_LINES = (("efficiency", "of all ranks", "o", "-"), ("efficiency_of_device_ranks", "of ranks with devices", "s", "--"))
_IDEAL: dict[str, Any] = {
    "xycoords": ("axes fraction", "data"),
    "textcoords": "offset points",
    "va": "center",
    "fontsize": 8.5,
}
_TITLES = {"strong": "strong: the same devices", "weak": "weak: devices grow with ranks"}


def check_path(path: Path) -> None:
    """Raise ConfigError where a figure can't have this name."""
    if path.suffix not in _FORMS:
        raise ConfigError(f"--out: found {path}; allowed: a file that ends in {' or '.join(_FORMS)}.")


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write the figure of a result as PNG or SVG, by the name's ending."""
    try:
        fsio.write_bytes(path, _FORMS[path.suffix](draw(result, LIGHT)))
    except OSError as error:
        raise ConfigError(f"--out: found {path}, which can't be written: {error.strerror}.") from None


def draw(result: Mapping[str, Any], theme: Theme) -> Figure:
    """Return efficiency over ranks with its intervals in two panels; hollow marks are runs with more ranks than cores."""
    figure, panels = canvas.canvas(theme, "Scaling over ranks", 3.9, columns=2)
    over = set(result["oversubscribed"])
    for axes, kind in zip(panels, ("strong", "weak"), strict=True):
        ranks = [int(name) for name in result["efficiency"][kind]]
        axes.axhline(1.0, color=theme.muted, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate("ideal", (1, 1.0), (4, 0), **_IDEAL, color=theme.muted)
        for i, (key, label, marker, dash) in enumerate(_LINES):
            values = [result[key][kind][str(r)] for r in ranks]
            colour = theme.arms[2 * i]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7}
            axes.plot(range(len(ranks)), values, linestyle=dash, linewidth=1.9, label=f"efficiency {label}", **style)
            hollow = [(x, value) for x, (rank, value) in enumerate(zip(ranks, values, strict=True)) if rank in over]
            for x, value in hollow:
                axes.plot([x], [value], markerfacecolor=theme.surface, zorder=3, **style)
            for rank, (low, high) in _intervals(result, key, kind).items():
                axes.vlines(ranks.index(rank), low, high, color=colour, linewidth=1.4, alpha=0.7)
        axes.set_xticks(range(len(ranks)), [f"{r}{' *' if r in over else ''}" for r in ranks])
        axes.set_xlabel("ranks" + (f"   (* more than {result['cores']} cores)" if over else ""), color=theme.muted)
        axes.set_title(_TITLES[kind], loc="left", fontsize=10, color=theme.ink)
        axes.margins(x=0.08)
        canvas.rules(axes, theme, "y")
    panels[0].set_ylim(
        0, 1.12 * max(1.0, *(v for key, *_ in _LINES for own in result[key].values() for v in own.values()))
    )
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylabel("efficiency (bars: 95 % interval)", color=theme.muted)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legends.clear()
    _legend(figure, handles, labels, theme)
    return figure


def _intervals(result: Mapping[str, Any], key: str, kind: str) -> dict[int, tuple[float, float]]:
    """Return the interval of each efficiency that has one, by ranks: that of its speed-up over the same number."""
    found = {}
    for ranks, value in result[key][kind].items():
        told = result["samples_intervals"][kind][ranks]
        if told["low"] is not None:
            scale = value / told["value"]
            found[int(ranks)] = (scale * told["low"], scale * told["high"])
    return found


def grid(result: Mapping[str, Any]) -> Grid:
    """Return one row per kind and ranks."""
    rows = []
    over = set(result["oversubscribed"])
    for kind, own in result["efficiency"].items():
        for ranks, value in own.items():
            told = result["samples_intervals"][kind][ranks]
            low, high = told["low"], told["high"]
            spread = NOTHING if low is None else f"{low / int(ranks):.2f} to {high / int(ranks):.2f}"
            rows.append(
                (
                    f"{kind}, {ranks} rank(s)" + (" *" if int(ranks) in over else ""),
                    str(result["devices"][kind][ranks]),
                    quantity(result["round_s"][kind][ranks], "s"),
                    f"{result['speedup'][kind][ranks]:.2f}",
                    f"{value:.2f}",
                    spread,
                    f"{result['efficiency_of_device_ranks'][kind][ranks]:.2f}",
                )
            )
    note = "Speed-up in devices a second over one rank; efficiency is that over ranks. Rank 0 is the cloud and hosts no devices."
    if over:
        note += f" *: more ranks times threads than the {result['cores']} cores here, so that these say nothing of a cluster."
    headings = ("", "devices", "median round", "speed-up", "efficiency", "95 % interval", "of ranks with devices")
    return Grid("Scaling over ranks", headings, tuple(rows), note)


def _legend(figure: Figure, handles: Any, labels: Any, theme: Theme) -> None:
    options: dict[str, Any] = {
        "frameon": False,
        "fontsize": 9,
        "labelcolor": theme.ink,
        "ncols": 2,
        "handlelength": 3.2,
    }
    figure.legend(handles, labels, loc="outside lower left", **options)
