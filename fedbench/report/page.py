"""Writes the report as one HTML file that needs nothing else: no network, no script, no other file.

Figures are embedded twice, for light and for dark, and the browser picks one.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

from fedbench.report.arms import Arm
from fedbench.report.looks import DARK, LIGHT, Look, Theme, looks
from fedbench.report.table import Grid

_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--surface); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .6rem; }
p { margin: .4rem 0; } .lead, .note, figcaption { color: var(--muted); }
.note, figcaption { font-size: .875rem; max-width: 52rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--rule); }
th, td { padding: .5rem .6rem; text-align: right; min-width: 4.6rem; }
td:last-child, th:last-child { padding-right: 0; }
th:first-child, td:first-child, .text th, .text td { text-align: left; padding-left: 0; }
td { border-bottom: 1px solid var(--rule); white-space: nowrap; }
td:first-child { font-weight: 600; white-space: normal; min-width: 10.5rem; }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.facts td:first-child { font-weight: 400; color: var(--muted); width: 16rem; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%%; margin-right: .5rem;
  border: .17rem solid; background: currentColor; } .key.hollow { background: none; }
figure { margin: 1.6rem 0 2.2rem; } figure img { display: block; width: 100%%; min-width: 44rem; height: auto; }
figcaption { margin-top: .4rem; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 3.5rem; border-top: 2px solid var(--rule); }
"""


class Picture(NamedTuple):
    """One figure for the page: SVG for light and for dark, caption, text for those who do not see it."""

    light: bytes
    dark: bytes
    caption: str
    alt: str


class Section(NamedTuple):
    """Tables of figures (`text` False) or of words, some of them folded away."""

    grid: Grid
    text: bool = False
    folded: bool = False


def render(
    *,
    title: str,
    lead: str,
    arms: Sequence[Arm],
    tables: Sequence[Section],
    pictures: Sequence[Picture],
    facts: Sequence[Section],
) -> str:
    """Return the page: tables, figures, and at the bottom the facts behind them."""
    keys = {label: _key(look) for label, look in looks(arms).items()}
    style = _STYLE % {"light": _variables(LIGHT), "dark": _variables(DARK)}
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(lead)}</p>',
        *(_section(section, keys) for section in tables),
        "<h2>Figures</h2>",
        *(_figure(picture) for picture in pictures),
        "<footer>",
        *(_section(section, {}) for section in facts),
        "</footer>",
    ]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>"
    )
    main = "\n".join(["<main>", *body, "</main>"])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{main}\n</body>\n</html>\n'


def _variables(theme: Theme) -> str:
    named = {"surface": theme.surface, "ink": theme.ink, "muted": theme.muted, "rule": theme.rule}
    named |= {f"arm{i}": colour for i, colour in enumerate(theme.arms)}
    return " ".join(f"--{name}: {colour};" for name, colour in named.items())


def _key(look: Look) -> str:
    kind = "key hollow" if look.dash[1] else "key"
    return f'<span class="{kind}" style="color:var(--arm{look.colour})"></span>'


def _section(section: Section, keys: dict[str, str]) -> str:
    grid = section.grid
    kind = (
        ' class="text facts"' if section.text and len(grid.headings) == 2 else ' class="text"' if section.text else ""
    )
    head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in grid.headings)
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td>{keys.get(c, '') if i == 0 else ''}{html.escape(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in grid.rows
    )
    table = (
        f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )
    note = f'\n<p class="note">{html.escape(grid.note)}</p>' if grid.note else ""
    if section.folded:
        return f"<details><summary>{html.escape(grid.title)}</summary>\n{table}{note}</details>"
    return f"<h2>{html.escape(grid.title)}</h2>\n{table}{note}"


def _figure(picture: Picture) -> str:
    light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(p).decode()}" for p in (picture.light, picture.dark))
    return (
        f'<figure><div class="scroll"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(picture.alt)}"></picture></div>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
