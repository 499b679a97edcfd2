"Whole runs: the run notebooks by papermill, as a user starts them, and a run that is interrupted"

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import nbformat
import pandas as pd
import psutil
import pytest
import torch

from ftcl.checkpoint import read_checkpoint
from ftcl.core import InputError
from ftcl.data import load
from ftcl.encoder import Encoder
from ftcl.evaluate import knn_accuracy
from ftcl.export import export_encoder
from ftcl.record import declared, read_record
from ftcl.train import evaluate_checkpoint, pretrain
from ftcl.transform import Auto

ROOT = Path(__file__).parent.parent


def papermill(notebook, out, **parameters):
    "Run a notebook; `out` is its output folder"
    flags = [o for n, v in ({"out": out} | parameters).items() for o in ("-p", n, str(v))]
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        f"nbs/{notebook}.ipynb",
        f"{out}.ipynb",
        *flags,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    "The main job at its defaults"
    out = tmp_path_factory.mktemp("runs") / "ablation"
    run = papermill("ablation", out)
    assert run.returncode == 0, run.stderr
    return out


def test_ablation_pairs_its_runs(ablation):
    for seed in range(3):
        a, b = (pd.read_parquet(ablation / f"{arm}-s{seed}.parquet") for arm in ("none", "posneg"))
        assert (
            a.before_pos_mean[0] == b.before_pos_mean[0]
            and a.before_neg_mean[0] == b.before_neg_mean[0]
        )
        assert (b.pos_mean < b.before_pos_mean).all() and (a.pos_mean == a.before_pos_mean).all()


def test_ablation_shows_a_table_with_intervals(ablation):
    table = pd.read_csv(ablation / "posneg.csv", index_col=0)
    assert {
        "n",
        "baseline",
        "baseline_sd",
        "setting",
        "setting_sd",
        "difference",
        "low",
        "high",
    } == set(table.columns)
    values = {
        arm: [read_record(o)["metrics"]["knn_backbone"] for o in ablation.glob(f"{arm}-s*.json")]
        for arm in ("none", "posneg")
    }
    row = table.iloc[0]
    assert len(values["none"]) == len(values["posneg"]) == row.n >= 3
    difference = (sum(values["posneg"]) - sum(values["none"])) / row.n
    assert abs(row.difference - difference) < 1e-9 and row.low < row.difference < row.high
    assert (ablation / "posneg.png").stat().st_size > 10_000


def test_shapes_are_learnt(ablation):
    train, test = load("shapes"), load("shapes", "test")
    untrained = []
    for seed in range(3):
        torch.manual_seed(seed)
        untrained.append(knn_accuracy(Encoder("small"), train, test))
    trained = [
        read_record(ablation / f"none-s{s}.json")["metrics"]["knn_backbone"] for s in range(3)
    ]
    assert max(untrained) < 40
    assert sum(trained) / 3 >= sum(untrained) / 3 + 25


def test_a_finished_ablation_is_taken_as_it_is(ablation):
    before = {p.name: p.read_bytes() for p in ablation.glob("*.json")}
    assert papermill("ablation", ablation, resume=True).returncode == 0
    assert before == {p.name: p.read_bytes() for p in ablation.glob("*.json")}


@pytest.mark.parametrize("name", ["pretrain", "evaluate"])
def test_run_notebooks_run_at_their_defaults(name, tmp_path):
    run = papermill(name, tmp_path / name)
    assert run.returncode == 0, run.stderr
    assert read_record(tmp_path / name / f"{name}.json")["metrics"]["knn_backbone"] > 20
    assert not (ROOT / "nbs" / "runs").exists()
    cells = [c for c in nbformat.read(f"{tmp_path / name}.ipynb", 4).cells if c.cell_type == "code"]
    drawn = [
        "plot_scores" in c.source
        for c in cells
        for o in c.outputs
        if "image/png" in o.get("data", {})
    ]
    assert drawn == ([False, True] if name == "pretrain" else [False])
    # the bar has gone, and nothing was drawn
    assert not [o for c in cells if "pretrain(" in c.source for o in c.outputs]


