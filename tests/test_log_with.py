"What a run tells the trackers of Accelerate: every recorded step and epoch, once"

import json
import os
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from ftcl import train
from ftcl.checkpoint import read_checkpoint
from ftcl.core import InputError
from ftcl.record import read_record
from ftcl.scores import ScoreRecorder, read_scores
from ftcl.train import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
RUN = dict(n_images=128, epochs=8, batch_size=16, queue_size=64, readouts="none", progress=False)
RUN |= dict(precision="fp32", mixing="posneg", start_epoch=1, record_every=3, knn_every=4)
STEPS = 64  # 8 an epoch
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


def from_tensorboard(out, name="run"):
    "(tag, step, value) of everything that TensorBoard shows"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(f"{out}/logs/{name}", size_guidance={"scalars": 0})
    found.Reload()
    tags = found.Tags()["scalars"]
    return [(tag, event.step, event.value) for tag in tags for event in found.Scalars(tag)]


def wandb_records(path):
    "The records in a file of wandb: blocks of 32 kB, each with parts of records"
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    place, part = 7, b""  # after the head of the file
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


def wandb_files(out):
    return sorted(Path(out).glob("logs/wandb/offline-run-*/*.wandb"))


def from_wandb(out):
    points = []
    for path in wandb_files(out):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    name = item.key or "/".join(item.nested_key)
                    if not name.startswith("_"):
                        value = float(json.loads(item.value_json))
                        points.append((name, record.history.step.num, value))
    return points


def trackio_rows(out, columns, table, name="run"):
    with sqlite3.connect(f"{out}/logs/trackio/{name}.db") as database:
        return list(database.execute(f"select {columns} from {table} order by id"))


def from_trackio(out):
    points = []
    for step, row in trackio_rows(out, "step, metrics", "metrics"):
        points += [(name, step, value) for name, value in json.loads(row).items()]
    return points


READ = dict(tensorboard=from_tensorboard, trackio=from_trackio, wandb=from_wandb)
EACH = [pytest.param(name, marks=needs(name)) for name in READ]


def expected(out, name="run"):
    "(column, step, value) of the finished run's own files"
    points = []
    frame = read_scores(f"{out}/{name}.parquet")
    for column in frame.columns.drop("step"):
        known = frame[["step", column]].dropna().itertuples(index=False)
        points += [(column, step, value) for step, value in known]
    for row in read_record(f"{out}/{name}.json")["epochs"]:
        for column in row.keys() - {"epoch"}:
            points.append((f"epoch/{column}", 8 * row["epoch"] + 7, row[column]))
    return points


def assert_told(points, wanted):
    "The same points, each once, but for the digits that a tracker keeps"
    places = [point[:2] for point in points]
    assert len(places) == len(set(places)), "a step was told twice"
    found = dict(zip(places, (point[2] for point in points), strict=True))
    known = {point[:2]: point[2] for point in wanted}
    assert found.keys() == known.keys()
    values = [[table[place] for place in known] for table in (found, known)]
    np.testing.assert_allclose(*values, rtol=1e-6)


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    "trackio looks its place up once, when it is imported"
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that it is gone again after the test
    monkeypatch.delenv("TRACKIO_DIR")
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A run that tells nobody"
    out = tmp_path_factory.mktemp("plain")
    pretrain(**RUN, out=str(out), name="run")
    return out


@pytest.mark.parametrize("name", EACH)
def test_every_step_and_epoch_is_told_once(tmp_path, own_store, plain, name):
    pretrain(**RUN, out=str(tmp_path), name="run", log_with=name)
    wanted = expected(tmp_path)
    assert len(wanted) > 600 and ("epoch/knn_backbone", 63) in {point[:2] for point in wanted}
    assert_told(READ[name](tmp_path), wanted)
    a, b = (read_checkpoint(folder / "run.safetensors")[0] for folder in (plain, tmp_path))
    assert all(torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in a)
    records = [read_record(folder / "run.json") for folder in (plain, tmp_path)]
    assert records[0]["parameters"] == records[1]["parameters"]  # who was told is not among them


