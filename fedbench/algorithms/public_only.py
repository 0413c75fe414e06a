"""Public-only backpropagation: the control that asks whether private data adds anything (methods.md 2.16).

cloud: repeat over public batches: w <- w - lr grad f_pub(w; B);  devices are idle
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.backprop import on_public_rows
from fedbench.algorithms.base import Algorithm, Reply, Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import FedbenchError


class Settings(BaseSettings):
    """Settings of public-only training."""

    lr: StepSize = 0.1
    public_batches: int = Field(
        0, ge=0, description="SGD steps a round, each on one public batch; 0 is one step on all"
    )


class PublicOnly(Algorithm):
    """SGD on the public set alone, as much of it a round as CooperLLM's cloud reads."""

    name = "public_only"
    summary = "control: the cloud backpropagates on public data, devices are idle"
    uses_devices = False
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """Nothing: devices are idle."""
        return ()

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Never called: no device is sampled."""
        raise FedbenchError("public_only asked a device to compute.")

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """Nothing."""
        return ()

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Train on the public set in place."""
        lab, batches = self.lab, self.settings.public_batches
        steps = [[lab.public(round_.number, b)] for b in range(batches)] if batches else [lab.public_rows()]
        self.cloud_loss = float(np.mean([on_public_rows(lab, rows, round_.lr) for rows in steps]))
        return Reply({})

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """Nothing: `combine` stepped."""
