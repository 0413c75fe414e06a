#!/usr/bin/env python3
"""sbatch, squeue and scontrol in one, for what a cluster of one node can't show; links give it their names.

State lies in $FAKE_SLURM: `calls` has every command line, `queue` the jobs, `config` what a test wants (limit, fail:
the number of the sbatch that fails, lose: indices that vanish, state: of all jobs, deaf: command -> how many of its
calls fail).
"""

import json
import os
import sys
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])


def load(name, default):
    path = HOME / name
    return json.loads(path.read_text()) if path.exists() else default


def indices(text):
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def sbatch(words, config):
    sent = sum(call[0] == "sbatch" for call in load("calls", []))
    if sent == config.get("fail"):
        sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    options = dict(w[2:].partition("=")[::2] for w in words if w.startswith("--"))
    job, queue = str(100 * sent), load("queue", [])
    tasks = list(indices(options["array"])) if "array" in options else [None]
    for task in tasks:
        if task not in config.get("lose", []):
            queue.append([options["job-name"], job, task, config.get("state", "PENDING"), "None"])
    (HOME / "queue").write_text(json.dumps(queue))
    print(job)


def squeue(words, config):
    if config.get("down"):
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    wanted = next((w.partition("=")[2] for w in words if w.startswith("--jobs=")), None)
    for name, job, task, state, why in load("queue", []):
        if wanted is None:
            print(f"{name}|{job}|{'N/A' if task is None else task}|{state}|{why}")
        elif wanted in (job, f"{job}_{task}"):
            print(state)


def scontrol(words, config):
    if words == ["show", "config"]:
        print(f"Configuration data as of now\nMaxArraySize            = {config.get('limit', 1001)}\nMaxJobCount = 10")


name, words = Path(sys.argv[0]).name, sys.argv[1:]
calls = [*load("calls", []), [name, *words]]
(HOME / "calls").write_text(json.dumps(calls))
config = load("config", {})
if sum(call[0] == name for call in calls) <= config.get("deaf", {}).get(name, 0):
    sys.exit(f"{name}: error: Socket timed out")
{"sbatch": sbatch, "squeue": squeue, "scontrol": scontrol}[name](words, config)
