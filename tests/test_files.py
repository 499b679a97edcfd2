"Reading folders, tables and images: which images, labels and pixels; or one sentence"

import io
import os
import pickle
import re
import struct
import time
import warnings
import zlib
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from ftcl import files
from ftcl.core import InputError
from ftcl.files import decode_image, find_source, image_size, list_images, split_names

ROOT = Path(__file__).parent.parent
DATA = os.path.expanduser(os.environ.get("FTCL_DATA", ""))
FEW = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("FTCL_DATA", raising=False)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "A cache of its own for `datasets`"
    folder = tmp_path_factory.mktemp("cache")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(value):
    return Image.new("L", (2, 2), value)


def write(folder, *paths, value=0):
    "Small images, whose grey is the number in their name; other files are empty"
    for path in paths:
        path = Path(folder) / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in files.ENDINGS:
            number = re.findall(r"\d+", path.stem)
            path.write_bytes(encoded(grey(int(number[-1]) if number else value)))
        else:
            path.touch()
    return folder


def seen(listing):
    "The grey of each image, read as the listing says"
    return [decode_image(item, listing.what).getpixel((0, 0))[0] for item in listing.items]


def labels(listing):
    return None if listing.labels is None else listing.labels.tolist()


def refusal(function, *arguments, **named):
    "The one sentence with which `function` refuses its arguments"
    with pytest.raises(InputError) as e:
        function(*arguments, **named)
    sentence = str(e.value)
    assert "\n" not in sentence and "object at 0x" not in sentence and len(sentence) < 1500
    return sentence


