"""What goes wrong with a user's files, generated; and what must come of it

An `Input` is some files, a call that reads them, and the judgement of what came out. Every input
ends in one of three ways: *right* (what a plain reference says), *one sentence* (an `InputError` on
one line, which names the file or the parameter), or *wrong* (all else: another exception, another
value, a warning, a file that changed, 20 seconds, a gigabyte). A reference uses nothing of what it
judges.
"""

import copy
import functools
import gc
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

from ftcl import checkpoint, core, data, encoder, files, record, scores, train

ROOT = Path(__file__).parent.parent
SECONDS = 20  # an input that takes longer hangs
MEMORY = 2**20  # kB that an input may add to the most that this process ever held
SPARE = Path(tempfile.gettempdir(), f"mutations-{os.getpid()}")  # of hypothesis and datasets


class Refused:
    "What a reader gave that raised `InputError`: its message"

    def __init__(self, text):
        self.text = text


class Input(NamedTuple):
    "One input of a reader"

    files: dict  # path below an empty folder: bytes; None: a folder; Path: a link to it; PIPE
    read: Callable  # called with the folder; what it returns is judged
    fits: Callable  # (what was read, or `Refused`; the folder) -> what is wrong, or empty text
    names: tuple  # one of these stands in every message
    writes: bool = False  # whether it may change files where it is not refused


PIPE = "pipe"  # whoever opens it to read waits for a writer


class Hung(BaseException):
    "An input took too long"


# ---- the judge


def sentence_problem(text, names):
    "What keeps a message from being one sentence about the thing; empty if nothing does"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"a message that cannot be printed: {text!r:.300}"
    if not text.isprintable():
        return f"a message of several lines, or of characters that do not print: {text!r:.300}"
    if re.search(r"0x[0-9a-f]{6,}|Traceback|\\x1b", text):
        return f"a message that shows the inside of a program: {text:.300}"
    if not 10 < len(text) <= 900 or text[-1] not in ".?":
        return f"a message that is no sentence: {text!r:.300}"
    return (
        "" if any(name in text for name in names) else f"the message names none of {names}: {text}"
    )


def unprintable(text):
    "What is wrong with the lines that a reader prints, as to what it left out"
    odd = [line for line in text.splitlines() if not line.isprintable() or len(line) > 900]
    return f"prints {odd[0]!r:.300}" if odd else ""


def contents(folder):
    "What lies in a folder, and when each file was written last"
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        folder_time = 0 if path.is_dir() else about.st_mtime_ns
        found[str(path)] = (about.st_mode, folder_time, 0 if path.is_dir() else about.st_size)
    return found


def write_files(made, folder):
    "The files of an input"
    for name, value in made.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if value is None:
            os.makedirs(path, exist_ok=True)
        elif isinstance(value, Path):
            os.symlink(value, path)
        elif value == PIPE:
            os.mkfifo(path)
        else:
            with open(path, "wb") as file:
                file.write(value)


def most_memory():
    "The most that this process ever held, in kB"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // 1024 if sys.platform == "darwin" else most


@contextmanager
def time_limit():
    "Raise `Hung` after some seconds"

    def stop(*_):
        raise Hung

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextmanager
def overheard():
    "A list of everything that is said on the way: warnings, and what anybody writes to stderr"
    said = []
    python_says = io.StringIO()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)  # as Python does by itself
        os.dup2(file.fileno(), 2)
        try:
            with redirect_stderr(python_says):
                yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        said += [str(w.message) for w in warned]
        said += [
            text for text in (python_says.getvalue(), file.read().decode(errors="replace")) if text
        ]


def outcome(case, folder):
    "What a reader gives, or the `InputError` it raises; anything else it raises goes through"
    try:
        return case.read(folder)
    except core.InputError as e:
        return Refused(str(e))


def judged(case, folder):
    "Message (empty if there was none), and what is wrong (empty if nothing is)"
    before = contents(folder)
    memory = most_memory()
    printed = io.StringIO()
    value = None
    problem = ""
    try:
        with overheard() as said, time_limit(), redirect_stdout(printed):
            value = outcome(case, folder)
    except Hung:
        problem = f"hangs for {SECONDS} seconds"
    except Exception as e:
        problem = f"{type(e).__name__}: {e}"
    if problem:
        return "", problem
    refused = isinstance(value, Refused)
    free = case.writes and not refused
    problems = [
        sentence_problem(value.text, case.names) if refused else "",
        f"says {said}" if said else "",
        "" if free or contents(folder) == before else "a file was made, changed or removed",
        "" if most_memory() - memory < MEMORY else "takes a gigabyte",
        unprintable(printed.getvalue()),
        case.fits(value, folder),
    ]
    text = value.text.replace(f"{folder}{os.sep}", "") if refused else ""
    return text, "; ".join(problem for problem in problems if problem)


def judge(case):
    "The same in a folder of its own, which is the current one meanwhile"
    here = os.getcwd()
    folder = Path(tempfile.mkdtemp(prefix="input-")).resolve()
    try:
        write_files(case.files, folder)
        os.chdir(folder)
        return judged(case, folder)
    finally:
        os.chdir(here)
        shutil.rmtree(folder)


def must_refuse(value, folder):
    "Nothing but one sentence will do"
    return "" if isinstance(value, Refused) else f"{core.shown(value, 200)} was accepted"


def equal_to(wanted, may_refuse=False):
    "Judges that it is this value, or, where that is allowed, one sentence"

    def fits(value, folder):
        if isinstance(value, Refused):
            return "" if may_refuse else f"refused: {value.text}"
        return "" if same(value, wanted) else f"gives {value!r:.300}, not {wanted!r:.300}"

    return fits


def same(a, b):
    "Whether two values are equal, with their types; NaN equals NaN"
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        )
    return a == b or (a != a and b != b)


# ---- damage


@st.composite
def place(draw, length):
    "A place in a file, often near its beginning or its end, where formats keep what matters"
    near = st.integers(0, min(length, 96))
    return draw(st.one_of(near, near.map(lambda n: length - n), st.integers(0, length)))


FOREIGN = [
    b"",
    b"\0" * 64,
    b"PAR1",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"II*\0",
    b"BM",
    b"P6 9 9 255\n",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"%!PS-Adobe",
    b"{}",
    b"\xef\xbb\xbf",
    b"\xff" * 64,
    b"\x80\x04K\x01.",
    b"PK\x03\x04",
    b"<svg/>",
    b"version https://git-lfs",
]


WORD = re.compile(rb"[A-Za-z_]{4}")  # somewhere in a name, most likely


def hurt(draw, old):
    "A file with one thing done to its bytes; a plain function, as hypothesis keeps arguments"
    at = draw(place(len(old)))
    end = min(len(old), at + draw(st.sampled_from([1, 2, 4, 8, 64, 1024])))
    kinds = ["bit", "letter", "byte", "cut", "out", "in", "again", "zero", "head"]
    kind = draw(st.sampled_from(kinds))
    words = [found.start() for found in WORD.finditer(old[: 2**16])]
    if kind == "letter" and words:
        at = words[draw(st.integers(0, len(words) - 1))] + draw(st.integers(0, 3))
    if kind in ("bit", "letter") and at < len(old):
        changed = bytes([old[at] ^ 1 << draw(st.integers(0, 7))])
        return old[:at] + changed + old[at + 1 :]
    if kind == "byte" and at < len(old):
        return old[:at] + bytes([draw(st.sampled_from([0, 1, 127, 128, 255]))]) + old[at + 1 :]
    if kind == "cut":
        return old[:at]
    if kind == "out":
        return old[:at] + old[end:]
    if kind == "in":
        return old[:at] + draw(st.binary(max_size=16)) + old[at:]
    if kind == "again":
        return old[:end] + old[at:]
    if kind == "zero":
        return old[:at] + bytes(end - at) + old[end:]
    head = draw(st.sampled_from(FOREIGN))
    return head + old[len(head) :]


@st.composite
def damaged(draw, old):
    "A file with one to three things done to its bytes"
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        old = hurt(draw, old)
    return old


LONG = 10**400
ODD = [
    None, True, False, 0, 1, -1, 3, 2**63, -(2**63) - 1, LONG, 0.0, -0.0, 0.5, 1.0, 1e308, -2.5,
    float("nan"), float("inf"), -float("inf"), 5e-324, "", "a", "true", "1", "1e-3", "nan", "None",
    " ", "a\nb", "\0", "../x", "/", "é", "\u202e", "\ud800", "x" * 5000, [], [1], ["a"], [[]], {},
    {"a": 1}, {"": {}}, [{"a": []}],
]  # fmt: skip
odd_values = st.sampled_from(ODD)


def paths_of(value, path=()):
    "The place of everything within a value of JSON"
    yield path
    if isinstance(value, (dict, list)):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in inside:
            yield from paths_of(item, (*path, key))


