"""Two processes that share every batch do what one does, and stop together

Everything is computed in float64. There the order of a sum changes the sixteenth digit, and the few
steps of a run amplify that to the twelfth at most. In float32 they can amplify it to the third, as
far as a small error would, and how far depends on the processor.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ftcl.checkpoint import read_checkpoint
from ftcl.method import METHODS
from ftcl.record import read_record
from ftcl.scores import BINS, LIMIT
from ftcl.train import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
RUN = dict(n_images=96, holdout=32, size=16, epochs=2, batch_size=32, queue_size=50, bn_splits=4)
RUN |= dict(method="moco_v2", mixing="posneg", precision="fp32", progress=False, lr=0.02, dim=16)
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SCRIPT = """
import torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
from ftcl.train import pretrain
for parameters in {runs!r}:
    pretrain(**parameters)
"""


def launch(tmp_path, *runs):
    "`pretrain` in two processes, in float64, once for each of these parameters"
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(runs=runs))
    return subprocess.run([*LAUNCH, str(script)], cwd=ROOT, capture_output=True, text=True)


EVERY = "mochi+synco+pos_arc+neg_ex+neg_arc+pos_in"
RUNS = {  # name: what differs from `RUN`
    "feature": dict(),
    "dimension": dict(level="dimension", symmetric=True, queue_size=75),
    "sample": dict(level="sample", mixing="pos"),
    "moco_v1": dict(method="moco_v1", strength="auto"),
    "moco_v2 with all": dict(method="moco_v2", mixing=EVERY, level="sample"),
    "moco_v3": dict(method="moco_v3", strength="auto"),
    "simclr": dict(method="simclr", strength="auto", level="dimension"),
    "simclr with all": dict(method="simclr", mixing=EVERY, level="sample"),
    "imix": dict(method="imix", level="sample", symmetric=True, queue_size=96),
    "infomin": dict(method="infomin", level="sample"),
    "simsiam feature": dict(method="simsiam", mixing="pos"),
    "simsiam sample": dict(method="simsiam", mixing="pos", level="sample"),
    "simsiam dimension": dict(method="simsiam", mixing="pos", level="dimension"),
    "byol": dict(method="byol", mixing="pos", level="sample", strength="auto"),
    "swav": dict(method="swav", mixing="pos", level="dimension", epochs=3),
    "swav_multicrop": dict(method="swav_multicrop", mixing="pos", strength="auto"),
    "barlow": dict(method="barlow", mixing="none"),
}
# Batch statistics over the whole batch: each method as it stands above first
WHOLE = {}
for how in list(RUNS.values()):
    method = how.get("method", "moco_v2")
    WHOLE.setdefault(f"{method} whole", how | dict(bn_splits=1))
RUNS |= WHOLE


def parameters_of(name, out):
    return RUN | RUNS[name] | dict(name=name, out=str(out))


@pytest.fixture(scope="module")
def made_by_two(tmp_path_factory):
    "The folder of all `RUNS`, made by one pair of processes"
    folder = tmp_path_factory.mktemp("two")
    run = launch(folder, *(parameters_of(name, folder) for name in RUNS))
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr, run.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(tmp_path, made_by_two, float64, name):
    one = pretrain(**parameters_of(name, tmp_path))
    two = read_record(made_by_two / f"{name}.json")
    assert (two["processes"], two["steps"]) == (2, one["steps"])
    folders = (tmp_path, made_by_two)
    x, y = (read_checkpoint(folder / f"{name}.safetensors")[0] for folder in folders)
    assert x.keys() == y.keys()
    for tensor in x:
        if tensor.startswith(("method.", "sgd.")):
            # running statistics follow the parts of a batch one by one, or half of them twice
            running = ".running_" in tensor and name not in WHOLE
            # those of Barlow Twins reach 100, so there two in a hundred are allowed
            rtol = 0.02 if running and name == "barlow" else 0
            tolerance = dict(rtol=rtol, atol=0.02 if running else 1e-9, err_msg=tensor)
            np.testing.assert_allclose(x[tensor], y[tensor], **tolerance)
    a, b = (pd.read_parquet(folder / f"{name}.parquet") for folder in folders)
    for column in a:
        # the recorder sums float32 scores; a score on the edge of a bin may fall to either side
        bin_width = 2 * LIMIT / BINS if "neg_q" in column else 0
        tolerance = dict(rtol=1e-5, atol=1e-6 + bin_width, err_msg=column)
        np.testing.assert_allclose(a[column], b[column], **tolerance)


def test_each_method_is_among_them():
    assert {(RUN | how)["method"] for how in RUNS.values()} == set(METHODS)
    assert {(RUN | how)["method"] for how in WHOLE.values()} == set(METHODS)
    assert {how["bn_splits"] for how in WHOLE.values()} == {1}


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    for wrong, said in (
        (dict(bn_splits=3, batch_size=33), "batch_size is 33, but must be a multiple of the 2"),
        (dict(bn_splits=3, batch_size=30), "bn_splits is 3, but must be 1 or a multiple of the 2"),
    ):
        run = launch(tmp_path, RUN | wrong | dict(out=str(tmp_path / "out")))
        assert run.returncode != 0
        assert f"InputError: {said} processes." in run.stderr
        assert not (tmp_path / "out").exists()


SIGNALLED = """
import os, signal, torch
torch.set_default_dtype(torch.float64)
from ftcl import train
def tell(name, when):
    real = getattr(train, name)
    def telling(s, *more):
        done = real(s, *more)
        if int(os.environ["RANK"]) == {rank} and when(s):
            os.kill(os.getpid(), signal.{stop})
        return done
    setattr(train, name, telling)
tell({name!r}, lambda s: s.step == {step})
train.pretrain(**{parameters!r})
"""


@pytest.mark.parametrize(
    "rank, stop, name, step",
    [
        (1, "SIGTERM", "train_step", 5),  # one step before the last
        (0, "SIGINT", "train_step", 6),  # the last
        (1, "SIGTERM", "_end_epoch", 6),  # after the last
        (1, "SIGTERM", "_train_to_end", 6),  # while the other writes the record
    ],
)
def test_a_signal_to_one_of_two_leaves_a_checkpoint_or_a_record(tmp_path, rank, stop, name, step):
    p = RUN | dict(out=str(tmp_path), name="run", resume=True)
    script = tmp_path / "run.py"
    script.write_text(SIGNALLED.format(rank=rank, stop=stop, name=name, step=step, parameters=p))
    run = subprocess.run([*LAUNCH, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and (tmp_path / "run.safetensors").exists(), run.stderr
    if name != "_train_to_end":
        told = "KeyboardInterrupt: stopped after step 6; resume=True goes on from"
        assert run.stderr.count(told) == 2, run.stderr  # both say so
        assert not (tmp_path / "run.json").exists()
    assert read_checkpoint(tmp_path / "run.safetensors")[1]["step"] == 6
    if stop == "SIGTERM" and name == "train_step":
        return  # going on is tried with the others
    run = launch(tmp_path, p)
    assert run.returncode == 0, run.stderr
    assert read_record(tmp_path / "run.json")["steps"] == 6
    assert len(pd.read_parquet(tmp_path / "run.parquet")) == 6
