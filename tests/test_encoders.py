"Anybody's backbone: named ones, modules of one's own, initial weights, and what cannot be one"

import sys
from copy import deepcopy

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import nn

from ftcl.core import InputError
from ftcl.encoder import ENCODERS, STEMS, Encoder, SplitBN, backbone, batch_parts, ema_update
from ftcl.encoder import call_backbone, encoder_name, feature_width, split_bn
from ftcl.encoder import small_resnet, torchvision_backbone
from ftcl.method import MoCo, build_method
from ftcl.queue import Queue
from ftcl.train import evaluate_checkpoint, pretrain
from ftcl.transform import FeatureTransform

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {  # name: features, size of an image that it takes
    "mobilenet_v3_small": (1024, 32),
    "shufflenet_v2_x0_5": (1024, 32),
    "regnet_y_400mf": (440, 32),
    "efficientnet_b0": (1280, 32),
    "mnasnet0_5": (1280, 32),
    "densenet121": (1024, 32),
    "squeezenet1_1": (512, 32),
    "convnext_tiny": (768, 32),
    "swin_t": (768, 32),
    "googlenet": (1024, 32),
    "inception_v3": (2048, 96),
    "vit_b_32": (768, 224),
    "timm/resnet10t": (512, 32),
    "timm/convnext_atto": (320, 32),
    "timm/efficientnet_b0": (1280, 32),
    "timm/vit_tiny_patch16_224": (192, 224),
}
RUN = dict(method="moco_v2", encoder="small", stem="small", dim=8, bn_splits=1, queue_size=40)
RUN |= dict(momentum=0.9, tau=0.1, tau_pos=0.0, symmetric=False, neg_query="transformed")
RUN |= dict(precision="fp32", seed=0)


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = dict(ENCODERS)
    yield
    ENCODERS.clear()
    ENCODERS.update(before)


class Own(nn.Module):
    "A backbone with nothing that this library knows by name; it reshapes maps by `view`"

    def __init__(self, features=6):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, features, 3, 2, 1)

    def forward(self, x):
        maps = self.last(self.norm(self.first(x)).relu())
        return maps.view(len(x), maps.shape[1], -1).mean(2)


def images(n=4, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def tensors(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# names


@pytest.mark.parametrize("name", FAMILIES)
def test_a_named_backbone_gives_its_features(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    width, size = FAMILIES[name]
    net, found = backbone(name)
    assert found == width
    x = images(2, size).to(memory_format=torch.channels_last)
    if name == "vit_b_32":
        assert net.taken_off == ["heads.head"]
        with pytest.raises(InputError, match="Wrong image height! Expected 224 but got 32"):
            call_backbone(net, images(2, 32))
    for training in (True, False):
        h = net.train(training)(x)
        assert h.shape == (2, width) and h.is_floating_point()
    assert all(
        p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.ndim == 4
    )


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "googlenet"])
def test_what_is_taken_off_is_the_last_layer_and_nothing_else(name):
    options = dict(init_weights=False, aux_logits=False) if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, weights=None, **options).eval()
    ours, _ = backbone(name)
    ours.eval().load_state_dict(theirs.state_dict(), strict=False)
    last = theirs.get_submodule(ours.taken_off[0])
    x = images(2, 64)
    torch.testing.assert_close(last(ours(x)), theirs(x))


def test_every_resnet_has_both_stems():
    for name in ("resnet18", "resnext50_32x4d"):
        for stem in STEMS:
            net = torchvision_backbone(name, stem)
            assert net.conv1.kernel_size == ((3, 3) if stem == "small" else (7, 7))
            assert isinstance(net.maxpool, nn.Identity) == (stem == "small")


def test_a_stem_does_nothing_to_other_networks():
    nets = []
    for stem in STEMS:
        torch.manual_seed(0)
        nets.append(backbone("mobilenet_v3_small", stem)[0])
    assert_same(nets[0].state_dict(), nets[1].state_dict())


