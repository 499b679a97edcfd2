"Weights out: loaded where they are meant for. Weights in: other people's checkpoints, no code run"

import http.server
import io
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
import yaml
from accelerate import Accelerator
from torch import nn

from ftcl.checkpoint import State, load_encoder, load_method, read_checkpoint, read_note, read_rows
from ftcl.checkpoint import save_checkpoint
from ftcl.core import InputError
from ftcl.data import load
from ftcl.detection import canvases, read_coco, read_predictions, transfer
from ftcl.encoder import ENCODERS, Encoder, load_weights, small_resnet, torchvision_backbone
from ftcl.export import EXPORTED, FORMATS, detectron2_name, export_encoder, new_folder, same_files
from ftcl.launch import run_parameters
from ftcl.method import build_method, transform_of
from ftcl.record import defaults, read_record, result_parameters
from ftcl.scores import ScoreRecorder, read_scores
from ftcl.train import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(n_images=32, holdout=32, size=32, epochs=1, batch_size=16, queue_size=32, dim=16)
TINY |= dict(precision="fp32", readouts="knn_backbone", progress=False, seed=3)
FILES = dict(torchvision="model.safetensors", timm="model.safetensors")
FILES |= dict(detectron2="model.pth", onnx="model.onnx")


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_large_files_are_left(tmp_path, monkeypatch):
    yield
    monkeypatch.undo()
    shutil.rmtree(tmp_path)


