"""Readouts by name: few labels, rare classes, other data, weights of others, and a probe

What a number is of stands beside it. What cannot be measured is refused before anything is trained.
"""

import pickle
from copy import deepcopy
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from test_processes import RUN, launch
from torch import nn

from ftcl import evaluate, readouts
from ftcl.checkpoint import load_encoder, read_checkpoint
from ftcl.core import InputError
from ftcl.data import DATASETS, InMemory, load, shapes
from ftcl.encoder import Encoder
from ftcl.evaluate import FROZEN, READOUTS, Reading, ReadoutSettings, knn_accuracy
from ftcl.evaluate import linear_logreg, linear_sgd, read_out, readings, record_entries
from ftcl.method import METHODS
from ftcl.readouts import class_groups, finetune_accuracy, share_of_each, some_of_each, tail_counts
from ftcl.record import read_record
from ftcl.train import evaluate_checkpoint, pretrain
from ftcl.views import Augmentation

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(n_images=128, holdout=64, size=16, epochs=2, batch_size=32, queue_size=64, dim=16)
TINY |= dict(precision="fp32", progress=False, name="run")
ENTRIES = ["protocol", "features", "fitted_on", "n_fit", "measured_on", "n_test"]


@pytest.fixture(autouse=True)
def nothing_is_left():
    "Names that a test adds are gone after it"
    before = dict(DATASETS), dict(READOUTS)
    yield
    for registry, content in zip((DATASETS, READOUTS), before):
        registry.clear()
        registry.update(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small run on images of 16 pixels, its record, checkpoint and scores"
    folder = tmp_path_factory.mktemp("run")
    pretrain(**TINY, out=str(folder))
    return folder


def told(f, *args, **kwargs):
    "The one sentence by which a call is refused"
    with pytest.raises(InputError) as caught:
        f(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text[-1] in ".?"
    return text


def small(seed=0):
    torch.manual_seed(seed)
    return Encoder("small", dim=16)


def sets(size=16):
    return load("shapes", "train", size), load("shapes", "test", size)


def differing(one, two):
    "Names of tensors that differ in a bit between two checkpoints, or are in one alone"
    (a, _), (b, _) = read_checkpoint(one), read_checkpoint(two)
    odd = a.keys() ^ b.keys()
    return odd | {
        n for n in a.keys() & b.keys() if a[n].numpy().tobytes() != b[n].numpy().tobytes()
    }


# ---- the papers' linear readout


def prototypes(classes, each, seed, scale):
    "Images of 4 x 4 pixels around one prototype for each class"
    centres = torch.rand(classes, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    x = 0.5 + scale * (centres[labels] - 0.5) + 0.2 * torch.randn(len(labels), 3, 4, 4, generator=g)
    return InMemory((255 * x.clamp(0, 1)).byte(), labels)


@pytest.mark.parametrize("classes, each", [(2, 500), (10, 200), (100, 50)])
def test_the_default_rate_reaches_logistic_regression(classes, each, monkeypatch):
    "In six epochs, at any number of classes, where crops keep nothing back"
    still = Augmentation(
        area=(1, 1), ratio=(1, 1), brightness=0, contrast=0, saturation=0, hue=0, jitter=0, grey=0
    )
    monkeypatch.setattr(evaluate, "LINEAR_VIEWS", still)
    encoder = Encoder(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()))
    fit, held = prototypes(classes, each, 1, 0.3), prototypes(classes, 50, 2, 0.3)
    flipped = InMemory(torch.cat([fit.images, fit.images.flip(3)]), fit.labels.repeat(2))
    wanted = linear_logreg(encoder, flipped, held)
    assert linear_sgd(encoder, fit, held, epochs=6) > wanted - 4
    assert 100 / classes + 10 < wanted < 99.5


def test_a_rate_of_ones_own_is_taken_as_it_is():
    train, test = (o.take(torch.arange(200)) for o in sets())
    encoder = small()
    by_rate = {lr: linear_sgd(encoder, train, test, epochs=2, lr=lr) for lr in (None, 1e-9, 0.01)}
    assert len(set(by_rate.values())) == 3
    settings = ReadoutSettings(linear_epochs=2, linear_lr=0.01)
    reading = readings(encoder, train, test, ["linear_backbone"], settings)["linear_backbone"]
    assert reading.accuracy == by_rate[0.01] and reading.protocol.endswith("2 epochs, rate 0.01")


def test_a_large_set_is_looked_at_in_part(monkeypatch):
    train, test = (o.take(torch.arange(300)) for o in sets())
    whole = linear_sgd(small(), train, test, epochs=1)
    monkeypatch.setattr(evaluate, "MOST_STATISTICS", 100)
    assert len(evaluate.some_features(small(), train)) == 100
    assert abs(linear_sgd(small(), train, test, epochs=1) - whole) < 10


# ---- what a number is of


def test_every_number_says_what_it_is_of():
    train, test = sets(8)
    settings = ReadoutSettings(k=5, linear_epochs=1, finetune_epochs=1, imbalance=10)
    train = some_of_each(train, [100] * 10)
    found = readings(small(), train, test, list(READOUTS), settings)
    entries = record_entries(found, "training images", "test split")
    assert list(entries["metrics"]) == list(entries["readouts"])
    assert set(READOUTS) < set(found)  # a long tail has groups as well
    for name, about in entries["readouts"].items():
        assert list(about) == ENTRIES and all(about.values()), name
        assert about["features"] in ("backbone", "projection", "all weights")
    n_fit = {name: about["n_fit"] for name, about in entries["readouts"].items()}
    assert n_fit["knn_backbone"] == n_fit["finetune"] == 1000
    assert (n_fit["finetune_1pct"], n_fit["finetune_10pct"]) == (10, 100)
    assert n_fit["longtail_backbone"] == n_fit["longtail_backbone_few"] < 1000
    rows = pd.DataFrame(entries["per_class"]["longtail_backbone"])
    assert rows["n_fit"].sum() == n_fit["longtail_backbone"]
    assert rows["accuracy"].mean() == pytest.approx(entries["metrics"]["longtail_backbone"])


def test_where_none_is_named_the_quick_ones_are_measured(tmp_path):
    record = pretrain(**TINY, readouts="", out=str(tmp_path))
    assert list(record["metrics"]) == FROZEN == list(record["readouts"])
    parts = (o.take(torch.arange(50)) for o in sets(8))
    assert list(read_out(small(), *parts, settings=ReadoutSettings(linear_epochs=1))) == FROZEN
    about = record["readouts"]["knn_backbone"]
    assert about["fitted_on"] == "shapes: training images" and about["n_fit"] == 128
    assert about["measured_on"] == "shapes: held-out training images" and about["n_test"] == 64


@pytest.mark.parametrize("name", list(READOUTS))
def test_a_readout_changes_nothing(name):
    "Neither encoder nor random numbers; a second time it says the same"
    train, test = (o.take(torch.arange(400)) for o in sets(8))
    encoder = Encoder("small", dim=16, bn_splits=4).train()
    before = deepcopy(encoder.state_dict())
    settings = ReadoutSettings(k=5, linear_epochs=1, finetune_epochs=1, imbalance=10)
    if name == "finetune_1pct":
        train = some_of_each(sets(8)[0], [50] * 10)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    once = read_out(encoder, train, test, [name], settings)
    assert torch.equal(torch.get_rng_state(), state) and encoder.training
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    torch.manual_seed(6)
    assert read_out(encoder, train, test, [name], settings) == once


@pytest.mark.parametrize("given", [101, -1, float("nan"), Reading(float("inf"))])
def test_what_is_no_percent_is_refused(given):
    train, test = (o.take(torch.arange(20)) for o in sets(8))
    READOUTS["odd"] = lambda *_: given
    assert "the readout odd gave" in told(read_out, small(), train, test, ["odd"])


# ---- few labels


def test_every_encoder_gets_the_same_labels():
    train, _ = sets(8)
    few = [some_of_each(train, share_of_each(train, share)) for share in (0.01, 0.1)]
    assert [len(o) for o in few] == [40, 410] and evaluate.class_count(few[0]) == 10

    def seen(data):
        return {image.numpy().tobytes() for image in data.images}

    assert seen(few[0]) < seen(few[1]) < seen(train)
    assert seen(some_of_each(train, [4] * 10, seed=1)) != seen(few[0])


def test_a_class_does_not_depend_on_the_other_test_images():
    train, test = sets(8)
    few = some_of_each(train, [4] * 10)
    order = test.labels.argsort()  # half of the classes in each half
    halves = [finetune_accuracy(small(), few, test.take(o), epochs=1) for o in order.chunk(2)]
    whole = finetune_accuracy(small(), few, test, epochs=1)
    assert sum(halves) / 2 == pytest.approx(whole, abs=0.2)  # a tie may fall either way


def test_pretrained_weights_are_ahead_of_random_ones(tmp_path, monkeypatch):
    "With one label of each class, and a few steps"
    monkeypatch.setattr(readouts, "LEAST_STEPS", 50)
    pretrain(epochs=2, out=str(tmp_path), name="run", progress=False)
    trained, _ = load_encoder(tmp_path / "run.safetensors")
    torch.manual_seed(0)
    scratch = Encoder("small")
    train, test = sets(32)
    for seed in range(2):
        few = some_of_each(train, [1] * 10, seed)
        how = dict(epochs=1, lr=0.03, seed=seed)
        random, ahead = (finetune_accuracy(o, few, test, **how) for o in (scratch, trained))
        assert ahead > random + 15


def test_a_share_that_is_none_is_refused_before_it_trains(tmp_path):
    said = told(pretrain, **TINY, readouts="knn_backbone+finetune_1pct", out=str(tmp_path))
    assert "1% of the" in said and "is none: 50 or more of each class are needed." in said
    assert not list(tmp_path.iterdir())


# ---- a long tail


def test_a_tail_that_empties_a_class_is_refused_before_it_trains(tmp_path, folder):
    said = told(pretrain, **TINY, readouts="longtail_backbone", out=str(tmp_path))
    assert (
        "imbalance is 100.0, but that leaves class 'zigzag' without an image: the largest" in said
    )
    assert not list(tmp_path.iterdir())
    asked = dict(readouts="longtail_backbone", out=str(tmp_path), name="tail", n_images=200)
    checkpoint = str(folder / "run.safetensors")
    said = told(evaluate_checkpoint, checkpoint, imbalance=1e9, **asked)
    largest = int(said.rpartition(" ")[2].rstrip("."))
    refused = told(evaluate_checkpoint, checkpoint, imbalance=float(largest + 1), **asked)
    assert refused.endswith(f"allow is {largest}.") and not list(tmp_path.iterdir())
    record = evaluate_checkpoint(checkpoint, imbalance=float(largest), **asked)
    assert read_record(tmp_path / "tail.json") == record
    groups = ["longtail_backbone", "longtail_backbone_medium", "longtail_backbone_few"]
    assert list(record["metrics"]) == groups  # no class has more than 100 images
    rows = record["per_class"]["longtail_backbone"]
    assert [row["class"] for row in rows][0::9] == ["disc", "zigzag"]
    assert rows[0]["n_fit"] >= largest and rows[9]["n_fit"] == 1


@pytest.mark.parametrize("seed", range(20))
def test_any_sizes_give_a_tail_or_the_largest_factor(seed):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 300, (int(torch.randint(2, 12, (), generator=g)),), generator=g)
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    data = InMemory(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels)
    said = told(tail_counts, data, 1e9)
    largest = int(said.rpartition(" ")[2].rstrip("."))
    counts = tail_counts(data, largest)
    assert counts[-1] >= 1 and all(n <= size for n, size in zip(counts, sizes.tolist()))
    assert counts == sorted(counts, reverse=True)
    assert said.replace("1000000000.0", str(largest + 1)) == told(tail_counts, data, largest + 1)
    groups = class_groups(counts)
    assert sorted(sum(groups.values(), [])) == list(range(len(sizes)))


# ---- another data set


def test_another_set_is_scaled_to_the_side_of_the_run(folder, tmp_path):
    asked = dict(readouts="knn_backbone", k=5, precision="fp32", out=str(tmp_path))
    checkpoint = str(folder / "run.safetensors")
    record = evaluate_checkpoint(checkpoint, dataset="shapes", **asked, name="a")
    assert record["image_size"] == [16, 16] and record["measured_on"] == "shapes: test split"
    encoder, _ = load_encoder(checkpoint)
    assert record["metrics"]["knn_backbone"] == knn_accuracy(encoder, *sets(16), k=5)
    forced = evaluate_checkpoint(checkpoint, dataset="shapes", size=20, **asked, name="b")
    assert forced["image_size"] == [20, 20]
    own = evaluate_checkpoint(checkpoint, **asked, name="c")
    assert own["measured_on"] == "held-out training images" and own["image_size"] == [16, 16]


def test_the_side_of_a_run_that_scaled_nothing(tmp_path):
    DATASETS["odd"] = lambda split, size: shapes(128, int(split == "test"), size or 20)
    pretrain(**TINY | dict(size=0, n_images=64), dataset="odd", out=str(tmp_path))
    checkpoint = str(tmp_path / "run.safetensors")
    asked = dict(
        dataset="shapes", readouts="knn_backbone", k=5, precision="fp32", out=str(tmp_path)
    )
    assert evaluate_checkpoint(checkpoint, **asked, name="a")["image_size"] == [20, 20]
    del DATASETS["odd"]
    said = told(evaluate_checkpoint, checkpoint, **asked, name="b")
    assert said.startswith(
        "size is needed, for the images of the run do not tell it: dataset 'odd'"
    )
    assert evaluate_checkpoint(checkpoint, **asked, size=24, name="b")["image_size"] == [24, 24]


def write_folder(root, splits):
    "A folder of images, split/class/image, of 24 x 24 pixels"
    for n, (split, each) in enumerate(splits.items()):
        data = shapes(10 * each, n, 24)
        for i, (image, label) in enumerate(zip(data.images, data.labels.tolist())):
            path = root / split / data.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def test_files_are_scaled_and_their_split_is_named(folder, tmp_path):
    write_folder(tmp_path / "set", dict(train=6, validation=3))
    name = str(tmp_path / "set")
    record = evaluate_checkpoint(
        str(folder / "run.safetensors"), dataset=name, readouts="knn_backbone+finetune", k=5,
        finetune_epochs=1, out=str(tmp_path), name="files", workers=0,
    )  # fmt: skip
    assert record["measured_on"] == f"{name}: validation split" and record["image_size"] == [16, 16]
    about = record["readouts"]["finetune"]
    assert (about["n_fit"], about["n_test"]) == (60, 30)
    assert about["fitted_on"] == f"{name}: training images"
    # and a run of files tells its side
    pretrain(
        **TINY | dict(size=0, n_images=40, holdout=20), dataset=name, out=str(tmp_path), workers=0
    )
    there = evaluate_checkpoint(
        str(tmp_path / "run.safetensors"), dataset="shapes", readouts="knn_backbone",
        out=str(tmp_path), name="back",
    )  # fmt: skip
    assert there["image_size"] == [24, 24]


# ---- weights of others


def test_weights_of_others_are_read_out(tmp_path):
    encoder = small(3)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": encoder.backbone.state_dict()}, file)
    asked = dict(
        dataset="shapes", size=16, k=5, precision="fp32", out=str(tmp_path), linear_epochs=1
    )
    record = evaluate_checkpoint(str(file), encoder="small", **asked, name="a")
    assert list(record["metrics"]) == [name for name in FROZEN if name != "knn_projection"]
    assert record["metrics"]["knn_backbone"] == knn_accuracy(encoder.eval(), *sets(16), k=5)
    about = record["pretrained"]
    assert about["weights"] == str(file) and len(about["weights_sha256"]) == 64
    assert "tensors of the backbone from weights.pth" in about["loaded"]
    assert "steps" not in record and read_record(tmp_path / "a.json") == record
    for wrong, said in (
        (dict(readouts="knn_projection"), "of foreign weights the backbone alone is loaded"),
        (dict(dataset=""), "dataset is empty, but weights without a run need one"),
        (dict(encoder="resnet18"), "of another network"),
        (dict(encoder="smal"), "Did you mean 'small'?"),
        (dict(encoder=""), "weights.pth is no checkpoint of ftcl: name the `encoder`"),
    ):
        how = dict(encoder="small") | asked | wrong
        assert said in told(evaluate_checkpoint, str(file), **how, name="b")
    assert not (tmp_path / "b.json").exists()


def test_a_checkpoint_of_ours_may_be_read_as_weights(folder, tmp_path):
    asked = dict(dataset="shapes", size=16, k=5, readouts="knn_backbone", out=str(tmp_path))
    checkpoint = str(folder / "run.safetensors")
    ours = evaluate_checkpoint(checkpoint, **asked, name="a")
    read = evaluate_checkpoint(checkpoint, encoder="small", **asked, name="b")
    assert ours["metrics"] == read["metrics"]


def test_untrained_weights_are_decided_by_the_seed(tmp_path):
    asked = dict(dataset="shapes", size=16, k=5, readouts="knn_backbone", out=str(tmp_path))
    torch.manual_seed(9)
    state = torch.get_rng_state()
    found = []
    for i, seed in enumerate((0, 0, 1)):
        record = evaluate_checkpoint(
            "untrained", encoder="small", **asked, seed=seed, name=f"run{i}"
        )
        found.append(record["metrics"]["knn_backbone"])
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert "the checkpoint untrained cannot be read" in told(evaluate_checkpoint, "untrained")


class Payload:
    "What runs when it is unpickled"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors", ""])
@pytest.mark.parametrize("encoder", ["", "small"])
def test_no_code_from_a_file_is_run(tmp_path, ending, encoder):
    ran = tmp_path / "ran"
    out = dict(encoder=encoder, dataset="shapes", out=str(tmp_path / "out"))
    for way in ("pickle", "torch"):
        file = tmp_path / f"{way}{ending}"
        content = {"state_dict": {"weight": Payload(ran)}}
        if way == "pickle":
            file.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, file)
        told(evaluate_checkpoint, str(file), **out)
        assert not ran.exists() and not (tmp_path / "out").exists()
    pickle.loads((tmp_path / f"pickle{ending}").read_bytes())
    assert ran.exists()  # the file was armed


