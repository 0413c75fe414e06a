"""The linter, the formatter and the type checker have nothing to say, and every module says what it is for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedbench

PACKAGE = Path(fedbench.__file__).parent
ROOT = PACKAGE.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="the package is installed without its sources"
)


def said(*words: str) -> str:
    """Return what a tool prints, or an empty string where it finds nothing."""
    ran = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    return "" if ran.returncode == 0 else ran.stdout + ran.stderr


def test_the_linter_finds_nothing() -> None:
    assert said("ruff", "check", "--no-fix", "fedbench", "tests", "jobs") == ""


def test_the_formatter_would_change_nothing() -> None:
    assert said("ruff", "format", "--check", "fedbench", "tests", "jobs") == ""


def test_the_type_checker_finds_nothing() -> None:
    assert said("mypy") == ""


def test_every_module_opens_with_what_it_is_for() -> None:
    silent = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if text.strip() and not ast.get_docstring(ast.parse(text)):
            silent.append(str(path))
    assert silent == []


def swallowed(source: str) -> list[int]:
    """Return the lines of handlers that catch everything, or that do nothing at all with what they caught."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            empty = all(
                isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            if node.type is None or empty:
                lines.append(node.lineno)
    return lines


def stubs(source: str) -> list[int]:
    """Return the lines that raise NotImplementedError."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc)
    ]


def test_no_error_is_swallowed_and_nothing_is_a_stub() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert (swallowed(source), stubs(source)) == ([], []), path


@pytest.mark.parametrize(
    "source",
    ["try:\n    f()\nexcept:\n    g()", "try:\n    f()\nexcept OSError:\n    pass", "raise NotImplementedError"],
)
def test_a_planted_fault_of_that_kind_is_found(source: str) -> None:
    assert swallowed(source) + stubs(source)