def images(n=2, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def with_statistics(net):
    "Running averages as after a training: none is the identity"
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return net.eval()


def checkpoint_of(folder, **given):
    "A checkpoint before the first step, with running averages; and its encoder"
    p = defaults(pretrain) | dict(queue_size=8, dim=4, precision="fp32") | given
    method = build_method(p, transform_of(p))
    with_statistics(method.encoder)
    trained = [w for w in method.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9)
    state = State(p, Accelerator(cpu=True), method, method, optimizer, ScoreRecorder(), n_train=64)
    path = folder / "run.safetensors"
    save_checkpoint(state, path)
    return path, method.encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished run of a ResNet-18: checkpoint, record"
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    record = pretrain(**TINY, encoder="resnet18", stem="imagenet", out=str(folder), name="r18")
    yield folder / "r18.safetensors", record
    shutil.rmtree(folder)


def by_card(folder, monkeypatch, **given):
    "What the lines of a card make, run where they stand"
    monkeypatch.chdir(folder)
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    names = dict(given)
    exec(lines, names)
    return names


# out: loaded there, the same features

TORCHVISION = [("resnet18", "imagenet", 64), ("resnet18", "small", 32)]
TORCHVISION += [("resnet50", "imagenet", 64), ("mobilenet_v3_small", "small", 64)]
TORCHVISION += [("squeezenet1_1", "small", 64)]
TORCHVISION += [("convnext_tiny", "small", 64), ("googlenet", "small", 64)]


@pytest.mark.parametrize("name, stem, size", TORCHVISION)
def test_torchvision_gives_the_same_features(tmp_path, monkeypatch, name, stem, size):
    path, encoder = checkpoint_of(tmp_path, encoder=name, stem=stem)
    out = export_encoder(path, tmp_path / "out", "torchvision")
    net = by_card(out, monkeypatch)["net"]
    x = images(size=size)
    wanted = encoder.backbone_features(x)
    torch.testing.assert_close(net(x), wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 1e-3  # features that tell something


def test_torchvisions_classifier_lacks_its_last_layer_alone(run, tmp_path):
    path, _ = run
    out = export_encoder(path, tmp_path / "out", "torchvision")
    net = torchvision.models.resnet18(weights=None)
    state = safetensors.torch.load_file(out / "model.safetensors")
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it
    odd = net.load_state_dict(state, strict=False)
    assert odd.missing_keys == ["fc.weight", "fc.bias"] and not odd.unexpected_keys


@pytest.mark.parametrize(
    "name, size", [("resnet18", 64), ("resnet50", 64), ("timm/resnet10t", 64)]
)
def test_timm_gives_the_same_features(tmp_path, monkeypatch, name, size):
    timm = pytest.importorskip("timm")
    path, encoder = checkpoint_of(tmp_path, encoder=name, stem="imagenet", view_size=size)
    out = export_encoder(path, tmp_path / "out", "timm")
    x = images(size=size)
    wanted = encoder.backbone_features(x)
    from_folder = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    for net in (by_card(out, monkeypatch)["net"], from_folder):
        torch.testing.assert_close(net(x), wanted, atol=1e-4, rtol=1e-4)
    tuned = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7).eval()
    assert tuned(x).shape == (2, 7)
    features = tuned.forward_head(tuned.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-4)
    how = timm.data.resolve_model_data_config(from_folder)
    assert list(how["input_size"]) == [3, size, size] and how["crop_pct"] == 1.0
    assert list(how["mean"]) == [0.485, 0.456, 0.406] and how["interpolation"] == "bicubic"
    assert list(how["std"]) == [0.229, 0.224, 0.225]


def test_a_vision_transformer_keeps_its_size_of_image(tmp_path):
    timm = pytest.importorskip("timm")
    name = "timm/vit_tiny_patch16_224"
    path, encoder = checkpoint_of(tmp_path, encoder=name, view_size=32)
    out = export_encoder(path, tmp_path / "out", "timm")
    net = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert net.pretrained_cfg["input_size"] == [3, 224, 224]
    x = images(size=224)
    torch.testing.assert_close(net(x), encoder.backbone_features(x), atol=1e-4, rtol=1e-4)


def test_nothing_of_timms_own_weights_is_claimed(run, tmp_path):
    pytest.importorskip("timm")
    out = export_encoder(run[0], tmp_path / "out", "timm")
    config = json.loads((out / "config.json").read_text())
    assert set(config) == {"architecture", "num_classes", "num_features", "pretrained_cfg"}
    told = {"license", "tag", "origin_url", "paper_ids", "hf_hub_id", "url"}
    assert not told & set(config["pretrained_cfg"])


def test_transformers_gives_the_same_features(run, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    encoder, _ = load_encoder(run[0])
    out = export_encoder(run[0], tmp_path / "out", "timm")
    net = transformers.AutoModel.from_pretrained(out).eval()
    found = net(images()).pooler_output
    torch.testing.assert_close(found, encoder.backbone_features(images()), atol=1e-4, rtol=1e-4)


def detectron2_shapes(depth):
    "Names and shapes of detectron2's ResNet, as its documentation describes it: channels, blocks"
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
    shapes = {}

    def convolution(name, width, before, side):
        shapes[f"{name}.weight"] = (width, before, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{part}"] = (width,)
        shapes[f"{name}.norm.num_batches_tracked"] = ()

    convolution("stem.conv1", 64, 3, 7)
    before = 64
    for stage, count in enumerate(blocks):
        narrow = 64 * 2**stage
        width = narrow * (4 if depth == 50 else 1)
        for number in range(count):
            block = f"res{stage + 2}.{number}"
            if before != width:
                convolution(f"{block}.shortcut", width, before, 1)
            if depth == 50:
                convolution(f"{block}.conv1", narrow, before, 1)
                convolution(f"{block}.conv2", narrow, narrow, 3)
                convolution(f"{block}.conv3", width, narrow, 1)
            else:
                convolution(f"{block}.conv1", width, before, 3)
                convolution(f"{block}.conv2", width, width, 3)
            before = width
    return shapes


def detectron2_features(tensors, x, depth):
    "What detectron2's ResNet computes, by its names alone, averaged over the last map"

    def convolution(x, name, stride=1):
        weight = tensors[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(tensors[f"{name}.norm.{part}"] for part in parts))

    x = F.max_pool2d(convolution(x, "stem.conv1", 2).relu(), 3, 2, 1)
    blocks = dict.fromkeys(".".join(n.split(".")[:2]) for n in tensors if n.startswith("res"))
    for block in blocks:
        first = block.endswith(".0") and not block.startswith("res2")
        stride = 2 if first else 1
        kept = x
        if f"{block}.shortcut.weight" in tensors:
            kept = convolution(x, f"{block}.shortcut", stride)
        if depth == 50:
            x = convolution(x, f"{block}.conv1").relu()
            x = convolution(x, f"{block}.conv2", stride).relu()  # STRIDE_IN_1X1: false
            x = convolution(x, f"{block}.conv3")
        else:
            x = convolution(x, f"{block}.conv1", stride).relu()
            x = convolution(x, f"{block}.conv2")
        x = (x + kept).relu()
    return x.mean((2, 3))


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_detectron2_has_its_names_and_the_same_features(tmp_path, depth):
    path, encoder = checkpoint_of(tmp_path, encoder=f"resnet{depth}", stem="imagenet")
    out = export_encoder(path, tmp_path / "out", "detectron2")
    content = torch.load(out / "model.pth", weights_only=True)
    assert set(content) == {"model", "matching_heuristics", "__author__"}
    assert content["matching_heuristics"] is True  # prefixes are found by detectron2
    found = content["model"]
    assert {name: tuple(o.shape) for name, o in found.items()} == detectron2_shapes(depth)
    x = images()
    wanted = encoder.backbone_features(x)
    computed = detectron2_features(found, x, depth)
    torch.testing.assert_close(computed, wanted, atol=1e-4, rtol=1e-4)
    lines = re.search(r"```yaml\n(.*?)```", (out / "README.md").read_text(), re.S)[1]
    asked = yaml.safe_load(lines)
    assert asked["INPUT"] == {"FORMAT": "RGB"} and asked["MODEL"]["WEIGHTS"] == "model.pth"
    resnet = asked["MODEL"]["RESNETS"]
    assert resnet["DEPTH"] == depth and resnet["STRIDE_IN_1X1"] is False
    assert resnet.get("RES2_OUT_CHANNELS", 256) == (256 if depth == 50 else 64)
    assert asked["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]


class Own(nn.Module):
    "A backbone that no other library knows"

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.first(x)).relu().mean((2, 3))


@pytest.mark.parametrize("name", ["resnet18", "small", "own"])
def test_onnx_gives_the_same_features(tmp_path, monkeypatch, name):
    pytest.importorskip("onnxscript")
    import onnx
    from onnx.reference import ReferenceEvaluator

    monkeypatch.setitem(ENCODERS, "own", lambda stem: Own())
    path, encoder = checkpoint_of(tmp_path, encoder=name, bn_splits=2, size=32)
    out = export_encoder(path, tmp_path / "out", "onnx")
    session = ReferenceEvaluator(str(out / "model.onnx"))
    for x in (images(2, 32), images(3, 24), images(1, 48)[..., :40]):
        (found,) = session.run(None, {"images": x.numpy()})
        wanted = encoder.backbone_features(x)
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)
    (entry,) = onnx.load(out / "model.onnx").graph.input
    sizes = entry.type.tensor_type.shape.dim
    assert [bool(size.dim_param) for size in sizes] == [True, False, True, True]  # which are free
    whole = (out / "model.onnx").read_bytes()
    for place in (Path(torchvision.__file__).parent, Path(__file__).parent.parent / "ftcl"):
        assert str(place).encode() not in whole


def test_the_lines_of_onnxs_card_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    path, encoder = checkpoint_of(tmp_path)
    out = export_encoder(path, tmp_path / "out", "onnx")
    found = by_card(out, monkeypatch, images=images().numpy())["features"]
    wanted = encoder.backbone_features(images())
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)


def test_onnx_of_a_network_of_one_size(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    def fixed(stem):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 20, 7))
        net.width = 7
        return net

    monkeypatch.setitem(ENCODERS, "fixed", fixed)
    path, encoder = checkpoint_of(tmp_path, encoder="fixed", view_size=20)
    out = export_encoder(path, tmp_path / "out", "onnx")
    x = images(3, 20)
    (found,) = ReferenceEvaluator(str(out / "model.onnx")).run(None, {"images": x.numpy()})
    wanted = encoder.backbone_features(x)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-5)
    path, _ = checkpoint_of(tmp_path, encoder="fixed")  # nobody says which size
    with pytest.raises(InputError, match=r"cannot take images of shape \(2, 3, 224, 224\)"):
        export_encoder(path, tmp_path / "two", "onnx")