# Folders: files, split, greys, labels, classes, a part of the note
LAYOUTS = {
    "flat": ("1.png 2.png", "train", [1, 2], None, None, ""),
    "nested": ("a/b/1.png c/2.png 3.png", "train", [3, 1, 2], None, None, "no labels: '3.png'"),
    "deep": ("a/b/1.png c/d/2.png", "train", [1, 2], None, None, "no labels: 'a/b/1.png'"),
    "one folder": ("a/1.png a/2.png", "train", [1, 2], None, None, "in one folder, 'a'"),
    "classes": ("dog/1.png cat/2.png", "train", [2, 1], [0, 1], ["cat", "dog"], ""),
    "names of splits among classes": (
        "test/1.png training/2.png eval/3.png steam-train/4.png",
        "train",
        [3, 4, 1, 2],
        [0, 1, 2, 3],
        ["eval", "steam-train", "test", "training"],
        "'test' beside 'eval' is no split",
    ),
    "trains beside cars": (
        "train/1.png car/2.png plane/3.png",
        "train",
        [2, 3, 1],
        [0, 1, 2],
        ["car", "plane", "train"],
        "'train' beside 'car' is no split",
    ),
    "splits in names of files": (
        "cat/COCO_train2014_1.png dog/test-2.png",
        "train",
        [1, 2],
        [0, 1],
        ["cat", "dog"],
        "",
    ),
    "capitals": (
        "Train/b/1.png Train/a/2.png TEST/a/3.png",
        "train",
        [2, 1],
        [0, 1],
        ["a", "b"],
        "",
    ),
    "test of capitals": (
        "Train/b/1.png Train/a/2.png TEST/b/3.png",
        "test",
        [3],
        [1],
        ["a", "b"],
        "",
    ),
    "val for test": ("train/a/1.png train/b/2.png val/b/3.png", "test", [3], [1], ["a", "b"], ""),
    "validation by its short name": ("train/1.png validation/2.png", "val", [2], None, None, ""),
    "test, not val": ("train/1.png val/2.png test/3.png", "test", [3], None, None, ""),
    "unlabelled train": ("train/1.png test/a/2.png test/b/3.png", "train", [1], None, None, ""),
    "labelled test": (
        "train/1.png test/b/2.png test/a/3.png",
        "test",
        [3, 2],
        [0, 1],
        ["a", "b"],
        "",
    ),
    "flat test": ("train/a/1.png train/b/2.png test/3.png", "test", [3], None, None, ""),
    "one folder of a test": (
        "train/a/1.png train/b/2.png test/b/3.png",
        "test",
        [3],
        [1],
        ["a", "b"],
        "",
    ),
    "annotations beside splits": (
        "train/1.png test/2.png labels/a.txt",
        "train",
        [1],
        None,
        None,
        "",
    ),
    "images beside splits": ("train/1.png 2.png", "train", [1], None, None, "1 beside the folders"),
    "an empty class": ("a/1.png b/2.png c/x.txt", "train", [1, 2], [0, 1], ["a", "b"], "('c')"),
    "hidden and others": (
        "a/1.png b/2.PNG .DS_Store .git/3.png a/.4.png a/notes.md b/z.tar x.heic",
        "train",
        [1, 2],
        [0, 1],
        ["a", "b"],
        "left out: 3 hidden, 3 files that are no images (such as 'x.heic')",
    ),
    "a folder that ends like an image": (
        "a.png/1.png b.jpg/2.png",
        "train",
        [1, 2],
        [0, 1],
        ["a.png", "b.jpg"],
        "",
    ),
    "numbers by their digits": ("10.png 9.png", "train", [10, 9], None, None, ""),
    "folder by folder": (
        "a-b/1.png a/2.png a/b.c/4.png a/b/3.png",
        "train",
        [2, 3, 4, 1],
        None,
        None,
        "no labels: 'a/b/3.png'",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_read_by_the_rule(layout, tmp_path):
    names, split, greys, numbers, classes, note = LAYOUTS[layout]
    listing = list_images(str(write(tmp_path, *names.split())), split)
    assert seen(listing) == greys
    assert labels(listing) == numbers
    assert listing.classes == classes
    assert note in listing.note and "\n" not in listing.note
    assert bool(note) == bool(listing.note)


REFUSED = {
    "train/cat/1.png extra/2.png": ("train", ["'train'", "beside 'extra'"]),
    "train/1.png Train/2.png": ("train", ["'Train' and 'train'", "one split"]),
    "train/1.png val/2.png validation/3.png": ("train", ["'val' and 'validation'"]),
    "train/a/1.png train/b/2.png test/c/3.png": ("test", ["class 'c'", "'test'", "'train'"]),
    "train/1.png": ("test", ["no test split, only train", "`holdout`", "`evaluate_on`"]),
    "a/1.png b/2.png": ("test", ["no test split, only train", "`holdout`", "`evaluate_on`"]),
    "test/1.png": ("train", ["split is 'train', but must be one of test"]),
    "train/1.png test/2.png": ("tset", ["split is 'tset'", "Did you mean 'test'?"]),
    "a/b/x.txt .hidden/1.png c.heic": (
        "train",
        ["holds no image", "only 2 other files (such as", "and 1 hidden: add images"],
    ),
    "": ("train", ["holds no image", "and no Parquet file: add images"]),
    "1.png a.parquet": ("train", ["'1.png' and 'a.parquet'"]),
}


@pytest.mark.parametrize("names", REFUSED)
def test_an_unclear_folder_is_refused(names, tmp_path):
    split, parts = REFUSED[names]
    sentence = refusal(list_images, str(write(tmp_path, *names.split())), split)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize("split", [None, 3, "", "TRAIN2", ["train"]])
def test_a_wrong_split_is_refused(split, tmp_path):
    assert "split is" in refusal(list_images, write(tmp_path, "1.png"), split)


def test_names_of_splits(tmp_path):
    assert split_names(write(tmp_path / "a", "TEST/1.png", "val/2.png", "train/3.png")) == [
        "train",
        "validation",
        "test",
    ]
    assert split_names(write(tmp_path / "b", "1.png")) == ["train"]
    assert "holds no image" in refusal(split_names, write(tmp_path / "c", "1.txt"))


NAMES = [
    "a b",
    "[1]",
    "a::b",
    "*",
    "?",
    "-rf",
    "a\nb",
    "ümläut",
    "猫",
    "a%20b",
    "{x}",
    "~",
    "$HOME",
    "a'b\"c",
    "\\",
    "con",
    "a" * 250,
    os.fsdecode(b"\xff\xfe"),
    "\u202eright",
    "file:",
    "http:",
]


@pytest.mark.parametrize("place", ["file", "class", "root"])
def test_any_name_is_a_name(place, tmp_path):
    "Of a file, of the folder of a class, and of the data set"
    for i, name in enumerate(NAMES):
        root = tmp_path / str(i)
        short = name[:240]
        paths = dict(
            file=[f"a/{short}.png", "b/1.png"],
            **{"class": [f"{name}/1.png", f"{name}/2.png", "zzz\U0010ffff/1.png"]},
            root=[f"{name}/a/1.png", f"{name}/b/2.png"],
        )[place]
        write(root, *paths)
        listing = list_images(root / name if place == "root" else root)
        assert len(seen(listing)) == len(paths)
        found = [os.path.relpath(item["path"], root) for item in listing.items]
        assert found == sorted(paths, key=os.fsencode)
        first = place != "class" or os.fsencode(name) < b"zzz"
        assert labels(listing) == ([0] * (len(paths) - 1) + [1] if first else [0, 1, 1])
        if place == "class" and name.isprintable():
            assert name in listing.classes
        assert all(o.encode() for o in listing.classes)  # can be printed and written
        assert "\n" not in listing.what


def test_links_are_followed(tmp_path):
    "To the folder of a class, to a file, and to the whole data set"
    write(tmp_path / "store", "cats/1.png", "2.png")
    write(tmp_path / "pets", "dog/3.png")
    os.symlink(tmp_path / "store/cats", tmp_path / "pets/cat")
    os.symlink("../../store/2.png", tmp_path / "pets/dog/4.png")
    os.symlink(tmp_path / "pets", tmp_path / "all")
    listing = list_images(tmp_path / "all")
    assert (seen(listing), labels(listing)) == ([1, 3, 2], [0, 1, 1])
    assert listing.classes == ["cat", "dog"]


def test_links_that_lead_nowhere_are_refused(tmp_path):
    for i, (target, name) in enumerate([(".", "loop"), ("nowhere", "gone.png"), ("self", "self")]):
        root = write(tmp_path / str(i), "a/1.png", "b/2.png")
        os.symlink(target, root / "a" / name)
        assert name in refusal(list_images, root)
    root = write(tmp_path / "far", "a/1.png", "b/c/2.png")
    os.symlink("../..", root / "b/c/up")
    assert "up" in refusal(list_images, root) and "holds it" in refusal(list_images, root)
    write(tmp_path / "hidden", "1.png")
    os.symlink("nowhere", tmp_path / "hidden" / ".lock")
    assert seen(list_images(tmp_path / "hidden")) == [1]


def test_what_is_no_file_is_no_image(tmp_path):
    "A pipe would wait for ever"
    write(tmp_path, "1.png")
    os.mkfifo(tmp_path / "2.png")
    assert seen(list_images(tmp_path)) == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_an_unreadable_folder_is_refused_by_name(tmp_path):
    "By a child process without the rights of the administrator, who may read everything"
    write(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b").chmod(0)
    for folder in [tmp_path, *tmp_path.parents][:4]:  # up to the folder of all temporary files
        folder.chmod(folder.stat().st_mode | 0o55)
    read, send = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            list_images(tmp_path)
        except BaseException as e:
            os.write(send, f"{type(e).__name__}: {e}".encode())
        os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    said = os.read(read, 10_000).decode()
    os.close(read)
    (tmp_path / "b").chmod(0o755)
    assert said.startswith("InputError: the folder") and "/b' cannot be read (Permission" in said


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    write(tmp_path, "a/1.png")
    scan = os.scandir

    def denied(path):
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "/a' cannot be read (Permission denied)" in refusal(list_images, tmp_path)


def test_many_files_are_listed_fast_and_kept_small(tmp_path):
    for c in range(10):
        (tmp_path / f"class{c}").mkdir()
        for i in range(10_000):
            os.close(os.open(tmp_path / f"class{c}/image_{i:06d}.jpg", os.O_CREAT))
    start = time.perf_counter()
    listing = list_images(tmp_path)
    assert time.perf_counter() - start < 20
    assert len(listing.items) == 100_000
    assert listing.labels.bincount().tolist() == [10_000] * 10
    assert listing.items[54_321]["path"] == str(tmp_path / "class5/image_004321.jpg")
    assert len(pickle.dumps(listing.items)) < 4_000_000
    copy = pickle.loads(pickle.dumps(listing))
    assert copy.items[-1] == listing.items[99_999]
    with pytest.raises(IndexError):
        listing.items[100_000]


def test_a_folder_has_no_columns(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png")
    assert "image_column is 'img'" in refusal(list_images, tmp_path, image_column="img")
    assert "label_column is 'x'" in refusal(list_images, tmp_path, label_column="x")
    listing = list_images(tmp_path, label_column="none")
    assert (seen(listing), listing.labels, listing.classes) == ([1, 2], None, None)
    write(tmp_path / "pets", "train/a/1.png", "train/b/2.png", "test/c/3.png")
    assert "class 'c'" in refusal(list_images, tmp_path / "pets", "test")
    assert seen(list_images(tmp_path / "pets", "test", label_column="none")) == [3]


def plain_rule(paths, split):
    "The rule for folders in its plainest form: images of a split in order, and their classes"
    images = sorted(
        (p.split("/") for p in paths), key=lambda parts: [os.fsencode(o) for o in parts]
    )
    tops = {parts[0] for parts in images if len(parts) > 1}
    meaning = dict(train="train", val="validation", validation="validation", test="test")
    if tops and all(top.lower() in meaning for top in tops):
        if len({meaning[top.lower()] for top in tops}) < len(tops):
            return "refused"
        chosen = [p for p in images if len(p) > 1 and meaning[p[0].lower()] == split]
        depth = 1
    else:
        if any(len(parts) > 2 and parts[0].lower() in meaning for parts in images):
            return "refused"
        chosen = images if split == "train" else []
        depth = 0
    if not chosen:
        return "refused"
    classes = {parts[depth] for parts in chosen if len(parts) == depth + 2}
    labelled = len(classes) > 1 and all(len(parts) == depth + 2 for parts in chosen)
    return ["/".join(parts) for parts in chosen], [p[depth] for p in chosen] if labelled else None


PARTS = st.sampled_from(["train", "Train", "val", "validation", "test", "a", "b", "train2", "a-b"])
PATHS = st.lists(st.lists(PARTS, max_size=3), min_size=1, max_size=6)


@FEW
@given(PATHS, st.sampled_from(["train", "validation"]))
def test_folders_follow_the_plain_rule(tmp_path_factory, folders, split):
    root = tmp_path_factory.mktemp("tree")
    paths = ["/".join([*parts, f"{i}.png"]) for i, parts in enumerate(folders)]
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    wanted = plain_rule(paths, split)
    if wanted == "refused":
        refusal(list_images, root, split)
        return
    if split != "train":  # classes of a split alone, so that names need not agree
        train = plain_rule(paths, "train")
        known = set(train[1] or []) if train != "refused" else set()
        if known:
            return
    listing = list_images(root, split)
    assert [os.path.relpath(item["path"], root) for item in listing.items] == wanted[0]
    if wanted[1] is None:
        assert listing.labels is None
    else:
        assert [listing.classes[i] for i in listing.labels] == wanted[1]


# Names


def test_where_a_name_is_looked_up(tmp_path, monkeypatch):
    write(tmp_path / "data/pets", "1.png")
    write(tmp_path / "data", "9.png")
    write(tmp_path / "here/pets", "2.png")
    write(tmp_path / "here/own", "3.png")
    write(tmp_path / "home/mine", "4.png")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert seen(list_images("pets")) == [2]
    for data in (str(tmp_path / "data"), "../data", "~/../data"):
        monkeypatch.setenv("FTCL_DATA", data)
        assert seen(list_images("pets")) == [1]
        assert seen(list_images("./pets")) == [2]
        assert seen(list_images("own")) == [3]
        assert seen(list_images("~/mine")) == [4]
        assert seen(list_images(tmp_path / "home")) == [4]
        assert seen(list_images("../home/mine")) == [4]
    assert seen(list_images("pets/../pets")) == [1]
    monkeypatch.chdir(tmp_path / "here/own")
    assert seen(list_images(".")) == [3]
    assert seen(list_images("../own/.")) == [3]
    assert find_source("cifar10") == "uoft-cs/cifar10"
    (tmp_path / "data/cifar10").mkdir()
    assert find_source("cifar10") == str(tmp_path / "data/cifar10")
    monkeypatch.setenv("FTCL_DATA", str(tmp_path / "data/9.png"))
    assert "$FTCL_DATA is" in refusal(list_images, "pets")
    assert seen(list_images(".")) == [3]


@pytest.mark.parametrize(
    "name",
    [
        None,
        3,
        2.5,
        b"pets",
        ["pets"],
        "",
        "x\0y",
        "a" * 5000,
        "/",
        "//",
        "~nobody/x",
        "a/b/c",
        "a b",
    ],
)
def test_what_is_no_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (None, str(tmp_path)):
        if data:
            monkeypatch.setenv("FTCL_DATA", data)
        assert refusal(list_images, name).startswith("dataset ")
        assert refusal(split_names, name).startswith("dataset ")


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    write(tmp_path, "1.png", "pets.zip")
    monkeypatch.chdir(tmp_path)
    for name in ("1.png", "pets.zip", str(tmp_path / "1.png")):
        assert "is a file, but must be a folder" in refusal(list_images, name)


def test_hints_know_further_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Did you mean 'shapes'?" in refusal(list_images, "shaps", known=["shapes"])
    (tmp_path / "flowers").mkdir()
    monkeypatch.setenv("FTCL_DATA", str(tmp_path))
    assert "Did you mean 'flowers'?" in refusal(list_images, "flower")


# Pixels


def decoded(image, kind="PNG", **options):
    data = image if isinstance(image, bytes) else encoded(image, kind, **options)
    return decode_image(dict(bytes=data, path=None), "birds/train image 3")


def rgb(image, kind="PNG", at=(0, 0), **options):
    return decoded(image, kind, **options).getpixel(at)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, *more):
    "A PNG by hand: `rows` are the bytes of its pixels"
    step = len(rows) // height
    lines = b"".join(b"\0" + rows[i * step : (i + 1) * step] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(width, height, tags, pixels):
    "A TIFF by hand: tags number -> (type, values), pixels as they lie in the file"
    tags = {256: (3, [width]), 257: (3, [height]), 259: (3, [1]), 278: (3, [height])} | tags
    tags |= {273: (4, [0]), 279: (4, [len(pixels)])}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = (4, [start])
    entries = b""
    for number in sorted(tags):
        kind, values = tags[number]
        data = struct.pack(f"<{len(values)}{'HI'[kind - 3]}", *values)
        assert len(data) <= 4
        entries += struct.pack("<HHI", number, kind, len(values)) + data.ljust(4, b"\0")
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + pixels


def test_modes_become_three_colours():
    red = Image.new("RGB", (4, 4), (200, 30, 30))
    assert rgb(red) == (200, 30, 30)
    assert rgb(red.convert("P", palette=Image.Palette.ADAPTIVE)) == (200, 30, 30)
    assert rgb(grey(7)) == (7, 7, 7)
    assert rgb(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    assert rgb(red.convert("CMYK"), "TIFF") == (200, 30, 30)
    if int(PIL.__version__.split(".")[0]) >= 12:  # earlier versions cannot read what they write
        assert rgb(red.convert("YCbCr"), "TIFF") == pytest.approx((200, 30, 30), abs=2)
    assert rgb(red.convert("CMYK"), "JPEG", quality=100) == pytest.approx((200, 30, 30), abs=4)
    lab = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in (255, 128, 128)])
    assert rgb(lab, "TIFF") == pytest.approx((255, 255, 255), abs=3)
    assert rgb(png(2, 1, 2, 0, b"\x60")) == (85, 85, 85)  # two bits: 01, 10
    assert rgb(png(2, 1, 4, 0, b"\x1f"), at=(1, 0)) == (255, 255, 255)


def test_transparent_pixels_are_white_paper():
    red = (200, 0, 0)
    assert rgb(Image.new("RGBA", (2, 2), (*red, 0))) == (255, 255, 255)
    assert rgb(Image.new("RGBA", (2, 2), (*red, 255))) == red
    assert rgb(Image.new("RGBA", (2, 2), (*red, 128))) == (227, 127, 127)
    assert rgb(Image.new("LA", (2, 2), (0, 51))) == (204, 204, 204)
    assert (
        rgb(Image.new("RGBA", (2, 2), (*red, 0)), "WEBP", lossless=True, exact=True) == (255,) * 3
    )
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        image = decoded(palette, kind, transparency=0)
        assert [image.getpixel((i, 0)) for i in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
    image = decoded(palette, transparency=bytes([255, 0]))
    assert [image.getpixel((i, 0)) for i in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    assert rgb(Image.new("RGB", (2, 2), red), transparency=red) == (255, 255, 255)
    assert rgb(Image.new("RGB", (2, 2), red), transparency=(0, 0, 0)) == red
    assert rgb(grey(9), transparency=9) == (255, 255, 255)
    assert rgb(grey(8), transparency=9) == (8, 8, 8)


def test_a_transparent_colour_of_few_or_many_bits():
    "PNG gives it in the bits of the file"
    for depth, row, clear in ((1, b"\x40", 1), (2, b"\x60", 1), (4, b"\x1f", 1)):
        image = decoded(png(2, 1, depth, 0, row, chunk(b"tRNS", struct.pack(">H", clear))))
        colours = [image.getpixel((i, 0))[0] for i in (0, 1)]
        wanted = {1: [0, 255], 2: [255, 170], 4: [255, 255]}[depth]
        assert colours == wanted, depth
    row = struct.pack(">HH", 1000, 30000)
    image = decoded(png(2, 1, 16, 0, row, chunk(b"tRNS", struct.pack(">H", 1000))))
    assert [image.getpixel((i, 0))[0] for i in (0, 1)] == [255, 117]
    row = struct.pack(">6H", 5000, 0, 0, 40000, 0, 0)
    image = decoded(png(2, 1, 16, 2, row, chunk(b"tRNS", struct.pack(">3H", 5000, 0, 0))))
    assert [image.getpixel((i, 0)) for i in (0, 1)] == [(255, 255, 255), (156, 0, 0)]


def test_multiplied_opacity():
    "A TIFF may keep colours that are already multiplied by their opacity"
    tags = {258: (3, [8, 8]), 262: (3, [1]), 277: (3, [2]), 338: (3, [1])}
    try:
        assert rgb(tiff(1, 1, tags, bytes([0, 0]))) == (255, 255, 255)
    except InputError as e:  # grey of this kind is unknown to earlier versions of pillow
        assert int(PIL.__version__.split(".")[0]) < 12 and "of a kind" in str(e)
        return
    assert rgb(tiff(1, 1, tags, bytes([64, 128]))) == pytest.approx((191,) * 3, abs=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey(kind):
    values = np.array([[0, 128, 129, 257, 32767, 32768, 65407, 65535]], np.uint16)
    image = decoded(Image.fromarray(values), kind)
    assert [image.getpixel((i, 0))[0] for i in range(8)] == [0, 0, 1, 1, 127, 128, 255, 255]


def test_other_whole_numbers():
    tags = {258: (3, [16]), 262: (3, [1]), 277: (3, [1])}
    assert rgb(b"MM" + b"".join(_big_endian(1, 1, 16, struct.pack(">H", 32768)))) == (128,) * 3
    assert rgb(tiff(1, 1, tags, struct.pack("<H", 65535))) == (255,) * 3
    assert rgb(Image.new("I", (2, 2), 65535), "TIFF") == (255,) * 3
    for value in (-1, 65536, 2**31 - 1):
        sentence = refusal(rgb, Image.new("I", (2, 2), value), "TIFF")
        assert f"{value} to {value}, but must lie in 0 to 65535" in sentence
    signed = tags | {339: (3, [2])}
    assert "-2 to -2" in refusal(rgb, tiff(1, 1, signed, struct.pack("<h", -2)))
    assert "floating-point" in refusal(rgb, Image.new("F", (2, 2), 0.5), "TIFF")
    negative = tags | {262: (3, [0])}  # white is zero
    image = decoded(tiff(3, 1, negative, struct.pack("<3H", 0, 65535, 16384)))
    assert [image.getpixel((i, 0))[0] for i in range(3)] == [255, 0, 191]
    signed_bytes = tags | {258: (3, [8]), 339: (3, [2])}
    assert "signed" in refusal(rgb, tiff(1, 1, signed_bytes, b"\xff"))
    twelve = tags | {258: (3, [12])}
    image = decoded(tiff(2, 1, twelve, bytes([0xFF, 0xF8, 0x00])))  # 4095, 2048
    assert [image.getpixel((i, 0))[0] for i in (0, 1)] == [255, 128]
    assert rgb(b"P5 1 1 4095\n" + struct.pack(">H", 4095)) == (255,) * 3
    assert rgb(png(1, 1, 16, 2, struct.pack(">3H", 65535, 32768, 0))) == (255, 128, 0)


def _big_endian(width, height, bits, pixels):
    "What follows `MM` in a grey TIFF whose numbers begin with their upper byte"
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 12 * 9 + 4}
    tags |= {277: 1, 278: height, 279: len(pixels)}
    yield b"\0*\0\0\0\x08" + struct.pack(">H", len(tags))
    for number in sorted(tags):
        yield struct.pack(">HHIHH", number, 3, 1, tags[number], 0)
    yield b"\0" * 4 + pixels


def write_sixteen(folder, largest):
    folder.mkdir()
    for i, value in enumerate(largest):
        pixels = np.linspace(0, value, 16).astype(np.uint16).reshape(4, 4)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def test_twelve_bits_in_sixteen_are_said(tmp_path):
    "The brightest of a sample, its value and what to do; nothing where the values are in order"
    note = list_images(write_sixteen(tmp_path / "a", [100, 4095, 2000])).note
    for part in ("image 1", "001.png", "up to 4095", "16 of 256 shades", "by 16", "12 bits"):
        assert part in note
    assert "by 64" in list_images(write_sixteen(tmp_path / "b", [1023] * 40)).note
    assert "by 4 " in list_images(write_sixteen(tmp_path / "c", [16383])).note
    assert list_images(write_sixteen(tmp_path / "d", [16384, 100])).note == ""
    assert list_images(write_sixteen(tmp_path / "e", [0, 0])).note == ""
    hot = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    hot[3, 5] = 65535  # one pixel of the camera is broken
    (tmp_path / "hot").mkdir()
    Image.fromarray(hot).save(tmp_path / "hot" / "1.png")
    assert "by 16" in list_images(tmp_path / "hot").note
    colour = tmp_path / "f"
    colour.mkdir()
    (colour / "1.png").write_bytes(png(1, 1, 16, 2, struct.pack(">3H", 4095, 0, 7)))
    assert "up to 4095" in list_images(colour).note and "by 16" in list_images(colour).note
    assert list_images(write(tmp_path / "g", "1.png")).note == ""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_upright(orientation, kind):
    "The corner that is bright lies where the note about the camera says"
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255  # upper left in the file
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if kind == "WEBP" else {}
    data = encoded(Image.fromarray(pixels), kind, exif=exif, **options)
    image = decoded(data)
    size = (32, 16) if orientation < 5 else (16, 32)
    assert image.size == size
    assert image_size(dict(bytes=data, path=None), "") == size
    right = orientation in (2, 3, 6, 7)
    low = orientation in (3, 4, 7, 8)
    corner = (size[0] - 3 if right else 2, size[1] - 3 if low else 2)
    assert image.getpixel(corner)[0] > 200
    assert np.asarray(image)[..., 0].mean() == pytest.approx(255 / 8, abs=4)


def test_a_damaged_note_about_the_camera_is_ignored():
    good = encoded(
        Image.new("RGB", (32, 16), (200, 0, 0)), "JPEG", exif=b"Exif\0\0" + b"II*\0\x08\0\0\0"
    )
    for damage in (
        b"",
        b"xx",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"MM\0*" + b"\0" * 20,
    ):
        exif = b"Exif\0\0" + damage
        data = encoded(Image.new("RGB", (32, 16), (200, 0, 0)), "JPEG", exif=exif)
        assert decoded(data).size == (32, 16)
        assert image_size(dict(bytes=data, path=None), "") == (32, 16)
    for value in (b"\0\0", b"\x09\0", b"\xff\xff"):
        entry = struct.pack("<HHHI", 1, 0x0112, 3, 1) + value + b"\0\0" + b"\0" * 4
        data = encoded(Image.new("RGB", (32, 16)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + entry)
        assert decoded(data).size == (32, 16)
    assert decoded(good).size == (32, 16)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_of_several_images_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(1, 4)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert rgb(data) == pytest.approx((60, 0, 0), abs=2)


def test_the_content_decides_not_the_ending(tmp_path):
    (tmp_path / "1.jpg").write_bytes(encoded(grey(9)))
    (tmp_path / "2.png").write_bytes(b"GIF87a of a cat")
    (tmp_path / "3.png").touch()
    (tmp_path / "4.png").write_bytes(encoded(Image.effect_noise((64, 64), 50))[:900])
    (tmp_path / "5.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    listing = list_images(tmp_path)
    assert decode_image(listing.items[0], "a").getpixel((0, 0)) == (9, 9, 9)
    wanted = {1: "2.png", 2: "is empty", 3: "4.png", 4: "of a kind"}
    for i, part in wanted.items():
        assert part in refusal(decode_image, listing.items[i], f"a image {i}")
    os.remove(tmp_path / "1.jpg")
    sentence = refusal(decode_image, listing.items[0], "a image 0")
    assert "a image 0" in sentence and "1.jpg" in sentence and "No such file" in sentence
    for item in (None, dict(bytes=None, path=None)):
        assert refusal(decode_image, item, "a row 7") == "a row 7 is missing: remove its row."
    assert "cannot be read" in refusal(decode_image, dict(bytes=None, path="a\0b"), "a")
    assert "cannot be read" in refusal(decode_image, dict(bytes=None, path=str(tmp_path)), "a")


def test_images_that_would_fill_memory_are_refused(monkeypatch):
    bomb = png(60_000, 60_000, 1, 0, b"\0" * 60_000)
    assert "has more than 178,956,970 pixels" in refusal(decoded, bomb)
    assert "has more than" in refusal(image_size, dict(bytes=bomb, path=None), "bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(grey(1)).size == (2, 2)  # large, not too large: no word


def every_kind():
    "Images of all formats and several modes"
    noise = Image.effect_noise((24, 24), 60)
    colour = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)])
    clear = colour.copy()
    clear.putalpha(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield encoded(colour, "JPEG", exif=exif)
    yield encoded(colour.convert("CMYK"), "JPEG")
    yield encoded(colour, "JPEG", progressive=True)
    for image in (
        noise,
        colour,
        clear,
        colour.convert("P"),
        noise.convert("1"),
        noise.convert("LA"),
    ):
        yield encoded(image, "PNG", exif=exif)
    yield encoded(Image.fromarray(np.asarray(noise).astype(np.uint16) * 200), "PNG")
    yield encoded(colour, "PNG", save_all=True, append_images=[noise.convert("RGB")])
    for compression in (None, "tiff_lzw", "tiff_deflate", "jpeg"):
        yield encoded(colour, "TIFF", compression=compression, exif=exif)
    yield encoded(clear, "TIFF")
    yield encoded(Image.fromarray(np.asarray(noise).astype(np.int32)), "TIFF")
    yield encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(9)], transparency=3)
    yield encoded(colour, "BMP")
    yield encoded(colour, "PPM")
    yield encoded(clear, "WEBP", exif=exif)
    for kind in ("JPEG2000", "AVIF"):
        if kind in Image.SAVE:
            yield encoded(clear, kind)


Image.init()
KINDS = list(every_kind())


def mutated(data, changes):
    "Bytes that were changed, cut out or repeated, each (place in 0 .. 1, how, value)"
    data = bytearray(data)
    for place, how, value in changes:
        i = int(place * max(len(data) - 1, 0))
        if how == "set":
            data[i : i + 1] = bytes([value])
        elif how == "cut":
            del data[i : i + value]
        elif how == "end":
            del data[i:]
        elif how == "head" and len(data) > 60:
            data[int(place * 60)] = value
        else:
            data[i:i] = data[i : i + value]
    return bytes(data)


HOW = st.sampled_from(["set", "cut", "end", "head", "twice"])
CHANGES = st.lists(st.tuples(st.floats(0, 1), HOW, st.integers(0, 255)), min_size=1, max_size=4)


@FEW
@given(st.sampled_from(KINDS), CHANGES)
def test_a_damaged_image_is_read_or_refused(data, changes):
    item = dict(bytes=mutated(data, changes), path=None)
    for function in (decode_image, image_size):
        try:
            out = function(item, "birds/train image 3")
        except InputError as e:
            assert "birds/train image 3" in str(e) and "\n" not in str(e)
            assert "object at 0x" not in str(e)
            continue
        assert function is image_size or out.mode == "RGB"


# Tables


def item(value):
    return dict(bytes=encoded(grey(value)), path=None)


def table(path, features=None, **columns):
    "A Parquet file of columns as `datasets` writes it; `image` is made where it lacks"
    if "image" not in columns:
        n = len(next(iter(columns.values())))
        columns = dict(image=[item(i) for i in range(n)]) | columns
    known = dict(image=datasets.Image()) | (features or {})
    known = {name: known.get(name, Value("int64")) for name in columns}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files._quiet():
        Dataset.from_dict(columns, features=Features(known)).to_parquet(str(path))
    return path.parent


def foreign(path, **columns):
    "A Parquet file that `datasets` has never seen"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path.parent


PETS = dict(label=ClassLabel(names=["cat", "dog"]))


def test_a_table_and_a_folder_give_the_same(tmp_path):
    folder = write(tmp_path / "folder", "train/cat/0.png", "train/dog/1.png", "test/dog/2.png")
    boxes = table(tmp_path / "boxes/train.parquet", PETS, label=[0, 1])
    table(tmp_path / "boxes/test.parquet", PETS, image=[item(2)], label=[1])
    for split in ("train", "test"):
        one, other = list_images(folder, split), list_images(boxes, split)
        assert seen(one) == seen(other) and labels(one) == labels(other)
        assert one.classes == other.classes == ["cat", "dog"]
        assert one.note == other.note == ""
    copy = pickle.loads(pickle.dumps(other))
    assert seen(copy) == [2]
    assert split_names(boxes) == ["train", "test"]


SPLITS = {
    "train-00000-of-00001 test-00000-of-00001": dict(train=[0], test=[1]),
    "data/train-00000-of-00002-ab12 data/train-00001-of-00002-cd34": dict(train=[0, 1]),
    "Train Test": dict(train=[0], test=[1]),
    "train/0000 train/0001 validation/0000": dict(train=[0, 1], test=[2], val=[2]),
    "default/train/0000 default/test/0000": dict(train=[0], test=[1]),
    "train-0 train-1 test_0": dict(train=[0, 1], test=[2]),
    "my_train my_test": "'my_test.parquet', whose split nobody can know",
    "train2014 steam-train": dict(train=[1, 0]),
    "a b": dict(train=[0, 1]),
    "part-0 test/part-1": "'part-0.parquet' is not",
    "train steam-train": "'steam-train.parquet' is not",
    "unsupervised-00000-of-00001 train-00000-of-00001": dict(train=[1], unsupervised=[0]),
    "test-set-00000-of-00001 train": {"train": [1], "test-set": [0]},
    "coarse/train fine/train": "one split twice",
    "train train-00000-of-00001": "one split twice",
    "train-00000-of-00001 train-00000-of-00002": "one split twice",
    "val validation": "one split twice",
}


@pytest.mark.parametrize("names", SPLITS)
def test_the_split_is_in_the_name_of_the_file(names, tmp_path):
    "And never in a part of a word"
    for i, name in enumerate(names.split()):
        table(tmp_path / f"{name}.parquet", PETS, image=[item(i)], label=[0])
    write(tmp_path, "README.md")
    wanted = SPLITS[names]
    if isinstance(wanted, str):
        assert wanted in refusal(list_images, tmp_path)
        return
    for split, greys in wanted.items():
        assert seen(list_images(tmp_path, split)) == greys
    assert set(split_names(tmp_path)) == {
        "validation" if "val" in wanted and o == "test" else o for o in wanted
    } - {"val"}
    if "test" not in wanted:
        assert "no test split" in refusal(list_images, tmp_path, "test")


def test_a_missing_part_is_said(tmp_path):
    table(tmp_path / "train-00001-of-00003.parquet", PETS, label=[0])
    assert "1 of 3 files are there" in list_images(tmp_path).note
    table(tmp_path / "b/x.parquet", PETS, label=[0])
    table(tmp_path / "b/val2014.parquet", PETS, label=[0])
    assert "all 2 are read as train" in list_images(tmp_path / "b").note


def test_links_to_tables(tmp_path):
    "A snapshot of the hub: names in one folder, contents in another"
    table(tmp_path / "blobs/0a1b.parquet", PETS, image=[item(5)], label=[1])
    (tmp_path / "snapshot/data").mkdir(parents=True)
    os.symlink("../../blobs/0a1b.parquet", tmp_path / "snapshot/data/train-00000-of-00001.parquet")
    write(tmp_path / "snapshot", "README.md", ".gitattributes")
    assert seen(list_images(tmp_path / "snapshot")) == [5]


@pytest.mark.parametrize("name", NAMES)
def test_tables_in_folders_of_any_name(name, tmp_path):
    "But two, which `datasets` cannot open"
    table(tmp_path / "plain/train.parquet", PETS, image=[item(5)], label=[1])
    os.rename(tmp_path / "plain", tmp_path / name)
    if "::" in name or "\udcff" in name:
        assert "has '::' or bytes that are no text in its path" in refusal(
            list_images, tmp_path / name
        )
        return
    assert seen(list_images(tmp_path / name)) == [5]


def test_a_changed_table_is_read_anew(tmp_path):
    for value in (5, 6):
        table(tmp_path / "train.parquet", PETS, image=[item(value)], label=[1])
        assert seen(list_images(tmp_path)) == [value]


def test_which_column_has_the_labels(tmp_path):
    kinds = dict(fine=ClassLabel(names=["cat", "dog"]), coarse=ClassLabel(names=["pet"]))
    two = table(tmp_path / "two/train.parquet", kinds, coarse=[0, 0], fine=[0, 1])
    sentence = refusal(list_images, two)
    assert "`label_column` to one of" in sentence and "coarse, fine, none" in sentence
    assert labels(list_images(two, label_column="fine")) == [0, 1]
    assert list_images(two, label_column="coarse").classes == ["pet"]
    assert labels(list_images(two, label_column="none")) is None
    assert "Did you mean 'fine'?" in refusal(list_images, two, label_column="fin")
    for wrong in (3, ["fine"], "image"):
        assert "label_column is" in refusal(list_images, two, label_column=wrong)
    bare = table(tmp_path / "bare/train.parquet", other=[5, 6])
    assert (labels(list_images(bare)), list_images(bare).classes) == (None, None)
    for name in ("label", "labels", "Label"):
        plain = table(tmp_path / f"plain{name}/train.parquet", **{name: [1, 0, 1]})
        assert f"one of {name}, none" in refusal(list_images, plain)
        listing = list_images(plain, label_column=name)
        assert (labels(listing), listing.classes) == ([1, 0, 1], ["0", "1"])
        assert labels(list_images(plain, label_column="none")) is None


def test_which_column_has_the_images(tmp_path):
    kinds = dict(image=datasets.Image(), mask=datasets.Image())
    two = table(tmp_path / "two/train.parquet", kinds, image=[item(1)], mask=[item(2)])
    assert "`image_column`" in refusal(list_images, two) and "image, mask" in refusal(
        list_images, two
    )
    assert seen(list_images(two, image_column="mask")) == [2]
    assert "Did you mean 'mask'?" in refusal(list_images, two, image_column="mas")
    assert "image_column is 7" in refusal(list_images, two, image_column=7)
    data = pa.array([item(3)["bytes"]], pa.binary())
    raw = foreign(tmp_path / "raw/train.parquet", picture=data, n=[4])
    assert "holds images in picture: set `image_column`" in refusal(list_images, raw)
    assert seen(list_images(raw, image_column="picture")) == [3]
    assert "holds no images" in refusal(list_images, raw, image_column="n")
    large = foreign(tmp_path / "large/train.parquet", picture=data.cast(pa.large_binary()))
    assert seen(list_images(large, image_column="picture")) == [3]
    struct = foreign(tmp_path / "struct/train.parquet", picture=[item(4)], n=[4])
    assert seen(list_images(struct, image_column="picture")) == [4]
    nothing = foreign(tmp_path / "nothing/train.parquet", a=[[1, 2]], b=["x.png"])
    assert "no column of images, only 'a', 'b'" in refusal(list_images, nothing)


def test_a_path_in_a_table_is_never_opened(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(grey(5)))
    path = str(tmp_path / "secret.png")
    rows = [item(1), dict(bytes=None, path=path)]
    kind = pa.struct(dict(bytes=pa.binary(), path=pa.string()))
    for i, image in enumerate([rows, [dict(bytes=None, path=path)] * 2, [rows[0], None]]):
        folder = foreign(tmp_path / f"{i}/train.parquet", image=pa.array(image, kind))
        sentence = refusal(list_images, folder, image_column="image")
        assert f"row {0 if i == 1 else 1} of" in sentence and "holds no bytes" in sentence
    with files._quiet():
        said = Dataset.from_dict(dict(image=rows), features=Features(image=datasets.Image()))
        pq.write_table(said.data.table, tmp_path / "train.parquet")
    os.remove(tmp_path / "secret.png")
    for folder in range(3):
        for file in (tmp_path / str(folder)).iterdir():
            os.remove(file)
    assert "row 1 of" in refusal(list_images, tmp_path)


def test_a_path_within_the_bytes_is_a_name_alone(tmp_path):
    kind = pa.struct(dict(bytes=pa.binary(), path=pa.string()))
    image = pa.array([dict(item(7), path=__file__)], kind)
    folder = foreign(tmp_path / "train.parquet", image=image)
    listing = list_images(folder, image_column="image")
    assert seen(listing) == [7]
    broken = dict(listing.items[0], bytes=b"no image")
    assert "test_files.py" in refusal(decode_image, broken, "row 0")


def test_classes_are_matched_by_name(tmp_path):
    "Between train and test, whatever their order"
    table(tmp_path / "train.parquet", PETS, label=[0, 1, 1])
    swapped = dict(label=ClassLabel(names=["dog", "cow", "cat"]))
    table(tmp_path / "test.parquet", swapped, label=[0, 2])
    listing = list_images(tmp_path, "test")
    assert (labels(listing), listing.classes) == ([1, 0], ["cat", "dog"])
    table(tmp_path / "test.parquet", swapped, label=[0, 1])
    assert "class 'cow'" in refusal(list_images, tmp_path, "test")


def test_files_of_one_split_must_agree(tmp_path):
    table(tmp_path / "train-00000-of-00002.parquet", PETS, label=[0])
    swapped = dict(label=ClassLabel(names=["dog", "cat"]))
    table(tmp_path / "train-00001-of-00002.parquet", swapped, label=[0])
    assert "disagree about the column 'label'" in refusal(list_images, tmp_path)
    assert seen(list_images(tmp_path, label_column="none")) == [0, 0]


def test_words_and_numbers_as_labels(tmp_path):
    kind = dict(name=Value("string"))
    words = table(tmp_path / "words/train.parquet", kind, name=["dog", "cat", "ant"])
    table(tmp_path / "words/test.parquet", kind, name=["dog", "cat"])
    listing = list_images(words, label_column="name")
    assert (labels(listing), listing.classes) == ([2, 1, 0], ["ant", "cat", "dog"])
    listing = list_images(words, "test", label_column="name")
    assert (labels(listing), listing.classes) == ([2, 1], ["ant", "cat", "dog"])
    table(tmp_path / "words/test.parquet", kind, name=["cow"])
    assert "class 'cow'" in refusal(list_images, words, "test", label_column="name")
    numbers = table(tmp_path / "numbers/train.parquet", n=[2, 0, 1, 2])
    table(tmp_path / "numbers/test.parquet", n=[2])
    assert labels(list_images(numbers, label_column="n")) == [2, 0, 1, 2]
    listing = list_images(numbers, "test", label_column="n")
    assert (labels(listing), listing.classes) == ([2], ["0", "1", "2"])
    table(tmp_path / "numbers/test.parquet", n=[3])
    assert "class 3" in refusal(list_images, numbers, "test", label_column="n")
    for wrong, part in (([1, 2], "without 0"), ([0, 2], "without 1"), ([0, -3], "label -3")):
        folder = table(tmp_path / f"gap{wrong[1]}{wrong[0]}/train.parquet", n=wrong)
        assert part in refusal(list_images, folder, label_column="n")
    category = pa.array(["b", "a", "b"]).dictionary_encode()
    images = pa.array([item(i)["bytes"] for i in range(3)])
    folder = foreign(tmp_path / "category/train.parquet", image=images, kind=category)
    listing = list_images(folder, image_column="image", label_column="kind")
    assert (labels(listing), listing.classes) == ([1, 0, 1], ["a", "b"])


@pytest.mark.parametrize(
    "values", [[0.5, 1.0], [True, False], [[0], [1]], [b"a", b"b"], [dict(a=1), dict(a=2)]]
)
def test_labels_of_other_types_are_refused(values, tmp_path):
    images = pa.array([item(i)["bytes"] for i in range(2)])
    folder = foreign(tmp_path / "train.parquet", image=images, kind=pa.array(values))
    sentence = refusal(list_images, folder, image_column="image", label_column="kind")
    assert "label_column is 'kind'" in sentence and "not whole numbers or words" in sentence


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.uint8(), pa.uint64(), pa.int64()])
def test_labels_of_any_width(kind, tmp_path):
    images = pa.array([item(i)["bytes"] for i in range(3)])
    folder = foreign(tmp_path / "train.parquet", image=images, kind=pa.array([1, 0, 1], kind))
    assert labels(list_images(folder, image_column="image", label_column="kind")) == [1, 0, 1]


def test_labels_that_mean_nothing_are_refused_by_row(tmp_path):
    "All of them -1 or missing: the split has no labels"
    beyond = table(tmp_path / "a/train.parquet", PETS, label=[0, 1, 0])
    wrong = {"-1": [0, -1, 0], "7": [0, 7, 0], "None": [0, None, 0]}
    for name, values in wrong.items():
        schema = pq.read_schema(beyond / "train.parquet")
        images = pq.read_table(beyond / "train.parquet")["image"]
        columns = [images, pa.array(values, pa.int64())]
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), folder / "train.parquet")
        assert "row 1 of" in refusal(list_images, folder)
        assert ("has no label" if name == "None" else f"label {name}") in refusal(
            list_images, folder
        )
        assert seen(list_images(folder, label_column="none")) == [0, 1, 2]
    for i, values in enumerate(([-1, -1], [None, None])):
        folder = table(tmp_path / f"b{i}/train.parquet", PETS, label=values)
        listing = list_images(folder)
        assert (labels(listing), listing.classes, seen(listing)) == (None, None, [0, 1])
        assert "no labels: the column 'label'" in listing.note
    table(tmp_path / "b0/test.parquet", PETS, label=[1, 0])
    assert labels(list_images(tmp_path / "b0", "test")) == [1, 0]


