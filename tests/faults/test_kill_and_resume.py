"""Kill -9 of the whole job at random moments: what is resumed ends in the bits of the run that was never killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mpi
import numpy as np
import pytest

from fedbench.base import rng
from fedbench.base.errors import EXIT_OK
from fedbench.results import reader

from ledger import Ledger  # isort: skip
from small_job import faulty, run_files, strikes, write_job  # isort: skip

pytestmark = [pytest.mark.spmd, pytest.mark.faults]

ROUNDS = 8
AT_ONCE = 2
#: A round of these jobs takes about so long, checkpoint and evaluation included.
ROUND_S = 0.25

SETTINGS: dict[str, tuple[str, ...]] = {
    "cooperllm int4": ("comm.codec=int4", "comm.error_feedback=true"),
    "cooperllm adaptive": ("comm.codec=adaptive", "comm.error_feedback=true", "link.down=20Mbit/s"),
    "cooperllm_plus topk": ("comm.codec=topk", "comm.error_feedback=true"),
    "fedspzo raw": (),
    "fedavg raw": (),
    "fedkseed_pro raw": (),
    "fwdllm raw": ("method.fwdllm.max_directions=2",),
}


#: Endings with more to lose: early at the target, and with tuned weights beside the run file.
ENDINGS: dict[str, tuple[str, ...]] = {
    "cooperllm at the target": ("run.target_accuracy=0.3", "run.stop_at_target=true", "results.save_weights=true"),
    "fedmezo with weights": ("results.save_weights=true",),
}


class Kill(NamedTuple):
    """One killed job: its settings, its ranks, the round in or after which it is killed, and how far into it (0..1)."""

    name: str
    ranks: int
    round: int
    part: float


def kills(count: int) -> list[Kill]:
    """Return the first `count` of the keyed random moments; every setting comes with one rank and with two."""
    draw = rng.generator(0, "test-kill-and-resume")
    moments = [(int(draw.integers(0, ROUNDS)), round(float(draw.uniform(0, 1.2)), 3)) for _ in range(count)]
    names = list(SETTINGS)
    return [Kill(names[i % len(names)], 1 + i % 2, *moment) for i, moment in enumerate(moments)]


class Twice(NamedTuple):
    """One job that is killed at `parts` of the time that an undisturbed one takes, before its first round or after its
    last, and again while it is resumed."""

    name: str
    ranks: int
    parts: tuple[float, float]


def kills_of_whole_lives(count: int) -> list[Twice]:
    """Return the first `count` of the keyed random pairs of moments."""
    draw = rng.generator(0, "test-kill-twice")
    names = list(ENDINGS)
    pairs = [(round(float(draw.uniform(0, 1.05)), 3), round(float(draw.uniform(0, 1.05)), 3)) for _ in range(count)]
    return [Twice(names[i % len(names)], 1 + i // len(names) % 2, pair) for i, pair in enumerate(pairs)]


TWICE = kills_of_whole_lives(12)

#: Those of the default run have one setting with error feedback, the codec that adapts, and a method without a guide.
KILLS = kills(20)
QUICK = (KILLS[0], KILLS[1], KILLS[3])


def command(kill: Kill | Twice, folder: Path, *more: str) -> list[str]:
    """Return the command line of a job."""
    method = kill.name.split()[0]
    settings = (f"method.name={method}", "results.checkpoint_every=1", *(SETTINGS | ENDINGS)[kill.name])
    words = [word for setting in settings for word in ("--set", setting)]
    job = write_job(folder, rounds=ROUNDS)
    return [mpi.console_script(), "run", str(job), "-n", str(kill.ranks), "--results", str(folder), *words, *more]


def hashes(ended: mpi.Ended) -> tuple[str, str]:
    """Return the hashes of a run's trajectory and last weights."""
    assert ended.code == EXIT_OK, ended.told()
    summary = reader.read(Path(ended.out.strip())).summary
    return summary.trajectory_sha256, summary.weights_sha256


class Outcome(NamedTuple):
    """What became of one kill: whether there was a run file at that moment, checkpoints, and the run that went on."""

    complete: int
    checkpoints: int
    resumed: mpi.Ended
    left: list[Path]


def play(kill: Kill, folder: Path) -> Outcome:
    """Kill a job at its moment and resume it."""
    folder.mkdir(parents=True)
    mark = folder / "mark"
    noting = faulty("note", 0, "rounds", mark) | ({"FEDBENCH_FAULT_ALONE": "0"} if kill.ranks == 1 else {})
    running = mpi.Job(command(kill, folder), folder / "log", noting)
    running.until(lambda: strikes(mark) > kill.round, "the round has begun")
    time.sleep(kill.part * ROUND_S)
    running.kill()
    complete = [path for path in run_files(folder) if path.suffix == ".h5"]
    checkpoints = list((folder / "ckpt").glob("*/LATEST"))
    resumed = mpi.run(command(kill, folder, "--resume"), folder / "resumed", faulty())
    left = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.parent.parent.name == "ckpt"]
    return Outcome(len(complete), len(checkpoints), resumed, left)


