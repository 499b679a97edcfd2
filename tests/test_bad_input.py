"""The recorder, the pictures, studies and reports: a right result or one sentence, whatever comes

What is refused says why in one sentence that names the thing. What is accepted is held to a value
that was computed another way.
"""

import gc
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from ftcl import report, scores, study, visualize
from ftcl.core import InputError
from ftcl.record import LATER_PARAMETERS
from ftcl.scores import QUANTILES, ScoreRecorder, read_scores, score_statistics
from ftcl.study import compare_runs, made_with, read_runs, read_studies
from ftcl.visualize import CURVES

ROOT = Path(__file__).parent.parent
MOMENTUM = ROOT / "results" / "cifar10-momentum"
matplotlib.use("Agg")


def sentence(error):
    "The text of an `InputError`, if it is one short sentence"
    text = str(error)
    assert 10 < len(text) < 900 and "\n" not in text and "Traceback" not in text, text
    return text


def refused(f, *args, **kwargs):
    "The sentence by which a call is refused"
    with pytest.raises(InputError) as caught:
        f(*args, **kwargs)
    return sentence(caught.value)


def outcome(f, *args, **kwargs):
    "What a call gives, or None if it is refused in a sentence; anything else is an error"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return f(*args, **kwargs)
    except InputError as e:
        sentence(e)
        assert not plt.get_fignums(), "a refused picture was left open"


def step(seed=0, b=6, k=40, d=8):
    "Scores and vectors of a step: pos (B,), neg (B, K), q (B, D), keys' own (B, D)"
    g = torch.Generator().manual_seed(seed)
    q, key, keys = (F.normalize(torch.randn(n, d, generator=g), dim=1) for n in (b, b, k))
    return (q * key).sum(1), q @ keys.T, q, key


def recorded(steps=50, **kwargs):
    "A record of some steps"
    recorder = ScoreRecorder(tau=0.2, **kwargs)
    for i in range(steps):
        pos, neg, q, key = step(i)
        drawn = dict(l_ex=1 + (i % 7) / 7, l_in=(i % 5) / 5)
        before = (pos / 2, neg / 2)
        recorder.record(i, pos, neg, before, features=(q, key), loss=1 / (i + 1), lr=0.1, **drawn)
    return recorder


FRAME = recorded().frame()


# ---- the recorder


def by_numpy(pos, neg):
    "The statistics of a step, masked negatives left out, in float64"
    pos = pos.double().numpy()
    rows = [row[row > -math.inf] for row in neg.double().numpy()]
    every = np.concatenate(rows)
    quantiles = [np.quantile(x, QUANTILES, method="inverted_cdf") for x in (pos, every)]
    spread = sum(row.var() * len(row) for row in rows if len(row)) / len(every)
    harder = sum((row > p).sum() for p, row in zip(pos, rows)) / len(every)
    return [pos.mean(), pos.var(), every.mean(), spread, *quantiles[0], *quantiles[1], harder]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_statistics_of_every_kind_of_score(kind, masked, turned):
    pos, neg, _, _ = step(b=9, k=70)
    if masked:
        neg = neg.masked_fill(torch.rand(neg.shape) < 0.4, -math.inf)
        neg[2] = -math.inf
    pos, neg = pos.to(getattr(torch, kind)), neg.to(getattr(torch, kind))
    if turned:
        neg = neg.T.contiguous().T  # (B, K) with columns in a row
    recorder = ScoreRecorder(tau=0.2)
    recorder.record(0, pos, neg, before=(pos * 1, neg * 1))
    row = recorder.frame().iloc[0]
    for column, want in zip(scores.SCORE_COLUMNS, by_numpy(pos, neg)):
        bin_width = 1 / 256 if column.startswith("neg_q") else 0
        assert abs(row[column] - want) < 1e-5 + bin_width / 2, column
        assert row[f"before_{column}"] == row[column]
    left = neg.double()[neg > -math.inf]
    assert abs(row["neg_exp"] / (left / 0.2).exp().mean() - 1) < 1e-5


def test_all_masked_is_nan_and_no_more():
    pos, neg, _, _ = step()
    row = score_statistics(pos, neg * 0 - math.inf)
    for column, value in row.items():
        assert value.isnan() == (not column.startswith("pos")), column


@pytest.mark.parametrize(
    "where, value, odd",
    [
        ("neg", math.nan, "neg_mean neg_var neg_q01 neg_q10 neg_q50 neg_q90 neg_q99 harder"),
        ("pos", math.nan, "pos_mean pos_var pos_q01 pos_q10 pos_q50 pos_q90 pos_q99 harder"),
        ("neg", math.inf, "neg_mean neg_var"),
        ("pos", math.inf, "pos_mean pos_var pos_q90 pos_q99"),
    ],
)
def test_a_score_that_is_no_number_is_told_by_its_columns(where, value, odd):
    pos, neg, _, _ = step()
    dict(pos=pos, neg=neg[0])[where][3] = value
    row = score_statistics(pos, neg)
    assert {c for c, v in row.items() if not v.isfinite()} == set(odd.split())


