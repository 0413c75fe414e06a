"""How arms look, the same in every figure and on the page: colours for light and dark, dashes, markers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedbench.report.arms import METHOD_ORDER, Arm


class Theme(NamedTuple):
    """Colours of one background: `arms` by place in the palette, `parts` for the pieces of a round.

    `kinds` are for the bars of a timeline, `channels` for messages; `ramp` runs from few to many. `page` lies behind
    the surface that figures are drawn on.
    """

    name: str
    page: str
    surface: str
    ink: str
    muted: str
    rule: str
    arms: tuple[str, ...]
    parts: tuple[str, ...]
    kinds: tuple[str, ...]
    channels: tuple[str, ...]
    ramp: tuple[str, str, str]


class Look(NamedTuple):
    """Place in the palette, dash pattern and marker of one arm."""

    colour: int
    dash: tuple[float, tuple[float, ...]]
    marker: str


LIGHT = Theme(
    "light",
    "#f4f6fa",
    "#ffffff",
    "#1b2230",
    "#5a6474",
    "#e3e7ee",
    ("#1667d9", "#0b8a66", "#d3590b", "#7d4cc7", "#c4285f", "#0a8ba0", "#8f6d00", "#5d6675", "#a0522d", "#3f7d1f"),
    ("#3c6fb4", "#8bb8e8", "#e0a030", "#c95d4a", "#6f9e5b", "#c9cfd9"),
    ("#3c6fb4", "#8bb8e8", "#e0a030", "#8e5fc0", "#b9a98a", "#6f9e5b", "#aab2bf", "#f4ddd8"),
    ("#1f9a8f", "#d3590b", "#7d4cc7"),
    ("#eef4fb", "#5b93d6", "#123f7a"),
)
DARK = Theme(
    "dark",
    "#0b0e14",
    "#12161e",
    "#e9edf4",
    "#a2adbd",
    "#2a313d",
    ("#5ea6ff", "#3ecfa0", "#ff9857", "#b795ff", "#ff7fa6", "#4fd3e6", "#e2bd4b", "#aab4c3", "#dda27c", "#93d36b"),
    ("#5b8fd6", "#a8cdf4", "#f0b850", "#e38372", "#8fc27a", "#525c6b"),
    ("#5b8fd6", "#a8cdf4", "#f0b850", "#b08ae0", "#8f8468", "#8fc27a", "#525c6b", "#45292a"),
    ("#3cc4b6", "#ff9857", "#b795ff"),
    ("#1b2634", "#4d86cc", "#cfe4ff"),
)
_DASHES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (4, 1.8)),
    (0, (1.2, 1.4)),
    (0, (6, 1.6, 1.2, 1.6)),
)
_MARKERS = "osD^vPX<>p"


def looks(arms: Sequence[Arm]) -> dict[str, Look]:
    """Return the look of each label: a method keeps its colour in every report, its variants differ by dashes.

    Arms of one method alone get a colour each.
    """
    methods = list(dict.fromkeys(arm.method for arm in arms))
    colours = _colours(methods)
    seen: dict[str, int] = {}
    chosen = {}
    for i, arm in enumerate(arms):
        variant = seen.setdefault(arm.method, 0)
        seen[arm.method] += 1
        alone = len(methods) == 1
        colour = i % len(LIGHT.arms) if alone else colours[arm.method]
        dash = _DASHES[(i // len(LIGHT.arms) if alone else variant) % len(_DASHES)]
        chosen[arm.label] = Look(colour, dash, _MARKERS[i % len(_MARKERS)])
    return chosen


def _colours(methods: Sequence[str]) -> dict[str, int]:
    """Return a place in the palette per method: its own where free, else the next free one."""
    size = len(LIGHT.arms)
    taken: dict[str, int] = {}
    for method in methods:
        place = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
        order = [(place + k) % size for k in range(size)]
        taken[method] = next((c for c in order if c not in taken.values()), order[0])
    return taken
