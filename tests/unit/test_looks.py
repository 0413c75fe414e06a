"""Looks of arms: no two alike, and colours that stay apart for readers who see fewer of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedbench.report.arms import METHOD_ORDER, Arm
from fedbench.report.looks import DARK, LIGHT, Theme, looks

#: The methods of the demo, in whose figures a reader must tell any two lines apart.
SHOWN = ("cooperllm", "cooperllm_plus", "public_only", "fedmezo", "fedspzo", "fedavg")

#: Linear RGB as it is seen: Machado, Oliveira and Fernandes 2009, table of severity 1.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
#: Linear sRGB to CIE XYZ, white D65.
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_LEAST_APART = 30.0
_LEAST_CONTRAST = 2.9


def linear(colour: str) -> np.ndarray:
    """Return `#rrggbb` as linear RGB [3]."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return linear RGB [3] as CIE L*a*b*."""
    ratio = _XYZ @ rgb / _XYZ.sum(axis=1)
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def arms(*methods: str) -> list[Arm]:
    return [Arm(f"{method} {i}", method, {}, ()) for i, method in enumerate(methods)]


#: Reports by the methods of their arms.
REPORTS = {
    "all methods": METHOD_ORDER,
    "four variants of each": METHOD_ORDER * 4,
    "unknown ones as well": (*METHOD_ORDER, "mine", "yours"),
    "many of one": ("fedmezo",) * 40,
}


@pytest.mark.parametrize("report", REPORTS)
def test_no_two_arms_look_alike(report: str) -> None:
    found = looks(arms(*REPORTS[report]))
    assert len(set(found.values())) == len(found) == len(REPORTS[report])


def test_the_methods_of_the_demo_differ_in_colour_dash_and_marker_each() -> None:
    found = list(looks(arms(*SHOWN)).values())
    for part in ("colour", "dash", "marker"):
        assert len({getattr(look, part) for look in found}) == len(SHOWN), part


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: str(theme.name))
@pytest.mark.parametrize("sight", SIGHTS)
def test_the_methods_of_the_demo_stay_apart_in_every_sight(sight: str, theme: Theme) -> None:
    found = looks(arms(*SHOWN)).values()
    seen = [lab(np.clip(SIGHTS[sight] @ linear(theme.arms[look.colour]), 0, 1)) for look in found]
    apart = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in itertools.combinations(range(6), 2)}
    near = {f"{SHOWN[a]}, {SHOWN[b]}": round(value) for (a, b), value in apart.items() if value < _LEAST_APART}
    assert near == {}


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: str(theme.name))
def test_every_colour_is_seen_on_its_surface(theme: Theme) -> None:
    surface = float(_XYZ[1] @ linear(theme.surface)) + 0.05
    for colour in theme.arms:
        own = float(_XYZ[1] @ linear(colour)) + 0.05
        assert max(own, surface) / min(own, surface) >= _LEAST_CONTRAST, colour
