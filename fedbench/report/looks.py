"""How arms look, the same in every figure and on the page: colours for light and dark, dashes, markers.

The colours of the methods that the demo compares stay apart for colour-blind readers, in lightness where not in hue; a
method has a dash and a marker of its own besides.
"""

from __future__ import annotations

import itertools
import math
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
    ("#1238b8", "#6a1b5c", "#8a1a08", "#c98210", "#3f9e74", "#0070a3", "#856600", "#a27fd2", "#b0405a", "#7a9952"),
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
    ("#adc2ff", "#cc478f", "#eb2947", "#ffb833", "#66ffc2", "#00a3b8", "#a38f00", "#8f5ce0", "#ff8f9a", "#d6eb85"),
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
    (0, (8, 2.4)),
    (0, (3, 1.4, 1.2, 1.4, 1.2, 1.4)),
)
_MARKERS = "osD^vPX<>ph"


def looks(arms: Sequence[Arm]) -> dict[str, Look]:
    """Return the look of each label, no two alike: a method keeps its colour in every report.

    Its variants differ by dash and marker; arms of one method alone get a colour each.
    """
    methods = list(dict.fromkeys(arm.method for arm in arms))
    colours = _colours(methods)
    chosen: dict[str, Look] = {}
    for i, arm in enumerate(arms):
        place, colour = (i, i % len(LIGHT.arms)) if len(methods) == 1 else (_place(arm.method), colours[arm.method])
        own = [Look(colour, dash, marker) for dash, marker in _turns(place)]
        chosen[arm.label] = next((look for look in own if look not in chosen.values()), own[0])
    return chosen


def _turns(place: int) -> list[tuple[tuple[float, tuple[float, ...]], str]]:
    """Return all pairs of dash and marker from those of a place on; both change from one to the next."""
    pairs = zip(itertools.cycle(_DASHES), itertools.cycle(_MARKERS), strict=False)
    number = math.lcm(len(_DASHES), len(_MARKERS))
    return list(itertools.islice(pairs, place, place + number))


def _colours(methods: Sequence[str]) -> dict[str, int]:
    """Return a place in the palette per method: its own where free, else the next free one."""
    size = len(LIGHT.arms)
    taken: dict[str, int] = {}
    for method in methods:
        order = [(_place(method) + k) % size for k in range(size)]
        taken[method] = next((c for c in order if c not in taken.values()), order[0])
    return taken


def _place(method: str) -> int:
    return METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
