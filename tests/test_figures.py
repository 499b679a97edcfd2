"Every figure has a notebook, a rule and a picture; the graph redraws what is missing and nothing else"
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from ftcl.record import deciding, defaults, read_record
from ftcl.train import pretrain

ROOT = Path(__file__).parent.parent
RULES = {n: re.findall(r'"([a-z0-9-]+)"', pictures) for n, pictures in re.findall(r'^    "(\w+)": \("[a-z0-9-]*", \[(.*?)\]\)', (ROOT / "Snakefile").read_text(), re.M)}


def snakemake(folder, *command):
    "Standard output and error of a run in `folder`"
    run = subprocess.run([sys.executable, "-m", "snakemake", "--cores", "2", *command], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_every_figure_has_a_notebook_a_rule_and_a_picture():
    assert set(RULES) == {p.stem for p in (ROOT / "nbs" / "figures").glob("*.ipynb")}
    drawn = {p for pictures in RULES.values() for p in pictures}
    assert {p.stem for p in (ROOT / "figures").iterdir()} == drawn
    assert all((ROOT / "figures" / f"{p}.{ending}").stat().st_size > 5000 for p in drawn for ending in ("png", "pdf"))


def test_every_item_of_the_paper_has_a_notebook():
    heads = [json.loads(p.read_text())["cells"][0]["source"] for p in sorted((ROOT / "nbs" / "figures").glob("*.ipynb"))]
    items = [int(n) for head in heads for n in re.findall(r"^> Item (\d+) of the paper's", "".join(head), re.M)]
    assert sorted(items) == list(range(1, 13))


def test_the_graph_redraws_what_is_missing_and_nothing_else(tmp_path):
    for part in ("Snakefile", "nbs/figures/interpolation.ipynb"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    shutil.copytree(ROOT / "results" / "cifar10-momentum", tmp_path / "results" / "cifar10-momentum")
    pictures = [f"figures/{p}.{ending}" for p in RULES["interpolation"] for ending in ("png", "pdf")]
    assert "figure_interpolation" in snakemake(tmp_path, *pictures)
    assert all((tmp_path / p).exists() for p in pictures)
    assert "Nothing to be done" in snakemake(tmp_path, *pictures)
    (tmp_path / pictures[0]).unlink()
    assert "1 of 1 steps" in snakemake(tmp_path, *pictures)
    assert (tmp_path / pictures[0]).exists()


def test_drawing_never_trains():
    planned = snakemake(ROOT, "--dry-run", "--forceall", "figures")
    assert "rule figure_alpha:" in planned and "rule run:" not in planned and "rule vectors:" not in planned


def test_no_run_of_the_graph_is_missing():
    assert "Nothing to be done" in snakemake(ROOT, "--dry-run", "runs")


def test_the_graph_would_make_the_runs_that_lie_there():
    printed = snakemake(ROOT, "--dry-run", "--printshellcmds", "--forcerun", "run", "--", "runs")
    commands = [dict(re.findall(r"-p (\w+) (\S+)", line)) for line in printed.splitlines() if "nbs/pretrain.ipynb" in line]
    assert len(commands) > 100
    for command in commands:
        out, name, _ = (command.pop(n) for n in ("out", "name", "checkpoint_every"))
        recorded = defaults(pretrain) | read_record(ROOT / out / f"{name}.json")["parameters"]
        made = defaults(pretrain) | {n: type(recorded[n])(yaml.safe_load(v)) for n, v in command.items()}
        assert {n: v for n, v in deciding(made).items() if n != "precision"} == {n: v for n, v in deciding(recorded).items() if n != "precision"}, name
