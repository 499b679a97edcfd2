"""Transformations and losses that the paper is compared with: each against its formula

The plain forms go query by query, from the same draws in the same order.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import ftcl.methods.simclr  # noqa: F401 (registers the method)
from ftcl.checkpoint import read_checkpoint
from ftcl.core import InputError, Processes
from ftcl.loss import in_batch, info_nce, reweighted_info_nce, scores
from ftcl.train import pretrain
from ftcl.transform import ALIASES, TRANSFORMS, FeatureTransform, Negatives, on_arc, sample_beta
from ftcl.transform import transform_names

B = 6
D = 16
K = 40
OWN = ["mochi", *ALIASES["synco"]]  # make negatives for each query
PAIRS = ["pos_in", "pos_arc"]
SHARED = ["neg_ex", "neg_arc"]
ARCS = ["pos_arc", "neg_arc"]


def unit(n, seed):
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).double()
    return F.normalize(x, dim=1)


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def vectors():
    q = unit(B, 1)
    return q, F.normalize(q + 0.7 * unit(B, 2), dim=1), unit(K, 3)


def nrm(x):
    return x / x.norm(dim=-1, keepdim=True)


def slerp(a, b, l):
    "One vector each: the textbook's formula"
    angle = (a @ b).acos()
    return ((l * angle).sin() * a + ((1 - l) * angle).sin() * b) / angle.sin()


def levels_of(name):
    return TRANSFORMS[name].levels


def draw(alpha, rows, level, g):
    "l of each row, as (rows, D)"
    shapes = dict(feature=(), sample=(rows, 1), dimension=(rows, D))
    return sample_beta(alpha, shapes[level], g).double().expand(rows, D)


def plain_pair(name, q, k, level, s, g):
    beta = draw(2.0, len(q), level, g)
    lam = 1 - s * beta / 2 if name == "pos_in" else 1 + s * beta
    if name == "pos_in":
        return lam * q + (1 - lam) * k, lam * k + (1 - lam) * q, lam.mean()
    rows = range(len(q))
    most = [(1 + math.pi / (q[i] @ k[i]).acos()) / 2 for i in rows]  # there they are opposite
    lam = torch.stack([torch.minimum(lam[i, 0], most[i]) for i in rows])
    ends = [(slerp(q[i], k[i], lam[i]), slerp(k[i], q[i], lam[i])) for i in rows]
    return *(torch.stack(o) for o in zip(*ends)), None


def plain_shared(name, keys, level, s, g):
    perm = torch.randperm(len(keys), generator=g)
    beta = draw(1.6, len(keys), level, g)
    if name == "neg_ex":
        lam = 1 + s * beta
        return lam * keys + (1 - lam) * keys[perm], lam.mean()
    mixed = [slerp(keys[i], keys[perm[i]], beta[i, 0]) for i in range(len(keys))]
    itself = perm == torch.arange(len(keys))
    return torch.where(itself[:, None], keys, torch.stack(mixed)), beta.mean()


def plain_own(name, q, keys, mask, g, sizes):
    "Negatives made for each query: a list of hardest keys, then draws in order, then the formula"
    free = [[j for j in range(len(keys)) if not mask[i, j]] for i in range(len(q))]
    ranked = [sorted(free[i], key=lambda j: -float(q[i] @ keys[j])) for i in range(len(q))]
    most = min(sizes["N"], *map(len, free))

    def some(n):
        n = min(n, most)
        drawn = torch.randint(most, (len(q), n), generator=g)
        chosen = [[keys[ranked[i][j]] for j in drawn[i]] for i in range(len(q))]
        return torch.stack([torch.stack(row) for row in chosen])

    def uniform(low, high, x):
        u = torch.rand(*x.shape[:2], 1, generator=g).double()
        return low + (high - low) * u

    q = q[:, None]
    if name == "mochi":
        n, other = some(sizes["s"]), some(sizes["s"])
        a = uniform(0, 1, n)
        hard = some(sizes["s'"])
        b = uniform(0, 0.5, hard)
        return nrm(torch.cat([a * n + (1 - a) * other, b * q + (1 - b) * hard], 1))
    n = some(256 if name in ("synco_in", "synco_ex", "synco_mix") else 64)
    if name == "synco_in":
        a = uniform(0, 0.5, n)
        return nrm(a * q + (1 - a) * n)
    if name == "synco_ex":
        return nrm(q + uniform(1, 1.5, n) * (n - q))
    if name == "synco_mix":
        other = some(256)
        c = uniform(0, 1, n)
        return nrm(c * n + (1 - c) * other)
    if name == "synco_noise":
        return nrm(n + 0.01 * torch.randn(n.shape, generator=g).double())
    return nrm(n + 0.01 * (q if name == "synco_grad" else q.sign()))


PAIR_CASES = [(n, level) for n in PAIRS for level in levels_of(n)]
SHARED_CASES = [(n, level) for n in SHARED for level in levels_of(n)]


@pytest.mark.parametrize("name, level", PAIR_CASES)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_pairs_follow_their_formula(vectors, name, level, strength):
    q, k, keys = vectors
    ft = FeatureTransform(name, level, strength=strength, generator=generator())
    q_hat, k_hat, same = ft(q, k, keys)
    plain_q, plain_k, mean = plain_pair(name, q, k, level, strength, generator())
    torch.testing.assert_close(q_hat, plain_q, rtol=0, atol=1e-9)
    torch.testing.assert_close(k_hat, plain_k, rtol=0, atol=1e-9)
    assert same is keys and ft.draws == [f"l_{name}"]
    if mean is not None:
        torch.testing.assert_close(ft.drawn[f"l_{name}"], mean)
    on = FeatureTransform(name, level, strength=strength, renormalize=True, generator=generator())
    torch.testing.assert_close(on(q, k, keys)[0], nrm(plain_q), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name, level", SHARED_CASES)
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_shared_negatives_follow_their_formula(vectors, name, level, append, renormalize):
    q, k, keys = vectors
    options = dict(strength=0.4, append=append, renormalize=renormalize)
    ft = FeatureTransform(name, level, **options, generator=generator())
    mask = torch.rand(B, K, generator=generator()) < 0.3
    negatives = ft(q, k, keys, mask)[2]
    g = generator()
    plain, mean = plain_shared(name, keys, level, 0.4, g)
    plain = nrm(plain) if renormalize else plain
    perm = torch.randperm(K, generator=generator())
    new = mask | mask[:, perm]
    if append:
        plain = torch.cat([keys, plain])
        new = torch.cat([mask, new], 1)
    torch.testing.assert_close(negatives.shared, plain, rtol=0, atol=1e-9)
    assert torch.equal(negatives.mask, new) and negatives.own is None
    torch.testing.assert_close(ft.drawn[f"l_{name}"], mean)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("masked", [False, True])
def test_own_negatives_follow_their_formula(monkeypatch, vectors, name, masked):
    q, k, keys = vectors
    sizes = {"N": 12, "s": 9, "s'": 5}
    monkeypatch.setattr(TRANSFORMS[name], "hardest", sizes["N"])
    monkeypatch.setattr(TRANSFORMS["mochi"], "pairs", sizes["s"])
    monkeypatch.setattr(TRANSFORMS["mochi"], "with_query", sizes["s'"])
    mask = torch.rand(B, K, generator=generator(1)) < (0.8 if masked else -1)
    ft = FeatureTransform(name, generator=generator())
    negatives = ft(q, k, keys, mask if masked else None)[2]
    plain = plain_own(name, q, keys, mask, generator(), sizes)
    torch.testing.assert_close(negatives.own, plain, rtol=0, atol=1e-12)
    assert negatives.shared is keys and ft.draws == [] and ft.drawn == {}
    assert negatives.own.shape[1] < 12 if masked and name == "mochi" else True


@pytest.mark.parametrize("name", OWN)
def test_masked_keys_are_never_chosen(vectors, name):
    "Masked keys alone have a number in one dimension; elsewhere they are the queries themselves"
    q, k, keys = vectors
    q, keys = (x.clone() for x in (q, keys))
    q[:, 0] = 0
    keys[:, 0] = 0
    mask = torch.zeros(B, K, dtype=torch.bool)
    mask[:, :B] = True
    keys[:B] = q
    keys[:B, 0] = 9
    own = FeatureTransform(name, generator=generator())(q, k, keys, mask)[2].own
    assert own[..., 0].abs().max() < (0.1 if name == "synco_noise" else 1e-12)


def test_nothing_to_choose_from_gives_nothing(vectors):
    q, k, keys = vectors
    for name in OWN:
        ft = FeatureTransform(name, generator=generator())
        mask = torch.zeros(B, K, dtype=torch.bool)
        mask[2] = True  # one query alone has none left
        assert ft(q, k, keys, mask)[2].own is None
        one = ft(q, k, keys[:1])[2].own
        assert one.shape[1] == (2 if name == "mochi" else 1)
        with pytest.raises(InputError, match="needs negatives that all queries share"):
            ft(q, k, keys[None, :5].expand(B, 5, D))


def test_a_batch_never_meets_itself(vectors):
    "In a batch as its own source, what is made of a query's own two would be near to it"
    q, k, keys, mask = in_batch(*vectors[:2])
    for name in ["neg_ex", "neg_arc"]:
        negatives = FeatureTransform(name, generator=generator())(q, k, keys, mask)[2]
        perm = torch.randperm(2 * B, generator=generator())
        for i in range(B):
            own = torch.tensor([i, B + i])
            touched = torch.isin(torch.arange(2 * B), own) | torch.isin(perm, own)
            assert torch.equal(negatives.mask[i], touched)
    own = FeatureTransform("synco_grad", generator=generator())(q, k, keys, mask)[2].own
    nearest = (own @ keys.T).argmax(2)  # (B, S)
    assert not mask.gather(1, nearest).any()


def test_synthetic_negatives_carry_no_gradient(vectors):
    q, k, keys = (x.clone().requires_grad_() for x in vectors)
    negatives = FeatureTransform("synco+mochi", generator=generator())(q, k, keys)[2]
    assert not negatives.own.requires_grad and negatives.shared is keys
    info_nce(*scores(q, k, negatives), 0.2).backward()
    shared_and_own = scores(q, k, negatives)[1]
    p = torch.softmax(torch.cat([(q * k).sum(1, keepdim=True), shared_and_own], 1) / 0.2, 1)
    push = p[:, 1 : K + 1].T @ q / 0.2 / B
    torch.testing.assert_close(keys.grad, push.detach(), rtol=0, atol=1e-12)


def test_they_join(vectors):
    q, k, keys = vectors
    assert transform_names("synco") == ALIASES["synco"]
    assert len(ALIASES["synco"]) == 6 == len(set(ALIASES["synco"]))
    negatives = FeatureTransform("synco+mochi", generator=generator())(q, k, keys)[2]
    apart = FeatureTransform("synco_in", generator=generator())(q, k, keys)[2]
    assert torch.equal(negatives.own[:, :K], apart.own)
    assert negatives.own.shape == (B, 8 * K, D)
    after = FeatureTransform("mochi+neg", generator=generator())(q, k, keys)[2]
    alone = FeatureTransform("mochi", generator=generator())(q, k, keys)[2]
    assert torch.equal(after.own, alone.own) and not torch.equal(after.shared, keys)
    with pytest.raises(InputError, match="synco_in may stand in it once"):
        FeatureTransform("synco_in+synco")
    with pytest.raises(InputError, match="Did you mean 'synco_mix'"):
        FeatureTransform("synco_mixx")


@pytest.mark.parametrize("name", [*PAIRS, *SHARED, *OWN])
@pytest.mark.parametrize("masked", [False, True])
def test_two_processes_draw_what_one_would(vectors, name, masked):
    q, k, keys = vectors
    mask = None
    fewest = torch.tensor([K, K])
    if masked:
        mask = torch.rand(B, K, generator=generator(1)) < 0.5
        fewest = (~mask).sum(1).view(2, -1).amin(1)
    level = "sample"
    whole = FeatureTransform(name, level, generator=generator())
    q_hat, k_hat, of_all = whole(q, k, keys, mask)
    of_all = of_all if isinstance(of_all, Negatives) else Negatives(of_all)
    for rank in range(2):
        ft = FeatureTransform(name, level, generator=generator())
        ft.processes = Processes(rank, 2, lambda x: fewest if masked else torch.cat([x, x]))
        rows = slice(rank * B // 2, (rank + 1) * B // 2)
        part = ft(q[rows], k[rows], keys, None if mask is None else mask[rows])
        assert torch.equal(part[0], q_hat[rows]) and torch.equal(part[1], k_hat[rows])
        mine = part[2] if isinstance(part[2], Negatives) else Negatives(part[2])
        assert torch.equal(mine.shared, of_all.shared)
        if of_all.own is not None:
            torch.testing.assert_close(mine.own, of_all.own[rows], rtol=0, atol=1e-15)
        assert ft.drawn == whole.drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-6, 1e-3, 1.0, 3.0, math.pi - 1e-6, math.pi])
def test_a_pair_on_the_arc_is_safe_at_every_angle(dtype, angle):
    "Length 1, the right angle, and a gradient no larger than l allows"
    q = torch.zeros(1, D, dtype=dtype)
    q[0, 0] = 1
    k = torch.zeros(1, D, dtype=dtype)
    k[0, 0] = math.cos(angle)
    k[0, 1] = math.sin(angle)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-3  # acos is rough near 1
    for lam in (1.0, 1.2, 1.7, 2.0):
        x = q.clone().requires_grad_()
        pair = on_arc(x, k, lam), on_arc(k, x, lam)
        for end in pair:
            torch.testing.assert_close(end.norm(), end.new_ones(()), rtol=0, atol=1e-6)
        opened = torch.arccos((pair[0] @ pair[1].T).clamp(-1, 1)).item()
        assert abs(opened - min((2 * lam - 1) * angle, math.pi)) < tolerance
        for end in pair:
            for i in range(D):
                (grad,) = torch.autograd.grad(end[0, i], x, retain_graph=True)
                assert grad.isfinite().all() and grad.norm() < 5


def test_the_gradient_on_the_arc_is_right(vectors):
    q, k, _ = (x.clone().requires_grad_() for x in vectors)
    lam = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(on_arc, (q, k, lam))
    k_hat = FeatureTransform("pos_arc", detach_key=True, generator=generator())(q, k, unit(K, 3))[1]
    assert not k_hat.requires_grad
    for wrong in (torch.ones(B, D), torch.ones(B)):
        with pytest.raises(InputError, match="lam h"):
            on_arc(q, k, wrong.double())
    with pytest.raises(InputError, match="make them alike"):
        on_arc(q, k[:1], 0.5)


@pytest.mark.parametrize("name", ARCS)
def test_an_arc_has_one_angle(name):
    with pytest.raises(InputError, match=f"level is 'dimension', but {name} knows only feature"):
        FeatureTransform(name, "dimension")


# ------------------------------------------------------------------------------------ weights


def pair_of_views():
    torch.manual_seed(0)
    a = torch.randn(64, 128)
    b = a + 0.5 * torch.randn(64, 128)
    return (F.normalize(x.double(), dim=1) for x in (a, b))


@pytest.mark.parametrize("beta, value", [(1, 2.449125449268), (0.5, 2.416103084330)])
def test_hcl_is_its_authors(beta, value):
    a, b = pair_of_views()
    total = 0
    for q, k in ((a, b), (b, a)):
        q, k, keys, mask = in_batch(q, k)
        total += reweighted_info_nce(*scores(q, k, Negatives(keys, mask=mask)), 0.5, beta, 0.1) / 2
    assert abs(total.item() - value) < 1e-9


def test_without_weights_it_is_info_nce(vectors):
    pos, neg = scores(*vectors)
    for tau in (0.01, 0.1, 1.0):
        for x in (pos, -3 * pos, 2 * pos):
            ours = reweighted_info_nce(x, 2 * neg, tau, 0, 0)
            torch.testing.assert_close(ours, info_nce(x, 2 * neg, tau), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta, tau_plus", [(0, 0), (1, 0.1), (0.5, 0), (0, 0.05)])
def test_the_gradient_of_weights_is_right(vectors, beta, tau_plus):
    pos, neg = (o.clone().requires_grad_() for o in scores(*vectors))
    f = lambda p, n: reweighted_info_nce(p, n, 0.3, beta, tau_plus)  # noqa: E731
    assert torch.autograd.gradcheck(f, (pos, neg))
    assert torch.autograd.gradgradcheck(f, (pos, neg))
    kept = torch.rand(B, K, generator=generator()) < 0.5
    masked = neg.detach().masked_fill(~kept, -math.inf).requires_grad_()
    loss = f(pos.detach(), masked)
    alone = [f(pos[i : i + 1], neg[i : i + 1, kept[i]]) for i in range(B)]
    torch.testing.assert_close(loss, sum(alone) / B, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(loss, masked)
    assert (grad[~kept] == 0).all() and grad.isfinite().all()


def test_weights_stay_finite():
    "At low temperatures, in half precision, where the positives outweigh all and none is left"
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for tau in (1e-3, 0.01, 0.5):
            for level in (-1.0, 0.0, 1.0):
                pos = torch.full((3,), level, dtype=dtype, requires_grad=True)
                neg = torch.linspace(-1, 1, 30).view(3, 10).to(dtype)
                neg[2] = -math.inf
                neg.requires_grad_()
                loss = reweighted_info_nce(pos, neg, tau)
                loss.backward()
                assert loss.isfinite() and loss >= 0
                assert pos.grad.isfinite().all() and neg.grad.isfinite().all()
                assert pos.grad[2] == 0 and (neg.grad[2] == 0).all()
    assert reweighted_info_nce(pos[2:], neg[2:], 0.1) == 0


def test_wrong_weights_are_refused():
    scored = torch.zeros(2), torch.zeros(2, 3)
    for name, wrong in (("beta", -0.1), ("beta", math.inf), ("tau_plus", 1.0), ("tau_plus", None)):
        with pytest.raises(InputError, match=f"{name} is {wrong}, but must be a number from 0"):
            reweighted_info_nce(*scored, 0.5, **{name: wrong})
    with pytest.raises(InputError, match="tau is 0"):
        reweighted_info_nce(*scored, 0)
    with pytest.raises(InputError, match="neg has the shape"):
        reweighted_info_nce(scored[0], scored[1][:1], 0.5)


# ----------------------------------------------------------------------------------- in a run

RUN = dict(n_images=96, holdout=32, size=16, epochs=2, batch_size=32, queue_size=50, bn_splits=4)
RUN |= dict(precision="fp32", progress=False, lr=0.02, dim=16)
EVERY = "mochi+synco+pos_arc+neg_ex+neg_arc+pos_in"


@pytest.mark.parametrize("method", ["moco_v2", "simclr"])
def test_a_run_with_all_of_them_resumes_exactly(tmp_path, method):
    p = RUN | dict(method=method, mixing=EVERY, level="sample")
    pretrain(**p, out=str(tmp_path / "a"), name="run")
    pretrain(**p, out=str(tmp_path / "b"), name="run", stop_after=1)
    pretrain(**p, out=str(tmp_path / "b"), name="run", resume=True)
    one, two = (read_checkpoint(tmp_path / o / "run.safetensors")[0] for o in "ab")
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    scored = pd.read_parquet(tmp_path / "a" / "run.parquet")
    for name, low in dict(l_pos_in=0.5, l_pos_arc=1, l_neg_ex=1, l_neg_arc=0).items():
        assert scored[name].between(low, 1 if low < 1 else 2).all(), name
    assert scored.loss.notna().all()