# ---- a probe


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_does_not_feel_its_probe(method, tmp_path):
    "Whatever the method does to its views"
    how = TINY | dict(method=method, mixing="none", knn_every=1, n_images=64, bn_splits=2)
    for name, probe in (("without", False), ("with", True)):
        pretrain(**how | dict(out=str(tmp_path), name=name, probe=probe))
    odd = differing(tmp_path / "without.safetensors", tmp_path / "with.safetensors")
    assert odd == {"epochs"} | {
        f"probe.{o}" for o in ("steps", "mean", "square", "weight", "velocity")
    }
    scores = [pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("without", "with")]
    pd.testing.assert_frame_equal(*scores)
    one, two = (read_record(tmp_path / f"{name}.json") for name in ("without", "with"))
    for row in two["epochs"]:
        assert 0 <= row.pop("probe_backbone") <= 100
    assert one["epochs"] == two["epochs"]
    assert list(two["metrics"]) == [*one["metrics"], "probe_backbone"]
    assert list(two["readouts"]["probe_backbone"]) == ENTRIES


def test_a_probe_learns(tmp_path):
    record = pretrain(
        n_images=2048, size=16, epochs=12, probe=True, out=str(tmp_path), progress=False,
        readouts="logreg_backbone", mixing="none",
    )  # fmt: skip
    accuracies = [row["probe_backbone"] for row in record["epochs"]]
    assert accuracies[-1] == record["metrics"]["probe_backbone"] > 22  # chance is 10
    assert accuracies[-1] > 0.7 * record["metrics"]["logreg_backbone"]


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_probe_goes_on_where_it_was(stop, tmp_path):
    how = TINY | dict(probe=True, out=str(tmp_path))
    pretrain(**how | dict(name="whole"))
    assert pretrain(**how, stop_after=stop) is None
    pretrain(**how, resume=True)
    assert not differing(tmp_path / "whole.safetensors", tmp_path / "run.safetensors")
    one, two = (read_record(tmp_path / f"{name}.json") for name in ("whole", "run"))
    assert one["epochs"] == two["epochs"] and one["metrics"] == two["metrics"]
    assert "probe=True, not False" in told(pretrain, **how | dict(probe=False), resume=True)
    assert load_encoder(tmp_path / "run.safetensors")[1]["probe"] is True


