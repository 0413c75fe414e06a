"""The verb `run`: alone, under a launcher, or as the supervisor of one."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fedbench.base import config
from fedbench.base.config import Setting, parse_setting
from fedbench.base.errors import EXIT_OK, EXIT_USER, ConfigError
from fedbench.results import reader
from fedbench.run import launch, supervise
from fedbench.run.build import Job, construct, resolve
from fedbench.run.execute import Execution, Options, already_done
from fedbench.run.memory import Memory


def run(args: argparse.Namespace) -> int:
    """Return the exit code of `fedbench run`."""
    launched = launch.launched_size()
    if launched is None:
        return _alone(args)
    if args.ranks is not None and args.ranks != launched:
        if launch.launched_rank() > 0:
            return EXIT_USER
        raise ConfigError(f"-n: found {args.ranks}; the launcher started {launched} rank(s).")
    memory = Memory()
    transport = launch.enter(launched)
    execution = Execution(transport, memory)
    code = launch.guard(transport, lambda: execution(lambda size: _job(args, size), _options(args)), execution.where)
    return launch.code_for_launcher(code)


def _alone(args: argparse.Namespace) -> int:
    """Run in this process, or start and supervise a launcher when more than one rank is asked for."""
    options, job = planned(args)
    ranks = job.config.run.ranks
    launcher, threads = job.config.run.launcher, job.config.run.threads
    if ranks > 1:
        supervise.start_words(launcher, ranks, threads)
    if args.dry_run:
        construct(job)
        options.probe(job)
        print(f"{options.run_file(job)}  ({ranks} rank(s), {job.config.run.rounds} rounds)", file=sys.stderr)
        return EXIT_OK
    if already_done(job, options):
        print(options.run_file(job))
        return EXIT_OK
    if ranks == 1:
        transport = launch.enter(1)
        execution = Execution(transport, Memory())
        return launch.guard(transport, lambda: execution(lambda _: job, options), execution.where)
    construct(job.on_host())
    path = options.run_file(job)
    before = _mark(path)

    def is_done() -> bool:
        """Return whether there is a complete file that was not there before."""
        return _mark(path) != before and reader.is_done(path, job.run_id)

    return supervise.supervise(_arguments(args, ranks), ranks, threads, is_done, launcher)


def planned(args: argparse.Namespace) -> tuple[Options, Job]:
    """Return what the words of `run` mean, started alone; ConfigError where the run has not the name it must have."""
    options, job = _options(args), _job(args, args.ranks)
    expected = os.environ.get(launch.RUN_ID_VARIABLE)
    if expected and job.run_id != expected:
        raise ConfigError(
            f"{args.job}: this version of fedbench makes {job.run_id} of what was planned as {expected}: its keys or "
            f"defaults have changed. Make the sweep anew in another folder, or go back to the version that made it."
        )
    return options, job


def _job(args: argparse.Namespace, ranks: int | None) -> Job:
    """Return the job of a command line; `ranks` replaces `run.ranks`."""
    settings = [parse_setting(text) for text in args.settings]
    if ranks is not None:
        settings.append(Setting(("run", "ranks"), ranks))
    overridden = frozenset(setting.path for setting in settings)
    return resolve(config.load(args.job, settings), str(args.job), overridden)


def _options(args: argparse.Namespace) -> Options:
    if args.results is not None:
        return Options(args.results, args.resume, args.force)
    settings = [parse_setting(text) for text in args.settings]
    return Options(Path(config.load(args.job, settings).results.dir), args.resume, args.force)


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Return what tells a file from another one in its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _arguments(args: argparse.Namespace, ranks: int) -> list[str]:
    """Return the command line of the ranks."""
    words = ["run", str(args.job), "-n", str(ranks)]
    for text in args.settings:
        words += ["--set", text]
    if args.results is not None:
        words += ["--results", str(args.results)]
    return words + [word for word, wanted in (("--resume", args.resume), ("--force", args.force)) if wanted]
