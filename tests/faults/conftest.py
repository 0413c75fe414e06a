"""One ledger for all fault tests of a session: printed at its end, and kept where FEDBENCH_FAULT_TABLE says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ledger import Ledger  # isort: skip

TABLE_VARIABLE = "FEDBENCH_FAULT_TABLE"
#: Variables whose presence says that the whole campaign runs, and how many faults that must be.
LEAST_VARIABLE = "FEDBENCH_FAULT_LEAST"

_ledger = Ledger()


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    """Return the session's ledger."""
    return _ledger


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a whole campaign that injected fewer faults than it promises."""
    least = int(os.environ.get(LEAST_VARIABLE, "0"))
    injected = sum(row.injected for row in _ledger.rows.values())
    if injected < least:
        print(f"\n{injected} faults were injected; the campaign promises {least}.")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and write it where it is asked for."""
    if not _ledger.rows:
        return
    text = _ledger.markdown()
    terminalreporter.section("injected faults")
    terminalreporter.write(text)
    path = os.environ.get(TABLE_VARIABLE)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(f"# Fault campaign\n\n{text}", encoding="utf-8")
        terminalreporter.write_line(f"written to {path}")
