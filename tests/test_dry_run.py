"A dry run says what a run takes, and leaves no trace"

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ftcl import train
from ftcl.checkpoint import read_checkpoint
from ftcl.core import InputError
from ftcl.data import load
from ftcl.record import read_record, result_parameters
from ftcl.train import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
RUN = dict(n_images=128, epochs=5, batch_size=16, queue_size=64, readouts="none", progress=False)
RUN |= dict(precision="fp32")
STEPS = 40
LAUNCH = ["-m", "ftcl.launch"]


def rehearsed(capsys, **parameters):
    "The table that a dry run prints: name of a line -> its text"
    capsys.readouterr()
    assert pretrain(**RUN | parameters, dry_run=True) is None
    lines = capsys.readouterr().out.splitlines()
    return {line[:12].strip(): line[13:] for line in lines}


def files(folder):
    "Content of every file below a folder, by name; folders, too"
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def number(text):
    return float(re.search(r"[\d.,e-]*\d", text)[0].replace(",", ""))


def megabytes(text):
    return number(text) / (1000 if " kB" in text else 1)


def test_the_table_says_what_the_run_then_takes(tmp_path, capsys):
    place = dict(out=str(tmp_path / "deep" / "runs"), name="run")
    table = rehearsed(capsys, **place)
    assert list(tmp_path.iterdir()) == []
    record = pretrain(**RUN, **place)
    assert table["images"] == "128, split 'train' of shapes, built in, decoded once into memory"
    assert number(table["encoder"].split(",")[1]) == 0.34
    assert table["steps"] == f"{record['steps']}, in 5 epochs of batches of 16"
    assert table["device"] == f"{record['device']}, processes: 1"
    assert table["one step"].endswith("s, median of 5 after 3 to warm up")
    seconds = number(table["one step"]) * record["steps"]
    unit = 60 if " minutes" in table["whole run"] else 1
    assert unit * number(table["whole run"]) == pytest.approx(seconds, rel=0.02)
    checkpoint, kept = (megabytes(text) for text in table["on disk"].split(";"))
    path = tmp_path / "deep" / "runs" / "run.safetensors"
    assert checkpoint == pytest.approx(path.stat().st_size / 1e6, rel=0.01)
    real = sum(path.with_suffix(ending).stat().st_size for ending in (".json", ".parquet"))
    assert kept == pytest.approx(real / 1e6, rel=0.25)


def test_the_step_is_a_median_without_the_warm_up(tmp_path, capsys, monkeypatch):
    "The clock is set by hand: each step takes what stands here, in seconds"
    durations = [90, 80, 70, 3, 5, 4, 60, 1]
    now = [0.0]
    real = train.train_step

    def step(s, *more):
        real(s, *more)
        now[0] += durations[s.step - 1]

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    table = rehearsed(capsys, out=str(tmp_path))
    assert table["one step"] == "4 s, median of 5 after 3 to warm up"
    assert table["whole run"] == f"{4 * STEPS / 60:.3g} minutes, without readouts and checkpoints"


@pytest.mark.parametrize(
    "seconds, words",
    [(0.0414, "0.0414 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes"),
     (7200, "2 hours"), (5.4e6, "1,500 hours")],
)  # fmt: skip
def test_a_duration_is_read_in_its_unit(seconds, words):
    assert train._duration(seconds) == words


@pytest.mark.parametrize(
    "size, words",
    [(0, "0 kB"), (0.0329, "32.9 kB"), (1, "1 MB"), (4.128, "4.13 MB"), (2e3, "2,000 MB")],
)  # fmt: skip
def test_a_small_size_is_not_zero(size, words):
    assert train._in_bytes(size) == words


@pytest.mark.parametrize(
    "n_images, steps, timed, warm_up", [(16, 1, 1, 0), (40, 2, 1, 1), (80, 5, 2, 3)]
)
def test_a_run_may_be_shorter_than_the_rehearsal(
    tmp_path, capsys, monkeypatch, n_images, steps, timed, warm_up
):
    taken = []
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda s, *more: taken.append(real(s, *more)))
    table = rehearsed(capsys, n_images=n_images, epochs=1, out=str(tmp_path))
    assert len(taken) == steps == timed + warm_up
    assert table["one step"].endswith(f"median of {timed} after {warm_up} to warm up")


def test_the_transformation_is_timed_though_it_begins_later(tmp_path, monkeypatch):
    mixed = []
    real = train.train_step

    def step(s, views, mix, steps):
        mixed.append(mix)
        real(s, views, mix, steps)

    monkeypatch.setattr(train, "train_step", step)
    pretrain(**RUN, mixing="posneg", start_epoch=3, out=str(tmp_path), dry_run=True)
    assert mixed == [True] * 8


