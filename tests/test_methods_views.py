"""InfoMin and SwAV: their losses, their training, and what they share with every other method

Augmentation D comes with them.
"""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss, SwaVLoss

import ftcl.methods.all
import ftcl.methods.infomin
import ftcl.methods.swav  # noqa: F401
from ftcl.checkpoint import read_checkpoint
from ftcl.core import InputError, seeded
from ftcl.data import shapes
from ftcl.method import METHODS, build_method, transform_of
from ftcl.methods.infomin import InfoMin, orders
from ftcl.methods.swav import SwAV, sinkhorn, swapped_loss
from ftcl.scores import read_scores
from ftcl.train import pretrain
from ftcl.transform import FeatureTransform
from ftcl.views import AUGMENTATIONS, Augmentation, augment, two_views, with_view_strength

NAMES = ["infomin", "swav", "swav_multicrop"]
RUN = dict(n_images=96, holdout=32, size=16, epochs=2, batch_size=32, queue_size=50, bn_splits=4)
RUN |= dict(dim=16, precision="fp32", progress=False, lr=0.02)
SMOKE = dict(n_images=1024, holdout=256, size=16, epochs=5, batch_size=64, queue_size=256, dim=32)
SMOKE |= dict(precision="fp32", progress=False, readouts="knn_backbone")


def parameters(**more):
    p = dict(encoder="small", stem="small", dim=16, bn_splits=1, seed=0, epochs=4, batch_size=32)
    p |= dict(precision="fp32", queue_size=64, momentum=-1.0, tau=-1.0, tau_pos=0.0)
    p |= dict(symmetric=False, neg_query="transformed", mixing="none")
    return p | more


def built(**more):
    p = parameters(**more)
    return build_method(p, transform_of(p, torch.Generator()))


def drawn(rows):
    return F.normalize(torch.randn(rows, 128).double(), dim=1)


# Losses


def test_the_anchors_of_swav():
    torch.manual_seed(0)
    z = [drawn(64) for _ in range(4)]
    C = drawn(30)
    S = [o @ C.T for o in z]
    codes = [sinkhorn(o) for o in S[:2]]
    assert abs(swapped_loss(S, codes, 0.1).item() - 3.774588809471) < 1e-9
    assert abs(swapped_loss(S[:2], codes, 0.1).item() - 3.789937626581) < 1e-9
    Q = codes[0]
    found = [Q[0, 0].item(), Q[63, 29].item(), Q.max().item()]
    known = [0.001639205938, 0.035306942075, 0.729995174705]
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-9)


def test_swav_is_lightlys_over_50_steps():
    "Losses, vectors and prototypes of two trainings that differ in nothing but the loss"
    torch.manual_seed(0)
    start = [drawn(48) for _ in range(4)] + [drawn(30)]
    both = []
    for loss_of in (lambda S: swapped_loss(S, [sinkhorn(o.detach()) for o in S[:2]], 0.1),
                    lambda S: SwaVLoss()(S[:2], S[2:])[0]):  # fmt: skip
        weights = [o.clone().requires_grad_() for o in start]
        optimizer = torch.optim.SGD(weights, 5.0, momentum=0.9)
        losses = []
        for _ in range(50):
            *z, C = (F.normalize(o, dim=1) for o in weights)
            loss = loss_of([o @ C.T for o in z])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        both.append((losses, torch.cat(weights).detach()))
    assert both[0][0][-1] < both[0][0][0] - 0.5
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=0, atol=1e-9)
    torch.testing.assert_close(both[0][1], both[1][1], rtol=0, atol=1e-8)


def test_infomin_is_lightlys_loss_for_views_and_jigsaws_over_50_steps():
    "lightly's NT-Xent with a memory bank is InfoNCE with a queue"
    torch.set_default_dtype(torch.float64)
    try:
        method = built(method="infomin", queue_size=64, batch_size=16)
        optimizer = torch.optim.SGD(method.parameters(), 0.05, momentum=0.9)
        criterion = NTXentLoss(temperature=0.15, memory_bank_size=(64, 16))
        first = None
        for i in range(50):
            images = shapes(16, i % 4).images
            views = two_views(images, AUGMENTATIONS["B"], 9, torch.Generator().manual_seed(i))
            method.transform.generator.manual_seed(i)
            step = method(*(v.double() for v in views))
            k = step.kept["keys"]
            q = step.features[0]
            bank = method.queue.keys.T.clone()  # (D, K)
            criterion.memory_bank.forward = lambda out, update=False, bank=bank: (out, bank)
            theirs = [criterion(one, k) for one in q.chunk(2)]
            assert abs(step.loss.item() - sum(theirs).item() / 2) < 1e-9
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            method.update(step)
            first = first or step.loss.item()
        assert step.loss.item() != first and torch.equal(method.queue.keys[16:32], k)
    finally:
        torch.set_default_dtype(torch.float32)


