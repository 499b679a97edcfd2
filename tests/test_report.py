"The report in a real browser: it opens from disk, draws, zooms, hides, and logs no error"

import json
import re
import shutil

import nbformat
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs

from ftcl.report import LIMIT, html_report
from ftcl.study import read_runs
from ftcl.visualize import join_scores, seed_band

from test_runs import ROOT, papermill

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
MOMENTUM = ROOT / "results" / "cifar10-momentum"
OVERLAPS = """() => {
    const texts = ['.annotation-text', '.xtitle', '.ytick text', '.xtick text'];
    const found = document.querySelectorAll(texts.map(name => '.curves ' + name).join());
    const legend = [...document.querySelectorAll('#legend span, #legend small')];
    const boxes = [...found, ...legend].map(o => o.getBoundingClientRect()).filter(o => o.width);
    const meet = (a, b) => a.left < b.right && b.left < a.right
        && a.top < b.bottom && b.top < a.bottom;
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b))).length;
}"""
COVERED = """() => {
    const legend = document.querySelector('aside').getBoundingClientRect();
    const places = [...document.querySelectorAll('.curves')].map(o => o.getBoundingClientRect());
    return places.filter(o => o.width && o.right > legend.left).length;
}"""
RANGES = """() => [...document.querySelectorAll('.curves')].filter(o => o.layout)
    .map(o => o.layout.xaxis.range.map(Math.round))"""
SHOWN = """() => [...document.querySelectorAll('.curves')].filter(o => o.data).map(o =>
    [...new Set(o.data.filter(t => t.visible).map(t => t.meta))])"""


@pytest.fixture
def page():
    "A page of headless Chromium without a network; fails if it logged an error or asked for a file"
    if not BROWSER:
        pytest.skip("no Chromium here: install the package chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    errors = []
    asked = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=options)
        page = browser.new_context(offline=True).new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        yield page
        browser.close()
    assert not errors, errors
    other = [url for url in asked if not re.match("file://.*[.]html$|data:", url)]
    assert not other, other


def opened(page, path, width=800):
    "The page, once its curves are drawn"
    page.set_viewport_size(dict(width=width, height=900))
    page.goto(f"file://{path}")
    page.wait_for_selector("#scores .scatterlayer path.js-line")
    return page


def until(page, what):
    "Wait for what an expression says; the page allows Playwright's own way no `eval`"
    for _ in range(100):
        if page.evaluate(what):
            return
        page.wait_for_timeout(100)
    raise AssertionError(what)


VALUES = """[...document.querySelectorAll('#values tr')].map(
    row => [...row.querySelectorAll('th, td')].slice(1).map(cell => cell.textContent)
)"""


def pointed(page, panel=0, at=0.5):
    "What the page says of a point inside of a panel of the first figure"
    box = page.locator("#scores .nsewdrag").nth(panel).bounding_box()
    for shift in (-5, 0):  # two moves: the first one enters
        x = box["x"] + box["width"] * at + shift
        page.mouse.move(x, box["y"] + box["height"] / 2)
    page.wait_for_selector("#values table")
    last, rows = None, page.evaluate(VALUES)
    while rows != last:  # the answer to the first move may still stand there
        page.wait_for_timeout(200)
        last, rows = rows, page.evaluate(VALUES)
    return rows


def dragged(page, panel, left, right):
    "Draw a box over a part of a panel of the first figure"
    box = page.locator("#scores .nsewdrag").nth(panel).bounding_box()
    page.mouse.move(box["x"] + box["width"] * left, box["y"] + box["height"] * 0.2)
    page.mouse.down()
    for part in (0.5, 1):
        x = left + (right - left) * part
        page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * 0.8)
    page.mouse.up()


@pytest.fixture(scope="module")
def study():
    "14 runs of 5 settings: frames by label, table of metrics, accuracy by epoch"
    found, _ = read_runs(MOMENTUM, "*")
    frames = [frame for own in found.values() for frame in own][:14]
    runs = {}
    accuracy = {}
    rows = []
    for number, frame in enumerate(frames):
        label = f"momentum=0.99, mixing=setting{number % 5}"
        seed = number // 5
        values = [30 + number % 5, 40 + number % 5 + seed]
        runs.setdefault(label, []).append(frame)
        ends = pd.DataFrame(dict(step=[311, 623], accuracy=values))
        accuracy.setdefault(label, []).append(ends)
        rows.append(dict(run=label, seed=seed, knn_backbone=float(values[1])))
    return runs, pd.DataFrame(rows).set_index("run"), accuracy


