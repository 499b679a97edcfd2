"The verdict: one word for what a record says, whoever recorded it, and a warning once"

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ftcl.core import InputError
from ftcl.loss import scores
from ftcl.scores import PATIENCE, WINDOW, ScoreRecorder, read_scores
from ftcl.study import read_run
from ftcl.train import pretrain
from ftcl.transform import TRANSFORMS, FeatureTransform
from ftcl.verdict import COMMON, JUMP, LEAST, LEFT, PLATEAU, jumps, variance_ratio, verdict
from ftcl.verdict import verdict_line
from ftcl.visualize import plot_scores, run_page

ROOT = Path(__file__).parent.parent
RUN = ROOT / "results" / "cifar10-momentum"
GOOD = read_scores(RUN / "none-momentum0.99-s0.parquet")


def table(rows=60, **columns):
    "A record of equal steps"
    base = dict(step=range(rows), pos_mean=0.6, neg_mean=0.1, neg_var=0.04, loss=3.0)
    return pd.DataFrame(base | columns)


def test_every_threshold_is_where_the_page_says():
    for word, column, threshold, tau in (
        ("one direction", "neg_mean", COMMON, 0.2),
        ("plateau", "loss", math.log(1025) - PLATEAU, 0.2),
        ("saturated", "pos_mean", 1 - 0.05 * LEFT, 0.05),
        ("saturated", "pos_mean", 1 - 0.1 * LEFT, 0.1),
        ("saturated", "pos_mean", 1 - 0.1 * LEFT, 0.5),  # SimCLR's
    ):
        high = threshold + 1e-6
        assert verdict(table(**{column: threshold - 1e-6}), 1024, tau).word == "healthy"
        said = verdict(table(**{column: high}), 1024, tau)
        assert said.word == word and said.bad and said.column == column
        assert said.value == pytest.approx(high) and said.step == 59
        assert said.sentence.startswith(f"{word} at step 59: ") and said.sentence.endswith(".")
    flips = np.where(np.arange(60) % 2, 1, -1)
    size = jumps(flips.astype(float), np.full(60, 0.04)) * 0.2  # of a flip of height 1
    for scale, word in ((0.99, "healthy"), (1.01, "falling apart")):
        height = JUMP * scale * 0.2 / size
        assert verdict(table(neg_mean=height * flips), 1024, 0.2).word == word


def test_the_untransformed_scores_decide():
    frame = table(before_pos_mean=0.6, before_neg_mean=0.1, before_neg_var=0.04)
    frame = frame.assign(pos_mean=-0.5, neg_mean=0.9, loss=20.0)
    assert verdict(frame, 1024, 0.2).word == "healthy"
    assert "not looked for: plateau" in verdict(frame, 1024, 0.2).sentence  # no weight, no loss
    weight = verdict(frame.assign(before_pos_weight=1.5 / 1025), 1024, 0.2)
    assert (weight.word, weight.column) == ("plateau", "before_pos_weight")
    assert verdict(frame.assign(before_pos_weight=0.1), 1024, 0.2).word == "healthy"
    np.testing.assert_allclose(variance_ratio(frame), 0.5 / 0.4)


def test_what_is_unknown_is_said_and_what_was_recorded_is_used():
    assert "not looked for: plateau, saturated." in verdict(table()).sentence
    known = table(loss=6.5)
    known.attrs.update(negatives=1024, tau=0.2)
    assert verdict(known).word == "plateau"
    assert verdict(known, negatives=10**6).word == "healthy"  # what is given comes first
    few = table(4, step=[0, 20, 40, 59])
    assert "not looked for: falling apart" in verdict(few, 1024, 0.2).sentence
    first = table().assign(neg_mean=np.where(np.arange(60) < 60 - WINDOW, 0.9, 0.1))
    assert verdict(first).word == "healthy"  # only the last steps count
    alike = table(neg_mean=0.999, pos_mean=0.999, neg_var=0.0)
    assert verdict(alike, 1024, 0.2).word == "one direction"
    assert verdict(GOOD.convert_dtypes(), 4096, 0.07) == verdict(GOOD, 4096, 0.07)


