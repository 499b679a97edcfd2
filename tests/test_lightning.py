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


def fit(path, processes):
    "Two epochs of `Net`, recorded into `path`"
    callback = ScoreCallback(path, tau=0.2)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net())
    assert len(callback.recorder.rows) == 12  # in every process


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


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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
