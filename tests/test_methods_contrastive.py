"SimCLR, MoCo v3 and i-Mix: their losses, runs, and resumed runs"

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss

import ftcl.methods.imix  # each enters METHODS by its name
import ftcl.methods.moco_v3
import ftcl.methods.simclr  # noqa: F401
from ftcl.checkpoint import read_checkpoint
from ftcl.core import InputError, Processes
from ftcl.encoder import Encoder
from ftcl.loss import in_batch, info_nce
from ftcl.method import METHODS, join_contrasts
from ftcl.methods.moco_v3 import MoCoV3
from ftcl.methods.simclr import SimCLR, gather_with_gradient
from ftcl.scores import read_scores
from ftcl.train import pretrain
from ftcl.transform import FeatureTransform

NAMES = ["simclr", "moco_v3", "imix"]


pytestmark = pytest.mark.usefixtures("one_thread")


class Flat(torch.nn.Module):
    "Images of 2 x 2 pixels as vectors, and one layer: small enough for 50 steps in no time"

    width = 12

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 12)

    def forward(self, x):
        return self.layer(x.flatten(1)).relu()


def flat_encoder(head="mlp", dim=8):
    torch.manual_seed(0)
    return Encoder(Flat(), head, dim)


def images(count, seed):
    "Two related views of random images"
    torch.manual_seed(seed)
    v = torch.randn(count, 3, 2, 2)
    return v + 0.3 * torch.randn_like(v), v + 0.3 * torch.randn_like(v)


# ---------------------------------------------------------------- losses


def nt_xent(method, a, b):
    "The loss of SimCLR at given vectors"
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    both = join_contrasts([method.direction(*z, True, True) for z in ((a, b), (b, a))])
    return info_nce(both.pos, both.neg, method.tau)


@pytest.mark.parametrize(
    "tau, related, value",
    [(0.5, False, 4.859545958077), (0.1, False, 5.241946226427), (0.5, True, 3.112359779420)],
)
def test_nt_xent_has_the_values_of_lightly(tau, related, value):
    torch.manual_seed(0)
    a, b = torch.randn(64, 128), torch.randn(64, 128)
    b = a + 0.5 * b if related else b
    method = SimCLR(flat_encoder(), FeatureTransform("none"), tau=tau)
    assert abs(nt_xent(method, a.double(), b.double()) - value) < 1e-9
    assert abs(NTXentLoss(tau)(a.double(), b.double()) - value) < 1e-9


@pytest.mark.parametrize("beta, value", [(1.0, 2.449125449268), (0.5, 2.416103084330)])
def test_reweighted_nt_xent_has_the_values_of_its_authors(beta, value):
    torch.manual_seed(0)
    a, b = torch.randn(64, 128), torch.randn(64, 128)
    a, b = (F.normalize(x.double(), dim=1) for x in (a, a + 0.5 * b))
    method = SimCLR(flat_encoder(), FeatureTransform("none"), hardness=beta, false_share=0.1)
    both = join_contrasts([method.direction(*z, True, True) for z in ((a, b), (b, a))])
    assert abs(method.softmax_loss(both.pos, both.neg)[0] - value) < 1e-9


