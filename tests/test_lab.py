"Run notebooks in a real JupyterLab: curves grow in place while a run trains, then make room"

import json
import os
import re
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
    own |= dict(OMP_NUM_THREADS="1")
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
    changes |= dict(batch_size=32, queue_size=256, knn_every=0, out="runs")
    cell.source = "\n".join([cell.source, *(f"{n} = {v!r}" for n, v in changes.items())])
    nbformat.write(notebook, home / f"{name}.ipynb")

    page.goto(f"{address}/workspaces/{name}/tree/{name}.ipynb")
    page.get_by_text(re.compile("ipykernel.*Idle")).wait_for()
    # the editor's text has no line ends: the arguments follow after the next line's spaces
    training = page.locator(".jp-CodeCell", has_text=re.compile(r"pretrain\((\*\*|\s)"))
    training.evaluate(WATCH)
    page.get_by_text("Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    last_prompt = page.locator(".jp-CodeCell .jp-InputPrompt").last
    expect(last_prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=120_000)

    seen = page.evaluate("seen")
    assert len(seen["pictures"]) > 1, "the picture never changed"
    assert seen["most"] == 1 and seen["prompts"] == ["[*]:"]
    assert all(bar.count("%|") <= 1 for bar in seen["bars"]), "more than one progress bar"
    for run in runs:
        assert any(re.match(rf"{run}: .*<\d\d:\d\d, ", bar) for bar in seen["bars"]), run
    assert training.locator("img").count() == 0
    assert not training.locator(".jp-OutputArea-output").all_text_contents()[-1].strip()
    assert page.locator(".jp-CodeCell", has_text="plot_scores(").locator("img").count() == curves
