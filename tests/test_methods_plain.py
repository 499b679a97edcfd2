"""SimSiam, BYOL and Barlow Twins: anchors of their losses, whole runs, resume, two processes

Whole runs are small: 384 images of 16 x 16 pixels, 90 steps, a few seconds each on one thread.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity

from ftcl.checkpoint import read_checkpoint
from ftcl.core import InputError
from ftcl.encoder import Encoder, batch_parts, small_resnet
from ftcl.method import METHODS
from ftcl.methods.barlow import BarlowTwins, barlow_loss, cross_correlations
from ftcl.methods.byol import BYOL
from ftcl.methods.simsiam import SimSiam
from ftcl.scores import read_scores
from ftcl.train import check_run, pretrain
from ftcl.transform import FeatureTransform

# rates and views under which each method learns something of these very images: no claim
LR = dict(simsiam=0.2, byol=0.2, barlow=0.01)  # for batches of 64, and 90 steps
SMOKE = dict(n_images=384, holdout=256, size=16, batch_size=64, epochs=15, dim=32)
SMOKE |= dict(view_strength=0.5, precision="fp32", progress=False, readouts="knn_backbone")
SHORT = SMOKE | dict(n_images=96, holdout=32, batch_size=32, epochs=2, bn_splits=4, lr=0.02)
MIXINGS = [
    (name, mixing)
    for name in LR
    for mixing in ("none", "pos")
    if (name, mixing) != ("barlow", "pos")
]


pytestmark = pytest.mark.usefixtures("one_thread")


def small(kind, head, mixing="none", dim=64, **options):
    "A method with a small encoder in float64"
    torch.manual_seed(0)
    encoder = Encoder(small_resnet((8,)), head, dim).double()
    return kind(encoder, FeatureTransform(mixing, **options))


# ---------------------------------------------------------------- losses


def anchor_vectors():
    "z0, z1, p0, p1 of the anchors that are correlated, (64, 64) each"
    torch.manual_seed(0)
    z0 = torch.randn(64, 64)
    z1 = z0 + 0.5 * torch.randn(64, 64)
    p0 = z0 + 0.5 * torch.randn(64, 64)
    p1 = z1 + 0.5 * torch.randn(64, 64)
    return [x.double() for x in (z0, z1, p0, p1)]


def test_simsiam_keeps_its_anchors():
    method = small(SimSiam, "mlp3_bn")
    torch.manual_seed(0)
    z0, z1, p0, p1 = (torch.randn(64, 64).double() for _ in range(4))
    loss = method.compare([p0, p1], [z1, z0]).loss
    assert loss.item() == pytest.approx(-0.003732654335, abs=1e-9)
    z0, z1, p0, p1 = anchor_vectors()
    p0.requires_grad_()
    z0.requires_grad_()
    loss = method.compare([p0, p1], [z1, z0]).loss
    loss.backward()
    assert loss.item() == pytest.approx(-0.801250986366, abs=1e-9)
    assert p0.grad.norm().item() == pytest.approx(0.004362797963, abs=1e-9)
    assert z0.grad is None


def test_byol_keeps_its_anchor():
    z0, z1, p0, p1 = anchor_vectors()
    loss = small(BYOL, "mlp_bn").compare([p0, p1], [z1, z0]).loss
    assert loss.item() == pytest.approx(0.794996054537, abs=1e-9)


def fifty_steps(loss_of, lr):
    "Losses and final weights of a small network that is trained by a loss of its two views"
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 64))
    net = net.double()
    guess = torch.nn.Linear(64, 64).double()
    weights = [*net.parameters(), *guess.parameters()]
    optimizer = torch.optim.SGD(weights, lr, momentum=0.9)
    losses = []
    for _ in range(50):
        x = torch.randn(48, 16, generator=g).double()
        views = [x + 0.3 * torch.randn(48, 16, generator=g).double() for _ in range(2)]
        z = [net(v) for v in views]
        loss = loss_of([guess(o) for o in z], z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([w.detach().flatten() for w in weights])


def assert_alike(ours, theirs):
    "Losses and weights of two trainings; and they did train"
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-9)
    assert ours[0][-1] < ours[0][0] - 0.05


def test_simsiam_trains_as_lightly_does():
    method = small(SimSiam, "mlp3_bn")
    theirs = NegativeCosineSimilarity()

    def lightly(p, z):
        return 0.5 * (theirs(z[0].detach(), p[1]) + theirs(z[1].detach(), p[0]))

    ours = fifty_steps(lambda p, z: method.compare(p, z[::-1]).loss, 0.1)
    assert_alike(ours, fifty_steps(lightly, 0.1))


def test_byol_trains_as_lightly_does_at_a_quarter_of_the_rate():
    "Whose loss is a quarter of the paper's, up to a constant"
    method = small(BYOL, "mlp_bn")
    theirs = NegativeCosineSimilarity()

    def lightly(p, z):
        return 0.5 * (theirs(p[0], z[1].detach()) + theirs(p[1], z[0].detach()))

    losses, weights = fifty_steps(lambda p, z: method.compare(p, z[::-1]).loss, 0.025)
    ours = ((np.array(losses) - 4) / 4, weights)
    assert_alike(ours, fifty_steps(lightly, 0.1))


def test_barlow_twins_trains_as_lightly_does():
    theirs = BarlowTwinsLoss()
    ours = fifty_steps(lambda p, z: barlow_loss(cross_correlations(*p)), 0.001)
    assert_alike(ours, fifty_steps(lambda p, z: theirs(*p), 0.001))


# ---------------------------------------------------------------- extrapolation


@pytest.mark.parametrize("kind, head", [(SimSiam, "mlp3_bn"), (BYOL, "mlp_bn")])
def test_extrapolation_multiplies_the_gradient(kind, head):
    """By c as released, by l squared with a detached target, by a factor of each pair's score where
    renormalised: S' = (1 - c u) / |q_hat|^2 with |q_hat|^2 = 1 + (c - 1) u and u = 1 - S, so
    dS'/dS = (2 c - 1) / |q_hat|^4. The other levels are no single multiple."""
    images = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    def gradient(mixing, factor=None, **options):
        "Of one direction, each pair times its factor; and the l that was drawn"
        g = torch.Generator().manual_seed(1)
        method = small(kind, head, mixing, generator=g, **options)
        z = [method.encoder.before_sphere(v) for v in images]
        step = method.compare([method.predictor(z[0])], [z[1]])
        loss = step.loss
        if factor is not None:
            u = 1 - step.pos.detach()  # (16,) what each pair lacks
            loss = method.loss_of(factor(u) * step.pos)  # its slope is the same at each score
        weights = [w for w in method.parameters() if w.requires_grad]
        grads = torch.autograd.grad(loss, weights)
        lam = step.drawn["l_ex"].double() if step.drawn else None
        return torch.cat([x.flatten() for x in grads]), lam

    def apart(a, b):
        return ((a - b).norm() / b.norm()).item()

    plain, _ = gradient("none")
    mixed, lam = gradient("pos")
    c = 1 + 2 * lam * (lam - 1)
    assert apart(mixed, c * plain) < 1e-9
    detached, _ = gradient("pos", detach_key=True)
    assert apart(detached, lam**2 * plain) < 1e-9
    renormalized, _ = gradient("pos", renormalize=True)
    by_pair, _ = gradient("none", lambda u: (2 * c - 1) / (1 + (c - 1) * u) ** 2)
    assert apart(renormalized, by_pair) < 1e-9
    for options in (dict(level="sample"), dict(level="dimension")):
        other, _ = gradient("pos", **options)
        nearest = (other @ plain) / (plain @ plain)
        assert apart(other, nearest * plain) > 0.01, options


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    "kNN accuracy of each method's encoder whose weights never move"
    found = {}
    for name in LR:
        still = SMOKE | dict(method=name, lr=0.0, epochs=1, out=str(tmp_path_factory.mktemp(name)))
        found[name] = pretrain(**still)["metrics"]["knn_backbone"]
    return found


