"The recipes, and the command that trains them"

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from ftcl.core import native_precision
from ftcl.detection import transfer
from ftcl.launch import run_parameters
from ftcl.method import as_published
from ftcl.record import check_given, declared, defaults, read_record
from ftcl.train import _check_fit, evaluate_checkpoint, pretrain

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TAKES = {"pretrain": pretrain, "transfer": transfer, "evaluate": evaluate_checkpoint}
SMALL = dict(
    dataset="shapes", n_images=64, size=32, decode="auto", encoder="small", batch_size=16,
    queue_size=64, bn_splits=2, epochs=1, dim=16, knn_every=0, readouts="none",
)  # fmt: skip
SMALL_TRANSFER = dict(
    dataset="shapes", split="train", evaluate_on="val", n_images=2, size=64, rois=16, epochs=1,
    batch_size=2, warmup_epochs=0, precision="fp32", workers=0, progress=False,
)  # fmt: skip


def notebook_of(path):
    "The run notebook of a recipe, as its own command names it"
    [name] = re.findall(r"^# papermill nbs/(\w+)\.ipynb out\.ipynb -f ", path.read_text(), re.M)
    return name


def recipes_of(*notebooks):
    "The recipes that these notebooks run, for a test of each"
    found = [path for path in RECIPES if notebook_of(path) in notebooks]
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def offered(notebook):
    "Names of the parameters in a notebook's cell"
    cells = nbformat.read(ROOT / "nbs" / f"{notebook}.ipynb", 4).cells
    [cell] = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    names = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_a_parameter_of_its_notebook(path):
    given = yaml.safe_load(path.read_text())
    notebook = notebook_of(path)
    assert set(given) <= offered(notebook)
    check_given(given, declared(TAKES[notebook]))
    assert given["name"] == path.stem and given["out"].startswith("runs/")
    assert max(map(len, path.read_text().splitlines())) <= 100


@recipes_of("pretrain")
def test_a_recipe_is_one_that_pretrain_takes(path):
    p = run_parameters(path)
    _check_fit(as_published(defaults(pretrain) | p))
    for mixing in ("none", p["mixing"]):
        _check_fit(as_published(defaults(pretrain) | p | dict(mixing=mixing)))


@recipes_of("pretrain")
def test_the_commands_in_a_recipe_name_it(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"# papermill nbs/pretrain.ipynb out.ipynb -f recipes/{path.name}" in comments
    base = path.stem.removesuffix("-ft")
    assert f"# without it: -p mixing none -p name {base}" in comments
    assert f"-p strength auto -p name {base}-auto" in " ".join(comments)


@recipes_of("transfer", "evaluate")
def test_a_recipe_reads_what_another_one_leaves(path):
    "And its comments name the checkpoints of the runs without, and with strength=auto"
    text = path.read_text()
    assert f"# papermill nbs/{notebook_of(path)}.ipynb out.ipynb -f recipes/{path.name}\n" in text
    given = yaml.safe_load(text)
    if "weights" in given:
        return
    recipe = ROOT / "recipes" / (Path(given["checkpoint"]).stem + ".yaml")
    run = yaml.safe_load(recipe.read_text())
    assert given["checkpoint"] == f"{run['out']}/{run['name']}.safetensors"
    base = given["checkpoint"].removesuffix("-ft.safetensors")
    for ending in ("", "-auto"):
        name = path.stem.removesuffix("-ft") + ending
        assert f"-p name {name}\n#     -p checkpoint {base}{ending}.safetensors\n" in text


@recipes_of("pretrain")
def test_a_recipe_trains_at_a_small_size(path, tmp_path):
    "Whatever decides a run but its size stays as the recipe says"
    given = yaml.safe_load(path.read_text())
    small = dict(SMALL, bn_splits=min(given.get("bn_splits", 1), 2), out=str(tmp_path))
    small["precision"] = native_precision()  # not every processor computes in bf16
    if "warmup_epochs" in given:
        small["warmup_epochs"] = 0
    record = pretrain(**run_parameters(path) | small)
    for name in {"mixing", "lr", "tau", "momentum", "weight_decay", "alpha", "method"} & set(given):
        assert record["parameters"][name] == given[name]
    assert record["steps"] == 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "The checkpoint of a small run"
    folder = tmp_path_factory.mktemp("trained")
    pretrain(**SMALL, precision="fp32", out=str(folder), name="small", progress=False)
    return str(folder / "small.safetensors")


@recipes_of("transfer")
def test_a_recipe_transfers_at_a_small_size(path, trained, tmp_path):
    given = yaml.safe_load(path.read_text())
    small = dict(SMALL_TRANSFER, out=str(tmp_path))
    if "checkpoint" in given:
        small |= dict(checkpoint=trained)
    else:
        small |= dict(encoder="small", weights="")
    record = transfer(**given | small)
    for name in ("detector", "norm", "lr", "weight_decay"):
        assert record["parameters"][name] == given[name]
    assert "AP" in record["metrics"]
    assert ("mask AP" in record["metrics"]) == given.get("masks", False)


@recipes_of("evaluate")
def test_a_recipe_is_read_out_at_a_small_size(path, trained, tmp_path):
    given = yaml.safe_load(path.read_text())
    small = dict(checkpoint=trained, precision="fp32", out=str(tmp_path), linear_epochs=1)
    record = evaluate_checkpoint(**given | small, n_images=2048)
    assert next(iter(record["metrics"])) == given["readouts"]


def test_there_is_a_recipe_for_each_method_of_the_paper():
    names = {path.stem for path in RECIPES}
    for dataset in ("imagenet100", "imagenet1k", "cifar10", "tiny-imagenet-100"):
        for method in ("moco-v1", "moco-v2", "simclr", "infomin", "swav", "simsiam"):
            assert f"{dataset}-{method}-ft" in names
    for table in ("linear", "voc", "coco"):
        for method in ("moco-v1", "moco-v2"):
            assert f"{table}-imagenet1k-{method}-ft" in names
    assert {"voc-supervised", "coco-supervised"} <= names
    assert sum(name.startswith("longtail-") for name in names) == 2


def test_the_classes_of_imagenet_100():
    lines = (ROOT / "recipes" / "imagenet100.txt").read_text().split()
    assert len(set(lines)) == len(lines) == 100 and lines == sorted(lines)
    assert all(re.fullmatch(r"n\d{8}", line) for line in lines)


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "-m"],  # without a GPU: on the CPU
    ],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_one_command_starts_many_processes(launcher, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(SMALL | dict(mixing="posneg", out=str(tmp_path))))
    command = [sys.executable, "-m", *launcher, "ftcl.launch", "-f", str(recipe), "-p", "name", "a"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    record = read_record(tmp_path / "a.json")
    assert (record["steps"], record["processes"]) == (4, 2)
    assert run.stdout.count(f"{tmp_path / 'a.json'}: {{}}\n") == 1


def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("aplha: 2\n")
    command = [sys.executable, "-m", "ftcl.launch", "-f", str(recipe)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = f"InputError: in the recipe {recipe}: unknown parameter 'aplha'. Did you mean 'alpha'?"
    assert run.returncode == 1 and run.stderr.strip() == said
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]
