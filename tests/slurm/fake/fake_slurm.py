#!/usr/bin/env python3
"""sbatch, srun, squeue and scontrol in one, for what a cluster of one node can't show; links give it their names.

State lies in $FAKE_SLURM: `calls` has every command line, `queue` the jobs, `config` what a test wants:
limit     the site's MaxArraySize
fail      numbers of sbatch calls that fail
lose      indices of arrays that vanish
state     of all jobs that are queued
down      the controller does not answer squeue
deaf      command -> how many of its calls fail
run       sbatch runs the script here, one element after another, and again as long as scontrol has requeued it
warn      words in a job's log at which its batch shell gets the signal of --signal, at the first start alone
srun starts as many copies as it is asked for, each alone in its world: what a plugin does that fits no library.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])
STATE = 3  # where a job in the queue has it, behind name, number and task


def load(name, default):
    path = HOME / name
    return json.loads(path.read_text()) if path.exists() else default


def save(name, tree):
    (HOME / name).write_text(json.dumps(tree))


def options_of(words):
    return dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))


def indices(text):
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def own(queue, job, task=None):
    """Return the entries of a job, or of one element of it."""
    return [entry for entry in queue if entry[1] == job and task in (None, entry[2])]


def sbatch(words, config):
    sent = sum(call[0] == "sbatch" for call in load("calls", []))
    if sent in config.get("fail", []):
        sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    at = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    inside = [row.removeprefix("#SBATCH ") for row in Path(words[at]).read_text().splitlines() if "#SBATCH --" in row]
    options = {"job-name": "job"} | options_of([*inside, *words[:at]])
    job, queue = str(100 * sent), load("queue", [])
    tasks = list(indices(options["array"])) if "array" in options else [None]
    tasks = [task for task in tasks if task not in config.get("lose", [])]
    save("queue", queue + [[options["job-name"], job, task, config.get("state", "PENDING"), "None"] for task in tasks])
    for task in tasks if config.get("run") else []:
        run(job, task, options, words[at:], config.get("warn"))
    print(job)


def run(job, task, options, script, warn):
    """Run a batch script to its end, its requeues included, and take its job out of the queue."""
    told = {"JOB_ID": job, "NTASKS": options.get("ntasks")}
    if task is not None:
        told |= {"ARRAY_JOB_ID": job, "ARRAY_TASK_ID": str(task)}
    log = Path(options["output"].replace("%a", str(task)).replace("%j", job))
    for restart in itertools.count():
        queue = load("queue", [])
        own(queue, job, task)[0][STATE] = "RUNNING"
        save("queue", queue)
        told |= {"RESTART_COUNT": str(restart) if restart else None}
        environment = os.environ | {f"SLURM_{key}": value for key, value in told.items() if value is not None}
        with log.open("a" if options.get("open-mode") == "append" else "w") as out:
            shell = subprocess.Popen(["bash", *script], env=environment, stdout=out, stderr=out)
        while shell.poll() is None:
            time.sleep(0.05)
            if warn and warn in log.read_text():
                shell.send_signal(signal.Signals[f"SIG{options['signal'][2:].partition('@')[0]}"])  # B:USR1@120
                warn = None
        (entry,) = own(queue := load("queue", []), job, task)
        if entry[STATE] != "REQUEUED":
            queue.remove(entry)
            return save("queue", queue)


def srun(words, config):
    at = next(number for number, word in enumerate(words) if not word.startswith("--"))
    ranks = options_of(words[:at])["ntasks"]
    told = os.environ | {"SLURM_STEP_NUM_TASKS": ranks}
    copies = [subprocess.Popen(words[at:], env=told | {"SLURM_PROCID": str(rank)}) for rank in range(int(ranks))]
    sys.exit(max([copy.wait() for copy in copies]))


def squeue(words, config):
    if config.get("down"):
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    wanted = options_of(words).get("jobs")
    for name, job, task, state, why in load("queue", []):
        if wanted is None:
            print(f"{name}|{job}|{'N/A' if task is None else task}|{state}|{why}")
        elif wanted in (job, f"{job}_{task}"):
            print(state)


def scontrol(words, config):
    if words == ["show", "config"]:
        print(f"Configuration data as of now\nMaxArraySize            = {config.get('limit', 1001)}\nMaxJobCount = 10")
    if words[0] == "requeue":
        job, _, task = words[1].partition("_")
        queue = load("queue", [])
        for entry in own(queue, job, int(task) if task else None):
            entry[STATE] = "REQUEUED"
        save("queue", queue)


name, words = Path(sys.argv[0]).name, sys.argv[1:]
calls = [*load("calls", []), [name, *words]]
save("calls", calls)
config = load("config", {})
if sum(call[0] == name for call in calls) <= config.get("deaf", {}).get(name, 0):
    sys.exit(f"{name}: error: Socket timed out")
{"sbatch": sbatch, "srun": srun, "squeue": squeue, "scontrol": scontrol}[name](words, config)