# out: what a format cannot hold

REFUSED = [
    ("torchvision", dict(encoder="small"), "encoder is 'small', which torchvision does not have"),
    ("torchvision", dict(encoder="timm/resnet10t"), "'timm/resnet10t', which torchvision does no"),
    ("timm", dict(encoder="small"), "'small', which timm does not have: format onnx holds any"),
    ("timm", dict(encoder="resnet18"), "small stem, which timm cannot build: export it as torchv"),
    ("timm", dict(encoder="convnext_tiny"), "has features.0.0.weight of shape .*, but timm's conv"),
    ("detectron2", dict(encoder="resnet18"), "small stem, which detectron2 cannot build"),
    ("detectron2", dict(encoder="mobilenet_v3_small"), "but detectron2 takes resnet18, resnet34"),
]


@pytest.mark.parametrize("format, given, said", REFUSED)
def test_what_a_format_cannot_hold_is_refused(tmp_path, format, given, said):
    path, _ = checkpoint_of(tmp_path, **given)
    with pytest.raises(InputError, match=said) as e:
        export_encoder(path, tmp_path / "out", format)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.part"))


def other_first(stem):
    "Names of a ResNet-18, with another first convolution"
    net = torchvision_backbone("resnet18", "imagenet")
    net.conv1 = nn.Conv2d(3, 64, 5, 2, 2, bias=False)
    return net


OTHERS = {
    "has 0.weight of shape": lambda stem: small_resnet((4, 8)),
    r"has conv1.weight of shape \(64, 3, 5, 5\), but .* conv1.weight of shape": other_first,
    "has no layer1.2.conv1.weight, but": lambda stem: torchvision_backbone("resnet18", "imagenet"),
}


@pytest.mark.parametrize("format", ["torchvision", "timm", "detectron2"])
@pytest.mark.parametrize("said", OTHERS)
def test_another_network_behind_a_known_name_is_refused(tmp_path, monkeypatch, said, format):
    name = "resnet34" if "layer" in said else "resnet18"
    monkeypatch.setitem(ENCODERS, name, OTHERS[said])
    path, _ = checkpoint_of(tmp_path, encoder=name, stem="imagenet")
    with pytest.raises(InputError, match=f"the encoder {said}"):
        export_encoder(path, tmp_path / "out", format)


@pytest.mark.parametrize("format, package", [("timm", "timm"), ("onnx", "onnxscript")])
def test_without_a_package_one_sentence_says_what_to_install(
    run, tmp_path, monkeypatch, format, package
):
    monkeypatch.setitem(sys.modules, package, None)
    said = f"format {format} needs {package} .*: install it with pip install {package}"
    with pytest.raises(InputError, match=said):
        export_encoder(run[0], tmp_path / "out", format)


