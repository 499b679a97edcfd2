"Fast scores, transformations, losses and records give what plain lines give, from equal draws"

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ftcl.core import InputError, Processes
from ftcl.loss import info_nce, scores, streamed_info_nce
from ftcl.queue import Queue
from ftcl.scores import BINS, LIMIT, score_statistics
from ftcl.transform import LEVELS, TRANSFORMS, FeatureTransform, Transform
from ftcl.transform import sample_beta, transform_names

B = 13  # none of these three divides another
D = 37
K = 101  # the queue is full after eight batches
TAU = 0.2
MIXINGS = ["none", "pos", "neg", "posneg"]
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def unit(n, seed):
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain_step(q, k, keys, mixing, level, renormalize, generator):
    "The formulas of the paper, term by term; whole masks and copies: loss, scores"

    def norm(x):
        return x / x.norm(dim=1, keepdim=True) if renormalize else x

    def draw(alpha, n):
        shapes = {"feature": (), "sample": (n, 1), "dimension": (n, D)}
        return sample_beta(alpha, shapes[level], generator)

    if mixing in ("pos", "posneg"):
        lam = 1 + draw(2.0, B)
        q, k = norm(lam * q + (1 - lam) * k), norm(lam * k + (1 - lam) * q)
    if mixing in ("neg", "posneg"):
        perm = torch.randperm(K, generator=generator)
        lam = draw(1.6, K)
        keys = norm(lam * keys + (1 - lam) * keys[perm])
    pos = (q * k).sum(1)
    neg = q @ keys.T
    logits = torch.cat([pos[:, None], neg], 1) / TAU
    return F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)), pos, neg


def transformed(q, k, keys, mixing, level, renormalize, generator):
    return FeatureTransform(mixing, level, renormalize=renormalize, generator=generator)(q, k, keys)


def fast_step(*step):
    pos, neg = scores(*transformed(*step))
    return info_nce(pos, neg, TAU), pos, neg


def streamed_step(*step):
    vectors = transformed(*step)
    return streamed_info_nce(*vectors, TAU), *scores(*vectors)


def numbers(step, vectors, keys, how, turn, dtype, kind):
    "What a step yields: loss, scores, gradients and the statistics that are recorded"
    q, k = (o.to(dtype).to(kind, copy=True).requires_grad_() for o in vectors)
    loss, pos, neg = step(q, k, keys.to(dtype).to(kind), *how, torch.Generator().manual_seed(turn))
    loss.backward()
    own = dict(loss=loss, pos=pos, neg=neg, q_grad=q.grad, k_grad=k.grad)
    return {n: o if o is None else o.detach() for n, o in own.items()} | score_statistics(pos, neg)


def check_step(step, how, dtype, turns):
    "Turn by turn: the plain step in float64, this one in its own type, from equal draws and keys"
    queue = Queue(K, D)
    ring = queue.keys.clone()
    for turn in range(turns):
        vectors = unit(B, 2 * turn), unit(B, 2 * turn + 1)
        wanted = numbers(plain_step, vectors, ring, how, turn, dtype, torch.float64)
        got = numbers(step, vectors, queue.keys, how, turn, dtype, dtype)
        for name, want in wanted.items():
            assert (want is None) == (got[name] is None), name
            if want is not None:
                bin_width = 2 * LIMIT / BINS if "_q" in name and name != "q_grad" else 0
                tol = dict(atol=TOLERANCE[dtype] + bin_width, rtol=TOLERANCE[dtype])
                torch.testing.assert_close({name: got[name].double()}, {name: want.double()}, **tol)
        queue.enqueue(vectors[1])
        for i, key in enumerate(vectors[1]):
            ring[(turn * B + i) % K] = key


@pytest.mark.parametrize("step", [fast_step, streamed_step])
@FLOATS
@pytest.mark.parametrize(
    "mixing, level, renormalize", list(itertools.product(MIXINGS, LEVELS, [False, True]))
)
def test_a_step_is_the_plain_step(mixing, level, renormalize, dtype, step):
    check_step(step, (mixing, level, renormalize), dtype, 2)


@FLOATS
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_step_is_the_plain_step_when_the_queue_wraps_around(mixing, dtype):
    check_step(fast_step, (mixing, "sample", False), dtype, 10)


