"The fast scores, transformations, losses and records give what the plain lines give, from the same random draws"
import itertools

import pytest
import torch
import torch.nn.functional as F

from ftcl.loss import info_nce, scores, streamed_info_nce
from ftcl.queue import Queue
from ftcl.transform import LEVELS, MIXINGS, FeatureTransform, sample_beta
from ftcl.visualize import BINS, LIMIT, score_statistics

B, D, K, TAU = 13, 37, 101, 0.2  # nothing divides anything, and the queue is full after eight batches
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def plain_step(q, k, keys, mixing, level, renormalize, generator):
    "The formulas of the paper, term by term; whole masks and copies: loss, scores"
    norm = (lambda x: x / x.norm(dim=1, keepdim=True)) if renormalize else (lambda x: x)
    shape = lambda n: {"feature": (), "sample": (n, 1), "dimension": (n, D)}[level]
    if "pos" in mixing:
        lam = 1 + sample_beta(2.0, shape(B), generator)
        q, k = norm(lam * q + (1 - lam) * k), norm(lam * k + (1 - lam) * q)
    if "neg" in mixing:
        perm = torch.randperm(K, generator=generator)
        lam = sample_beta(1.6, shape(K), generator)
        keys = norm(lam * keys + (1 - lam) * keys[perm])
    pos, neg = (q * k).sum(1), q @ keys.T
    logits = torch.cat([pos[:, None], neg], 1) / TAU
    return F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)), pos, neg


def fast_step(q, k, keys, mixing, level, renormalize, generator):
    pos, neg = scores(*FeatureTransform(mixing, level, renormalize=renormalize, generator=generator)(q, k, keys))
    return info_nce(pos, neg, TAU), pos, neg


def streamed_step(q, k, keys, mixing, level, renormalize, generator):
    vectors = FeatureTransform(mixing, level, renormalize=renormalize, generator=generator)(q, k, keys)
    return streamed_info_nce(*vectors, TAU), *scores(*vectors)


def unit(n, seed):
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("form", ["fast", "streamed", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("mixing, level, renormalize", list(itertools.product(MIXINGS, LEVELS, [False, True])))
def test_a_step_is_the_plain_step(mixing, level, renormalize, dtype, form):
    step = {"fast": fast_step, "streamed": streamed_step, "compiled": torch.compile(fast_step, backend="aot_eager")}[form]
    how, queue, ring = (mixing, level, renormalize), Queue(K, D), None
    for turn in range(10 if form == "fast" else 2):  # the queue wraps around
        vectors = unit(B, 2 * turn), unit(B, 2 * turn + 1)
        ring = queue.keys.clone() if ring is None else ring
        results = []
        for f, keys, kind in ((plain_step, ring, torch.float64), (step, queue.keys, dtype)):
            q, k = (o.to(dtype).to(kind, copy=True).requires_grad_() for o in vectors)
            loss, pos, neg = f(q, k, keys.to(dtype).to(kind), *how, torch.Generator().manual_seed(turn))
            loss.backward()
            numbers = dict(loss=loss.detach(), pos=pos.detach(), neg=neg.detach(), q_grad=q.grad, k_grad=k.grad)
            results.append(numbers | score_statistics(pos, neg))
        for name, want in results[0].items():
            bin_width = 2 * LIMIT / BINS if "_q" in name and name != "q_grad" else 0
            got, tol = results[1][name], TOLERANCE[dtype]
            assert (want is None) == (got is None), name
            if want is not None:
                torch.testing.assert_close(got.double(), want.double(), atol=tol + bin_width, rtol=tol, msg=lambda m: f"{name}: {m}")
        queue.enqueue(vectors[1])
        for i, key in enumerate(vectors[1]):
            ring[(turn * B + i) % K] = key


def test_forward_mode_and_function_transforms_see_through_the_fast_paths():
    q, k, keys = unit(B, 1), unit(B, 2), unit(K, 3)
    fast = lambda q: info_nce(*scores(q, k, keys), TAU)
    plain = lambda q: plain_step(q, k, keys, "none", "feature", False, None)[0]
    torch.testing.assert_close(torch.func.grad(fast)(q), torch.func.grad(plain)(q))
    torch.testing.assert_close(torch.func.jvp(fast, (q,), (k,)), torch.func.jvp(plain, (q,), (k,)))
    both = torch.stack([q, k])
    torch.testing.assert_close(torch.func.vmap(fast)(both), torch.stack([plain(q), plain(k)]))