@pytest.fixture(scope="module")
def written(study, tmp_path_factory):
    "The page of these runs"
    runs, metrics, accuracy = study
    path = tmp_path_factory.mktemp("page") / "report.html"
    html_report(runs, path, "five settings", metrics, accuracy=accuracy)
    return path


def test_three_panels_come_first_and_groups_unfold(page, written):
    opened(page, written)
    assert page.title() == "five settings"
    titles = page.locator("#scores .annotation-text").all_text_contents()
    assert [title.split(",")[0] for title in titles] == [
        "positive scores", "negative scores", "accuracy after an epoch",
    ]  # fmt: skip
    assert page.locator("#scores path.js-line").count() == 3 * 5  # a line a setting
    bands = page.locator("#scores path.js-fill").all()
    assert len(bands) == 3 * 5
    assert all("L" in band.get_attribute("d") for band in bands)
    assert page.locator(".curves .main-svg").count() == page.locator("#scores .main-svg").count()
    group = page.locator("details").first
    for times in range(2):
        group.locator("summary").click()
        group.locator(".scatterlayer path.js-line").first.wait_for(state="attached")
        assert group.locator(".curves").is_visible()
        assert group.locator(".js-line").count() == 3 * 5
        group.locator("summary").click()
        assert not group.locator(".curves").is_visible()


def test_every_group_draws(page, written, study):
    opened(page, written)
    columns = set(study[0]["momentum=0.99, mixing=setting0"][0]) - {"step"}
    for group in page.locator("details:has(.curves)").all():
        group.locator("summary").click()
        group.locator(".scatterlayer path.js-line").first.wait_for(state="attached")
    panels = page.locator(".curves .annotation-text").count()
    assert panels == len(columns) + 1  # and the accuracy
    assert page.evaluate(OVERLAPS) == 0


@pytest.mark.parametrize("width", [800, 1200])
def test_nothing_covers_anything(page, written, tmp_path, width):
    opened(page, written, width)
    page.locator("summary").nth(1).click()
    page.locator("details .js-line").first.wait_for(state="attached")
    for scroll in (0, 700):
        page.evaluate(f"scrollTo(0, {scroll})")
        page.wait_for_timeout(100)
        assert page.evaluate("scrollY") == scroll
        assert page.evaluate(OVERLAPS) == 0
        assert page.evaluate(COVERED) == 0
        legend = page.locator("#legend").bounding_box()
        assert legend["y"] >= 0 and legend["y"] + legend["height"] <= 900  # in view
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    runs, metrics = read_runs(MOMENTUM, "*-s0")
    assert len(runs) == 14
    html_report(runs, tmp_path / "single.html", table=metrics)
    opened(page, tmp_path / "single.html", width)
    assert page.evaluate(OVERLAPS) == page.evaluate(COVERED) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#scores path.js-fill").count() == 0  # a single seed has no band
    legend = page.locator("#legend").bounding_box()
    assert legend["y"] + legend["height"] <= 900


def test_the_values_at_the_pointer_are_those_of_all_panels(page, written, study):
    runs, _, accuracy = study
    opened(page, written)
    data = join_scores(runs, 300)
    head, steps, *rows = pointed(page, panel=1)
    assert head == ["", "positive score", "negative score", "accuracy"]
    assert [row[0] for row in rows] == list(runs)
    assert steps[0] == "iteration" and abs(int(steps[1]) - 311) < 10 and steps[3] == "311"
    for label, *values in rows:
        ends = [frame["accuracy"].iloc[0] for frame in accuracy[label]]
        right = [sum(ends) / len(ends)]
        for column, step in (("before_neg_mean", steps[2]), ("before_pos_mean", steps[1])):
            band = seed_band(data[data["run"] == label], column).set_index("step")
            right.insert(0, band.loc[int(step), "mean"])
        assert [float(value) for value in values] == pytest.approx(right, rel=1e-3)
    page.locator("summary").first.click()
    page.locator("details .js-line").first.wait_for(state="attached")
    page.evaluate("scrollTo(0, 0)")
    pointed(page)
    page.locator("details .spikeline").first.wait_for(state="attached")  # in both figures
    page.mouse.move(5, 5)
    page.wait_for_selector("#values", state="hidden")
    until(page, "!document.querySelector('details .spikeline')")