def test_all_classifiers_of_torchvision_are_names():
    for name in torchvision.models.list_models(module=torchvision.models):
        assert encoder_name(name) == name
    for name in (
        "fcn_resnet50",
        "raft_small",
        "resnet-18",
        "ResNet18",
        "timm/",
        "timm/nothing",
        "",
        None,
        3,
    ):
        with pytest.raises(InputError, match="encoder is "):
            encoder_name(name)


def test_without_timm_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="install it with pip install timm"):
        encoder_name("timm/resnet18")
    with pytest.raises(InputError, match="install it with pip install timm"):
        Encoder("timm/resnet18")


def test_a_name_of_ones_own_serves_a_run():
    stems = []

    def mine(stem):
        stems.append(stem)
        return Own()

    ENCODERS["mine"] = mine
    method = build_method(RUN | dict(encoder="mine", stem="imagenet"), FeatureTransform("none"))
    assert stems == ["imagenet"] and isinstance(method.encoder.backbone, Own)
    again = build_method(RUN | dict(encoder="mine"), FeatureTransform("none"))
    assert_same(method.state_dict(), again.state_dict())  # the seed decides its weights
    ENCODERS["mine"] = lambda stem: "resnet18"
    with pytest.raises(InputError, match="'mine'. gives a str, but must give a module"):
        Encoder("mine")


# modules


def test_a_module_is_used_as_it_is():
    net = Own().double().eval()
    net.first.requires_grad_(False)
    before = tensors(net)
    state = torch.random.get_rng_state()
    assert feature_width(net) == 6
    assert torch.equal(torch.random.get_rng_state(), state)
    encoder = Encoder(net, dim=5)
    assert encoder.backbone is net and not net.training and encoder.width == 6
    assert not net.first.weight.requires_grad
    assert_same(tensors(net), before)
    assert encoder(images()).dtype == torch.float64


def test_looking_for_the_width_leaves_nothing_behind():
    class Counting(Own):
        "It counts its calls in a buffer, in evaluation too, and draws random numbers"

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            self.calls.add_(1)
            return super().forward(x) + torch.rand(())

    net = Counting()
    net.norm.eval()
    state = torch.random.get_rng_state()
    before = tensors(net)
    assert feature_width(net) == 6
    assert_same(tensors(net), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net.training and not net.norm.training and net.first.training
    assert [p.grad for p in net.parameters()] == [None] * 6


def test_a_width_that_cannot_be_seen_may_be_said():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 20, 7))
    with pytest.raises(InputError, match="set its attribute `width`"):
        Encoder(net)
    net.width = 7
    assert Encoder(net, dim=4)(images(4, 20)).shape == (4, 4)
    net.width = 8  # a wrong word is found at the first step
    with pytest.raises(InputError, match=r"shape \(4, 7\), but must give .* shape \(4, 8\)"):
        Encoder(net, dim=4)(images(4, 20))


class Gives(nn.Module):
    "Whatever it is told to make of its images"

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(self, x)


GIFTS = {
    "a tuple": lambda net, x: (x.mean((2, 3)), x),
    "a list": lambda net, x: [x.mean((2, 3))],
    "a dict": lambda net, x: dict(features=x.mean((2, 3))),
    "a NoneType": lambda net, x: None,
    "a float": lambda net, x: 1.0,
    "a ndarray": lambda net, x: x.mean((2, 3)).numpy(),
    r"a tensor of shape \(2, 3, 32, 32\)": lambda net, x: x,
    r"a tensor of shape \(1, 3\)": lambda net, x: x.mean((2, 3))[:1],
    r"a tensor of shape \(2,\)": lambda net, x: x.mean((1, 2, 3)),
    r"a tensor of shape \(2, 0\)": lambda net, x: x.mean((2, 3))[:, :0],
    r"a tensor of shape \(\)": lambda net, x: x.mean(),
    "torch.int64": lambda net, x: x.mean((2, 3)).long(),
    "torch.complex64": lambda net, x: x.mean((2, 3)).to(torch.complex64),
}


@pytest.mark.parametrize("gift", GIFTS)
def test_what_is_no_feature_is_one_sentence(gift):
    with pytest.raises(InputError, match=f"the backbone gives {gift}, but must give a tensor of"):
        Encoder(Gives(GIFTS[gift]))


