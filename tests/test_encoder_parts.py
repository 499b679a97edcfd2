"Batch normalisation of all parts at once, as on a GPU, against the loop over parts"

from collections import Counter
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ftcl.encoder import Encoder, SplitBN, VectorBN, norm_at_once, projection
from ftcl.encoder import small_resnet, split_bn, split_vectors

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {  # of values, and of sums over the batch
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (2e-2, 2e-2),
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32", "bf16"])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
NO_COMPUTATION = {
    "alias", "detach", "empty", "empty_like", "expand", "new_empty", "new_empty_strided",
    "permute", "slice", "split", "t", "transpose", "unbind", "_unsafe_view", "view",
}  # fmt: skip


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Layers believe that their maps are on one"
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))


def maps(shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    "Maps far from mean 0 and variance 1"
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 2
    return x.to(dtype).contiguous(memory_format=layout)


def layer(kind=SplitBN, splits=4, dtype=torch.float64, channels=6, **options):
    "With weights and running averages that are not those of the start"
    bn = kind(channels, splits, **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*bn.parameters(), bn.running_mean, bn.running_var):
        with torch.no_grad():
            tensor.copy_(0.5 + torch.rand(channels, generator=generator))
    return bn


def loop(bn, x):
    "The definition: each part in its turn, by torch's own call"
    share = bn.momentum / bn.splits
    own = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    return torch.cat([F.batch_norm(o, *own, True, share, bn.eps) for o in x.chunk(bn.splits)])


def at_once(bn, x):
    own = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    return norm_at_once(x, *own, bn.splits, bn.momentum, bn.eps)


def outcome(norm, bn, x, grad):
    "Values, gradients and running averages, each by name"
    bn = deepcopy(bn)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(bn, x)
    y.backward(grad)
    found = dict(y=y.detach(), x=x.grad, mean=bn.running_mean, var=bn.running_var)
    return found | {name: weight.grad for name, weight in bn.named_parameters()}


def assert_alike(got, want, dtype):
    assert got.keys() == want.keys()
    value, total = TOLERANCE[dtype]
    averages = TOLERANCE[torch.float32][0] if dtype == torch.bfloat16 else value
    for name, wanted in want.items():
        assert got[name].dtype == wanted.dtype, name
        tol = averages if name in ("mean", "var") else value if name in ("x", "y") else total
        torch.testing.assert_close({name: got[name]}, {name: wanted}, atol=tol, rtol=tol)
    for name in ("x", "y"):
        for order in (torch.contiguous_format, torch.channels_last):
            kept = want[name].is_contiguous(memory_format=order)
            assert got[name].is_contiguous(memory_format=order) == kept, name


@pytest.mark.parametrize("splits", range(1, 9))
@LAYOUTS
@DTYPES
def test_all_parts_at_once_are_the_loop(splits, layout, dtype):
    bn = layer(splits=splits, dtype=torch.promote_types(dtype, torch.float32))
    x, grad = (maps((3 * splits, 6, 5, 3), dtype, layout, seed) for seed in (0, 1))
    want = outcome(loop, bn, x, grad)
    assert want["y"].dtype == dtype and want["mean"].dtype == bn.running_mean.dtype
    assert_alike(outcome(at_once, bn, x, grad), want, dtype)


@pytest.mark.parametrize("shape", [(16, 6, 1, 1), (8, 6, 1, 2), (8, 6, 7, 1), (16, 1, 3, 3)])
@LAYOUTS
def test_maps_of_the_least_size(shape, layout):
    bn = layer(splits=8, channels=shape[1])
    x, grad = (maps(shape, layout=layout, seed=seed) for seed in (0, 1))
    assert_alike(outcome(at_once, bn, x, grad), outcome(loop, bn, x, grad), torch.float64)


@pytest.mark.parametrize("options", [dict(affine=False), dict(momentum=0.0), dict(momentum=1.0)])
@pytest.mark.parametrize("options_more", [dict(), dict(eps=0.5)])
@DTYPES
def test_layers_of_every_kind(options, options_more, dtype):
    kind = torch.promote_types(dtype, torch.float32)
    bn = layer(dtype=kind, **options, **options_more)
    x, grad = (maps((12, 6, 3, 3), dtype, torch.channels_last, seed) for seed in (0, 1))
    assert_alike(outcome(at_once, bn, x, grad), outcome(loop, bn, x, grad), dtype)


def test_a_layer_with_a_weight_and_no_bias():
    bn = layer()
    bn.bias = None
    x, grad = (maps((12, 6, 3, 3), seed=seed) for seed in (0, 1))
    assert_alike(outcome(at_once, bn, x, grad), outcome(loop, bn, x, grad), torch.float64)


def test_running_averages_of_many_steps():
    one, other = layer(splits=8), layer(splits=8)
    for seed in range(20):
        loop(one, maps((16, 6, 2, 2), seed=seed))
        at_once(other, maps((16, 6, 2, 2), seed=seed))
    for name in ("running_mean", "running_var"):
        wanted = getattr(one, name)
        torch.testing.assert_close(getattr(other, name), wanted, atol=1e-12, rtol=0)
    assert (one.running_mean - layer().running_mean).abs().min() > 0.1


def test_the_order_of_the_parts_counts():
    x = maps((12, 6, 3, 3))
    there, back = layer(), layer()
    at_once(there, x)
    at_once(back, torch.cat(x.chunk(4)[::-1]))
    assert (there.running_mean - back.running_mean).abs().max() > 1e-4


def test_gradients_are_those_of_small_steps():
    bn = layer(splits=2, channels=2)
    x = maps((4, 2, 3, 1)).requires_grad_()
    given = (x, bn.weight, bn.bias)

    def norm(x, weight, bias):
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
        return norm_at_once(x, mean, var, weight, bias, 2, 0.1, 1e-5)

    assert torch.autograd.gradcheck(norm, given)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_wanted(wanted):
    bn = layer()
    x, grad = (maps((12, 6, 3, 3), seed=seed) for seed in (0, 1))
    found = []
    for norm in (loop, at_once):
        given = [x.clone(), bn.weight.detach().clone(), bn.bias.detach().clone()]
        for i in wanted:
            given[i].requires_grad_()
        own = deepcopy(bn).requires_grad_(False)
        own.weight, own.bias = (nn.Parameter(o, o.requires_grad) for o in given[1:])
        norm(own, given[0]).backward(grad)
        grads = (given[0].grad, own.weight.grad, own.bias.grad)
        assert [o is not None for o in grads] == [i in wanted for i in range(3)]
        found.append([o for o in grads if o is not None])
    torch.testing.assert_close(*found, atol=1e-10, rtol=0)


def test_maps_and_gradients_with_gaps_in_memory():
    found = []
    for norm in (loop, at_once):
        wide = maps((12, 12, 3, 3)).requires_grad_()
        bn = layer()
        y = norm(bn, wide[:, ::2])
        (maps((12, 6, 1, 1)) * y).sum((0, 2)).mean().backward()  # its gradient is expanded
        found.append([y, wide.grad, bn.weight.grad, bn.bias.grad, bn.running_var])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


class Calls(TorchDispatchMode):
    "How often each computation is called; views of a tensor and bare memory are none"

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_COMPUTATION:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def calls(norm, splits):
    bn = layer(splits=splits, dtype=torch.float32)
    x = maps((16, 6, 4, 4), torch.bfloat16, torch.channels_last).requires_grad_()
    grad = maps((16, 6, 4, 4), torch.bfloat16, torch.channels_last)
    norm(bn, x)  # constants are made once
    with Calls() as seen:
        norm(bn, x).backward(grad)
    return seen.count


def test_eight_parts_need_a_third_of_the_computations():
    few, many = calls(at_once, 8), calls(loop, 8)
    assert few.total() <= 11 and many.total() >= 32, (few, many)
    assert calls(at_once, 2) == few
    assert few["native_batch_norm"] == few["native_batch_norm_backward"] == 1


def test_a_cpu_takes_the_loop_to_the_last_bit():
    for kind, shape in ((SplitBN, (12, 6, 3, 3)), (VectorBN, (12, 6))):
        bn, same = layer(kind), layer(kind)
        x = maps(shape)
        want = loop(same, x.view(12, 6, *shape[2:] or (1, 1))).view(shape)
        assert torch.equal(bn(x), want) and torch.equal(bn.running_var, same.running_var)


def test_a_gpu_takes_all_parts_at_once(as_on_a_gpu, monkeypatch):
    taken = []
    monkeypatch.setattr("ftcl.encoder.norm_at_once", lambda *given: taken.append(given))
    layer(splits=4)(maps((12, 6, 3, 3)))
    assert len(taken) == 1
    layer(splits=1)(maps((12, 6, 3, 3)))  # one part is plain batch normalisation
    layer(splits=4).eval()(maps((5, 6, 3, 3)))
    assert len(taken) == 1


def test_a_compiler_sees_the_loop(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr("ftcl.encoder.norm_at_once", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer()(maps((12, 6, 3, 3)))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    layer()(maps((12, 6, 3, 3)))


def test_vectors_at_once(as_on_a_gpu):
    bn, same = layer(VectorBN, 3), layer(VectorBN, 3)
    x, other = (maps((12, 6)).requires_grad_() for _ in range(2))
    got = bn(x)
    want = loop(same, other[:, :, None, None])[:, :, 0, 0]
    got.backward(maps((12, 6), seed=1))
    want.backward(maps((12, 6), seed=1))
    assert got.is_contiguous()
    for a, b in ((got, want), (x.grad, other.grad), (bn.running_var, same.running_var)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    torch.testing.assert_close(bn.weight.grad, same.weight.grad, atol=1e-10, rtol=0)


class AllGradients(TorchDispatchMode):
    "The kernel gives every gradient, wanted or not, as that of a GPU does"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.native_batch_norm_backward.default:
            return func(*args, **(kwargs or {}))
        self.wanted = args[9]
        x, *_ = func(*args)
        return x, args[5].clone(), args[5].clone()


def test_layers_without_weights(as_on_a_gpu):
    bn, same = (layer(splits=3, affine=False) for _ in range(2))
    x, other = (maps((12, 6, 2, 2)).requires_grad_() for _ in range(2))
    with AllGradients() as kernel:
        bn(x).backward(maps((12, 6, 2, 2), seed=1))
    assert kernel.wanted == [True, False, False]
    loop(same, other).backward(maps((12, 6, 2, 2), seed=1))
    torch.testing.assert_close(x.grad, other.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_whole_encoder(bf16, monkeypatch):
    torch.manual_seed(0)
    plain = Encoder(small_resnet((4, 8)), "mlp3_bn", dim=6, bn_splits=4)
    split_vectors(plain.head, 4)
    fast = deepcopy(plain)
    images = torch.randn(16, 3, 9, 9)
    found = []
    for net, gpu in ((plain, False), (fast, True)):
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, bf16):
            if gpu:
                patch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
            z = net(images)
        (z @ z.detach().roll(1, 0).T).logsumexp(1).mean().backward()
        found.append((z.detach(), net))
    tol = dict(atol=0.05, rtol=0.05) if bf16 else dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0][0], found[1][0], **tol)
    norms = [torch.stack([p.grad.norm() for p in net.parameters()]) for _, net in found]
    torch.testing.assert_close(*norms, atol=tol["atol"], rtol=tol["rtol"])
    for name, wanted in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], wanted, **tol)
    assert torch.equal(plain.eval()(images), plain(images))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@LAYOUTS
@DTYPES
def test_a_gpu_gives_what_the_loop_gives(layout, dtype):
    bn = layer(splits=8, dtype=torch.promote_types(dtype, torch.float32)).cuda()
    x, grad = (maps((24, 6, 5, 3), dtype, layout, seed).cuda() for seed in (0, 1))
    x, grad = (o.contiguous(memory_format=layout) for o in (x, grad))
    want = outcome(loop, bn, x, grad)
    assert_alike(outcome(lambda bn, x: bn(x), bn, x, grad), want, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_does_not_wait():
    head = split_vectors(projection("mlp3_bn", 16, 8), 8)
    net = nn.Sequential(split_bn(small_resnet((8, 16)), 8), head).cuda()
    images = torch.randn(16, 3, 16, 16, device="cuda")
    net(images).sum().backward()  # constants are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            net(images).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
