"Sets of images as people have them: labelled or not, larger than memory, kept decoded, split"

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

import ftcl.data
from ftcl.core import InputError, seeded
from ftcl.data import InMemory, OnDisk, decode_once, label_remedy, load, resolve_workers
from ftcl.data import run_sets, split_images, spread
from ftcl.encoder import Encoder
from ftcl.evaluate import ReadoutSettings, knn_accuracy, read_out, set_features
from ftcl.files import list_images
from ftcl.views import AUGMENTATIONS, STD, two_views, view_batches

HOW = AUGMENTATIONS["B"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    "Data sets and caches of a test are its own"
    for name in ("FTCL_DATA", "FTCL_CACHE", "HF_DATASETS_CACHE"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_datasets_cache")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "ftcl_data"


def photograph(i, w, h):
    "Something smooth, of which no two are alike; odd ones are bright"
    rng = np.random.default_rng(i)
    small = rng.integers(100 * (i % 2), 156 + 100 * (i % 2), (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC)


def write(folder, n, classes=("",), size=None, kind="jpg", first=0):
    "n photographs in turn in the folders of some classes"
    for i in range(first, first + n):
        path = folder / classes[i % len(classes)] / f"{i:04}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        w, h = size or (30 + i % 7, 40 - i % 5)
        photograph(i, w, h).save(path)


def children():
    "Processes that this one started and that still live, zombies not counted"
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.append(int(stat.parent.name))
    return set(found)


def views_of(data, batches=3, size=None, workers=0, rows=None, how=HOW, seed=5):
    "Both views of the first batches, as one tensor"
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    plan = [(o, (seed, step)) for step, o in enumerate(order.split(len(data) // batches)[:batches])]
    found = view_batches(data, plan, how, size, rows=rows, workers=workers)
    return torch.stack([torch.stack(pair) for pair in found])  # (steps, 2, b, 3, S, S)


# ---- views ----


def test_views_on_disk_are_those_in_memory_within_the_rounding_of_bytes(home):
    write(home / "set", 24, size=(48, 48), kind="png")
    on_disk = load("set", decode="as_needed")
    in_memory = load("set", decode="once")
    assert (type(on_disk), type(in_memory)) == (OnDisk, InMemory)
    for size in (None, 24, 80):
        off = (views_of(on_disk, size=size) - views_of(in_memory, size=size)).abs()
        bytes_off = off * min(STD) * 255 / 1.4**2  # before brightness and contrast
        assert bytes_off.max() < 1.5 and bytes_off.mean() < 0.4
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:8]
    pair = two_views(
        in_memory.batch(order), HOW, None, seeded(torch.Generator(), 5, 0), torch.tensor([3, 1])
    )
    assert torch.equal(views_of(in_memory, rows=torch.tensor([3, 1]))[0], torch.stack(pair))


def test_views_have_one_distribution_whichever_way_they_are_made(home):
    write(home / "set", 40, size=(40, 40), kind="png")
    found = []
    for decode, seeds in (("as_needed", range(10)), ("once", range(100, 110))):
        data = load("set", decode=decode)
        found.append(torch.cat([views_of(data, 1, 24, seed=seed) for seed in seeds]).flatten(0, 2))
    facts = [
        lambda v: v.mean((1, 2, 3)),
        lambda v: v.std((1, 2, 3)),
        lambda v: v.diff(dim=3).abs().mean((1, 2, 3)),
        lambda v: (v.amax(1) - v.amin(1)).mean((1, 2)),
    ]
    for fact in facts:
        assert ks_2samp(*(fact(v).numpy() for v in found)).pvalue > 0.001


@pytest.mark.parametrize("rows", [None, torch.tensor([6, 0, -1])])
def test_the_number_of_workers_changes_no_bit(home, rows):
    write(home / "set", 23)
    data = load("set", size=20)
    state = torch.get_rng_state()
    alone = views_of(data, rows=rows)
    for workers in (1, 3):
        assert torch.equal(views_of(data, workers=workers, rows=rows), alone)
    assert torch.equal(torch.get_rng_state(), state)
    if rows is not None:
        assert torch.equal(views_of(data)[:, :, rows], alone)
    assert not children()


def test_a_whole_photograph_is_cropped_not_its_middle(home):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :15] = 255  # outside of the square in the middle
    (home / "set").mkdir()
    for i in range(4):
        Image.fromarray(wide).save(home / "set" / f"{i}.png")
    data = load("set", size=16)
    assert data.decode if hasattr(data, "decode") else isinstance(data, OnDisk)
    assert not data.batch(torch.arange(4)).any()
    assert (views_of(data, 1) > 0).flatten(1).any()


def test_an_image_is_decoded_once_for_its_two_views(home, monkeypatch):
    write(home / "set", 12)
    data = load("set", size=16)
    decoded = []
    decode = ftcl.data.decode_image

    def counting(item, what):
        decoded.append(what)
        return decode(item, what)

    monkeypatch.setattr(ftcl.data, "decode_image", counting)
    views_of(data, 3)
    assert sorted(decoded) == sorted(f"image {i} of set" for i in range(12))


def test_a_plan_is_read_about_two_batches_ahead(home):
    write(home / "set", 8)
    data = load("set", size=16)
    read = []

    def plan():
        for step in range(100):
            read.append(step)
            yield torch.arange(8), (0, step)

    views = view_batches(data, plan(), HOW, workers=2)
    for step in range(5):
        next(views)
        assert step < len(read) <= step + 5
    views.close()
    assert not children()


@pytest.mark.parametrize("ends", ["error", "interrupt", "close", "forgotten"])
def test_workers_end_with_the_iterator(home, ends):
    write(home / "set", 8)
    views = view_batches(load("set", size=16), [(torch.arange(8), (0,))] * 50, HOW, workers=2)
    next(views)
    assert len(children()) == 2
    if ends == "close":
        views.close()
    elif ends == "forgotten":
        del views
    else:
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            views.throw(ZeroDivisionError if ends == "error" else KeyboardInterrupt)
    assert not children()


def test_a_damaged_file_is_one_sentence_from_a_worker_as_from_here(home):
    write(home / "set", 9)
    data = load("set", size=16)
    (home / "set" / "0004.jpg").write_bytes(b"no image at all")
    sentences = set()
    for workers in (0, 1, 3):
        with pytest.raises(InputError) as caught:
            views_of(data, workers=workers)
        sentences.add(str(caught.value))
        assert not children()
    (sentence,) = sentences
    assert "image 4 of set" in sentence and "\n" not in sentence


def killed(part):
    os.kill(os.getpid(), signal.SIGKILL)


def signalled(part):
    time.sleep(0.2)
    return part


def test_a_worker_that_is_killed_is_one_sentence():
    with pytest.raises(InputError, match="take fewer workers"):
        list(spread(killed, [(np.arange(4),)], 2))
    assert not children()


def test_signals_to_all_processes_leave_the_workers_to_their_parent():
    results = spread(signalled, [(np.arange(4),)] * 4, 2)
    found = [next(results)]
    for pid in children():
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    found += results
    assert [np.concatenate(parts).tolist() for parts in found] == [[0, 1, 2, 3]] * 4


ENDLESS = """
import numpy as np, sys, time
from ftcl.data import spread
def large(part): return np.zeros(2**24, np.uint8)
if __name__ == "__main__":
    results = spread(large, ((np.arange(4),) for _ in range(1000)), 2)
    next(results)
    print("started", flush=True)
    time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_workers_of_a_killed_process_end(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, script], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"

    def workers():
        lines = [p.parent.name for p in Path("/proc").glob("[0-9]*/cmdline") if named(p)]
        return set(lines) - {str(process.pid)}

    def named(path):
        try:
            return str(script) in path.read_text()
        except OSError:
            return False

    assert len(workers()) == 2
    process.kill()
    process.wait()
    end = time.time() + 10
    while workers() and time.time() < end:
        time.sleep(0.1)
    assert not workers()


SPAWNED = """
import multiprocessing, sys, torch
from ftcl.core import InputError
from ftcl.data import load
from ftcl.views import AUGMENTATIONS, view_batches
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    data = load("set", size=16)
    plan = [(torch.arange(6), (0, step)) for step in range(2)]
    found = []
    for workers in (0, 2):
        views = view_batches(data, plan, AUGMENTATIONS["B"], workers=workers)
        found.append(torch.stack([torch.stack(o) for o in views]))
    print(torch.equal(*found))
"""


@pytest.mark.parametrize("way", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(home, tmp_path, way):
    write(home / "set", 6)
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    pythons_own = "ignore:resource_tracker"  # said at times as Python ends, and harmless
    command = [sys.executable, "-W", pythons_own, script, way]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (run.stdout.splitlines()[-1], run.stderr) == ("True", ""), run.stderr


def test_minus_one_worker_is_one_for_each_core_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert resolve_workers(-1) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resolve_workers(-1) == 2
    assert resolve_workers(0) == 0
    for wrong in (-2, 257, 1.0, True, "2", None, 10**30):
        with pytest.raises(InputError, match="workers is"):
            resolve_workers(wrong)


# ---- decoded once, or as needed ----


def test_n_images_decodes_n(home, monkeypatch):
    write(home / "set" / "train", 40, ("cat", "dog"), size=(20, 20))
    write(home / "set" / "test", 10, ("cat", "dog"), size=(20, 20))
    decoded = []
    decode = ftcl.data.decode_image
    monkeypatch.setattr(
        ftcl.data, "decode_image", lambda *item: decoded.append(item[1]) or decode(*item)
    )
    train, test = split_images("set", n_images=7)
    assert (len(train), len(test), len(decoded)) == (7, 10, 17)
    decoded.clear()
    train, test = split_images("set", holdout=5, n_images=6)
    assert (len(train), len(test), len(decoded)) == (6, 5, 11)
    assert len(set(decoded)) == 11  # none is on both sides
    decoded.clear()
    sets = run_sets("set", n_images=6, decode="as_needed")
    assert sets.decode == "as_needed" and not decoded
    assert isinstance(sets.train, OnDisk) and isinstance(sets.test, OnDisk)


def test_both_ways_to_decode_give_the_same_images(home):
    write(home / "set" / "train", 12, ("cat", "dog"))
    write(home / "set" / "test", 6, ("cat", "dog"))
    kept = dict(dataset="set", size=16, n_images=8)
    once, needed = (run_sets(**kept, decode=decode) for decode in ("once", "as_needed"))
    for a, b in zip(once[:3], needed[:3]):
        assert torch.equal(a.batch(torch.arange(len(a))), b.batch(torch.arange(len(b))))
        assert torch.equal(a.labels, b.labels) and a.classes == b.classes
    assert run_sets(**kept).decode == "as_needed"  # not square
    torch.manual_seed(0)
    encoder = Encoder("small")
    settings = ReadoutSettings(k=3, linear_epochs=2, workers=2)
    names = ["knn_backbone", "logreg_backbone"]
    found = [read_out(encoder, o.bank, o.test, names, settings) for o in (once, needed)]
    assert found[0] == found[1]
    assert not children()


def test_what_differs_in_size_is_asked_for_its_size(home):
    write(home / "set" / "train", 12, ("cat", "dog"))
    write(home / "set" / "test", 6, ("cat", "dog"))
    for decode in ("once", "as_needed"):
        with pytest.raises(InputError, match=r"of set \(split [a-z]+\) differ in size"):
            sets = run_sets("set", decode=decode)
            read_out(Encoder("small"), sets.bank, sets.test)
    needed = run_sets("set", decode="as_needed").train
    with pytest.raises(InputError, match="differ in size"):
        views_of(needed)
    assert views_of(needed, size=8).shape[-2:] == (8, 8)  # a view has a size of its own


@pytest.mark.parametrize("size", [2**40, 2**15, -1, 1.5, "8", True])
def test_a_size_beyond_reason_is_refused(home, size):
    write(home / "set", 2)
    for dataset in ("set", "shapes"):
        with pytest.raises(InputError, match="size is"):
            load(dataset, size=size)


def test_what_no_machine_holds_is_refused_before_it_is_decoded(home):
    write(home / "set", 3, size=(9, 9))
    data = OnDisk(list_images("set"), size=2**22)
    with pytest.raises(InputError, match="take as_needed"):
        decode_once(data)
    with pytest.raises(InputError, match="at most 268,435,456 pixels"):
        ftcl.data.shapes(2**62)


# ---- kept for the next start ----


@pytest.fixture
def keep_all(monkeypatch):
    "However soon images are decoded, they are kept"
    monkeypatch.setattr(ftcl.data, "_CACHE_AFTER", 0)


def cached():
    return sorted(Path(os.environ["FTCL_CACHE"]).iterdir())


def test_a_second_start_decodes_nothing(home, keep_all, monkeypatch, capsys):
    write(home / "set", 10, size=(20, 20))
    first = load("set").images
    assert len(cached()) == 1
    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(ftcl.data, "decode_image", lambda *item: pytest.fail("decoded again"))
        m.setattr(ftcl.data, "_some_sizes", lambda *item: [(20, 20)])
        again = load("set").images
    assert torch.equal(again, first)
    again += 1  # copied on write
    assert torch.equal(load("set").images, first)
    assert "cache" not in capsys.readouterr().out


def test_a_changed_image_is_decoded_anew(home, keep_all):
    write(home / "set", 5, size=(20, 20))
    first = load("set").images
    photograph(77, 20, 20).save(home / "set" / "0003.jpg")
    second = load("set").images
    assert [i for i in range(5) if not torch.equal(first[i], second[i])] == [3]
    load("set", size=8)
    split_images("set", n_images=4) if False else run_sets("set", n_images=4)
    assert len(cached()) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "header", "foreign"])
def test_a_damaged_cache_is_made_anew_with_one_line(home, keep_all, damage, capsys):
    write(home / "set", 5, size=(20, 20))
    first = load("set").images
    (path,) = cached()
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-100 if damage == "bit" else 20] ^= 4
    new = dict(cut=content[:-50], empty=b"", foreign=b"PK\3\4 something else")
    path.write_bytes(new.get(damage, bytes(flipped)))
    capsys.readouterr()
    assert torch.equal(load("set").images, first)
    lines = [o for o in capsys.readouterr().out.splitlines() if "made anew" in o]
    assert len(lines) == 1
    assert cached() == [path] and path.read_bytes() == content


@pytest.mark.parametrize("where", ["file", "null/folder", "~nobody-of-this-name/cache"])
def test_a_cache_that_cannot_be_written_costs_a_line(home, keep_all, where, monkeypatch, capsys):
    write(home / "set", 5, size=(20, 20))
    (home / "file").write_bytes(b"")
    monkeypatch.setenv("FTCL_CACHE", where if "~" in where else str(home / "file" / where))
    assert load("set").images.shape == (5, 3, 20, 20)
    lines = [o for o in capsys.readouterr().out.splitlines() if "are not kept" in o]
    assert len(lines) == 1


def test_a_full_cache_lets_its_oldest_go_and_nothing_else(home, keep_all, monkeypatch):
    write(home / "set", 5, size=(20, 20))
    folder = Path(os.environ["FTCL_CACHE"])
    (folder / "mine.npy").write_bytes(b"x" * 9999)
    monkeypatch.setattr(ftcl.data, "_MOST_CACHED", 8000)  # bytes: a file of 5 images has 6,128
    for age, size in ((300, 20), (200, 19)):
        load("set", size=size)
        newest = max(cached(), key=lambda p: p.stat().st_mtime)
        os.utime(newest, (time.time() - age,) * 2)
    load("set", size=10)
    sizes = sorted(p.stat().st_size for p in cached() if p.name != "mine.npy")
    assert sizes == [128 + 5 * 300, 128 + 5 * 1083] and (folder / "mine.npy").exists()


LOADING = """
import sys, time, torch, ftcl.data
ftcl.data._CACHE_AFTER = 0
print(ftcl.data._pixels_key(ftcl.data.load("set").images.numpy()))
"""


def test_two_processes_may_fill_the_cache_at_once(home):
    write(home / "set", 200, size=(20, 20))
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-W", "error::UserWarning", "-c", LOADING]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]
    answers = [run.communicate() for run in runs]
    assert answers[0] == answers[1] and answers[0][1] == ""
    assert len(cached()) == 1


PEAK = """
from ftcl.data import load
load("small")  # whatever is imported late
def kilobytes(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))
start = kilobytes("VmRSS")
images = load("set").images
print(1024 * (kilobytes("VmHWM") - start) / images.numel())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_decoding_takes_little_more_than_the_images(home, kind):
    for name, n in (("small", 8), ("set", 2400)):
        write(home / name, n, ("cat", "dog"), size=(96, 96))
        if kind == "parquet":
            as_parquet(home / name)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    run = subprocess.run([sys.executable, "-c", PEAK], env=env, capture_output=True, text=True)
    assert 0.9 < float(run.stdout.splitlines()[-1]) < 1.3, run.stdout + run.stderr


# ---- labelled or not, and measured on ----


def as_parquet(folder):
    "Write the images of a folder of classes as one Parquet file in its place"
    listing = list_images(str(folder))
    rows = [
        Path(item["path"]) for item in map(listing.items.__getitem__, range(len(listing.items)))
    ]
    embedded = [dict(bytes=path.read_bytes(), path=path.name) for path in rows]
    columns = dict(image=embedded, label=listing.labels.tolist())
    features = dict(image=datasets.Image(), label=datasets.ClassLabel(names=listing.classes))
    for path in rows:
        path.unlink()
    table = datasets.Dataset.from_dict(columns, datasets.Features(features))
    table.to_parquet(folder / "train.parquet")


LAYOUTS = {
    "root/image": [""],
    "root/class/image": ["owl", "tit"],
    "one folder": ["owl"],
    "nested": ["a/b", "a/c", "d"],
    "root/split/image": ["train"],
    "root/split/class/image": ["train/owl", "train/tit"],
    "split in capitals": ["Train/owl", "Train/tit"],
}
LABELLED = {name for name in LAYOUTS if "class" in name or "capitals" in name}


@pytest.mark.parametrize("folder, words", [("test", "test split"), ("val", "validation split")])
def test_what_was_measured_on_is_called_what_it_is(home, folder, words):
    write(home / "set" / "train", 20, ("owl", "tit"))
    write(home / "set" / folder, 10, ("owl", "tit"), first=100)
    assert run_sets("set", size=16).measured_on == words
    assert run_sets("shapes", evaluate_on="set").measured_on == f"set: {words}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_can_be_trained_on(home, layout, capsys):
    write(home / "set", 20, LAYOUTS[layout])
    write(home / "known" / "train", 20, ("owl", "tit"), first=100)
    write(home / "known" / "test", 10, ("owl", "tit"), first=200)
    sets = run_sets("set", size=16, n_images=15, evaluate_on="known")
    assert (len(sets.train), len(sets.bank), len(sets.test)) == (15, 20, 10)
    assert (sets.train.labels is not None) == (layout in LABELLED)
    assert sets.measured_on == "known: test split"
    assert views_of(sets.train).shape == (3, 2, 5, 3, 16, 16)
    if layout in LABELLED:
        with pytest.raises(InputError, match="has no test split.*holdout.*evaluate_on"):
            run_sets("set", size=16)
        sets = run_sets("set", size=16, holdout=4)
        assert (len(sets.bank), len(sets.test), sets.measured_on) == (
            16,
            4,
            "held-out training images",
        )
        return
    what = r"set \(split train\)" if "split" in layout else "set"
    with pytest.raises(InputError, match=f"holdout is 4, but {what} has no labels.*evaluate_on"):
        run_sets("set", size=16, holdout=4)
    capsys.readouterr()
    sets = run_sets("set", size=16)
    assert (sets.bank, sets.test, sets.measured_on) == (None, None, "nothing")
    said = [o for o in capsys.readouterr().out.splitlines() if "kNN" in o]
    assert len(said) == 1 and "evaluate_on" in said[0]


def test_what_was_left_out_is_said_once_a_load(home, capsys):
    write(home / "set" / "train", 6, ("owl", "tit"))
    (home / "set" / "train" / "owl" / "notes.txt").write_text("seen at night")
    load("set", size=8)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "notes.txt" in lines[0]


def test_evaluate_on_names_a_split_or_another_set(home):
    write(home / "set" / "train", 20, size=(20, 20))
    write(home / "set" / "val", 10, ("owl", "tit"), size=(20, 20), first=50)
    write(home / "single", 15, ("owl", "tit"), size=(20, 20), first=100)
    sets = run_sets("set", evaluate_on="validation")
    assert (len(sets.bank), len(sets.test)) == (8, 2)
    assert sets.measured_on == "validation: a fifth of it"
    both = torch.cat([o.batch(torch.arange(len(o))) for o in (sets.bank, sets.test)]).flatten(1)
    assert len(both.unique(dim=0)) == 10
    sets = run_sets("set", evaluate_on=str(home / "single"))
    assert (len(sets.train), len(sets.bank), len(sets.test)) == (20, 12, 3)
    sets = run_sets("set", evaluate_on="shapes", size=20)
    assert (len(sets.train), len(sets.bank), len(sets.test)) == (20, 4096, 1024)
    torch.manual_seed(0)
    assert 0 <= knn_accuracy(Encoder("small"), sets.bank.take(torch.arange(99)), sets.test) <= 100
    sets = run_sets("set", split="validation", evaluate_on="single")
    assert len(sets.train) == 10
    assert run_sets("set", evaluate_on="val").measured_on == "val: a fifth of it"
    for split, name in (("val", "validation"), ("validation", "val"), ("train", "train")):
        with pytest.raises(InputError, match="trained on and measured on"):
            run_sets("set", split=split, evaluate_on=name)
    place = r"a split of 'set' \(train, validation\) or a labelled data set"
    with pytest.raises(InputError, match=place + ": dataset 'sinlge'.*Did you mean 'single'"):
        run_sets("set", evaluate_on="sinlge")
    with pytest.raises(InputError, match=place + r"\. Did you mean 'train'\?$"):
        run_sets("set", evaluate_on="trian")
    with pytest.raises(InputError, match="must name images with labels"):
        run_sets("single", evaluate_on=str(home / "set" / "train"))
    with pytest.raises(InputError, match="evaluate_on is given, too"):
        run_sets("single", holdout=3, evaluate_on="shapes")
    for wrong in (7, None, ["set"]):
        with pytest.raises(InputError, match="evaluate_on is"):
            run_sets("set", evaluate_on=wrong)
    write(home / "few", 4, ("owl", "tit"), size=(20, 20))
    with pytest.raises(InputError, match="5 images or more"):
        run_sets("set", evaluate_on="few")


def test_no_image_is_trained_on_and_measured_on_however_it_is_spelt(home, tmp_path, monkeypatch):
    write(home / "lab", 15, ("owl", "tit"), size=(20, 20))
    for split, first in (("train", 0), ("Test", 50)):
        write(home / "set" / split, 10, ("owl", "tit"), size=(20, 20), first=first)
    os.symlink(home / "lab", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    link = str(tmp_path / "link")
    for other in (f"{home}/lab", f"{home}/lab/", f"{home}/set/../lab", "link", link):
        for one, two in (("lab", other), (other, "lab")):
            with pytest.raises(InputError, match="trained on and measured on"):
                run_sets(one, evaluate_on=two)
    with pytest.raises(InputError, match="trained on and measured on"):
        run_sets(f"{home}/set/Test", evaluate_on="set")
    sets = run_sets(f"{home}/set/train", evaluate_on="set")
    assert (len(sets.train), len(sets.bank), len(sets.test)) == (10, 10, 10)


def test_columns_are_those_of_the_table_among_two_sets(home):
    write(home / "free", 6, size=(20, 20))
    kinds = {name: datasets.ClassLabel(names=["owl", "tit"]) for name in ("coarse", "fine")}
    columns = dict(image=[photograph(i, 20, 20) for i in range(10)], coarse=[0] * 10)
    columns["fine"] = [0, 1] * 5
    features = datasets.Features(dict(image=datasets.Image(), **kinds))
    (home / "table").mkdir()
    path = home / "table" / "train.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    with pytest.raises(InputError, match="label_column. to one of coarse, fine"):
        run_sets("free", evaluate_on="table")
    sets = run_sets("free", evaluate_on="table", label_column="fine")
    assert sorted(torch.cat([sets.bank.labels, sets.test.labels]).tolist()) == [0] * 5 + [1] * 5
    with pytest.raises(InputError, match="label_column is 'fnie'"):
        run_sets("free", evaluate_on="table", label_column="fnie")
    assert len(run_sets("table", evaluate_on="shapes", label_column="fine", size=20).test) == 1024


def test_labels_that_a_split_lacks_are_done_without(home, capsys):
    write(home / "free" / "train", 20, size=(20, 20))
    write(home / "free" / "test", 10, ("owl", "tit"), size=(20, 20), first=50)
    sets = run_sets("free", evaluate_on=str(home / "free"))
    assert (len(sets.train), len(sets.bank), len(sets.test)) == (20, 8, 2)
    write(home / "hidden" / "train", 10, ("owl", "tit"), size=(20, 20))
    write(home / "hidden" / "test", 4, size=(20, 20), first=50)
    assert run_sets("hidden").test is None
    assert "hidden (split test) has no labels" in capsys.readouterr().out


def test_messages_name_no_folder_that_is_not_there(home, capsys):
    write(home / "flat", 3, size=(20, 20))
    write(home / "apart" / "train", 3, size=(20, 20))
    for name, what, file in (
        ("flat", "flat", home / "flat" / "0001.jpg"),
        ("apart", "apart (split train)", home / "apart" / "train" / "0001.jpg"),
    ):
        run_sets(name)
        assert capsys.readouterr().out.startswith(f"{what} has no labels")
        file.write_bytes(b"no image")
        with pytest.raises(InputError) as told:
            load(name, size=16).batch(torch.arange(3))
        assert str(told.value).startswith(f"image 1 of {what} ({str(file)!r}) cannot be decoded")


@pytest.mark.parametrize("decode", ["once", "as_needed"])
def test_one_message_names_all_images_that_cannot_be_used(home, decode):
    write(home / "flat", 15, size=(20, 20))
    files = sorted((home / "flat").iterdir())
    whole = files[0].read_bytes()
    for damage in (b"", b"no image", whole[:-200]):  # no bytes, no header, cut short
        for file in files[1:]:
            file.write_bytes(damage)
        with pytest.raises(InputError) as told:
            load("flat", size=16, decode=decode).batch(torch.arange(15))
        named, *_ = re.findall(r"Nor can 13 others be used: (.*) and 3 more\.$", str(told.value))
        assert str(told.value).startswith(f"image 1 of flat ({str(files[1])!r}) ")
        assert named == ", ".join(repr(str(file)) for file in files[2:12])
        assert "\n" not in str(told.value)
    for file in files[2:]:
        file.write_bytes(whole)
    with pytest.raises(InputError) as told:
        load("flat", size=16, decode=decode).batch(torch.arange(15))
    assert str(told.value).endswith("Mend or remove it.")


def test_images_without_labels_come_with_a_remedy(home):
    write(home / "flat", 12, size=(20, 20))
    kinds = datasets.Features(image=datasets.Image())
    (home / "table").mkdir()
    table = datasets.Dataset.from_dict(dict(image=[photograph(0, 9, 9)]), features=kinds)
    table.to_parquet(str(home / "table" / "a.parquet"))
    assert label_remedy("flat").startswith("put the images of each class into a folder of its own")
    assert label_remedy("table") == "set `label_column` to the column of labels"
    assert "label_column" not in label_remedy("shapes")
    with pytest.raises(InputError, match="images with labels: put the images of each class into"):
        run_sets("shapes", size=20, evaluate_on="flat")


def test_a_test_split_counts_its_classes_as_the_training_split_does(home):
    write(home / "a" / "train", 12, ("owl", "tit", "wren"), size=(20, 20))
    write(home / "a" / "test", 8, ("tit", "wren"), size=(20, 20), first=100)
    train, test = load("a"), load("a", "test")
    assert test.classes == train.classes and test.labels.unique().tolist() == [1, 2]
    torch.manual_seed(0)
    assert 0 <= knn_accuracy(Encoder("small"), train, test, k=3) <= 100


@pytest.mark.parametrize("decode", ["once", "as_needed"])
def test_sets_whose_classes_differ_are_refused(home, decode):
    write(home / "a", 12, ("owl", "tit", "wren"), size=(20, 20))
    write(home / "b", 8, ("tit", "wren"), size=(20, 20), first=100)
    write(home / "c", 8, ("owl", "tit"), size=(20, 20), first=100)
    train = load("a", decode=decode)
    torch.manual_seed(0)
    encoder = Encoder("small")
    with pytest.raises(InputError, match="label 0 is 'tit' in the test set, but 'owl' in the tra"):
        knn_accuracy(encoder, train, load("b", decode=decode))
    with pytest.raises(InputError, match="label 2 is None in the test set, but 'wren' in the tra"):
        read_out(encoder, train, load("c", decode=decode), ["knn_backbone"])


def equal_as_parquet(folder, parquet):
    "The same images, labels, classes and accuracy, from a folder and from Parquet"
    torch.manual_seed(0)
    encoder = Encoder("small")
    found = []
    for name in (folder, parquet):
        data = load(str(name))
        x = data.batch(torch.arange(len(data)))
        bank = InMemory(x[::2], data.labels[::2], data.classes)
        query = InMemory(x[1::2], data.labels[1::2], data.classes)
        found.append((x, data.labels, data.classes, knn_accuracy(encoder, bank, query, k=20)))
    (x, labels, classes, accuracy), (x2, labels2, classes2, accuracy2) = found
    assert torch.equal(x, x2) and torch.equal(labels, labels2) and classes == classes2
    assert accuracy == accuracy2 > 1


def test_parquet_and_a_folder_are_the_same_set(home):
    write(home / "folder", 60, ("owl", "tit"), size=(24, 24))
    write(home / "parquet", 60, ("owl", "tit"), size=(24, 24))
    as_parquet(home / "parquet")
    equal_as_parquet(home / "folder", home / "parquet")
    plan = [(torch.arange(60), (0,))]
    a, b = (load(o, decode="as_needed") for o in ("folder", "parquet"))
    views = [next(view_batches(o, plan, HOW, workers=2)) for o in (a, b)]
    assert torch.equal(torch.stack(views[0]), torch.stack(views[1]))


REAL = os.environ.get("FTCL_DATA", "")


@pytest.mark.skipif(not Path(REAL, "tiny-imagenet-100").is_dir(), reason="needs the data set")
def test_tiny_imagenet_is_the_same_from_parquet_and_from_a_folder(home):
    files = sorted(Path(REAL, "tiny-imagenet-100").glob("train-*.parquet"))
    whole = datasets.Dataset.from_parquet(str(files[0]))
    whole = whole.cast_column("image", datasets.Image(decode=False))
    rows = whole.select(range(0, len(whole), len(whole) // 1000))
    names = rows.features["label"].names
    label_of = sorted(range(len(rows)), key=lambda i: (rows[i]["label"], i))
    rows = rows.select(label_of)
    used = sorted({rows[i]["label"] for i in range(len(rows))})
    features = rows.features.copy()
    features["label"] = datasets.ClassLabel(names=[names[i] for i in used])
    (home / "parquet").mkdir()
    plain = [dict(image=o["image"], label=used.index(o["label"])) for o in rows]
    table = datasets.Dataset.from_list(plain, features=datasets.Features(features))
    table.to_parquet(home / "parquet" / "train.parquet")
    for i, row in enumerate(rows):
        name = re.sub("/", "_", names[row["label"]])
        ending = Image.open(io.BytesIO(row["image"]["bytes"])).format.lower()
        path = home / "folder" / name / f"{i:05}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
    equal_as_parquet(home / "folder", home / "parquet")


# ---- readouts ----


def test_features_of_a_set_on_disk_are_those_in_memory(home):
    write(home / "set", 30, ("owl", "tit"), size=(20, 20))
    torch.manual_seed(0)
    encoder = Encoder("small")
    wanted = set_features(encoder, load("set"))
    for workers in (0, 2):
        found = set_features(encoder, load("set", decode="as_needed"), workers=workers)
        assert torch.equal(found, wanted)
    assert not children()