@st.composite
def changed_value(draw, old):
    "A value of JSON with one thing in it changed, removed, renamed, or put in addition"
    value = copy.deepcopy(old)
    path = draw(st.sampled_from(list(paths_of(value))))
    kind = draw(st.sampled_from(["change", "change", "remove", "rename", "add", "swap"]))
    if not path:
        return draw(odd_values) if kind == "change" else value
    outer = value
    for key in path[:-1]:
        outer = outer[key]
    key = path[-1]
    if kind == "remove":
        del outer[key]
    elif kind == "rename" and isinstance(outer, dict):
        outer[draw(st.sampled_from(["", "a", key.upper(), key + " ", "é\n"]))] = outer.pop(key)
    elif kind == "add" and isinstance(outer, dict):
        outer[draw(st.sampled_from(["new", "", "seed", "schema", "x\ny"]))] = draw(odd_values)
    elif kind == "swap":
        outer[key] = [outer[key]]
    else:
        outer[key] = draw(odd_values)
    return value


# ---- images


class Sample(NamedTuple):
    "An encoded image"

    name: str
    code: bytes
    pixels: np.ndarray | None  # (H, W, 3) what it shows; None: it may be refused
    tolerance: float  # mean difference that its format may make
    harmless: tuple  # (place, bytes): what may be put there without a change of meaning


def on_white(colours, alpha):
    "(H, W, 3) colours by (H, W) opacity, 0 to 255, on white paper"
    share = alpha[..., None] / 255
    return np.round(colours * share + 255 * (1 - share)).astype(np.uint8)


def grey(values):
    "(H, W) -> (H, W, 3)"
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


