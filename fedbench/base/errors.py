"""Errors by cause, each with the exit code that it ends the command with.

A message says what was found, what is allowed, and where it came from. Nothing
here knows how errors are printed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_STOPPED = 85


class FedbenchError(Exception):
    """Base of all errors that fedbench raises on purpose."""

    exit_code = EXIT_FAILURE


class ConfigError(FedbenchError):
    """The job file, `--set` or a command-line argument is wrong."""

    exit_code = EXIT_USER


class DataError(FedbenchError):
    """A data set is missing, unreadable or does not fit the job."""

    exit_code = EXIT_USER


class ModelError(FedbenchError):
    """A model is missing, unreadable or does not fit the job."""

    exit_code = EXIT_USER


class ResultError(FedbenchError):
    """A run file or checkpoint is missing, damaged or of another schema."""

    exit_code = EXIT_USER


class StorageError(FedbenchError, OSError):
    """A file can't be written: a full disk, a read-only folder, a quota."""


class WireError(FedbenchError):
    """A frame, message or peer did not do what the protocol says."""


class NumericsError(FedbenchError):
    """A loss or a weight is not a finite number, or too many differences vanish."""


class Stopped(FedbenchError):
    """All ranks agreed to leave at a round boundary; the run can be resumed."""

    exit_code = EXIT_STOPPED


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ' Nearest: NAME.' for the closest allowed name, or an empty string."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Nearest: {match[0]}." if match else ""
