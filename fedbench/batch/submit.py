"""`fedbench sweep submit` on Slurm: what is neither done nor in the queue goes there, and a job that collects afterwards.

Nothing is remembered of what was sent: the queue is asked each time, so a submit that was cut short is put right by
the next one.
"""

from __future__ import annotations

import argparse
import shlex

from fedbench.base.errors import EXIT_OK, FedbenchError
from fedbench.batch import arrays, lock, scheduler, site, sweep
from fedbench.batch.manifest import Sweep
from fedbench.run.launch import say


def to_slurm(swept: Sweep, args: argparse.Namespace) -> int:
    """Return the exit code of a submit; `--dry-run` prints the sbatch lines and sends nothing."""
    here = site.read(args.site)
    if args.time is not None:
        here = here._replace(time=site.checked_time(args.time, "--time"))
    here = here._replace(throttle=args.parallel or here.throttle)
    with lock.held(swept.folder):
        lines = sweep.to_run(swept, retry=args.retry)
        planned = arrays.plan(swept, lines, here, scheduler.max_array_size()) if lines else []
        waiting = sorted({job.job for job in arrays.in_queue(swept).values()})
        if args.dry_run:
            for array in planned:
                print(shlex.join(array.words))
            if planned:
                print(
                    shlex.join(arrays.collector(swept, [*waiting, *(f"ARRAY_{n}" for n in range(len(planned)))], here))
                )
            say(f"{len(lines)} of {len(swept.lines)} run(s) would be sent, in {len(planned)} array(s).")
            return EXIT_OK
        for line in {line.method: line for line in lines}.values():  # every task looks at its own line
            line.job(f"{swept.folder / 'manifest.jsonl'} line {line.number}")
        for name in (arrays.FOLDER, "logs"):
            (swept.folder / name).mkdir(exist_ok=True)
        jobs: list[str] = []
        refusals: list[FedbenchError] = []
        try:
            for array in planned:
                jobs.append(scheduler.send(array.words))
                say(f"job {jobs[-1]}: {len(array.lines)} run(s), {array.lines[0].ranks} rank(s) each.")
        except FedbenchError as error:
            refusals.append(error)
            say(f"{len(jobs)} of {len(planned)} array(s) were sent; the same command sends the rest.")
        try:
            if jobs:
                collect = scheduler.send(arrays.collector(swept, [*waiting, *jobs], here))
                say(
                    f"job {collect} collects when all have ended; `fedbench sweep status {swept.folder}` tells how far."
                )
        except FedbenchError as error:
            told = f" {error}" if refusals else ""
            refusals.append(error)
            say(f"no job collects when they have ended; `fedbench sweep collect {swept.folder}` does.{told}")
        if refusals:
            raise refusals[0]
    say(f"{len(lines)} of {len(swept.lines)} run(s) sent; the others are done or under way.")
    return EXIT_OK
