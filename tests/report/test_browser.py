"""The page in a real browser: every chart drawn, every table filled, nothing said on the console, nothing fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swapless import embedded
from swapless.cli.main import app
from swapless.trace import read_trace

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "gpt-oss-20b.sample.parquet"
ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"]


@pytest.fixture
def browser_page(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=chromium,
            headless=True,
            args=ARGUMENTS,
            accept_downloads=True,
            viewport={"width": 1320, "height": 900},
        )
        yield context.new_page()
        context.close()


def opened(page, html):
    """Show a page until every chart is drawn; the list to which all that it says on the console is added."""
    said = []
    page.on("console", lambda line: said.append(f"{line.type}: {line.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(html.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length")
    return said


@pytest.fixture(params=["sample twice", "recorded"])
def traces(request, tmp_path):
    """The shipped sample against itself, and prefill and decode of the embedded model with the scores of its router."""
    if request.param == "sample twice":
        return [SAMPLE, SAMPLE], 5 + 2 * 3
    text = "The cat sat on the mat. The dog saw the cat. " * 3
    (tmp_path / "prompts.txt").write_text(f"{text}\nOne and one is two. {text}\n", encoding="utf-8")
    arguments = ["--prompts", tmp_path / "prompts.txt", "--decode", 40, "--scores", "--out", tmp_path / "recorded.parquet"]
    result = CliRunner().invoke(app, ["record", str(embedded.path()), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return [tmp_path / "recorded.parquet"], 5 + 2  # its documents have no domains


@pytest.mark.slow
def test_the_page_in_a_browser(browser_page, traces, tmp_path):
    paths, charts = traces
    html = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["locality", *map(str, paths), "--html", str(html)])
    assert result.exit_code == 0, result.output
    fetched = []
    browser_page.on("request", lambda request: fetched.append(request.url))
    said = opened(browser_page, html)
    assert browser_page.locator(".plot").count() == charts
    drawn = browser_page.evaluate(
        """() => [...document.querySelectorAll('.plot')].map(plot => {
            const marks = plot.querySelectorAll('.trace path, .heatmaplayer image, .bars path, .point');
            const box = plot.getBoundingClientRect();
            return [plot.id, marks.length, box.width, box.height];
        })"""
    )
    for name, marks, width, height in drawn:
        assert marks > 0 and width > 300 and height > 200, (name, marks, width, height)
    cells = browser_page.evaluate("[...document.querySelectorAll('table')].map(t => t.tBodies[0].rows.length)")
    assert all(rows > 0 for rows in cells)
    assert browser_page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser_page.locator(".modebar-btn[data-title^=Share]").count() == 0  # nothing on the page uploads anything
    browser_page.locator("#hit_rate summary").click()
    with browser_page.expect_download() as download:
        browser_page.locator("#hit_rate button[data-table]").click()
    saved = tmp_path / "table.csv"
    download.value.save_as(saved)
    lines = saved.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("trace,capacity_experts,share_of_experts,lru,lfu,belady")
    assert len(lines) == 1 + sum(read_trace(path).num_experts for path in paths)
    browser_page.set_viewport_size({"width": 420, "height": 800})
    browser_page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth + 1")
    assert said == []
    assert all(url.startswith(("file:", "blob:", "data:")) for url in fetched)


@pytest.mark.slow
def test_the_page_of_simulate_in_a_browser(browser_page, tmp_path):
    html = tmp_path / "simulate.html"
    given = ["--policy", "lru,belady", "--capacity", "0.125,0.25,0.5", "--device", "UFS 4.0", "--prefetch", "clairvoyant"]
    result = CliRunner().invoke(app, ["simulate", str(SAMPLE), *given, "--html", str(html)])
    assert result.exit_code == 0, result.output
    said = opened(browser_page, html)
    marks = browser_page.evaluate(
        "[...document.querySelectorAll('.plot')].map(p => [p.id, p.querySelectorAll('.bars path, .point').length])"
    )
    assert [name for name, _ in marks] == ["plot-hit_rate", "plot-bytes", "plot-speed", "plot-time", "plot-prefetch"]
    assert all(count >= 6 for _, count in marks), marks
    words = browser_page.locator("#losses li").all_inner_texts()
    assert words[0] == "lru, 12% of the experts: no room to read ahead, for every MoE layer keeps its K."
    assert browser_page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert said == []