def test_arguments_that_are_none_are_one_sentence(run, tmp_path):
    path, _ = run
    for given, said in (
        (dict(format="torchvison"), "Did you mean 'torchvision'"),
        (dict(format=None), "format is None, but must be one of torchvision, timm, detectron2"),
        (dict(license=None), "license is None, but must be text"),
        (dict(push="name"), "push is 'name', but must be <user>/<name>, or empty"),
        (dict(push="a/b/c"), "push is 'a/b/c', but must be"),
        (dict(push="a/b c"), "push is 'a/b c', but must be"),
        (dict(push=None), "push is None, but must be"),
        (dict(out=""), "out is '', but must be a path"),
        (dict(checkpoint=None), "checkpoint is None, but must be a path"),
        (dict(checkpoint=tmp_path), "is a folder, but must be a .safetensors file: none lies"),
        (dict(checkpoint=path.with_suffix(".json")), "something else wrote it; give one that pre"),
    ):
        with pytest.raises(InputError, match=said) as e:
            export_encoder(**dict(checkpoint=path, out=tmp_path / "out") | given)
        assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


# out: files


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_checkpoint_gives_the_same_bytes(tmp_path, format):
    name = "small" if format == "onnx" else "resnet18"
    path, _ = checkpoint_of(tmp_path, encoder=name, stem="imagenet")
    one, two = (export_encoder(path, tmp_path / out, format) for out in ("one", "a/two"))
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert {FILES[format], "README.md"} <= set(os.listdir(one)) <= EXPORTED
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_is_overwritten_unless_told(run, tmp_path):
    out = export_encoder(run[0], tmp_path / "out", "torchvision")
    before = content(out)
    stamp = (out / "README.md").stat().st_mtime_ns
    export_encoder(run[0], out, "torchvision")  # the same files: nothing to do
    assert (out / "README.md").stat().st_mtime_ns == stamp
    for other in (dict(format="detectron2"), dict(license="mit")):
        with pytest.raises(InputError, match="holds another export: give another `out`, or overw"):
            export_encoder(run[0], out, **other)
        assert content(out) == before
    (out / "README.md").write_text("mine")
    with pytest.raises(InputError, match="holds another export"):
        export_encoder(run[0], out)
    assert (out / "README.md").read_text() == "mine"
    export_encoder(run[0], out, "detectron2", overwrite=True)
    assert set(os.listdir(out)) == {"README.md", "model.pth"}  # nothing stale
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="out holds mine.txt, which no export wrote"):
        export_encoder(run[0], out, overwrite=True)
    assert (out / "mine.txt").read_text() == "mine" and (out / "model.pth").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_files_are_compared_byte_for_byte(tmp_path):
    "Size and time of writing may agree"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(name)
        os.utime(tmp_path / name / "README.md", (0, 0))
    assert same_files(tmp_path / "one", tmp_path / "one")
    assert not same_files(tmp_path / "one", tmp_path / "two")