def test_a_probe_of_two_processes_is_that_of_one(tmp_path, float64):
    how = RUN | dict(probe=True, precision="fp32")
    one = pretrain(**how | dict(out=str(tmp_path), name="one"))
    run = launch(tmp_path, how | dict(out=str(tmp_path), name="two"))
    assert run.returncode == 0, run.stderr
    (a, _), (b, _) = (read_checkpoint(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    assert int(a["probe.steps"]) == int(b["probe.steps"]) == one["steps"]
    gap = (a["probe.weight"] - b["probe.weight"]).norm() / a["probe.weight"].norm()
    assert gap < 0.2  # running statistics follow the parts of a batch one by one, or half of them


def test_a_probe_without_labels_of_its_own_is_refused(tmp_path):
    how = TINY | dict(probe=True, holdout=0, out=str(tmp_path))
    said = told(pretrain, **how, label_column="none", readouts="none")
    assert said == "probe is True, but images to train on have no labels: leave it False."
    DATASETS["two"] = lambda split, size: InMemory(
        shapes(64, 0, size).images, torch.arange(64) % 2, ["a", "b"]
    )
    said = told(pretrain, **how, evaluate_on="two", readouts="none")
    assert "label 0 is 'a' in the test set, but 'disc' in the training set" in said
    assert not list(tmp_path.iterdir())