def test_damaged_tables_are_refused(tmp_path):
    good = table(tmp_path / "good/train.parquet", PETS, label=[0, 1])
    data = (good / "train.parquet").read_bytes()
    damaged = dict(
        cut=data[:-20],
        begun=data[:200],
        empty=b"",
        foreign=b"PAR1 and no more PAR1",
        text=b"a,b\n1,2",
    )
    for name, content in damaged.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.parquet").write_bytes(content)
        sentence = refusal(list_images, tmp_path / name)
        assert "train.parquet" in sentence and "cannot be read as Parquet" in sentence
    none = table(tmp_path / "none/train.parquet", PETS, image=[], label=[])
    assert "has no rows" in refusal(list_images, none)
    schema = pq.read_schema(good / "train.parquet")
    for i, said in enumerate(
        (b"{", b"[]", b'{"info": {"features": {"label": {"_type": "Evil"}}}}')
    ):
        (tmp_path / f"said{i}").mkdir()
        rows = pq.read_table(good / "train.parquet").replace_schema_metadata({b"huggingface": said})
        pq.write_table(rows, tmp_path / f"said{i}" / "train.parquet")
        assert "set `image_column`" in refusal(list_images, tmp_path / f"said{i}")
    assert schema.metadata


TABLE = []


@settings(FEW, max_examples=60)
@given(CHANGES)
def test_a_damaged_table_is_read_or_refused(tmp_path_factory, changes):
    if not TABLE:
        folder = table(tmp_path_factory.mktemp("t") / "train.parquet", PETS, label=[0, 1, 0, 1])
        TABLE.append((folder / "train.parquet").read_bytes())
    folder = tmp_path_factory.mktemp("t")
    (folder / "train.parquet").write_bytes(mutated(TABLE[0], changes))
    try:
        listing = list_images(folder)
        for i, image in enumerate(listing.items):
            decode_image(image, f"image {i}")
    except InputError as e:
        assert "\n" not in str(e) and "object at 0x" not in str(e)