@pytest.mark.parametrize("name, mixing", MIXINGS)
def test_a_short_run_lifts_knn(name, mixing, untrained, tmp_path):
    record = pretrain(**SMOKE, method=name, mixing=mixing, lr=LR[name], out=str(tmp_path))
    assert record["metrics"]["knn_backbone"] > untrained[name] + 10, (record["metrics"], untrained)
    scores = read_scores(tmp_path / "pretrain.parquet")
    assert scores.before_pos_mean.iloc[-1] > scores.before_neg_mean.iloc[-1] + 0.05
    assert scores.l_ex.notna().all() == (mixing == "pos")


@pytest.mark.parametrize("name", LR)
def test_a_record_has_the_columns_of_moco(name, tmp_path):
    "All hold numbers, but for what was not drawn, and the gradient where it passes by the query"
    mixing = "none" if name == "barlow" else "pos"
    for method in ("moco_v2", name):
        run = SHORT | dict(method=method, mixing=mixing, queue_size=64)
        pretrain(**run, name=method, out=str(tmp_path))
    theirs = read_scores(tmp_path / "moco_v2.parquet")
    ours = read_scores(tmp_path / f"{name}.parquet")
    assert list(ours) == list(theirs)
    empty = {column for column in ours if ours[column].isna().any()}
    allowed = dict(simsiam={"l_in"}, byol={"l_in"}, barlow={"l_in", "l_ex", "grad_query"})
    assert empty == allowed[name]


