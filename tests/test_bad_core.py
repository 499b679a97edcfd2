"Odd arguments of transformation, loss, encoder, queue and method: a right result or one sentence"

import math
import pickle
import random
import warnings
from copy import deepcopy
from fractions import Fraction
from inspect import signature
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ftcl.checkpoint import read_note
from ftcl.core import InputError, Processes, check_shapes, counted, nearest, positive
from ftcl.encoder import Encoder, SplitBN, backbone, ema_update, projection, small_resnet, split_bn
from ftcl.loss import in_batch, info_nce, positive_logit, scores, streamed_info_nce
from ftcl.method import Contrast, Method, MoCo, augmentation_of, build_method
from ftcl.method import copy_key_encoder, join, join_contrasts, vectors_of
from ftcl.methods.barlow import barlow_loss, cross_correlations
from ftcl.methods.infomin import orders
from ftcl.methods.swav import swapped_loss
from ftcl.queue import Queue
from ftcl.scores import ScoreRecorder
from ftcl.transform import LEVELS, TRANSFORMS, FeatureTransform, Options, Transform
from ftcl.transform import Negatives, _beta_parameter, check_memory, check_strength
from ftcl.transform import extrapolate, interpolate, mean_of, sample_beta, schedule
from ftcl.transform import transform_names

pytestmark = pytest.mark.usefixtures("one_thread")

B, K, D = 4, 6, 8
RUN = dict(method="moco_v2", encoder="small", stem="small", dim=8, bn_splits=1, queue_size=40)
RUN |= dict(momentum=0.9, tau=0.1, tau_pos=0.0, symmetric=False, neg_query="transformed")
RUN |= dict(precision="fp32", seed=0, weights="", augmentation="", view_strength=1.0, batch_size=8)


def generator():
    return torch.Generator().manual_seed(0)


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=generator()), dim=-1)


def views(n=4, size=16):
    return torch.randn(n, 3, size, size, generator=generator())


def odd_values():
    "What nobody asked for, of many kinds"
    x = unit(B, D)
    with torch.inference_mode():
        inferred = unit(B, D)
    numbers = [0, 1, -1, 3, 2**31, 2**60, 2**62, 2**63, 10**40, 10**400, 0.0, 0.5, 1e-45, 1e-38]
    numbers += [1e300, math.inf, -math.inf, math.nan, 1j, True, False, Fraction(1, 2)]
    numbers += [np.float64(0.3), np.int64(3), np.array(2.0), np.zeros((B, D), np.float32)]
    others = [None, "", "x", "none", "small", "cpu", "cuda", b"x", [], [1.0], (), (1, 2), {}, set()]
    others += [object(), int, len, slice(3), torch.float32, torch.device("meta"), nn.Linear(3, 3)]
    others += [nn.Identity(), generator(), np.random.default_rng(0)]
    tensors = [torch.tensor(0.5), torch.tensor(math.nan), torch.tensor(3), torch.zeros(0)]
    tensors += [torch.zeros(0, D), torch.zeros(B, 0), x[:1], x[0], x.T, unit(K, D), unit(B, 3, D)]
    tensors += [x.double(), x.half(), x.bfloat16(), x.to(torch.complex64), x.long(), x > 0]
    tensors += [
        x.to(torch.float8_e4m3fn),
        x.to("meta"),
        x.to_sparse(),
        x.requires_grad_(),
        inferred,
    ]
    tensors += [torch.full((B, D), v) for v in (math.inf, -math.inf, math.nan, 1e38)]
    tensors += [views(), views()[:0], views()[:1], views(2, 1), views().to("meta"), views().long()]
    return numbers + others + tensors


def test_a_nested_tensor_has_no_shape():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        for layout in (torch.strided, torch.jagged):
            x = torch.nested.as_nested_tensor([unit(1, D), unit(B, D)], layout=layout)
            said = r"^q is a nested tensor, but must be a tensor of shape \(B, D\)\.$"
            with pytest.raises(InputError, match=said):
                check_shapes(q=(x, "BD"))


def shared(transform, **options):
    return FeatureTransform(transform, generator=generator(), **options)


def moco(encoder=None, queue=None, transform=None, **options):
    encoder = Encoder(small_resnet((4, 8)), dim=D) if encoder is None else encoder
    queue = Queue(K, D) if queue is None else queue
    return MoCo(encoder, queue, shared("none") if transform is None else transform, **options)


def step(v1, v2, mix, look):
    return moco(transform=shared("posneg"))(v1, v2, mix, look)[:3]


