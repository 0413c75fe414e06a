"""Prints tables so that no column is lost: wide where nobody watches; it measures and formats nothing itself."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console, RenderableType

#: Columns of a table where its stream is no terminal.
WIDTH = 132


def show(table: RenderableType, stream: TextIO) -> None:
    """Print a table; a terminal that is too narrow for it wraps its lines."""
    Console(file=stream, width=None if stream.isatty() else WIDTH).print(table, crop=False)