def test_a_module_that_gives_a_tuple_in_training_alone_is_found_there():
    def make(net, x):
        h = x.mean((2, 3))
        return (h, h) if net.training else h

    encoder = Encoder(Gives(make), dim=4)
    assert encoder.eval()(images()).shape == (4, 4)
    with pytest.raises(InputError, match="the backbone gives a tuple"):
        encoder.train()(images())


@pytest.mark.parametrize(
    "wrong", [nn.Linear, lambda x: x, 3, None, ["small"], b"small", torch.ones(2)]
)
def test_what_is_no_module_is_one_sentence(wrong):
    with pytest.raises(InputError, match="must be a name or a module"):
        Encoder(wrong)


def test_other_modules_that_cannot_be_one():
    with pytest.raises(InputError, match="layers without a shape"):
        Encoder(nn.Sequential(nn.Flatten(), nn.LazyLinear(7)))
    with pytest.raises(InputError, match="features the backbone gives is unknown"):
        Encoder(nn.Bilinear(3, 3, 3))  # two arguments
    with pytest.raises(InputError, match="features the backbone gives is unknown"):
        Encoder(nn.Module())  # none at all


def test_images_of_a_size_that_is_not_taken_are_one_sentence():
    pytest.importorskip("timm")
    encoder = Encoder("timm/vit_tiny_patch16_224", dim=4)
    with pytest.raises(InputError, match=r"cannot take images of shape \(4, 3, 32, 32\): .*224"):
        encoder(images(4, 32))
    assert encoder.eval()(images(1, 224)).shape == (1, 4)


@pytest.mark.parametrize("precision", ["float64", "bfloat16", "bf16 autocast", "float32"])
@pytest.mark.parametrize("name", ["own", "small", "mobilenet_v3_small", "no weights"])
def test_every_precision_gives_about_the_same_vectors(name, precision):
    nets = {"own": Own(), "no weights": Gives(lambda net, x: x.mean((2, 3)))}
    encoder = Encoder(nets.get(name, name), dim=8).eval()
    x = images(4, 32)
    want = encoder(x)
    changed = deepcopy(encoder)
    if precision in ("float64", "bfloat16"):
        changed = changed.to(getattr(torch, precision))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
        z = changed(x)
    assert z.dtype == (torch.float64 if precision == "float64" else torch.float32)
    assert F.cosine_similarity(z.double(), want.double()).min() > 0.99
    torch.testing.assert_close(z.norm(dim=1), torch.ones_like(z[:, 0]))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_images_enter_in_type_and_order_of_the_weights(order, dtype):
    net = Own()  # its `view` cannot reshape channels_last maps
    encoder = Encoder(net, dim=8)
    x = images().to(dtype).to(memory_format=order)
    torch.testing.assert_close(encoder(x), encoder(images()), atol=2e-3, rtol=2e-3)
    split = Encoder(deepcopy(net), dim=8, bn_splits=2)
    assert split(x).shape == (4, 8)


def test_a_half_precision_backbone_has_a_head_of_its_kind():
    encoder = Encoder(Own().bfloat16(), dim=8)
    assert encoder.last.weight.dtype == torch.bfloat16
    encoder(images()).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


# parts of a batch


def test_layers_that_cannot_be_split_are_named():
    for net, name in (
        (nn.Sequential(Own(), nn.BatchNorm1d(6)), "1, a BatchNorm1d,"),
        (nn.SyncBatchNorm.convert_sync_batchnorm(Own()), "norm, a SyncBatchNorm,"),
        (nn.Sequential(Own(), nn.Unflatten(1, (6, 1)), nn.Flatten(), nn.BatchNorm1d(6)), "3, a"),
        (nn.Sequential(nn.BatchNorm2d(3, momentum=None), Own()), "0, a BatchNorm2d without"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), Own()), "0, a BatchNorm2d w"),
    ):
        kinds = [type(layer) for layer in net.modules()]
        with pytest.raises(InputError, match=f"bn_splits is 2, but {name}"):
            Encoder(net, bn_splits=2)
        assert [type(layer) for layer in net.modules()] == kinds  # nothing is changed by half