def test_a_zoom_in_one_panel_moves_all(page, written):
    opened(page, written)
    page.locator("summary").nth(0).click()
    page.locator("details .js-line").first.wait_for(state="attached")
    page.evaluate("scrollTo(0, 0)")
    first, second = page.evaluate(RANGES)
    assert first == second and first[0] <= 1 and first[1] >= 620
    dragged(page, 1, 0.25, 0.5)
    until(page, f"({RANGES})().every(r => r[0] > 100 && r[1] < 400)")
    small = page.evaluate(RANGES)
    assert small[0] == small[1]
    page.locator("summary").nth(1).click()  # a group that is drawn later
    until(page, f"({RANGES})().length === 3")
    assert page.evaluate(RANGES)[2] == small[0]
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(400)  # else two drags are two clicks
    box = page.locator("#scores .nsewdrag").nth(2).bounding_box()
    page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    until(page, f"({RANGES})().every(r => r[0] <= 1 && r[1] >= 620)")


def test_the_legend_hides_a_setting_and_shows_one_alone(page, written):
    opened(page, written)
    page.locator("summary").first.click()
    page.locator("details .js-line").first.wait_for(state="attached")
    buttons = page.locator("#legend button")
    assert buttons.count() == 5
    assert page.locator("#legend small").all_text_contents() == ["3 seeds"] * 4 + ["2 seeds"]
    buttons.nth(1).click()
    until(page, f"JSON.stringify(({SHOWN})()) === '[[0,2,3,4],[0,2,3,4]]'")
    assert buttons.nth(1).get_attribute("aria-pressed") == "false"
    assert len(pointed(page)) == 2 + 4
    buttons.nth(1).click()
    until(page, f"JSON.stringify(({SHOWN})()) === '[[0,1,2,3,4],[0,1,2,3,4]]'")
    buttons.nth(3).dblclick()
    until(page, f"JSON.stringify(({SHOWN})()) === '[[3],[3]]'")
    assert page.locator("#scores path.js-line").count() == 3
    page.locator("summary").nth(1).click()  # a group that is drawn later
    until(page, f"JSON.stringify(({SHOWN})()) === '[[3],[3],[3]]'")
    buttons.nth(3).dblclick()
    until(page, f"({SHOWN})().every(shown => shown.length === 5)")


def test_differences_and_verdicts_stand_on_the_page(page, written, study):
    opened(page, written)
    runs, metrics, _ = study
    table = page.locator("table:has-text('95% interval')")
    cells = [row.locator("th, td").all_text_contents() for row in table.locator("tbody tr").all()]
    labels = list(runs)
    assert [row[0] for row in cells] == labels
    assert cells[0] == [labels[0], "", "3", "41.00", "1.00", "", ""]
    assert cells[3] == [labels[3], labels[0], "3", "44.00", "1.00", "+3.00", "+3.00 to +3.00"]
    assert cells[4][:3] == [labels[4], labels[0], "2"]
    lines = page.locator("#verdicts li").all_text_contents()
    assert len(lines) == 14 and all(" at step 623: " in line for line in lines)
    assert page.locator("details:has-text('All runs') tbody tr").count() == len(metrics)


def test_the_page_says_what_a_point_stands_for_and_keeps_its_size(page, written, tmp_path, study):
    plotly = len(get_plotlyjs().encode())
    assert written.stat().st_size - plotly < LIMIT
    opened(page, written)
    assert "mean over 3 iterations" in page.locator("#help").text_content()
    frames = next(iter(study[0].values()))
    columns = [c for c in frames[0] if "_q" in c][:6]
    longer = {}
    for copy in range(100):
        longer[f"copy {copy}"] = [frame[["step", *columns]] + copy for frame in frames]
    path = tmp_path / "long.html"
    for label, own in longer.items():
        longer[label] = [pd.concat([frame] * 8, ignore_index=True) for frame in own]
        longer[label] = [frame.assign(step=range(len(frame))) for frame in longer[label]]
    html_report(longer, path, columns=columns)
    assert path.stat().st_size - plotly < LIMIT
    opened(page, path)
    note = page.locator("#help").text_content()
    steps = int(re.search("mean over ([0-9,]+) iterations", note)[1].replace(",", ""))
    assert steps > 4992 / 300 + 1  # fewer points than usual
    points = page.evaluate("document.querySelector('#scores .js-line').getAttribute('d').length")
    assert points > 100