def gradients(pos, neg, tau):
    "Loss and gradients"
    leaves = [x for x in (pos, neg) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    given = leaves if len(leaves) == 2 else (pos, neg)
    loss = info_nce(*given, tau)
    return loss, *(torch.autograd.grad(loss, leaves) if loss.requires_grad else ())


def with_strength(strength, level):
    return FeatureTransform("pos+neg_ex", level, strength=strength)(*VECTORS)


def at_level(level):
    return lambda q, k, keys: shared("posneg", level=level)(q, k, keys)


POS, NEG = scores(unit(B, D), unit(B, D).flip(0), unit(K, D))
VECTORS = (unit(B, D), unit(B, D).flip(0), unit(B + K, D)[B:])
PUBLIC = {  # name: function, arguments that are right
    "extrapolate": (extrapolate, (VECTORS[0], VECTORS[1], 1.5)),
    "interpolate": (interpolate, (VECTORS[2], 0.5, torch.arange(K).flip(0))),
    "beta_parameter": (lambda alpha: _beta_parameter("alpha", alpha), (2.0,)),
    "sample_beta": (sample_beta, (2.0, (3, 2), generator(), "cpu")),
    "mean_of": (mean_of, (VECTORS[0],)),
    "transform_names": (transform_names, ("posneg",)),
    "Options": (Options, ("feature", 2.0, 1.6, False, 1.0, False, False, generator())),
    "FeatureTransform": (
        FeatureTransform,
        ("posneg", "feature", 2.0, 1.6, False, 1.0, False, False, 0.5, generator()),
    ),
    "FeatureTransform, auto": (
        FeatureTransform,
        ("posneg", "feature", "linear 1 2", 1.6, False, "auto", False, True, 0.5, generator()),
    ),
    "FeatureTransform, strength": (with_strength, (0.5, "dimension")),
    "masked": (
        lambda q, k, keys, mask: scores(*shared("posneg", strength="auto")(q, k, keys, mask)),
        (*VECTORS, torch.zeros(B, K, dtype=torch.bool)),
    ),
    "in_batch": (in_batch, VECTORS[:2]),
    "schedule": (lambda value: schedule("tau", value, positive), ("linear 1 2",)),
    "at level feature": (at_level("feature"), VECTORS),
    "at level sample": (at_level("sample"), VECTORS),
    "at level dimension": (at_level("dimension"), VECTORS),
    "scores": (scores, (*VECTORS, None)),
    "positive_logit": (positive_logit, (POS, 0.1, None)),
    "info_nce": (info_nce, (POS, NEG, 0.1, None, False)),
    "gradients": (gradients, (POS, NEG, 0.1)),
    "streamed_info_nce": (streamed_info_nce, (*VECTORS, 0.1, None)),
    "Queue": (Queue, (5, D, generator())),
    "enqueue": (lambda k: Queue(5, D).enqueue(k), (VECTORS[0],)),
    "small_resnet": (small_resnet, ((4, 8),)),
    "backbone": (lambda net, stem: backbone(net, stem)[1], ("small", "small")),
    "projection": (projection, ("mlp", D, 4)),
    "SplitBN": (SplitBN, (D, 4)),
    "SplitBN forward": (lambda x: SplitBN(3, 2)(x), (views(),)),
    "split_bn": (lambda net, splits: split_bn(net, splits), (small_resnet((4, 8)), 2)),
    "Encoder": (Encoder, (small_resnet((4, 8)), "mlp", 8, "small", 1, "")),
    "Encoder forward": (lambda x: Encoder(small_resnet((4, 8)), dim=8)(x), (views(),)),
    "Encoder evaluated": (lambda x: Encoder(small_resnet((4, 8)), dim=8).eval()(x), (views(),)),
    "ema_update": (ema_update, (nn.Linear(3, 3), nn.Linear(3, 3), 0.9)),
    "MoCo": (
        lambda *a: moco(**dict(zip(("encoder", "queue", "transform", "momentum", "tau"), a))),
        (None, None, None, 0.9, 0.1),
    ),
    "MoCo options": (
        lambda a, b, c, d: moco(tau_pos=a, symmetric=b, neg_query=c, precision=d),
        (None, False, "original", "fp32"),
    ),
    "MoCo forward": (step, (views(), views(), True, True)),
    "cross_correlations": (cross_correlations, VECTORS[:2]),
    "barlow_loss": (barlow_loss, (torch.eye(D) + 0.1, 0.005)),
    "swapped_loss": (
        lambda a, b, code, tau: swapped_loss([a, b], [code], tau),
        (unit(B, 5), unit(B, 5), unit(B, 5).softmax(1), 0.1),
    ),
    "orders": (orders, (3, generator(), "cpu")),
    "join": (join, ([POS],)),
    "join_contrasts": (join_contrasts, ([Contrast(POS, NEG)],)),
    "vectors_of": (vectors_of, (Encoder("small", dim=8), views())),
    "copy_key_encoder": (copy_key_encoder, (nn.Linear(3, 3),)),
    "build_method": (build_method, (RUN, shared("none"), 1)),
}


def parts(result):
    "The tensors in a result"
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from parts(part)


def ordinary(value):
    "Whether a tensor holds numbers of an ordinary size, so that no result may be NaN"
    if not isinstance(value, torch.Tensor):
        return True
    plain = (
        value.layout == torch.strided and not value.is_meta and value.dtype != torch.float8_e4m3fn
    )
    return plain and bool((value.to(torch.complex128).abs() < 1e30).all())


def attempt(f, arguments):
    "A result without NaN, or one sentence; never a raw error, nor a warning of another kind"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "vectors should have the length 1|keys hold the first")
        try:
            result = f(*arguments)
        except InputError as e:
            text = str(e)
            assert len(text) < 700 and text.endswith((".", "?")), text
            return
    if all(ordinary(value) for value in arguments):
        for tensor in parts(result):
            assert tensor.is_meta or not tensor.isnan().any()


@pytest.mark.parametrize("name", PUBLIC)
def test_one_odd_argument_is_taken_or_refused_in_one_sentence(name):
    f, arguments = PUBLIC[name]
    attempt(f, arguments)
    for place in range(len(arguments)):
        for value in odd_values():
            attempt(f, (*arguments[:place], value, *arguments[place + 1 :]))


@pytest.mark.parametrize("name", [name for name, (_, given) in PUBLIC.items() if len(given) > 1])
def test_two_odd_arguments_are_no_worse(name):
    f, arguments = PUBLIC[name]
    choose = random.Random(name)
    values = odd_values()
    for _ in range(60):
        given = list(arguments)
        for place in choose.sample(range(len(arguments)), 2):
            given[place] = choose.choice(values)
        attempt(f, given)


