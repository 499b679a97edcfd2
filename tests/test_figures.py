"Every figure has a notebook, a rule and a picture; the graph redraws what is missing, no more"

import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from ftcl.method import as_published
from ftcl.record import defaults, difference, read_record
from ftcl.study import read_studies
from ftcl.train import pretrain

ROOT = Path(__file__).parent.parent
FIGURES = sorted((ROOT / "nbs" / "figures").glob("[!.]*.ipynb"))
STUDIES = read_studies(ROOT / "studies.yaml")


def snakemake(folder, *command):
    "Standard output and error of a run in `folder`"
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *command]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
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


def test_the_graph_redraws_what_is_missing_and_nothing_else(tmp_path):
    for part in ("Snakefile", "studies.yaml", "nbs/figures/interpolation.ipynb"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    records = Path("results", "cifar10-momentum")
    shutil.copytree(ROOT / records, tmp_path / records)
    files = pictures()["interpolation"]
    assert "figure_interpolation" in snakemake(tmp_path, *files)
    assert all((tmp_path / file).exists() for file in files)
    assert "Nothing to be done" in snakemake(tmp_path, *files)
    (tmp_path / files[0]).unlink()
    assert "1 of 1 steps" in snakemake(tmp_path, *files)
    assert (tmp_path / files[0]).exists()


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
