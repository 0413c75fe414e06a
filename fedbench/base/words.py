"""Command lines: parsers whose errors are one line with exit code 2, and words that an argument may be.

No verb is known here.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from fedbench.base.errors import EXIT_USER, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest verb."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(EXIT_USER, f"fedbench: {message} (see {self.prog} --help)\n")

    def verbs(self, dest: str) -> Verbs:
        """Return the place for this parser's verbs; the chosen one's name is kept as `dest`."""
        return Verbs(self.add_subparsers(dest=dest, metavar=dest.upper(), required=True, parser_class=Parser))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a verb that there is not, with the nearest one."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            allowed = list(action.choices)
            said = " ".join([*self.prog.split()[1:], ""]).lstrip()
            self.exit(
                EXIT_USER,
                f"fedbench: {said}{value!r} is no verb. Allowed: {', '.join(allowed)}.{nearest(value, allowed)}\n",
            )
        super()._check_value(action, value)


class Verbs(NamedTuple):
    """Where verbs are added to a parser."""

    parsers: argparse._SubParsersAction[Parser]

    def add(self, name: str, told: str, example: str, description: str | None = None) -> Parser:
        """Return the parser of a new verb: what it does in one line, and an example of its use."""
        return self.parsers.add_parser(
            name,
            help=told,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  {example}",
        )


def positive(text: str) -> int:
    """Return a whole number from 1; argparse's error otherwise."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number from 1")
    return value