@pytest.mark.parametrize("parameter", sorted(RUN))
def test_a_run_is_built_from_right_parameters_or_refused(parameter):
    values = [v for v in odd_values() if not isinstance(v, torch.Tensor)]
    values = random.Random(parameter).sample(values, 25) + [None, 2**60, math.nan, torch.ones(2)]
    for value in values:
        p = RUN | {parameter: value}
        attempt(lambda: build_method(p, shared("none")).tau, ())
        attempt(lambda: augmentation_of(p).hue, ())
        attempt(lambda: MoCo.check(p), ())


@pytest.mark.parametrize("parameter", sorted(set(RUN) - {"weights", "batch_size"}))
def test_a_parameter_that_is_missing_is_named(parameter):
    p = {name: value for name, value in RUN.items() if name != parameter}
    with pytest.raises(InputError, match=f"the parameters of the run lack {parameter}"):
        build_method(p, shared("none"))
        augmentation_of(p)
    old = {name: value for name, value in RUN.items() if name != "weights"}
    assert build_method(old, shared("none")).encoder.loaded == ""  # of an early run


# the right values


def test_float16_scores_are_summed_in_float32():
    n = 65_536
    pos = torch.full((2,), 0.5).half()
    neg = torch.full((2, n), 0.5).half()
    assert info_nce(pos, neg, 0.1).item() == pytest.approx(math.log(n + 1), rel=1e-6)
    x = neg.clone().requires_grad_()
    loss, soft_max = info_nce(pos, x, 0.1, with_soft_max=True)
    assert loss.item() == pytest.approx(math.log(n + 1), rel=1e-6)
    assert soft_max[0].item() == pytest.approx(5 + math.log(n), rel=1e-6)
    (grad,) = torch.autograd.grad(loss * n, x)
    assert grad.dtype == torch.float16
    torch.testing.assert_close(
        grad.float(), torch.full((2, n), 5.0 * n / (n + 1)), rtol=1e-3, atol=0
    )
    q = torch.zeros(1, 4).half()
    q[0, 0] = 1
    keys = torch.full((n, 4), 0.5).half()
    assert streamed_info_nce(q, keys[:1], keys, 0.1).item() == pytest.approx(math.log(n + 1))


def test_second_derivatives_are_those_of_differences():
    pos = torch.tensor([0.3, -0.2]).double()
    neg = torch.tensor([[0.1, 0.4, -math.inf], [0.2, -0.1, 0.5]]).double()
    for tau_pos in (None, 0.05):

        def slope(p, n):
            p = p.clone().requires_grad_()
            n = n.clone().requires_grad_()
            return torch.autograd.grad(info_nce(p, n, 0.2, tau_pos), (p, n), create_graph=True), (
                p,
                n,
            )

        (first, push), leaves = slope(pos, neg)
        got = torch.autograd.grad(first[0] + push[0, 1], leaves)
        step = 1e-6
        for leaf, place in ((0, (0,)), (1, (0, 0)), (1, (0, 1)), (1, (0, 2)), (0, (1,))):
            values = []
            for sign in (1, -1):
                moved = [pos.clone(), neg.clone()]
                moved[leaf][place] += sign * step
                (first, push), _ = slope(*moved)
                values.append((first[0] + push[0, 1]).item())
            want = (values[0] - values[1]) / (2 * step)
            assert got[leaf][place].item() == pytest.approx(want, abs=1e-6)
        assert all(o.isfinite().all() for o in got)


@pytest.mark.parametrize("tau", [1e-30, 1e-20, 1e-6, 0.1, 1e6, 1e38, 1e300])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_any_temperature_that_is_taken_gives_a_number(tau, wants_gradient):
    pos = POS.clone().requires_grad_(wants_gradient)
    neg = NEG.clone().requires_grad_(wants_gradient)
    neg.data[0] = -math.inf
    loss, soft_max = info_nce(pos, neg, tau, with_soft_max=True)
    assert loss.isfinite() and not soft_max.isnan().any()
    assert streamed_info_nce(*VECTORS, tau).isfinite()
    if wants_gradient:
        for grad in torch.autograd.grad(loss, (pos, neg)):
            assert grad.isfinite().all()


@pytest.mark.parametrize("tau", [0, -1.0, 1e-31, 1e-45, math.inf, math.nan, None, "0.1", True])
def test_any_other_temperature_is_refused(tau):
    for f in (
        lambda: info_nce(POS, NEG, tau),
        lambda: streamed_info_nce(*VECTORS, tau),
        lambda: positive_logit(POS, tau),
        lambda: moco(tau=tau),
    ):
        with pytest.raises(InputError, match="^tau is "):
            f()
    if tau is not None:
        with pytest.raises(InputError, match="^tau_pos is "):
            info_nce(POS, NEG, 0.1, tau)
        with pytest.raises(InputError, match="^tau_pos is "):
            moco(tau_pos=tau)


def test_masked_negatives_are_left_out_in_every_form():
    pos = POS.double()
    neg = NEG.double()
    kept = torch.tensor([True, False, True, True, False, True])
    masked = neg.masked_fill(~kept, -math.inf)
    want = info_nce(pos, neg[:, kept], 0.1, with_soft_max=True)
    for x in (masked, masked.clone().requires_grad_()):
        for got, wanted in zip(info_nce(pos, x, 0.1, with_soft_max=True), want):
            torch.testing.assert_close(got, wanted)
    nothing = torch.full((B, K), -math.inf)
    for x in (nothing, nothing.clone().requires_grad_(), nothing.half()):
        loss, soft_max = info_nce(POS.to(x.dtype), x, 0.1, with_soft_max=True)
        assert loss == 0 and (soft_max == -math.inf).all()