POS, NEG, Q, KEY = step()
UNFIT = [
    (dict(pos=POS[:5]), "neg has the shape (6, 40), but must be (B, K) with B = 5"),
    (dict(neg=NEG.int()), "neg holds torch.int32, but must hold floating-point numbers."),
    (dict(neg=NEG > 0), "neg holds torch.bool, but"),
    (dict(pos=POS.to(torch.complex64)), "pos holds torch.complex64, but"),
    (dict(neg=NEG.to_sparse()), "neg holds sparse or nested parts, but"),
    (dict(neg=NEG.to("meta")), "neg is on meta, but must be on cpu like the others."),
    (dict(features=(Q[:3], KEY[:3])), "features[0] has the shape (3, 8), but must be (B, D)"),
    (dict(features=(Q, KEY.long())), "features[1] holds torch.int64, but"),
    (dict(before=(POS[:3], NEG[:3])), "before[0] has the shape (3,), but must be (B,) with B = 6"),
    (dict(before=(POS, NEG.to("meta"))), "before[1] is on meta, but"),
    (dict(before=POS), "before must be a pair of tensors, or None."),
    (dict(soft_max=POS[1:]), "soft_max has the shape (5,), but must be (B,) with B = 6."),
    (dict(loss=torch.zeros((), device="meta")), "loss is on meta, where a tensor has no value."),
    (dict(loss="low"), "loss is 'low', but must be one number."),
    (
        dict(step=3),
        "step is 3 after step 3: record once a step, and count the steps through all epochs.",
    ),
    (dict(step=0), "step is 0 after step 3"),
    (dict(seed=1), "seed is the name of a column that joined records get"),
]


@pytest.mark.parametrize("odd, said", UNFIT, ids=[said[:30] for _, said in UNFIT])
def test_what_does_not_fit_leaves_nothing_behind(odd, said):
    recorder = ScoreRecorder()
    recorder.record(3, POS, NEG, loss=1.0)
    assert said in refused(recorder.record, **dict(step=4, pos=POS, neg=NEG, loss=1.0) | odd)
    assert len(recorder.rows) == 1
    recorder.record(4, POS, NEG, loss=1.0)
    assert list(recorder.frame()["step"]) == [3, 4]


@pytest.mark.parametrize(
    "limit", [0, -1, math.nan, math.inf, 1e31, 1e-31, "4", None, True, 10**400, [4.25]]
)
def test_a_limit_that_no_histogram_has(limit):
    assert "limit is" in refused(ScoreRecorder, limit=limit)
    assert "limit is" in refused(score_statistics, POS, NEG, limit)


def test_a_record_keeps_no_graph_alive():
    class Twice(torch.autograd.Function):
        "Keeps something of its own as long as the graph lives"

        @staticmethod
        def forward(ctx, x):
            ctx.kept = type("Kept", (), {})()
            kept.append(weakref.ref(ctx.kept))
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    kept = []
    hidden = Twice.apply(Q.clone().requires_grad_())
    pos, neg = (hidden * KEY).sum(1), hidden @ KEY.T
    recorder = ScoreRecorder(tau=0.2)
    loss = neg.mean()
    recorder.record(0, pos, neg, (pos, neg), features=(hidden, KEY), loss=loss, soft_max=pos)
    assert kept[0]() is not None
    del hidden, pos, neg, loss
    gc.collect()
    assert kept[0]() is None and not recorder.rows[0].requires_grad


