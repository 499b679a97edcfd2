"""No step of training makes the host wait for the device

A GPU computes while the host prepares what comes next. That ends where Python asks for a number:
the host then waits until all before it is computed. On a GPU torch itself refuses a step that
waits. On a CPU nobody waits, so reads of numbers are counted, each with the place that reads. A
few places read on a CPU alone, and stand in `ON_A_CPU`. The views of a step are made before it:
RandAugment, which only infomin draws, reads numbers there on every device.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ftcl
import ftcl.methods.all
from ftcl.loss import info_nce
from ftcl.method import METHODS, as_published, build_method, transform_of
from ftcl.record import defaults
from ftcl.scores import _deviations, bin_counts
from ftcl.train import begin, find_device, pretrain, train_step
from ftcl.transform import TRANSFORMS
from ftcl.views import AUGMENTATIONS, _blur_some, two_views

pytestmark = pytest.mark.usefixtures("one_thread")

B = 16
SIDE = 16
SMALL = dict(encoder="small", dim=16, batch_size=B, queue_size=2 * B, bn_splits=2, epochs=2)
SMALL |= dict(record_every=1, precision="fp32")
READS = {  # computations whose result decides a number or a shape on the host
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "nonzero_static",
    "masked_select", "bincount", "unique_consecutive", "unique_dim", "_unique", "_unique2",
    "repeat_interleave", "histogramdd", "allclose", "_linalg_check_errors",
    "lift_fresh",  # no read, but a number of the host that is copied: the host waits for that, too
}  # fmt: skip
METHODS_OF_TENSORS = (
    "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "__array__",
    "cpu", "item", "numpy", "tolist",
)  # fmt: skip


ON_A_CPU = {  # place: what it reads there, and on no other device
    "loss.backward": {"__bool__", "_local_scalar_dense"},
    "scores._deviations": {"__float__", "_local_scalar_dense"},
    "scores.bin_counts": {"bincount"},
    "views._blur_some": {"nonzero"},
}
HELPERS = {"where", "note", "counted", "__torch_dispatch__"}  # of this file


def where():
    "File and function of the innermost frame that is the library's, or a test's"
    frame = sys._getframe(2)
    here = (Path(ftcl.__file__).parent, Path(__file__))
    while frame:
        file = Path(frame.f_code.co_filename)
        own = file.is_relative_to(here[0]) or file == here[1]
        if own and frame.f_code.co_name not in HELPERS:
            return f"{file.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Reads(TorchDispatchMode):
    "What is read on the host, by place"

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def note(self, what):
        self.seen[where(), what] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in READS or masked:
            self.note(name)
        return func(*args, **(kwargs or {}))


def counting(name, reads):
    "A method of tensors that notes each call"
    plain = getattr(Tensor, name)

    def counted(self, *args, **kwargs):
        reads.note(name)
        return plain(self, *args, **kwargs)

    return counted


@contextmanager
def counted_reads():
    "On a CPU: the reads of what runs inside, by place and kind"
    reads = Reads()
    with pytest.MonkeyPatch.context() as patch, reads:
        for name in METHODS_OF_TENSORS:
            patch.setattr(Tensor, name, counting(name, reads))
        yield reads.seen


@contextmanager
def waiting_refused():
    "On a GPU: what runs inside fails where the host would wait"
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield Counter()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watching(device):
    "Reads of what runs inside; on a GPU an error instead"
    return waiting_refused() if device.type == "cuda" else counted_reads()


def own_recipe(name):
    "Parameters of a run of a method, with the transformations that it can take"
    mixing = "posneg" if METHODS[name].has_negatives else "pos"
    own = dict(method=name, mixing=mixing, strength="auto")
    if name == "barlow":
        own |= dict(mixing="none", strength=1.0)
    return own


def begun(**own):
    "A run before its first step"
    given = defaults(pretrain) | SMALL | own
    p = as_published(given)
    accelerator = find_device(p["batch_size"], p["bn_splits"])
    transform = transform_of(p, torch.Generator(accelerator.device))
    return begin(p, accelerator, build_method(p, transform))


def views_of(s):
    "Views as a run has them, of random pixels"
    sides = [SIDE] * 2
    if s.method.small_views is not None:
        sides += [SIDE // 2] * s.method.small_views.number
    device = s.accelerator.device
    return tuple(torch.rand(B, 3, side, side, device=device) for side in sides)


def reads_of_steps(s, steps=2):
    "Of some steps after the first; constants are made in that one"
    views = views_of(s)
    train_step(s, views, True, 10)
    with watching(s.accelerator.device) as seen:
        for _ in range(steps):
            train_step(s, views, True, 10)
    return seen


def unexpected(seen):
    "Reads that a GPU would wait for"
    return {read: n for read, n in seen.items() if read[1] not in ON_A_CPU.get(read[0], ())}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_a_method_waits_for_nothing(name):
    assert not unexpected(reads_of_steps(begun(**own_recipe(name))))


@pytest.mark.parametrize("mixing", TRANSFORMS)
def test_a_step_of_a_transformation_waits_for_nothing(mixing):
    assert not unexpected(reads_of_steps(begun(mixing=mixing)))


@pytest.mark.parametrize(
    "own",
    [
        dict(mixing="posneg", level="sample"),
        dict(mixing="posneg", level="dimension", strength="auto"),
        dict(mixing="posneg", strength="linear 0 1", symmetric=True),
        dict(mixing="posneg", strength="auto", record_every=10),
        dict(mixing="posneg", renormalize=True, neg_query="original"),
        dict(mixing="none", tau_pos=0.05),
        dict(mixing="none", hardness=1.0),
        dict(mixing="none", false_share=0.1),
    ],
    ids=str,
)
def test_a_step_with_other_parameters_waits_for_nothing(own):
    assert not unexpected(reads_of_steps(begun(**own)))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_wait_for_nothing_but_drawn_operations(name):
    how = AUGMENTATIONS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and how.operations:
        pytest.skip("RandAugment sorts images by what is done to them")
    x = torch.randint(0, 256, (B, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    generator = torch.Generator(device)
    two_views(x, how, None, generator)  # constants are made once
    with watching(device) as seen:
        two_views(x, how, None, generator)
    places = {place for place, _ in unexpected(seen)}
    assert ("views.operate" in places) == bool(how.operations)
    assert how.operations or not places


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU refuses it")
@pytest.mark.parametrize("method", ["simclr", "moco_v3"])
def test_hard_negatives_beside_masked_ones_wait_at_one_place(method):
    "How many keys are free decides how many are the hardest: the one read that a GPU waits for"
    seen = unexpected(reads_of_steps(begun(method=method, mixing="mochi")))
    assert {place for place, _ in seen} == {"transform.order"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not pass by these places")
def test_the_places_that_read_on_a_cpu_are_all_needed():
    seen = reads_of_steps(begun(**own_recipe("moco_v2")))
    seen = seen + Counter({("views._blur_some", "nonzero"): 1})  # seen by the test of views
    found = {}
    for place, what in seen:
        found.setdefault(place, set()).add(what)
    assert found == ON_A_CPU


def test_on_another_device_those_places_read_nothing():
    "Meta tensors have no numbers: to read one is an error"
    x = torch.empty(B, 2 * B, device="meta", requires_grad=True)
    with pytest.raises(RuntimeError):
        float(x.detach().min())
    _deviations(x.detach())
    bin_counts(x.detach(), -1.0, 1.0, 10)
    info_nce(x[:, 0], x, 0.2).backward()
    images = torch.empty(B, 3, SIDE, SIDE, device="meta")
    _blur_some(images, torch.empty(B, 3, device="meta"))


def copy_a_number(loss):
    torch.as_tensor(0.5, device=loss.device)


def read_in_torch(loss):
    torch.full((2,), loss)


WAITS = {  # what somebody may write into a method, as a function of its loss
    "item": lambda loss: loss.item(),
    "if": lambda loss: 1 if loss > 0 else 0,
    "float": float,
    "int": int,
    "format": "{:.2f}".format,
    "cpu": lambda loss: loss.cpu(),
    "tolist": lambda loss: loss.tolist(),
    "numpy": lambda loss: loss.detach().cpu().numpy(),
    "range": lambda loss: range(loss.long()),
    "in": lambda loss: 1.0 in loss[None],
    "nonzero": lambda loss: loss[None].nonzero(),
    "where": lambda loss: torch.where(loss[None] > 0),
    "mask": lambda loss: loss[None][loss[None] > 0],
    "masked_select": lambda loss: loss[None].masked_select(loss[None] > 0),
    "unique": lambda loss: loss[None].unique(),
    "equal": lambda loss: torch.equal(loss, loss + 1),
    "allclose": lambda loss: torch.allclose(loss, loss + 1),
    "repeat": lambda loss: loss[None].repeat_interleave(torch.ones_like(loss[None]).long()),
    "fill": read_in_torch,
    "copy": copy_a_number,
}


@pytest.mark.parametrize("how", WAITS)
def test_a_method_that_waits_is_caught(how, monkeypatch):
    s = begun(**own_recipe("moco_v2"))
    kind = type(s.method)
    plain = kind.forward

    def forward(self, *views, **options):
        step = plain(self, *views, **options)
        WAITS[how](step.loss.detach())
        return step

    monkeypatch.setattr(kind, "forward", forward)
    if s.accelerator.device.type == "cuda":
        if how != "item":
            pytest.skip("one way shows that torch refuses")
        with pytest.raises(RuntimeError, match="synchroniz"):
            reads_of_steps(s)
        return
    places = {place for place, _ in unexpected(reads_of_steps(s))}
    assert places and all(place.startswith("test_no_sync.") for place in places)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU refuses it")
def test_a_gradient_and_an_update_that_wait_are_caught(monkeypatch):
    s = begun(**own_recipe("moco_v2"))
    s.method.encoder.head[0].weight.register_hook(lambda grad: grad * (grad.norm() < 1).item())
    assert ("test_no_sync.<lambda>", "item") in unexpected(reads_of_steps(s))
    s = begun(**own_recipe("moco_v2"))
    monkeypatch.setattr(s.method, "update", lambda step: step.loss.item())
    assert ("test_no_sync.<lambda>", "item") in unexpected(reads_of_steps(s))
