"The report in a real browser: it opens from disk, draws, switches runs and logs no error"

import json
import shutil

import nbformat
import pytest
from playwright.sync_api import sync_playwright

from ftcl.report import html_report
from ftcl.study import read_runs

from test_runs import ROOT, papermill

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
MOMENTUM = ROOT / "results" / "cifar10-momentum"
SHOWN = """() => document.getElementById('scores').data
    .filter(trace => (trace.visible ?? true) === true).map(trace => trace.name)"""
OVERLAPS = """() => {
    const texts = ['annotation-text', 'legendtext', 'updatemenu-header', 'xtitle'];
    const found = document.querySelectorAll(texts.map(name => '#scores .' + name).join());
    const boxes = [...found].map(o => o.getBoundingClientRect());
    const meet = (a, b) => a.left < b.right && b.left < a.right
        && a.top < b.bottom && b.top < a.bottom;
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b))).length;
}"""


@pytest.fixture
def page():
    "A page of headless Chromium without a network; fails if anything was logged as an error"
    if not BROWSER:
        pytest.skip("no Chromium here: install the package chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    errors = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=options)
        page = browser.new_context(offline=True).new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        yield page
        browser.close()
    assert not errors, errors


def opened(page, path):
    "The page, once its curves are drawn"
    page.goto(f"file://{path}")
    page.wait_for_selector("#scores .scatterlayer path.js-line")
    page.wait_for_selector("#scores .legend .traces")
    return page


def test_the_report_opens_draws_and_switches_runs(page, tmp_path):
    runs, metrics = read_runs(MOMENTUM, "*-momentum0.99-*")
    runs = {label: runs[label] for label in ("mixing=none", "mixing=posneg")}
    columns = ["neg_mean", "neg_var", "grad_query"]
    path = tmp_path / "report.html"
    html_report(runs, path, "none against posneg", metrics, columns)
    opened(page, path)
    assert page.title() == "none against posneg"
    assert page.locator("table tbody tr").count() == len(metrics)
    drawn = page.locator("#scores .scatterlayer path.js-line")
    assert drawn.count() == 3 * sum(map(len, runs.values()))
    paths = [line.get_attribute("d") for line in drawn.all()]
    assert all("L" in p for p in paths) and max(map(len, paths)) > 1000  # flat curves are short
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


@pytest.mark.parametrize("width", [800, 1200])
def test_nothing_covers_anything(page, tmp_path, width):
    runs, _ = read_runs(MOMENTUM, "*")
    page.set_viewport_size(dict(width=width, height=900))
    for name, columns in (("all", ""), ("one", "grad_last")):
        html_report(runs, tmp_path / f"{name}.html", columns=columns)
        opened(page, tmp_path / f"{name}.html")
        assert page.evaluate(OVERLAPS) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_no_text_becomes_a_link(page, tmp_path):
    link = '<a href="https://example.org">%{x}</a>'
    runs, metrics = read_runs(MOMENTUM, "none-momentum0.99-*")
    (frames,) = runs.values()
    strange = {link: [frame.rename(columns={"loss": link}) for frame in frames]}
    table = metrics.rename(index=lambda _: link, columns={"seed": link})
    html_report(strange, tmp_path / "report.html", link, table, [link])
    opened(page, tmp_path / "report.html")
    assert page.title() == link and page.locator("h1").text_content() == link
    page.locator("#scores .nsewdrag").first.hover(force=True)
    page.wait_for_selector("#scores .hovertext")
    assert f"{link}, run 1" in page.locator("#scores .hoverlayer").text_content()
    page.locator("#scores .updatemenu-header").click()
    for where in (".annotation-text", ".legendtext", ".updatemenu-dropdown-button"):
        assert link in "".join(page.locator(f"#scores {where}").all_text_contents()), where
    assert page.locator("th").filter(has_text=link).count() == 1 + len(metrics)
    assert page.locator("[href*=example]").count() == 0
    assert page.locator("svg a").count() == 0


STRANGE = [
    "<script>document.title = window.hit = 1</script>",
    "</script><script>window.hit = 1</script>",
    "\"quoted\" 'twice' \\ `${window.hit = 1}` {{}} {0} %{y}",
    "größe 日本語 \u202e אב 🙂",
    "<img src=x onerror='window.hit = 1'>",
    "a\nb\tc \x00",
    "long " + "x" * 300,
    "long " + "x" * 150 + "y" * 150,  # differs in the middle alone
]


@pytest.mark.parametrize("width", [800, 1200])
def test_names_are_text_whatever_they_hold(page, tmp_path, width):
    "In title, legend, menu, pointer, panel titles and table; nothing of them runs or overflows"
    runs, metrics = read_runs(MOMENTUM, "none-momentum0.99-*")
    (frames,) = runs.values()
    columns = STRANGE[:4] + STRANGE[6:7]
    names = dict(zip(["loss", "neg_mean", "neg_var", "lr", "harder"], columns))
    strange = {label: [frame.rename(columns=names) for frame in frames] for label in STRANGE}
    table = metrics.iloc[[0] * len(STRANGE)].set_axis(STRANGE).rename(columns={"seed": STRANGE[0]})
    page.set_viewport_size(dict(width=width, height=900))
    for title in STRANGE if width == 800 else STRANGE[:1]:
        html_report(strange, tmp_path / "report.html", title, table, columns)
        opened(page, tmp_path / "report.html")
        assert page.evaluate("window.hit") is None
        assert page.locator("h1").text_content().split() == title.replace("\0", "").split()
    assert page.evaluate(OVERLAPS) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    legend = page.locator("#scores .legendtext").all_text_contents()
    assert len(legend) == len(STRANGE) and max(map(len, legend)) <= 60
    assert legend[0] == STRANGE[0] and legend[1] == STRANGE[1] and legend[2] == STRANGE[2]
    page.locator("#scores .updatemenu-header").click()
    buttons = page.locator("#scores .updatemenu-dropdown-button")
    assert buttons.count() == 1 + len(STRANGE)
    buttons.nth(8).click()  # the two long names are two runs
    page.wait_for_function(f"({SHOWN})().length === {2 * len(columns)}")
    cells = page.locator("tbody th").all_text_contents()
    assert [cell.split() for cell in cells[:5]] == [label.split() for label in STRANGE[:5]]
    assert cells[6] == STRANGE[6]  # whole
    for tag in ("script[src]", "img", "svg a", "table a"):
        assert page.locator(tag).count() == 0, tag
    assert page.evaluate("window.hit") is None


def test_the_notebook_makes_the_page(page, tmp_path):
    out = tmp_path / "page.html"
    names = "none-momentum0.99-*"
    for _ in range(2):  # the second time it replaces its own page
        run = papermill("report", out, records=MOMENTUM, names=names, columns="loss")
        assert run.returncode == 0, run.stderr
    opened(page, out)


def test_the_notebook_leaves_out_what_is_no_run(tmp_path):
    records = tmp_path / "runs"
    records.mkdir()
    for ending in ("json", "parquet"):
        shutil.copy(MOMENTUM / f"none-momentum0.9-s0.{ending}", records)
    whole = json.loads((records / "none-momentum0.9-s0.json").read_text())
    (records / "evaluate.json").write_text(json.dumps(whole | dict(pretrained={})))
    (records / "array.json").write_text("[]")
    (records / "folder.json").mkdir()
    out = tmp_path / "page.html"
    run = papermill("report", out, records=records, columns="loss")
    assert run.returncode == 0 and out.exists(), run.stderr
    cells = nbformat.read(f"{out}.ipynb", 4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    told = "".join(o.text for o in outputs if o.output_type == "stream")
    first = "3 of 4 files left out: 'array.json', 'evaluate.json', 'folder.json' (the first: "
    assert told.startswith(first) and told.count("\n") == 1


@pytest.mark.parametrize(
    "out, wrong, told",
    [
        ("x.html", {"records": "nbs"}, "there is no record"),
        ("x.html", {"names": "nothing-*"}, "there is no record nothing-*.json"),
        ("x.html", {"colums": "loss"}, "unknown parameter 'colums'. Did you mean 'columns'?"),
        ("x.json", {}, "its name must end in .html."),
        ("x.html", {"columns": "los"}, "lacks the column los. Did you mean 'loss'?"),
        ("x.html", {"records": ""}, "folder is '', but must be a path"),
        ("x.html", {"names": "../*"}, "a pattern of names is '../*', but"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_page(tmp_path, out, wrong, told):
    run = papermill("report", tmp_path / out, **{"records": MOMENTUM} | wrong)
    said = [line for line in run.stderr.splitlines() if line.startswith("InputError:")]
    assert run.returncode != 0 and len(said) == 1 and told in said[0]
    assert not (tmp_path / out).exists()
