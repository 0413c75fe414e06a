"""FedAvg on LoRA matrices: W = W0 + (alpha/r) B A, with A, B and the classifier head trained (methods.md 2.2).

    device, cloud: as FedAvg, whatever part the job names

Factors are averaged apart, which is not the average of their products. B starts at zero, where the gradient of A is
exactly zero: in the first local step B alone moves.
"""

from __future__ import annotations

from typing import ClassVar

from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.algorithms.base import StepSize
from fedbench.algorithms.fedavg import FedAvg
from fedbench.algorithms.fedavg import Settings as FedAvgSettings


class Settings(FedAvgSettings):
    """FedAvg's settings; matrices that start at zero want larger steps."""

    lr: StepSize = 0.5


class FedAvgLora(FedAvg):
    """Backpropagation on low-rank matrices beside frozen ones: less to send, nearly the same memory."""

    name = "fedavg_lora"
    summary = "FedAvg of LoRA matrices, the model frozen"
    part = "lora"
    part_is_fixed = True
    settings_type: ClassVar[type[BaseSettings]] = Settings