@pytest.mark.parametrize("name", ["convnext_tiny"])
def test_parts_of_a_network_without_batch_normalisation_are_refused(name):
    with pytest.raises(InputError, match="has no batch normalisation to split: take 1"):
        Encoder(name, bn_splits=2)
    with pytest.raises(InputError, match="has no batch normalisation to split: take 1"):
        build_method(RUN | dict(encoder=name, bn_splits=2), FeatureTransform("none"), processes=2)


def test_timms_own_batch_normalisation_is_refused_by_name():
    pytest.importorskip("timm")
    with pytest.raises(
        InputError, match="bn_splits is 2, but bn1, a BatchNormAct2d, cannot be spl"
    ):
        Encoder("timm/efficientnet_b0", bn_splits=2)
    assert Encoder("timm/resnet10t", bn_splits=2).bn_splits == 2


def test_parts_that_somebody_else_made_are_seen():
    net = split_bn(Own(), 4)
    encoder = Encoder(net, dim=8)
    assert type(net.norm) is SplitBN and encoder.bn_splits == 4 == batch_parts(net)
    with pytest.raises(InputError, match="bn_splits is 4, but must divide the batch of 6"):
        encoder(images(6))


class Bare(nn.Module):
    "An encoder without `width`, `last`, `head` and `bn_splits`"

    def __init__(self, splits=1):
        super().__init__()
        self.net = split_bn(Own(8), splits)

    def forward(self, x):
        return F.normalize(self.net(x), dim=1)