# Training


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    "kNN accuracy of an encoder that never moved"
    folder = tmp_path_factory.mktemp("untrained")
    run = SMOKE | dict(method="swav", lr=0.0, weight_decay=0.0, epochs=2)
    return pretrain(**run, out=str(folder), name="run")["metrics"]["knn_backbone"]


@pytest.mark.parametrize(
    "how",
    [
        dict(method="infomin"),
        dict(method="infomin", mixing="pos"),
        dict(method="swav", view_strength=0.25),
        dict(method="swav", view_strength=0.25, mixing="pos", strength="auto"),
    ],
    ids=str,
)
def test_training_lifts_the_accuracy(tmp_path, untrained, how):
    record = pretrain(**SMOKE | how, out=str(tmp_path), name="run")
    assert record["metrics"]["knn_backbone"] > untrained + 8
    if how["method"] == "swav":  # the plateau is log 512
        assert read_scores(tmp_path / "run.parquet").loss.iloc[-8:].mean() < 6.238 - 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, name):
    p = RUN | dict(method=name, mixing="pos", strength="auto", bn_splits=2, epochs=3)
    pretrain(**p, out=str(tmp_path), name="whole")
    pretrain(**p, out=str(tmp_path), name="parts", stop_after=4)
    pretrain(**p, out=str(tmp_path), name="parts", resume=True)
    x, y = (read_checkpoint(tmp_path / f"{run}.safetensors")[0] for run in ("whole", "parts"))
    assert x.keys() == y.keys()
    for tensor in x:
        if not tensor.startswith("recorder"):
            np.testing.assert_array_equal(x[tensor], y[tensor], err_msg=tensor)
    a, b = (pd.read_parquet(tmp_path / f"{run}.parquet") for run in ("whole", "parts"))
    pd.testing.assert_frame_equal(a, b)


def test_records_have_the_columns_of_moco(tmp_path):
    columns = {}
    for name in ("moco_v2", *NAMES):
        pretrain(**RUN | dict(method=name, mixing="pos"), out=str(tmp_path), name=name)
        frame = read_scores(tmp_path / f"{name}.parquet")
        assert frame.drop(columns="l_in").notna().all().all(), name
        columns[name] = list(frame)
    assert all(found == columns["moco_v2"] for found in columns.values())


# What each method does by itself


def test_prototypes_stay_for_an_epoch_and_keep_their_length(tmp_path):
    p = RUN | dict(method="swav", epochs=3, out=str(tmp_path), name="run")
    start = built(method="swav").prototypes.detach()
    pretrain(**p, stop_after=3)
    held = read_checkpoint(tmp_path / "run.safetensors")[0]["method.prototypes"]
    np.testing.assert_allclose(held, start, rtol=0, atol=1e-6)
    pretrain(**p, resume=True)
    after = torch.as_tensor(read_checkpoint(tmp_path / "run.safetensors")[0]["method.prototypes"])
    torch.testing.assert_close(after.norm(dim=1), torch.ones(512), rtol=0, atol=1e-6)
    assert (after - start).abs().max() > 1e-3


def test_one_epoch_trains_its_prototypes():
    assert built(method="swav", epochs=1).frozen == 0
    assert built(method="swav", epochs=4).frozen == 0.25


@pytest.mark.parametrize("name", ["swav", "swav_multicrop"])
@pytest.mark.parametrize("mixing", ["neg", "posneg"])
def test_swav_refuses_what_needs_negatives(tmp_path, name, mixing):
    with pytest.raises(InputError, match=f"neg needs negatives, and {name} has none"):
        pretrain(**RUN | dict(method=name, mixing=mixing), out=str(tmp_path))
    with pytest.raises(InputError, match="neg needs negatives"):
        SwAV(built(method=name).encoder, transform_of(parameters(mixing=mixing)), dim=16)


# Every method


@pytest.mark.parametrize("name", sorted(METHODS))
def test_views_must_fit_each_other(name):
    method = built(method=name)
    views = torch.randn(8, 3, 16, 16)
    for wrong, message in (
        ((views, views[:4]), r"v2 has the shape \(4, 3, 16, 16\), but must be .* with B = 8"),
        ((views, views[..., :8]), r"v2 has the shape \(8, 3, 16, 8\), but must be"),
        (([1], views), "v1 is a list, but must be a tensor of shape"),
        ((views.byte(), views.byte()), "images of type torch.uint8 must be normalised"),
        ((views[:0], views[:0]), "has the shape .0, |of shape .0, "),
        ((views.to("meta"), views.to("meta")), "v1 is on meta, v2 on meta and the encoder on cpu"),
    ):
        with pytest.raises(InputError, match=message):
            method(*wrong)


