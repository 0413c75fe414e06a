"""The report in a real browser: no complaint, every figure is there and seen in light and dark, nothing sticks out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import browser
import numpy as np
import pytest
from synthetic_runs import make_codec, make_run

from fedbench.base.records import Run
from fedbench.report import build
from fedbench.results import writer

pytestmark = pytest.mark.browser

FIGURES = """Promise.all([...document.images].map(async image => {
    await image.decode();
    const box = image.getBoundingClientRect();
    const style = getComputedStyle(image);
    const canvas = document.createElement('canvas');
    canvas.width = canvas.height = 64;
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0, 64, 64);
    const colours = new Set();
    const pixels = context.getImageData(0, 0, 64, 64).data;
    for (let i = 0; i < pixels.length; i += 4) colours.add(pixels.slice(i, i + 4).join());
    return {name: image.closest('figure').id, width: box.width, height: box.height, natural: image.naturalWidth,
            seen: style.visibility === 'visible' && style.display !== 'none', colours: colours.size,
            corner: [...pixels.slice(0, 3)], source: image.currentSrc.length};
}))"""

#: Every figure that a report can have, in the order of the page.
NAMES = [
    *("accuracy_rounds", "pareto", "accuracy_flops", "accuracy_uplink", "accuracy_downlink", "accuracy_time"),
    *("accuracy_simulated", "memory", "memory_rounds", "time_split", "timeline", "bits"),
]


def simulated(run: Run) -> Run:
    """Give a run times on a virtual clock."""
    run.rounds["sim_s"] = np.where(run.rounds["round"] >= 0, 2.0, np.nan)
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    browser.browser()
    folder = tmp_path_factory.mktemp("page")
    for method in ("cooperllm", "fedmezo", "fedavg"):
        for seed in (0, 1):
            codec = make_codec(8) if method == "cooperllm" else None
            run = simulated(make_run(method, seed=seed, rounds=8, ranks=2, codec=codec))
            writer.write(folder / "runs" / f"{run.summary.run_id}.h5", run)
    build.build([folder / "runs"], folder / "report")
    return folder / "report" / "index.html"


@pytest.fixture(scope="module")
def tab(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_figure_is_seen_without_a_complaint(page: Path, tab: browser.Tab, dark: bool) -> None:
    tab.open(page, dark=dark)
    figures = tab.ask(FIGURES)
    assert [figure["name"] for figure in figures] == NAMES
    for figure in figures:
        assert figure["seen"], figure
        assert figure["natural"] > 100, figure
        assert figure["width"] > 400, figure
        assert figure["height"] > 80, figure
        assert figure["colours"] > 10, figure  # not one flat surface
        assert (max(figure["corner"]) < 64) == dark, figure
    assert tab.complaints() == []
    assert tab.picture().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [390, 1280, 2200])
def test_the_page_fits_its_window_and_its_links_lead_somewhere(page: Path, tab: browser.Tab, width: int) -> None:
    tab.open(page, dark=False, width=width)
    assert tab.ask("document.documentElement.scrollWidth") <= width
    links = tab.ask("[...document.querySelectorAll('nav a')].map(a => [a.hash, !!document.querySelector(a.hash)])")
    assert len(links) > len(NAMES)
    assert all(there for _, there in links), links
    assert len({name for name, _ in links}) == len(links)


def test_all_links_are_seen_on_a_desktop_and_scroll_on_a_phone(page: Path, tab: browser.Tab) -> None:
    tab.open(page, dark=False)
    assert tab.ask("[...document.querySelectorAll('nav a')].every(a => a.getBoundingClientRect().right <= innerWidth)")
    tab.open(page, dark=False, width=390)
    assert tab.ask("document.querySelector('nav').getBoundingClientRect().height") < 60
    assert tab.ask("(n => n.scrollWidth > n.clientWidth)(document.querySelector('nav > div'))")


def test_a_phone_shows_whole_figures_and_keeps_the_names_of_scrolled_rows(page: Path, tab: browser.Tab) -> None:
    tab.open(page, dark=False, width=390)
    tab.ask("Promise.all([...document.images].map(image => image.decode()))")
    rights = tab.ask("[...document.images].map(image => image.getBoundingClientRect().right)")
    assert len(rights) == len(NAMES)
    assert max(rights) <= 390
    tab.ask("document.querySelector('section .scroll').scrollLeft = 200")
    card, name, figure = tab.ask(
        "['section .scroll', 'section .scroll td', 'section .scroll td:nth-child(2)'].map(what => { "
        "const box = document.querySelector(what).getBoundingClientRect(); return [box.left, box.width]; })"
    )
    assert name[0] == card[0] > figure[0]  # the name stays where it was, the figures go below it
    assert name[1] < 0.42 * card[1]


def test_a_page_that_complains_is_heard(tab: browser.Tab, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<script>console.error('planted'); throw new Error('thrown')</script><img src='gone.png'>")
    tab.open(broken, dark=False)
    heard = " ".join(tab.complaints())
    assert all(word in heard for word in ("planted", "thrown", "gone.png")), heard