class Headless(Encoder):
    "The library's encoder, whose backbone makes the vectors"

    def forward(self, x):
        return F.normalize(self.backbone_features(x), dim=1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("splits", [1, 4])
def test_a_bare_encoder_trains_as_an_encoder_of_the_library_does(splits, symmetric):
    bare = Bare(splits)
    ours = Headless(deepcopy(bare.net), "linear", 8)
    losses = []
    for encoder in (bare, ours):
        queue = Queue(12, 8, torch.Generator().manual_seed(0))
        method = MoCo(encoder, queue, FeatureTransform("none"), symmetric=symmetric)
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        for step in range(3):
            out = method(images(8) + step, images(8) - step)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            method.update(out)
        losses.append((out.loss.item(), queue.keys.clone()))
        assert all(not p.requires_grad for p in method.key_encoder.parameters())
        assert set(method.vectors(images(8), images(8))) == {"q", "k", "queue"}
    assert losses[0][0] == losses[1][0] and torch.equal(losses[0][1], losses[1][1])


def test_keys_are_dealt_by_the_parts_of_the_layers():
    method = MoCo(Bare(4), Queue(16, 8), FeatureTransform("none"))
    seen = []
    method.key_encoder.register_forward_pre_hook(lambda net, x: seen.append(x[0][:, 0, 0, 0]))
    v = images(16)
    v[:, 0, 0, 0] = torch.arange(16.0)
    method.encode_keys(v)
    assert seen[0].view(4, 4).tolist() == [[part + 4 * i for i in range(4)] for part in range(4)]
    with pytest.raises(InputError, match="the batch of 6 must be a multiple of its 4 parts"):
        method.encode_keys(images(6))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bare_encoder_is_scored_in_float32(precision):
    method = MoCo(Bare(), Queue(16, 8), FeatureTransform("posneg"), precision=precision)
    out = method(images(8), images(8))
    assert {o.dtype for o in (out.loss, out.pos, out.neg, *out.features)} == {torch.float32}


def test_encoders_that_give_no_unit_vectors_are_refused():
    for encoder, message in (
        (Own(8), "must give vectors of length 1, but their lengths are about .*Encoder.module"),
        (torchvision.models.resnet18(num_classes=8), "must give vectors of length 1"),
        (Gives(lambda net, x: (x,)), "the encoder gives a tuple"),
        (Gives(lambda net, x: x), "the encoder gives a tensor of shape"),
        (Gives(lambda net, x: x @ x.new_ones(7, 7)), "the encoder cannot take images"),
    ):
        method = MoCo(encoder, Queue(16, 8), FeatureTransform("none"))
        before = method.queue.keys.clone()
        with pytest.raises(InputError, match=message):
            method(images(8), images(8))
        assert torch.equal(method.queue.keys, before)


def test_an_encoder_that_cannot_be_copied_is_one_sentence():
    class Locked(Bare):
        def __deepcopy__(self, memo):
            raise RuntimeError("not me\nnor mine")

    hooked = Bare()
    hooked.generator = (number for number in range(3))  # cannot be copied
    for encoder in (Locked(), hooked):
        with pytest.raises(
            InputError, match="the encoder cannot be copied, which its key enc"
        ) as e:
            MoCo(encoder, Queue(16, 8), FeatureTransform("none"))
        assert "\n" not in str(e.value)


def test_a_copy_follows_as_the_formula_says():
    query = Own().double()
    key = Own().double()
    want = [
        0.9 * k.detach() + 0.1 * q.detach() for k, q in zip(key.parameters(), query.parameters())
    ]
    ema_update(key, query, 0.9)
    for got, wanted in zip(key.parameters(), want):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    ema_update(nn.Identity(), nn.Identity(), 0.9)  # nothing to follow
    for other, message in (
        (Own(7), "of the query encoder's shapes"),
        (Own(), "torch.float64 on cpu where the query encoder has torch.float32 on cpu"),
        (None, "query is None, but must be a module"),
    ):
        with pytest.raises(InputError, match=message):
            ema_update(key, other, 0.9)


# initial weights


def saved(path, content):
    torch.save(content, path)
    return str(path)


def test_weights_of_many_wrappers_fit(tmp_path):
    net = Own()
    state = tensors(net)
    classifier = {"fc.weight": torch.ones(3, 6), "fc.bias": torch.ones(3)}
    wrappers = {
        "plain": state | classifier,
        "module": {f"module.{name}": o for name, o in (state | classifier).items()},
        "named": dict(epoch=3, state_dict={f"encoder.{name}": o for name, o in state.items()}),
        "model": dict(model=state, optimizer=dict(state={}, param_groups=[])),
        "compiled": {f"_orig_mod.backbone.{name}": o for name, o in state.items()},
        "half": {name: o.half() if o.is_floating_point() else o for name, o in state.items()},
        "early": {name: o for name, o in state.items() if "num_batches" not in name},
    }
    copies = {f"module.encoder_k.{name}": o * 0 for name, o in state.items()}
    wrappers["moco"] = dict(
        state_dict=copies | {f"module.encoder_q.{n}": o for n, o in state.items()}
    )
    for name, content in wrappers.items():
        encoder = Encoder(Own(), dim=4, weights=saved(tmp_path / f"{name}.pth", content))
        for key, tensor in encoder.backbone.state_dict().items():
            torch.testing.assert_close(
                tensor, state[key], atol=1e-3, rtol=1e-3, msg=f"{name}: {key}"
            )
        assert encoder.loaded.startswith(f"{8 if name == 'early' else 9} tensors of the backbone")
        assert "\n" not in encoder.loaded
        assert ("fc (2)" in encoder.loaded) == (name in ("plain", "module"))


def test_a_file_of_the_library_gives_backbone_and_head(tmp_path, monkeypatch):
    encoder = Encoder("small", dim=8)
    slow = Encoder("small", dim=8)
    content = {f"method.encoder.{name}": o for name, o in encoder.state_dict().items()}
    content |= {f"method.key_encoder.{name}": o for name, o in slow.state_dict().items()}
    content |= {"method.queue.keys": torch.ones(4, 8)}
    content = {name: o.contiguous() for name, o in content.items()}
    safetensors.torch.save_file(content, tmp_path / "run.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    same = Encoder("small", dim=8, weights="~/run.safetensors")
    assert_same(same.state_dict(), encoder.state_dict())
    for other in (dict(dim=16), dict(head="linear", dim=8)):
        changed = Encoder("small", **other, weights=tmp_path / "run.safetensors")
        assert_same(changed.backbone.state_dict(), encoder.backbone.state_dict())
        told = "left out: method.key_encoder (58), method.encoder.head (4), method.queue (1)"
        assert changed.loaded.endswith(f"under method.encoder.backbone; {told}")


def test_the_head_of_a_run_does_not_depend_on_initial_weights(tmp_path):
    path = saved(tmp_path / "a.pt", Encoder("small", dim=8).backbone.state_dict())
    plain = build_method(RUN, FeatureTransform("none"))
    begun = build_method(RUN | dict(weights=path), FeatureTransform("none"))
    assert_same(plain.encoder.head.state_dict(), begun.encoder.head.state_dict())
    assert torch.equal(plain.queue.keys, begun.queue.keys)
    assert_same(begun.encoder.state_dict(), begun.key_encoder.state_dict())
    assert begun.encoder.loaded and not plain.encoder.loaded


def wrong_states():
    "Content of a file, and what the sentence says"
    state = tensors(Own())
    name = "first.weight"
    lacking = {key: o for key, o in state.items() if key != "last.bias"}
    return [
        (lacking, r"lack last.bias of shape \(6,\): they begin with first.weight of shape"),
        (state | {name: torch.ones(4, 3, 5, 5)}, r"have first.weight of shape \(4, 3, 5, 5\), but"),
        (state | {name: state[name].long()}, "have first.weight in torch.int64, but must have tor"),
        (state | {name: state[name] * torch.nan}, "have NaN or infinite numbers in first.weight"),
        (state | {"last.more.weight": torch.ones(2, 2)}, "have last.more.weight of shape"),
        ({}, "hold no tensors by name"),
        ([], "hold no tensors by name"),
        (torch.ones(3), "hold no tensors by name"),
        (dict(epoch=3, loss=1.0), "hold no tensors by name"),
        (dict(student=state, teacher=state), "hold the tensors of several networks, student, teac"),
        (dict(other=torch.ones(3)), "lack first.weight of shape .* they begin with other of shape"),
        ({f"{w}.{n}": o + (w == "b") for w in "ab" for n, o in state.items()}, "several networks"),
        (Own(), "cannot be read"),  # a pickled module: its code is not run
    ]


@pytest.mark.parametrize("number", range(len(wrong_states())))
def test_weights_that_do_not_fit_change_nothing(tmp_path, number):
    content, message = wrong_states()[number]
    path = saved(tmp_path / "wrong.pth", content)
    net = Own()
    before = tensors(net)
    with pytest.raises(InputError, match=message) as e:
        Encoder(net, dim=4, weights=path)
    assert "\n" not in str(e.value)
    assert_same(tensors(net), before)


def test_files_that_cannot_be_read_are_one_sentence(tmp_path):
    good = tmp_path / "good.safetensors"
    safetensors.torch.save_file(tensors(Own()), good)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-5])
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 no more")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.bin").write_text("weights")
    (tmp_path / "folder.pth").mkdir()
    names = ["cut.safetensors", "cut.pth", "empty.pt", "text.bin", "folder.pth", "none.pth"]
    for name in names:
        with pytest.raises(InputError, match="cannot be read|no such file") as e:
            Encoder(Own(), weights=str(tmp_path / name))
        assert "\n" not in str(e.value)
    for wrong in ("no\0file.pth", "x" * 5000 + ".pth", None, 3, ["a.pth"], b"a.pth", torch.ones(2)):
        with pytest.raises(InputError, match="^weights is "):
            Encoder(Own(), weights=wrong)


