"""Unit tests compute on one thread: they run beside others, and spinning threads make small products slow."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from tinyruns import shrunk

from fedbench.base import account
from fedbench.run import execute, launch
from fedbench.run.build import construct
from fedbench.zo.kernels import cpu


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    account.use_threads(1)
    cpu.set_threads(1)


@pytest.fixture
def own_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let whole runs evaluate few rows, and put back the signal handlers that they install."""
    monkeypatch.setattr(execute, "construct", lambda job: shrunk(construct(job), 16))
    numbers = (*launch.STOP_SIGNALS, *launch.ALONE_SIGNALS)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
