"""What the callback needs more than one process, or another installation, to show

Two processes are compared with one in float64. There the order of a sum changes the sixteenth
digit, and the twelve steps amplify that to the twelfth at most. In float32 they could amplify it
to one that shows, and how far depends on the processor.
"""

import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ftcl.core import InputError
from ftcl.lightning import ScoreCallback
from ftcl.loss import info_nce, scores
from ftcl.scores import BINS, LIMIT

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


class Net(pl.LightningModule):
    "Queries and keys of one layer, against fixed negatives that all processes have"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(20, 8)
        self.register_buffer("keys", F.normalize(torch.randn(50, 8), dim=1))

    def training_step(self, batch, _):
        q, k = (F.normalize(self.net(v), dim=1) for v in batch)
        pos, neg = scores(q, k, self.keys)
        loss = info_nce(pos, neg, 0.2)
        assert loss.dtype == torch.float64
        before = (pos.detach() / 2, neg.detach() / 2)
        return dict(loss=loss, pos=pos, neg=neg, before=before, features=(q, k))

    def train_dataloader(self):
        "Six batches of 32; every process has its part of each"
        x = torch.randn(192, 20, generator=torch.Generator().manual_seed(1))
        rank = self.trainer.global_rank
        count = self.trainer.world_size
        views = (v[rank::count] for v in (x, x + 0.5 * x.roll(1, 0)))
        return DataLoader(TensorDataset(*views), batch_size=32 // count)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


QUIET = dict(
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)


def fit(path, processes):
    "Two epochs of `Net`, recorded into `path`"
    callback = ScoreCallback(path, tau=0.2)
    trainer = pl.Trainer(
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=2,
        callbacks=[callback],
        **QUIET,
    )
    trainer.fit(Net())
    assert len(callback.recorder.rows) == 12  # in every process


def trainer_of(callback, epochs=1, **more):
    "A trainer of one process"
    return pl.Trainer(devices=1, max_epochs=epochs, callbacks=[callback], **QUIET, **more)


SCRIPT = """
import os, sys
import torch
torch.set_default_dtype(torch.float64)
sys.path.insert(0, {here!r})
from test_lightning import InputError, fit
try:
    fit({folder!r} + "/run.py/two.parquet", 2)
except InputError as e:
    open({folder!r} + "/refused" + os.environ["LOCAL_RANK"], "w").write(str(e))
fit({folder!r} + "/two.parquet", 2)
"""


def test_two_processes_record_what_one_does(tmp_path, float64):
    """Lightning starts them, as it does for a script.

    The first path must stop both of them, and not leave one waiting."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=str(HERE), folder=str(tmp_path)))
    command = [sys.executable, str(script)]
    run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    refused = [(tmp_path / f"refused{rank}").read_text() for rank in (0, 1)]
    assert all("'two' cannot be written to the output folder" in text for text in refused)
    fit(tmp_path / "one.parquet", 1)
    one = pd.read_parquet(tmp_path / "one.parquet")
    two = pd.read_parquet(tmp_path / "two.parquet")
    assert one["loss"].iloc[-1] < 0.7 * one["loss"].iloc[0]
    assert {"effective_rank", "before_pos_mean", "pos_weight"} < set(one)
    assert list(one) == list(two)
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-9)
    for column in one:
        # the recorder sums float32 scores; a score on the edge of a bin may fall to either side
        bin_width = 2 * LIMIT / BINS if "neg_q" in column else 0
        tolerance = dict(rtol=1e-5, atol=1e-6 + bin_width, err_msg=column)
        np.testing.assert_allclose(one[column], two[column], **tolerance)
    written = sorted(p.name for p in tmp_path.glob("*.parquet*"))
    assert written == ["one.parquet", "two.parquet"]
    assert not list(tmp_path.glob("*.lock"))


def steps(path):
    return pd.read_parquet(path)["step"].tolist()


def refused(told, trainer, **how):
    "A fit that ends with one sentence before its first step"
    with pytest.raises(InputError) as caught:
        trainer.fit(Net(), **how)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert trainer.global_step == 0 or how


def test_one_callback_is_one_record(tmp_path, float64):
    path = tmp_path / "a.parquet"
    callback = ScoreCallback(path)
    trainer = trainer_of(callback)
    trainer.fit(Net())
    kept = path.read_bytes()
    told = "this ScoreCallback holds the record of an earlier fit: make a new one"
    refused(told, trainer_of(callback))
    trainer.fit_loop.max_epochs = 3
    with pytest.raises(InputError, match=told):
        trainer.fit(Net())  # of the same trainer
    refused("a.parquet holds the record of another run", trainer_of(ScoreCallback(path)))
    assert path.read_bytes() == kept and steps(path) == list(range(6))
    fresh = ScoreCallback(tmp_path / "b.parquet")
    trainer_of(fresh).fit(Net())
    pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / f"{n}.parquet") for n in "ab"))


def test_a_resumed_run_goes_on_with_its_record(tmp_path, float64):
    path = tmp_path / "a.parquet"
    first = trainer_of(ScoreCallback(path))
    first.fit(Net())
    first.save_checkpoint(tmp_path / "a.ckpt")
    callback = ScoreCallback(path)
    trainer_of(callback, 2).fit(Net(), ckpt_path=tmp_path / "a.ckpt")
    trainer_of(ScoreCallback(tmp_path / "whole.parquet"), 2).fit(Net())
    pd.testing.assert_frame_equal(
        pd.read_parquet(path), pd.read_parquet(tmp_path / "whole.parquet")
    )
    trainer_of(callback, 3).fit(Net(), ckpt_path=tmp_path / "a.ckpt")  # its rows are replaced
    assert steps(path) == list(range(18))
    other = Net()
    torch.nn.init.constant_(other.net.weight, 0.1)
    trainer_of(ScoreCallback(tmp_path / "other.parquet")).fit(other)
    kept = (tmp_path / "other.parquet").read_bytes()
    callback = ScoreCallback(tmp_path / "other.parquet")
    told = "other.parquet holds the record of another run"
    refused(told, trainer_of(callback, 2), ckpt_path=tmp_path / "a.ckpt")
    assert (tmp_path / "other.parquet").read_bytes() == kept


def test_a_checkpoint_without_a_record_says_where_it_begins(tmp_path, float64):
    bare = pl.Trainer(devices=1, max_epochs=1, **QUIET)
    bare.fit(Net())
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    callback = ScoreCallback(tmp_path / "a.parquet", every=4)
    trainer_of(callback, 3).fit(Net(), ckpt_path=tmp_path / "bare.ckpt")
    assert steps(tmp_path / "a.parquet") == [8, 12, 16]


def test_two_callbacks_never_write_one_file(tmp_path, float64):
    path = tmp_path / "a.parquet"
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's own
        pl.Trainer(devices=1, callbacks=[ScoreCallback(path), ScoreCallback(path)], **QUIET)
    told = []

    class Second(pl.Callback):
        def on_train_batch_end(self, *args):
            if not told:
                told.append("a second run begins while the first one trains")
                refused("a is being written by process", trainer_of(ScoreCallback(path)))

    callbacks = [ScoreCallback(path), Second()]
    pl.Trainer(devices=1, max_epochs=1, callbacks=callbacks, **QUIET).fit(Net())
    assert (
        told
        and steps(path) == list(range(6))
        and [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    )


class Validated(Net):
    "With the sanity check before the first step, and a validation after every epoch"

    def validation_step(self, batch, _):
        return self.training_step(batch, _)["loss"]

    val_dataloader = Net.train_dataloader


def test_sanity_check_and_trial_leave_no_trace(tmp_path, float64):
    path = tmp_path / "a.parquet"
    callback = ScoreCallback(path)
    trial = pl.Trainer(devices=1, fast_dev_run=2, callbacks=[callback], **QUIET)
    trial.fit(Validated())
    assert not list(tmp_path.iterdir()) and len(callback.recorder.rows) == 2
    trainer_of(callback, 2, num_sanity_val_steps=2).fit(Validated())
    trainer_of(ScoreCallback(tmp_path / "plain.parquet"), 2).fit(Net())
    pd.testing.assert_frame_equal(
        pd.read_parquet(path), pd.read_parquet(tmp_path / "plain.parquet")
    )
    kept = path.read_bytes()
    callback = ScoreCallback(path)
    pl.Trainer(devices=1, fast_dev_run=True, callbacks=[callback], **QUIET).fit(Net())
    assert path.read_bytes() == kept  # a trial on the path of a finished run


def test_paths_and_foreign_files(tmp_path, monkeypatch, float64):
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer_of(ScoreCallback("~/new/run.parquet")).fit(Net())
    assert steps(tmp_path / "new" / "run.parquet") == list(range(6))
    for wrong in (None, "", 3, "a.csv", "a\0.parquet"):
        with pytest.raises(InputError, match="path is"):
            ScoreCallback(wrong)
    path = tmp_path / "mine.parquet"
    callback = ScoreCallback(path)
    path.write_text("mine")
    with pytest.raises(InputError, match="mine.parquet is no record of scores, so it stays"):
        ScoreCallback(path)
    refused("mine.parquet is no record of scores, so it stays", trainer_of(callback))
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(negs="neg"), "Did you mean 'neg'?"),
        (dict(positives="pos"), "training_step returned loss, neg, positives, but must return"),
    ],
)
def test_a_missing_entry_is_named_with_the_nearest(tmp_path, float64, change, said):
    class Misspelt(Net):
        def training_step(self, batch, _):
            out = super().training_step(batch, _)
            kept = dict(loss=out["loss"], pos=out["pos"], neg=out["neg"])
            for name, old in change.items():
                kept[name] = kept.pop(old)
            return kept

    with pytest.raises(InputError) as caught:
        trainer_of(ScoreCallback(tmp_path / "a.parquet")).fit(Misspelt())
    assert said in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "state", [{}, None, 3, dict(step=1), dict(step=-1, columns=[], table=torch.zeros(0, 0))]
)
def test_a_state_of_something_else(tmp_path, state):
    callback = ScoreCallback(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="the checkpoint holds no record of scores to go on with"):
        callback.load_state_dict(state)
    assert not callback.recorder.rows and callback.step == 0


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_either_package_will_do_and_none_is_told(monkeypatch):
    class Callback: ...

    package = types.SimpleNamespace(Callback=Callback)
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", package)
    assert runpy.run_module("ftcl.lightning")["ScoreCallback"].__mro__[1] is Callback
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert runpy.run_module("ftcl.lightning")["ScoreCallback"].__mro__[1] is pl.Callback
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    told = "^ftcl.lightning needs Lightning: install pytorch-lightning, or lightning.$"
    with pytest.raises(ImportError, match=told):
        runpy.run_module("ftcl.lightning")