def test_without_accuracies_the_third_panel_is_the_ratio(page, tmp_path):
    runs, metrics = read_runs(MOMENTUM, "none-momentum0.99-s[01]")
    html_report(runs, tmp_path / "report.html", table=metrics)
    opened(page, tmp_path / "report.html")
    title = page.locator("#scores .annotation-text").nth(2).text_content()
    assert title.startswith("R = (S⁺ - S⁻) / (1 - S⁺)")
    assert "R stands in the third panel" in page.locator("#help").text_content()
    *_, row = pointed(page)
    positive, negative, ratio = map(float, row[1:])
    assert ratio == pytest.approx((positive - negative) / (1 - positive), rel=0.01)


def test_settings_without_labels_stand_beside_measured_ones(page, tmp_path):
    "Their records have no accuracy, and lack the columns of a transformation"
    runs, metrics = read_runs(MOMENTUM, ["none-momentum0.99-s[01]", "posneg-momentum0.99-s[01]"])
    measured, transformed = runs
    early = [column for column in runs[measured][0] if column.startswith("before_")]
    plain = [frame.drop(columns=early) for frame in runs[measured]]
    runs["photos"] = plain
    rows = metrics.loc[[measured]].assign(knn_backbone=float("nan"), measured_on=None)
    table = pd.concat([rows.rename(index={measured: "photos"}), metrics])
    path = tmp_path / "report.html"
    html_report(runs, path, "mixed", table, baseline={transformed: measured, "photos": measured})
    opened(page, path)
    assert page.locator("#scores path.js-line").count() == 3 * 3
    title = page.locator("#scores .annotation-text").nth(2).text_content()
    assert title.startswith("R = (S")  # the one that all of them have
    note = page.locator(".note").first.text_content()
    assert note.endswith("Not measured: photos. ")
    rows = page.locator("h2 ~ .scroll tbody tr").all_text_contents()
    assert len(rows) == 2 and all("nan" not in row.lower() for row in rows)
    assert "nan" not in page.locator("details .scroll").text_content().lower()
    assert page.locator("#verdicts li").count() == 6


LINK = '<a href="https://example.org">%{x}</a>'
STRANGE = [
    "<script>document.title = window.hit = 1</script>",
    "</script><script>window.hit = 1</script>",
    "\"quoted\" 'twice' \\ `${window.hit = 1}` {{}} {0} %{y}",
    LINK,
    "<img src=x onerror='window.hit = 1'>",
    "\"><img src=x onerror='window.hit = 1'><!--",
    "&lt;a href='https://example.org'&gt;x&lt;/a&gt; &#60;b&#62; &amp;amp;",
    "<b>bold</b><br>x<sub>2</sub> $x$ __html__ javascript:hit()",
    "größe 日本語 \u202e אב 🙂",
    "a\nb\tc \x00",
    "long " + "x" * 300,
    "long " + "x" * 150 + "y" + "x" * 150,  # differs in the middle alone
]
TAGS = ("script[src]", "img", "a", "[onerror]", "b b", "sub", "iframe")


def strange_study(columns):
    "Runs, table and accuracies in which every name is a strange one"
    runs, metrics = read_runs(MOMENTUM, "none-momentum0.99-s[01]")
    (frames,) = runs.values()
    names = dict(zip(frames[0].columns[2:], columns))
    frames = [frame.rename(columns=names) for frame in frames]
    runs = dict.fromkeys(STRANGE, frames)
    table = pd.concat([metrics] * len(STRANGE))
    table.index = [label for label in STRANGE for _ in range(2)]
    table.index.name = STRANGE[0]
    table.columns.name = STRANGE[4]
    table = table.assign(**{STRANGE[1]: STRANGE[4], STRANGE[5]: STRANGE[3]})
    ends = pd.DataFrame(dict(step=[311, 623], accuracy=[1.0, 2.0]))
    return runs, table, {label: [ends, ends] for label in STRANGE}


