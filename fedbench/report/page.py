"""Writes the report as one HTML file that needs nothing else: no network, no script, no other file.

Figures are embedded twice, for light and for dark, and the browser picks one.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D

from fedbench.report.arms import Arm
from fedbench.report.highlights import Highlight
from fedbench.report.looks import DARK, LIGHT, Look, Theme, looks
from fedbench.report.table import Grid

_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 6.2rem; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header { border-bottom: 1px solid var(--rule); background: var(--surface); }
header > div, main, nav > div { max-width: 76rem; margin: 0 auto; padding: 0 1.5rem; }
header > div { padding-top: 2.6rem; padding-bottom: 1.9rem; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.02em; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; letter-spacing: -.005em; }
p { margin: .4rem 0; } .lead, .note, figcaption { color: var(--muted); } .lead { font-size: 1.02rem; }
.note, figcaption { font-size: .85rem; max-width: 58rem; } .note { margin-top: .8rem; }
.best { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .9rem; margin: 1.6rem 0 0; }
.best div { border: 1px solid var(--rule); border-radius: .7rem; padding: .8rem 1rem; background: var(--page); }
.best dt { color: var(--muted); font-size: .8rem; } .best dd { margin: 0; font-size: .85rem; overflow-wrap: anywhere; }
.best dd.value { font-size: 1.55rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
nav { position: sticky; top: 0; z-index: 2; background: var(--surface); border-bottom: 1px solid var(--rule);
  font-size: .85rem; }
nav > div { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; padding-top: .55rem; padding-bottom: .55rem; }
nav a { color: var(--muted); text-decoration: none; white-space: nowrap; } nav a:hover, nav a:focus { color: var(--ink); }
main { padding-top: .6rem; padding-bottom: 4rem; }
section, figure, details { background: var(--surface); border: 1px solid var(--rule); border-radius: .8rem;
  padding: 1.3rem 1.4rem; margin: 1.2rem 0; }
.scroll, nav > div { --shade: color-mix(in srgb, var(--ink) 18%%, transparent); --plain: var(--surface);
  background: linear-gradient(to right, var(--plain) 40%%, transparent) left / 2.5rem 100%% no-repeat local,
    linear-gradient(to left, var(--plain) 40%%, transparent) right / 2.5rem 100%% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / .7rem 100%% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / .7rem 100%% no-repeat scroll; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--rule); }
th, td { padding: .5rem .6rem; text-align: right; min-width: 4.6rem; }
td:last-child, th:last-child { padding-right: .2rem; }
th:first-child, td:first-child, .text th, .text td { text-align: left; padding-left: .2rem; }
td { border-bottom: 1px solid var(--rule); white-space: nowrap; } tr:last-child td { border-bottom: 0; }
tbody tr:hover > td:nth-child(n) { background: var(--page); }
td:first-child { font-weight: 600; white-space: normal; min-width: 10.5rem; }
:not(.text) > * > tr > :first-child { position: sticky; left: 0; background: var(--surface); }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.facts td:first-child { font-weight: 400; color: var(--muted); width: 16rem; }
.key { width: 2.4rem; height: .8rem; margin-right: .5rem; vertical-align: -.1rem; }
.key path { fill: none; stroke: currentColor; stroke-width: 2; }
.key polygon { fill: currentColor; stroke: var(--surface); }
figure img { display: block; width: 100%%; height: auto; }
figcaption { margin: .6rem .3rem 0; }
summary { cursor: pointer; font-weight: 600; } details[open] summary { margin-bottom: .8rem; }
@media (max-width: 46rem) {
  html { scroll-padding-top: 3rem; }
  header > div, main, nav > div { padding-left: .8rem; padding-right: .8rem; }
  section, figure, details { padding: 1rem .8rem; border-radius: .6rem; } figure { padding: .5rem; }
  nav > div { flex-wrap: nowrap; overflow-x: auto; }
  table { font-size: .78rem; } th, td { padding: .4rem .35rem; min-width: 3.9rem; }
  td:first-child { min-width: 7.9rem; width: 7.9rem; overflow-wrap: anywhere; }
  td > .key { display: block; } .best { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; }
}
@media print { nav { display: none; } section, figure { break-inside: avoid; } }
"""


class Picture(NamedTuple):
    """One figure for the page: name, title, SVG for light and for dark, caption, text for those who do not see it."""

    name: str
    title: str
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
    best: Sequence[Highlight],
    body: Sequence[Section | Picture],
    facts: Sequence[Section],
) -> str:
    """Return the page: the best arms, tables and figures in their order, and at the bottom the facts behind them."""
    keys = {label: _key(look) for label, look in looks(arms).items()}
    style = _STYLE % {"light": _variables(LIGHT), "dark": _variables(DARK)}
    parts = [_part(part, keys) for part in body] + [_part(section, {}) for section in facts]
    links = "".join(f'<a href="#{name}">{html.escape(_short(title))}</a>' for name, title, _ in parts)
    top = f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>{_best(best, keys)}'
    lines = [f"<header><div>{top}</div></header>", f"<nav><div>{links}</div></nav>"]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>"
    )
    lines += ["<main>", *(part for *_, part in parts), "</main>"]
    whole = "\n".join(lines)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{whole}\n</body>\n</html>\n'


def _part(part: Section | Picture, keys: dict[str, str]) -> tuple[str, str, str]:
    """Return name, title and HTML of a part of the page."""
    if isinstance(part, Picture):
        return part.name, part.title, _figure(part)
    return _slug(part.grid.title), part.grid.title, _section(part, keys)


def _slug(title: str) -> str:
    """Return a title as a name in the page."""
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))


def _short(title: str) -> str:
    """Return a title without what stands in brackets."""
    return title.partition(" (")[0]


def _best(best: Sequence[Highlight], keys: dict[str, str]) -> str:
    tiles = "".join(
        f'<div><dt>{html.escape(b.heading)}</dt><dd class="value">{html.escape(b.value)}</dd>'
        f"<dd>{keys.get(b.label, '')}{html.escape(b.label)}</dd></div>"
        for b in best
    )
    return f'\n<dl class="best">{tiles}</dl>' if tiles else ""


def _variables(theme: Theme) -> str:
    named = {"page": theme.page, "surface": theme.surface, "ink": theme.ink, "muted": theme.muted, "rule": theme.rule}
    named |= {f"arm{i}": colour for i, colour in enumerate(theme.arms)}
    return " ".join(f"--{name}: {colour};" for name, colour in named.items())


def _key(look: Look) -> str:
    """Return a piece of the arm's line with its marker, as figures have them."""
    style = MarkerStyle(look.marker)
    place = style.get_transform() + Affine2D().scale(9, -9).translate(24, 8)
    (outline,) = style.get_path().transformed(place).to_polygons()
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in np.asarray(outline).tolist())
    dash = " ".join(f"{2 * length:g}" for length in look.dash[1])
    return (
        f'<svg class="key" viewBox="0 0 48 16" style="color:var(--arm{look.colour})" aria-hidden="true">'
        f'<path d="M0 8H48" stroke-dasharray="{dash or "none"}"/><polygon points="{points}"/></svg>'
    )


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
        return (
            f'<details id="{_slug(grid.title)}"><summary>{html.escape(grid.title)}</summary>\n{table}{note}</details>'
        )
    return f'<section id="{_slug(grid.title)}"><h2>{html.escape(grid.title)}</h2>\n{table}{note}</section>'


def _figure(picture: Picture) -> str:
    light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(p).decode()}" for p in (picture.light, picture.dark))
    return (
        f'<figure id="{picture.name}"><div class="scroll"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(picture.alt)}"></picture></div>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
