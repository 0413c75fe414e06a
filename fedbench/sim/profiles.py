"""Links and devices by name, each figure with its source in docs/simulation.md, and what a job makes of them.

Nothing here draws or counts; a figure that no source gives stands as unknown and is never made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from fedbench.base import quantity
from fedbench.base.job import Config
from fedbench.base.link import Link


class Device(NamedTuple):
    """A device: memory in bytes and speed in FLOP/s (infinite: no bound), energy of one FLOP in joules (NaN: unknown)."""

    memory_bytes: float = math.inf
    flops_per_s: float = math.inf
    joules_per_flop: float = math.nan


#: The names are those of `profile.name`.
LINKS: Mapping[str, Link] = {
    "3g": Link(1.5e6, 0.75e6, 40e-3),
    "lte": Link(13e6, 6e6, 20e-3, 10e-3),
    "5g": Link(166.13e6, 21.08e6, 25e-3),
    "wifi": Link(30e6, 15e6, 2e-3),
    "broadband": Link(83.95e6, 38.32e6, 5e-3),
    "ethernet": Link(1e9, 1e9, 0.1e-3),
}

#: Energy that a device's radio takes for a byte either way, in joules, where a source says so.
JOULES_PER_BYTE: Mapping[str, float] = {"3g": 9.7e-6, "wifi": 2.2e-6}

#: The names are those of `profile.device`.
DEVICES: Mapping[str, Device] = {
    "raspberry-pi-4": Device(8 * 2.0**30, 11.8e9, 1 / 1.64e9),
    "jetson-nano": Device(4e9, 472e9, 10 / 472e9),
}


def link_of(config: Config) -> Link:
    """Return a job's link: its profile's figures, each replaced where `[link]` says another than its default."""
    own, default = config.link.link, Link()
    if config.profile.name is None:
        return own
    said = {name: value for name, value in own._asdict().items() if value != getattr(default, name)}
    return LINKS[config.profile.name]._replace(**said)


def joules_per_byte(config: Config) -> float:
    """Return the energy of a byte on a job's links, NaN where it is unknown."""
    return JOULES_PER_BYTE.get(config.profile.name or "", math.nan)


def device_of(config: Config) -> Device:
    """Return a job's device: its profile's figures, each replaced where `[profile]` says it."""
    own, device = config.profile, DEVICES[config.profile.device] if config.profile.device else Device()
    if own.memory is not None:
        device = device._replace(memory_bytes=quantity.size_bytes(own.memory))
    return device if own.flops_per_s is None else device._replace(flops_per_s=own.flops_per_s)