def test_a_sentence_says_in_words_what_a_column_holds():
    plain = dict(before_pos_mean=0.6, before_neg_mean=0.1, before_neg_var=0.04)
    flips = np.where(np.arange(60) % 2, 0.9, -0.9)
    when = "before the transformation (column before_"
    for changes, told in (
        ({}, f"two views of one image score 0.6 on average, different images 0.1 {when}neg_mean)"),
        (dict(neg_mean=0.9), f"different images score 0.9 on average {when}neg_mean), two views"),
        (dict(pos_weight=1.5 / 1025), f"the loss is 6.53 nats {when}pos_weight), and a guess"),
        (dict(pos_mean=0.99), f"two views of one image score 0.99 on average {when}pos_mean), so"),
        (dict(neg_mean=flips), f"the mean score of different images {when}neg_mean) jumps by"),
        (dict(neg_mean=math.nan), f"the mean score of different images {when}neg_mean) is nan at"),
    ):
        columns = plain | {f"before_{name}": value for name, value in changes.items()}
        assert told in verdict(table(pos_mean=-0.5, **columns), 1024, 0.2).sentence
    same = verdict(table(), 1024, 0.2).sentence
    assert "before the transformation" not in same and "(column neg_mean)" in same


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_named_with_its_step(value):
    lost = table()
    lost.loc[55:, "neg_mean"] = value
    said = verdict(lost, 1024, 0.2)
    assert (said.word, said.column, said.step) == ("diverged", "neg_mean", 55)


@pytest.mark.parametrize(
    ("frame", "more", "message"),
    [
        (None, {}, "the record is a NoneType"),
        (table().drop(columns="neg_mean"), {}, "the record lacks the column neg_mean."),
        (table()[:0], {}, "the record has columns but no row"),
        (table()[::-1], {}, "the record has step 58 after step 59"),
        (table(), dict(negatives=0), "negatives is 0, but must be"),
        (table(), dict(negatives="many"), "negatives is 'many', but must be"),
        (table(), dict(tau=-1), "tau is -1, but must be"),
        (table(), dict(tau=math.nan), "tau is nan, but must be"),
    ],
)
def test_bad_input_is_told_in_one_sentence(frame, more, message):
    with pytest.raises(InputError) as told:
        verdict(frame, **more)
    assert message in str(told.value) and str(told.value).count(".\n") == 0
    if not more:
        assert verdict_line(frame).startswith("no verdict: the record")


@pytest.mark.parametrize("every", [1, 2, 5, 12])
def test_fewer_steps_than_half_the_window_are_too_early(every):
    for steps in (1, 2 * every, 13, LEAST - every, LEAST, LEAST + 1, 3 * LEAST):
        frame = table(len(range(0, steps, every)), step=range(0, steps, every), neg_mean=0.9)
        said = verdict(frame, 1024, 0.2)
        rows = len(frame)
        seen = rows * every if rows > 1 else 1
        assert said.word == ("one direction" if seen >= LEAST else "too early")
        if said.word == "too early":
            told = f"a verdict needs the scores of {LEAST} steps, and has those of {seen}."
            assert said.sentence.endswith(told) and not said.bad
            assert (said.column, said.value) == ("step", seen)
    late = table(LEAST, step=range(1000, 1000 + LEAST))
    assert verdict(late).word == "healthy" and verdict(late[1:]).word == "too early"
    lost = table(1, loss=math.nan)
    assert verdict(lost).word == "diverged" and verdict(lost).bad  # whenever it comes


def test_scores_divided_by_the_temperature_are_no_cosines():
    for rows in (1, 60):
        for columns, column in (
            (dict(pos_mean=0.6 / 0.07), "pos_mean"),
            (dict(pos_mean=0.6, pos_q99=0.8 / 0.07), "pos_q99"),
            (dict(before_pos_mean=3.0, before_neg_mean=0.1), "before_pos_mean"),
            (dict(before_pos_mean=0.6, before_neg_mean=1.2), "before_neg_mean"),
        ):
            said = verdict(table(rows, **columns), 1024, 0.07)
            assert (said.word, said.column, said.bad) == ("no cosines", column, True)
            assert said.sentence.startswith(f"no cosines at step {rows - 1}: ")
            assert said.sentence.endswith("above 1: pass cosines, without dividing by tau.")
    above = dict(pos_mean=3.0, neg_mean=2.0, neg_q99=4.0)  # by a transformation
    assert verdict(table(before_pos_mean=0.6, before_neg_mean=0.1, **above)).word == "healthy"
    rounded = table(pos_mean=0.6, pos_q99=1.01)
    assert verdict(rounded, 1024, 0.2).word == "healthy"


def told_by(recorder, *given):
    "The warnings of a step"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder.record(recorder.last + 1, *given)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_a_recorder_warns_once_of_logits():
    pos, neg = torch.linspace(-1, 0.9, 8), torch.linspace(-1, 1, 40).view(8, 5)
    recorder = ScoreRecorder(tau=0.1)
    (said,) = told_by(recorder, pos / 0.1, neg / 0.1)
    assert said == "positive scores reach 9, above 1: pass cosines, without dividing by tau."
    for _ in range(60):
        assert not told_by(recorder, pos / 0.1, neg / 0.1)
    assert recorder.verdict().word == "no cosines"
    (said,) = told_by(ScoreRecorder(), pos, neg, (pos * 2, neg))
    assert said.startswith("positive scores before the transformation reach 1.8, above 1")
    (said,) = told_by(ScoreRecorder(), pos, neg, (pos, neg * 2))
    assert said.startswith("negative scores before the transformation reach 2, above 1")
    masked = neg.masked_fill(neg < 0, -math.inf)
    for fine in ((pos, 4 * neg), (pos, masked, (pos, masked)), (pos.bfloat16(), neg.bfloat16())):
        assert not told_by(ScoreRecorder(), *fine)
    assert not told_by(ScoreRecorder(), *(x.to("meta") for x in (pos / 0.1, neg)))
    assert not told_by(ScoreRecorder(limit=50), pos / 0.1, neg / 0.1)  # somebody knows of them