def test_random_numbers_of_the_caller_stay(tmp_path):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    pretrain(**RUN, out=str(tmp_path), dry_run=True)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_run_is_the_same_after_it(tmp_path):
    pretrain(**RUN, out=str(tmp_path), name="plain")
    pretrain(**RUN, out=str(tmp_path), name="after", dry_run=True)
    pretrain(**RUN, out=str(tmp_path), name="after")
    a, b = (read_checkpoint(tmp_path / f"{name}.safetensors")[0] for name in ("plain", "after"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("resume", [False, True])
def test_what_lies_there_is_neither_refused_nor_touched(tmp_path, resume):
    pretrain(**RUN, out=str(tmp_path), name="finished")
    pretrain(**RUN, out=str(tmp_path), name="unfinished", stop_after=3)
    (tmp_path / "damaged.safetensors").write_bytes(b"no checkpoint")
    (tmp_path / "damaged.json").write_text("no record")
    (tmp_path / "finished.lock").write_text("1 elsewhere")
    before = files(tmp_path)
    for name in ("finished", "unfinished", "damaged"):
        for tau in (0.1, 0.3):
            more = dict(name=name, tau=tau, resume=resume, stop_after=2, dry_run=True)
            assert pretrain(**RUN, out=str(tmp_path), **more) is None
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "said, wrong",
    [
        ("batch_size is 256, but training has 128 images", dict(batch_size=256, queue_size=512)),
        ("dataset 'nowhere' was not found", dict(dataset="nowhere")),
        ("training diverged", dict(lr=1e6)),
        ("must be a file name", dict(name="a/b")),
        ("dry_run is 'true', but must be True or False", dict(dry_run="true")),
    ],
)
def test_it_refuses_what_a_run_refuses(tmp_path, said, wrong):
    with pytest.raises(InputError, match=re.escape(said)):
        pretrain(**dict(RUN, out=str(tmp_path / "out"), dry_run=True) | wrong)
    assert list(tmp_path.iterdir()) == []


def test_images_from_a_folder_name_their_place(tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "mine"
    folder.mkdir()
    for i, image in enumerate(load("shapes").images[:20]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    before = files(tmp_path)
    more = dict(dataset=str(folder), n_images=0, decode="as_needed", workers=2, batch_size=8)
    table = rehearsed(capsys, **more, out=str(tmp_path / "out"))
    assert table["images"] == f"20, split 'train' of {folder}, decoded as they are needed"
    assert files(tmp_path) == before


def test_no_record_keeps_what_decides_no_result():
    kept = result_parameters(dict(dry_run=True, log_with="wandb", compiled=True), pretrain)
    assert kept == dict(compiled=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak")
def test_the_peak_rises_by_what_is_held():
    before = train._resident_peak()
    size = 1.5 * before  # MB; the process holds less than its peak
    held = np.ones(int(size * 1e6), dtype=np.uint8)
    assert train._resident_peak() >= size * held[0] > before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_own_memory_is_told(tmp_path, capsys):
    small = rehearsed(capsys, out=str(tmp_path))["peak memory"]
    large = rehearsed(capsys, out=str(tmp_path), batch_size=128)["peak memory"]
    assert small.endswith("MB allocated on the GPU") and number(large) > number(small) > 1


def recipe_in(folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text("".join(f"{n}: {v}\n" for n, v in RUN.items()) + f"out: {folder}/out\n")
    return ["-f", str(recipe), "-p", "dry_run", "True", "-p", "bn_splits", "2"]


@pytest.mark.parametrize("processes", [1, 2])
def test_from_the_command_line_it_is_printed_once(tmp_path, processes):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), *LAUNCH, *recipe_in(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = [line[:12].strip() for line in run.stdout.splitlines()]
    wanted = ["dry run", "images", "encoder", "device", "peak memory", "one step", "steps"]
    assert names == [*wanted, "whole run", "on disk"], run.stdout
    assert f"processes: {processes}" in run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name, tables", [("pretrain", 1), ("ablation", 2)])
def test_a_run_notebook_ends_well(tmp_path, name, tables):
    asked = RUN | dict(dry_run=True, out=str(tmp_path / "out"), workers=0)
    del asked["progress"]
    flags = [word for n, value in asked.items() for word in ("-p", n, str(value))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", f"nbs/{name}.ipynb"]
    command += [str(tmp_path / "out.ipynb"), *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]
    assert (tmp_path / "out.ipynb").read_text().count('"dry run ') == tables


def test_a_record_made_before_is_still_the_answer(tmp_path):
    pretrain(**RUN, out=str(tmp_path))
    pretrain(**RUN, out=str(tmp_path), dry_run=True)
    again = pretrain(**RUN, out=str(tmp_path), resume=True)
    assert again == read_record(tmp_path / "pretrain.json")
