"""From a job's tables to the topology of its run: the only place that knows them all."""

from __future__ import annotations

from fedbench.base.clock import Clock
from fedbench.base.job import CommSection
from fedbench.base.link import Link
from fedbench.base.quantity import seconds
from fedbench.comm.base import Transport
from fedbench.comm.mail import Progress
from fedbench.comm.pace import Pacer
from fedbench.comm.star import Star
from fedbench.comm.topology import Topology
from fedbench.comm.tree import Tree, edge_count


def connect(
    transport: Transport,
    clock: Clock,
    comm: CommSection,
    link: Link | None,
    seed: int,
) -> Topology:
    """Return the topology of a run; `link` is what each device's is paced as (None: not paced).

    A tree in a world that is too small for an edge is a star.
    """
    pacer = None if link is None else Pacer(lambda _: link, seed)
    progress = Progress(comm.progress, seconds(comm.poll_interval))
    edges = edge_count(comm.edges, transport.size) if comm.topology == "tree" else 0
    if edges == 0:
        return Star(transport, comm.deadline_s, clock, pacer, progress, lz4=comm.lz4)
    return Tree(
        transport,
        comm.deadline_s,
        clock,
        pacer,
        progress,
        edges=edges,
        chunk_bytes=comm.chunk_bytes,
        lz4=comm.lz4,
    )
