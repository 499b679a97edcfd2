"The report in a real browser: it opens from disk, draws, switches runs and logs no error"
import shutil

import pytest
from playwright.sync_api import sync_playwright

from ftcl.report import html_report, read_runs

from test_runs import ROOT, papermill

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
SHOWN = "() => document.getElementById('scores').data.filter(t => (t.visible ?? true) === true).map(t => t.name)"


@pytest.fixture
def page():
    "A page of headless Chromium without a network; fails if anything was logged as an error"
    if not BROWSER: pytest.skip("no Chromium here: install the package chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        context = browser.new_context(offline=True)
        page, errors = context.new_page(), []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        yield page
        browser.close()
        assert not errors, errors


def test_the_report_opens_draws_and_switches_runs(page, tmp_path):
    runs, metrics = read_runs(ROOT / "results" / "cifar10-momentum", "*-momentum0.99-*")
    runs = {k: v for k, v in runs.items() if k in ("mixing=none", "mixing=posneg")}
    html_report(runs, tmp_path / "report.html", "none against posneg", metrics, ["neg_mean", "neg_var", "grad_query"])
    page.goto(f"file://{tmp_path}/report.html")
    page.wait_for_selector("#scores .legend .traces")
    assert page.title() == "none against posneg"
    assert page.locator("table tbody tr").count() == len(metrics)
    drawn = page.locator("#scores .scatterlayer path.js-line")
    assert drawn.count() == 3 * sum(map(len, runs.values()))
    paths = [d.get_attribute("d") for d in drawn.all()]
    assert all(p.count("L") >= 1 for p in paths) and max(map(len, paths)) > 1000  # curves; flat ones are short
    assert set(page.evaluate(SHOWN)) == set(runs)
    page.locator("#scores .updatemenu-header").click()
    page.locator("#scores .updatemenu-dropdown-button").nth(2).click()
    page.wait_for_function(f"({SHOWN})().every(n => n === 'mixing=posneg')")
    assert drawn.count() == 3 * len(runs["mixing=posneg"])
    page.locator("#scores .updatemenu-header").click()
    page.locator("#scores .updatemenu-dropdown-button").nth(0).click()
    page.wait_for_function(f"new Set(({SHOWN})()).size === 2")
    page.locator("#scores .legend .traces").first.click()  # the legend hides a run
    page.wait_for_function(f"({SHOWN})().every(n => n === 'mixing=posneg')")
    page.locator("#scores .nsewdrag").first.hover(force=True)
    page.wait_for_selector("#scores .hovertext")
    assert "posneg, run 1" in page.locator("#scores .hoverlayer").text_content()


def test_the_notebook_makes_the_page(page, tmp_path):
    out = tmp_path / "page.html"
    run = papermill("report", out, records=str(ROOT / "results" / "cifar10-momentum"), names="none-momentum0.99-*", columns="loss")
    assert run.returncode == 0, run.stderr
    page.goto(f"file://{out}")
    page.wait_for_selector("#scores .scatterlayer path.js-line")


def test_a_folder_without_records_is_named(tmp_path):
    run = papermill("report", tmp_path / "x.html", records=str(tmp_path))
    assert run.returncode != 0 and "there is no record" in run.stderr
    assert not (tmp_path / "x.html").exists()
