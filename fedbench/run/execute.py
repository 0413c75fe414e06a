"""One rank's whole run: agree on the job, build it, resume, play, finish, write the run file.

Errors that a user can mend are found on every rank before the first message, and then
agreed on, so that there is one message and one exit code.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedbench.algorithms.base import CLOUD
from fedbench.base import account, identity, provenance
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import EXIT_OK, EXIT_STOPPED, FedbenchError, WireError
from fedbench.codec.frame import Place
from fedbench.comm.base import Transport
from fedbench.comm.connect import connect
from fedbench.comm.mail import refuse_missing_threads
from fedbench.comm.topology import Topology
from fedbench.results import reader, writer
from fedbench.run import finish, kept, launch, spans
from fedbench.run.adapt import chooser_of
from fedbench.run.build import Built, Job, construct
from fedbench.run.callbacks.checkpoint import SaveCheckpoint, take_up
from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.callbacks.progress import ShowProgress
from fedbench.run.ckpt import Store
from fedbench.run.memory import Evaluating, Memory
from fedbench.run.runner import Observer, Runner, weights_sha256
from fedbench.sim.profiles import link_of

#: Makes the job for a number of ranks; raises errors of the user's kind.
JobMaker = Callable[[int], Job]


@dataclass(frozen=True)
class Options:
    """What the command line adds to a job: none of it changes a number."""

    results: Path
    resume: bool = False
    force: bool = False

    def run_file(self, job: Job) -> Path:
        """Return where the run file goes."""
        return self.results / "runs" / f"{job.run_id}.h5"

    def checkpoints(self, job: Job) -> Store:
        """Return the run's checkpoint store."""
        folder = self.results / "ckpt" / job.run_id
        return Store(folder, identity.config_sha256(job.tree), launch.say)


def already_done(job: Job, options: Options) -> bool:
    """Return whether the run is done; a file in its place that is not sound is put aside."""
    path = options.run_file(job)
    if options.force or not path.exists():
        return False
    if reader.is_done(path, job.run_id):
        if job.config.results.save_weights and not kept.path_of(path).exists():
            launch.say(f"{path} is done and kept no weights; --force makes it again.")
        return True
    launch.say(f"{path} is not a complete run; it was moved to {reader.quarantine(path)}.")
    return False


