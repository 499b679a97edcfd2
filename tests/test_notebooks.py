"What is committed: notebooks, generated files, and files that say the same thing"
import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from ftcl import record, train

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))
RUN = {"pretrain": train.pretrain, "ablation": train.pretrain, "evaluate": train.evaluate_checkpoint}


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def parameters(name):
    "The cell tagged `parameters` of a run notebook: name -> value"
    tagged = [c for c in cells(ROOT / "nbs" / f"{name}.ipynb") if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{name}.ipynb needs exactly one cell tagged parameters"
    return {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(tagged[0].source).body}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_holds_what_a_reader_wants(path):
    assert path.stat().st_size < 200_000
    assert nbformat.read(path, 4).metadata.kernelspec.name == "python3"
    outputs = [o for c in cells(path) for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(?<![\w.~])/(home|root|tmp|work|Users)/", path.read_text())


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[0].isdigit()], ids=lambda p: p.stem)
def test_a_chapter_stays_small(path):
    assert len(cells(path)) <= 60
    for c in cells(path):
        long = [line for line in c.source.splitlines() if len(line) > 120 and c.source.startswith("#| export")]
        assert not long


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[0].isdigit()], ids=lambda p: p.stem)
def test_a_chapter_imports_smaller_numbers_only(path):
    number = {p.stem[3:]: p.stem[:2] for p in NOTEBOOKS if p.stem[0].isdigit()}
    used = {m for c in cells(path) for m in re.findall(r"^from ftcl\.(\w+) import", c.source, re.M)}
    assert all(number[m] < path.stem[:2] for m in used)


@pytest.mark.parametrize("path", sorted((ROOT / "ftcl").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_a_function_stays_short(path):
    source = path.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(source))):
        if isinstance(node, ast.FunctionDef):
            body = [line for line in source[node.body[0].lineno - 1 : node.end_lineno] if line.strip()]
            assert len(body) <= 21, f"{node.name}: {len(body)} lines"  # 20 and the docstring


@pytest.mark.parametrize("name", RUN)
def test_parameters_are_those_of_the_function(name):
    given, known = parameters(name), record.defaults(RUN[name])
    known |= {"seeds": 3} if name == "ablation" else {}
    left_out = {"pretrain": {"progress", "stop_after"}, "evaluate": set(), "ablation": {"progress", "stop_after", "name"}}[name]
    assert set(given) == set(known) - left_out
    assert {n: type(v) for n, v in given.items()} == {n: type(known[n]) for n in given}
    own = {"pretrain": {"mixing", "epochs", "knn_every"}, "ablation": {"mixing", "epochs", "knn_every", "out"}, "evaluate": {"linear_epochs"}}[name]
    assert {n for n, v in given.items() if v != known[n]} <= own


@pytest.mark.parametrize("name", RUN)
def test_papermill_explains_every_parameter(name):
    command = [sys.executable, "-m", "papermill", "--help-notebook", f"nbs/{name}.ipynb"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "Unable to parse" not in out.stdout + out.stderr
    for parameter in parameters(name):
        assert re.search(rf"^  {parameter}: .*\n? +\S", out.stdout, re.M), parameter


def test_environment_and_settings_ask_for_the_same():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    asked = {*ini["DEFAULT"]["requirements"].split(), *ini["DEFAULT"]["dev_requirements"].split()}
    listed = re.findall(r"^      - ([a-z]\S+)(.*)$", (ROOT / "environment.yml").read_text(), re.M)
    assert asked == {name for name, _ in listed}
    assert all(reason.strip().startswith("#") for _, reason in listed), "a reason stands beside each dependency"


def test_constraints_satisfy_the_ranges():
    from packaging.requirements import Requirement

    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {r.name.lower().replace("_", "-"): next(iter(r.specifier)).version for r in map(Requirement, (line for line in lines if line and line[0] != "#"))}
    for r in map(Requirement, (ini["DEFAULT"]["requirements"] + " " + ini["DEFAULT"]["dev_requirements"]).split()):
        assert pinned[r.name] in r.specifier, r


def test_readme_is_made_from_the_index(tmp_path):
    made = subprocess.run(["make", "-s", "readme", f"README={tmp_path}/README"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_the_loop_in_the_readme_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    q, k, keys = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 16))
    monkeypatch.chdir(tmp_path)
    exec(code, dict(q=q, k=k, keys=keys, step=0))
    assert len(pd.read_parquet("scores.parquet")) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.json")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_record_is_complete(path):
    run = record.read_record(path)
    assert run["git_revision"] and not run["git_revision"].endswith("+"), "made with uncommitted code"
    trained = {"seconds", "measured_on", "n_train", "n_test"} if "steps" in run else set()
    assert {"parameters", "metrics", "device", "versions"} | trained <= set(run)
    assert run["name"] == path.stem and ("steps" not in run or path.with_suffix(".parquet").exists())


def test_there_are_records():
    assert list((ROOT / "results").rglob("*.json"))
