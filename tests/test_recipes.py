"The recipes, and the command that trains them"

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ftcl.launch import run_parameters
from ftcl.method import as_published
from ftcl.record import defaults, read_record
from ftcl.train import check_fit, pretrain

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = dict(
    dataset="shapes", n_images=64, size=32, decode="auto", encoder="small", batch_size=16,
    queue_size=64, bn_splits=2, epochs=1, dim=16, knn_every=0, readouts="none",
)  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_one_that_pretrain_takes(path):
    p = run_parameters(path)
    assert p["name"] == path.stem and p["out"].startswith("runs/")
    check_fit(as_published(defaults(pretrain) | p))
    for mixing in ("none", p["mixing"]):
        check_fit(as_published(defaults(pretrain) | p | dict(mixing=mixing)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_commands_in_a_recipe_name_it(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"# papermill nbs/pretrain.ipynb out.ipynb -f recipes/{path.name}" in comments
    base = path.stem.removesuffix("-ft")
    assert f"# without it: -p mixing none -p name {base}" in comments
    assert f"-p strength auto -p name {base}-auto" in " ".join(comments)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_trains_at_a_small_size(path, tmp_path):
    "Whatever decides a run but its size stays as the recipe says"
    given = yaml.safe_load(path.read_text())
    small = dict(SMALL, bn_splits=min(given.get("bn_splits", 1), 2), out=str(tmp_path))
    if "warmup_epochs" in given:
        small["warmup_epochs"] = 0
    record = pretrain(**run_parameters(path) | small)
    for name in {"mixing", "lr", "tau", "momentum", "weight_decay", "alpha", "method"} & set(given):
        assert record["parameters"][name] == given[name]
    assert record["steps"] == 4


def test_there_is_a_recipe_for_each_method_of_the_paper():
    names = {path.stem for path in RECIPES}
    for dataset in ("imagenet100", "imagenet1k"):
        for method in ("moco-v1", "moco-v2", "simclr", "infomin", "swav", "simsiam"):
            assert f"{dataset}-{method}-ft" in names


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
    assert run.stdout.count("a: {}") == 1


def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("aplha: 2\n")
    command = [sys.executable, "-m", "ftcl.launch", "-f", str(recipe)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = f"InputError: in the recipe {recipe}: unknown parameter 'aplha'. Did you mean 'alpha'?"
    assert run.returncode == 1 and run.stderr.strip() == said
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]
