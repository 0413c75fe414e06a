"""Unit tests compute on one thread: they run beside others, and spinning threads make small products slow."""

from __future__ import annotations

import pytest

from fedbench.base import account
from fedbench.zo.kernels import cpu


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    account.use_threads(1)
    cpu.set_threads(1)
