"Run notebooks in a real JupyterLab: curves grow in place while a run trains, then make room"

import json
import os
import re
import shutil
import sys
import time

import nbformat
import psutil
import pytest
from playwright.sync_api import expect, sync_playwright

from test_report import BROWSER
from test_runs import ROOT

SETTINGS = {
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
    "notebook-extension/tracker": dict(windowingMode="none"),  # cells out of sight stay in the page
}
OPTIONS = [
    "--no-browser",
    "--allow-root",
    "--ServerApp.port=0",
    "--IdentityProvider.token=",
    "--LabApp.extension_manager=readonly",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
]
BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # it finds this machine alone
]
IN_VIEW = """cell => {  // whether the last picture and the progress bar can be seen as a whole
    const view = cell.closest('.jp-WindowedPanel-outer').getBoundingClientRect();
    const seen = box => box.top >= view.top - 1 && box.bottom <= view.bottom + 1;
    const bar = cell.querySelector('[data-mime-type$=stderr]');
    const picture = cell.querySelector('img');
    return seen(bar.getBoundingClientRect()) && seen(picture.getBoundingClientRect());
}"""
WATCH = """cell => {
    window.seen = {pictures: [], most: 0, bars: [], prompts: []};
    const add = (list, x) => { if (!list.includes(x)) list.push(x) };
    new MutationObserver(() => {
        const images = [...cell.querySelectorAll('img')];
        const bars = [...cell.querySelectorAll('[data-mime-type$=stderr]')];
        seen.most = Math.max(seen.most, images.length);
        for (const image of images) add(seen.pictures, image.src);
        if (images.length) add(seen.bars, bars.map(b => b.textContent.trim()).join('\\n'));
        if (images.length) add(seen.prompts, cell.querySelector('.jp-InputPrompt').textContent);
    }).observe(cell, {subtree: true, childList: true, attributes: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Folder and address of a JupyterLab server of its own, without a password and without news"
    if not BROWSER:
        pytest.skip("no Chromium here: install the package chromium")
    home = tmp_path_factory.mktemp("lab")
    for name, setting in SETTINGS.items():
        path = home / "SETTINGS" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    own = {f"JUPYTER_{n}_DIR": str(home / n) for n in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{n}_DIR": str(home / n) for n in ("SETTINGS", "WORKSPACES")}
    own |= dict(OMP_NUM_THREADS="1", JUPYTER_CONFIG_PATH=str(ROOT / "profiles" / "jupyterlab"))
    command = [sys.executable, "-m", "jupyterlab", *OPTIONS, f"--ServerApp.root_dir={home}"]
    with open(home / "log", "w") as log:
        server = psutil.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        while not list(home.glob("RUNTIME/jpserver-*-open.html")):
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        port = json.loads(next(home.glob("RUNTIME/jpserver-*.json")).read_text())["port"]
        yield home, f"http://127.0.0.1:{port}/lab"
    finally:
        kernels = server.children(recursive=True) if server.poll() is None else []
        server.terminate()
        for p in psutil.wait_procs([*kernels, server], 10)[1]:
            p.kill()


@pytest.fixture
def page():
    "A page of headless Chromium that finds this machine alone; fails if anything was thrown in it"
    errors = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=BROWSER_OPTIONS)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda e: errors.append(str(e)))
        yield page
        browser.close()
        assert not errors, errors


@pytest.mark.parametrize(
    "name, changes, runs, curves",
    [
        ("pretrain", dict(epochs=4), ["pretrain"], 1),
        ("ablation", dict(epochs=1, n_images=1920, seeds=1), ["none-s0", "posneg-s0"], 2),
    ],
)
def test_curves_grow_in_place(lab, page, name, changes, runs, curves):
    home, address = lab
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    changes |= dict(batch_size=32, queue_size=256, knn_every=0, out=f"runs/{name}")
    cell.source = "\n".join([cell.source, *(f"{n} = {v!r}" for n, v in changes.items())])
    (home / "nbs").mkdir(exist_ok=True)
    nbformat.write(notebook, home / "nbs" / f"{name}.ipynb")

    page.goto(f"{address}/workspaces/{name}/tree/nbs/{name}.ipynb")
    page.get_by_text(re.compile("ipykernel.*Idle")).wait_for()
    # the editor's text has no line ends: the arguments follow after the next line's spaces
    training = page.locator(".jp-CodeCell", has_text=re.compile(r"pretrain\((\*\*|\s)"))
    training.evaluate(WATCH)
    page.get_by_text("Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    training.locator("img").wait_for()
    page.wait_for_timeout(200)  # till the page stands still
    assert training.evaluate(IN_VIEW), "Run All took the curves or the bar out of view"
    last_prompt = page.locator(".jp-CodeCell .jp-InputPrompt").last
    expect(last_prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=120_000)

    seen = page.evaluate("seen")
    assert len(seen["pictures"]) > 1, "the picture never changed"
    assert seen["most"] == 1 and seen["prompts"] == ["[*]:"]
    assert all(bar.count("%|") <= 1 for bar in seen["bars"]), "more than one progress bar"
    for run in runs:
        assert any(re.match(rf"{run}: .*<\d\d:\d\d, ", bar) for bar in seen["bars"]), run
    if len(runs) > 1:
        assert any("run=2 of 2" in bar for bar in seen["bars"]), "which of the runs it is"
    assert training.locator("img").count() == 0
    assert not "".join(training.locator(".jp-OutputArea-output").all_text_contents()).strip()
    assert {p.stem for p in (home / "runs" / name).glob("*.json")} == set(runs)
    assert not (home / "nbs" / "runs").exists()
    assert page.locator(".jp-CodeCell", has_text="plot_scores(").locator("img").count() == curves


@pytest.mark.parametrize("name", ["pretrain", "05_scores"])
def test_opening_changes_nothing(lab, page, name):
    "And neither a box above the title nor a cell of imports meets the reader"
    home, address = lab
    (home / "nbs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "nbs" / f"{name}.ipynb", home / "nbs" / f"opened-{name}.ipynb")
    page.goto(f"{address}/workspaces/opened-{name}/tree/nbs/opened-{name}.ipynb")
    page.get_by_text(re.compile("ipykernel.*Idle")).wait_for()
    page.wait_for_timeout(2000)  # it would be marked a moment later
    assert not page.locator("#jp-main-dock-panel .lm-TabBar-tab.jp-mod-dirty").count()
    assert page.locator(".jp-Notebook .jp-Cell").first.locator("h1").count() == 1
    assert not page.get_by_text("skip_exec").locator("visible=true").count()