def test_an_empty_folder_and_a_link_are_filled(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export_encoder(run[0], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "README.md").exists()
    export_encoder(run[0], tmp_path / "link", license="mit", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert "license: mit" in (tmp_path / "empty" / "README.md").read_text()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("format", ["torchvision", "timm", "detectron2"])
def test_a_full_disk_leaves_what_was_there(run, tmp_path, monkeypatch, format, overwrite):
    out = tmp_path / "out"
    before = {}
    if overwrite:
        export_encoder(run[0], out, license="mit")
        before = content(out)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="out cannot be written: No space left on device") as e:
        export_encoder(run[0], out, format, overwrite=overwrite)
    assert "\n" not in str(e.value)
    assert os.listdir(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or content(out) == before


@pytest.mark.parametrize("fails", [1, 2])
def test_a_rename_that_fails_leaves_the_earlier_export(tmp_path, monkeypatch, fails):
    out = tmp_path / "out"
    with new_folder(out, False) as folder:
        (folder / "README.md").write_text("one")
    replace = os.replace
    calls = []

    def failing(old, new):
        calls.append(old)
        if len(calls) == fails:
            raise OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InputError, match="out cannot be written: Input/output error"):
        with new_folder(out, True) as folder:
            (folder / "README.md").write_text("two")
    assert content(out) == {"README.md": b"one"} and os.listdir(tmp_path) == ["out"]


# out: the card


def front_matter(out):
    text = (out / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("format", ["torchvision", "timm", "detectron2"])
def test_a_card_says_what_the_record_says(run, tmp_path, format):
    path, record = run
    out = export_encoder(path, tmp_path / "out", format, license="apache-2.0")
    told = front_matter(out)
    assert told["library_name"] == format and told["license"] == "apache-2.0"
    assert "moco_v2" in told["tags"]
    (result,) = told["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == record["metrics"]["knn_backbone"]
    assert result["dataset"]["type"] == "shapes"
    text = (out / "README.md").read_text()
    for part in (
        "Measured on shapes, held-out training images, n = 32 images, in one run with seed 3.",
        f"| `knn_backbone` | {record['metrics']['knn_backbone']} |",
        f"| device | {record['device']} |",
        f"torch {record['versions']['torch']}",
        f"| SHA-256 of the images | {record['images_sha256']} |",
        "| steps | 2 |",
    ):
        assert part in text, part
    for name, value in record["parameters"].items():
        assert f"| `{name}` | {value} |" in text, name
    assert "No licence was chosen" not in text


def test_a_run_without_a_record_has_no_accuracy_and_says_how_far_it_came(tmp_path):
    path, _ = checkpoint_of(tmp_path, encoder="resnet18", epochs=10, batch_size=16)
    out = export_encoder(path, tmp_path / "out")
    text = (out / "README.md").read_text()
    assert "It was saved at step 0 of 40." in text and "No accuracy was measured." in text
    told = front_matter(out)
    assert "model-index" not in told and "license" not in told
    assert "No licence was chosen: whoever publishes this adds `license` above." in text


def test_no_path_of_this_machine_is_told(tmp_path):
    weights = tmp_path / "begin.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    birds = str(tmp_path / "secret" / "birds")
    held = str(tmp_path / "secret" / "held")
    given = dict(dataset=birds, evaluate_on=held, weights=str(weights), out=str(tmp_path))
    path, _ = checkpoint_of(tmp_path, encoder="resnet18", stem="imagenet", **given)
    asked = result_parameters(read_note(path)["params"], pretrain)
    record = dict(schema=1, name="run", parameters=asked, steps=0, n_test=9)
    record |= dict(metrics=dict(knn_backbone=50.0), measured_on=f"{held}: test split")
    path.with_suffix(".json").write_text(json.dumps(record))
    out = export_encoder(path, tmp_path / "out")
    text = (out / "README.md").read_text()
    assert str(tmp_path) not in text and "secret" not in text
    for part in ("| `dataset` | birds |", "| `weights` | begin.pth |", "birds, held: test split"):
        assert part in text, part


def test_the_record_of_another_run_is_refused(run, tmp_path):
    path, _ = run
    for file in path.parent.glob("r18.*"):
        if file.is_file():
            shutil.copy(file, tmp_path)
    path = tmp_path / path.name
    record = json.loads((tmp_path / "r18.json").read_text())
    for change, said in (
        (dict(parameters=record["parameters"] | dict(lr=0.5)), r"\(lr=0.5, not "),
        (dict(steps=9), r"\(9 steps, not 2\)"),
    ):
        (tmp_path / "r18.json").write_text(json.dumps(record | change))
        with pytest.raises(InputError, match=f"r18.json is the record of another run.*{said}"):
            export_encoder(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the Hub


@pytest.fixture
def hub(monkeypatch):
    "What would have been sent"
    calls = []

    def create(api, repo_id, **given):
        calls.append(("create", repo_id, given))

    def upload(api, **given):
        calls.append(("upload", sorted(os.listdir(given["folder_path"])), given))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    return calls


def test_a_folder_is_pushed_to_a_private_repository(run, tmp_path, hub):
    out = export_encoder(run[0], tmp_path / "out")
    assert hub == []
    export_encoder(run[0], out, push="me/birds")
    create, upload = hub
    assert create == ("create", "me/birds", dict(private=True, exist_ok=True))
    assert upload[1] == ["README.md", "model.safetensors"]
    assert upload[2]["repo_id"] == "me/birds" and upload[2]["folder_path"] == out


class Refusing(http.server.BaseHTTPRequestHandler):
    "An endpoint that knows nobody"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *of):
        pass


def test_an_endpoint_that_refuses_is_one_sentence(run, tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    try:
        said = "out is written, but was not pushed to me/birds .*401.*: log in by hf auth login"
        with pytest.raises(InputError, match=said) as e:
            export_encoder(run[0], tmp_path / "out", push="me/birds")
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(e.value)
    assert (tmp_path / "out" / "model.safetensors").exists()


# in: checkpoints of others


def source(name="resnet18"):
    "A network of torchvision that learnt something, as it were, and its features"
    net = with_statistics(torchvision.models.get_model(name, weights=None))
    fc, net.fc = net.fc, nn.Identity()
    wanted = net(images()).detach()
    net.fc = fc
    return net, wanted


def wrapped(net):
    "As by DistributedDataParallel"
    return {f"module.{name}": tensor for name, tensor in net.state_dict().items()}


class Parts(nn.Module):
    "A module of named parts"

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def mlp(width, hidden=24, dim=128):
    first = nn.Linear(width, hidden)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))


def slow(net):
    "A copy with other numbers"
    copy = deepcopy(net)
    with torch.no_grad():
        for weight in copy.parameters():
            weight.mul_(0.9)
    return copy


def optimizer_of(net):
    "The state of an optimizer after a step, as checkpoints carry it, of a few weights"
    some = list(net.parameters())[:3]
    optimizer = torch.optim.SGD(some, 0.03, momentum=0.9)
    for weight in some:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return optimizer.state_dict()


def moco(net, head):
    "FAIR's MoCo: the head is the classifier's place; v1 has one layer, v2 two"
    net.fc = head
    model = Parts(encoder_q=net, encoder_k=slow(net))
    model.register_buffer("queue", F.normalize(torch.randn(128, 32), dim=0))
    model.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    return dict(
        epoch=200, arch="resnet50", state_dict=wrapped(model), optimizer=optimizer_of(net)
    )


def authors(net, head):
    "The release of the paper's authors, which began as PyContrast"
    net.fc = nn.Identity()
    model = Parts(encoder=net, head=nn.Sequential(*head))
    memory = nn.Module()
    memory.register_buffer("memory", torch.randn(32, 128))
    return dict(
        model=wrapped(model),
        contrast=memory.state_dict(),
        optimizer=optimizer_of(net),
        epoch=200,
        model_ema=slow(model).state_dict(),
    )


def mlp_head(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))


def moco_v1(net, width):
    return moco(net, nn.Linear(width, 128))


def moco_v2(net, width):
    return moco(net, mlp_head(width))


def authors_v1(net, width):
    return authors(net, [nn.Linear(width, 128)])


def authors_v2(net, width):
    return authors(net, mlp_head(width))


def simsiam(net, width):
    net.fc = nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, 128),
        nn.BatchNorm1d(128, affine=False),
    )
    model = Parts(encoder=net, predictor=mlp(128))
    return dict(epoch=100, arch="resnet50", state_dict=wrapped(model), optimizer=optimizer_of(net))