@pytest.mark.parametrize("name", ["barlow", "byol", "simsiam", "swav", "swav_multicrop"])
def test_a_transformation_that_is_set_later_is_looked_at_again(name):
    method = built(method=name)
    method.transform.mixing = "posneg"
    with pytest.raises(InputError, match="mixing is 'posneg', but"):
        method(*torch.randn(2, 8, 3, 16, 16))
    method.transform.mixing = "none"
    method(*torch.randn(2, 8, 3, 16, 16))


class OnSphere(torch.nn.Module):
    "An encoder without a weight"

    def forward(self, x):
        return F.normalize(x.flatten(1), dim=1)


def test_swav_takes_an_encoder_without_weights():
    method = SwAV(OnSphere(), FeatureTransform("none"), dim=12)
    assert method(*torch.randn(2, 8, 3, 2, 2)).loss.isfinite()


def test_wrong_arguments_of_parts_are_one_sentence():
    for f, message in (
        (lambda: orders(-1), "n is -1, but must be a whole number of at least 0"),
        (lambda: orders(3, torch.Generator(), "cuda"), "the generator is on cpu, but must be on"),
        (lambda: swapped_loss([], [], 0.1), "S has 0 views and codes 0, but must have 2 and 1"),
        (
            lambda: swapped_loss([drawn(4), drawn(3)], [drawn(4)], 0.1),
            r"S\[1\] has the shape \(3, 128\), but must be \(B, P\) with B = 4",
        ),
    ):
        with pytest.raises(InputError, match=message):
            f()


def test_orders_are_those_of_the_step_alone():
    "The same step, the same orders, whatever a process's part of the batch"
    g = torch.Generator()
    once, again = (orders(8, g.manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, orders(8, g))


def test_infomin_without_a_jigsaw_head_that_agrees_is_moco():
    "The first half of the rows are MoCo's"
    images = shapes(16).images
    views = two_views(images, AUGMENTATIONS["B"], generator=torch.Generator())
    infomin = built(method="infomin", mixing="neg").eval()
    moco = built(method="moco_v2", mixing="neg", tau=0.15).eval()
    steps = [method(*views, mix=False) for method in (infomin, moco)]
    torch.testing.assert_close(steps[0].pos[:16], steps[1].pos)
    torch.testing.assert_close(steps[0].neg[:16], steps[1].neg)
    assert isinstance(infomin, InfoMin) and infomin.tau == 0.15


# Augmentation D


def test_other_augmentations_draw_no_number_more():
    "What a generator gives after views are made: 40 numbers of the crop, and nine; D: six more"
    x = shapes(5).images
    for name, more in (("A", 0), ("B", 0), ("D", 6)):
        g = torch.Generator().manual_seed(1)
        augment(x, AUGMENTATIONS[name], generator=g)
        after = torch.rand(1, generator=g)
        g.manual_seed(1)
        torch.rand(4, 5, 10, generator=g)
        torch.rand(9 + more, 5, generator=g)
        assert torch.equal(after, torch.rand(1, generator=g)), name


def test_views_of_some_rows_are_those_of_all():
    x = shapes(40).images
    rows = torch.tensor([31, 2, 17])
    how = AUGMENTATIONS["D"]
    whole = two_views(x, how, generator=seeded(torch.Generator(), 1))
    some = two_views(x, how, generator=seeded(torch.Generator(), 1), rows=rows)
    assert all(torch.equal(a, b[rows]) for a, b in zip(some, whole))


def test_no_operation_changes_nothing():
    x = shapes(64).images
    still = dict(area=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)
    for how in (Augmentation(**still, operations=3, operated=0.0),
                with_view_strength(Augmentation(**still, operations=2), 0)):  # fmt: skip
        torch.testing.assert_close(augment(x, how), x / 255, rtol=0, atol=1e-6)
    changed = augment(x, Augmentation(**still, operations=1)) - x / 255
    share = (changed.abs().amax((1, 2, 3)) > 1e-3).double().mean().item()
    assert 0.6 < share < 1  # 13 of 14 change an image, but some of them only where there is room


def test_any_method_may_take_augmentation_d(tmp_path):
    p = RUN | dict(method="moco_v2", augmentation="D", epochs=1, out=str(tmp_path), name="run")
    record = pretrain(**p)
    assert (record["steps"], record["parameters"]["augmentation"]) == (3, "D")
