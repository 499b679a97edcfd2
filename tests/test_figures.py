"Every figure has a notebook, a rule and a picture; the graph redraws what is missing, no more"

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from ftcl.method import as_published
from ftcl.record import defaults, difference, read_record
from ftcl.study import read_studies
from ftcl.train import pretrain

ROOT = Path(__file__).parent.parent
FIGURES = sorted((ROOT / "nbs" / "figures").glob("[!.]*.ipynb"))
STUDIES = read_studies(ROOT / "studies.yaml")


def started(folder, *command, **environment):
    "A run of snakemake in `folder` that has ended, well or not"
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *command]
    environment = os.environ | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def snakemake(folder, *command, **environment):
    "Standard output and error of a run in `folder`"
    run = started(folder, *command, **environment)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@cache
def pictures():
    "Notebook: the files that its rule makes, as snakemake tells them"
    made = {}
    for line in snakemake(ROOT, "--summary", "figures").splitlines():
        columns = line.split("\t")
        if columns[0].startswith("figures/"):
            notebook = columns[2].removeprefix("figure_")
            made.setdefault(notebook, []).append(columns[0])
    return made


def test_every_figure_has_a_notebook_a_rule_and_a_picture():
    assert set(pictures()) == {path.stem for path in FIGURES}
    drawn = {ROOT / file for files in pictures().values() for file in files}
    assert set((ROOT / "figures").iterdir()) == drawn
    names = {path.with_suffix("") for path in drawn}
    assert drawn == {name.with_suffix(ending) for name in names for ending in (".png", ".pdf")}
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_every_item_of_the_paper_has_a_notebook():
    items = []
    for path in FIGURES:
        head = "".join(json.loads(path.read_text())["cells"][0]["source"])
        items += map(int, re.findall(r"^> Item (\d+) of the paper's", head, re.M))
    assert sorted(items) == list(range(1, 13))


DRAWN = ROOT / "nbs" / "figures" / "interpolation.ipynb"  # takes few seconds, saves two pictures


def tree(folder):
    "What one figure needs of the project, in a folder of its own"
    for part in ("Snakefile", "studies.yaml", DRAWN.relative_to(ROOT)):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, folder / part)
    records = Path("results", "cifar10-momentum")
    shutil.copytree(ROOT / records, folder / records)
    (folder / "figures").mkdir()
    return folder


def test_the_graph_redraws_what_is_missing_and_nothing_else(tmp_path):
    tree(tmp_path)
    files = pictures()["interpolation"]
    assert "figure_interpolation" in snakemake(tmp_path, *files)
    assert all((tmp_path / file).exists() for file in files)
    assert "Nothing to be done" in snakemake(tmp_path, *files)
    (tmp_path / files[0]).unlink()
    assert "1 of 1 steps" in snakemake(tmp_path, *files)
    assert (tmp_path / files[0]).exists()


def drawn(folder, seed, noise):
    "name: bytes of each picture, with another order of sets, and another last digit of all scores"
    tree(folder)
    rng = np.random.default_rng(int(seed))
    for path in (folder / "results" / "cifar10-momentum").glob("*.parquet"):
        frame = pd.read_parquet(path)
        frame.attrs = {}  # the checksum is that of the old numbers
        scores = frame.columns.difference(["step"])
        frame[scores] *= 1 + noise * rng.standard_normal((len(frame), len(scores)))
        frame.to_parquet(path)
    snakemake(folder, "figure_interpolation", PYTHONHASHSEED=seed)
    return {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}