@pytest.mark.parametrize("width", [800, 1200])
def test_names_are_text_whatever_they_hold(page, tmp_path, width):
    "In title, legend, pointer, panel titles and tables; nothing of them runs or overflows"
    runs, table, accuracy = strange_study(STRANGE)
    path = tmp_path / "report.html"
    for title in STRANGE[:6] if width == 800 else ():
        html_report({"a": runs[LINK]}, path, title, None, STRANGE[:1])
        opened(page, path, width)
        assert page.evaluate("window.hit") is None
        assert page.title() == page.locator("h1").text_content() == title
    html_report(runs, path, "title", table, STRANGE)
    opened(page, path, width)
    titles = page.locator("#scores .annotation-text").all_text_contents()
    for name, shown in zip(STRANGE[:9], titles):
        assert shown.split() == name.split()
    legend = page.locator("#legend span").all_text_contents()
    assert max(map(len, legend)) <= 60
    assert legend[:6] == STRANGE[:6]
    cut = [label for label in STRANGE[:9] if len(label) > 60]
    assert [cell for cell in legend[:9] if cell in STRANGE] == [
        label for label in STRANGE[:9] if label not in cut
    ]
    assert "..." in legend[10] and "..." in legend[11]
    head, _, *rows = pointed(page)
    assert [row[0] for row in rows] == legend and head[1] == STRANGE[0]
    cells = page.locator("table:has-text('95% interval') tbody th").all_text_contents()
    assert cells[:8] == STRANGE[:8] and cells[10] == STRANGE[10]  # whole
    assert page.locator("summary:has-text('All runs')").count() == 1
    page.locator("summary").last.click()
    every = page.locator("details th, details td").all_text_contents()
    for name in (STRANGE[0], STRANGE[1], STRANGE[3], STRANGE[4], STRANGE[5]):
        assert name in every
    for tag in TAGS:
        assert page.locator(tag).count() == 0, tag
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == page.evaluate(COVERED) == 0


def test_strange_names_in_groups_and_as_accuracy_are_text(page, tmp_path):
    runs, table, accuracy = strange_study([])
    means = ["pos_mean", "neg_mean", "before_pos_mean", "before_neg_mean"]
    frames = [frame[["step", *means]] for frame in runs[LINK]]
    frames = [frame.assign(**dict.fromkeys(STRANGE, 1.0)) for frame in frames]
    table = table.rename(columns={"knn_backbone": LINK})
    path = tmp_path / "report.html"
    html_report(dict.fromkeys(STRANGE, frames), path, LINK, table, (), accuracy, LINK, LINK)
    opened(page, path)
    assert LINK in page.locator("#scores .annotation-text").nth(2).text_content()
    assert f"Differences in {LINK}" in page.locator("h2").first.text_content()
    page.locator("summary:has-text('Other columns')").click()
    page.locator("details .js-line").first.wait_for(state="attached")
    titles = page.locator("details .annotation-text").all_text_contents()
    assert set(STRANGE[:8]) <= set(titles)
    places = page.locator("details .nsewdrag")
    for number in range(4):
        places.nth(number).hover(force=True)
        page.wait_for_timeout(150)
        name = page.locator("#values th").nth(2).text_content()
        start, _, end = name.partition("...")
        assert titles[number].startswith(start) and titles[number].endswith(end)
    for tag in TAGS:
        assert page.locator(tag).count() == 0, tag
    assert page.evaluate("window.hit") is None
    worse = table.assign(**{LINK: [float("nan")] + [1.0] * (len(table) - 1)})
    html_report(runs, path, LINK, worse, (), accuracy, LINK, LINK)
    opened(page, path)  # why there is no comparison has the name of the run
    assert f"not compared: {LINK} of '<script>" in page.locator("body").text_content()
    for tag in TAGS:
        assert page.locator(tag).count() == 0, tag


def test_the_notebook_makes_the_page(page, tmp_path):
    out = tmp_path / "page.html"
    names = "none-momentum0.99-s[01]"
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
        ("x.html", {"baseline": "no"}, "there is no run 'no' to compare with, only "),
        ("x.html", {"metric": "knn"}, "there is no metric 'knn'."),
    ],
)
def test_a_mistake_is_one_sentence_and_no_page(tmp_path, out, wrong, told):
    run = papermill("report", tmp_path / out, **{"records": MOMENTUM} | wrong)
    said = [line for line in run.stderr.splitlines() if line.startswith("InputError:")]
    assert run.returncode != 0 and len(said) == 1 and told in said[0]
    assert not (tmp_path / out).exists()
