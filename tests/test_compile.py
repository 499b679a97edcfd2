"Compiled backbones: the same run but for its rounding, and the same names of weights"

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ftcl import train
from ftcl.checkpoint import load_encoder, read_checkpoint
from ftcl.core import InputError
from ftcl.method import METHODS, as_published, build_method, transform_of
from ftcl.record import defaults, difference, read_record
from ftcl.scores import read_scores
from ftcl.train import _compile_backbones, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
RUN = dict(n_images=64, size=16, epochs=1, batch_size=16, queue_size=64, readouts="none")
RUN |= dict(precision="fp32", progress=False, mixing="posneg", lr=0.02)


def why_not():
    "Why torch cannot compile here; empty if it can"
    try:
        torch.compile(torch.nn.Linear(2, 2))(torch.zeros(1, 2))
    except Exception as e:
        return f"torch cannot compile here: {type(e).__name__}"
    return ""


REASON = why_not()
needs_compiler = pytest.mark.skipif(bool(REASON), reason=REASON or "none")


def method_of(name):
    p = as_published(defaults(train.pretrain) | dict(method=name, precision="fp32", mixing="none"))
    return build_method(p, transform_of(p))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "The same run, uncompiled and compiled"
    out = tmp_path_factory.mktemp("compile")
    torch._dynamo.reset()
    for name, compiled in (("plain", False), ("compiled", True)):
        pretrain(**RUN, compiled=compiled, out=str(out), name=name)
    return out


@needs_compiler
def test_losses_agree(both):
    plain, compiled = (read_scores(both / f"{name}.parquet") for name in ("plain", "compiled"))
    assert len(plain) == 4
    for column in ("loss", "pos_mean", "neg_mean"):
        np.testing.assert_allclose(compiled[column], plain[column], rtol=0, atol=1e-4)
    assert not plain.equals(compiled), "nothing was compiled"


@needs_compiler
def test_names_of_weights_stay(both):
    plain, compiled = (read_checkpoint(both / f"{n}.safetensors")[0] for n in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert {n: (x.shape, x.dtype) for n, x in plain.items()} == {
        n: (x.shape, x.dtype) for n, x in compiled.items()
    }


READ = """
import sys, torch
sys.modules["torch._inductor.compile_fx"] = None  # whoever compiles here fails
from ftcl.checkpoint import load_encoder
encoder, p = load_encoder({path!r})
assert p["compiled"] is True and encoder.backbone._compiled_call_impl is None
torch.save(encoder(torch.linspace(-1, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16)), {out!r})
"""


@needs_compiler
def test_a_process_without_a_compiler_reads_the_checkpoint(both, tmp_path):
    path = str(both / "compiled.safetensors")
    code = READ.format(path=path, out=str(tmp_path / "z"))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    encoder, _ = load_encoder(path)
    x = torch.linspace(-1, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16)
    assert torch.allclose(torch.load(tmp_path / "z"), encoder(x), atol=1e-5)


@needs_compiler
def test_the_record_says_so_and_the_other_run_is_refused(both):
    record = read_record(both / "compiled.json")
    assert record["parameters"]["compiled"] is True
    with pytest.raises(InputError, match="holds the record of a run with compiled=True, not False"):
        pretrain(**RUN, out=str(both), name="compiled")
    with pytest.raises(InputError, match="holds the record of a run with compiled=False, not True"):
        pretrain(**RUN, out=str(both), name="plain", compiled=True)


@needs_compiler
def test_a_compiled_run_is_resumed(both, tmp_path):
    asked = RUN | dict(compiled=True, out=str(tmp_path), name="parts", resume=True)
    pretrain(**asked, stop_after=2)
    pretrain(**asked)
    a, b = (read_checkpoint(path)[0] for path in (
        both / "compiled.safetensors", tmp_path / "parts.safetensors"
    ))  # fmt: skip
    assert all(torch.allclose(a[name], b[name], atol=1e-5, equal_nan=True) for name in a)


def test_an_early_record_was_not_compiled(monkeypatch):
    "Whatever the default will be one day"
    p = as_published(defaults(pretrain))
    old = {name: value for name, value in p.items() if name != "compiled"}
    monkeypatch.setattr("ftcl.record.defaults", lambda f: defaults(f) | dict(compiled=True))
    assert difference(p, old, pretrain) == ""
    assert difference(p | dict(compiled=True), old, pretrain) == "compiled=False, not True"


@needs_compiler
@pytest.mark.parametrize("name", METHODS)
def test_every_backbone_of_a_method_is_compiled(name):
    "They are compiled when they are first called, which is not tried here"
    method = method_of(name)
    names = list(method.state_dict())
    encoders = [m for m in method.modules() if isinstance(m, train.Encoder)]
    assert encoders and all(e.backbone._compiled_call_impl is None for e in encoders)
    _compile_backbones(method, torch.device("cpu"))
    assert all(e.backbone._compiled_call_impl is not None for e in encoders)
    assert list(method.state_dict()) == names


def test_where_torch_cannot_compile_one_sentence_says_so(tmp_path, monkeypatch):
    def failing(f):
        def call(*x):
            raise RuntimeError("InvalidCxxCompiler: no compiler was found\nand more of it")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    said = "compiled is True, but torch cannot compile here (InvalidCxxCompiler: no compiler was"
    with pytest.raises(InputError, match=re.escape(said)):
        pretrain(**RUN, compiled=True, out=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_dry_run_may_be_compiled(tmp_path, capsys):
    assert pretrain(**RUN, compiled=True, out=str(tmp_path), dry_run=True) is None
    assert "median of 1 after 3 to warm up" in capsys.readouterr().out