def test_a_last_digit_changes_no_byte_of_a_picture(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = drawn(tmp_path / "a", "1", 0)
    assert {f"figures/{name}" for name in plain} == set(pictures()["interpolation"])
    other = drawn(tmp_path / "b", "2", 1e-9)
    assert [name for name in plain if plain[name] != other[name]] == []


KILL = """
import os, signal
from pathlib import Path
files = [str(path) for path in Path("figures").iterdir() if path.stat().st_size]
Path("seen").write_text(" ".join(files))
os.kill(os.getppid(), signal.SIGKILL)
os._exit(1)
"""


def test_a_killed_drawing_leaves_the_old_pictures_and_is_drawn_anew(tmp_path):
    tree(tmp_path)
    files = pictures()["interpolation"]
    for file in files:
        (tmp_path / file).write_text("old")
    notebook = tmp_path / DRAWN.relative_to(ROOT)
    cut = json.loads(notebook.read_text())
    (first, _) = [i for i, o in enumerate(cut["cells"]) if "save_figure(" in "".join(o["source"])]
    killer = dict(cut["cells"][first], source=KILL, id="killer", outputs=[])
    cut["cells"].insert(first + 1, killer)
    notebook.write_text(json.dumps(cut))
    assert started(tmp_path, "figure_interpolation").returncode != 0
    assert set((tmp_path / "seen").read_text().split()) == set(files)
    assert {(tmp_path / file).read_text() for file in files} == {"old"}
    shutil.copy2(DRAWN, notebook)  # older than the pictures
    assert "1 of 1 steps" in snakemake(tmp_path, "figure_interpolation")
    assert all((tmp_path / file).stat().st_size > 5000 for file in files)
    assert "Nothing to be done" in snakemake(tmp_path, "figure_interpolation")


def test_the_graph_asks_of_each_figure_whether_it_was_drawn_to_its_end():
    planned = snakemake(ROOT, "--dry-run", "--forceall", "figures")
    asked = re.findall(r"rule figures:\n    input: (.*)", planned)
    flags = {part.strip() for part in asked[0].split(",") if part.endswith(".drawn")}
    assert flags == {f"runs/figures/{path.stem}.drawn" for path in FIGURES}


def test_drawing_never_trains():
    planned = snakemake(ROOT, "--dry-run", "--forceall", "figures")
    assert "rule figure_alpha:" in planned
    assert "rule run:" not in planned and "rule vectors:" not in planned


def unfinished():
    "Studies that say of themselves that runs are still to be made"
    studies = yaml.safe_load((ROOT / "studies.yaml").read_text())
    return {study for study, about in studies.items() if about.get("unfinished")}


def test_no_run_of_a_finished_study_is_missing():
    planned = snakemake(ROOT, "--dry-run", "runs")
    missing = set(re.findall(r"output: results/([^/]+)/", planned))
    assert missing <= unfinished()
    assert missing or "Nothing to be done" in planned


@pytest.mark.parametrize("study", STUDIES)
def test_the_graph_would_make_the_runs_that_lie_there(study):
    records = {path.stem: read_record(path) for path in (ROOT / "results" / study).glob("*.json")}
    assert set(records) <= set(STUDIES[study])
    assert set(records) == set(STUDIES[study]) or study in unfinished()
    for name, record in records.items():
        asked = as_published(defaults(pretrain) | STUDIES[study][name])
        assert not difference(asked, record["parameters"], pretrain), name


def given(command):
    "The parameters of a papermill command: name -> value"
    words = shlex.split(command)
    parameters = {}
    for i, word in enumerate(words):
        if word == "-p":
            name, value = words[i + 1 : i + 3]
            parameters[name] = yaml.safe_load(value)
    return parameters


def test_the_commands_of_the_graph_say_what_the_studies_say():
    options = ["--dry-run", "--printshellcmds", "--forcerun", "run", "--", "runs"]
    printed = snakemake(ROOT, *options).splitlines()
    commands = [given(line) for line in printed if "nbs/pretrain.ipynb" in line]
    by_path = {(p["out"], p["name"]): p for p in commands}
    wanted = {(p["out"], p["name"]): p for runs in STUDIES.values() for p in runs.values()}
    assert by_path == wanted and len(commands) == len(wanted) > 100