def test_a_row_takes_little_room():
    "A million steps of all columns take about a gigabyte of memory, and 0.4 on the disk"
    rows = recorded(20).table()
    assert rows.nbytes / len(rows) * 1e6 < 4e8
    code = """
import torch
from ftcl.scores import ScoreRecorder
recorder = ScoreRecorder(tau=0.2)
pos, neg = torch.rand(4), torch.rand(4, 8)
def more(n):
    for i in range(n):
        recorder.record(recorder.last + 1, pos, neg, (pos, neg))
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = more(1000)
print((more(3000) - before) / 3000)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 0 < float(run.stdout) < 1500, run.stdout + run.stderr  # bytes a step


# ---- its file


def parquet(frame, **kwargs):
    "A Parquet file as bytes"
    file = io.BytesIO()
    frame.to_parquet(file, **kwargs)
    return file.getvalue()


PEOPLE = parquet(pd.DataFrame(dict(name=["a"], age=[3])))


@pytest.mark.parametrize("content", [b"{}", PEOPLE, PEOPLE[:-9], b"\0" * 99])
def test_a_foreign_file_stays(tmp_path, content):
    path = tmp_path / "taken.parquet"
    path.write_bytes(content)
    assert "is no record of scores, so it stays" in refused(recorded(2).save, path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["taken.parquet"]


@pytest.mark.parametrize(
    "path", ["a.json", "a", "", ".", "..", None, 3, "a\0.parquet", b"a.parquet"]
)
def test_a_place_that_is_none(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert "path is" in refused(recorded(2).save, path)
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").write_text("kept")
    for name in ("folder.parquet", "file/a.parquet", "missing/a.parquet", "x" * 300 + ".parquet"):
        assert "cannot be written" in refused(recorded(2).save, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.parquet"]
    assert "cannot be written" in refused(recorded(2).save, "/proc/a.parquet")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recorded(3).save("~/run.parquet")
    assert len(read_scores("~/run.parquet")) == 3 and os.listdir(tmp_path) == ["run.parquet"]


def two_levels(frame):
    return pd.concat({"a": frame}, axis=1)


FOREIGN = {
    "text": (FRAME.assign(loss="x"), "in the column 'loss', but must hold numbers."),
    "nested": (FRAME.assign(loss=[[1.0]] * 50), "in the column 'loss', but must hold numbers."),
    "all null": (FRAME.assign(loss=None), "in the column 'loss', but must hold numbers."),
    "dates": (FRAME.assign(loss=pd.Timestamp(0)), "in the column 'loss', but"),
    "step as index": (FRAME.set_index("step"), "lacks the column step."),
    "backwards": (FRAME[::-1], "has step 48 after step 49, but is to be one run in its order."),
    "twice": (pd.concat([FRAME, FRAME]), "has step 0 after step 49, but"),
    "negative": (FRAME.assign(step=FRAME.step - 9), "has the step -9, but steps are whole"),
    "half": (FRAME.assign(step=FRAME.step / 2), "has the step 0.5, but"),
    "no step": (FRAME.assign(step=FRAME.step.where(FRAME.step != 7)), "has the step nan, but"),
    "no row": (FRAME[:0], "has columns but no row: no step was recorded."),
    "people": (pd.DataFrame(dict(name=["a"], age=[3])), "is no record of scores: its columns are"),
    "missing": (FRAME.drop(columns="neg_var"), "lacks the column neg_var."),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_table_is_refused(tmp_path, name):
    frame, said = FOREIGN[name]
    (tmp_path / "a.parquet").write_bytes(parquet(frame))
    assert said in refused(read_scores, tmp_path / "a.parquet")


@pytest.mark.parametrize("change", ["float32", "nullable", "other index", "seed=3 in its path"])
def test_other_ways_to_store_the_same_numbers(tmp_path, change):
    frame = dict(
        float32=FRAME.astype("float32"),
        nullable=FRAME.convert_dtypes(),
    ).get(change, FRAME)
    if change == "other index":
        frame = FRAME.set_index(np.arange(50) + 7)
    folder = tmp_path / "seed=3"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet(frame))
    read = read_scores(folder / "a.parquet")
    assert list(read) == list(FRAME)
    np.testing.assert_allclose(read.to_numpy(float), FRAME.to_numpy(float), rtol=1e-6)
    band = visualize.join_scores({"a": read})
    np.testing.assert_allclose(band["loss"], visualize.join_scores({"a": FRAME})["loss"], rtol=1e-6)


def test_a_damaged_file_is_refused_or_right(tmp_path):
    "Bits flipped, bytes lost, the file cut: the numbers are never others"
    path = tmp_path / "a.parquet"
    recorded(20).save(path)
    right = read_scores(path)
    whole = path.read_bytes()
    draw = random.Random(0)
    refusals = 0
    for _ in range(200):
        data = bytearray(whole)
        kind = draw.choice(["flip", "lose", "cut"])
        at = draw.randrange(len(data))
        if kind == "flip":
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "lose":
            del data[at : at + draw.randrange(1, 40)]
        else:
            data = data[:at]
        path.write_bytes(bytes(data))
        read = outcome(read_scores, path)
        refusals += read is None
        if read is not None:
            same = [c for c in read if c in right]  # a flipped letter makes another name
            assert len(same) >= len(list(right)) - 1 and len(list(read)) == len(list(right))
            pd.testing.assert_frame_equal(read[same], right[same])
    assert 100 < refusals < 200


# ---- pictures

FRAMES = {
    "one row": FRAME[:1],
    "nan": FRAME.assign(pos_mean=np.nan, neg_q10=np.nan, l_ex=np.nan),
    "all nan": FRAME.assign(**{c: np.nan for c in FRAME if c != "step"}),
    "infinite": FRAME.assign(pos_mean=np.inf, neg_mean=-np.inf, l_ex=np.inf),
    "huge": FRAME.assign(pos_mean=1e300, neg_q01=-1e308, neg_q99=1e308, loss=FRAME.step * 1e306),
    "tiny": FRAME.assign(pos_mean=1e-310),
    "far": FRAME.assign(step=FRAME.step * 10**13),
    "long": pd.concat([FRAME] * 200).assign(step=range(10_000)),
    "other index": FRAME.set_index(np.zeros(50)),
    "two levels": two_levels(FRAME),
    "reserved": FRAME.assign(seed=7, run=3, window=2),
    "text": FRAME.assign(pos_mean="x"),
    "no row": FRAME[:0],
    "no frame": FRAME.to_numpy(),
    "backwards": FRAME[::-1],
}
LABELS = ["", None, 0.5, math.nan, ("a", 1), "_x", r"$\frac$", "a$b", "x" * 300, "a\nb\tc", "<b>"]


def drawn(picture, *args, **kwargs):
    "Draw it down to the last pixel, if it is not refused"
    fig = outcome(picture, *args, **kwargs)
    if fig is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fig.canvas.draw()
    plt.close("all")
    return fig


def many(runs):
    return [
        drawn(visualize.plot_scores, runs),
        drawn(visualize.plot_ridges, runs),
        drawn(visualize.plot_depth, runs, {"pos_mean": "mean"}),
        drawn(visualize.plot_landscape, runs, {"pos_mean": "mean"}, log=False),
    ]


@pytest.mark.parametrize("name", FRAMES)
def test_every_picture_of_an_odd_record(name):
    frame = FRAMES[name]
    drawn(visualize.run_page, frame, name)
    drawn(visualize.plot_lambda, frame)
    figs = many({"a": frame, "b": [FRAME, FRAME]})
    right = name not in ("two levels", "text", "no row", "no frame", "backwards")
    assert [fig is not None for fig in figs] == [right] * 4


def test_labels_are_shown_as_they_are():
    figs = many(dict.fromkeys(LABELS, FRAME))
    assert all(figs)
    texts = [[text.get_text().strip() for text in fig.legends[0].texts] for fig in figs[:1]]
    wanted = ["", "None", "0.5", "nan", "('a', 1)", "_x", r"\$\frac\$", "a$b"]
    assert texts[0][:8] == wanted and len(texts[0]) == len(LABELS)
    assert len(texts[0][8]) == 60 and texts[0][9] == "a\nb c"


def test_a_mean_is_that_of_the_numbers_whatever_the_index():
    joined = visualize.join_scores({"a": FRAME.set_index(np.zeros(50))}, bins=10)
    by_hand = FRAME["loss"].groupby(FRAME["step"] // 5).mean()
    np.testing.assert_allclose(joined["loss"], by_hand)
    gap = FRAME.assign(loss=FRAME["loss"].where(FRAME["step"] != 12))
    lost = visualize.join_scores({"a": gap}, bins=10)["loss"].isna()
    assert list(lost) == [False, False, True] + [False] * 7


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"pos_meen": "x"}, "lacks the column pos_meen. Did you mean 'pos_mean'?"),
        ({"neg_vqr": "x"}, "lacks the column neg_vqr. Did you mean 'neg_var'?"),
        (["pos_mean"], "there is no column to draw: give a dict of column -> label"),
        ({"step": "x"}, "step is no statistic"),
        ({3: "x"}, "but must be a list of names."),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(columns, said):
    for picture in (visualize.plot_scores, visualize.plot_depth, visualize.plot_landscape):
        assert said in refused(picture, {"a": FRAME}, columns)
    assert not plt.get_fignums()


def test_pictures_of_one_step_and_of_l():
    pair = (POS, NEG)
    for wrong in (None, POS, (POS,), (POS, NEG.int()), (NEG, POS), (POS, NEG * math.nan)):
        refused(visualize.plot_histogram, wrong, pair)
        refused(visualize.plot_histogram, pair, wrong)
    refused(visualize.plot_histogram, pair, (POS.to("meta"), NEG.to("meta")))
    for scale in (1e38, 1e-38, 0.0):
        assert drawn(visualize.plot_histogram, pair, (POS * scale, NEG * scale))
    heights, edges, _ = drawn(visualize.plot_histogram, pair, pair).axes[1].patches[0].get_data()
    np.testing.assert_allclose((heights * np.diff(edges)).sum(), 1)
    for alphas, l, low in (
        ("2", FRAME.l_ex, 1),
        ([2], FRAME.l_ex, 0),
        ([-1], FRAME.l_ex, 1),
        ([1e300], FRAME.l_ex, 1),
        ([2], ["x"], 1),
        ([2], [[1.5]], 1),
        ([2], [], 1),
        ([2], [math.inf], 1),
        ([2], FRAME.l_ex, "1"),
    ):
        refused(visualize.plot_beta, alphas, l, low, "l")
    outlier = FRAME.assign(l_ex=[1.5] * 48 + [1.5 + 1e-9, 1.9])
    assert drawn(visualize.plot_lambda, outlier)  # and not a million bins


def test_live_curves_outside_a_notebook_and_without_a_display():
    code = """