def test_what_is_no_file_of_weights_is_told_which_formats_are(tmp_path):
    for content in (b"text of mine", b"\xff\xd8\xff\xe0 a photo", b""):
        (tmp_path / "text.pth").write_bytes(content)
        said = "neither a .safetensors file nor one of torch.save.: save a state dict, by safetens"
        with pytest.raises(InputError, match=said):
            Encoder(Own(), weights=tmp_path / "text.pth")


def test_weights_in_8_bits_are_loaded_and_those_without_numbers_are_not(tmp_path):
    state = tensors(Own())
    eight = {n: o.to(torch.float8_e5m2) if o.is_floating_point() else o for n, o in state.items()}
    path = tmp_path / "eight.safetensors"
    twice = {f"{place}.{name}": o.clone() for place in "ab" for name, o in eight.items()}
    for content in (eight, twice):
        safetensors.torch.save_file(content, path)
        encoder = Encoder(Own(), dim=4, weights=path)
        for name, tensor in encoder.backbone.state_dict().items():
            assert torch.equal(tensor, eight[name].to(tensor.dtype)), name
    empty = {name: torch.empty_like(o, device="meta") for name, o in state.items()}
    for content, said in (
        (empty, "hold no tensors by name"),
        (state | {"last.bias": empty["last.bias"]}, "lack last.bias of shape"),
    ):
        with pytest.raises(InputError, match=said):
            Encoder(Own(), dim=4, weights=saved(tmp_path / "empty.pth", content))