COMPILED = [  # in one piece, and broken by the random draws, which no compiler sees through
    ("none", "feature", False, torch.float32),
    ("none", "feature", False, torch.bfloat16),
    ("posneg", "feature", True, torch.float32),
]


@pytest.mark.parametrize(
    "mixing, level, renormalize, dtype", COMPILED, ids=["float32", "bf16", "posneg"]
)
def test_a_compiled_step_is_the_plain_step(mixing, level, renormalize, dtype):
    # without it the compiler gives up after eight cases, and runs the rest as they are
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(fast_step, backend="aot_eager")
    check_step(compiled, (mixing, level, renormalize), dtype, 2)
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] > 0


def test_forward_mode_and_function_transforms_see_through_the_fast_paths():
    q, k, keys = unit(B, 1), unit(B, 2), unit(K, 3)

    def fast(q):
        return info_nce(*scores(q, k, keys), TAU)

    def plain(q):
        return plain_step(q, k, keys, "none", "feature", False, None)[0]

    torch.testing.assert_close(torch.func.grad(fast)(q), torch.func.grad(plain)(q))
    torch.testing.assert_close(torch.func.jvp(fast, (q,), (k,)), torch.func.jvp(plain, (q,), (k,)))
    both = torch.stack([q, k])
    torch.testing.assert_close(torch.func.vmap(fast)(both), torch.stack([plain(q), plain(k)]))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_second_derivative_is_the_plain_one(scale):
    q, k, keys = (o.double() for o in (unit(B, 1), unit(B, 2), unit(K, 3)))
    found = []
    for step in (fast_step, plain_step):
        x = q.clone().requires_grad_()
        loss, _, _ = step(x, k, keys, "none", "feature", False, None)
        (first,) = torch.autograd.grad(scale * loss, x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16])
def test_a_masked_negative_is_as_if_it_were_not_there(kind):
    pos, neg = scores(*(o.to(kind) for o in (unit(B, 1), unit(B, 2), unit(K, 3))))
    seen = torch.rand(B, K, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[0] = False  # a query without a negative
    x = neg.masked_fill(~seen, -math.inf).requires_grad_()
    loss = info_nce(pos, x, TAU)
    (grad,) = torch.autograd.grad(loss, x)
    tol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3}[kind]
    total = 0.0
    for i in range(1, B):
        left = neg[i : i + 1, seen[i]].clone().requires_grad_()
        alone = info_nce(pos[i : i + 1], left, TAU)
        (want,) = torch.autograd.grad(alone / B, left)
        torch.testing.assert_close(grad[i, seen[i]], want[0], atol=tol, rtol=tol)
        total = total + alone / B
    torch.testing.assert_close(loss, total, atol=tol, rtol=tol)
    assert (grad[~seen] == 0).all()


def test_a_transformation_of_ones_own_is_one_class():
    class Late(Transform, name="late"):
        "The second half of the negatives"

        acts_on = "negatives"

        def forward(self, q, k, negatives):
            keys = self.shared(negatives)
            return negatives._replace(shared=keys[len(keys) // 2 :])

    try:
        q, k, keys = unit(B, 1), unit(B, 2), unit(K, 3)
        generator = torch.Generator()
        both = FeatureTransform("pos+late", generator=generator.manual_seed(0))(q, k, keys)
        alone = FeatureTransform("pos", generator=generator.manual_seed(0))(q, k, keys)
        assert torch.equal(both[0], alone[0]) and torch.equal(both[2], keys[K // 2 :])
        assert transform_names("late+posneg") == ["late", "pos", "neg"]
    finally:
        del TRANSFORMS["late"]
    with pytest.raises(InputError, match="must be none, or one or more of .* joined by"):
        FeatureTransform("late")


@pytest.mark.parametrize("level", LEVELS)
def test_two_processes_draw_what_one_would(level):
    q, k, keys = unit(B - 1, 1), unit(B - 1, 2), unit(K, 3)
    whole = FeatureTransform(level=level, generator=torch.Generator().manual_seed(0))
    q_hat, k_hat, keys_hat = whole(q, k, keys)
    for rank in range(2):
        one = FeatureTransform(level=level, generator=torch.Generator().manual_seed(0))
        one.processes = Processes(rank, 2)
        part = one.processes.part
        wanted = (part(q_hat), part(k_hat), keys_hat)
        for got, want in zip(one(part(q), part(k), keys), wanted):
            assert torch.equal(got, want)
        assert one.drawn == whole.drawn
