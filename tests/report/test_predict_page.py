"""The page of ``predict eval`` in a real browser: every chart drawn, leads that agree shown as one, nothing cut off."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from swapless.cli.main import app
from swapless.predict import make_predictor
from swapless.predict.saved import save_predictor
from swapless.trace import write_trace
from tests.predict.made import made_trace
from tests.report.test_browser import browser_page, opened

__all__ = ["browser_page"]  # a fixture


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lines"), [("linear", (2, 3)), ("token_prior", (1,))])
def test_the_page_in_a_browser(browser_page, kind, lines, tmp_path):
    save_predictor(tmp_path / "p", make_predictor(kind).fit(made_trace()))
    trace = made_trace(lengths=(21, 9), seed=5, domain=["a"] * 21 + ["b"] * 9)
    write_trace(tmp_path / "t.parquet", trace)
    html = tmp_path / "page.html"
    arguments = ["predict", "eval", tmp_path / "p", tmp_path / "t.parquet", "--html", html]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    said = opened(browser_page, html)
    drawn = browser_page.evaluate(
        """() => [...document.querySelectorAll('.plot')].map(
            plot => [plot.id, plot.querySelectorAll('.scatterlayer .trace, .bars').length])"""
    )
    assert [name for name, _ in drawn] == ["plot-width", "plot-layer", "plot-position", "plot-calibration", "plot-domain"]
    assert dict(drawn)["plot-width"] in lines and all(marks > 0 for _, marks in drawn)
    assert browser_page.locator("#width .legendtext").count() in lines
    assert browser_page.locator("main > .scroll tbody tr").count() == 3  # every lead has its row all the same
    for width in (1320, 420):
        browser_page.set_viewport_size({"width": width, "height": 800})
        browser_page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth")
    assert said == []