class Execution:
    """One rank's run, with the place that it has reached for error messages; `runs_before` were made by this process."""

    def __init__(self, transport: Transport, memory: Memory, runs_before: int = 0) -> None:
        self._transport = transport
        self._memory = memory
        self._runs_before = runs_before
        self._clock = Clock()
        self._phase = "setting up"

    def where(self) -> str:
        """Return the place in the run."""
        return f"round {self._clock.round}" if self._clock.round >= 0 else self._phase

    def __call__(self, make_job: JobMaker, options: Options) -> int:
        """Return the exit code that all ranks agreed on; memory that can't be had is one sentence."""
        try:
            return self._whole(make_job, options)
        except (MemoryError, RuntimeError) as error:
            if not account.is_out_of_memory(error):
                raise
            raise FedbenchError(
                f"the memory is not enough: {str(error) or type(error).__name__}. model.mapped = true keeps weights in "
                "a file, model.micro_batch = 2 bounds activations."
            ) from error

    def _whole(self, make_job: JobMaker, options: Options) -> int:
        built = self._agreed_build(lambda size: replace(make_job(size), results=options.results))
        if isinstance(built, int):
            return built
        job = built.job
        config = job.config
        link = link_of(config) if config.link.clock == "paced" else None
        star = connect(self._transport, self._clock, config.comm, link, config.run.seed)
        done = already_done(job, options) if star.is_cloud else False
        if star.agree([int(done)], "say whether the run is done")[0]:
            return self._announce(options.run_file(job))
        return self._run(built, star, options)

    def _agreed_build(self, make_job: JobMaker) -> Built | int:
        """Return the built run, or the exit code that all ranks leave with; the first rank at fault prints why."""
        transport, error, built = self._transport, None, None
        try:
            self._memory.enter("load")
            job = make_job(transport.size)
            refuse_missing_threads(transport, job.config.comm.progress)
            built = construct(job)
            chooser_of(built)  # a run to replay that can't be read is found here
            every = sum(p.nbytes for p in built.cut.parameters())
            self._memory.weights(built.cut.residency.bytes_held() or every)
            self._memory.enter("train")
        except FedbenchError as found:
            error = found
        mine = 0 if error is None else error.exit_code
        first = transport.size - transport.rank if error is not None else 0
        digest = int(identity.config_sha256(built.job.tree)[:15], 16) if built is not None else 0
        code, speaker, high, low = transport.agree([mine, first, digest, -digest], 600.0, "build the job")
        if code:
            if error is not None and speaker == first:
                launch.say(str(error))
            return code
        if high != -low:
            raise WireError("The ranks hold different jobs (their config hashes differ).")
        assert built is not None
        return built

    def _run(self, built: Built, star: Topology, options: Options) -> int:
        job, clock = built.job, self._clock
        flag = launch.StopFlag()
        flag.listen(alone=star.transport.size == 1)
        built.lab.stream.poll = star.poll
        clock.keep(job.config.results.trace_rounds, spans.most_kept(star.transport.size))
        runner = Runner(built, star, clock)
        metrics = Metrics(built, runner, clock)
        store = options.checkpoints(job)
        saver = SaveCheckpoint(store, runner, metrics, job.config.results.checkpoint_every)
        if options.resume:
            self._resume(store, runner, metrics)
        started = provenance.now()
        console = Console(stderr=True)
        progress = ShowProgress(job.run_id, job.config.run.rounds, metrics, console)
        self._phase = "before the first round"
        try:
            observers: list[Observer] = [Evaluating(metrics, self._memory), saver, progress]
            reason = runner.run([self._memory, *(observers if star.is_cloud else [])], flag)
        finally:
            progress.close()
        clock.begin(-1)
        self._phase = "finishing"
        self._memory.note()
        if reason == "stopped":
            if star.is_cloud:
                self._stop(saver, runner.next_round, flag.longest_s)
            star.finish()
            return EXIT_STOPPED
        weights = weights_sha256(built.trainable)
        ranks = finish.gather_ranks(star, self._memory, clock, weights, replicas=built.algorithm.uses_devices)
        star.finish()
        if not star.is_cloud:
            return EXIT_OK
        if job.config.results.save_weights:
            kept.write(options.run_file(job), built.trainable)
        run = finish.assemble(runner, metrics, ranks, reason, provenance.collect(self._facts(built, star, started)))
        writer.write(options.run_file(job), run)
        store.clear()
        return self._announce(options.run_file(job))

    @staticmethod
    def _stop(saver: SaveCheckpoint, next_round: int, longest_s: float) -> None:
        """Save a checkpoint and say how early a warning must come for a stop like this one."""
        begun_s = time.monotonic()
        saver.save()
        saved_s = time.monotonic() - begun_s
        launch.say(
            f"stopped after round {next_round}; go on with --resume. A warning must come {longest_s + saved_s:.1f} s "
            f"before the end: longest round {longest_s:.1f} s, checkpoint {saved_s:.1f} s."
        )

    def _facts(self, built: Built, star: Topology, started: str) -> dict[str, Any]:
        """Return what the provenance of a run that ends now tells of its process, world, data and model."""
        transport, config = star.transport, built.job.config
        return {
            "mpi": launch.library(transport),
            "hosts": sorted({transport.name_of(rank).rpartition(" ")[2] for rank in range(transport.size)}),
            "threads_per_rank": config.run.threads,
            "runs_before": self._runs_before,
            "started": started,
            "ended": provenance.now(),
            "data": dict(built.splits.source),
            "model": {
                "name": config.model.name,
                "weights": built.cut.weights,
                "device": built.cut.residency.told(),
                "trainable_entries": built.trainable.size,
            },
        }

    def _resume(self, store: Store, runner: Runner, metrics: Metrics) -> None:
        """Bring all ranks to the newest checkpoint; without one the run starts fresh."""
        star, tensors = runner.star, runner.built.trainable
        checkpoint = store.newest() if star.is_cloud else None
        found, next_round = star.agree(
            [int(checkpoint is not None), int(checkpoint.state["next_round"]) if checkpoint else 0], "resume"
        )
        if not found:
            if star.is_cloud:
                launch.say("no checkpoint to resume from; starting fresh.")
            return
        runner.next_round = next_round
        weights: Arrays | None = None
        if checkpoint is not None:
            take_up(checkpoint, runner, metrics)
            weights = {t.name: t.values() for t in tensors}
        if runner.virtual is not None:  # rounds that are due on the cloud are due everywhere
            known = star.agree([int(kind in runner.virtual.known) for kind in (0, 1)], "resume")
            runner.virtual.known = frozenset(kind for kind in (0, 1) if known[kind])
        units = [Unit(t.name, (t.size,)) for t in tensors]
        inbox = star.down("resume", units, weights, Place(next_round, 0, -1, 0))
        for tensor in tensors:
            tensor.assign(inbox[tensor.name])
        if star.transport.size > 1:
            self._share_state(runner, Place(next_round, 0, -1, 0))
        for channel in ("resume", "state table", "state"):  # all weights once more, which no round needs
            star.release(channel)

    def _share_state(self, runner: Runner, place: Place) -> None:
        """Give every rank's method the state that the cloud took from its checkpoint; its table of units goes first."""
        star, algorithm = runner.star, runner.built.algorithm
        own = algorithm.state() if star.is_cloud else {}
        state = {name: np.ascontiguousarray(a) for name, a in own.items() if not name.startswith(CLOUD)}
        table = json.dumps([[name, a.shape, a.dtype.str] for name, a in state.items()]).encode()
        (size,) = star.agree([len(table) if star.is_cloud else 0], "resume")
        units = [Unit("table", (size,), "|u1")]
        told = star.down("state table", units, {"table": np.frombuffer(table, np.uint8)}, place)["table"].tobytes()
        units = [Unit(name, tuple(shape), dtype) for name, shape, dtype in json.loads(told)]
        inbox = star.down("state", units, state, place)
        if not star.is_cloud:
            algorithm.restore({unit.name: np.array(inbox[unit.name]) for unit in units})

    def _announce(self, path: Path) -> int:
        if self._transport.rank == 0:
            print(path, file=sys.stdout, flush=True)
        return EXIT_OK
