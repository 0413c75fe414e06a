"""FedAvg on biases: every tensor with "bias" in its name and the classifier head is trained (methods.md 2.3).

device, cloud: as FedAvg, whatever part the job names
"""

from __future__ import annotations

from fedbench.algorithms.fedavg import FedAvg


class BitFit(FedAvg):
    """Backpropagation on about a thousandth of a model's weights."""

    name = "bitfit"
    summary = "FedAvg of biases, all matrices frozen"
    part = "bitfit"
    part_is_fixed = True