@pytest.mark.parametrize("name", EACH)
def test_a_resumed_run_goes_on_in_the_same_place(tmp_path, own_store, name):
    asked = RUN | dict(out=str(tmp_path), name="run", log_with=name, resume=True)
    for stop in (5, 16, 60):  # within an epoch, at the end of one, after the look at step 50
        assert pretrain(**asked, stop_after=stop) is None
    pretrain(**asked)
    assert_told(READ[name](tmp_path), expected(tmp_path))


@pytest.mark.parametrize("name", EACH)
def test_a_killed_run_tells_no_step_again(tmp_path, own_store, name):
    "Its checkpoint is of step 8, but the tracker knows 60 steps"
    asked = RUN | dict(out=str(tmp_path), name="run", log_with=name, resume=True)
    pretrain(**asked, stop_after=8)
    for path in (tmp_path / "run.safetensors", tmp_path / "run.scores"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / f"kept{path.suffix}")
    pretrain(**asked, stop_after=60)
    shutil.rmtree(tmp_path / "run.scores")
    for path in (tmp_path / "kept.safetensors", tmp_path / "kept.scores"):
        path.replace(tmp_path / f"run{path.suffix}")
    pretrain(**asked)
    assert_told(READ[name](tmp_path), expected(tmp_path))


@pytest.mark.parametrize("name", EACH)
def test_a_tracker_that_joins_late_is_told_everything(tmp_path, own_store, name):
    asked = RUN | dict(out=str(tmp_path), name="run", resume=True)
    pretrain(**asked, stop_after=30)
    pretrain(**asked, log_with=name)
    assert_told(READ[name](tmp_path), expected(tmp_path))


@needs("tensorboard")
def test_a_new_run_of_the_same_name_hides_the_old_one(tmp_path):
    asked = RUN | dict(out=str(tmp_path), name="run", log_with="tensorboard")
    pretrain(**asked)
    before = from_tensorboard(tmp_path)
    for ending in ("json", "safetensors", "previous.safetensors", "parquet"):
        (tmp_path / f"run.{ending}").unlink()
    pretrain(**asked | dict(seed=1))
    after = from_tensorboard(tmp_path)
    assert_told(after, expected(tmp_path))
    assert before != after


@needs("tensorboard")
@needs("wandb")
def test_several_are_told_the_same(tmp_path, own_store):
    pretrain(**RUN, out=str(tmp_path), name="run", log_with="tensorboard+wandb")
    for name in ("tensorboard", "wandb"):
        assert_told(READ[name](tmp_path), expected(tmp_path))


@needs("tensorboard")
def test_rows_are_read_back_at_every_50th_step_and_at_the_end_of_an_epoch(tmp_path, monkeypatch):
    read = []
    real = ScoreRecorder.table

    def table(recorder, last=0):
        if sys._getframe(1).f_code.co_name == "update":
            read.append((recorder.last, last))
        return real(recorder, last)

    monkeypatch.setattr(ScoreRecorder, "table", table)
    more = dict(n_images=1024, epochs=2, record_every=1, knn_every=0)  # 64 steps an epoch
    pretrain(**RUN | more, out=str(tmp_path), name="run", log_with="tensorboard")
    assert read == [(49, 50), (63, 14), (99, 36), (127, 28)]  # the last step, how many rows


@needs("tensorboard")
def test_tensorboard_keeps_the_parameters(tmp_path):
    pretrain(**RUN, out=str(tmp_path), name="run", log_with="tensorboard", stop_after=20)
    pretrain(**RUN, out=str(tmp_path), name="run", log_with="tensorboard", resume=True)
    kept = list(tmp_path.glob("logs/run/*/hparams.yml"))
    assert len(kept) == 1
    yaml = pytest.importorskip("yaml")
    parameters = read_record(tmp_path / "run.json")["parameters"]
    assert yaml.safe_load(kept[0].read_text()) == parameters


@needs("trackio")
def test_trackio_keeps_the_parameters(tmp_path, own_store):
    asked = RUN | dict(out=str(tmp_path), name="run", log_with="trackio", resume=True)
    pretrain(**asked, stop_after=20)
    pretrain(**asked)
    kept = json.loads(trackio_rows(tmp_path, "config", "configs")[-1][0])
    assert read_record(tmp_path / "run.json")["parameters"].items() <= kept.items()
    assert len(set(trackio_rows(tmp_path, "run_id", "metrics"))) == 1  # one run


