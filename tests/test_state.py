"A run's files never lie: whatever happens, they are right, or one sentence says why not"

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import faults
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

from ftcl.checkpoint import CHECKPOINT, checksum, load_encoder, read_checkpoint, read_note
from ftcl.core import InputError, flush, locked, replacing
from ftcl.encoder import Encoder
from ftcl.export import export_encoder
from ftcl.record import git_revision, read_record
from ftcl.scores import read_scores
from ftcl.train import evaluate_checkpoint, pretrain

STEPS = 9
pytestmark = pytest.mark.usefixtures("one_thread")


def run(out, **parameters):
    "The run of `faults`, in this process"
    return pretrain(**faults.RUN | dict(out=str(out), name="run") | parameters)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run that nothing disturbed"
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "The same run, stopped after 7 of its 9 steps"
    folder = tmp_path_factory.mktemp("stopped")
    assert run(folder, stop_after=7) is None
    return folder


@pytest.fixture
def copy(tmp_path):
    "A copy of a run's folder"

    def copying(folder):
        shutil.copytree(folder, tmp_path / "run")
        return tmp_path / "run"

    return copying


def told(call, *arguments, **more):
    "The one sentence that a mistake is answered with"
    with pytest.raises(InputError) as error:
        call(*arguments, **more)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


def same(folder, finished):
    "Whether a run ended in the bits of the undisturbed one, with the same files"
    assert faults.state(folder) == faults.state(finished)


# ---------------------------------------------------------------- killed


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    outcomes = faults.kill_runs(8, 0, tmp_path)
    assert [outcome["equal"] for outcome in outcomes] == [True] * 8, outcomes
    assert [outcome["died"] for outcome in outcomes] == [True] * 8, outcomes


@pytest.mark.parametrize(
    "moment",
    [
        "before replace run.safetensors",  # the part of the scores lies there, its checkpoint not
        "after link run.previous.safetensors",
        "after replace run.parquet",  # the finished scores lie there, the record not
        "after replace run.json",  # the record lies there, and the parts of the scores
        "within the write of run.safetensors",
    ],
)
def test_a_run_killed_between_two_files(moment, tmp_path, finished):
    log = tmp_path / "moments.json"
    assert faults.finish(tmp_path / "whole", log=log)
    at = len(json.loads(log.read_text())) - 1 - json.loads(log.read_text())[::-1].index(moment)
    assert faults.kill_at(tmp_path / "killed", at)
    assert faults.finish(tmp_path / "killed")
    same(tmp_path / "killed", finished)


def test_a_new_run_killed_while_it_replaces_the_old_one(tmp_path, finished, copy):
    "The finished run of the same name is complete, or gone: never a record of another checkpoint"
    folder = copy(finished)
    for kept in ("run.previous.safetensors", "run.safetensors", "run.json", "run.parquet"):
        (folder / kept).unlink()
        again = tmp_path / kept
        shutil.copytree(folder, again)
        with redirect_stdout(io.StringIO()) as said:
            run(again, resume=True)
        if (again / "run.safetensors").exists():
            assert faults.state(again)["tensors"] == faults.state(finished)["tensors"]
        else:
            assert "its encoder is gone" in said.getvalue()
            assert read_record(again / "run.json") == read_record(finished / "run.json")


def test_images_on_the_disk_go_on_to_the_same_bits_with_any_workers(tmp_path):
    "Stopped with two workers, killed with three, finished with none"
    images(str(tmp_path / "set/train/{}"), 96)
    images(str(tmp_path / "set/test/{}"), 20)
    asked = dict(dataset=str(tmp_path / "set"), n_images=0, holdout=0, batch_size=16, epochs=8)
    asked |= dict(decode="as_needed", view_size=16, queue_size=32)
    assert faults.finish(tmp_path / "whole", **asked, workers=1)
    assert faults.finish(tmp_path / "parts", **asked, workers=2, stop_after=8)
    faults.kill_later(tmp_path / "parts", 0.3, **asked, workers=3)
    assert faults.finish(tmp_path / "parts", **asked, workers=0)
    same(tmp_path / "parts", tmp_path / "whole")


