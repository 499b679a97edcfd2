"What is committed: notebooks, generated files, and files that say the same thing"

import ast
import importlib
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import get_args

import nbformat
import pandas as pd
import pytest
import torch
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from packaging.requirements import Requirement

from ftcl import detection, record, train

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith("."))
CHAPTERS = [p for p in NOTEBOOKS if p.stem[0].isdigit() or p.parent.name == "methods"]
MODULES = sorted(p for p in (ROOT / "ftcl").rglob("*.py") if not p.name.startswith("_"))
RUN = dict(
    pretrain=train.pretrain, ablation=train.pretrain, evaluate=train.evaluate_checkpoint,
    transfer=detection.transfer,
)  # fmt: skip


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def parameter_lines(name):
    "Lines of the cell tagged `parameters` of a run notebook"
    path = ROOT / "nbs" / f"{name}.ipynb"
    tagged = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{name}.ipynb needs exactly one cell tagged parameters"
    return tagged[0].source.splitlines()


def parameters(name):
    "Parameters of a run notebook: name -> value"
    statements = ast.parse("\n".join(parameter_lines(name))).body
    return {s.target.id: ast.literal_eval(s.value) for s in statements}


def written_types(name):
    "Their annotations, as `float or str`"
    statements = ast.parse("\n".join(parameter_lines(name))).body
    return {s.target.id: ast.unparse(s.annotation).strip("'") for s in statements}


def type_in_words(kind):
    "As papermill can read it: `float or str`, for it reads no `|`"
    return " or ".join(one.__name__ for one in get_args(kind) or [kind])


def comments(name):
    "Their comments"
    lines = "\n".join(parameter_lines(name))
    return dict(re.findall(r"^(\w+): .*? = .*?  # (.*)$", lines, re.M))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_holds_what_a_reader_wants(path):
    assert path.stat().st_size < 200_000
    assert nbformat.read(path, 4).metadata.kernelspec.name == "python3"
    outputs = [o for c in cells(path) for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    lines = [line for c in cells(path) for line in c.source.splitlines()]
    assert not [line for line in lines if len(line) > 100]
    text = path.read_text()
    assert not re.search(r"(?<![\w.~])/(home|root|tmp|work|Users)/", text)
    assert not re.search(r"\bT_[0-9a-f]{5}\b", text)  # a table's random name: `set_uuid` fixes one


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_stays_small(path):
    assert len(cells(path)) <= 60


@pytest.mark.parametrize("path", sorted((ROOT / "ftcl").rglob("*.py")), ids=lambda p: p.stem)
def test_exported_lines_fit(path):
    "A docstring's quotes count too; nbdev alone decides how `__all__` and its index are wrapped"
    if path.name != "_modidx.py":
        code = re.sub(r"^__all__ = \[.*?\]$", "", path.read_text(), flags=re.S | re.M)
        assert not [line for line in code.splitlines() if len(line) > 100]


def number(path):
    "Place of a chapter; a method comes after the contract that it keeps"
    return "09" if path.parent.name == "methods" else path.stem.split("_")[0]


@pytest.mark.parametrize("path", [p for p in CHAPTERS if p.stem != "all"], ids=lambda p: p.stem)
def test_a_chapter_imports_smaller_numbers_only(path):
    "But for `methods/all`, which imports every method and nothing else"
    places = {p.stem.removeprefix(f"{number(p)}_"): number(p) for p in CHAPTERS}
    source = "\n".join(c.source for c in cells(path))
    for module in set(re.findall(r"^from ftcl\.([\w.]+) import", source, re.M)):
        assert not module.startswith("methods."), "no chapter knows a single method"
        below = places[module] < number(path)
        assert below or (path.parent.name == "methods" and places[module] == "09"), module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_notebook_imports_a_private_name_of_a_chapter(path):
    for c in cells(path):
        for names in re.findall(r"^\s*from ftcl\.[\w.]+ import (.*)$", c.source, re.M):
            assert not re.findall(r"(?:^|[ (,])_\w+", names), names


def test_the_recorder_knows_no_plotting_library():
    code = "import ftcl.scores, sys; print({'matplotlib', 'seaborn', 'plotly'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stdout + run.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_code_is_plain(path):
    "One statement a line, short functions, no lambda with a name"
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            lines = [statement.lineno for statement in block]
            assert len(lines) == len(set(lines)), f"line {lines[0]}: two statements"
            if not isinstance(node, ast.Module) and block:
                assert block[0].lineno > node.lineno, f"line {node.lineno}: a block on its own line"
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            body = node.body[1:] if documented else node.body
            first = body[0].lineno if body else node.end_lineno + 1
            lines = path.read_text().splitlines()[first - 1 : node.end_lineno]
            lines = [line for line in lines if line.strip()]
            assert len(lines) <= 30, f"{node.name}: {len(lines)} lines"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            raise AssertionError(f"line {node.lineno}: a lambda with a name")


def test_few_assignments_unpack():
    "Tuple assignments are under 3% of the library's lines"
    lines = 0
    tuples = 0
    for path in MODULES:
        source = path.read_text()
        lines += sum(bool(o.strip()) and not o.startswith("#") for o in source.splitlines())
        assigned = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assign)]
        tuples += sum(isinstance(n.targets[0], ast.Tuple) for n in assigned)
    assert tuples < 0.03 * lines, (tuples, lines)