def on_the_hub(monkeypatch, **splits):
    monkeypatch.setattr(files, "_is_reached", lambda source: True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: list(splits))
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: splits[split])


def test_a_set_of_the_hub(monkeypatch, cache, tmp_path):
    "Its images are bytes, or files that `datasets` itself has unpacked; nothing else is opened"
    kinds = Features(img=datasets.Image(), label=PETS["label"])
    train = Dataset.from_dict(dict(img=[item(1), item(2)], label=[0, 1]), features=kinds)
    inside = write(cache / "downloads", "3.png")
    own = [dict(bytes=None, path=str(inside / "3.png"))]
    valid = Dataset.from_dict(dict(img=own, label=[1]), features=kinds)
    on_the_hub(monkeypatch, train=train, valid=valid, val=valid)
    listing = list_images("somebody/pets")
    assert (seen(listing), labels(listing)) == ([1, 2], [0, 1])
    assert listing.what == "somebody/pets (split train)" and listing.classes == ["cat", "dog"]
    assert seen(list_images("somebody/pets", "valid")) == [3]
    assert seen(list_images("somebody/pets", "test")) == [3]
    outside = [item(1), dict(bytes=None, path=str(write(tmp_path, "4.png") / "4.png"))]
    both = Dataset.from_dict(dict(img=outside, label=[1, 1]), features=kinds)
    on_the_hub(monkeypatch, train=both)
    assert "row 1 of somebody/pets (split train)" in refusal(list_images, "somebody/pets")
    assert split_names("somebody/pets") == ["train"]

    def fails(source, **_):
        raise ConnectionError(f"no network\n<Session object at 0x{id(source)}>")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fails)
    for f in (list_images, split_names):
        said = refusal(f, "somebody/pets")
        assert said.startswith("dataset 'somebody/pets' cannot be read: no network: check the spel")
        assert "Parquet files" in said and said.count("somebody/pets") == 1