def chunk(kind, body):
    "A piece of a PNG"
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows, depth, colour, more=b""):
    "A PNG, by hand: rows (H, W, channels) of numbers of `depth` bits"
    height, width, channels = rows.shape
    lines = []
    for row in rows.reshape(height, -1):
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        lines.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big"))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(lines))
    parts = chunk(b"IHDR", head) + more + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def png_samples(rng):
    "PNGs of all depths that pillow does not write"
    text = chunk(b"tEXt", b"Comment\0hello")
    white16 = struct.pack(">H", 40000)
    samples = []
    for depth in (1, 2, 4, 8, 16):
        most = 2**depth - 1
        v = rng.integers(0, most + 1, (6, 7, 1))
        shown = grey(np.round(v[..., 0] * 255 / most))
        samples.append((f"PNG grey {depth}", png(v, depth, 0), shown))
    for depth in (8, 16):
        scale = 1 if depth == 8 else 257
        v = rng.integers(0, 2**depth, (6, 7, 4))
        eight = np.round(v / scale)
        samples.append((f"PNG RGB {depth}", png(v[..., :3], depth, 2), eight[..., :3]))
        samples.append(
            (f"PNG RGBA {depth}", png(v, depth, 6), on_white(eight[..., :3], eight[..., 3]))
        )
        two = on_white(grey(eight[..., 0]), eight[..., 3])
        samples.append((f"PNG LA {depth}", png(v[..., [0, 3]], depth, 4), two))
    v = np.full((6, 7, 1), 40000)
    v[2:] = 20000
    seen = grey(np.where(v[..., 0] == 40000, 255, np.round(v[..., 0] / 257)))
    samples.append(("PNG grey 16 with a clear value", png(v, 16, 0, chunk(b"tRNS", white16)), seen))
    for depth in (1, 2, 4, 8):
        v = np.array([[0, 1], [1, 0]])[..., None]
        more = chunk(b"tRNS", struct.pack(">H", 0))
        seen = grey(np.where(v[..., 0] == 0, 255, 255 // (2**depth - 1)))
        samples.append((f"PNG grey {depth} with a clear value", png(v, depth, 0, more), seen))
    for depth in (8, 16):
        v = np.array([[[1, 2, 3], [3, 2, 1]]]) * 257 ** (depth // 16)
        more = chunk(b"tRNS", struct.pack(">3H", *v[0, 0].tolist()))
        seen = np.array([[[255, 255, 255], [3, 2, 1]]])
        samples.append((f"PNG RGB {depth} with a clear colour", png(v, depth, 2, more), seen))
    table = rng.integers(0, 256, (4, 3), dtype=np.uint8)
    v = rng.integers(0, 4, (6, 7, 1))
    more = chunk(b"PLTE", table.tobytes())
    samples.append(("PNG palette", png(v, 2, 3, more), table[v[..., 0]]))
    clear = bytes([0, 100, 255, 255])
    seen = on_white(table[v[..., 0]], np.frombuffer(clear, np.uint8)[v[..., 0]])
    samples.append(("PNG clear palette", png(v, 2, 3, more + chunk(b"tRNS", clear)), seen))
    odd = chunk(b"PLTE", table[:2].tobytes())
    samples.append(("PNG beyond its palette", png(v, 2, 3, odd), None))
    return [Sample(*s, 1.01, ((33, text), (None, b"more"))) for s in samples]


def ppm_samples(rng):
    "PPMs of all kinds, by hand"
    bits = rng.integers(0, 2, (6, 7))
    small = rng.integers(0, 101, (6, 7))
    three = rng.integers(0, 256, (6, 7, 3))
    wide = rng.integers(0, 65536, (6, 7))

    def plain(kind, values, most=""):
        return f"{kind} 7 6 {most}\n".encode() + " ".join(map(str, values.ravel())).encode() + b"\n"

    samples = [
        ("P1", plain("P1", bits), grey(255 * (1 - bits))),
        ("P2", plain("P2", small, 100), grey(np.round(small * 255 / 100))),
        ("P3", plain("P3", three, 255), three),
        ("P5", b"P5 7 6 100\n" + small.astype(np.uint8).tobytes(), grey(np.round(small * 2.55))),
        ("P5 16", b"P5 7 6 65535\n" + wide.astype(">u2").tobytes(), grey(np.round(wide / 257))),
        ("P6", b"P6 7 6 255\n" + three.astype(np.uint8).tobytes(), three),
        ("Pf", b"Pf 7 6 -1.0\n" + np.zeros((6, 7), "<f4").tobytes(), None),
    ]
    return [Sample(*s, 1.01, ((3, b"# a note\n"),)) for s in samples]


SAVED = {  # format: modes, and how to save
    "JPEG": ("L RGB CMYK", [dict(quality=95, subsampling=0), dict(quality=95, progressive=True)]),
    "GIF": ("1 L P", [{}]),
    "TIFF": ("1 L LA P RGB RGBA CMYK I;16 I F", [{}, dict(compression="tiff_lzw")]),
    "WEBP": ("RGB RGBA", [dict(lossless=True, exact=True), dict(quality=95)]),
    "BMP": ("1 L P RGB", [{}]),
    "JPEG2000": ("L RGB RGBA", [{}]),
    "AVIF": ("RGB RGBA", [dict(quality=95)]),
}


def smooth(rng, mode):
    "An image without edges, as pillow holds it, and what it shows"
    y, x = np.mgrid[:24, :20] / 24
    waves = [
        np.sin(rng.uniform(1, 4) * x + rng.uniform(1, 4) * y + rng.uniform(0, 6)) for _ in range(4)
    ]
    v = np.stack([127.5 + 120 * wave for wave in waves], 2).astype(np.uint8)  # (24, 20, 4)
    rgb = v[..., :3]
    if mode in ("I;16", "I", "F"):
        wide = v[..., 0].astype(int) * 257 + v[..., 1] % 3
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray(wide.astype(kind)), grey(np.round(wide / 257))
    if mode == "1":
        return Image.fromarray(v[..., 0] > 127), grey(255 * (v[..., 0] > 127))
    if mode == "L":
        return Image.fromarray(v[..., 0]), grey(v[..., 0])
    if mode == "LA":
        return Image.fromarray(v[..., :2], "LA"), on_white(grey(v[..., 0]), v[..., 1])
    if mode == "P":
        image = Image.fromarray(v[..., 0] // 16)
        image.putpalette(list(range(48)))
        table = np.arange(48, dtype=np.uint8).reshape(16, 3)
        return image, table[v[..., 0] // 16]
    if mode == "RGBA":
        return Image.fromarray(v), on_white(rgb, v[..., 3])
    if mode == "CMYK":
        return Image.fromarray(
            255 - np.dstack([rgb, np.full(rgb.shape[:2], 255)]).astype(np.uint8), "CMYK"
        ), rgb
    return Image.fromarray(rgb), rgb


def upright(pixels, orientation):
    "What is seen of an image that a camera wrote so: EXIF 2.32, table of Orientation"
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x.swapaxes(0, 1)[::-1],
    }
    return turns.get(orientation, turns[1])(pixels)


def saved(image, kind, **how):
    "An image as a file"
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


@functools.cache
def image_samples():
    "Valid images of all formats and modes"
    rng = np.random.default_rng(0)
    samples = png_samples(rng) + ppm_samples(rng)
    Image.init()
    for kind, (modes, ways) in SAVED.items():
        if kind not in Image.SAVE:
            continue  # this pillow was built without it
        lossy = 12 if kind in ("JPEG", "AVIF", "WEBP") else 2
        after = () if kind == "AVIF" else ((None, b"\0more"),)
        for mode in modes.split():
            for number, how in enumerate(ways):
                image, pixels = smooth(rng, mode)
                shown = None if mode == "F" else pixels
                code = saved(image, kind, **how)
                samples.append(Sample(f"{kind} {mode} {number}", code, shown, lossy, after))
    comment = b"\xff\xfe\0\x07hello"
    for orientation in range(10):
        for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
            image, pixels = smooth(rng, "RGB")
            exif = Image.Exif()
            exif[0x0112] = orientation
            code = saved(image, kind, exif=exif, **(dict(lossless=True) if kind == "WEBP" else {}))
            where = ((2, comment),) if kind == "JPEG" else ((None, b"more"),)
            name = f"{kind} turned {orientation}"
            samples.append(Sample(name, code, upright(pixels, orientation), 12, where))
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        first, pixels = smooth(rng, "L")
        code = saved(first, kind, save_all=True, append_images=[smooth(rng, "L")[0]])
        samples.append(Sample(f"{kind} of two", code, pixels, 12, ()))
    return samples


def read_image(folder):
    "Size by the header, and pixels"
    what = "pictures/train image 3"
    item = dict(bytes=None, path=str(folder / "it.img"))
    image = files.decode_image(item, what)
    embedded = dict(bytes=(folder / "it.img").read_bytes(), path=None)
    if files.decode_image(embedded, what).tobytes() != image.tobytes():
        raise ValueError("a file and its bytes show different pixels")
    return files.image_size(item, what), image.mode, np.asarray(image)


def plausible_image(value, folder):
    "A picture of the size that its header says"
    if isinstance(value, Refused):
        return ""
    size, mode, pixels = value
    width, height = size
    good = mode == "RGB" and pixels.dtype == np.uint8 and pixels.shape == (height, width, 3)
    return "" if good and width * height else f"gives {mode} {pixels.shape}, the header says {size}"


def shows(sample):
    "Judges that a picture shows what it should"

    def fits(value, folder):
        if isinstance(value, Refused):
            return f"{sample.name} refused: {value.text}"
        if problem := plausible_image(value, folder):
            return f"{sample.name}: {problem}"
        if value[2].shape != sample.pixels.shape:
            return f"{sample.name} has the shape {value[2].shape}, not {sample.pixels.shape}"
        off = np.abs(value[2].astype(int) - sample.pixels).mean()
        return "" if off <= sample.tolerance else f"{sample.name} is off by {off:.2f}"

    return fits


HUGE = [0, 1, 2**16 - 1, 12000, 20000, 2**31 - 1, 2**32 - 1]  # pixels of a side


def claiming(width, height):
    "Small files that claim to be large"
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    small = (width % 2**16, height % 2**16)
    bitmap = struct.pack("<IIiiHHIIIIII", 54, 40, width % 2**31, height % 2**31, 1, 24, *[0] * 6)
    return [
        b"\x89PNG\r\n\x1a\n" + head + body,
        f"P6 {width} {height} 255\n".encode() + bytes(1000),
        f"P2 {width} {height} 255\n".encode() + b"1 " * 500,
        b"BM" + struct.pack("<IHH", 1054, 0, 0) + bitmap + bytes(1000),
        b"GIF89a" + struct.pack("<HHBBB", *small, 0x80, 0, 0) + bytes(6) + b"," + bytes(4)
        + struct.pack("<HHB", *small, 0) + b"\x02\x02\x44\x01\0;",
    ]  # fmt: skip


@st.composite
def images(draw):
    "An image, whole, with something harmless added, cut, damaged, or said to be huge"
    sample = draw(st.sampled_from(image_samples()))
    code = sample.code
    kinds = ["whole", "harmless", "cut", "damaged", "damaged", "damaged", "damaged", "huge"]
    kind = draw(st.sampled_from(kinds))
    fits = plausible_image
    if kind == "damaged":
        code = draw(damaged(code))
    elif kind == "cut":
        code = code[: draw(st.integers(0, len(code) // 2))]
        fits = must_refuse
    elif kind == "huge":
        sides = draw(st.sampled_from(HUGE)), draw(st.sampled_from(HUGE))
        code = draw(st.sampled_from(claiming(*sides)))
    elif sample.pixels is not None:
        fits = shows(sample)
    if kind == "harmless" and sample.harmless:
        at, more = draw(st.sampled_from(sample.harmless))
        at = len(code) if at is None else at
        code = code[:at] + more + code[at:]
    return Input({"it.img": code}, read_image, fits, ("pictures/train image 3",))


# ---- folders

SPLIT_WORDS = ["train", "Train", "TRAIN", "val", "VAL", "validation", "Validation", "test", "Test"]
WORDS = [
    "cat", "dog", "a[b]", "x::y", "new\nline", "space d", "ü", "日本", "*", "?", "#1", "~", "-rf",
    "train2014", "training", "eval", "steam-train", "tests", "validate", "dev", "a.png", "e\u0301",
    "\udcff", "n" * 200, "0", "10", "Cat", "a=1", "$HOME", "%s", "{x}", "'", '"', "\\", "…",
]  # fmt: skip
IMAGES = [
    ".png",
    ".PNG",
    ".jpg",
    ".JPEG",
    ".gif",
    ".tif",
    ".TIFF",
    ".bmp",
    ".webp",
    ".ppm",
    ".avif",
]
OTHERS = ["Thumbs.db", "list.txt", "labels.csv", "x.npy", "png", "a.png.txt", "README", "a.json"]
HIDDEN = [".DS_Store", "._a.png", ".hidden.png", ".git", ".ipynb_checkpoints"]


def tiny(number):
    "An image that no other number has"
    return png(np.array([[[number % 256, number // 256 % 256, number // 65536]]]), 8, 2)


class Stop(Exception):
    "The reference refuses"


def images_below(folder, above=()):
    "Paths of all images, by the rule; links are followed"
    real = os.path.realpath(folder)
    if real in above:
        raise Stop
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from images_below(path, (*above, real))
        elif not os.path.exists(path):
            raise Stop
        elif os.path.isfile(path) and os.path.splitext(name)[1].lower() in IMAGES_LOW:
            yield path


IMAGES_LOW = {ending.lower() for ending in IMAGES}
MEANS = dict(train="train", val="validation", validation="validation", test="test")


def splits_of(folder):
    "The rule of folders, plainly: {split: {path below the split: content}}"
    found = {}
    for path in images_below(folder):
        found[os.path.relpath(path, folder)] = Path(path).read_bytes()
    if not found:
        raise Stop
    parts = {path: path.split(os.sep) for path in found}
    tops = {names[0] for names in parts.values() if len(names) > 1}
    named = {top for top in tops if top.lower() in MEANS}
    deep = {names[0] for names in parts.values() if len(names) > 2}
    if tops - named:
        if named & deep:
            raise Stop  # a split beside something that is none
        return {"train": found}
    if not tops:
        return {"train": found}
    if len({MEANS[top.lower()] for top in named}) < len(named):
        raise Stop  # two folders for one split
    splits = {}
    for path, content in found.items():
        names = parts[path]
        if len(names) > 1:
            inside = splits.setdefault(MEANS[names[0].lower()], {})
            inside[os.path.join(*names[1:])] = content
    return splits


def classes_of(images):
    "Names of the folders of classes, or nothing"
    depths = {path.count(os.sep) for path in images}
    names = {path.split(os.sep)[0] for path in images}
    return names if depths == {1} and len(names) > 1 else set()


def reference_listing(folder, split):
    "What the rule says of a split: how often each pair of an image and its class occurs"
    splits = splits_of(folder)
    if split not in splits and split == "test" and "validation" in splits:
        split = "validation"
    if split not in splits:
        raise Stop
    images = splits[split]
    known = classes_of(splits.get("train", {})) if split != "train" else set()
    folders = {path.split(os.sep)[0] for path in images}
    in_classes = {path.count(os.sep) for path in images} == {1}
    labelled = in_classes and (bool(known) or len(folders) > 1)
    if labelled and known and folders - known:
        raise Stop  # a class that nothing is trained on
    pairs = []
    for path, content in images.items():
        pairs.append((content, path.split(os.sep)[0] if labelled else None))
    return Counter(pairs), known or classes_of(images) if labelled else None


def as_written(name):
    "A name of bytes that are no text, as it stands in a list of classes"
    return os.fsencode(name).decode(errors="backslashreplace")


def listed(listing):
    "The same of what the library gives"
    pairs = []
    for i in range(len(listing.items)):
        name = None if listing.labels is None else listing.classes[int(listing.labels[i])]
        pairs.append((files.encoded_bytes(listing.items[i], "it"), name))
    return Counter(pairs)


def fits_folder(split, root):
    "Judges a listing against the rule"

    def fits(value, folder):
        try:
            pairs, classes = reference_listing(folder / root, split)
            splits = set(splits_of(folder / root))
        except Stop:
            return must_refuse(value, folder)
        if isinstance(value, Refused):
            return f"refused: {value.text}"
        listing, names = value
        wanted = Counter()
        for (content, name), count in pairs.items():
            wanted[content, name and as_written(name)] += count
        if set(names) != splits:
            return f"the splits are {names}, not {splits}"
        ordered = classes and [as_written(name) for name in sorted(classes, key=os.fsencode)]
        if classes and listing.classes != ordered:
            return f"the classes are {listing.classes}, not {ordered}"
        if classes is None and listing.labels is not None:
            return f"there are labels of {listing.classes}, but no classes"
        left_out = any(name.startswith(".") or name in OTHERS for name in os.listdir(folder / root))
        if left_out and not listing.note:
            return "something was left out without a word"
        if listing.note and not listing.note.isprintable():
            return f"the note is {listing.note!r}"
        return "" if listed(listing) == wanted else "images have other classes than by the rule"

    return fits


@st.composite
def trees(draw, root):
    "Files of a folder: splits, classes, both or neither, and some of what else lies around"
    made = {root: None}
    words = st.sampled_from(WORDS)
    layout = draw(st.sampled_from(["flat", "classes", "splits", "both", "both", "mess"]))
    splits = draw(st.lists(st.sampled_from(SPLIT_WORDS), min_size=1, max_size=3, unique=True))
    classes = draw(st.lists(words, min_size=1, max_size=3, unique=True))
    tops = {
        "flat": [""],
        "classes": classes,
        "splits": splits,
        "mess": draw(st.permutations(splits + classes)),
    }
    both = [f"{s}/{c}" for s in splits for c in classes]
    for top in tops.get(layout, both):
        for _ in range(draw(st.integers(1, 2))):
            name = draw(words) + draw(st.sampled_from(IMAGES))
            made[os.path.normpath(f"{root}/{top}/{name}")] = tiny(len(made))
    for _ in range(draw(st.integers(0, 2))):
        folder = draw(st.sampled_from(sorted({os.path.dirname(path) for path in made} - {""})))
        kind = draw(
            st.sampled_from(["hidden", "other", "empty", "image", "deep", "link", "split", "pipe"])
        )
        name = draw(words)
        if kind == "hidden":
            made[f"{folder}/{draw(st.sampled_from(HIDDEN))}/a.png"] = tiny(len(made))
        elif kind == "other":
            made[f"{folder}/{draw(st.sampled_from(OTHERS))}"] = b"1"
        elif kind == "empty":
            made[f"{folder}/{name}"] = None
        elif kind == "image":
            made[f"{folder}/{name}.png"] = tiny(len(made))
        elif kind == "pipe":
            made[f"{folder}/{name}.png"] = PIPE
        elif kind == "deep":
            made[f"{folder}/{name}/{draw(words)}/a.png"] = tiny(len(made))
        elif kind == "split":
            made[f"{folder}/{draw(st.sampled_from(SPLIT_WORDS))}/a.png"] = tiny(len(made))
        else:
            target = draw(st.sampled_from(["/elsewhere", "/elsewhere/a.png", ".", "..", "missing"]))
            made[f"{folder}/{name}.png"] = Path(target)
    return made


def without_clashes(made):
    "The files that can lie there together: no file is also a folder, no name too long"
    good = {}
    for path, value in made.items():
        outer = [str(p) for p in Path(path).parents]
        blocked = any(p in good and good[p] is not None for p in outer)
        long = any(len(os.fsencode(name)) > 250 for name in path.split("/"))
        inner = any(other.startswith(path + "/") for other in good)
        if path not in good and not (blocked or long or (inner and value is not None)):
            good[path] = value
    return good


@st.composite
def folders(draw):
    "A folder of images"
    root = draw(
        st.sampled_from(["pets", "pets", "a [b]", "x::y", "ü\n", "train", "test", "\udcfe"])
    )
    made = without_clashes(draw(trees(root)))
    for path, value in made.items():
        if isinstance(value, Path) and str(value).startswith("/elsewhere"):
            made = made | {
                path: Path(os.path.relpath("elsewhere" + str(value)[10:], os.path.dirname(path)))
            }
    made = {"elsewhere/a.png": tiny(99), "elsewhere/b.png": tiny(98)} | made
    split = draw(st.sampled_from(["train", "train", "test", "validation"]))

    def read(folder):
        found = files.list_images(f"./{root}", split)
        return found, files.split_names(f"./{root}")

    shown = repr(root)[1:-1]
    return Input(made, read, fits_folder(split, root), (shown, "split is"))


# ---- names of data sets


def find_named(name, home, said):
    "Images of a data set by its name, with $HOME and $FTCL_DATA set"
    old = {key: os.environ.get(key) for key in ("HOME", "FTCL_DATA")}
    os.environ["HOME"] = str(home)
    os.environ["FTCL_DATA"] = said
    try:
        return [files.encoded_bytes(item, "it") for item in files.list_images(name).items]
    finally:
        for key, value in old.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


@st.composite
def data_sets(draw):
    "A name of a data set, with folders of that name here, at home and in $FTCL_DATA"
    made = {f"{place}pets/a.png": tiny(i) for i, place in enumerate(["", "home/", "kept/"])}
    made |= {"only/b.png": tiny(3), "kept/more/c.png": tiny(4), "file.zip": b"PK", "empty": None}
    found = {
        "pets": 2,
        "more": 4,
        "only": 3,
        "./pets": 0,
        "../x": None,
        "~/pets": 1,
        "file.zip": None,
        "empty": None,
        "pets/": 2,
        "more//": 4,
        "./more": None,
        "pet": None,
        "": None,
        "~": 1,
        "pets/a.png": None,
        "./only/.": 3,
        "./pets/../only": 3,
        "$HOME/pets": None,
        "/": None,
        "\0": None,
        "no\nname": None,
        "x" * 5000: None,
        "\ud800": None,
        "~nobody/pets": None,
    }
    name = draw(
        st.one_of(st.sampled_from(list(found)), odd_values.filter(lambda o: not isinstance(o, str)))
    )
    said = draw(st.sampled_from(["kept", "kept", "kept", "", "missing", "file.zip", "~"]))

    def read(folder):
        return find_named(name, folder / "home", said)

    def fits(value, folder):
        number = found.get(name) if isinstance(name, str) else None
        if said == "" and number in (2, 4):
            number = {2: 0, 4: None}[number]
        if said == "~" and number in (2, 4):
            number = {2: 1, 4: None}[number]
        broken = said in ("missing", "file.zip")
        if number is None or broken:
            usable = isinstance(value, Refused) or (broken and len(value) == 1)
            return "" if usable else f"{name!r} was found, with FTCL_DATA={said}"
        return equal_to([tiny(number)])(value, folder)

    return Input(made, read, fits, ("dataset", "FTCL_DATA", "split"))


# ---- tables of images

PICTURES = [tiny(number) for number in range(6)]
NUMBERS = [0, 1, 2, 0, 1, 2]
NAMES = ["cat", "dog", "eel"]


def features_note(**columns):
    "What `datasets` writes into a Parquet file to say what its columns hold"
    return {b"huggingface": json.dumps(dict(info=dict(features=columns))).encode()}


IMAGE = dict(_type="Image")


def class_label(names):
    return dict(names=names, _type="ClassLabel")


def image_table(labels=NUMBERS, kind="int64", names=NAMES, paths=None, pictures=PICTURES, more=()):
    "A Parquet file of images, with its labels and further columns of labels"
    holds = dict(bytes=pa.array(pictures, "binary"), path=pa.array(paths or [None] * 6, "string"))
    columns = {"image": pa.StructArray.from_arrays(list(holds.values()), list(holds))}
    note = dict(image=IMAGE)
    if labels is not None:
        columns["label"] = pa.array(labels, kind)
        if names:
            note["label"] = class_label(names)
        else:
            note["label"] = dict(dtype=str(columns["label"].type), _type="Value")
    for name in more:
        columns[name] = pa.array(NUMBERS, "int64")
        note[name] = class_label(NAMES)
    table = pa.table(columns).replace_schema_metadata(features_note(**note))
    file = pa.BufferOutputStream()
    pq.write_table(table, file)
    return file.getvalue().to_pybytes()


class Table(NamedTuple):
    "Parquet files, how they are asked for, and what comes of it"

    made: dict
    asked: dict  # arguments of `list_images`
    wanted: tuple | None  # labels, classes; None: refused
    splits: tuple = ("train",)


@functools.cache
def image_tables():
    "Tables whose meaning is plain, and tables that must be refused"
    right = (NUMBERS, NAMES)
    none = (None, None)
    one = "train-00000-of-00001.parquet"
    chosen = dict(label_column="label")
    words = [NAMES[number] for number in NUMBERS]
    turned = image_table([2, 1, 0, 2, 1, 0], names=NAMES[::-1])
    both = {one: image_table(), "test-00000-of-00001.parquet": turned}
    halves = {f"train-0000{i}-of-00002.parquet": image_table() for i in range(2)}
    twice = (NUMBERS * 2, NAMES)
    outside = dict(pictures=[None] * 6, paths=["/etc/hostname"] * 6)
    stranger = image_table(names=["cat", "dog", "fox"])
    tables = [
        Table({one: image_table()}, {}, right),
        Table({"data/" + one: image_table()}, {}, right),
        Table({"train2014.parquet": image_table()}, {}, right),
        Table({"steam-train.parquet": image_table()}, {}, right),
        Table({"test_results.parquet": image_table()}, {}, right),
        Table({"it.parquet": image_table(), ".hidden.parquet": b"1"}, {}, right),
        Table({"Train.parquet": image_table()}, {}, right),
        Table(halves, {}, twice),
        Table(both, {}, right, ("train", "test")),
        Table(both, dict(split="test"), right, ("train", "test")),
        Table({one: image_table(), "test.parquet": stranger}, dict(split="test"), None),
        Table({one: image_table(), "validation.parquet": turned}, dict(split="test"), right,
              ("train", "validation")),
        Table({one: image_table()}, dict(split="test"), None),
        Table({one: image_table(None)}, {}, none),
        Table({one: image_table([-1] * 6)}, {}, none),
        Table({one: image_table([None] * 6)}, {}, none),
        Table({one: image_table([0, 1, 2, 0, 1, None])}, {}, None),
        Table({one: image_table([0, 1, 2, 0, 1, 3])}, {}, None),
        Table({one: image_table([0, 1, 2, 0, 1, -1])}, {}, None),
        Table({one: image_table(kind="int64", names=None)}, {}, None),
        Table({one: image_table(kind="int32", names=None)}, chosen, (NUMBERS, ["0", "1", "2"])),
        Table({one: image_table(kind="uint8", names=None)}, chosen, (NUMBERS, ["0", "1", "2"])),
        Table({one: image_table([0, 5, 2, 0, 1, 2], names=None)}, chosen, None),
        Table({one: image_table(words, "string", None)}, chosen, right),
        Table({one: image_table(words, "string", None)}, {}, None),
        Table({one: image_table([0.5] * 6, "float64", None)}, chosen, None),
        Table({one: image_table([[1]] * 6, pa.list_(pa.int64()), None)}, chosen, None),
        Table({one: image_table([True, False] * 3, "bool", None)}, chosen, None),
        Table({one: image_table(more=["coarse"])}, {}, None),
        Table({one: image_table(more=["coarse"])}, dict(label_column="coarse"), right),
        Table({one: image_table(more=["coarse"])}, dict(label_column="none"), none),
        Table({one: image_table()}, dict(label_column="lable"), None),
        Table({one: image_table()}, dict(image_column="label"), None),
        Table({one: image_table(**outside)}, {}, None),
        Table({one: image_table(paths=["/etc/hostname"] * 6)}, {}, right),
        Table({one: image_table(), "a.png": tiny(7)}, {}, None),
        Table({one: image_table(names=["cat", "cat", "eel"])}, {}, None),
    ]  # fmt: skip
    return tables


def fits_table(table):
    "Judges labels, classes, bytes and splits"

    def fits(value, folder):
        if table.wanted is None:
            return must_refuse(value, folder)
        if isinstance(value, Refused):
            return f"{table.asked} of {list(table.made)} refused: {value.text}"
        labels, classes, items, splits = value
        pictures = PICTURES * (len(items) // 6)
        if (labels, classes) != table.wanted:
            return f"{table.asked} of {list(table.made)}: {labels} of {classes}, not {table.wanted}"
        if items != pictures or set(splits) != set(table.splits):
            return f"{table.asked} of {list(table.made)}: other images, or the splits {splits}"
        return ""

    return fits


def plausible_table(value, folder):
    "Labels within the classes, and bytes for every image"
    if isinstance(value, Refused):
        return ""
    labels, classes, items, _ = value
    if not all(isinstance(item, bytes) for item in items):
        return f"images are {items}"
    if labels is None:
        return "" if classes is None else "classes without labels"
    good = len(labels) == len(items) and all(0 <= label < len(classes) for label in labels)
    return "" if good else f"labels {labels} of {classes}"


@st.composite
def tables(draw):
    "A data set of Parquet files, whole or damaged"
    table = draw(st.sampled_from(image_tables()))
    made = dict(table.made)
    fits = fits_table(table)
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(made)))
        made[name] = draw(damaged(made[name]))
        fits = plausible_table if made[name] != table.made[name] else fits

    def read(folder):
        split = table.asked.get("split", "train")
        found = files.list_images("./birds", **table.asked | dict(split=split))
        items = [files.encoded_bytes(item, "./birds") for item in found.items]
        labels = None if found.labels is None else found.labels.tolist()
        return labels, found.classes, items, files.split_names("./birds")

    return Input(
        {f"birds/{name}": code for name, code in made.items()}, read, fits, ("birds", "_column is")
    )


# ---- decoded images that are kept

KEPT = {f"pets/{number}.png": code for number, code in enumerate(PICTURES)}


def load_kept(cache):
    "All images of the folder `pets`, which go through the cache"
    wait, data._CACHE_AFTER = data._CACHE_AFTER, -1.0  # keep also what takes no time
    old = os.environ.get("FTCL_CACHE")
    os.environ["FTCL_CACHE"] = str(cache)
    try:
        return data.load("./pets", decode="once").images.clone()
    finally:
        data._CACHE_AFTER = wait
        os.environ.pop("FTCL_CACHE")
        if old is not None:
            os.environ["FTCL_CACHE"] = old


@functools.cache
def kept_files():
    "What is in the cache after the images were decoded"
    here = os.getcwd()
    folder = SPARE / "kept"
    folder.mkdir()
    write_files(KEPT, folder)
    try:
        os.chdir(folder)
        with redirect_stdout(io.StringIO()):
            load_kept(folder / "cache")
    finally:
        os.chdir(here)
    found = {f"cache/{path.name}": path.read_bytes() for path in (folder / "cache").iterdir()}
    if len(found) != 1:
        raise AssertionError(f"the cache holds {list(found)}")
    return found


@st.composite
def caches(draw):
    "A cache of decoded images that was damaged: it must not be believed"
    (name, code), *_ = kept_files().items()
    kind = draw(st.sampled_from(["whole", "bytes", "bytes", "bytes", "name", "folder", "file"]))
    made = {name: draw(damaged(code)) if kind == "bytes" else code}
    if kind == "name":
        made = {name.replace("a", "b"): code, name[:-5] + "0.npy": code}
    elif kind == "folder":
        made = {name: None}
    elif kind == "file":
        made = {"cache": b"no folder"}
    seen = [[number % 256, number // 256 % 256, 0] for number in range(len(KEPT))]
    wanted = torch.tensor(seen, dtype=torch.uint8).view(-1, 3, 1, 1)
    return Input(KEPT | made, lambda o: load_kept(o / "cache"), equal_to(wanted), ("cache",), True)


# ---- records


@functools.cache
def base_record():
    "A record that a run left"
    return json.loads((ROOT / "results" / "shapes" / "none-s0.json").read_text())


def plain_json(code):
    "What a file of JSON means; raises `ValueError` for one that means nothing, or two things"

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    def refuse(_):
        raise ValueError

    return json.loads(code.decode(), object_pairs_hook=once, parse_constant=refuse)


def usable(value):
    "Whether a record has parameters and finite metrics, as everything that reads one expects"
    if not isinstance(value, dict) or value.get("schema") != 1:
        return False
    parameters, metrics = value.get("parameters"), value.get("metrics")
    if not isinstance(parameters, dict) or not isinstance(metrics, dict):
        return False
    numbers = all(type(m) in (int, float) and abs(m) < math.inf for m in metrics.values())
    return numbers and all(type(p) in (str, bool, int, float) for p in parameters.values())


def fits_json(whole):
    "Judges that a record is what the file says, and no less than a record"

    def fits(value, folder):
        if isinstance(value, Refused):
            return f"refused: {value.text}" if whole else ""
        try:
            meant = plain_json((folder / "run.json").read_bytes())
        except (ValueError, RecursionError):
            return f"{value!r:.200} was read from what is no JSON, or twofold"
        return "" if usable(value) and same(value, meant) else f"gives {value!r:.300}"

    return fits


@st.composite
def json_files(draw):
    "The file of a record: as it is, laid out otherwise, a value changed, bytes damaged"
    kind = draw(st.sampled_from(["layout", "value", "value", "bytes", "bytes", "twice"]))
    value = base_record()
    if kind == "layout":
        how = dict(
            indent=draw(st.sampled_from([None, 0, 4, "\t"])), ensure_ascii=draw(st.booleans())
        )
        return json.dumps(value, **how).encode() + draw(st.sampled_from([b"", b"\n\n", b" "])), True
    if kind == "value":
        changed = draw(changed_value(value))
        text = json.dumps(changed, ensure_ascii=draw(st.booleans()))
        return text.encode(errors="surrogatepass"), same(changed, value)
    code = json.dumps(value, indent=1).encode()
    if kind == "twice":
        return code.replace(b'"seed": 0', b'"seed": 0, "seed": 1'), False
    return draw(damaged(code)), False


@st.composite
def records(draw):
    "A record, read and compared with the parameters of a run"
    code, whole = draw(json_files())

    def read(folder):
        found = record.read_record("run.json")
        record.difference(base_record()["parameters"], found["parameters"], train.pretrain)
        return found

    return Input({"run.json": code}, read, fits_json(whole), ("run.json",))


@functools.cache
def two_runs():
    "Files of two runs"
    made = {}
    for name in ("none-s0", "posneg-s0"):
        for ending in ("json", "parquet"):
            made[f"runs/{name}.{ending}"] = (
                ROOT / "results/shapes" / f"{name}.{ending}"
            ).read_bytes()
    return made


@st.composite
def studies_of_runs(draw):
    "A folder of records, with one more file in it, or one of them changed"
    from ftcl.study import read_runs

    made = dict(two_runs())
    code, whole = draw(json_files())
    where = draw(st.sampled_from(["more", "more", "record", "scores", "gone"]))
    if where == "more":
        made["runs/run.json"] = code
    elif where == "record":
        made["runs/posneg-s0.json"] = code
    elif where == "scores":
        made["runs/posneg-s0.parquet"] = draw(damaged(made["runs/posneg-s0.parquet"]))
    else:
        del made["runs/posneg-s0.parquet"]

    def read(folder):
        return read_runs("runs", label="{mixing} {batch_size}")

    def fits(value, folder):
        if isinstance(value, Refused):
            return ""
        runs, metrics = value
        accuracies = metrics["knn_backbone"].tolist()
        for mixing in ("none", "posneg") if where == "more" else ("none",):
            name = f"runs/{mixing}-s0"
            kept = json.loads((folder / f"{name}.json").read_text())
            frames = runs.get(f"{mixing} {kept['parameters']['batch_size']}", [])
            wanted = pq.read_table(folder / f"{name}.parquet").to_pandas()
            found = any(frame.equals(wanted) for frame in frames)
            if not found or kept["metrics"]["knn_backbone"] not in accuracies:
                return f"lost {name} of {list(runs)}"
        return ""

    return Input(made, read, fits, ("runs",))


# ---- scores


def parquet(table):
    "A table as a file"
    file = pa.BufferOutputStream()
    pq.write_table(table, file)
    return file.getvalue().to_pybytes()


@functools.cache
def base_scores():
    "A file of scores, and what it holds"
    torch.manual_seed(0)
    recorder = scores.ScoreRecorder(tau=0.1)
    for step in range(5):
        recorder.record(step, torch.rand(8), torch.rand(8, 16), loss=step / 3)
    path = SPARE / "scores.parquet"
    recorder.save(path)
    return path.read_bytes(), recorder.frame()


@functools.cache
def odd_tables():
    "Tables that are no record of scores"
    frame = base_scores()[1]
    good = pa.Table.from_pandas(frame, preserve_index=False)
    made = [
        good.drop_columns(["pos_mean"]), good.slice(0, 0), good.select(["loss"]), pa.table({}),
        good.set_column(1, "pos_mean", pa.array(["a"] * 5)),
        good.set_column(0, "step", pa.array([0.5, 1, 2, 3, 4])),
        good.set_column(0, "step", pa.array([0, 1, None, 3, 4])),
        good.set_column(0, "step", pa.array([0, 1, 1, 3, 4])),
        good.set_column(0, "step", pa.array([4, 3, 2, 1, 0])),
        good.set_column(0, "step", pa.array([-1, 0, 1, 2, 3])),
        good.set_column(2, "pos_mean", pa.array([[1.0]] * 5)),
        good.set_column(2, "pos_mean", pa.array([b"1"] * 5)),
        good.append_column("pos_mean", pa.array([1.0] * 5)),
        good.append_column("more", pa.array(["a"] * 5)),
    ]  # fmt: skip
    return [parquet(table) for table in made] + [b"", b"PAR1", b"PAR1PAR1", b"a,b\n1,2\n"]


def equal_frame(wanted, may_refuse):
    "Judges that a data frame is this one"

    def fits(value, folder):
        if isinstance(value, Refused):
            return "" if may_refuse else f"refused: {value.text}"
        equal = list(value) == list(wanted) and value.dtypes.equals(wanted.dtypes)
        equal = equal and value.equals(wanted)
        return "" if equal else f"gives other scores: {value!r:.300}"

    return fits


@st.composite
def score_files(draw):
    "Saved scores: whole, damaged, or no scores"
    code, frame = base_scores()
    kind = draw(st.sampled_from(["whole", "odd", "bytes", "bytes", "bytes", "bytes"]))
    fits = equal_frame(frame, kind != "whole")
    if kind == "bytes":
        code = draw(damaged(code))
    if kind == "odd":
        code = draw(st.sampled_from(odd_tables()))
        fits = must_refuse
    folder_name = draw(st.sampled_from(["", "seed=3/", "a [b]/", "ü/"]))
    path = folder_name + "it.parquet"
    return Input({path: code}, lambda folder: scores.read_scores(path), fits, ("it.parquet",))


# ---- checkpoints


def few_images(split, size):
    "A set that takes no time"
    images = torch.arange(8 * 3 * 64, dtype=torch.int32).view(8, 3, 8, 8) * 37 % 256
    return data.InMemory(images.to(torch.uint8), torch.arange(8) % 2, ["a", "b"])


RUN = dict(
    dataset="few", epochs=2, batch_size=4, queue_size=8, dim=4, readouts="none", progress=False,
    precision="fp32", out=".", name="run",
)  # fmt: skip


def trained(name, **more):
    "The folder of a run, made now"
    data.DATASETS["few"] = few_images
    train.pretrain(**RUN | dict(out=str(SPARE / name)), **more)
    return SPARE / name


@functools.cache
def base_run():
    "Files of a run that was stopped at step 3 of 4, and what its checkpoint holds"
    folder = trained("run", stop_after=3)
    made = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            made[str(path.relative_to(folder))] = path.read_bytes()
    tensors, note = checkpoint.read_checkpoint(folder / "run.safetensors")
    return made, tensors, note


@functools.cache
def finished_run():
    "What the checkpoint of the same run holds at its end, without what differs by nature"
    return ended(trained("finished"))


def ended(folder):
    "Tensors of a finished run, and the record's metrics and losses"
    tensors, _ = checkpoint.read_checkpoint(folder / "run.safetensors")
    told = record.read_record(folder / "run.json")
    frame = scores.read_scores(folder / "run.parquet")
    return tensors, told["epochs"], told["steps"], frame.to_numpy().tolist()


def header_edited(draw, code):
    "A file of safetensors with another header"
    length = struct.unpack("<Q", code[:8])[0]
    header = json.loads(code[8 : 8 + length])
    changed = draw(changed_value(header))
    text = json.dumps(changed).encode(errors="replace")
    size = draw(st.sampled_from([len(text), len(text), len(text) + 1, 0, 2**63, 2**40, 1]))
    return struct.pack("<Q", size) + text + code[8 + length :]


def checkpoint_file(draw):
    "The file of a checkpoint, whole or damaged"
    code = base_run()[0]["run.safetensors"]
    kind = draw(st.sampled_from(["whole", "bytes", "bytes", "bit", "bit", "header"]))
    if kind == "whole":
        return code
    if kind == "bit":
        at = draw(place(len(code) - 1))
        return code[:at] + bytes([code[at] ^ 1 << draw(st.integers(0, 7))]) + code[at + 1 :]
    if kind == "bytes":
        return draw(damaged(code))
    return header_edited(draw, code)


def read_everything(folder):
    "Tensors and note of a checkpoint, once its encoder was built"
    checkpoint.load_encoder("run.safetensors")
    return checkpoint.read_checkpoint("run.safetensors")


def resumed(folder):
    "What a run holds that goes on from a checkpoint"
    train.pretrain(**RUN, resume=True)
    return ended(folder)


@st.composite
def checkpoints(draw):
    "A checkpoint and what lies beside it; read, or resumed from"
    made, tensors, note = base_run()
    code = checkpoint_file(draw)
    made = made | {"run.safetensors": code}
    read = draw(st.sampled_from([read_everything, read_everything, resumed]))
    unchanged = code == base_run()[0]["run.safetensors"]
    if read is resumed and unchanged:
        beside = [name for name in made if name != "run.safetensors"]
        if beside and draw(st.booleans()):
            name = draw(st.sampled_from(beside))
            made[name] = draw(damaged(made[name]))
            unchanged = made[name] == base_run()[0][name]
        fits = equal_to(finished_run(), may_refuse=not unchanged)
    else:
        fits = equal_to(
            (tensors, note) if read is read_everything else finished_run(), not unchanged
        )
    return Input(made, read, fits, ("run", "few"), read is resumed)


@st.composite
def finished_runs(draw):
    "Files of a finished run, one or two of them gone, cut, damaged, or of another time"
    finished_run()
    folder = SPARE / "finished"
    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(made)))
        kind = draw(st.sampled_from(["gone", "cut", "early", "damaged"]))
        if kind == "gone":
            del made[name]
        elif kind == "early":
            made |= base_run()[0]
        elif kind == "damaged" and not name.endswith(".json"):  # JSON has no sum: people write it
            made[name] = draw(damaged(made[name]))
        else:
            made[name] = made[name][: len(made[name]) // 2]
        if not made:
            break
    return Input(made, resumed, equal_to(finished_run(), True), ("run",), True)


# ---- initial weights


class Evil:
    "An object that makes a file when it is unpickled"

    def __reduce__(self):
        return open, ("made-by-a-pickle", "w")


def tiny_net():
    "A network of five tensors and a counter"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2))
    return net.requires_grad_(False), torch.nn.Linear(2, 2)


@functools.cache
def wanted_state():
    "What the network is to hold"
    return {name: x + 1 for name, x in tiny_net()[0].state_dict().items()}


def pickled(content):
    "A file of torch"
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@functools.cache
def weight_files():
    "(name, file, whether it is to be loaded)"
    import safetensors.torch as safe

    state = wanted_state()
    first = "0.weight"
    plain = {name: x for name, x in state.items() if "batches" not in name}
    prefixed = {f"module.encoder_q.{name}": x for name, x in state.items()}
    slow = {f"module.encoder_k.{name}": x + 1 for name, x in state.items()}
    double = {name: x.double() if x.is_floating_point() else x for name, x in state.items()}
    right = [
        state,
        plain,
        dict(state_dict=state),
        dict(model=state, epoch=3),
        prefixed,
        prefixed | slow,
        double,
        dict(state_dict=prefixed, arch="x"),
        state | {"fc.bias": state["0.bias"]},
    ]
    nan = torch.full_like(state[first], math.nan)
    wrong = [
        state | {first: state[first][:1]},
        state | {first: nan},
        state | {first: nan.to(torch.complex64)},
        state | {first: state[first].long()},
        {n: x for n, x in state.items() if n != first},
        {},
        [],
        dict(a=state, b=prefixed),
        3,
        None,
        torch.zeros(3),
        tiny_net()[0],
        Evil(),
        dict(state_dict=Evil()),
        state | {"evil": Evil()},
        {1: state[first]},
        state | {first: 3},
        dict(state_dict={}),
        [state],
        {name + ".a": x for name, x in state.items()},
        state | {first: torch.sparse_coo_tensor((2, 3), check_invariants=True)},
    ]
    made = [(f"it.{end}", pickled(o), True) for o in right for end in ("pt", "pth.tar")]
    made += [("it.safetensors", safe.save(o), True) for o in (state, plain, prefixed)]
    made += [("it.pt", pickled(o), False) for o in wrong]
    made += [("it.safetensors", pickled(state), False), ("it.pt", safe.save(state), False)]
    return made + [
        ("it.pt", b"", False),
        ("it.safetensors", b"", False),
        ("it.bin", b"\x80\x02.", False),
    ]


@st.composite
def weights(draw):
    "A file of initial weights: whole, damaged, or of something else"
    name, code, right = draw(st.sampled_from(weight_files()))
    whole = draw(st.booleans())
    code = code if whole else draw(damaged(code))
    net, head = tiny_net()

    def read(folder):
        return encoder.load_weights(net, head, name)

    def fits(value, folder):
        state = net.state_dict()
        if isinstance(value, Refused):
            changed = not same(dict(state), dict(tiny_net()[0].state_dict()))
            return "refused, but half loaded" if changed else refusal_fits(value, right and whole)
        if whole and not right:
            return f"{name} was loaded: {value}"
        if not value.isprintable():
            return f"says {value!r}"
        learnt = {n: x for n, x in state.items() if "batches" not in n}
        if not all(x.isfinite().all() for x in learnt.values()):
            return "numbers that are none"
        wrong = whole and not all(torch.equal(x, wanted_state()[n]) for n, x in learnt.items())
        return "other weights than in the file" if wrong else ""

    return Input({name: code}, read, fits, (name, "weights"))


def refusal_fits(value, right):
    "A refusal is wrong for what should be read"
    return f"refused: {value.text}" if right else ""


# ---- studies

STUDIES = """one:
  about: a study
  shared:
    dataset: shapes
    epochs: 2
    tau: 0.1
    precision: fp32
  settings:
    none: {mixing: none, seeds: [0, 1]}
    posneg: {mixing: posneg, alpha: 2.5, symmetric: true, seeds: [0]}
two:
  shared: &shared {dataset: shapes, batch_size: 64, lr: 1.0e-3}
  settings:
    a: {seeds: [3]}
"""
STRANGE = [
    "a: &a [*a]\n", "&a {one: *a}\n", "!!python/object/apply:os.system ['true']\n", "? [a]\n: 1\n",
    "a: 2020-01-01\n", "one: {shared: {tau: .nan}, settings: {a: {seeds: [0]}}}\n", "[]", "1", "",
    "one: {shared: {tau: 0.1}, settings: {a: {seeds: [0, 00]}}}\n", "- a\n", "one: null\n",
    "one: {shared: {tau: 1e-3}, settings: {a: {seeds: [0]}}}\n", "---\na: 1\n---\nb: 1\n",
    "one: {shared: {tau: 0.1}, settings: {../a: {seeds: [0]}}}\n", "<<: {a: 1}\n",
    "a: !!binary x\n",
    "one: {shared: {tau: 0.1}, settings: {1: {seeds: [0]}, '1': {seeds: [0]}}}\n", "{[1]: 2}\n",
    "? {a: 1}\n: 2\n", "one: {<<: [1], shared: 1}\n", "a: !!timestamp x\n", "a: 0x_\n", "a: 1__\n",
    "../two: {shared: {tau: 0.1}, settings: {a: {seeds: [0]}}}\n",
    "~: {shared: {tau: 0.1}, settings: {a: {seeds: [0]}}}\n", "a: !!int x\n", "a: =\n",
]  # fmt: skip


def reference_studies(text):
    "Every run that a file of studies spells out"
    runs = {}
    for study, about in yaml.safe_load(text).items():
        runs[study] = {}
        for setting, own in about["settings"].items():
            for seed in own["seeds"]:
                name = f"{setting}-s{seed}"
                p = about["shared"] | own | dict(seed=seed, out=f"results/{study}", name=name)
                del p["seeds"]
                runs[study][name] = p
    return runs


def fits_studies(whole):
    "Judges runs against a plain reading of the file"

    def fits(value, folder):
        if isinstance(value, Refused):
            return f"refused: {value.text}" if whole else ""
        try:
            wanted = reference_studies((folder / "studies.yaml").read_bytes().decode())
        except Exception as e:
            return f"{value!r:.300} was read from what is no study: {e!r:.100}"
        plain = {
            study: {n: dict(sorted(p.items())) for n, p in runs.items()}
            for study, runs in value.items()
        }
        meant = {
            study: {n: dict(sorted(p.items())) for n, p in runs.items()}
            for study, runs in wanted.items()
        }
        if not same(plain, meant):
            return f"gives {value!r:.300}"
        for p in (p for runs in value.values() for p in runs.values()):
            if odd := [name for name, v in p.items() if allowed(name, v) is False]:
                return f"accepts {odd[0]}={p[odd[0]]!r:.100}"
            if Path(p["name"]).name != p["name"] or os.path.normpath(p["out"]).count("/") != 1:
                return f"writes {p['name']!r} to {p['out']!r}"
        return ""

    return fits


@st.composite
def studies(draw):
    "A file of studies: whole, damaged, changed, or strange"
    from ftcl.study import read_studies

    kind = draw(st.sampled_from(["whole", "bytes", "bytes", "value", "value", "strange"]))
    code = STUDIES.encode()
    if kind == "bytes":
        code = draw(damaged(code))
    elif kind == "value":
        changed = draw(changed_value(yaml.safe_load(STUDIES)))
        code = json.dumps(changed).encode(errors="surrogatepass")
    elif kind == "strange":
        code = draw(st.sampled_from(STRANGE)).encode()
    names = ("studies.yaml", "study")
    fits = fits_studies(kind == "whole")
    return Input({"studies.yaml": code}, lambda folder: read_studies("studies.yaml"), fits, names)


# ---- parameters


@functools.cache
def known_parameters(function=train.pretrain):
    "Parameters by name: type, default, and what is said of them"
    return record.declared(function)


def allowed(name, value, function=train.pretrain):
    "Whether a parameter may have a value; None where its own check has to say"
    if name not in known_parameters(function):
        return False
    kind, _, about = known_parameters(function)[name]
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        if abs(value) > sys.float_info.max:
            return False
        value = float(value)
    if type(value) not in kinds:
        return False
    kind = type(value)
    if about.own and value == -1:
        return True
    if kind is int and abs(value) >= 2**63:
        return False
    if kind is float and not math.isfinite(value):
        return False
    low, high = about.least, about.most
    if kind in (int, float) and (
        (low is not None and value < low) or (high is not None and value > high)
    ):
        return False
    if about.choices is not None and value not in list(about.choices):
        return False
    return None if about.check is not None or kind is str and about.choices is None else True


DEPENDENT = {"method", "symmetric", "momentum", "queue_size", "bn_splits", "batch_size", "epochs",
             "start_epoch", "evaluate_on", "holdout", "readouts", "knn_every", "weights", "encoder",
             "dim", "precision", "warmup_epochs", "tau_pos", "hardness", "false_share", "mixing",
             "strength", "alpha"}  # fmt: skip


class Unprintable:
    "Even its representation raises"

    def __repr__(self):
        raise RuntimeError("no")


def parameter_values(about):
    "Values of a parameter: right ones, ones at the edges of its range, and odd ones"
    kind, default, said = about
    kind = type(default)  # of several, as of `float | str`
    edges = [default, kind(default)]
    for edge in (said.least, said.most):
        if edge is not None:
            edges += [edge, edge - 1, edge + 1, kind(edge), float(edge)]
    edges += list(said.choices or [])
    ours = [np.int64(1), np.float32(0.5), np.bool_(True), torch.tensor(1), Unprintable(), b"a", 1j,
            object(), int, ("a",), {1}, Path("a"), lambda: 1]  # fmt: skip
    numbers = {
        int: st.integers(),
        float: st.floats(),
        bool: st.booleans(),
        str: st.text(max_size=8),
    }
    return st.one_of(
        st.sampled_from(edges),
        st.sampled_from(edges),
        numbers[kind],
        odd_values,
        st.sampled_from(ours),
    )


@st.composite
def parameters(draw):
    "Parameters of a run, mostly one; as a notebook has them, too"
    p = {}
    f = draw(st.sampled_from([train.pretrain, train.pretrain, train.evaluate_checkpoint]))
    known = known_parameters(f)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        name = draw(st.sampled_from(list(known)))
        about = known[name]
        wrong = [name[:-1], name + "s", name.upper(), "lerning_rate", ""]
        name = draw(st.sampled_from([name] * 9 + [draw(st.sampled_from(wrong))]))
        p[name] = draw(parameter_values(about))

    def read(folder):
        record.check_given(dict(p), known)
        if f is train.pretrain:
            train.check_run(dict(p))
        if not any(
            callable(value) for value in p.values()
        ):  # these are no parameters of a notebook
            record.check_parameters(dict(p, In=[], _=1, PAPERMILL_INPUT_PATH=""), f)
        return "accepted"

    def fits(value, folder):
        told = [allowed(name, v, f) for name, v in p.items()]
        if isinstance(value, Refused):
            clear = all(told) and not set(p) & DEPENDENT
            return f"{core.shown(p)} refused: {value.text}" if clear else ""
        return f"{core.shown(p)} accepted" if False in told else ""

    names = [name or "''" for name in p]
    return Input({}, read, fits, (*names, *known))


@st.composite
def places(draw):
    "Where a record goes: a folder and a name; written there, and read again"
    text = st.one_of(st.sampled_from(WORDS), st.text(max_size=6), odd_values)
    name = draw(text)
    out = draw(st.one_of(st.just("runs"), text, st.tuples(text, text).map("{0[0]}/{0[1]}".format)))
    out = draw(st.sampled_from([out, out, "~", "~/runs", "~nobody-here/runs", "runs/"]))
    if isinstance(out, str) and (out.startswith("/") or ".." in out):
        out = "runs"  # nothing is written outside of the folder

    def read(folder):
        home = os.environ.get("HOME", "")
        os.environ["HOME"] = str(folder / "home")
        try:
            path = record.writable(out, name)
            record.write_record(base_record() | dict(name="it"), path)
            return record.read_record(path)["name"]
        finally:
            os.environ["HOME"] = home

    def fits(value, folder):
        plain = re.compile(r"[\w =\[\]{}%$#+-]{1,40}")
        clear = all(isinstance(o, str) and plain.fullmatch(o) for o in (name, out))
        if isinstance(value, Refused):
            return f"{name!r} in {out!r} refused: {value.text}" if clear else ""
        path = os.path.join(re.sub(r"^~(?=/|$)", str(folder / "home"), out), f"{name}.json")
        there = [str(o) for o in folder.rglob("*") if o.is_file()]
        wanted = os.path.normpath(os.path.join(folder, path))
        right = there == [wanted] and value == "it"
        return "" if right else f"{name!r} in {out!r}: {there} instead of {wanted}"

    return Input({"home": None}, read, fits, ("out", "name", repr(name), repr(out)), True)


# ---- the count

READERS = {  # name: inputs, and how many of a hundred
    "images": (images, 18),
    "folders": (folders, 13),
    "names of data sets": (data_sets, 3),
    "tables of images": (tables, 8),
    "records": (records, 12),
    "folders of records": (studies_of_runs, 5),
    "scores": (score_files, 10),
    "checkpoints": (checkpoints, 8),
    "finished runs": (finished_runs, 2),
    "weights": (weights, 4),
    "studies": (studies, 4),
    "parameters": (parameters, 7),
    "names of files": (places, 3),
    "caches": (caches, 3),
}


@dataclass
class Row:
    "What came of the inputs of one reader"

    reader: str
    inputs: int = 0
    right: int = 0
    one_sentence: int = 0
    wrong: int = 0
    messages: list = field(default_factory=list)  # every one sentence
    problems: list = field(default_factory=list)  # every wrong outcome

    def add(self, message, problem):
        "Count one outcome"
        self.inputs += 1
        self.right += not (message or problem)
        self.one_sentence += bool(message and not problem)
        self.wrong += bool(problem)
        if problem:
            self.problems.append(problem)
        elif message:
            self.messages.append(message)


def run_reader(name, inputs, seed):
    "So many inputs of one reader"
    row = Row(name)

    @hypothesis.seed(seed)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(READERS[name][0]())
    def try_one(case):
        row.add(*judge(case))

    try_one()
    gc.collect()  # inputs, which can be large, hang together in circles
    return row


def run(inputs, seed):
    "A `Row` a reader; the same numbers give the same inputs"
    import datasets

    SPARE.mkdir(exist_ok=True)
    set_hypothesis_home_dir(SPARE / "hypothesis")
    cache = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = SPARE / "datasets"
    left = inputs
    rows = []
    try:
        for number, (name, (_, share)) in enumerate(READERS.items()):
            last = number == len(READERS) - 1
            own = left if last else round(inputs * share / 100)
            left -= own
            rows.append(run_reader(name, own, seed))
    finally:
        datasets.config.HF_DATASETS_CACHE = cache
        for made in (base_scores, base_run, finished_run, kept_files):
            made.cache_clear()
        data.DATASETS.pop("few", None)
        shutil.rmtree(SPARE, ignore_errors=True)
    return rows


if __name__ == "__main__":
    start = time.time()
    for row in run(int(sys.argv[1]), int(sys.argv[2])):
        print(row.reader, row.inputs, row.right, row.one_sentence, row.wrong)
        for problem, count in Counter(problem[:300] for problem in row.problems).most_common():
            print("   ", count, problem)
    print(round(time.time() - start, 1), "seconds")