@pytest.mark.parametrize("name", RUN)
def test_parameters_are_those_of_the_function(name):
    "Names, types, defaults but for a few, and the comments are those of the signature"
    given = parameters(name)
    known = record.declared(RUN[name])
    added = {"seeds"} if name == "ablation" else set()
    left_out = dict(
        pretrain={"progress", "stop_after"},
        ablation={"progress", "stop_after", "name"},
        evaluate=set(),
        transfer={"progress"},
    )[name]
    own_default = dict(
        pretrain={"mixing", "epochs", "knn_every"},
        ablation={"mixing", "epochs", "batch_size", "knn_every", "out"},
        evaluate={"linear_epochs"},
        transfer=set(),
    )[name]
    assert set(given) - added == set(known) - left_out
    assert [n for n in given if n not in added] == [n for n in known if n in given]
    said = comments(name)
    types = written_types(name)
    for parameter in set(given) - added:
        kind, default, about = known[parameter]
        assert type(given[parameter]) in (get_args(kind) or [kind]), parameter
        assert given[parameter] == default or parameter in own_default, parameter
        assert types[parameter] == type_in_words(kind), parameter
        assert said[parameter] == about.help, parameter


@pytest.mark.parametrize(
    "name", ["vectors", "directions", "report", "benchmark", "scaling", "reliability"]
)
def test_parameters_of_a_notebook_alone_are_declared_in_it(name):
    "By one function, whose annotated signature says names, defaults and comments"
    source = "\n".join(c.source for c in cells(ROOT / "nbs" / f"{name}.ipynb"))
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    declaring = [f for f in functions if f.args.args and ast.unparse(f).count("Annotated[")]
    assert len(declaring) == 1
    arguments = declaring[0].args
    declared = {}
    for argument, default in zip(arguments.args, arguments.defaults, strict=True):
        kind, about = argument.annotation.slice.elts  # Annotated[type, Param(help, ...)]
        help = ast.literal_eval(about.args[0])
        declared[argument.arg] = (ast.unparse(kind), ast.literal_eval(default), help)
    types = written_types(name)
    said = comments(name)
    given = {n: (types[n], value, said[n]) for n, value in parameters(name).items()}
    assert given == declared


def test_memory_is_kept_alike_everywhere():
    "The two settings of the C library stand in three files"
    files = ["Makefile", "Snakefile", "nbs/benchmark.ipynb"]
    for variable in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        for file in files:
            values = re.findall(rf"{variable}\W+(\d+)", (ROOT / file).read_text())
            assert set(values) == {str(2**30)}, (file, variable, values)


def test_a_run_keeps_every_parameter_that_it_was_given():
    "`pretrain` hands its parameters on by name; the record must not lose one"
    source = (ROOT / "ftcl" / "train.py").read_text()
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    for f in functions:
        if f.name not in ("pretrain", "evaluate_checkpoint"):
            continue
        calls = [n for n in ast.walk(f) if isinstance(n, ast.Call)]
        call = next(n for n in calls if getattr(n.func, "id", "") == "dict")
        handed_on = {k.arg: k.value.id for k in call.keywords}
        assert handed_on == {a.arg: a.arg for a in f.args.args}, f.name


RUN_NOTEBOOKS = [*RUN, "vectors", "directions", "report", "benchmark", "scaling", "reliability"]


@pytest.mark.parametrize("name", RUN_NOTEBOOKS)
def test_papermill_explains_every_parameter(name):
    "With its type: papermill says `Unknown type` for what carries none"
    command = [sys.executable, "-m", "papermill", "--help-notebook", f"nbs/{name}.ipynb"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "Unable to parse" not in out.stdout + out.stderr
    for parameter, kind in written_types(name).items():
        explained = rf"^  {parameter}: {kind} \(default .*\)\s+\S"
        assert re.search(explained, out.stdout, re.M), parameter


def test_a_log_and_an_executed_notebook_keep_what_was_said(tmp_path):
    "`make ablation` into files: what stood there stays, bars pass through; none is in the notebook"
    (tmp_path / "bin").mkdir()
    for name, module in (("papermill", "-m papermill"), ("python", "")):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        program.chmod(0o755)
    (tmp_path / "ready").touch()
    small = "-p seeds 1 -p epochs 1 -p n_images 640 -p batch_size 64 -p queue_size 64"
    small += " -p knn_every 0"
    made = ["make", "-s", "-o", f"{tmp_path}/ready", "ablation", f"VENV={tmp_path}"]
    made += [f"RUNS={tmp_path}/runs", f"ABLATION={small}"]
    log = tmp_path / "log"
    log.write_text("an earlier line\n")
    with open(log, "a") as both:
        run = subprocess.run(made, cwd=ROOT, stdout=both, stderr=both)
    said = log.read_text()
    assert run.returncode == 0, said
    assert said.startswith("an earlier line\n") and "Open " in said
    assert re.search(r"\bbaseline +setting +difference +low +high\n", said)
    assert re.search(r"\nkNN accuracy, backbone \(%\) +1( +(-?\d+\.\d|NaN)){5}\n", said)
    assert re.search(r"posneg-s0: .*<\d\d:\d\d, ", said), "a bar with the time that is left"
    executed = nbformat.read(tmp_path / "runs" / "ablation.ipynb", 4)
    outputs = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]
    assert outputs and not [o for o in outputs if o.output_type == "stream"]