def swav(net, width):
    net.fc = nn.Identity()
    net.projection_head = mlp(width)
    net.prototypes = nn.Linear(128, 30, bias=False)
    return wrapped(net)


def barlow(net, width):
    net.fc = nn.Identity()
    model = Parts(backbone=net, projector=mlp(width), bn=nn.BatchNorm1d(128, affine=False))
    return dict(epoch=300, model=wrapped(model), optimizer=optimizer_of(net))


def barlow_backbone(net, width):
    net.fc = nn.Identity()
    return net.state_dict()


def dino_teacher(net, width):
    net.fc = nn.Identity()
    return dict(teacher=Parts(backbone=net, head=Parts(mlp=mlp(width))).state_dict(), epoch=3)


def moco_v3(net, width):
    net.fc = mlp(width)
    model = Parts(base_encoder=net, momentum_encoder=slow(net), predictor=mlp(128))
    return dict(epoch=100, arch="resnet50", state_dict=wrapped(model), scaler=dict(scale=2.0**16))


def byol_lucidrains(net, width):
    online = Parts(net=net, projector=mlp(width))
    model = Parts(
        net=net, online_encoder=online, target_encoder=slow(online), online_predictor=mlp(128)
    )
    return model.state_dict()


def byol_lightly(net, width):
    cut = nn.Sequential(*list(net.children())[:-1])
    model = Parts(backbone=cut, projection_head=Parts(layers=mlp(width)))
    model.backbone_momentum = slow(cut)
    return model.state_dict()


def byol_solo_learn(net, width):
    net.fc = nn.Identity()
    model = Parts(backbone=net, classifier=nn.Linear(width, 10), projector=mlp(width))
    model.momentum_backbone = slow(net)
    model.momentum_projector = mlp(width)
    return {
        "epoch": 9,
        "global_step": 99,
        "pytorch-lightning_version": "1.9.0",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None}},
        "optimizer_states": [optimizer_of(net)],
        "lr_schedulers": [{"last_epoch": 9}],
        "hyper_parameters": {"max_epochs": 1000},
    }


def torchvisions(net, width):
    return net.state_dict()


def timms(net, width):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=10)
    state = {name: o for name, o in net.state_dict().items() if not name.startswith("fc.")}
    model.load_state_dict(state, strict=False)
    return model.state_dict()


LAYOUTS = [torchvisions, timms, moco_v1, moco_v2, moco_v3, authors_v1, authors_v2, simsiam, swav]
LAYOUTS += [barlow, barlow_backbone, dino_teacher, byol_lucidrains, byol_lightly, byol_solo_learn]
HEADS = {moco_v1: "linear", moco_v2: "mlp", authors_v1: "linear", authors_v2: "mlp"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_checkpoints_of_others_give_their_features(tmp_path, layout):
    net, wanted = source()
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(layout(net, 512), path)
    for head in ("linear", "mlp") if layout in HEADS else ("mlp",):
        encoder = Encoder("resnet18", head, 128, "imagenet", weights=path).eval()
        torch.testing.assert_close(
            encoder.backbone_features(images()), wanted, atol=1e-4, rtol=1e-4
        )
        loaded = HEADS.get(layout) == head
        assert (" of the head from" in encoder.loaded) == loaded, encoder.loaded
        assert encoder.loaded.startswith("120 tensors of the backbone")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", [moco_v2, authors_v2], ids=["moco_v2", "authors_v2"])
def test_a_resnet50_of_either_age_gives_features_and_vectors(tmp_path, layout, zipped):
    "Files of before torch 1.6 are pickles alone"
    net, wanted = source("resnet50")
    path = tmp_path / "checkpoint.pth.tar"
    saved = layout(net, 2048)
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    encoder = Encoder("resnet50", "mlp", 128, "imagenet", weights=path).eval()
    torch.testing.assert_close(encoder.backbone_features(images()), wanted, atol=1e-4, rtol=1e-4)
    state = saved["state_dict"] if layout is moco_v2 else saved["model"]
    place = "module.encoder_q.fc" if layout is moco_v2 else "module.head"
    hidden = F.linear(wanted, state[f"{place}.0.weight"], state[f"{place}.0.bias"]).relu()
    z = F.linear(hidden, state[f"{place}.2.weight"], state[f"{place}.2.bias"])
    z = F.normalize(z, dim=1)
    torch.testing.assert_close(encoder(images()), z, atol=1e-4, rtol=1e-4)


def test_swavs_padding_is_the_same_in_sum(tmp_path):
    "It pads by 1 before a first convolution that pads by 2"
    net, _ = source()
    torch.save(swav(net, 512), tmp_path / "swav.pth.tar")
    net.conv1.padding = (2, 2)
    padded = nn.functional.pad(images(), (1, 1, 1, 1))
    wanted = net(padded).detach()
    encoder = Encoder("resnet18", stem="imagenet", weights=tmp_path / "swav.pth.tar").eval()
    torch.testing.assert_close(encoder.backbone_features(images()), wanted, atol=1e-4, rtol=1e-4)


def test_the_small_stem_of_others_fits(tmp_path):
    net, _ = source()
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    content = byol_solo_learn(net, 512)
    torch.save(content, tmp_path / "cifar.ckpt")
    wanted = net(images(size=32)).detach()
    encoder = Encoder("resnet18", weights=tmp_path / "cifar.ckpt").eval()
    found = encoder.backbone_features(images(size=32))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"\(64, 3, 3, 3\), but must .*: try the other `stem`"):
        Encoder("resnet18", stem="imagenet", weights=tmp_path / "cifar.ckpt")