@pytest.mark.parametrize("name, strength", [("simsiam", 1.0), ("byol", "auto"), ("barlow", 1.0)])
def test_a_run_that_was_stopped_ends_in_the_same_bits(name, strength, tmp_path):
    mixing = "none" if name == "barlow" else "pos"
    run = SHORT | dict(method=name, mixing=mixing, strength=strength)
    pretrain(**run, name="whole", out=str(tmp_path))
    assert pretrain(**run, name="cut", out=str(tmp_path), stop_after=4) is None
    pretrain(**run, name="cut", out=str(tmp_path), resume=True)
    whole, cut = (read_checkpoint(tmp_path / f"{n}.safetensors")[0] for n in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for tensor in whole:
        if tensor.startswith(("method.", "sgd.")):
            assert np.array_equal(whole[tensor], cut[tensor]), tensor
    a, b = (read_scores(tmp_path / f"{n}.parquet") for n in ("whole", "cut"))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_first_weights_depend_on_the_seed_alone(tmp_path):
    "Of the predictor too, whatever was drawn before"
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        run = SHORT | dict(method="byol", lr=0.0, epochs=1)
        pretrain(**run, name=f"run{noise}", out=str(tmp_path))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(read_checkpoint(tmp_path / f"run{noise}.safetensors")[0])
    for tensor in found[0]:
        if tensor.startswith("method."):
            assert np.array_equal(found[0][tensor], found[1][tensor]), tensor


def test_the_slow_encoder_of_a_run_comes_to_rest(tmp_path):
    "m rises: with m = 0 at the start the key encoder follows at once, but not at the end"
    run = SHORT | dict(method="byol", momentum=0.0)
    pretrain(**run, name="short", out=str(tmp_path), stop_after=1)
    pretrain(**run, name="long", out=str(tmp_path))
    gaps = {}
    for name in ("short", "long"):
        tensors = read_checkpoint(tmp_path / f"{name}.safetensors")[0]
        pairs = [
            (tensors[key], tensors[key.replace("key_encoder.", "encoder.")])
            for key in tensors
            if key.startswith("method.key_encoder.") and key.endswith("weight")
        ]
        gaps[name] = max(abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs)
    assert gaps["short"] == 0 and gaps["long"] > 1e-6


def test_the_predictor_is_split_as_the_backbone():
    for name in ("simsiam", "byol"):
        encoder = Encoder("small", METHODS[name].head, 16, bn_splits=4)
        method = METHODS[name](encoder, FeatureTransform("none"))
        assert batch_parts(method.predictor) == 4


@pytest.mark.parametrize("name", LR)
def test_what_has_no_place_is_refused(name):
    with pytest.raises(InputError, match=f"mixing is 'neg'.*{name}"):
        check_run(dict(method=name, mixing="neg"))
    if name == "barlow":
        with pytest.raises(InputError, match="mixing is 'pos', but must be none with barlow"):
            check_run(dict(method=name, mixing="pos"))
    else:
        check_run(dict(method=name, mixing="pos"))
    with pytest.raises(InputError, match="but must be an Encoder"):
        METHODS[name](torch.nn.Linear(2, 2), FeatureTransform("none"))


def test_what_is_no_correlation_is_one_sentence():
    a, b = torch.randn(2, 8, 4)
    for f, message in (
        (lambda: barlow_loss([1]), "c is a list, but must be a tensor of shape .D, D."),
        (lambda: barlow_loss(a), "c has the shape .8, 4., but must be .D, D."),
        (lambda: barlow_loss(torch.eye(3), -1), "weight is -1, but must be a number above 0"),
        (lambda: cross_correlations(a.long(), b.long()), "a holds torch.int64 as torch.strided"),
        (lambda: cross_correlations(a, b.double()), "a is .* and b is .*: make them alike"),
    ):
        with pytest.raises(InputError, match=message):
            f()


@pytest.mark.parametrize("kind", [SimSiam, BYOL, BarlowTwins])
def test_bfloat16_stays_inside_the_networks(kind):
    torch.manual_seed(0)
    encoder = Encoder("small", kind.head, 16)
    method = kind(encoder, FeatureTransform("none"), precision="bf16")
    seen = []
    encoder.backbone[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    step = method(*torch.randn(2, 8, 3, 16, 16))
    assert set(seen) == {torch.bfloat16}
    assert {o.dtype for o in (step.loss, step.pos, step.neg, *step.features)} == {torch.float32}
