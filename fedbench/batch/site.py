"""What a site wants of its Slurm jobs: `site.env`, a file of shell that jobs source and that submit reads values from.

Without a file every value has a default. Only assignments to FEDBENCH_SLURM_... are read here; modules to load and
paths to set are the job's shell's to run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedbench.base.errors import ConfigError, nearest

#: Where the file is looked for unless --site names it.
NAME = "site.env"
_PREFIX = "FEDBENCH_SLURM_"
_SIGNALS = {"SHELL_SIGNAL": ("USR1", "USR2", "TERM", "HUP"), "RANK_SIGNAL": ("USR2", "TERM")}
_TIME = re.compile(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}|unlimited|infinite", re.IGNORECASE)


class Site(NamedTuple):
    """The values, each with its default; `file` is None without a site.env."""

    file: Path | None = None
    sbatch: tuple[str, ...] = ()  #: more words for every sbatch, such as --account=me
    time: str = ""  #: time limit of a task, in sbatch's words; empty: the partition's
    warn_s: int = 120  #: seconds before that limit at which a run is asked to stop
    throttle: int = 64  #: tasks of an array at a time
    cpus_per_node: int = 0  #: CPUs of a node; 0: every run fits on one node
    restarts: int = 16  #: how often a task is requeued at most
    shell_signal: str = "USR1"  #: what Slurm sends to the batch shell
    rank_signal: str = "USR2"  #: what ranks are asked to stop with


def read(named: Path | None) -> Site:
    """Return the site of a file, of ./site.env where none is named, or the defaults where there is none either."""
    path = named or Path(NAME)
    if named is None and not path.exists():
        return Site()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--site {path}: can't be read: {error}.") from None
    found: dict[str, str] = {}
    for number, row in enumerate(text.splitlines(), 1):
        where = f"{path} line {number}"
        for word in _words(row, where) if _PREFIX in row else []:
            key, is_set, value = word.partition("=")
            if not is_set or not key.startswith(_PREFIX):
                continue
            if "$" in value or "`" in value:
                raise ConfigError(f"{key}: found {value!r}; submit runs no shell: write the value out. (From {where})")
            found[key] = value
    return _site(found, str(path))._replace(file=path.resolve())


def of_environment(environment: Mapping[str, str]) -> Site:
    """Return the site as a job's shell, which has sourced the file, tells it."""
    known = {f"{_PREFIX}{name.upper()}" for name in Site._fields[1:]}
    return _site({key: value for key, value in environment.items() if key in known}, "the environment")


def checked_time(text: str, key: str, source: str = "") -> str:
    """Return a time limit in sbatch's words; ConfigError where sbatch would not take it."""
    if _TIME.fullmatch(text) is None:
        raise ConfigError(
            f"{key}: found {text!r}; allowed: minutes, hours:minutes:seconds, days-hours, or another form of sbatch's.{source}"
        )
    return text


def _site(found: Mapping[str, str], source: str) -> Site:
    site = Site()
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = key.removeprefix(_PREFIX).lower()
        default = getattr(site, name, None) if name in Site._fields[1:] else None
        if default is None:
            known = [f"{_PREFIX}{field.upper()}" for field in Site._fields[1:]]
            raise ConfigError(f"{key}: unknown. Allowed: {', '.join(known)}.{nearest(key, known)} (From {source})")
        allowed = _SIGNALS.get(name.upper())
        if allowed and value not in allowed:
            raise ConfigError(f"{key}: found {value!r}; allowed: {', '.join(allowed)}. (From {source})")
        if isinstance(default, int) and not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{key}: found {value!r}; allowed: a whole number from 0. (From {source})")
        if name == "time" and value:
            checked_time(value, key, f" (From {source})")
        values[name] = int(value) if isinstance(default, int) else value
        if default == ():
            try:
                values[name] = tuple(shlex.split(value))
            except ValueError as error:
                raise ConfigError(f"{key}: {value!r} is no words of the shell ({error}). (From {source})") from None
    site = site._replace(**values)
    if site.throttle < 1:
        raise ConfigError(f"{_PREFIX}THROTTLE: found 0; allowed: a whole number from 1. (From {source})")
    return site


def _words(row: str, where: str) -> list[str]:
    """Return the words of a row of shell; `;`, `&` and `|` end one as they do there."""
    lexer = shlex.shlex(row, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError as error:
        raise ConfigError(f"{where}: {row.strip()!r} is no assignment of the shell ({error}).") from None
