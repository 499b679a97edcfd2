"""Adding one thing touches one place

A method, a transformation, a readout, a data set and a study are added here, in this file alone,
and the main job runs with each.
"""

import pytest
import torch
import yaml

from ftcl.core import InputError
from ftcl.data import DATASETS, ImageSet
from ftcl.evaluate import READOUTS, set_features
from ftcl.method import METHODS, Method, Step
from ftcl.scores import read_scores
from ftcl.study import read_studies
from ftcl.train import pretrain
from ftcl.transform import TRANSFORMS, Transform

SMALL = dict(n_images=128, holdout=64, size=16, epochs=2, batch_size=32, queue_size=64, dim=16)
SMALL |= dict(precision="fp32", progress=False)


@pytest.fixture(autouse=True)
def nothing_is_left():
    "Names that a test adds are gone after it"
    registries = (DATASETS, METHODS, READOUTS, TRANSFORMS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before):
        registry.clear()
        registry.update(content)


def run(tmp_path, **parameters):
    "The main job: record and scores"
    record = pretrain(**SMALL | parameters, out=str(tmp_path), name="run")
    return record, read_scores(tmp_path / "run.parquet")


def test_a_method_is_one_class(tmp_path):
    class Predicting(Method, name="predicting"):
        "Two views agree through a predictor, which must train as well"

        def __init__(self, encoder, transform, precision):
            super().__init__(encoder, transform, precision)
            self.predictor = torch.nn.Linear(16, 16)
            self.start = self.predictor.weight.detach().clone()

        def forward(self, v1, v2, mix=True, look=True):
            q, k = self.encoder(v1), self.encoder(v2).detach()  # (B, D)
            p = torch.nn.functional.normalize(self.predictor(q), dim=1)
            pos = (p * k).sum(1)  # (B,)
            others = ~torch.eye(len(q), dtype=torch.bool)
            neg = (p @ k.T)[others].view(len(q), -1)  # (B, B - 1)
            kept = dict(weight=self.predictor.weight)
            return Step(1 - pos.mean(), pos, neg, None, (q, k), None, kept=kept)

        def update(self, step):
            Predicting.moved = (step.kept["weight"] - self.start).abs().max().item()

    record, scores = run(tmp_path, method="predicting")
    assert record["parameters"]["method"] == "predicting" and record["steps"] == 8 == len(scores)
    assert Predicting.moved > 1e-4  # the optimiser takes every weight that wants a gradient
    assert scores.loss.iloc[-1] < scores.loss.iloc[0]


def test_a_transformation_is_one_class(tmp_path):
    class Noise(Transform, name="noise"):
        "Noisy copies of the negatives, beside them"

        acts_on = "negatives"
        draws = ("noise",)

        def forward(self, q, k, negatives):
            keys = self.shared(negatives)
            amount = torch.rand((), generator=self.options.generator)
            self.drawn = {"noise": amount}
            noise = torch.randn(keys.shape, generator=self.options.generator)
            noisy = self.options.on_sphere(keys + amount * noise)  # (K, D)
            return self.put(negatives, noisy, None)

    record, scores = run(tmp_path, mixing="pos+noise", append=True, start_epoch=1)
    assert record["parameters"]["mixing"] == "pos+noise"
    assert scores.noise[:4].isna().all() and scores.noise[4:].between(0, 1).all()
    assert scores.l_ex[4:].between(1, 2).all()
    assert (scores.neg_var[4:] > scores.before_neg_var[4:]).all()


def test_a_readout_is_one_function(tmp_path):
    def nearest_mean(encoder, train, test, protocol):
        "Accuracy of the nearest class mean, in percent"
        known = set_features(encoder, train)  # (N, F)
        means = torch.stack([known[train.labels == c].mean(0) for c in range(len(train.classes))])
        nearest = torch.cdist(set_features(encoder, test), means).argmin(1)  # (M,)
        return 100 * (nearest == test.labels).double().mean().item()

    READOUTS["nearest_mean"] = nearest_mean
    record, _ = run(tmp_path, readouts="nearest_mean+knn_backbone")
    assert list(record["metrics"]) == ["nearest_mean", "knn_backbone"]
    assert 0 <= record["metrics"]["nearest_mean"] <= 100


def test_a_data_set_is_one_class(tmp_path):
    class Stripes(ImageSet):
        "Images that are never held in memory: stripes across or down, made as they are asked for"

        classes = ["across", "down"]

        def __init__(self, split, size):
            self.seed = dict(train=0, test=1)[split]
            self.size = size or 16
            self.labels = torch.arange(256) % 2

        def __len__(self):
            return 256

        def batch(self, indices):
            images = []
            for i in indices.tolist():
                g = torch.Generator().manual_seed(1000 * self.seed + i)
                image = torch.randint(0, 256, (3, self.size, 1), generator=g, dtype=torch.uint8)
                image = image.expand(-1, -1, self.size)
                images.append(image.mT if self.labels[i] else image)
            return torch.stack(images)

    DATASETS["stripes"] = Stripes
    record, _ = run(tmp_path, dataset="stripes", n_images=96)
    assert (record["n_train"], record["n_test"]) == (96, 64)
    assert record["metrics"]["knn_backbone"] > 50

    class Unlabelled(Stripes):
        "The same images; nobody knows what they are"

        classes = None

        def __init__(self, split, size):
            super().__init__(split, size)
            self.turned = self.labels
            self.labels = None

        def batch(self, indices):
            self.labels = self.turned
            images = super().batch(indices)
            self.labels = None
            return images

    DATASETS["unlabelled"] = Unlabelled
    with pytest.raises(InputError, match="has no labels.*evaluate_on"):  # before it trains
        run(tmp_path / "wanted", dataset="unlabelled", n_images=96)
    assert not list((tmp_path / "wanted").glob("*"))
    alike = dict(n_images=96, holdout=0)
    known, _ = run(tmp_path / "known", dataset="stripes", **alike)
    other, _ = run(tmp_path / "none", dataset="unlabelled", **alike)
    assert other["metrics"] == {} and other["measured_on"] == "nothing"
    assert other["epochs"] == known["epochs"]
    elsewhere = dict(alike, dataset="unlabelled", evaluate_on="stripes")
    measured, _ = run(tmp_path / "elsewhere", **elsewhere)
    assert (measured["measured_on"], measured["n_test"]) == ("stripes: test split", 256)
    assert measured["metrics"]["knn_backbone"] > 60 and measured["epochs"] == known["epochs"]


def test_a_precision_that_is_only_imitated_is_refused(tmp_path, monkeypatch):
    "A study pins its precision: a run that is missing is not made with another one"
    for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: False, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="bf16', but this processor only imitates it"):
        run(tmp_path, precision="bf16")
    assert not list(tmp_path.iterdir())
    record, _ = run(tmp_path, precision="auto")
    assert record["parameters"]["precision"] == "fp32"
    assert not record["arithmetic"]["bf16"]


def test_a_study_is_one_block(tmp_path):
    block = dict(
        mine=dict(
            about="Two strengths",
            shared=dict(SMALL, mixing="pos"),
            settings=dict(weak=dict(strength=0.2, seeds=[0, 1]), full=dict(seeds=[0])),
        )
    )
    path = tmp_path / "studies.yaml"
    path.write_text(yaml.safe_dump(block, sort_keys=False))
    runs = read_studies(path)["mine"]
    assert list(runs) == ["weak-s0", "weak-s1", "full-s0"]
    record = pretrain(**runs["weak-s1"] | dict(out=str(tmp_path)))
    assert (record["parameters"]["strength"], record["parameters"]["seed"]) == (0.2, 1)