import warnings; warnings.simplefilter("error")
import matplotlib, torch
from ftcl.scores import ScoreRecorder
from ftcl.visualize import LiveScores, plot_scores
recorder = ScoreRecorder()
live = LiveScores(recorder)
for i in range(3):
    recorder.record(i, torch.rand(4), torch.rand(4, 9))
    assert live.update() == 0.0
fig = plot_scores({"a": recorder.frame()})
fig.canvas.draw()
print(len(fig.axes))
"""
    own = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert run.stdout == "3\n", run.stdout + run.stderr


# ---- studies


def copied(folder, *names):
    "Some runs of the momentum study"
    for name in names:
        for ending in ("json", "parquet"):
            shutil.copy(MOMENTUM / f"{name}.{ending}", folder)


def changed(path, to, parameters=(), without=(), **entries):
    "Another record, made of one that lies there, with its scores"
    record = json.loads(path.read_text())
    p = record["parameters"] | dict(parameters)
    kept = {name: value for name, value in p.items() if name not in without}
    to.write_text(json.dumps(record | dict(parameters=kept) | entries))
    shutil.copy(path.with_suffix(".parquet"), to.with_suffix(".parquet"))
    return to


FIRST, SECOND = "none-momentum0.9-s0", "none-momentum0.9-s1"


@pytest.fixture
def folder(tmp_path):
    "Two runs of one setting"
    copied(tmp_path, FIRST, SECOND)
    return tmp_path


def add_rubbish(folder):
    "What else may lie in a folder of runs; how many files it is"
    changed(folder / f"{FIRST}.json", folder / "an evaluation.json", pretrained={"lr": 0.1})
    record = json.loads((folder / f"{FIRST}.json").read_text())
    (folder / "no scores.json").write_text(json.dumps(record))
    half = (folder / f"{FIRST}.json").read_bytes()
    (folder / "half.json").write_bytes(half[: len(half) // 2])
    (folder / "array.json").write_text("[1, 2]")
    (folder / "foreign.json").write_text('{"name": "x", "version": "1.0"}')
    (folder / "number.json").write_text("3")
    (folder / "empty.json").write_text("")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin.json").write_bytes(b'{"\xe9": 1}')
    (folder / "nan.json").write_text(json.dumps(record | dict(metrics=dict(a=math.nan))))
    (folder / "schema.json").write_text(json.dumps(record | dict(schema=2)))
    (folder / "folder.json").mkdir()
    (folder / "link.json").symlink_to("nowhere")
    with (folder / "huge.json").open("wb") as file:
        file.truncate(2**27)
    changed(folder / f"{FIRST}.json", folder / "cut.json")
    whole = (folder / "cut.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[:-99])
    changed(folder / f"{FIRST}.json", folder / "other steps.json", steps=600)
    changed(folder / f"{FIRST}.json", folder / "seed.json", metrics=dict(seed=3.0))
    return len(list(folder.glob("*.json"))) - 2


def test_what_is_no_run_is_left_out_in_one_line(folder, capsys):
    alone = read_runs(folder)
    assert capsys.readouterr().out == ""
    count = add_rubbish(folder)
    among = read_runs(folder)
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1 and len(out) < 500
    told = f"{count} of {count + 2} files left out: 'an evaluation.json', 'array.json', 'cut.json' "
    assert out.startswith(f"{told}and {count - 3} more (the first: ")
    pd.testing.assert_frame_equal(among[1], alone[1])
    (one,), (other,) = alone[0].values(), among[0].values()
    assert len(one) == len(other) == 2
    for i in range(2):
        pd.testing.assert_frame_equal(one[i], other[i])


def test_nothing_left_is_one_sentence_and_a_whole_name_is_no_pattern(folder):
    add_rubbish(folder)
    for name in (FIRST, SECOND):
        (folder / f"{name}.json").unlink()
    assert "is that of a run with its scores: " in refused(read_runs, folder)
    assert "is a record, but not that of a pretraining." in refused(
        read_runs, folder, ["an evaluation"]
    )
    assert "there is no record x*.json in" in refused(read_runs, folder, "x*")
    for names in ([], [""], "../*", "/etc/*", 3, None, [3, "a"]):
        assert "names" in refused(read_runs, folder, names)
    for path in (None, 3, "", "a\0", folder / "missing", folder / "half.json"):
        refused(read_runs, path)


LACKING = [*LATER_PARAMETERS, "readouts", "tau_pos"]


def test_records_are_compared_by_what_their_parameters_mean(folder):
    "An early record lacks parameters, a newer one has them: the same run if they mean the same"
    first = folder / f"{FIRST}.json"
    early = changed(first, folder / "early.json", without=LACKING, parameters=dict(seed=2))
    assert not set(LACKING) & set(json.loads(early.read_text())["parameters"])
    same = LATER_PARAMETERS | dict(seed=3, view_strength=1, augmentation="B", workers=2, out="x")
    changed(first, folder / "newer.json", same)
    runs, metrics = read_runs(folder)
    assert list(runs) == [folder.name] and sorted(metrics["seed"]) == [0, 1, 2, 3]
    differs = dict(
        decode="as_needed",
        view_strength=0.5,
        view_size=16,
        split="extra",
        later="x",
        evaluate_on="b",
        label_column="c",
        weights="w",
        precision="fp32",
    )
    for name, value in differs.items():
        other = changed(first, folder / "other.json", {name: value})
        labels = set(read_runs(folder)[0])
        assert len(labels) == 2 and f"{name}={value}" in labels, labels
        said = refused(read_runs, folder, label="all of them")
        assert f"two runs named 'all of them' differ in {name}, " in said
        other.unlink()


def test_two_runs_of_one_setting_and_seed(folder):
    changed(folder / f"{FIRST}.json", folder / "again.json")
    assert "have the seed 0: leave one out." in refused(read_runs, folder)
    _, metrics = read_runs(folder, [FIRST, SECOND], "a")
    twice = pd.concat([metrics, metrics])
    for f in (made_with, lambda m: compare_runs(m, "a")):
        assert "two runs named 'a' have the seed 0" in refused(f, twice)


@pytest.fixture
def pair(tmp_path):
    "Two settings of two seeds, as files: label -> record"
    names = [f"{m}-momentum0.99-s{seed}" for m in ("none", "pos") for seed in (0, 1)]
    copied(tmp_path, *names)
    return tmp_path, tmp_path / "pos-momentum0.99-s1.json"


def test_runs_that_were_measured_on_other_images(pair):
    folder, last = pair
    changed(last, last.with_name("new.json"), measured_on="test split")
    last.unlink()
    _, metrics = read_runs(folder, label="{mixing}")
    said = refused(compare_runs, metrics, "none")
    assert "runs of 'pos' and 'none' were measured on " in said
    assert "test split" in said and "held-out training images" in said
    assert "measured on test split and held-out training images" in made_with(metrics)
    assert "runs of 'pos' were measured on" in refused(compare_runs, metrics, "pos")


def test_mixed_precisions_are_named(pair, capsys):
    folder, last = pair
    for seed in (0, 1):
        path = folder / f"pos-momentum0.99-s{seed}.json"
        changed(path, folder / f"new{seed}.json", dict(precision="fp32"))
        path.unlink()
    runs, metrics = read_runs(folder, label="{mixing}")
    assert "; fp32 and bf16, " in made_with(metrics)
    table = compare_runs(metrics, "none")
    told = "runs of 'pos' and 'none' have the precisions fp32 and bf16\n"
    assert capsys.readouterr().out == told
    by_hand = metrics.loc["pos", "knn_backbone"].mean() - metrics.loc["none", "knn_backbone"].mean()
    assert abs(table.loc["pos", "difference"] - by_hand) < 1e-9


def test_a_metric_that_a_run_lacks(pair):
    folder, last = pair
    record = json.loads(last.read_text())
    del record["metrics"]["knn_projection"]
    last.write_text(json.dumps(record))
    _, metrics = read_runs(folder, label="{mixing}")
    assert len(compare_runs(metrics, "none")) == 2
    said = refused(compare_runs, metrics, "none", "knn_projection")
    assert said.startswith("knn_projection of 'pos', seed 1, is nan, but must be a finite number")
    assert "Did you mean 'knn_backbone'?" in refused(compare_runs, metrics, "none", "knn_bakbone")


def test_a_mutated_record_is_read_or_refused(tmp_path):
    copied(tmp_path, FIRST)
    path = tmp_path / f"{FIRST}.json"
    whole = path.read_bytes()
    draw = random.Random(1)
    refusals = 0
    for _ in range(150):
        data = bytearray(whole)
        at = draw.randrange(len(data))
        if draw.random() < 0.5:
            data[at] = draw.randrange(256)
        else:
            del data[at : at + draw.randrange(1, 60)]
        path.write_bytes(bytes(data))
        found = outcome(read_runs, tmp_path)
        refusals += found is None
        if found is not None:
            read = json.loads(data)
            assert found[1]["knn_backbone"].iloc[0] == read["metrics"].get("knn_backbone", None)
            assert len(list(found[0].values())[0][0]) == len(range(read["steps"]))
    assert 20 < refusals < 150


# ---- studies.yaml

STUDY = "a: {{shared: {{lr: {lr}}}, settings: {{none: {{seeds: {seeds}}}}}}}"
YAML = [
    ("", "holds no study"),
    ("- a\n- b", "holds no study"),
    ("3", "holds no study"),
    ("{}", "holds no study"),
    ("a: [", "cannot be read"),
    ("a:\n\tb: 1", "cannot be read"),
    ("a: {x: 1, x: 2}", "'x' stands twice in one block"),
    ("a: {b: {x: 1, 'x': 2}}", "'x' stands twice in one block"),
    ("a: {no: 1}", "'no' is a name, but no text to YAML: quote it"),
    ("? [a, b]\n: 1", "is a name, but no text to YAML: quote it"),
    ("a: 1\n---\nb: 2", "cannot be read"),
    ("a: !!python/object/apply:os.getcwd []", "cannot be read"),
    ("a: &a [*a]", "study a must have a block 'shared'"),
    ("a: " + "[" * 50_000, "cannot be read"),
    ("a: \x07", "cannot be read"),
    ("#" * 10_000_000, "it has 10,000,000 bytes, but may have 1 MB"),
    ("a: null", "study a must have a block 'shared'"),
    ("a/b: {}", "the name of a study is 'a/b', but must be a file name"),
    (STUDY.format(lr="1e-3", seeds="[0]"), "lr is '1e-3', but must be a number, as 0.001"),
    (STUDY.format(lr=".nan", seeds="[0]"), "lr is nan, but must be"),
    (STUDY.format(lr="yes", seeds="[0]"), "lr is True, but must be a number"),
    (STUDY.format(lr="[0.1]", seeds="[0]"), "lr is a list, but must be one value."),
    (STUDY.format(lr="2020-01-01", seeds="[0]"), "lr is datetime.date(2020, 1, 1), but must be"),
    (STUDY.format(lr=0.1, seeds="0"), "seeds must be a list, as [0, 1, 2], each once."),
    (STUDY.format(lr=0.1, seeds="[0, 0]"), "seeds must be a list"),
    (STUDY.format(lr=0.1, seeds="[0, 1.0]"), "seeds must be a list"),
    (STUDY.format(lr=0.1, seeds="[-1]"), "seed is -1, but must be from 0"),
    (STUDY.format(lr=0.1, seeds="[0]").replace("none", "x/y"), "a setting of study a is 'x/y'"),
    (STUDY.format(lr=0.1, seeds="[0]").replace("lr", "lrr"), "'lrr'. Did you mean 'lr'?"),
    (
        STUDY.format(lr=0.1, seeds="[0]").replace("lr", "seed"),
        "seed follows from setting and seeds",
    ),
]
LAUGHS = "x0: &x0 [a]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize("text, said", [*YAML, (LAUGHS, "study x0 must have a block 'shared'")])
def test_a_list_of_studies_that_is_none(tmp_path, text, said):
    path = tmp_path / "studies.yaml"
    path.write_text(text)
    assert said in refused(read_studies, path)


def test_what_a_list_of_studies_may_have(tmp_path):
    path = tmp_path / "studies.yaml"
    path.write_text(
        "größe: &a\n  shared: &s {lr: 0.1, symmetric: yes}\n  settings:\n"
        "    'no': {<<: *s, tau: 0.2, seeds: [0, 2]}\nb: *a\n",
        encoding="utf-8",
    )
    studies = read_studies(path)
    assert list(studies) == ["größe", "b"] and list(studies["b"]) == ["no-s0", "no-s2"]
    out = dict(out="results/größe", name="no-s2", seed=2)
    assert studies["größe"]["no-s2"] == dict(lr=0.1, symmetric=True, tau=0.2) | out
    for wrong in (None, tmp_path, tmp_path / "none.yaml", "a\0"):
        refused(read_studies, wrong)
    path.write_bytes(b"a: \xff")
    assert "cannot be read" in refused(read_studies, path)


# ---- reports


@pytest.mark.parametrize("content", [b"<html>mine</html>", b"\xff\xfe\0", b"{}"])
def test_a_page_replaces_no_file_of_others(tmp_path, content):
    path = tmp_path / "page.html"
    path.write_bytes(content)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "record.json").write_bytes(content)
    for name in ("page.html", "folder.html"):
        assert "is no page of ftcl, so it stays" in refused(
            report.html_report, {"a": FRAME}, tmp_path / name
        )
    for name in ("record.json", "page", "page.htm"):
        assert "must end in .html" in refused(report.html_report, {"a": FRAME}, tmp_path / name)
    for name in ("page.html/x.html", "x" * 300 + ".html"):
        assert "cannot be written" in refused(report.html_report, {"a": FRAME}, tmp_path / name)
    refused(report.html_report, {"a": FRAME[:0]}, tmp_path / "new" / "page.html")
    assert path.read_bytes() == (tmp_path / "record.json").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["folder.html", "page.html", "record.json"]


def test_a_page_of_ours_may_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    small = FRAME[["step", "loss"]]
    for title in ("one", "two"):
        report.html_report({"a": small}, "~/new/page.html", title)
        page = (tmp_path / "new" / "page.html").read_text()
        assert f"<h1>{title}</h1>" in page


# ---- anything at all

ODD = [
    None, 1, 1.5, -1, 0, True, "x", "", b"x", [], (), {}, [1, 2], math.nan, math.inf, 10**400,
    object(), float, len, np.zeros(3), np.zeros((2, 2)), FRAME, [FRAME], {"a": 1}, {"a": FRAME},
    pd.Series([1.0, 2.0]), pd.DataFrame(), torch.rand(4), torch.rand(2, 3), (POS, NEG), [None],
    [math.nan], [[1], [2, 3]], "\0", "~", "a\ud800", "a/b", "../x", "*", "{", "{tau:q}", "{0}",
    "x" * 300, "日本", "a\nb", set(), 1j, pd.NA, {1: 2}, dict(mixing="pos", alpha="x"),
    FRAME.set_index("step"), lambda: 0, np.float64(2), Path("x"),
]  # fmt: skip
METRICS = pd.DataFrame(
    dict(seed=[0, 1] * 2, knn_backbone=[1.0, 2, 3, 5]), ["none", "none", "pos", "pos"]
)
CALLS = {
    "statistics": (score_statistics, [POS, NEG, 4.25]),
    "softmax": (scores.softmax_statistics, [POS, NEG, 0.2, 0.1, POS]),
    "features": (scores.feature_statistics, [Q, KEY]),
    "recorder": (lambda *a: ScoreRecorder(*a[:1], tau=a[1], tau_pos=a[2]), [4.25, 0.2, 0.1]),
    "record": (
        lambda *a: ScoreRecorder().record(*a[:5], a[5], loss=a[6]),
        [0, POS, NEG, (POS, NEG), POS, (Q, KEY), 1.0],
    ),
    "restore": (ScoreRecorder().restore, [["step"], torch.zeros(1, 1).double()]),
    "save": (recorded(2).save, ["fuzz.parquet"]),
    "read_scores": (read_scores, ["fuzz.parquet", ["step"]]),
    "require_columns": (scores.require_columns, [FRAME, ["step"], "it"]),
    "checked_runs": (visualize.checked_runs, [{"a": FRAME}, ["loss"]]),
    "join_scores": (visualize.join_scores, [{"a": FRAME}, 5, ["loss"]]),
    "seed_band": (visualize.seed_band, [visualize.join_scores({"a": FRAME}), "loss"]),
    "plot_scores": (visualize.plot_scores, [{"a": FRAME}, CURVES]),
    "plot_ridges": (visualize.plot_ridges, [{"a": FRAME}]),
    "plot_depth": (visualize.plot_depth, [{"a": FRAME}, CURVES, "m"]),
    "plot_landscape": (visualize.plot_landscape, [{"a": FRAME}, CURVES, "m"]),
    "plot_beta": (visualize.plot_beta, [[2], FRAME.l_ex, 1, "l"]),
    "plot_lambda": (visualize.plot_lambda, [[FRAME]]),
    "plot_histogram": (visualize.plot_histogram, [(POS, NEG), (POS, NEG)]),
    "quantile_density": (visualize.quantile_density, [FRAME.iloc[0], "pos"]),
    "run_page": (visualize.run_page, [FRAME, "title"]),
    "live": (visualize.LiveScores, [ScoreRecorder(), "label", CURVES, 0.1]),
    "paired": (study.paired, [[1.0, 2.0], [2.0, 3.0], 0.9]),
    "as_text": (study._as_text, [1.0]),
    "arms": (study.arms, [dict(mixing="pos")]),
    "check_study": (study._check_study, ["a", dict(shared=dict(lr=0.1))]),
    "study_runs": (study.study_runs, ["a", {}]),
    "label_of": (lambda pattern: study._label_of(pattern, dict(tau=0.1)), ["{tau}"]),
    "read_runs": (read_runs, [MOMENTUM, FIRST, "{mixing}"]),
    "compare_runs": (compare_runs, [METRICS, "none", "knn_backbone"]),
    "made_with": (made_with, [METRICS]),
    "plot_settings": (
        study.plot_settings,
        [METRICS, compare_runs(METRICS, "none"), "knn_backbone", "label", ["x"]],
    ),
    "plain_text": (report._plain_text, ["x"]),
    "panel_title": (report.panel_title, ["x"]),
    "shared_columns": (report._shared_columns, [{"a": FRAME}]),
    "score_figure": (report.score_figure, [{"a": FRAME[["step", "loss"]]}, "loss"]),
    "page_path": (report.page_path, ["x.html"]),
    "html_report": (
        report.html_report,
        [{"a": FRAME[["step", "loss"]]}, "x.html", "title", METRICS, "loss"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_argument_is_taken_or_refused_in_a_sentence(name, tmp_path, monkeypatch):
    "Each argument in turn is replaced by every odd value"
    monkeypatch.chdir(tmp_path)
    f, right = CALLS[name]
    recorded(2).save("fuzz.parquet")
    for place in range(len(right)):
        for value in ODD:
            args = [*right[:place], value, *right[place + 1 :]]
            outcome(f, *args)
            plt.close("all")


@pytest.mark.parametrize("text", ["a: !!timestamp x", "a: !!int x", "a: !!float ''"])
def test_what_yaml_cannot_build_is_one_sentence(tmp_path, text):
    path = tmp_path / "studies.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="studies.yaml cannot be read: "):
        read_studies(path)
