"""Every method on the embedded task, one run after the other in one world: plain, hard, and stopped and resumed.

Run as `all_methods.py DIR [stopped|tree]` on any number of ranks. `stopped` plays the hard variant alone, stopped and
resumed, and `tree` the untimed one below edges, which one rank plays straight beside the others. Each run leaves its
file under `DIR/VARIANT`, each rank its exit codes in `DIR/verdict.RANK.json`.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fedbench.base import config
from fedbench.comm.base import Transport
from fedbench.data import embedded
from fedbench.run import launch, runner
from fedbench.run.build import METHODS, Job, resolve
from fedbench.run.execute import Execution, Options
from fedbench.run.memory import Memory
from fedbench.run.runner import Outcome, Runner

ROUNDS = 4
#: The signal comes in this round; the run stops at its end.
STOP_ROUND = 1

PLAIN: dict[str, Any] = {
    "run": {"rounds": ROUNDS, "seed": 3, "eval_every": 2},
    "federation": {"devices": 4, "partition": "dirichlet", "alpha": 0.5, "batch_size": 4},
    "data": {"public_per_class": 8},
    "comm": {"deadline_s": 60.0},
}
#: More devices than take part, several local steps and directions, Gaussian, guides in 4 bits with error feedback inside
#: LZ4 frames, dropouts, about a quarter of the answers too late: all state that a stop can lose.
HARD: dict[str, Any] = {
    "run": {"rounds": ROUNDS, "seed": 4, "eval_every": 3},
    "federation": {
        "devices": 6,
        "sampled": 4,
        "partition": "dirichlet",
        "alpha": 0.5,
        "batch_size": 4,
        "local_steps": 2,
    },
    "data": {"public_per_class": 8},
    "zo": {"perturbations": 2, "distribution": "gaussian"},
    "comm": {"codec": "int4", "error_feedback": True, "lz4": True, "deadline_s": 60.0},
    "link": {"clock": "virtual", "latency": "10ms", "jitter": "100ms"},
    "profile": {"flops_per_s": 1e12, "spread": 0.3, "dropout": 0.2, "deadline_s": 0.15},
}
#: The hard one where no simulated clock says who is late: edges would change that, and real links leave no trace.
UNTIMED = {name: section for name, section in HARD.items() if name not in ("link", "profile")}
#: Architectures of transformers: a decoder with tied embeddings in micro-batches, whose guides are made ahead, travel in
#: codecs chosen unit by unit, and again for the update; an encoder with padding.
OPT: dict[str, Any] = PLAIN | {
    "model": {"name": "shape:opt-tiny", "micro_batch": 2},
    "comm": {"codec": "adaptive", "guide_lag": 1, "guide_reuse": "resend", "deadline_s": 60.0},
    "link": {"down": "20Mbit/s"},
}
ROBERTA: dict[str, Any] = PLAIN | {
    "model": {"name": "shape:roberta-tiny", "trainable": "full"},
    "comm": {"codec": "topk", "deadline_s": 60.0},
}
#: Settings that keep a method's runs short and lose nothing of what is compared.
SHORT: dict[str, dict[str, Any]] = {
    "bitfit": {"public_rounds": 2},
    "fwdllm": {"max_directions": 1},
    "baffle": {"k": 3},
    "ferret": {"candidates": 12},
    "cooperllm_plus": {"p2": 4},
}
VARIANTS = {"plain": PLAIN, "hard": HARD, "opt": OPT, "roberta": ROBERTA}
STOPPED = "stopped"
TREE = "tree"
STRAIGHT = "untimed"
#: How messages get on in a tree, method by method: all of it must leave no trace in the numbers.
WAYS: tuple[dict[str, dict[str, Any]], ...] = (
    {"comm": {"progress": "none"}, "link": {}},
    {"comm": {"progress": "poll", "poll_interval": "100us", "chunk_bytes": 4096}, "link": {}},
    {"comm": {"progress": "thread"}, "link": {}},
    {
        "comm": {"progress": "thread", "chunk_bytes": 4096},
        "link": {"clock": "paced", "down": "1Gbit/s", "up": "500Mbit/s", "latency": "500us", "jitter": "1ms"},
    },
)


def below_edges(method: str) -> dict[str, Any]:
    """Return the untimed variant in a tree of two edges."""
    way = WAYS[sorted(METHODS).index(method) % len(WAYS)]
    return UNTIMED | {"comm": {**UNTIMED["comm"], **way["comm"], "topology": "tree", "edges": 2}, "link": way["link"]}


def variants(ranks: int) -> dict[str, dict[str, Any]]:
    """Return what a number of ranks plays straight: one rank also what trees are compared with."""
    return VARIANTS | ({STRAIGHT: UNTIMED} if ranks == 1 else {})


def job(method: str, variant: dict[str, Any], ranks: int) -> Job:
    """Return the job of a method in a variant on a number of ranks."""
    tree = copy.deepcopy(variant)
    tree["run"]["ranks"] = ranks
    tree["method"] = {"name": method, method: SHORT.get(method, {})}
    return resolve(config.check(tree, source="all_methods.py"), "all_methods.py")


def run_one(transport: Transport, method: str, variant: dict[str, Any], options: Options) -> int:
    """Return the exit code of one run."""
    return Execution(transport, Memory())(lambda size: job(method, variant, size), options)


def stopped_and_resumed(transport: Transport, method: str, folder: Path, variant: dict[str, Any]) -> list[int]:
    """Return the exit codes of a run that one rank's signal stops, and of the one that goes on."""
    play = Runner.play

    def play_and_signal(self: Runner, number: int) -> Outcome:
        outcome = play(self, number)
        if number == STOP_ROUND and transport.rank == transport.size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return outcome

    runner.Runner.play = play_and_signal
    try:
        first = run_one(transport, method, variant, Options(folder))
    finally:
        runner.Runner.play = play
    return [first, run_one(transport, method, variant, Options(folder, resume=True))]


def body(transport: Transport, folder: Path, only: str | None) -> int:
    """Run everything, with small splits to evaluate on, and leave this rank's verdict."""
    embedded.DEV_ROWS, embedded.TEST_ROWS = 48, 64
    straight = {} if only else variants(transport.size)
    codes: dict[str, dict[str, list[int]]] = {name: {} for name in (*straight, only or STOPPED)}
    for method in METHODS:
        for name, variant in straight.items():
            codes[name][method] = [run_one(transport, method, variant, Options(folder / name))]
        for name in codes.keys() - straight.keys():
            variant = below_edges(method) if name == TREE else HARD
            codes[name][method] = stopped_and_resumed(transport, method, folder / name, variant)
    (folder / f"verdict.{transport.rank}.json").write_text(json.dumps(codes), encoding="utf-8")
    return 0


def main() -> int:
    """Enter the world that there is and run everything in it."""
    transport = launch.enter(None)
    return launch.guard(
        transport, lambda: body(transport, Path(sys.argv[1]), *(sys.argv[2:] or [None])), lambda: "all methods"
    )


if __name__ == "__main__":
    sys.exit(main())
