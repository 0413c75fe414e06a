"""What is simulated: the links, devices, cloud and edges of a job, and what its key says of every device.

A scene is fixed for a run. It draws who drops out, how fast a device is and how late its messages are; it adds up no
times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedbench.base import quantity
from fedbench.base.errors import ConfigError
from fedbench.base.job import Config, ProfileSection
from fedbench.base.link import Link
from fedbench.sim import draws
from fedbench.sim.profiles import Device, device_of, joules_per_byte, link_of

_DOWN, _UP = 0, 1

#: Keys that paced links and adaptive codecs rest on as well.
_FOR_ANY_CLOCK = ("profile.name", "profile.device", "profile.flops_per_s")


class Scene(NamedTuple):
    """A federation's machines and links; rates in bit/s, infinite where there is no bound.

    `trunk_bit_s` is the cloud's own link, and each edge's; the devices that it serves share it. `edges` counts for a
    tree alone, `spread` is that of the logarithm of a device's speed and of its link's rates.
    """

    seed: int
    link: Link
    device: Device
    cloud_flops_per_s: float = math.inf
    trunk_bit_s: float = math.inf
    trunk_latency_s: float = 0.0
    tree: bool = False
    edges: int = 1
    spread: float = 0.0
    dropout: float = 0.0
    deadline_s: float = math.inf
    joules_per_byte: float = math.nan

    def present(self, round_: int, devices: Sequence[int]) -> tuple[int, ...]:
        """Return those of a round's devices that have not dropped out of it, in their order."""
        if self.dropout == 0:
            return tuple(devices)
        drawn = draws.uniform(self.seed, "dropout", (round_,), np.asarray(devices, np.int64))
        return tuple(device for device, u in zip(devices, drawn, strict=True) if u >= self.dropout)

    def speeds(self, devices: np.ndarray) -> np.ndarray:
        """Return each device's FLOP/s (float64 [n])."""
        return self.device.flops_per_s * draws.lognormal(self.seed, "device speed", self.spread, devices)

    def rates(self, devices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the byte/s of each device's own link down and up (float64 [n] each)."""
        factor = draws.lognormal(self.seed, "link rate", self.spread, devices)
        return self.link.down_bit_s / 8 * factor, self.link.up_bit_s / 8 * factor

    def latency(self, round_: int, exchange: int, devices: np.ndarray, *, up: bool) -> np.ndarray:
        """Return the latency in seconds of each device's message one way in an exchange (float64 [n])."""
        numbers = (round_, exchange, _UP if up else _DOWN)
        jitter = self.link.jitter_s
        drawn = draws.uniform(self.seed, "jitter", numbers, devices) if jitter else np.zeros(devices.size)
        return self.link.latency_s + jitter * drawn

    def check_memory(self, weights_bytes: int) -> None:
        """Raise ConfigError where the weights that a device holds at a time don't fit into its memory."""
        if weights_bytes > self.device.memory_bytes:
            raise ConfigError(
                f"profile.memory: a device has {self.device.memory_bytes:,.0f} B, its weights take {weights_bytes:,} B; "
                "allowed: more, a smaller model, or model.mapped = true, which holds one stage at a time."
            )

    def joules(self, flops: float, bytes_: float) -> float:
        """Return the energy of a device's operations and bytes; NaN where a figure is unknown."""
        return flops * self.device.joules_per_flop + bytes_ * self.joules_per_byte


def scene_of(config: Config) -> Scene | None:
    """Return the scene of a job with `link.clock = "virtual"`, else None; ConfigError for keys that need that clock."""
    own = config.profile
    if config.link.clock != "virtual":
        default = ProfileSection()
        needy = [(f"profile.{key}", getattr(own, key), getattr(default, key)) for key in type(own).model_fields]
        for key, found, usual in (*needy, ("run.train_every", config.run.train_every, 1)):
            if found != usual and key not in _FOR_ANY_CLOCK:
                raise ConfigError(
                    f"{key}: found {found} with link.clock = {config.link.clock!r}; allowed with it: "
                    f"{'unset' if usual is None else usual}, since only the simulated clock of 'virtual' heeds it."
                )
        return None
    if config.comm.guide_lag and config.run.train_every > 1:
        raise ConfigError(
            f"comm.guide_lag: found {config.comm.guide_lag} with run.train_every = {config.run.train_every}; the guide made "
            "ahead would be for a round that is not trained. Allowed with it: 0."
        )
    return Scene(
        seed=config.run.seed,
        link=link_of(config),
        device=device_of(config),
        cloud_flops_per_s=math.inf if own.cloud_flops_per_s is None else own.cloud_flops_per_s,
        trunk_bit_s=math.inf if own.trunk is None else quantity.bit_s(own.trunk),
        trunk_latency_s=quantity.seconds(own.trunk_latency),
        tree=config.comm.topology == "tree",
        edges=config.comm.edges,
        spread=own.spread,
        dropout=own.dropout,
        deadline_s=math.inf if own.deadline_s is None else own.deadline_s,
        joules_per_byte=joules_per_byte(config),
    )