def test_a_number_too_large_for_the_network_is_refused(tmp_path):
    state = tensors(Own())
    large = {"first.weight": state["first.weight"].double() * 1e300}
    with pytest.raises(InputError, match="infinite numbers in first.weight, taken as torch.fl"):
        Encoder(Own(), dim=4, weights=saved(tmp_path / "large.pth", state | large))
    encoder = Encoder("small", dim=4)
    content = {f"encoder.{name}": o for name, o in encoder.state_dict().items()}
    name = "encoder.head.0.weight"
    content[name] = content[name].double() * 1e300
    again = Encoder("small", dim=4, weights=saved(tmp_path / "head.pth", content))
    assert all(o.isfinite().all() for o in again.parameters())
    assert "left out: encoder.head (4)" in again.loaded


class Fixed(nn.Module):
    "A network that takes images of 64 x 64 alone"
    width = 8

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 64 * 64, 8)

    def forward(self, x):
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(size=48), "48 x 48 pixels .*it takes 64 x 64, so set `size`, which a `view_size` of"),
        (dict(size=64, view_size=48), "48 x 48 pixels .*it takes 64 x 64, so set `view_size`."),
        (dict(size=48, view_size=64, knn_every=1), "48 x 48 .*it takes 64 x 64, so set `size`."),
    ],
)
def test_a_size_that_an_encoder_cannot_take_is_told_before_training(
    tmp_path, monkeypatch, given, said
):
    monkeypatch.setitem(ENCODERS, "fixed", lambda stem: Fixed())
    small = dict(encoder="fixed", n_images=32, epochs=1, batch_size=16, queue_size=32)
    small |= dict(readouts="none", progress=False, precision="fp32", out=str(tmp_path))
    with pytest.raises(InputError, match="encoder 'fixed' cannot take images of " + said):
        pretrain(**small | given)
    assert not list(tmp_path.iterdir())
    pretrain(**small | dict(size=48, view_size=64))
    with pytest.raises(InputError, match="48 x 48 pixels .*it takes 64 x 64, so set `size`."):
        evaluate_checkpoint(str(tmp_path / "pretrain.safetensors"), out=str(tmp_path))


def test_no_code_of_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code of a file was run')",))

    for content in (Trap(), dict(state_dict=tensors(Own()), more=Trap())):
        with pytest.raises(InputError, match="cannot be read"):
            Encoder(Own(), weights=saved(tmp_path / "trap.pth", content))


def test_a_deeper_network_is_not_loaded_in_part(tmp_path):
    path = saved(tmp_path / "34.pth", torchvision.models.resnet34(weights=None).state_dict())
    with pytest.raises(InputError, match="have layer1.2.conv1.weight .* they are of another netw"):
        Encoder("resnet18", stem="imagenet", weights=path)
    with pytest.raises(InputError, match=r"have conv1.weight of shape \(64, 3, 7, 7\), but .*stem"):
        Encoder("resnet34", weights=path)
    assert "left out: fc (2)" in Encoder("resnet34", stem="imagenet", weights=path).loaded


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_torchvisions_own_files_fit(tmp_path, name):
    state = torchvision.models.get_model(name, weights=None).state_dict()
    encoder = Encoder(name, dim=4, weights=saved(tmp_path / "theirs.pth", state))
    got = encoder.backbone.state_dict()
    assert all(torch.equal(got[key], state[key]) for key in got)
    last = encoder.backbone.taken_off[0].split(".")[0]
    assert encoder.loaded.endswith(f"left out: {last} (2)")


