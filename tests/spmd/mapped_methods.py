"""Methods with weights in memory and in a working file, straight and stopped and resumed, in one world.

Run as `mapped_methods.py DIR` on any number of ranks. Each run leaves its file under `DIR/VARIANT`, each rank its exit
codes in `DIR/verdict.RANK.json`.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

from all_methods import HARD, STOPPED, run_one, stopped_and_resumed

from fedbench.comm.base import Transport
from fedbench.data import embedded
from fedbench.models import mapped
from fedbench.models.mapped import Mapped
from fedbench.run import launch
from fedbench.run.execute import Options

METHODS = ("fedmezo", "fedspzo", "cooperllm", "fedavg")

RESIDENT = copy.deepcopy(HARD)
RESIDENT["federation"]["batch_size"] = 5
RESIDENT["model"] = {"micro_batch": 2}
RESIDENT["comm"]["codec"] = "int8"
MAPPED = copy.deepcopy(RESIDENT)
MAPPED["model"]["mapped"] = True
VARIANTS = {"resident": RESIDENT, "mapped": MAPPED}


def body(transport: Transport, folder: Path) -> int:
    """Run everything, with small splits and small pieces, and leave this rank's verdict."""
    embedded.DEV_ROWS, embedded.TEST_ROWS = 48, 64
    Mapped.piece, Mapped.picked_rows, mapped._LARGE_TABLE = 1 << 10, 5, 1 << 10
    codes: dict[str, dict[str, list[int]]] = {STOPPED: {}, **{name: {} for name in VARIANTS}}
    for method in METHODS:
        for name, variant in VARIANTS.items():
            codes[name][method] = [run_one(transport, method, variant, Options(folder / name))]
        codes[STOPPED][method] = stopped_and_resumed(transport, method, folder / STOPPED, MAPPED)
    (folder / f"verdict.{transport.rank}.json").write_text(json.dumps(codes), encoding="utf-8")
    return 0


def main() -> int:
    """Enter the world that there is and run everything in it."""
    transport = launch.enter(None)
    return launch.guard(transport, lambda: body(transport, Path(sys.argv[1])), lambda: "mapped methods")


if __name__ == "__main__":
    sys.exit(main())