def test_a_factor_for_each_pair_is_not_taken_for_one_of_each_dimension():
    q, k = unit(D, D), unit(D, D).flip(0)  # as many pairs as dimensions
    lam = 1 + torch.rand(D, generator=generator())
    with pytest.raises(InputError, match=r"lam holds torch.float32 in the shape \(8,\)"):
        extrapolate(q, k, lam)
    q_hat, k_hat = extrapolate(q, k, lam[:, None])
    S = (q * k).sum(1)
    torch.testing.assert_close((q_hat * k_hat).sum(1), S + 2 * lam * (1 - lam) * (1 - S))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_vectors_keep_their_type(dtype, level):
    given = [x.to(dtype) for x in VECTORS]
    for renormalize in (False, True):
        transform = shared("posneg", level=level, renormalize=renormalize)
        made = transform(*given)
        assert [x.dtype for x in made] == [dtype] * 3
        plain = shared("posneg", level=level, renormalize=renormalize)(*VECTORS)
        for x, want in zip(made, plain):
            torch.testing.assert_close(x.float(), want, atol=3e-2, rtol=3e-2)
        assert all(value.isfinite() for value in transform.drawn.values())
    wide = extrapolate(*given[:2], torch.full((B, 1), 1.5, dtype=torch.float64))
    assert wide[0].dtype == dtype  # whatever the type of l


@pytest.mark.parametrize("level", LEVELS)
def test_empty_batches_and_queues_are_refused_and_draw_nothing(level):
    q, k, keys = VECTORS
    transform = shared("posneg", level=level)
    state = transform.generator.get_state()
    for f in (transform, scores, shared("none")):
        for empty, said in (
            ((q[:0], k[:0], keys), rf"^q has the shape \(0, {D}\), but must not be empty\.$"),
            ((q, k, keys[:0]), rf"^keys has the shape \(0, {D}\), but must not be empty\.$"),
            ((q, k, keys[None, :0].expand(B, 0, D)), rf"^keys has the shape \({B}, 0, {D}\), but"),
        ):
            with pytest.raises(InputError, match=said):
                f(*empty)
    assert torch.equal(transform.generator.get_state(), state)
    with pytest.raises(InputError, match=rf"^z1 has the shape \(0, {D}\), but must not be empty"):
        in_batch(q[:0], k[:0])


def test_mixed_types_come_with_a_remedy_that_helps():
    q, k, keys = (x.float() for x in VECTORS)
    narrow = q.bfloat16()
    for f in (FeatureTransform("posneg"), scores):
        with pytest.raises(InputError, match=r"take q\.float\(\) or k\.to\(q\.dtype\)\.$"):
            f(narrow, k, keys)
        with pytest.raises(InputError, match=r"take q\.float\(\) or keys\.to\(q\.dtype\)\.$"):
            f(narrow, k.bfloat16(), keys)
        with pytest.raises(InputError, match=r"must hold one .* type: take keys\.to\(q\.dtype\)"):
            f(q, k, keys.bfloat16())
        f(narrow.float(), k, keys)
        f(narrow, k.to(narrow.dtype), keys.to(narrow.dtype))


def test_a_batch_of_two_views_is_named_as_the_caller_names_it():
    q, k = VECTORS[:2]
    for z1, z2, said in (
        (q, k[1:], "z2 has the shape"),
        (q[0], k, "z1 has the shape"),
        (q, None, "z2 is a NoneType"),
        (q.long(), k.long(), "z1 holds torch.int64, but must"),
        (q.bfloat16(), k.float(), r"z1 holds torch.bfloat16 and z2 .* take z1.float\(\) or z2.to"),
        (q, k.to("meta"), "z1 is .* on cpu and z2 .* on meta"),
    ):
        with pytest.raises(InputError, match=f"^{said}"):
            in_batch(z1, z2)


# a strength that is a tensor

DIMENSIONS = torch.linspace(0, 1, D)
TENSORS = [
    (level, s)
    for level in LEVELS
    for s in (torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), DIMENSIONS)
    if level == "dimension" or s.ndim == 0
]


def of_strength(strength, level, mixing="pos+neg_ex", **options):
    return shared(mixing, level=level, strength=strength, **options)