def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch, cache):
    asked = []

    class Hub:
        def dataset_info(self, source, timeout):
            asked.append(source)
            raise self.answer

    def offline(source):
        asked.append(datasets.config.HF_HUB_OFFLINE)  # True: nothing is asked again and again
        raise ConnectionError(f"Couldn't reach '{source}' on the Hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    Hub.answer = OSError("no route")
    before = datasets.config.HF_HUB_OFFLINE
    said = refusal(list_images, "somebody/pets")
    assert asked == ["somebody/pets", True] and datasets.config.HF_HUB_OFFLINE == before
    assert said.count("somebody/pets") == 1 and said.count("\n") == 0
    for remedy in ("spelling", "network", "HF_HUB_OFFLINE", "a folder of images", "Parquet files"):
        assert remedy in said
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: ["train"])
    assert split_names("somebody/pets") == ["train"]  # a copy in the cache is enough
    Hub.answer = HfHubHTTPError.__new__(HfHubHTTPError)  # it answers that there is none

    def missing(source):
        assert datasets.config.HF_HUB_OFFLINE == before
        raise FileNotFoundError(f"Dataset '{source}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", missing)
    said = refusal(split_names, "somebody/pets")
    assert said.startswith("the data set cannot be read: Dataset 'somebody/pets' doesn't exist on")


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(DATA, "tiny-imagenet-100")), reason="no real images here"
)
def test_an_extracted_folder_equals_its_table(tmp_path, monkeypatch):
    "Half of the classes of the real set, a few images each"
    monkeypatch.setenv("FTCL_DATA", DATA)
    for split in ("train", "validation"):
        listing = list_images("tiny-imagenet-100", split)
        numbers = (listing.labels % 2 == 0).nonzero()[:600, 0].tolist()
        for i in numbers:
            name = listing.classes[listing.labels[i]]
            path = tmp_path / split / name / f"{i:06d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(listing.items[i]["bytes"])
        assert len(list((tmp_path / split).iterdir())) == 50
        folder = list_images(tmp_path, split)
        assert len(folder.items) == 600
        for image, label in zip(folder.items, folder.labels, strict=True):
            i = int(Path(image["path"]).stem)
            assert folder.classes[label] == listing.classes[listing.labels[i]]
            one = decode_image(image, folder.what)
            other = decode_image(listing.items[i], listing.what)
            assert one.tobytes() == other.tobytes() and one.size == (64, 64)
