"Two processes that share every batch do what one does"
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ftcl.record import read_record
from ftcl.train import pretrain, read_checkpoint

ROOT = Path(__file__).parent.parent
RUN = dict(n_images=200, epochs=2, batch_size=64, queue_size=100, bn_splits=4, mixing="posneg", precision="fp32", progress=False, lr=0.02)
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(tmp_path, **parameters):
    "`pretrain` in two processes"
    script = tmp_path / "run.py"
    script.write_text(f"from ftcl.train import pretrain\npretrain(**{parameters!r})\n")
    return subprocess.run([*LAUNCH, str(script)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("how", [dict(level="feature"), dict(level="dimension", symmetric=True, queue_size=150), dict(level="sample", mixing="pos")], ids=str)
def test_two_processes_train_as_one(tmp_path, how):
    p = RUN | how | dict(out=str(tmp_path))
    one = pretrain(**p, name="one")
    run = launch(tmp_path, **p, name="two")
    assert run.returncode == 0, run.stderr
    two = read_record(tmp_path / "two.json")
    assert (two["processes"], two["steps"]) == (2, one["steps"])
    a, b = (pd.read_parquet(tmp_path / f"{n}.parquet") for n in ("one", "two"))
    smooth = [c for c in a if "_q" not in c]
    np.testing.assert_allclose(a[smooth], b[smooth], atol=2e-4, rtol=2e-3)
    (x, _), (y, _) = (read_checkpoint(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    assert torch.equal(x["method.queue.ptr"], y["method.queue.ptr"])
    assert (x["method.queue.keys"] - y["method.queue.keys"]).abs().max() < 5e-3
    statistics = [n for n in x if n.endswith("running_mean")]
    assert all((x[n] - y[n]).abs().max() < 0.02 for n in statistics)
    assert max((x[n] - y[n]).abs().max() for n in x if n.endswith("weight")) < 1e-3


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    run = launch(tmp_path, **RUN | dict(bn_splits=1), out=str(tmp_path / "out"))
    assert run.returncode != 0
    assert "bn_splits is 1, but must be a multiple of the 2 processes." in run.stderr