@pytest.mark.parametrize("level, s", TENSORS)
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_tensor_is_a_strength_with_the_right_gradient(level, s, renormalize):
    given = [x.double() for x in VECTORS]

    def made(strength):
        transform = of_strength(strength, level, renormalize=renormalize)
        return transform(*given)

    if s.ndim == 0:
        for x, want in zip(made(s), made(0.5)):
            torch.testing.assert_close(x, want)
    leaf = nn.Parameter(s.double())
    sum((x * x.flip(0).cos()).sum() for x in made(leaf)).backward()
    with torch.no_grad():
        for i in range(s.numel()):
            if 0 < s.flatten()[i] < 1:
                step = torch.zeros_like(s.double()).flatten()
                step[i] = 1e-6
                step = step.view(s.shape)
                ends = [made(leaf.detach() + sign * step) for sign in (1, -1)]
                values = [sum((x * x.flip(0).cos()).sum() for x in end) for end in ends]
                slope = (values[0] - values[1]) / 2e-6
                torch.testing.assert_close(leaf.grad.flatten()[i], slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("level, s", TENSORS)
def test_a_strength_of_any_type_keeps_that_of_the_vectors(level, s, dtype):
    for kind in (nn.Parameter, torch.Tensor.clone):
        transform = of_strength(kind(s), level, "pos+pos_in+neg_ex")
        assert {x.dtype for x in transform(*(v.to(dtype) for v in VECTORS))} == {dtype}


def test_a_learned_strength_is_trained_saved_moved_and_copied():
    transform = of_strength(nn.Parameter(torch.tensor(0.5)), "feature")
    assert [name for name, _ in transform.named_parameters()] == ["strength_tensor"]
    optimizer = torch.optim.SGD(transform.parameters(), 0.01)
    info_nce(*scores(*transform(*VECTORS)), 0.1).backward()
    twin = deepcopy(transform)  # after a call
    optimizer.step()
    moved = transform.strength_tensor.item()
    assert moved != 0.5 and twin.strength_tensor.item() == 0.5
    assert transform.state_dict().keys() == {"strength_tensor"}
    twin.load_state_dict(transform.state_dict())
    assert twin.strength_tensor.item() == moved
    assert next(transform.to(torch.float64).parameters()).dtype == torch.float64
    assert transform.to("meta").strength_tensor.is_meta
    fixed = of_strength(torch.tensor(0.5), "feature")
    assert not list(fixed.parameters()) and fixed.state_dict().keys() == {"strength_tensor"}
    assert not shared("pos").state_dict()  # as it always was


@pytest.mark.parametrize(
    "strength, level, message",
    [
        (torch.ones(3), "feature", r"has the shape \(3,\), but must be a scalar, or \(D,\) at"),
        (torch.ones(B, 1), "sample", r"has the shape \(4, 1\), but must be a scalar, or"),
        (torch.ones(3), "dimension", r"has the shape \(3,\), but must be a scalar or \(8,\)"),
        (torch.ones((), device="meta"), "sample", "is on meta and q on cpu: move the transf"),
        (torch.ones(()).to_sparse(), "feature", "holds torch.float32 as torch.sparse_coo, but"),
        (torch.tensor(1), "feature", "holds torch.int64 as torch.strided, but must be a plain"),
        (torch.tensor(True), "feature", "holds torch.bool as"),
        (torch.tensor(math.nan), "feature", r"is tensor\(nan\), but must hold numbers from 0 to 1"),
        (torch.tensor(-3.0), "feature", r"is tensor\(-3.\), but must hold numbers from 0 to 1"),
        (torch.tensor(9.0), "feature", r"is tensor\(9.\), but must hold numbers from 0 to 1"),
        (torch.ones((), requires_grad=True), "feature", "wants a gradient, so it must be a torch"),
    ],
)
def test_a_tensor_that_is_no_strength_is_named(strength, level, message):
    with pytest.raises(InputError, match="^strength " + message):
        of_strength(strength, level)(*VECTORS)


# pickling


@pytest.mark.parametrize("alpha", [2.0, "cosine 1 2"])
@pytest.mark.parametrize("strength", [1.0, "linear 0 1", "auto", nn.Parameter(torch.tensor(0.5))])
def test_a_transformation_can_be_pickled(strength, alpha):
    def outcome(transform):
        transform.generator = generator()
        return transform(*VECTORS)

    def saved(transform):
        file = BytesIO()
        torch.save(transform, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    transform = FeatureTransform("posneg", strength=strength, alpha=alpha)
    transform.progress = 0.3
    for made in (transform, transform):  # before a call, and after one
        copies = [pickle.loads(pickle.dumps(made)), saved(made)]
        want = outcome(deepcopy(made))
        for copy in copies:
            for a, b in zip(outcome(copy), want):
                assert torch.equal(a, b)
        transform(*VECTORS)
        info_nce(*scores(*transform(*VECTORS)), 0.1)


# messages


@pytest.mark.parametrize(
    "written, near",
    [
        ("Auto", "auto"),
        ("atuo", "auto"),
        ("auto0.5", "auto"),
        ("linaer 0 1", "linear"),
        ("Cosine 0 1", "cosine"),
    ],
)
def test_a_misspelt_strength_gets_the_nearest_word(written, near):
    for f in (check_strength, lambda s: FeatureTransform(strength=s)):
        with pytest.raises(InputError, match=f"a number, auto, or a .* Did you mean '{near}'"):
            f(written)
    with pytest.raises(InputError, match="a number, or a schedule of two") as e:
        FeatureTransform(alpha="linear 1")
    assert "auto" not in str(e.value) and "Did you mean" not in str(e.value)


def test_large_letters_are_near_to_small_ones():
    assert nearest("SimCLR", ["simclr", "swav"]) == " Did you mean 'simclr'?"
    assert nearest("resnet18", ["ResNet18"]) == " Did you mean 'ResNet18'?"
    assert nearest("timm/resnet5", ["timm/tinynet_c", "timm/resnet50"]).endswith("resnet50'?")
    assert nearest("tmm/resnet50", ["timm/resnet50"]) == " Did you mean 'timm/resnet50'?"
    assert nearest("timm/nonesuch", ["timm/tinynet_c", "timm/resnet50"]) == ""
    with pytest.raises(InputError, match="Did you mean 'pos'"):
        FeatureTransform("POS")
    with pytest.raises(InputError, match="Did you mean 'moco_v2'"):
        build_method(RUN | dict(method="MOCO_V2"), shared("none"))


@pytest.mark.parametrize("wrong", [0, 2, -1.0, math.nan, None, "x", True])
@pytest.mark.parametrize("strength", [1.0, "auto", "linear 0 1"])
def test_neg_limit_is_always_looked_at(wrong, strength):
    with pytest.raises(InputError, match="neg_limit is .* must be a number above 0 and at m") as e:
        FeatureTransform(strength=strength, neg_limit=wrong)
    assert "l_ex" not in str(e.value)


def test_messages_call_a_transformation_as_users_do():
    q, k, keys = VECTORS
    with pytest.raises(InputError, match=r"^neg needs negatives .* give keys \(K, D\)"):
        shared("neg")(q, k, unit(2 * B, 3, D)[B:])
    with pytest.raises(InputError, match="but neg_arc knows only feature and sample"):
        shared("neg_arc", level="dimension")
    with pytest.raises(InputError, match="^q holds torch.int32, but must hold floating-point"):
        shared("pos")(q.int(), k, keys)


@pytest.mark.filterwarnings("ignore:keys hold the first")
@pytest.mark.filterwarnings("ignore:vectors should have")
def test_keys_that_share_the_memory_of_the_batch_need_a_mask():
    q, k, _ = VECTORS
    transform = shared("posneg")
    for keys in (q, k, q[:], k.view(B, D), Negatives(q.detach())):
        with pytest.raises(InputError, match="keys are the batch's own vectors"):
            transform(q, k, keys)
    own = torch.eye(B, dtype=torch.bool)
    for keys, mask in ((q[:], own), (q[1:], None), (q.flip(0), None)):
        transform(q, k, keys, mask)
    square = unit(D, D)
    transform(square, square.flip(0), square.T)  # the same memory, other vectors
    transform(*(x.to("meta") for x in (q, k, k.clone())))
    grad = torch.func.grad(lambda q: (q @ transform(q, k, k.flip(0))[0].T).sum())(q)
    assert grad.isfinite().all()


def test_auto_rests_while_nothing_is_trained():
    transform = shared("pos", strength="auto")
    transform(*VECTORS)
    before = {name: x.clone() for name, x in transform.state_dict().items()}
    transform.eval()
    for _ in range(3):
        transform(VECTORS[0], VECTORS[0], VECTORS[2])
        assert transform.drawn["strength"] == before["auto.strength"] > 0
        assert transform.drawn["signal"] == before["auto.signal"]
    for name, x in transform.state_dict().items():
        assert torch.equal(x, before[name])
    transform.train()
    transform(*VECTORS)
    assert transform.auto.strength > before["auto.strength"]


def test_an_order_must_hold_every_key_once():
    for perm in (
        torch.zeros(K, dtype=torch.int64),
        torch.arange(K) + 1,
        torch.arange(K) - K,
        torch.arange(K).int(),
        torch.arange(K).float(),
    ):
        with pytest.raises(InputError, match="perm must hold each of 0 to 5 once"):
            interpolate(VECTORS[2], 0.5, perm)


def test_a_generator_of_another_device_is_one_sentence():
    with pytest.raises(InputError, match="the generator is on cpu, but must be on cuda"):
        sample_beta(2.0, (3,), generator(), "cuda")
    for wrong in (0, "cpu", np.random.default_rng(0), torch.tensor(1)):
        for f in (
            lambda: sample_beta(2.0, (3,), wrong),
            lambda: FeatureTransform(generator=wrong),
            lambda: Queue(5, D, wrong),
        ):
            with pytest.raises(
                InputError, match="generator is .* must be a torch.Generator or None"
            ):
                f()


def test_what_no_memory_holds_is_refused_before_it_is_tried():
    for f in (
        lambda: Queue(2**60, 8),
        lambda: Queue(8, 2**60),
        lambda: Queue(2**62, 2**62),
        lambda: Encoder("small", dim=2**62),
        lambda: Encoder("small", "linear", dim=2**40),
        lambda: projection("mlp", 2**40, 8),
        lambda: sample_beta(2.0, (2**31, 2**31)),
        lambda: SplitBN(2**50),
        lambda: small_resnet((2**40,)),
        lambda: build_method(RUN | dict(queue_size=2**60), shared("none")),
        lambda: build_method(RUN | dict(dim=2**62), shared("none")),
    ):
        with pytest.raises(InputError, match="needs .* GB, but cpu has .* GB: take less"):
            f()
    check_memory("a little", 1000, "cpu")
    for wrong in (2**63, 10**40, 2.0, None, True):
        with pytest.raises(InputError, match="K, the number of keys, is "):
            Queue(wrong, 8)


def test_a_queue_made_while_nothing_is_learnt_can_learn_later():
    with torch.inference_mode():
        queue = Queue(5, D)
        transform = shared("posneg", alpha=3.14)
        transform(*VECTORS)  # makes its table
    queue.enqueue(VECTORS[0])
    assert torch.equal(queue.keys[:B], VECTORS[0])
    q = VECTORS[0].clone().requires_grad_()
    info_nce(*scores(*transform(q, VECTORS[1], queue.keys)), 0.1).backward()
    assert q.grad.isfinite().all()


def test_a_queue_takes_its_own_keys():
    queue = Queue(5, D, generator())
    before = queue.keys.clone()
    queue.enqueue(queue.keys[1:4])
    assert torch.equal(queue.keys[:3], before[1:4]) and torch.equal(queue.keys[3:], before[3:])


def test_a_transformation_that_gives_something_else_is_named():
    gifts = dict(pair=[None, 3, VECTORS[0], (VECTORS[0],), (VECTORS[0][:1], VECTORS[1])])
    gifts["negatives"] = [None, VECTORS[2][:, 1:], VECTORS[2].double(), (VECTORS[2],)]
    try:
        for place, wrong in gifts.items():

            class Bad(Transform, name="bad"):
                acts_on = place

                def forward(self, q, k, negatives):
                    return Bad.gift

            for gift in wrong:
                Bad.gift = gift
                attempt(lambda: FeatureTransform("bad")(*VECTORS), ())
                with pytest.raises(InputError):
                    FeatureTransform("bad")(*VECTORS)
            del TRANSFORMS["bad"]
    finally:
        TRANSFORMS.pop("bad", None)


def test_training_on_what_batch_normalisation_cannot_take():
    encoder = Encoder("resnet18", dim=8, stem="imagenet")
    with pytest.raises(
        InputError, match="cannot take images of shape .1, 3, 32, 32.: Expected more"
    ):
        encoder(views(1, 32))  # one number of each channel
    with pytest.raises(InputError, match="must hold two numbers of each channel"):
        Encoder("small", dim=8, bn_splits=4)(views(4, 8))
    assert encoder.eval()(views(1, 32)).shape == (1, 8)
    assert encoder(views(4, 32)[:0]).shape == (0, 8)


def test_gradients_flow_where_they_should():
    method = moco(transform=shared("posneg"))
    v = views().requires_grad_()
    out = method(v, views())
    out.loss.backward()
    assert v.grad.abs().sum() > 0
    assert all(p.grad is not None for p in method.encoder.parameters())
    assert all(p.grad is None for p in method.key_encoder.parameters())
    assert not method.queue.keys.requires_grad and not out.kept["keys"].requires_grad
    method.update(out)
    with torch.no_grad():
        assert not method(views(), views()).loss.requires_grad


def test_parts_of_a_method_must_be_of_their_kind():
    for wrong, message in (
        (dict(encoder=3), "encoder is 3, but must be a Module"),
        (dict(queue=torch.ones(K, D)), "queue is tensor.*but must be a Queue"),
        (dict(transform="posneg"), "transform is 'posneg', but must be a FeatureTransform"),
        (dict(symmetric=1), "symmetric is 1, but must be a bool"),
        (dict(momentum=True), "momentum is True, but must be a number from 0 to 1"),
        (dict(momentum=math.nan), "momentum is nan, but must be a number from 0 to 1"),
    ):
        with pytest.raises(InputError, match="(?s)" + message):
            moco(**wrong)
    with pytest.raises(InputError, match="encoder is None, but must be a Module"):
        Method(None, shared("none"))
    with pytest.raises(InputError, match="v1 is a ndarray, but must be a tensor of shape"):
        moco()(views().numpy(), views())
    with pytest.raises(
        InputError, match="v2 has the shape .2, 3, 16, 16., but must be .B, C, H, W."
    ):
        moco()(views(), views(2))


def test_processes_leave_no_batch_uneven():
    method = moco()
    method.distribute(Processes(0, 3, lambda x: x))
    with pytest.raises(InputError, match="the batch of 4 must be a multiple of its 3 parts"):
        method.encode_keys(views())


@pytest.mark.parametrize(
    "kind, wrong, near",
    [
        (FeatureTransform, "strenght", "strength"),
        (FeatureTransform, "alpha_negative", "alpha_neg"),
        (ScoreRecorder, "tau_positive", "tau_pos"),
    ],
)
def test_a_misspelt_option_is_named_with_the_nearest(kind, wrong, near):
    said = f"{kind.__name__} has no option '{wrong}', only .*Did you mean '{near}'"
    with pytest.raises(InputError, match=said):
        kind(**{wrong: 0.3})
    assert near in signature(kind).parameters  # it is documented as before
    with pytest.raises(TypeError, match="multiple values"):
        kind("pos", **{next(iter(signature(kind).parameters)): "pos"})


def row(seed, n=B):
    "Unit vectors of a seed"
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def warnings_of(transform, *vectors):
    "What a call warns of"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transform(*vectors)
    return [str(o.message) for o in caught]


@pytest.mark.parametrize("place", range(3))
def test_vectors_of_another_length_are_told_once(place):
    vectors = [row(1), row(2), row(3, K)]
    vectors[place] = 3 * vectors[place]
    transform = shared("posneg", strength="auto")
    (said,) = warnings_of(transform, *vectors)
    assert f"should have the length 1, but have {['q', 'k', 'keys'][place]} 3 (median)" in said
    assert "q = torch.nn.functional.normalize(q, dim=1)" in said
    assert not warnings_of(transform, *vectors)  # no number is read at a later step
    assert not warnings_of(shared("none"), *vectors)  # nothing is transformed


@pytest.mark.parametrize(
    "negatives",
    [
        lambda q, k: k.clone(),
        lambda q, k: torch.cat([row(3, K), k]),  # a queue that was filled too early
        lambda q, k: torch.cat([q, k]),
        lambda q, k: Negatives(torch.cat([q, k]), mask=~in_batch(q, k)[3]),  # the wrong way round
        lambda q, k: Negatives(own=k.expand(B, B, D)),
    ],
)
def test_a_query_that_meets_its_own_key_is_told_once(negatives):
    q, k = row(1), row(2)
    transform = shared("pos")
    (said,) = warnings_of(transform, q, k, negatives(q, k))
    assert said.startswith("keys hold the first query's own key") and "give a mask" in said
    assert not warnings_of(transform, q, k, negatives(q, k))


def test_right_vectors_are_not_told():
    q, k = row(1), row(2)
    one = row(1, 1).expand(B, D)  # an encoder that has collapsed
    for vectors in (
        (q, k, row(3, K)),
        in_batch(q, k),
        (q, k, row(3, B * B).view(B, B, D)),
        (one, one.clone(), one.clone()),
        tuple(x.bfloat16() for x in (q, k, row(3, K))),
    ):
        assert not warnings_of(shared("pos"), *vectors)


def test_what_has_no_numbers_is_not_looked_at():
    vectors = (3 * row(1), row(2), row(3, K))
    for look in (
        lambda f: torch.func.vmap(lambda q: f(q, *vectors[1:])[0], randomness="same")(
            torch.stack([vectors[0]] * 2)
        ),
        lambda f: torch.func.grad(lambda q: f(q, *vectors[1:])[0].sum())(vectors[0]),
        lambda f: f(*(x.to("meta") for x in vectors)),
    ):
        assert not warnings_of(look, FeatureTransform("posneg"))
    transform = FeatureTransform("posneg")
    compiled = torch.compile(lambda *x: transform(*x)[0], backend="eager")
    assert not [said for said in warnings_of(compiled, *vectors) if "length 1" in said]
    assert not transform.looked
    assert len(warnings_of(transform, *vectors)) == 1
    assert len(warnings_of(deepcopy(FeatureTransform("posneg")), *vectors)) == 1


def test_a_folder_that_is_none_is_told_as_what_it_is(tmp_path):
    (tmp_path / "moco.py").write_text("kept")
    recorder = ScoreRecorder()
    recorder.record(0, torch.zeros(2), torch.zeros(2, 3))
    for place, said in (
        ("moco.py/x.parquet", f"{tmp_path / 'moco.py'} is a file, not a folder."),
        ("moco.py/deep/x.parquet", f"{tmp_path / 'moco.py'} is a file, not a folder."),
        ("none/x.parquet", f"there is no folder {tmp_path / 'none'}."),
    ):
        with pytest.raises(InputError) as told:
            recorder.save(tmp_path / place)
        assert str(told.value) == f"{tmp_path / place} cannot be written: {said}"
    assert (tmp_path / "moco.py").read_text() == "kept"


def test_one_thing_is_no_plural():
    assert [counted(n, "image") for n in (0, 1, 2, 2000)] == [
        "0 images",
        "1 image",
        "2 images",
        "2,000 images",
    ]
    assert counted(1, "class", "classes") == "1 class"


def test_a_strength_or_an_alpha_is_given_at_the_beginning_and_read_afterwards():
    vectors = [F.normalize(torch.randn(B, D), dim=1) for _ in range(3)]
    transform = FeatureTransform("pos", strength="linear 0.2 0.4", alpha=3.0)
    assert (transform.strength, transform.alpha) == (0.2, 3.0)
    transform.progress = 0.5
    transform(*vectors)
    assert (transform.strength, transform.alpha) == (0.3, 3.0)
    assert FeatureTransform("pos", strength="auto").strength == 0
    assert FeatureTransform("pos", strength=torch.tensor(0.5)).strength == 0.5


@pytest.mark.parametrize("name", FeatureTransform.decided)
def test_an_option_set_afterwards_is_refused_and_not_ignored(name):
    transform = shared("posneg")
    with pytest.raises(InputError, match=f"^{name} is decided when a FeatureTransform is made"):
        setattr(transform, name, 0.1)
    free = {"mixing", "generator"}
    assert set(FeatureTransform.decided) | free == set(signature(FeatureTransform).parameters)
    transform.mixing = "none"
    assert transform(*VECTORS)[2] is VECTORS[2]


def test_a_second_mask_does_not_replace_the_first():
    own = torch.zeros(B, K, dtype=torch.bool)
    own[:, 0] = True
    masked = Negatives(VECTORS[2], mask=own)
    with pytest.raises(InputError, match="the keys have a mask already: give one mask"):
        shared("none")(*VECTORS[:2], masked, torch.zeros_like(own))
    assert shared("none")(*VECTORS[:2], masked)[2].mask is own


def test_auto_may_be_called_where_nothing_is_learnt_and_load_a_state_later():
    transform = shared("pos", strength="auto")
    transform(*VECTORS)
    state = deepcopy(transform.state_dict())
    with torch.inference_mode():
        transform(*VECTORS)
    drawn = transform.drawn["strength"], transform.drawn["signal"]
    values = [float(x) for x in drawn]
    assert values[0] > state["auto.strength"]
    transform.load_state_dict(state)
    assert [float(x) for x in drawn] == values  # what was handed out stays
    assert transform.auto.strength == state["auto.strength"]
    q = VECTORS[0].clone().requires_grad_()
    scores(*transform(q, *VECTORS[1:]))[0].sum().backward()
    assert q.grad.isfinite().all()


def test_auto_with_one_image_says_that_it_does_nothing():
    q, k, keys = VECTORS
    with pytest.warns(UserWarning, match="^strength auto compares the images of a batch"):
        shared("pos", strength="auto")(q[:1], k[:1], keys)


@pytest.mark.parametrize("strength", [0, -1, 1.5, math.nan, math.inf, True])
def test_a_strength_out_of_its_range_is_told_the_whole_range(strength):
    with pytest.raises(InputError, match="but must be a number above 0 and at most 1"):
        FeatureTransform("pos", strength=strength)


def test_a_recorder_gives_no_negative_number_of_rows():
    recorder = ScoreRecorder(tau=0.2)
    for call in (recorder.frame, recorder.table):
        with pytest.raises(InputError, match="last is -3, but must be a whole number of at"):
            call(-3)


def test_keys_that_lie_in_columns_are_told_to_turn():
    q, k = row(1), row(2)
    with pytest.raises(InputError, match=r"\(D, K\), but must be \(K, D\): give keys.T"):
        scores(q, k, row(3, 2 * D).T)
    assert scores(q, k, row(3, D).T)[1].shape == (B, D)  # square: nobody can tell


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_taken_without_a_word(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureTransform("pos", strength=kind(0.5), alpha=kind(2))(row(1), row(2), row(3, K))
        ScoreRecorder(tau=kind(0.2))
        extrapolate(row(1), row(2), kind(1.5))
        info_nce(*scores(row(1), row(2), row(3, K)), kind(0.2), kind(0.1))
        Encoder("small", dim=8), ema_update(Encoder("small"), Encoder("small"), kind(0.9))


def test_a_checkpoint_without_its_ending_is_named_whole(tmp_path):
    (tmp_path / "run.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="it is missing, or no file; give .*run.safetensors"):
        read_note(tmp_path / "run")