def play_twice(kill: Twice, folder: Path, straight: Future[tuple[mpi.Ended, float]]) -> Outcome:
    """Kill a job and the one that goes on from it, and let a third one end."""
    _, life_s = straight.result()
    for number, part in enumerate(kill.parts):
        more = ["--resume"] if number else []
        running = mpi.Job(command(kill, folder, *more), folder / str(number), faulty("note", 0, "rounds"))
        time.sleep(part * life_s)
        running.kill()
    complete = [path for path in run_files(folder) if path.suffix == ".h5"]
    resumed = mpi.run(command(kill, folder, "--resume"), folder / "resumed", faulty())
    left = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.parent.parent.name == "ckpt"]
    return Outcome(len(complete), 0, resumed, left)


def timed(words: list[str], log: Path) -> tuple[mpi.Ended, float]:
    """Return what became of a job, and the seconds that it took."""
    start = time.monotonic()
    return mpi.run(words, log, faulty("note", 0, "rounds")), time.monotonic() - start


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[object, Future]]:
    """Start the straight run of each setting on one rank, and all kills, two at a time."""
    mpi.launcher()
    chosen, twice = mpi.chosen(request, "kill"), mpi.chosen(request, "twice")
    folder = tmp_path_factory.mktemp("kills")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found: dict[object, Future] = {}
        for name in dict.fromkeys(kill.name for kill in (*chosen, *twice)):
            place = folder / name.replace(" ", "-")
            found[name] = pool.submit(timed, command(Kill(name, 1, 0, 0.0), place), place / "log")
        for number, kill in enumerate((*chosen, *twice)):
            place = folder / str(number)
            again = (found[kill.name],) if isinstance(kill, Twice) else ()
            found[kill] = pool.submit(play_twice if again else play, kill, place, *again)
        yield found
        pool.shutdown(cancel_futures=True)


def told(kill: Kill | Twice) -> str:
    return f"{kill.name.replace(' ', '-')}-ranks{kill.ranks}"


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(k, id=f"{told(k)}-round{k.round}+{k.part:g}", marks=() if k in QUICK else (pytest.mark.slow,))
        for k in KILLS
    ],
)
def test_a_killed_job_goes_on_to_the_same_bits(jobs: dict[object, Future], kill: Kill, ledger: Ledger) -> None:
    straight = hashes(jobs[kill.name].result()[0])
    outcome: Outcome = jobs[kill].result()
    same = outcome.resumed.code == EXIT_OK and hashes(outcome.resumed) == straight
    ledger.note("kill -9 of the whole job, then --resume", good=same, lost=int(bool(outcome.complete) and not same))
    assert hashes(outcome.resumed) == straight, outcome.resumed.told()
    fresh = "starting fresh" in outcome.resumed.err
    assert fresh == (not outcome.checkpoints and not outcome.complete), outcome.resumed.told()
    assert outcome.checkpoints or outcome.complete or kill.round <= 1, "a checkpoint of every round was asked for"
    assert not outcome.left


@pytest.mark.parametrize(
    "twice",
    [
        pytest.param(
            k, id=f"{told(k)}-{k.parts[0]:g}-{k.parts[1]:g}", marks=() if k is TWICE[0] else (pytest.mark.slow,)
        )
        for k in TWICE
    ],
)
def test_a_job_that_is_killed_twice_at_any_time_ends_in_the_same_bits(
    jobs: dict[object, Future], twice: Twice, ledger: Ledger
) -> None:
    straight = hashes(jobs[twice.name].result()[0])
    outcome: Outcome = jobs[twice].result()
    same = outcome.resumed.code == EXIT_OK and hashes(outcome.resumed) == straight
    lost = int(bool(outcome.complete) and not same)
    for _ in twice.parts:
        ledger.note("kill -9 of the whole job from its first to its last moment, twice", good=same, lost=lost)
    assert hashes(outcome.resumed) == straight, outcome.resumed.told()
    assert not outcome.left


def test_the_moments_cover_the_run() -> None:
    """Twenty moments: every setting, both numbers of ranks, and at least five different rounds."""
    assert len(set(KILLS)) == 20
    assert {kill.name for kill in KILLS} == set(SETTINGS)
    assert {(kill.name, kill.ranks) for kill in KILLS[: 2 * len(SETTINGS)]} >= {
        (n, r) for n in SETTINGS for r in (1, 2)
    }
    assert len(np.unique([kill.round for kill in KILLS])) >= 5