def test_fifty_steps_of_simclr_are_those_of_lightly(float64):
    ours = SimCLR(flat_encoder(), FeatureTransform("none"))
    theirs = flat_encoder()
    optimizers = [torch.optim.SGD(m.parameters(), 0.5, momentum=0.9) for m in (ours, theirs)]
    criterion = NTXentLoss(0.5)
    losses = []
    for seed in range(50):
        v1, v2 = images(32, seed)
        pair = ours(v1, v2).loss, criterion(theirs(v1), theirs(v2))
        for loss, optimizer in zip(pair, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert abs(pair[0] - pair[1]) < 1e-9
        losses.append(pair[0].item())
    assert losses[-1] < losses[0] - 0.1  # they learned
    for a, b in zip(ours.encoder.parameters(), theirs.parameters()):
        np.testing.assert_allclose(a.detach(), b.detach(), rtol=0, atol=1e-9)


def test_fifty_steps_of_moco_v3_are_those_of_a_plain_loop(float64):
    ours, plain = (MoCoV3(flat_encoder("mlp_bn"), FeatureTransform("none")) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    learning = [[w for w in m.parameters() if w.requires_grad] for m in (ours, plain)]
    optimizers = [torch.optim.SGD(weights, 0.1, momentum=0.9) for weights in learning]
    for seed in range(50):
        v1, v2 = images(32, seed)
        step = ours(v1, v2)
        loss = 0
        for v, w in ((v1, v2), (v2, v1)):
            q = F.normalize(plain.predictor(plain.encoder.before_sphere(v)), dim=1)
            k = F.normalize(plain.key_encoder.before_sphere(w), dim=1).detach()
            loss = loss + F.cross_entropy(q @ k.T / 0.2, torch.arange(32)) / 2
        assert abs(step.loss - loss) < 1e-9
        for value, optimizer in zip((step.loss, loss), optimizers):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        ours.update(step)
        with torch.no_grad():
            for slow, fast in zip(plain.key_encoder.parameters(), plain.encoder.parameters()):
                slow.mul_(0.99).add_(0.01 * fast)
    for name, x in ours.state_dict().items():
        np.testing.assert_allclose(x, plain.state_dict()[name], rtol=0, atol=1e-9, err_msg=name)


def test_no_gradient_reaches_the_slow_encoder():
    method = MoCoV3(flat_encoder("mlp_bn"), FeatureTransform("posneg"))
    method(*images(16, 0)).loss.backward()
    assert all(w.grad is None for w in method.key_encoder.parameters())
    learning = [*method.encoder.parameters(), *method.predictor.parameters()]
    assert all(w.grad is not None for w in learning)


# ---------------------------------------------------------------- in-batch negatives


@pytest.mark.parametrize("level", ["feature", "sample", "dimension"])
@pytest.mark.parametrize("append", [False, True])
def test_no_part_of_a_query_s_own_image_is_among_its_negatives(level, append, float64):
    "Vectors of each image live in dimensions of their own: whatever they enter has a score"
    n = 6
    own = torch.eye(n).repeat_interleave(2, 1)  # (6, 12)
    a, b = (F.normalize(own * torch.rand(n, 2 * n), dim=1) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    options = dict(level=level, append=append, generator=g)
    method = SimCLR(flat_encoder(dim=12), FeatureTransform("neg", **options))
    for q, k in ((a, b), (b, a)):
        neg = method.direction(q, k, True, True).neg  # (6, 12) or (6, 24)
        assert neg.isinf().any(1).all()
        assert neg[neg.isfinite()].abs().max() == 0
        assert neg.isfinite().any(1).all()


def test_every_query_of_moco_v3_misses_its_own_key(float64):
    method = MoCoV3(flat_encoder("mlp_bn"), FeatureTransform("none"))
    step = method(*images(8, 0))
    own = torch.cat([torch.eye(8, dtype=torch.bool)] * 2)
    assert torch.equal(step.neg.isinf(), own)


def shared(count, loss):
    "Losses of some processes, one after the other, and the gradient that each gets at its rows"
    torch.manual_seed(0)
    rows = torch.randn(count * 3, 4)
    wanted = []  # what each process's loss wants of all rows
    for rank in range(count):
        z = rows.clone().requires_grad_()
        wanted.append(torch.autograd.grad(loss(rank, z), z)[0])
    got = []
    for rank in range(count):
        calls = [rows.clone(), torch.cat(wanted)]  # forward, then backward
        processes = Processes(rank, count, lambda x, calls=calls: calls.pop(0))
        part = processes.part(rows).clone().requires_grad_()
        loss(rank, gather_with_gradient(part, processes)).backward()
        got.append(part.grad)
    return rows, torch.cat(got)


@pytest.mark.parametrize("count", [2, 3])
def test_gathered_rows_get_what_all_losses_want(count, float64):
    "And so the mean over processes is the gradient of the mean loss"

    def loss(rank, z):
        return ((rank + 1) * z).sin().sum() + z.pow(rank + 2).sum()

    rows, got = shared(count, loss)
    z = rows.clone().requires_grad_()
    (sum(loss(rank, z) for rank in range(count)) / count).backward()
    np.testing.assert_allclose(got / count, z.grad, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- runs

TINY = dict(n_images=96, holdout=32, size=16, epochs=2, batch_size=32, queue_size=64, dim=16)
TINY |= dict(precision="fp32", progress=False, lr=0.02, readouts="knn_backbone")
SMOKE = dict(n_images=768, holdout=256, size=16, batch_size=32, queue_size=64, dim=32)
SMOKE |= dict(view_strength=0.5, precision="fp32", progress=False, readouts="knn_backbone")
EPOCHS = dict(simclr=3, moco_v3=3, imix=8)  # a queue takes its time


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_lifts_knn(name, tmp_path):
    "Above an encoder that saw the images at a learning rate of 0"
    p = SMOKE | dict(method=name, out=str(tmp_path))
    untrained = pretrain(**p | dict(epochs=1, lr=0.0), name="untrained")
    for mixing in (dict(mixing="none"), dict(mixing="pos", strength=0.2)):
        trained = pretrain(**p | dict(epochs=EPOCHS[name]) | mixing, name=mixing["mixing"])
        gain = trained["metrics"]["knn_backbone"] - untrained["metrics"]["knn_backbone"]
        assert gain > 8, (mixing, gain)


def state(path):
    "All tensors of a checkpoint, and all scores"
    return read_checkpoint(f"{path}.safetensors")[0], read_scores(Path(f"{path}.parquet"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [1.0, "auto"])
def test_a_stopped_run_goes_on_to_the_same_bits(name, strength, tmp_path):
    p = TINY | dict(method=name, mixing="posneg", strength=strength, out=str(tmp_path))
    pretrain(**p, name="whole")
    assert pretrain(**p, name="parts", stop_after=4) is None
    pretrain(**p, name="parts", resume=True)
    a, b = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert a[0].keys() == b[0].keys()
    for key in a[0]:
        assert torch.equal(torch.as_tensor(a[0][key]), torch.as_tensor(b[0][key])), key
    pd.testing.assert_frame_equal(a[1], b[1], check_exact=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_has_the_columns_of_moco(name, tmp_path):
    p = TINY | dict(mixing="posneg", strength="auto", out=str(tmp_path), epochs=1)
    tables = []
    for method in (name, "moco_v2"):
        pretrain(**p | dict(method=method), name=method)
        tables.append(read_scores(tmp_path / f"{method}.parquet"))
    assert list(tables[0]) == list(tables[1])
    missing = [column for column in tables[0] if tables[0][column].isna().all()]
    assert missing == [column for column in tables[1] if tables[1][column].isna().all()]


@pytest.mark.parametrize("name", NAMES)
def test_options_of_a_run_reach_the_method(name, tmp_path):
    p = TINY | dict(method=name, symmetric=name == "imix", epochs=1)
    record = pretrain(**p, out=str(tmp_path))
    assert record["steps"] == 3
    method = METHODS[name]
    hard = pretrain(
        **p | dict(hardness=1.0),
        out=str(tmp_path),
        name="hard",
    )
    assert hard["epochs"][0]["loss"] != record["epochs"][0]["loss"]
    p = TINY | dict(momentum=0.9, tau=0.2, tau_pos=0.1, symmetric=False, neg_query="original")
    torch.manual_seed(0)
    ft = FeatureTransform("posneg", generator=torch.Generator().manual_seed(0))
    made = method.make(
        Encoder("small", method.head, 16),
        ft,
        p | dict(precision="bf16"),
        torch.Generator().manual_seed(0),
    )
    assert (made.tau, made.tau_pos, made.neg_query, made.bf16) == (0.2, 0.1, "original", True)
    step = made(*(torch.randn(8, 3, 16, 16) for _ in range(2)))
    step.loss.backward()
    assert step.loss.isfinite() and step.pos.dtype == torch.float32


def test_a_mistake_is_one_sentence(tmp_path):
    run = TINY | dict(out=str(tmp_path))
    with pytest.raises(InputError, match="queue_size is 16, but must be at least 32"):
        pretrain(**run | dict(method="imix", queue_size=16))
    with pytest.raises(InputError, match="Did you mean 'simclr'"):
        pretrain(**run | dict(method="simcrl"))
    with pytest.raises(InputError, match="must hold 2 or more queries"):
        in_batch(torch.randn(1, 8), torch.randn(1, 8))