@needs("wandb")
def test_wandb_stays_offline_and_goes_on_as_the_same_run(tmp_path, own_store):
    asked = RUN | dict(out=str(tmp_path), name="run", log_with="wandb", resume=True)
    pretrain(**asked, stop_after=20)
    pretrain(**asked)
    assert "WANDB_MODE" not in os.environ
    runs = []
    for path in wandb_files(tmp_path):
        found = [r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run"]
        runs += [(run.run_id, run.project, run.display_name) for run in found]
        config = {c.key: json.loads(c.value_json) for run in found for c in run.config.update}
        assert read_record(tmp_path / "run.json")["parameters"].items() <= config.items()
    assert len(runs) == 2 and len(set(runs)) == 1
    assert runs[0][1:] == ("run", "run")


@needs("wandb")
def test_what_the_user_set_for_wandb_stays(tmp_path, own_store, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    pretrain(**RUN, out=str(tmp_path), name="run", log_with="wandb")
    assert wandb_files(tmp_path) == []


@pytest.mark.parametrize(
    "log_with, said",
    [
        ("tensorbord", "must be empty, or one or more of tensorboard, trackio, wandb joined by +"),
        ("tensorbord", "Did you mean 'tensorboard'?"),
        ("wandb+wandb", "log_with is 'wandb+wandb', but must be empty"),
        ("wandb+", "log_with is 'wandb+', but must be empty"),
        (True, "log_with is True, but must be text"),
    ],
)
def test_an_unknown_tracker_is_refused(tmp_path, log_with, said):
    with pytest.raises(InputError, match=re.escape(said)):
        pretrain(**RUN, out=str(tmp_path / "out"), log_with=log_with)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", READ)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, dry_run):
    others = [other for other in READ if other != name]
    monkeypatch.setattr(train, "get_available_trackers", lambda: others)
    said = f"log_with is '{name}', but {name} is not installed: pip install {name}."
    with pytest.raises(InputError, match=re.escape(said)):
        pretrain(**RUN, out=str(tmp_path / "out"), log_with=name, dry_run=dry_run)
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_missing_here_are_named(tmp_path):
    missing = [name for name in READ if find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed")
    with pytest.raises(InputError, match=f"pip install {missing[0]}"):
        pretrain(**RUN, out=str(tmp_path / "out"), log_with=missing[0])


@needs("tensorboard")
def test_a_tracker_that_cannot_start_ends_the_run_with_a_sentence(tmp_path):
    (tmp_path / "logs").touch()  # where its folder should be
    with pytest.raises(InputError, match="tensorboard cannot be started .*: leave log_with empty"):
        pretrain(**RUN, out=str(tmp_path), name="run", log_with="tensorboard")


@needs("tensorboard")
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"number": 1, "rows": "2", "epochs": 0}'])
def test_a_damaged_note_of_what_was_told_is_refused(tmp_path, text):
    asked = RUN | dict(out=str(tmp_path), name="run", log_with="tensorboard", resume=True)
    pretrain(**asked, stop_after=5)
    (tmp_path / "logs" / "run.tensorboard.told").write_text(text)
    with pytest.raises(InputError, match=r"run\.tensorboard\.told (is damaged|cannot be read)"):
        pretrain(**asked)


@needs("tensorboard")
def test_a_dry_run_tells_nobody(tmp_path):
    pretrain(**RUN, out=str(tmp_path), log_with="tensorboard", dry_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EACH)
def test_one_of_two_processes_tells(tmp_path, own_store, name):
    "Accelerate keeps the second process from TensorBoard, but not from the others"
    script = tmp_path / "run.py"
    asked = RUN | dict(out=str(tmp_path), name="run", log_with=name, bn_splits=2)
    script.write_text(f"from ftcl.train import pretrain\npretrain(**{asked!r})\n")
    run = subprocess.run([*LAUNCH, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_told(READ[name](tmp_path), expected(tmp_path))
