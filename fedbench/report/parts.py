"""What the processes of a run are to it: cloud, edges, hosts of devices, new or used. It reads records and never spans."""

from __future__ import annotations

from fedbench.base.records import Run
from fedbench.comm.tree import edge_count


def part_of(run: Run, rank: int) -> str:
    """Return what a rank is in its run: cloud, edge, devices, or cloud and devices."""
    comm = run.config["comm"]
    edges = edge_count(comm["edges"], run.summary.ranks) if comm["topology"] == "tree" else 0
    if rank == 0:
        return "cloud" if run.summary.ranks > 1 else "cloud and devices"
    return "edge" if rank <= edges else "devices"


def hosts(run: Run) -> list[int]:
    """Return the ranks that have devices, of a run alone the cloud's too."""
    return [rank for rank in range(run.summary.ranks) if part_of(run, rank).endswith("devices")]


def fresh(run: Run) -> bool:
    """Return whether the process made no run before this one; what an earlier one left in memory is not this run's."""
    return not run.provenance.get("runs_before")