def test_names_of_weights_are_known_and_fetching_fails_in_one_sentence(monkeypatch):
    def no_network(*args, **options):
        raise OSError("no network\nnowhere")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    for weights in ("DEFAULT", "IMAGENET1K_V1"):
        with pytest.raises(
            InputError, match=f"the weights {weights} of resnet18 cannot be fetch"
        ) as e:
            Encoder("resnet18", stem="imagenet", weights=weights)
        assert "\n" not in str(e.value) and "no network" in str(e.value)
    for name, weights in (("resnet18", "IMAGENET1K_V9"), ("small", "DEFAULT"), (Own(), "DEFAULT")):
        with pytest.raises(InputError, match=f"weights is '{weights}', but must be a file"):
            Encoder(name, weights=weights)


def test_names_of_timms_weights_are_known(monkeypatch):
    timm = pytest.importorskip("timm")
    built = timm.create_model

    def no_network(name, pretrained=False, **options):
        if pretrained:
            raise OSError(f"no network for {name}")
        return built(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", no_network)
    for name, weights, full in (
        ("timm/resnet18", "DEFAULT", "resnet18"),
        ("timm/resnet18", "a1_in1k", "resnet18.a1_in1k"),
        ("timm/resnet18.a2_in1k", "DEFAULT", "resnet18.a2_in1k"),
    ):
        with pytest.raises(InputError, match=rf"cannot be fetched \(no network for {full}\)"):
            Encoder(name, weights=weights)
    with pytest.raises(InputError, match="weights is 'a9', but must be a file, or one of a1_in1k"):
        Encoder("timm/resnet18", weights="a9")


def test_fetched_weights_are_loaded(monkeypatch):
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **options: state
    )
    encoder = Encoder("resnet18", stem="imagenet", weights="DEFAULT")
    got = encoder.backbone.state_dict()
    assert all(torch.equal(got[key], state[key]) for key in got)
    assert encoder.loaded == "120 tensors of the backbone from DEFAULT; left out: fc (2)"


def test_dropout_resumes_exactly_and_leaves_the_callers_random_numbers(tmp_path):
    ENCODERS["dropping"] = lambda stem: nn.Sequential(small_resnet((4, 8)), nn.Dropout(0.5))
    small = dict(n_images=80, holdout=32, size=16, epochs=2, batch_size=16, queue_size=40, dim=16)
    small |= dict(precision="fp32", progress=False, readouts="none", encoder="dropping")
    try:
        before = torch.get_rng_state()
        pretrain(**small, out=str(tmp_path / "whole"), name="run")
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)  # whatever the caller drew decides nothing
        cut = dict(small, out=str(tmp_path / "cut"), name="run")
        pretrain(**cut, stop_after=3)
        torch.rand(5)
        pretrain(**cut, resume=True)
    finally:
        del ENCODERS["dropping"]
    whole, cut = (load_file(tmp_path / folder / "run.safetensors") for folder in ("whole", "cut"))
    assert whole and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_entry_of_encoders_that_fails_or_shares_its_module():
    shared = small_resnet((4, 8))
    entries = dict(shared=lambda stem: shared, fails=lambda: shared, raises=lambda stem: 1 / 0)
    ENCODERS.update(entries)
    try:
        one = Encoder("shared").backbone
        assert one is not shared
        with torch.no_grad():
            one[0].weight.zero_()
        assert Encoder("shared").backbone[0].weight.any()
        for name in ("fails", "raises"):
            with pytest.raises(InputError, match=f"ENCODERS.'{name}'. fails .*must take a stem"):
                Encoder(name)
    finally:
        for name in entries:
            del ENCODERS[name]