def test_a_record_says_where_its_run_was_resumed(tmp_path, finished, stopped, copy):
    for stop in (2, 7):
        run(tmp_path / "twice", resume=True, stop_after=stop)
    twice = run(tmp_path / "twice", resume=True)
    assert twice["resumed_at"] == [2, 7]
    assert run(tmp_path / "twice", resume=True) == twice  # taken as it lies
    whole = read_record(finished / "run.json")
    assert "resumed_at" not in whole
    assert run(tmp_path / "new", resume=True).keys() == whole.keys()  # nothing lay there
    for name in twice.keys() - {"resumed_at", "seconds", "images_per_second"}:
        assert twice[name] == whole[name], name
    folder = copy(stopped)  # a checkpoint from before there was a list
    tensors, note = read_checkpoint(folder / "run.safetensors")
    del note["resumed_at"]
    text = json.dumps(note)
    about = CHECKPOINT | {"state": text, "sha256": checksum(tensors, text)}
    safetensors.torch.save_file(tensors, folder / "run.safetensors", about)
    assert run(folder, resume=True)["resumed_at"] == [7]
    same(folder, finished)


# ---------------------------------------------------------------- written


def test_a_file_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    real = dict(fsync=os.fsync, replace=os.replace)

    def watching(name):
        def watched(*what):
            target = f"/proc/self/fd/{what[0]}" if name == "fsync" else what[1]
            done.append((name, Path(os.path.realpath(target)).is_dir()))
            return real[name](*what)

        return watched

    for name in real:
        monkeypatch.setattr(os, name, watching(name))
    with replacing(tmp_path / "file") as part:
        part.write_text("x")
    assert done == [("fsync", False), ("replace", False), ("fsync", True)]


