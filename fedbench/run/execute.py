"""One rank's whole run: agree on the job, build it, resume, play, finish, write the run file.

Errors that a user can mend are found on every rank before the first message, and then
agreed on, so that there is one message and one exit code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from fedbench.base import account, fsio, identity
from fedbench.base.clock import Clock
from fedbench.base.errors import EXIT_OK, EXIT_STOPPED, FedbenchError, ResultError, StorageError, WireError
from fedbench.comm.base import Transport
from fedbench.comm.connect import connect
from fedbench.comm.mail import refuse_missing_threads
from fedbench.results import reader, writer
from fedbench.run import finish, kept, launch, resume, spans
from fedbench.run.adapt import chooser_of
from fedbench.run.build import Built, Job, construct
from fedbench.run.callbacks.checkpoint import SaveCheckpoint, take_up
from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.callbacks.progress import ShowProgress
from fedbench.run.ckpt import Store
from fedbench.run.claim import claimed
from fedbench.run.inputs import inputs_of
from fedbench.run.memory import Evaluating, Memory
from fedbench.run.resume import Found
from fedbench.run.runner import Observer, Runner, weights_sha256
from fedbench.sim.profiles import link_of

#: How long ranks wait for each other before the first round: they load data and weights, and look at checkpoints.
_PATIENCE_S = 600.0

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

    def lock(self, job: Job) -> Path:
        """Return the file by which one process at a time is at the run."""
        return self.results / "ckpt" / f"{job.run_id}.lock"

    def probe(self, job: Job) -> None:
        """Raise ResultError where what the run will leave can't be written."""
        path = self.run_file(job)
        folders = [path.parent, self.results / "ckpt" / job.run_id]
        if job.config.results.save_weights:
            folders.append(kept.path_of(path).parent)
        try:
            for folder in folders:
                fsio.probe(folder)
        except StorageError as error:
            raise ResultError(f"{str(error).rstrip('.')}; results go to {self.results}.") from error


def already_done(job: Job, options: Options) -> bool:
    """Return whether the run is done; what is in the way of one that is not is put aside, or is a ResultError."""
    if options.force or not os.path.exists(options.run_file(job)):
        return False
    with claimed(options.lock(job)) as sole:
        return _settled(job, options, sole=sole)


def _settled(job: Job, options: Options, *, sole: bool) -> bool:
    """Return whether the run is done; `sole` says that no other process is at it, so that leftovers can go."""
    path, store = options.run_file(job), options.checkpoints(job)
    if sole:
        for target in (path, kept.path_of(path)):
            fsio.sweep_up(target)
        store.sweep_up()
    if options.force or not os.path.exists(path):
        return False
    verdict = reader.inspect(path, job.run_id)
    if verdict.done:
        if sole:
            with suppress(OSError):
                store.clear()  # it was killed between its run file and this
        if job.config.results.save_weights and not kept.path_of(path).exists():
            launch.say(f"{path} is done and kept no weights; --force makes it again.")
        return True
    if not verdict.damaged:
        raise ResultError(f"{verdict.reason.rstrip('.')}. Move it away, or write over it with --force.")
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
        runner = Runner(built, star, self._clock)
        metrics = Metrics(built, runner, self._clock)
        store = options.checkpoints(job)
        with ExitStack() as held:
            found = self._look(held, options, store, metrics, runner) if star.is_cloud else Found()
            found = Found(*self._transport.agree(found, _PATIENCE_S, "look at what is there of the run"))
            if found.code:
                return found.code
            if found.done:
                return self._announce(options.run_file(job))
            if found.resumed:
                resume.share(runner, found)
                if star.is_cloud:
                    self._say_resumed(metrics, found.next_round)
            elif options.resume and star.is_cloud:
                launch.say("no checkpoint to resume from; starting fresh.")
            return self._run(runner, metrics, store, options)

    def _look(self, held: ExitStack, options: Options, store: Store, metrics: Metrics, runner: Runner) -> Found:
        """Return what rank 0 finds of the run in the results folder, which is its own until `held` is closed.

        What a user can mend is said here, before any round is played.
        """
        job = runner.built.job
        try:
            sole = held.enter_context(claimed(options.lock(job)))
            if _settled(job, options, sole=sole):
                return Found(done=1)
            options.probe(job)
            store.inputs = inputs_of(runner.built)
            checkpoint = store.newest() if options.resume else None
            if checkpoint is None:
                return Found()
            take_up(checkpoint, runner, metrics)
        except FedbenchError as error:
            launch.say(str(error))
            return Found(code=error.exit_code)
        return resume.standing(runner)

    @staticmethod
    def _say_resumed(metrics: Metrics, next_round: int) -> None:
        """Say where the run goes on, and what may make its numbers other than those of one process."""
        launch.say(f"resumed after round {next_round}.")
        change = metrics.segments.change()
        if change:
            launch.say(f"it goes on in another surrounding than it began in: {change}.")

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
        code, speaker, high, low = transport.agree([mine, first, digest, -digest], _PATIENCE_S, "build the job")
        if code:
            if error is not None and speaker == first:
                launch.say(str(error))
            return code
        if high != -low:
            raise WireError("The ranks hold different jobs (their config hashes differ).")
        assert built is not None
        return built

    def _run(self, runner: Runner, metrics: Metrics, store: Store, options: Options) -> int:
        built, star, clock = runner.built, runner.star, self._clock
        job, results = built.job, built.job.config.results
        flag = launch.StopFlag()
        flag.listen(alone=star.transport.size == 1)
        built.lab.stream.poll = star.poll
        clock.keep(results.trace_rounds, spans.most_kept(star.transport.size))
        saver = SaveCheckpoint(store, runner, metrics, results.checkpoint_every, job.config.checkpoint_s)
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
        facts = finish.provenance_of(runner, metrics) | {"runs_before": self._runs_before}
        run = finish.assemble(runner, metrics, ranks, reason, facts)
        try:
            if results.save_weights:
                kept.write(options.run_file(job), built.trainable)
            writer.write(options.run_file(job), run)
        except StorageError:
            self._keep(saver)
            raise
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

    @staticmethod
    def _keep(saver: SaveCheckpoint) -> None:
        """Save the rounds of a run whose file can't be written, if that can be done."""
        try:
            saver.keep()
        except StorageError as error:
            launch.say(f"nor can a checkpoint: {error}")
        else:
            launch.say("all rounds are in a checkpoint; go on with --resume.")

    def _announce(self, path: Path) -> int:
        if self._transport.rank == 0:
            print(path, file=sys.stdout, flush=True)
        return EXIT_OK