@pytest.mark.parametrize(
    "name, small",
    [
        ("benchmark", dict(rounds=1, queue_size=1024, step_queue=256, batch_size=64)),
        (
            "scaling",
            dict(
                rounds=1,
                queue_size=1024,
                queue_sizes="512 1024",
                batch_sizes="64 128",
                dims="32 64",
                processes="1 2",
                steps=2,
            ),
        ),
    ],
)
def test_measuring_notebooks_leave_a_table_and_a_picture(name, small, tmp_path):
    run = papermill(name, tmp_path / name, **small)
    assert run.returncode == 0, run.stderr
    assert len(pd.read_csv(tmp_path / name / f"{name}.csv")) >= 10
    files = {f"{name}.{ending}" for ending in ("csv", "png", "json")} | (
        {"processes.csv", "processes.png"} if name == "scaling" else set()
    )
    assert {p.name for p in (tmp_path / name).iterdir()} == files


@pytest.mark.parametrize(
    "name, wrong, told",
    [
        ("ablation", {"aplha": 2}, "unknown parameter 'aplha'. Did you mean 'alpha'?"),
        ("ablation", {"renormalize": "true"}, "renormalize is 'true', but must be True or False."),
        (
            "ablation",
            {"mixing": "both"},
            "mixing is 'both', but must be none, or one or more of mochi, neg, neg_arc, ",
        ),
        ("pretrain", {"dataset": "no/such/folder"}, "dataset 'no/such/folder' was not found"),
        (
            "evaluate",
            {"checkpoint": "nowhere.safetensors"},
            "the checkpoint nowhere.safetensors cannot be read",
        ),
        (
            "vectors",
            {"checkpoint": "nowhere.safetensors"},
            "the checkpoint nowhere.safetensors cannot be read",
        ),
        ("vectors", {"n_pairs": 0}, "n_pairs is 0, but must be at least 1."),
        ("directions", {"folder": "nowhere"}, "'nowhere' holds no checkpoint"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_left(name, wrong, told, tmp_path):
    run = papermill(name, tmp_path / "out", **wrong)
    assert run.returncode != 0
    said = [line for line in run.stderr.splitlines() if line.startswith("InputError:")]
    assert len(said) == 1 and told in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]  # papermill's own executed copy


RUN = """
from ftcl.train import pretrain
sizes = dict(n_images=2048, epochs=3, batch_size=64, queue_size=256)
pretrain(**sizes, mixing="posneg", out={out!r}, name={name!r}, resume=True)
"""


def test_vectors_lose_nothing_that_lies_there(whole, tmp_path):
    for path in whole.parent.iterdir():
        shutil.copy(path, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    checkpoint = str(tmp_path / "whole.safetensors")
    told = papermill("vectors", tmp_path, name="whole", checkpoint=checkpoint).stderr
    assert "holds the record of a run with checkpoint=''" in told
    assert before.items() <= {p.name: p.read_bytes() for p in tmp_path.iterdir()}.items()
    assert (
        papermill("vectors", tmp_path, checkpoint=checkpoint, n_pairs=8, n_keys=20).returncode == 0
    )
    frame = pd.read_parquet(tmp_path / "vectors.parquet")
    assert frame["kind"].value_counts().to_dict() == {"queue": 20, "q": 8, "k": 8}
    assert ((frame.filter(like="z") ** 2).sum(axis=1) - 1).abs().max() < 1e-5


def test_directions_of_every_checkpoint_in_a_folder(whole, tmp_path):
    asked = dict(folder=str(whole.parent), n_images=100, n_views=2, n_directions=5)
    assert papermill("directions", tmp_path, **asked).returncode == 0
    frame = pd.read_parquet(tmp_path / "directions.parquet")
    assert set(frame["run"]) == {"whole"}
    assert list(frame["direction"]) == [1, 2, 3, 4, 5]
    assert frame["share"].is_monotonic_decreasing and 0.3 < frame["share"].sum() <= 1


SMALL = dict(n_images=64, epochs=2, batch_size=16, queue_size=32, readouts="none", progress=False)
SMALL |= dict(precision="fp32", mixing="pos", strength="auto")


@pytest.mark.parametrize(
    "more, steps", [({}, 8), (dict(start_epoch=1), 4), (dict(dry_run=True), 8)]
)
def test_a_run_too_short_for_its_strength_says_so_once(tmp_path, capsys, monkeypatch, more, steps):
    pretrain(**SMALL, **more, out=str(tmp_path))
    said = f"'auto' needs 200 calls or more to reach 0.1, but the run has {steps} transformed steps"
    out = capsys.readouterr().out
    assert out.count(said) == 1 and f"it reaches {0.1 * steps / 200:.3g} at most" in out
    monkeypatch.setattr(Auto, "rise", 8)
    pretrain(**SMALL, **more, out=str(tmp_path), name="long")
    assert ("transformed steps" in capsys.readouterr().out) == (steps < 8)
    for other in (dict(strength=0.1), dict(mixing="none")):
        pretrain(**SMALL | dict(epochs=1) | other, out=str(tmp_path), name="b", dry_run=True)
        assert "transformed steps" not in capsys.readouterr().out


def test_an_unknown_parameter_names_the_nearest(tmp_path):
    for call, wrong, said in (
        (pretrain, dict(epoch=3), "unknown parameter 'epoch'. Did you mean 'epochs'?"),
        (evaluate_checkpoint, dict(readout="none"), "'readout'. Did you mean 'readouts'?"),
        (export_encoder, dict(fromat="onnx"), "unknown parameter 'fromat'. Did you mean 'format'?"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            call(**wrong)
    assert list(declared(pretrain))[0] == "dataset" and pretrain.__name__ == "pretrain"


def start(folder, name):
    return subprocess.Popen(
        [sys.executable, "-c", RUN.format(out=str(folder), name=name)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing interrupts"
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, "whole").wait() == 0
    return folder / "whole.safetensors"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_where_it_was(whole, tmp_path, stop):
    run = start(tmp_path, "parts-0.2")
    shown = ""
    while not re.search(r"[1-9][\d.]*k?/6\.", shown):  # until the bar shows a step
        assert (more := run.stderr.read(1)), (
            f"the run ended before it could be interrupted: {shown}"
        )
        shown += more
    run.send_signal(stop)
    assert "KeyboardInterrupt: stopped after step" in run.stderr.read() and run.wait() != 0
    stopped = read_checkpoint(tmp_path / "parts-0.2.safetensors")[1]["step"]
    assert 0 < stopped < 96 and not (tmp_path / "parts-0.2.json").exists()
    assert start(tmp_path, "parts-0.2").wait() == 0
    (a, _), (b, _) = (read_checkpoint(p) for p in (whole, tmp_path / "parts-0.2.safetensors"))
    assert a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


@pytest.fixture
def shell_line(tmp_path):
    "The Snakefile's own shell line for a run of `cluster.py`'s study, which is read in `tmp_path`"
    shutil.copy(ROOT / "Snakefile", tmp_path)
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "pretrain.ipynb", tmp_path / "nbs")
    for folder in ("results", "runs"):
        (tmp_path / folder / "tiny").mkdir(parents=True)
    cluster.write_study(tmp_path)

    def line(name):
        goal = f"results/tiny/{name}-s0.json"
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", "-p", goal]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert said.returncode == 0, said.stdout + said.stderr
        [found] = re.findall(r"^Shell command: (.*papermill.*)$", said.stdout + said.stderr, re.M)
        return found

    return line


def test_a_run_of_the_snakefile_outlives_sigterm_until_its_checkpoint(shell_line, tmp_path):
    "Slurm sends the signal to every process of a job: to the shell, to papermill, to the kernel"
    results = tmp_path / "results" / "tiny"
    options = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    command = ["bash", "-c", shell_line("killed")]
    run = subprocess.Popen(command, **options)
    end = time.monotonic() + 300
    while not (results / "killed-s0.safetensors").exists():
        assert run.poll() is None and time.monotonic() < end, "there is no first checkpoint"
        time.sleep(0.05)
    job = psutil.Process(run.pid)
    for process in (job, *job.children(recursive=True)):
        process.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 1  # a signal would be another number
    assert "KeyboardInterrupt: stopped after step" in said
    step = read_checkpoint(results / "killed-s0.safetensors")[1]["step"]
    assert 0 < step < 240 and not (results / "killed-s0.json").exists()
    for again in (command, ["bash", "-c", shell_line("whole")]):
        done = subprocess.run(again, **options)
        assert done.returncode == 0, done.stderr
    assert cluster.contents(results / "killed-s0") == cluster.contents(results / "whole-s0")
    assert read_record(results / "killed-s0.json")["resumed_at"] == [step]
    assert "resumed_at" not in read_record(results / "whole-s0.json")