@pytest.mark.parametrize("level", ["feature", "sample", "dimension"])
@pytest.mark.parametrize("name", [n for n, mix in TRANSFORMS.items() if mix.acts_on == "pair"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_no_transformation_lifts_a_positive_above_one(name, level, renormalize):
    if level not in TRANSFORMS[name].levels:
        pytest.skip("this level has no meaning there")
    generator = torch.Generator().manual_seed(0)
    q = F.normalize(torch.randn(512, 4, generator=generator), dim=1)
    for k in (q.flip(0), -q, q + 0, F.normalize(q + 0.1 * q.flip(0), dim=1)):
        how = dict(level=level, renormalize=renormalize, generator=generator)
        pos, _ = scores(*FeatureTransform(name, **how)(q, k, torch.eye(4)))
        assert pos.max() < 1 + 1e-6


def stuck(recorder, steps):
    "Steps of vectors that share one direction"
    g = torch.Generator().manual_seed(0)
    for step in range(recorder.last + 1, steps):
        vectors = F.normalize(1 + 0.3 * torch.randn(48, 16, generator=g), dim=1)
        recorder.record(step, *scores(vectors[:8], vectors[8:16], vectors[16:]))
    return recorder


def test_the_recorder_warns_once_and_not_too_early():
    recorder = stuck(ScoreRecorder(tau=0.2), PATIENCE - 1)
    assert recorder.warn_once() == "" and recorder.warn_once(after=50)
    recorder = stuck(ScoreRecorder(tau=0.2), PATIENCE)
    assert recorder.warn_once().startswith(f"one direction at step {PATIENCE - 1}")
    assert recorder.warn_once() == ""
    healthy = ScoreRecorder()
    healthy.restore(list(GOOD), torch.tensor(GOOD.to_numpy(float)))
    assert healthy.warn_once() == "" and not healthy.warned
    with pytest.raises(InputError, match="nothing has been recorded, so there is nothing to say"):
        ScoreRecorder().verdict()


class Copies(TorchDispatchMode):
    "Counts how many rows are joined"

    rows = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.stack:
            self.rows += (len(args[0]),)
        return func(*args, **(kwargs or {}))


def test_a_look_reads_the_last_rows_alone_and_none_before_its_time():
    recorder = stuck(ScoreRecorder(tau=0.2), 400)
    with Copies() as read:
        recorder.warn_once(after=401)
        assert read.rows == ()
        recorder.warn_once()
    assert read.rows == (WINDOW,)
    assert recorder.verdict() == verdict(recorder.frame())


def test_k_and_tau_go_into_the_file_and_the_table_is_as_before(tmp_path):
    recorder = stuck(ScoreRecorder(tau=0.1), 3)
    recorder.save(tmp_path / "run.parquet")
    read = read_scores(tmp_path / "run.parquet")
    assert read.attrs == dict(tau=0.1, negatives=32)
    plain = stuck(ScoreRecorder(tau=0.1), 3)
    pd.testing.assert_frame_equal(read, plain.frame(), check_exact=True)
    again = ScoreRecorder(tau=0.2)
    again.restore(recorder.columns, recorder.table())
    assert again.frame().attrs == dict(tau=0.2)  # until a step says how many negatives there are
    assert stuck(again, 4).frame().attrs == dict(tau=0.2, negatives=32)


def test_a_pair_that_is_not_near_is_never_saturated():
    "At SimCLR's temperature two bits are left to a pair at 0.3"
    recorder = ScoreRecorder(tau=0.5)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        pos = 0.5 + 0.02 * torch.rand(8, generator=generator)
        recorder.record(step, pos, 0.2 * torch.randn(8, 40, generator=generator))
    assert recorder.verdict().word == "healthy"


@pytest.mark.parametrize("noise, word", [(None, "plateau"), (2.0, "healthy")])
def test_noise_is_not_healthy_where_neither_k_nor_tau_is_known(noise, word):
    "Noise of each number of a view, as long as the whole image's vector times `noise` / sqrt(D)"
    generator = torch.Generator().manual_seed(0)

    def unit(n, like=None):
        x = torch.randn(n, 32, generator=generator)
        return F.normalize(x if like is None else like + noise * x / 32**0.5, dim=1)

    recorder = ScoreRecorder()
    for step in range(60):
        q = unit(16)
        k = unit(16) if noise is None else unit(16, q)
        recorder.record(step, *scores(q, k, unit(64)))
    assert recorder.verdict().word == word
    assert recorder.verdict().bad == (noise is None)


def test_masked_negatives_do_not_count():
    recorder = ScoreRecorder(tau=0.2)
    neg = torch.rand(8, 40).index_fill(1, torch.arange(9), -math.inf)
    recorder.record(0, torch.rand(8), neg)
    assert recorder.frame().attrs["negatives"] == 31


def test_every_committed_run_has_a_verdict_and_the_known_ones_are_right():
    words = {}
    for path in sorted((ROOT / "results").glob("cifar10-*/*.json")):
        record, frame = read_run(path)
        words[path.parent.name, record["name"]] = verdict(frame).word
    assert len(words) > 200
    for name, word in (
        ("none-s0", "healthy"),
        ("neg-s0", "healthy"),
        ("pos-s0", "one direction"),
        ("posneg-levelsample-s0", "one direction"),
        ("posneg-epochs32-start_epoch8-s0", "healthy"),
    ):
        assert words["cifar10-settings", name] == word, name


def test_pictures_show_a_controller_and_the_verdict():
    held = GOOD.assign(strength=0.2, signal=0.1)
    assert len(plot_scores({"a": held}).axes) == 5
    assert len(plot_scores({"a": held, "b": GOOD}).axes) == 3  # not in every run
    page = run_page(held, "my run")
    title = page.get_suptitle().replace("\n", " ")
    assert title.startswith("my run healthy at step 623: two views of one image score")
    drawn = {ax.get_title(): len(ax.lines) for ax in page.axes}
    assert drawn["extrapolation"] == 2 and drawn["between / within images"] == 1


def test_the_verdict_needs_no_picture_and_no_training():
    code = "import sys, ftcl.verdict; print({'matplotlib', 'ftcl.train'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "set()\n", run.stderr


def test_a_verdict_never_ends_a_run(tmp_path):
    "With two images, mixing leaves some queries no negative"
    p = dict(n_images=8, holdout=8, size=16, epochs=1, batch_size=2, method="moco_v3", mixing="neg")
    p |= dict(seed=1, progress=False, precision="fp32", readouts="none", dim=8)
    record = pretrain(**p, out=str(tmp_path), name="run")
    assert record["verdict"]
    assert read_scores(tmp_path / "run.parquet").attrs["negatives"] == 1  # before the mixing
    assert pretrain(**p, out=str(tmp_path), name="run", resume=True) == record
    recorder = ScoreRecorder(tau=0.2)
    for step in range(200):
        recorder.record(step, torch.full((4,), 0.5), torch.full((4, 6), -math.inf))
    assert recorder.warn_once().startswith(
        "diverged: the mean score of different images (column neg_mean) is nan"
    )


def test_a_guess_is_among_the_negatives_before_a_transformation():
    torch.manual_seed(0)
    q, k, keys = (F.normalize(torch.randn(n, 32), dim=1) for n in (16, 16, 256))
    for mixing in ("pos", "neg", "mochi", "synco"):
        recorder = ScoreRecorder(tau=0.2)
        transform = FeatureTransform(mixing, append=mixing == "neg")
        for step in range(60):
            before = scores(q, k, keys)
            recorder.record(step, *scores(*transform(q, k, keys)), before)
        assert recorder.frame().attrs["negatives"] == 256
        assert recorder.verdict().word == "plateau", mixing


def test_a_resumed_run_says_what_a_whole_one_says(tmp_path):
    "Although no step is recorded after it goes on"
    p = dict(n_images=100, holdout=32, size=16, epochs=9, batch_size=32, method="moco_v3")
    p |= dict(record_every=5, progress=False, precision="fp32", readouts="none", mixing="none")
    p |= dict(lr=1e-6)
    whole = pretrain(**p, out=str(tmp_path), name="whole")
    pretrain(**p, out=str(tmp_path), name="halves", stop_after=26)
    halves = pretrain(**p, out=str(tmp_path), name="halves", resume=True)
    assert whole["verdict"].startswith("plateau") and halves["verdict"] == whole["verdict"]
    one, two = (read_scores(tmp_path / f"{name}.parquet") for name in ("whole", "halves"))
    assert one.attrs == two.attrs


def test_a_loss_that_is_no_number_is_said():
    lost = table(loss=math.nan)
    assert verdict(lost, 1024, 0.2).word == "diverged"
    assert verdict(lost, 1024, 0.2).column == "loss"
    unknown = table(before_pos_mean=0.6, before_neg_mean=0.1, before_pos_weight=math.nan)
    unknown = unknown.assign(pos_mean=0.5)
    assert "not looked for: plateau" in verdict(unknown, 1024, 0.2).sentence