def test_pretraining_goes_on_from_a_checkpoint_of_others_and_resumes(tmp_path):
    net, wanted = source()
    path = tmp_path / "moco.pth.tar"
    torch.save(moco_v2(net, 512), path)
    given = TINY | dict(encoder="resnet18", stem="imagenet", dim=128, weights=str(path))
    given |= dict(readouts="none", epochs=2)
    whole = pretrain(**given, out=str(tmp_path / "whole"), name="run")
    assert whole["steps"] == 4 and len(whole["weights_sha256"]) == 64
    begun = build_method(defaults(pretrain) | given, transform_of(defaults(pretrain)))
    for encoder in (begun.encoder, begun.key_encoder):
        found = encoder.eval().backbone_features(images())
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(encoder.head[2].weight, net.fc[2].weight)
    cut = dict(out=str(tmp_path / "cut"), name="run")
    pretrain(**given, **cut, stop_after=3)
    torch.save(simsiam(net, 512), path)  # no longer what the run began with
    with pytest.raises(InputError, match="began with other weights than those that lie in"):
        pretrain(**given, **cut, resume=True)
    path.unlink()
    with pytest.raises(InputError, match="there is no such file"):
        pretrain(**given, **cut, resume=True)
    torch.manual_seed(0)
    torch.save(moco_v2(source()[0], 512), path)
    pretrain(**given, **cut, resume=True)
    ends = [read_checkpoint(tmp_path / where / "run.safetensors")[0] for where in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    end = ends[0]["method.encoder.backbone.conv1.weight"].flatten()
    start = net.conv1.weight.flatten()
    assert 0.5 < F.cosine_similarity(end, start, dim=0) < 0.999999  # it went on from there


@pytest.mark.parametrize(
    "name, said",
    [
        ("resnet34", r"lack layer1.2.conv1.weight of shape \(64, 64, 3, 3\), layer1.2.bn1.weight"),
        ("resnet50", r"have layer1.0.conv1.weight of shape \(64, 64, 3, 3\), but must have layer"),
        ("convnext_tiny", r"lack features.0.0.weight of shape .* and 177 more: they begin with "),
        ("small", r"lack 0.weight of shape \(32, 3, 3, 3\), 1.weight, 1.bias and 42 more: they be"),
    ],
)
@pytest.mark.parametrize("layout", [moco_v2, swav, byol_lightly], ids=lambda o: o.__name__)
def test_a_checkpoint_of_another_architecture_names_what_differs(tmp_path, layout, name, said):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(layout(source()[0], 512), path)
    with pytest.raises(InputError, match=said) as e:
        Encoder(name, stem="imagenet", weights=path)
    assert "\n" not in str(e.value)


def test_a_deeper_network_with_numbers_for_names_is_not_loaded_in_part(tmp_path):
    net = torchvision.models.resnet34(weights=None)
    torch.save(nn.Sequential(*list(net.children())[:-1]).state_dict(), tmp_path / "34.pth")
    with pytest.raises(InputError, match="have layer1.2.conv1.weight .* which the encoder lacks"):
        Encoder("resnet18", stem="imagenet", weights=tmp_path / "34.pth")
    encoder = Encoder("resnet34", stem="imagenet", weights=tmp_path / "34.pth")
    assert "nothing left out" in encoder.loaded


def test_one_network_under_two_names_is_one(tmp_path):
    net = small_resnet((4, 8))
    state = {f"{which}.{name}": o for which in "ab" for name, o in net.state_dict().items()}
    path = tmp_path / "twice.pth"
    torch.save(state, path)
    encoder = Encoder(small_resnet((4, 8)), weights=path)
    assert torch.equal(encoder.backbone[0].weight, net[0].weight)
    state["b.0.weight"] = state["b.0.weight"] + 1
    torch.save(state, path)
    with pytest.raises(InputError, match="several networks that fit, a, b: save one of them"):
        Encoder(small_resnet((4, 8)), weights=path)


def test_a_classifier_is_never_taken_for_a_head(tmp_path):
    net = torchvision.models.resnet18(num_classes=16)
    torch.save(net.state_dict(), tmp_path / "classes.pth")
    encoder = Encoder("resnet18", "linear", 16, "imagenet", weights=tmp_path / "classes.pth")
    assert "left out: fc (2)" in encoder.loaded
    assert not torch.equal(encoder.head.weight, net.fc.weight)


# in: no code is run


class Trap:
    "An object whose pickle makes a folder"

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def as_torch(trap, **how):
    file = io.BytesIO()
    torch.save(trap, file, **how)
    return file.getvalue()


def as_array(trap):
    file = io.BytesIO()
    np.save(file, np.array([trap, trap], dtype=object), allow_pickle=True)
    return file.getvalue()


def as_tar(trap):
    "What torch wrote before version 0.1.10"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            code = pickle.dumps(trap)
            info = tarfile.TarInfo(name)
            info.size = len(code)
            tar.addfile(info, io.BytesIO(code))
    return file.getvalue()


TRAPS = {
    "torch": as_torch,
    "torch of early days": lambda trap: as_torch(trap, _use_new_zipfile_serialization=False),
    "torch within a dict": lambda trap: as_torch(dict(state_dict=dict(a=torch.ones(2)), args=trap)),
    "pickle": pickle.dumps,
    "text pickle": lambda trap: pickle.dumps(trap, protocol=0),
    "array": as_array,
    "tar": as_tar,
}
READERS = {
    "Encoder": ("it.pth.tar", lambda file: Encoder("small", weights=file)),
    "Encoder, safetensors": ("it.safetensors", lambda file: Encoder("small", weights=file)),
    "load_weights": (
        "it.ckpt",
        lambda file: load_weights(small_resnet(), nn.Linear(128, 8), file, "small"),
    ),
    "pretrain": (
        "it.pt",
        lambda file: pretrain(**TINY, weights=str(file), out=str(file.parent / "out")),
    ),
    "export_encoder": ("it.safetensors", lambda file: export_encoder(file, file.parent / "out")),
    "load_encoder": ("it.safetensors", load_encoder),
    "load_method": ("it.safetensors", load_method),
    "read_checkpoint": ("it.safetensors", read_checkpoint),
    "read_note": ("it.safetensors", read_note),
    "read_record": ("it.json", read_record),
    "read_scores": ("it.parquet", read_scores),
    "read_rows": ("it.parquet", lambda file: read_rows(file, ["x"])),
    "load, parquet": ("train.parquet", lambda file: load(str(file.parent), "train")),
    "load, image": ("train/a/it.png", lambda file: load(str(file.parent.parent.parent), "train")),
    "transfer, weights": (
        "it.pth.tar",
        lambda file: transfer(weights=str(file), out=str(file.parent / "out")),
    ),
    "transfer, checkpoint": (
        "it.safetensors",
        lambda file: transfer(checkpoint=str(file), out=str(file.parent / "out")),
    ),
    "read_coco": ("it.json", lambda file: read_coco(file, file.parent)),
    "read_predictions": ("it.coco", lambda file: read_predictions(file, canvases(1))),
    "run_parameters": ("it.yaml", run_parameters),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", TRAPS)
def test_no_reader_runs_the_code_of_a_file(tmp_path, kind, reader):
    canary = tmp_path / "canary"
    name, read = READERS[reader]
    file = tmp_path / "here" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(TRAPS[kind](Trap(canary)))
    with pytest.raises(InputError) as e:
        read(file)
    assert "\n" not in str(e.value) and file.name in str(e.value)
    assert not canary.exists()


@pytest.mark.parametrize("kind", TRAPS)
def test_the_traps_are_traps(tmp_path, kind):
    canary = tmp_path / "canary"
    code = TRAPS[kind](Trap(canary))
    loads = {
        "array": lambda file: np.load(file, allow_pickle=True),
        "pickle": pickle.load,
        "text pickle": pickle.load,
        "tar": lambda file: pickle.load(tarfile.open(fileobj=file).extractfile("pickle")),
    }
    load = loads.get(kind, lambda file: torch.load(file, weights_only=False))
    try:
        load(io.BytesIO(code))
    except FileExistsError:
        pass  # the second call of the same trap
    assert canary.exists()


def test_an_object_beside_the_tensors_is_named(tmp_path):
    from argparse import Namespace

    state = torchvision.models.resnet18(weights=None).state_dict()
    content = dict(student=state, teacher=state, args=Namespace(lr=0.1))
    torch.save(content, tmp_path / "dino.pth")
    said = "it holds an object of argparse.Namespace, not tensors alone.: save a state dict"
    with pytest.raises(InputError, match=said):
        Encoder("resnet18", stem="imagenet", weights=tmp_path / "dino.pth")


def test_detectron2s_names_are_one_to_one():
    names = list(torchvision.models.resnet152(weights=None).state_dict())
    assert len({detectron2_name(name) for name in names}) == len(names)
    assert len(names) == 932