@pytest.mark.parametrize("name", RUN_NOTEBOOKS)
def test_nbdev_leaves_a_run_notebook_out_and_a_reader_does_not_see_why(name):
    "`nbdev_test` reads `skip_exec` from a comment; a raw cell would be a box above the title"
    path = ROOT / "nbs" / f"{name}.ipynb"
    assert NBProcessor(path, procs=FrontmatterProc, process=True).nb.frontmatter_["skip_exec"]
    first, *others = nbformat.read(path, 4).cells
    assert first.source.startswith("# ") and not cells(path, "raw")
    shown = re.sub(r"<!--.*?-->", "", first.source, flags=re.S)
    assert "skip_exec" not in shown + "".join(c.source for c in others)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_prose_comes_before_imports(path):
    "Title and line, then why; only then a cell of imports, of settings or of parameters"
    before = []
    for c in nbformat.read(path, 4).cells:
        if c.cell_type == "code" and not re.match(r"#\| default_exp", c.source):
            break
        before += [c.source] if c.cell_type == "markdown" else []
    text = re.sub(r"<!--.*?-->", "", "\n\n".join(before), flags=re.S)
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if p.strip() and p[0] not in "#>"]
    assert before and before[0].startswith("# ") and paragraphs


def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def test_environment_and_settings_ask_for_the_same():
    ini = settings()
    asked = {*ini["requirements"].split(), *ini["dev_requirements"].split()}
    lines = (ROOT / "environment.yml").read_text()
    listed = re.findall(r"^      - ([a-z]\S+)(.*)$", lines, re.M)
    assert asked == {name for name, _ in listed}
    for name, reason in listed:
        assert reason.strip().startswith("#"), f"a reason stands beside each dependency: {name}"


def test_constraints_satisfy_the_ranges():
    ini = settings()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            version = next(iter(requirement.specifier)).version
            pinned[requirement.name.lower().replace("_", "-")] = version
    for text in (ini["requirements"] + " " + ini["dev_requirements"]).split():
        requirement = Requirement(text)
        assert pinned[requirement.name] in requirement.specifier, requirement


def test_every_module_has_its_notebook():
    "And none is left of a room that was moved"
    exports = set()
    for path in CHAPTERS:
        source = "\n".join(c.source for c in cells(path))
        exports |= set(re.findall(r"#\| default_exp ([\w.]+)", source))  # some are for reading
    found = {".".join(p.relative_to(ROOT / "ftcl").with_suffix("").parts) for p in MODULES}
    assert found == exports
    for module in sorted(found):
        importlib.import_module(f"ftcl.{module}")


def test_readme_is_made_from_the_index(tmp_path):
    command = ["make", "-s", "readme", f"README={tmp_path}/README"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_the_loop_in_the_readme_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    q, k, keys = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 16))
    monkeypatch.chdir(tmp_path)
    exec(code, dict(q=q, k=k, keys=keys, step=0))
    assert len(pd.read_parquet("scores.parquet")) == 1


def prose(markdown):
    "Sentences of a page: no code, no tables, of a link its text alone"
    text = re.sub(r"```.*?```|^\|.*?$|^#.*?$|<[^>]*>", " ", markdown, flags=re.S | re.M)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|^- ", text, flags=re.M)
    return [s for p in paragraphs for s in re.split(r"(?<=[.!?:])\s+", p.strip()) if s]


def test_the_readme_is_short_and_plain():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    found = prose(text)
    assert len(found) > 20
    for sentence in found:
        assert len(sentence.split()) <= 30, sentence
        outside = re.sub(r"\([^)]*\)", "", sentence)  # an interval stands in brackets
        numbers = re.findall(r"(?<!\w)\d[\d.,]*(?!\w)", outside)  # of no name, as 00_core
        assert len(numbers) <= 3, sentence


RECORDS = sorted((ROOT / "results").rglob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_record_is_complete(path):
    run = record.read_record(path)
    revision = run["git_revision"]
    assert revision and not revision.endswith("+"), "made with uncommitted code"
    training = "steps" in run and "seconds" in run
    trained = {"seconds", "measured_on", "n_train", "n_test"} if training else set()
    assert {"parameters", "metrics", "device", "versions"} | trained <= set(run)
    assert run["name"] == path.stem
    assert not re.search(r'"[/~]', path.read_text()), "a path of one machine"
    if training:
        assert path.with_suffix(".parquet").exists()
        assert run["parameters"]["precision"] in ("bf16", "fp32")


def test_there_are_records():
    assert RECORDS


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda p: p.stem)
def test_a_test_is_as_narrow_as_the_library(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > 100]