def test_a_disk_that_fills_up_costs_no_checkpoint(tmp_path, monkeypatch, finished):
    writes = []
    real = Path.write_bytes

    def full(path, data):
        writes.append(path)
        if len(writes) == 2:
            real(path, data[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "run.safetensors cannot be written: No space left on device." in told(run, tmp_path)
    assert read_note(tmp_path / "run.safetensors")["step"] == 3
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "run.lock").exists()
    run(tmp_path, resume=True)
    same(tmp_path, finished)


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_ctrl_c_within_a_save_leaves_whole_files(at, tmp_path, monkeypatch, finished):
    calls = []
    real = os.replace

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    run(tmp_path, resume=True)
    same(tmp_path, finished)


def test_a_checkpoint_does_not_grow_with_the_steps(tmp_path):
    sizes = []
    for stop in (7, 8, 190, 200):
        run(tmp_path, epochs=80, knn_every=0, resume=True, stop_after=stop, checkpoint_every=0)
        sizes.append((tmp_path / "run.safetensors").stat().st_size)
    assert max(sizes) - min(sizes) < 400, sizes  # digits, and the losses since the last look
    tensors, note = read_checkpoint(tmp_path / "run.safetensors")
    assert len(tensors["losses"]) + note["loss_count"] == 200 % 3
    assert tensors["epochs"].shape == (80, 1)
    assert note["written"]["rows"] == 200


def test_losses_of_a_long_epoch_are_summed_up(tmp_path):
    "An epoch of 128 steps: the mean is that of all of them, stopped and resumed or not"
    long = dict(n_images=256, batch_size=2, epochs=1, knn_every=0, readouts="none", queue_size=4)
    whole = run(tmp_path / "whole", **long)
    for stop in (49, 51, 100):
        run(tmp_path / "parts", **long, resume=True, stop_after=stop)
        tensors, note = read_checkpoint(tmp_path / "parts" / "run.safetensors")
        assert len(tensors["losses"]) == stop % 50 and note["loss_count"] == stop - stop % 50
    assert run(tmp_path / "parts", **long, resume=True)["epochs"] == whole["epochs"]
    losses = read_scores(tmp_path / "whole" / "run.parquet")["loss"]
    assert whole["epochs"][0]["loss"] == pytest.approx(losses.mean(), rel=1e-12)


def test_a_checkpoint_that_was_read_is_not_mapped(stopped):
    path = stopped / "run.safetensors"
    tensors, _ = read_checkpoint(path)
    assert tensors and str(path) not in Path("/proc/self/maps").read_text()


SWAP = """
import os, sys, time
one, two, file = sys.argv[1:]
print("swaps", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    for source in (one, two):
        os.link(source, file + ".part")
        os.replace(file + ".part", file)
"""


def test_a_checkpoint_that_is_replaced_meanwhile_is_not_called_damaged(stopped, tmp_path):
    for name in ("run.safetensors", "run.previous.safetensors"):
        shutil.copy(stopped / name, tmp_path)
    one, two = tmp_path / "run.safetensors", tmp_path / "run.previous.safetensors"
    file = tmp_path / "live.safetensors"
    command = [sys.executable, "-c", SWAP, str(one), str(two), str(file)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "swaps\n"
        while not file.exists():
            pass
        steps = [read_note(file)["step"] for _ in range(60)]
    finally:
        other.kill()
        other.wait()
    assert set(steps) == {6, 7}


def test_weights_from_a_damaged_checkpoint_are_refused(stopped, copy):
    file = copy(stopped) / "run.safetensors"
    Encoder("small", weights=file)
    whole = bytearray(file.read_bytes())
    whole[-1000] ^= 1
    file.write_bytes(whole)
    said = told(Encoder, "small", weights=file)
    assert "run.safetensors are damaged, since their sum does not fit their content: copy" in said


def test_nobody_is_told_to_remove_a_file_that_somebody_gave(stopped, tmp_path):
    good = stopped / "run.safetensors"
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    contents = {
        "cut.safetensors": (whole[:-1], "truncated or no safetensors file; copy it again, or give"),
        "bit.safetensors": (bytes(flipped), "sum does not fit its content; copy it again, or give"),
        "photo.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "something else wrote it; give one that "),
        "text.txt": (b"these are words, not weights", "something else wrote it; give one that "),
        "none.safetensors": (None, "it is missing, or no file; give the path of one."),
    }
    for name, (content, said) in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for call in (
            lambda file: evaluate_checkpoint(file, out=str(tmp_path)),
            lambda file: export_encoder(file, str(tmp_path / "out")),
            load_encoder,
            read_note,
        ):
            sentence = told(call, str(tmp_path / name))
            assert said in sentence and "remove it" not in sentence and "encoder`" not in sentence
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    assert "are a `weights` of pretrain" in told(load_encoder, tmp_path / "foreign.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "foreign.pth")
    assert "name the `encoder`" in told(evaluate_checkpoint, str(tmp_path / "foreign.pth"))
    assert f"as {good}." in told(evaluate_checkpoint, str(stopped))
    (tmp_path / "run.safetensors").mkdir()
    assert "is a folder: move it away" in told(run, tmp_path)


# ---------------------------------------------------------------- damaged, edited, foreign


def test_any_flipped_bit_of_a_checkpoint_is_refused(stopped, copy):
    folder = copy(stopped)
    file = folder / "run.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = np.random.default_rng(0)
    places = [*chance.integers(0, header, 150), *chance.integers(header, len(whole), 50)]
    for key in (b"ftcl-checkpoint", b'"format"', b'"schema"', b'"sha256"', b'"state"'):
        places += range(whole.index(key), whole.index(key) + len(key) + 5)
    for place in places:
        bit = 1 << int(chance.integers(8))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        sentence = told(load_encoder, file)
        assert "the one before is whole, step 6: give " in sentence
    assert "the one before is whole, step 6: rename " in told(run, folder, resume=True)


def test_the_one_before_goes_on_to_the_same_bits(stopped, copy, finished):
    folder = copy(stopped)
    file = folder / "run.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "the one before is whole" in told(run, folder, resume=True)
    os.rename(folder / "run.previous.safetensors", file)
    run(folder, resume=True)
    assert faults.state(folder)["tensors"] == faults.state(finished)["tensors"]
    assert faults.state(folder)["scores"] == faults.state(finished)["scores"]


def test_a_checkpoint_that_is_gone_is_not_begun_anew_over_the_one_before(stopped, copy):
    folder = copy(stopped)
    (folder / "run.safetensors").unlink()
    assert "the one before is whole, step 6" in told(run, folder, resume=True)
    assert read_note(folder / "run.previous.safetensors")["step"] == 6


def test_any_flipped_bit_of_a_part_is_refused_or_changes_nothing(stopped, copy, finished):
    folder = copy(stopped)
    part = folder / "run.scores" / "000000.parquet"
    whole = part.read_bytes()
    chance = np.random.default_rng(0)
    refused = 0
    from ftcl.checkpoint import Written, _read_history

    note = read_note(folder / "run.safetensors")
    arguments = (folder / "run.safetensors", note["columns"], Written(**note["written"]))
    right = _read_history(*arguments).numpy().tobytes()
    for place in chance.integers(0, len(whole), 200):
        bit = 1 << int(chance.integers(8))
        part.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            assert _read_history(*arguments).numpy().tobytes() == right
        except InputError as e:
            refused += "remove the checkpoint to begin anew" in str(e)
    assert refused > 100
    part.unlink()
    assert "000000.parquet is missing" in told(run, folder, resume=True)


NONE = ["", "[]", "null", "{", "[" * 10**5, '{"step": 1}', '{"params": {}}', "1" * 5000]


@pytest.mark.parametrize("text", NONE, ids=lambda text: text[:20])
def test_a_note_that_is_none_is_one_sentence(text, stopped, copy):
    folder = copy(stopped)
    tensors, _ = read_checkpoint(folder / "run.safetensors")
    about = CHECKPOINT | {"sha256": checksum(tensors, text), "state": text}
    safetensors.torch.save_file(tensors, folder / "run.safetensors", about)
    said = "is not a checkpoint of ftcl: something else wrote it; the one before is whole, step 6"
    for sentence in (
        told(run, folder, resume=True),
        told(run, folder),
        told(load_encoder, folder / "run.safetensors"),
    ):
        assert said in sentence


def edited_tensors(change, folder):
    "A checkpoint with other tensors, as of a method whose code was changed"
    tensors, note = read_checkpoint(folder / "run.safetensors")
    change(tensors)
    text = json.dumps(note)
    about = CHECKPOINT | {"state": text, "sha256": checksum(tensors, text)}
    safetensors.torch.save_file(tensors, folder / "run.safetensors", about)


@pytest.mark.parametrize("name", ["sgd.3", "method.queue.keys"])
@pytest.mark.parametrize("how", ["missing", "shape", "type", "renamed"])
def test_a_changed_tensor_is_one_sentence(name, how, stopped, copy):
    def change(tensors):
        x = tensors.pop(name)
        if how == "shape":
            tensors[name] = x.flatten()[:1].reshape(1, 1, 1).clone()
        if how == "type":
            tensors[name] = x.to(torch.int32)
        if how == "renamed":
            tensors[f"{name}.more"] = x

    folder = copy(stopped)
    edited_tensors(change, folder)
    assert "run.safetensors" in told(run, folder, resume=True)


def test_foreign_files_are_one_sentence(stopped, copy, tmp_path):
    folder = copy(stopped)
    file = folder / "run.safetensors"
    whole = file.read_bytes()

    def write(content):
        file.unlink(missing_ok=True)
        content()

    for content in (
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(whole[:100]),
        lambda: file.write_bytes(whole[:-1]),
        lambda: file.write_bytes(b"\xff" * 1000),
        lambda: torch.save({"x": torch.zeros(1)}, file),
        lambda: safetensors.torch.save_file({"x": torch.zeros(1)}, file),
        lambda: safetensors.torch.save_file({"x": torch.zeros(1)}, file, {"format": "pt"}),
        lambda: file.symlink_to(folder / "nowhere"),
        lambda: file.symlink_to(file),
        lambda: os.mkfifo(file),
    ):
        write(content)
        told(load_encoder, file)
        for resume in (True, False):
            told(run, folder, resume=resume)
    file.unlink()
    file.mkdir()
    told(load_encoder, file)
    told(run, folder, resume=True)
    for wrong in (None, "", 3, "a\0b", b"run.safetensors", "~nobody.here/x"):
        told(load_encoder, wrong)
    link = tmp_path / "link.safetensors"
    file.rmdir()
    file.write_bytes(whole)
    link.symlink_to(file)
    assert load_encoder(link)[1]["dim"] == 16


def test_a_checkpoint_of_an_earlier_version_is_one_sentence(stopped, copy):
    folder = copy(stopped)
    file = folder / "run.safetensors"
    tensors, note = read_checkpoint(file)
    about = CHECKPOINT | {"schema": "1", "state": json.dumps(note)}
    safetensors.torch.save_file(tensors, file, about)
    said = f"{file} is of an earlier version of ftcl: train it anew."
    assert told(load_encoder, file) == said
    assert told(run, folder, resume=True) == said


# ---------------------------------------------------------------- record, scores, checkpoint


def test_a_finished_run_is_taken_only_if_all_of_it_is_there(finished, copy):
    folder = copy(finished)
    record = read_record(folder / "run.json")
    assert run(folder, resume=True) == record
    table = (folder / "run.parquet").read_bytes()
    frame = pd.read_parquet(folder / "run.parquet")
    edited = frame.assign(loss=frame["loss"] + 1)
    frame.attrs.clear()  # as in files from before there was a sum
    changed = frame.assign(loss=frame["loss"] + 1)
    for content, said in (
        (lambda: None, "its scores are not whole"),
        (lambda: edited.to_parquet(folder / "run.parquet"), "its scores are not whole"),
        (lambda: (folder / "run.parquet").write_bytes(table[:-9]), "its scores are not whole"),
        (lambda: frame[:-1].to_parquet(folder / "run.parquet"), "has 8 rows"),
        (lambda: changed.to_parquet(folder / "run.parquet"), "does not hold the scores"),
    ):
        (folder / "run.parquet").unlink(missing_ok=True)
        content()
        assert said in told(run, folder, resume=True)
        assert read_record(folder / "run.json") == record
    (folder / "run.parquet").write_bytes(table)
    (folder / "run.safetensors").unlink()
    with redirect_stdout(io.StringIO()) as said:
        assert run(folder, resume=True) == record
    assert said.getvalue().count("\n") == 1 and "its encoder is gone" in said.getvalue()


def test_a_record_newer_than_its_checkpoint_is_not_finished(finished, stopped, copy):
    folder = copy(finished)
    shutil.copy(stopped / "run.safetensors", folder)
    sentence = told(run, folder, resume=True)
    assert "the record of a run of 9 steps, but" in sentence and "is of step 7" in sentence
    (folder / "run.json").unlink()
    run(folder, resume=True)  # its rows come from the finished table
    assert faults.state(folder)["scores"] == faults.state(finished)["scores"]


def test_an_unfinished_run_is_not_begun_anew_by_mistake(stopped, copy):
    folder = copy(stopped)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "unfinished at step 7: resume=True goes on from it; remove it" in told(run, folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_old_record_goes_before_the_first_checkpoint_of_a_new_run(finished, copy):
    folder = copy(finished)
    assert run(folder, stop_after=1) is None
    assert sorted(path.name for path in folder.iterdir()) == ["run.safetensors", "run.scores"]
    assert read_note(folder / "run.safetensors")["step"] == 1


def test_files_of_others_stay(finished, tmp_path):
    "A table that is no record of scores, and what somebody put into the folder of the parts"
    pd.DataFrame(dict(a=[1])).to_parquet(tmp_path / "run.parquet")
    told(run, tmp_path)
    assert list(pd.read_parquet(tmp_path / "run.parquet")) == ["a"]
    (tmp_path / "run.parquet").unlink()
    (tmp_path / "run.scores").mkdir()
    (tmp_path / "run.scores" / "notes.txt").write_text("mine")
    run(tmp_path)
    assert (tmp_path / "run.scores" / "notes.txt").read_text() == "mine"


def test_parts_beyond_the_checkpoint_are_overwritten(stopped, copy, finished):
    folder = copy(stopped)
    (folder / "run.scores" / "000003.parquet").write_bytes(b"half a file")
    (folder / "run.scores" / "000009.parquet").write_bytes(b"of an earlier run")
    (folder / "run.json.123-00000000.part").write_text("of a killed one")
    run(folder, resume=True)
    same(folder, finished)


def test_a_record_with_wrong_types_is_one_sentence(finished, copy):
    folder = copy(finished)
    whole = json.loads((folder / "run.json").read_text())
    for change in (
        dict(metrics=[]), dict(metrics=dict(knn_backbone="50")), dict(metrics=dict(a=True)),
        dict(parameters=None), dict(parameters=whole["parameters"] | dict(tau=[1])),
        dict(parameters=whole["parameters"] | dict(taus=1)), dict(steps="9"), dict(steps=-9),
        dict(epochs=[1]), dict(epochs={}), dict(seconds=None), dict(n_train=1.5), dict(steps=8),
        dict(steps=10**400), dict(metrics=dict(a=10**400)),
    ):  # fmt: skip
        (folder / "run.json").write_text(json.dumps(whole | change))
        told(run, folder, resume=True)
    for text in (
        "",
        "{",
        "[" * 10**5,
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
        write = (
            (folder / "run.json").write_text
            if isinstance(text, str)
            else (folder / "run.json").write_bytes
        )
        write(text)
        told(read_record, folder / "run.json")
    for wrong in (None, "", folder, folder / "none.json"):
        told(read_record, wrong)


# ---------------------------------------------------------------- two at once


HOLD = """
import sys, time
from pathlib import Path
from ftcl.core import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_of_one_name_do_not_write_at_once(stopped, tmp_path):
    tmp_path.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        for _ in range(2):  # asking changes nothing
            sentence = told(run, tmp_path)
            assert f"is being written by process {other.pid} on {os.uname().nodename}" in sentence
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        for name in ("run.safetensors", "run.previous.safetensors"):
            shutil.copy(stopped / name, tmp_path)
        for more in ({}, dict(resume=True), dict(lr=0.5), dict(epochs=7, resume=True)):
            assert "is being written by process" in told(run, tmp_path, **more)
        for file in tmp_path.glob("run*.safetensors"):
            file.unlink()
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    assert (tmp_path / "run.lock").exists()
    assert run(tmp_path, stop_after=1) is None  # the dead hold nothing
    assert not (tmp_path / "run.lock").exists()
    with locked(tmp_path / "run"), locked(tmp_path / "other"):
        told(run, tmp_path, resume=True)


# ---------------------------------------------------------------- paths


def test_the_home_folder_is_found_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run("~/runs")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert read_record("~/runs/run.json")["steps"] == STEPS
    assert len(read_scores("~/runs/run.parquet")) == STEPS
    assert load_encoder("~/runs/run.safetensors")[1]["dim"] == 16
    asked = dict(readouts="knn_backbone", out="~/runs", name="again")
    evaluate_checkpoint("~/runs/run.safetensors", **asked)
    assert (tmp_path / "runs" / "again.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("out", ["", "a\0b", "~nobody.here/runs", "a\ud800"])
def test_a_folder_that_is_none_is_one_sentence(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(run, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "a\0b", "a\ud800", "x" * 240, "a.previous"])
def test_a_name_that_is_none_is_one_sentence(name, tmp_path):
    told(run, tmp_path / "runs", name=name)
    assert not list(tmp_path.iterdir())


def test_a_revision_is_that_of_a_repository_that_keeps_the_package(tmp_path):
    "Installed inside another repository there is none"
    package = tmp_path / ".venv" / "ftcl"
    shutil.copytree(Path(__file__).parent.parent / "ftcl", package)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "mine.txt").write_text("mine")
    for words in (["init", "-q"], ["add", "mine.txt"], ["commit", "-q", "-m", "mine"]):
        subprocess.run([*git, *words], check=True)
    assert git_revision(str(package / "core.py")) == ""
    subprocess.run([*git, "add", "-f", ".venv"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "vendored"], check=True)
    assert re.fullmatch(r"[0-9a-f]{10}", git_revision(str(package / "core.py")))


# ---------------------------------------------------------------- measured on


def images(folder, n, colours=((200, 40, 40), (40, 40, 200))):
    "n small pictures of two kinds, in one folder without labels, or in one for each kind"
    for i in range(n):
        colour = np.array(colours[i % 2]) + np.random.default_rng(i).integers(-20, 20, (20, 20, 3))
        file = folder.format(i % 2) + f"/{i}.png"
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(file)


def test_what_measures_nothing_needs_no_test_split(tmp_path, capsys):
    images(str(tmp_path / "known/train/{}"), 40)
    small = dict(dataset=str(tmp_path / "known"), n_images=0, size=16, batch_size=16, holdout=0)
    said = told(run, tmp_path, **small)
    assert "has no test split" in said and "readouts='none', knn_every=0 and probe=False" in said
    small |= dict(readouts="none", knn_every=0)
    for measured in (dict(probe=True), dict(knn_every=1)):
        assert "has no test split" in told(run, tmp_path, **small | measured)
    capsys.readouterr()
    record = run(tmp_path, **small)
    assert (record["n_train"], record["metrics"], record["measured_on"]) == (40, {}, "nothing")
    assert "labels" not in capsys.readouterr().out
    run(tmp_path, **small, name="parts", stop_after=1)
    assert run(tmp_path, **small, name="parts", resume=True)["epochs"] == record["epochs"]
    said = told(evaluate_checkpoint, str(tmp_path / "run.safetensors"), out=str(tmp_path))
    assert said.endswith("of the run has no test split: set `dataset`.")


def test_images_without_labels_are_trained_on(tmp_path, capsys):
    images(str(tmp_path / "bare"), 64)
    images(str(tmp_path / "known/train/{}"), 40)
    images(str(tmp_path / "known/test/{}"), 20)
    bare = dict(dataset=str(tmp_path / "bare"), n_images=0, holdout=0, workers=0, batch_size=32)
    record = run(tmp_path / "runs", **bare)
    assert record["metrics"] == {} and record["n_test"] == 0 and record["n_train"] == 64
    assert record["measured_on"] == "nothing"
    assert [list(row) for row in record["epochs"]] == [["epoch", "loss"]] * 3
    assert "evaluate_on" in capsys.readouterr().out
    assert run(tmp_path / "runs", **bare, resume=True) == record
    measured = bare | dict(evaluate_on=str(tmp_path / "known"))
    record = run(tmp_path / "measured", **measured)
    assert record["metrics"]["knn_backbone"] > 90 and record["n_test"] == 20
    assert record["parameters"]["evaluate_on"] in record["measured_on"]
    assert len(record["epochs"][0]) == 3
    checkpoint = tmp_path / "measured" / "run.safetensors"
    asked = dict(readouts="knn_backbone", k=10, out=str(tmp_path / "runs"), workers=0)
    again = evaluate_checkpoint(str(checkpoint), **asked, name="again")
    assert again["metrics"]["knn_backbone"] > 90 and again["n_train"] == 40
    few = evaluate_checkpoint(str(checkpoint), **asked, name="few", n_images=10)
    assert few["n_train"] == 10
    there = evaluate_checkpoint(
        str(tmp_path / "runs/run.safetensors"),
        dataset=str(tmp_path / "known"),
        **asked,
        name="there",
    )
    assert there["n_test"] == 20
    bare_one = str(tmp_path / "runs/run.safetensors")
    assert "has no labels" in told(evaluate_checkpoint, bare_one, **asked, name="none")


def test_a_checkpoint_on_its_way_is_read_out_as_such(stopped, tmp_path, capsys):
    file = str(stopped / "run.safetensors")
    record = evaluate_checkpoint(file, readouts="knn_backbone", out=str(tmp_path), name="early")
    assert (record["step"], record["steps"]) == (7, STEPS)
    assert "unfinished: it is read out at step 7 of 9" in capsys.readouterr().out


def test_asked_auto_the_decision_stands_in_the_record(finished, copy):
    folder = copy(finished)
    assert read_record(folder / "run.json")["parameters"]["decode"] == "once"
    assert run(folder, resume=True, decode="auto") == run(folder, resume=True, decode="once")
    assert "decode='once', not 'as_needed'" in told(run, folder, resume=True, decode="as_needed")


def test_initial_weights_are_known_by_their_content(tmp_path):
    from ftcl.encoder import Encoder

    file = tmp_path / "weights.safetensors"
    encoder = Encoder("small", dim=16)
    tensors = {name: x.contiguous() for name, x in encoder.state_dict().items()}
    safetensors.torch.save_file(tensors, file)
    asked = dict(out=str(tmp_path / "runs"), weights=str(file))
    run(**asked, stop_after=4)
    kept = file.read_bytes()
    tensors["backbone.0.weight" if "backbone.0.weight" in tensors else next(iter(tensors))] += 1
    safetensors.torch.save_file(tensors, file)
    assert "began with other weights" in told(run, **asked, resume=True)
    file.write_bytes(kept)
    record = run(**asked, resume=True)
    assert record["parameters"]["weights"] == str(file)
    assert re.fullmatch(r"[0-9a-f]{64}", record["weights_sha256"])
    file.unlink()
    assert load_encoder(tmp_path / "runs" / "run.safetensors")[1]["weights"] == str(file)


# ---------------------------------------------------------------- surroundings


def surrounded(folder, code="", **variables):
    "The run in a process with these variables, after this code: what it printed"
    said = folder.with_suffix(".said")
    arguments = (folder, code, variables, said)
    child = faults.processes().Process(target=faults.train_within, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    return said.read_text()


def test_the_environment_decides_nothing(tmp_path, finished):
    variables = dict(
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4",
        ACCELERATE_MIXED_PRECISION="bf16",
        ACCELERATE_DYNAMO_BACKEND="inductor",
        ACCELERATE_USE_FSDP="true",
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_USE_MEGATRON_LM="true",
        ACCELERATE_USE_PARALLELISM_CONFIG="true",
        ACCELERATE_DOWNCAST_BF16="true",
    )
    said = surrounded(tmp_path / "run", **variables)
    same(tmp_path / "run", finished)
    line = next(line for line in said.splitlines() if "is ignored" in line)
    for name, value in variables.items():
        assert f"{name}={value}" in line


@pytest.mark.parametrize(
    "code",
    [
        "Accelerator(gradient_accumulation_steps=4)",
        "a = Accelerator(gradient_accumulation_steps=4); a.accumulate().__enter__()",
        "torch.set_float32_matmul_precision('medium')",
    ],
)
def test_what_ran_before_in_the_process_decides_nothing(code, tmp_path, finished):
    surrounded(tmp_path / "run", f"import torch; from accelerate import Accelerator; {code}")
    same(tmp_path / "run", finished)


@pytest.mark.parametrize(
    "code, said",
    [
        ("Accelerator(mixed_precision='bf16')", "if an Accelerator with other settings was made"),
        ("Accelerator(dynamo_backend='inductor')", "dynamo INDUCTOR was made in this process"),
        ("torch.autocast('cpu').__enter__()", "autocast is on"),
        ("torch.set_grad_enabled(False)", "gradients are turned off"),
        ("torch.set_default_device('meta')", "default device is meta"),
        ("os.environ['ONEDNN_DEFAULT_FPMATH_MODE'] = 'BF16'", "ONEDNN_DEFAULT_FPMATH_MODE=BF16"),
    ],
)
def test_what_cannot_be_undone_is_refused(code, said, tmp_path):
    code = f"import os, torch; from accelerate import Accelerator; {code}"
    printed = surrounded(tmp_path / "run", code)
    assert printed.startswith("InputError ") and said in printed and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_flush_waits_for_files_and_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    flush(tmp_path / "file")
    flush(tmp_path)
    with pytest.raises(OSError):
        flush(tmp_path / "none")


SMALL = dict(size=16, epochs=1, dim=8, precision="fp32", progress=False)


def test_other_images_under_the_same_name_are_refused(tmp_path):
    "As many, and of the same size; only what they show is another"
    folder = tmp_path / "set"
    small = dict(SMALL, dataset=str(folder), holdout=0, n_images=0, batch_size=8, readouts="none")
    small |= dict(out=str(tmp_path / "runs"), name="run", queue_size=16)

    def draw(seed):
        rng = np.random.default_rng(seed)
        folder.mkdir(exist_ok=True)
        for i in range(16):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")

    draw(0)
    pretrain(**small, stop_after=1)
    draw(1)
    with pytest.raises(InputError, match="other images or labels than"):
        pretrain(**small, resume=True)
    draw(0)
    assert pretrain(**small, resume=True)["images_sha256"]


def test_a_run_that_held_images_out_is_measured_on_them_again(tmp_path):
    folder = tmp_path / "set"
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    small = dict(SMALL, dataset=str(folder), holdout=8, n_images=0, batch_size=8, queue_size=16)
    record = pretrain(**small, out=str(tmp_path), name="run")
    how = dict(out=str(tmp_path), readouts="knn_backbone", precision="fp32")
    again = evaluate_checkpoint(str(tmp_path / "run.safetensors"), **how)
    assert (again["n_train"], again["n_test"]) == (16, 8)
    assert again["measured_on"] == record["measured_on"] == "held-out training images"
    assert again["metrics"]["knn_backbone"] == record["metrics"]["knn_backbone"]
    with pytest.raises(InputError, match="no test split: give one that has train and test"):
        evaluate_checkpoint(str(tmp_path / "run.safetensors"), str(folder), **how | dict(name="b"))


def test_a_name_that_is_no_text_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="which no file can be called"):
        run(tmp_path / "runs", name="a\udcff")
    assert not list(tmp_path.iterdir())
