"""lossops among PyTorch's own machinery: compilers, function transforms, hooks, DDP, threads."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import assert_no_worse, make_inputs
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lossops
from lossops import LinearLossOptions

N, V, D = 24, 37, 8
ROOT = Path(__file__).resolve().parent.parent
CHUNKS = LinearLossOptions(schedule="one_sweep", chunk_rows=7)
TWO = LinearLossOptions(schedule="two_sweeps")


def focal(s):
    return -torch.expm1(s.log_p).square() * s.log_p


def total(outputs):
    return sum(t.sum() for t in outputs if t is not None and t.is_floating_point())


# One scalar per way through the library: x (N, D), w (V, D), b (V,), target y (N,), backend.
CALLS = {
    "linear_cross_entropy": lambda x, w, b, y, k: lossops.linear_cross_entropy(
        x, w, y, linear_bias=b, options=CHUNKS, backend=k
    ),
    "linear_cross_entropy, all terms": lambda x, w, b, y, k: lossops.linear_cross_entropy(
        x, w, y, linear_bias=b, weight=torch.linspace(1, 2, V), softcap=5.0, logit_scale=b.sum(),
        label_smoothing=0.1, lse_square_scale=0.01, sample_weight=x.detach()[:, 0].abs(),
        backend=k,
    ),
    "linear_cross_entropy, rows": lambda x, w, b, y, k: lossops.linear_cross_entropy(
        x, w, y, linear_bias=b, reduction="none", backend=k
    ).square().sum(),
    "linear_cross_entropy, probabilities": lambda x, w, b, y, k: lossops.linear_cross_entropy(
        x, w, F.one_hot(y.clamp_min(0), V).to(x.dtype), linear_bias=b, options=TWO, backend=k
    ),
    "linear_cross_entropy, outputs": lambda x, w, b, y, k: total(lossops.linear_cross_entropy(
        x, w, y, linear_bias=b, outputs=("logsumexp", "log_prob", "entropy", "correct"), backend=k
    )),
    "linear_log_prob": lambda x, w, b, y, k: total(lossops.linear_log_prob(
        x, w, y, linear_bias=b, entropy=True, backend=k
    )),
    "linear_statistics": lambda x, w, b, y, k: total(lossops.linear_statistics(
        x, w, y.clamp_min(0), names=("entropy", "runner_up", "sumsq", "softplus", "lse@2"),
        linear_bias=b, backend=k,
    ).values.values()),
    "linear_loss": lambda x, w, b, y, k: lossops.linear_loss(
        x, w, y, focal, linear_bias=b, backend=k
    ),
    "linear_loss, catalogue": lambda x, w, b, y, k: lossops.catalogue.linear_dual_focal_loss(
        x, w, y, gamma=3.0, linear_bias=b, backend=k
    ),
    "cross_entropy": lambda x, w, b, y, k: lossops.cross_entropy(
        F.linear(x, w, b), y, label_smoothing=0.1, backend=k
    ),
    "linear_spherical_z_loss": lambda x, w, b, y, k: lossops.linear_spherical_z_loss(
        x, w, y, linear_bias=b, mode="gram", backend=k
    ),
    "linear_spherical_loss": lambda x, w, b, y, k: lossops.linear_spherical_loss(
        x, w, y, lossops.recipes.log_taylor_losses, linear_bias=b, mode="sweep", backend=k
    ),
    "spherical_z_loss": lambda x, w, b, y, k: lossops.spherical_z_loss(
        F.linear(x, w, b), y, backend=k
    ),
    "sigmoid_pairwise_loss": lambda x, w, b, y, k: lossops.sigmoid_pairwise_loss(
        x, w, 1 + b.sum(), b.mean(), backend=k
    ),
    "sigmoid_pairwise_loss, rows": lambda x, w, b, y, k: lossops.sigmoid_pairwise_loss(
        x, w, 1 + b.sum(), b.mean(), reduction="none", backend=k
    ).square().sum(),
    "softmax_pairwise_loss": lambda x, w, b, y, k: lossops.softmax_pairwise_loss(
        x, w, 1 + b.sum(), label_smoothing=0.1, backend=k
    ),
    "softmax_pairwise_loss, all terms": lambda x, w, b, y, k: lossops.softmax_pairwise_loss(
        x, w, 1 + b.sum(), direction="rows", positives=y.clamp_min(-1).unsqueeze(1), margin=0.1,
        label_smoothing=0.1, weights=x.detach()[:, 0].abs(), backend=k,
    ),
    "linear_binary_cross_entropy": lambda x, w, b, y, k: lossops.linear_binary_cross_entropy(
        x, w, y.clamp_min(-1).unsqueeze(1), linear_bias=b, backend=k
    ),
    "linear_asymmetric_loss": lambda x, w, b, y, k: lossops.linear_asymmetric_loss(
        x, w, y.clamp_min(-1).unsqueeze(1), linear_bias=b,
        weight=torch.linspace(1, 2, V, device=x.device), reduction="none", backend=k,
    ).square().sum(),
}  # fmt: skip
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
# One line each around a function that is called here, with another formula.
SAME_WAY = {
    "linear_cosine_contrastive_loss",
    "linear_log_spherical_softmax_loss",
    "linear_log_taylor_softmax_loss",
    "linear_spherical_mse_loss",
    "log_spherical_softmax_loss",
    "log_taylor_softmax_loss",
    "spherical_loss",
    "spherical_mse_loss",
}


def test_every_function_is_called():
    public = [n for n in lossops.__all__ if inspect.isfunction(getattr(lossops, n))]
    assert {name.partition(",")[0] for name in CALLS} == set(public) - SAME_WAY - {
        "gradient_cache",  # no loss: it has tests/test_gradient_cache.py
        # What they read depends on a draw: not for compilers and torch.func.
        "sampled_softmax_loss", "nce_loss", "negative_sampling_loss",
    }  # fmt: skip


@pytest.fixture
def inputs():
    """x, w, b in float32, wanting gradients, and a target with two ignored rows."""
    x, w, b, y = make_inputs(N, V, D, torch.float32)
    y[[2, N - 1]] = -100
    return SimpleNamespace(leaves=[t.requires_grad_() for t in (x, w, b)], y=y)


def run(call, leaves, y, backend="auto"):
    """Value and gradients."""
    value = call(*leaves, y, backend)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Compilers and transforms


@pytest.mark.parametrize("name", [n for n in CALLS if "," not in n or "all terms" in n])
def test_compile(name, inputs):
    """One graph without breaks, which serves batches of any size."""
    torch.compiler.reset()
    call = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    x, w, b = inputs.leaves
    counts = set()
    for n in (N, N - 5):
        leaves, y = [x[:n].detach().clone().requires_grad_(), w, b], inputs.y[:n].clone()
        assert_close(run(compiled, leaves, y), run(call, leaves, y))
        counts.add(counter.frame_count)
    assert len(counts) == 1


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"lse_square_scale": 0.1}], ids=str)
def test_compile_one_term_alone(inputs, options):
    torch.compiler.reset()

    def call(x, w, b, y, backend):
        return lossops.linear_cross_entropy(x, w, y, linear_bias=b, backend=backend, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, inputs.leaves, inputs.y), run(call, inputs.leaves, inputs.y))


def test_compile_a_module(inputs):
    torch.compiler.reset()
    head = lossops.LinearCrossEntropyLoss(D, V, bias=True)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    parameters = list(head.parameters())
    found, expected = (
        torch.autograd.grad(each(inputs.leaves[0], inputs.y), parameters)
        for each in (compiled, head)
    )
    assert_close(found, expected)


@pytest.mark.slow
def test_compile_with_inductor(inputs):
    torch.compiler.reset()
    call = CALLS["linear_loss"]
    compiled = torch.compile(call, fullgraph=True)
    assert_close(run(compiled, inputs.leaves, inputs.y), run(call, inputs.leaves, inputs.y))


@EVERY_CALL
def test_func_grad(call, inputs, backend):
    expected = run(call, inputs.leaves, inputs.y, backend)[1:]
    detached = [t.detach() for t in inputs.leaves]
    found = torch.func.grad(lambda *t: call(*t, inputs.y, backend), (0, 1, 2))(*detached)
    assert_close(found, expected)


def test_func_grad_of_what_a_loss_closes_over(inputs, backend):
    x, w, _ = (t.detach() for t in inputs.leaves)

    def loss(t, w, parameters):
        def loss_fn(s):
            return -F.logsigmoid(t * s.target_minus_lse)

        return lossops.linear_loss(
            x, w, inputs.y, loss_fn, parameters=(t,) if parameters else (), backend=backend
        )

    t = torch.tensor(0.7, requires_grad=True)
    w.requires_grad_()
    expected = torch.autograd.grad(loss(t, w, True), (t, w))
    for parameters in (True, False):
        found = torch.func.grad(loss, (0, 1))(t.detach(), w.detach(), parameters)
        assert_close(found, expected)


def test_functional_call(inputs, backend):
    head = lossops.LinearCrossEntropyLoss(D, V, bias=True, backend=backend)
    x, w, b = (t.detach() for t in inputs.leaves)

    def loss(parameters):
        return torch.func.functional_call(head, parameters, (x, inputs.y))

    found = torch.func.grad(loss)({"linear_weight": w, "linear_bias": b})
    call = CALLS["linear_cross_entropy"]
    _, _, dw, db = run(call, inputs.leaves, inputs.y, backend)
    assert_close(found["linear_weight"], dw)
    assert_close(found["linear_bias"], db)


def test_per_sample_transforms_are_refused(inputs):
    x, w, b = (t.detach() for t in inputs.leaves)

    def loss(x, y):
        return CALLS["linear_log_prob"](x, w, b, y, "auto")

    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(torch.func.grad(loss))(x, inputs.y)


OP_NAMES = ["target", "lse", "entropy", "max", "sum", "sumsq"]
OPS = torch.ops.lossops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_opcheck(dtype, inputs, backend):
    """Each op against its schema and its fake; `test_compile` takes the compiler's way."""
    x, w, b = (t.detach().to(dtype) for t in inputs.leaves)
    y = inputs.y.clamp_min(-1).unsqueeze(1)
    scale = torch.tensor(0.5)
    head = (x, w, b, scale, 4.0, y, None, None, OP_NAMES)
    found = OPS.linear_statistics(*head, backend)
    coefficients = [t * 0.5 if t.is_floating_point() else None for t in found]
    z = x @ w.T
    stored = OPS.logits_statistics(z, y, None, None, OP_NAMES, backend)
    terms = (torch.ones(N), None, None, None, torch.full((N,), 0.1))
    calls = [
        ("linear_statistics", (*head, backend)),
        ("logits_statistics", (z, y, None, None, OP_NAMES, backend)),
        ("logits_gradient", (z, y, None, None, OP_NAMES, stored, coefficients, backend)),
        ("gram_statistics", (x, w, b, y)),
    ]
    *given, mean, gram = OPS.gram_statistics(x, w, b, y)
    for needs in ([True] * 3, [True, False, False], [False, True, False]):
        calls.append(("gram_gradient", (x, w, b, y, mean, gram, given, needs)))
    for needs in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        calls.append(("linear_gradient", (*head, found, coefficients, needs, backend)))
        calls.append(("linear_cross_entropy", (*head, *terms, needs, 7, backend)))
    pair = (x, w, scale, y)
    sums = OPS.linear_pair_statistics(*pair, backend)
    calls.append(("linear_pair_statistics", (*pair, backend)))
    factors = [torch.ones(N), torch.ones(V), torch.ones(N, 1)]
    numbers = [0.0, 2.0, 1.0, 0.1, 1.0]
    for needs in ([True] * 4, [False, True, False, True], [False] * 4):
        binary = (x, w, b, scale, y, None, None, None, factors[0], "asymmetric", numbers, needs)
        calls.append(("linear_binary_loss", (*binary, backend)))
        calls.append(("linear_pair_gradient", (*pair, sums, factors, needs[1:], backend)))
    for name, arguments in calls:
        torch.library.opcheck(
            getattr(OPS, name).default, arguments, test_utils=("test_schema", "test_faketensor")
        )
    registered = {s.name for s in torch._C._jit_get_all_schemas()}
    ours = {name.partition("::")[2] for name in registered if name.startswith("lossops::")}
    assert {name for name, _ in calls} == ours


# Precision and modes


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_loss", "linear_log_prob"])
def test_autocast(name, inputs, backend):
    """bfloat16 products as F.linear gives under autocast; loss and gradients stay float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(CALLS[name], inputs.leaves, inputs.y, backend)
    assert [t.dtype for t in found] == [torch.float32] * 4

    def plain(x, w, b, y, _):
        z = F.linear(x, w, b).float() if x.dtype == torch.float32 else F.linear(x, w, b)
        log_p = z.log_softmax(1).gather(1, y.clamp_min(0).unsqueeze(1)).squeeze(1)
        if name == "linear_log_prob":
            return (log_p * (y >= 0)).sum() - (z.softmax(1) * z.log_softmax(1))[y >= 0].sum()
        each = -log_p if name == "linear_cross_entropy" else -torch.expm1(log_p).square() * log_p
        return each[y >= 0].mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = run(plain, inputs.leaves, inputs.y)
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in inputs.leaves]
    oracle = run(plain, rounded, inputs.y)
    for part, ours, theirs, truth in zip(
        ("loss", "dx", "dw", "db"), found, same, oracle, strict=True
    ):
        # the gradient of a cast to bfloat16 is rounded to bfloat16, whoever computes it
        floor = None if part == "loss" else 2.0**-8 * float(truth.abs().max())
        assert_no_worse(part, ours, theirs, truth, floor=floor)


def test_autocast_leaves_float64_alone(inputs):
    leaves = [t.detach().double().requires_grad_() for t in inputs.leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(CALLS["linear_loss"], leaves, inputs.y)
    assert_equal(found, run(CALLS["linear_loss"], leaves, inputs.y))


@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("linear")])
def test_mixed_dtypes(name, inputs):
    """bfloat16 features, float32 weights: computed in float32, each gradient in its own dtype."""
    call = CALLS[name]
    x, w, b = (t.detach() for t in inputs.leaves)
    mixed = [t.requires_grad_() for t in (x.bfloat16(), w.clone(), b.clone())]
    found = run(call, mixed, inputs.y)
    assert [t.dtype for t in found[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    wide = [t.requires_grad_() for t in (x.bfloat16().float(), w.clone(), b.clone())]
    loss, dx, dw, db = run(call, wide, inputs.y)
    assert_equal(found, (loss, dx.bfloat16(), dw, db))


@EVERY_CALL
def test_no_grad_and_inference_mode(call, inputs, backend):
    expected = run(call, inputs.leaves, inputs.y, backend)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = call(*inputs.leaves, inputs.y, backend)
        assert not value.requires_grad
        torch.testing.assert_close(value.clone(), expected)


@pytest.mark.parametrize("name", [n for n in CALLS if "all terms" not in n])  # a CPU weight there
def test_meta_tensors(name):
    """Shapes without numbers, as PyTorch's own losses give them."""
    x, w, b = (torch.empty(s, device="meta", requires_grad=True) for s in ((N, D), (V, D), (V,)))
    y = torch.empty(N, dtype=torch.int64, device="meta")
    found = run(CALLS[name], [x, w, b], y)
    assert [tuple(t.shape) for t in found] == [(), (N, D), (V, D), (V,)]
    assert all(t.device.type == "meta" for t in found)


# Saved tensors


@EVERY_CALL
def test_saved_tensors_hooks(call, inputs, backend):
    """Everything a backward needs goes through the hooks, and only that."""
    expected = run(call, inputs.leaves, inputs.y, backend)
    packed = []

    def pack(t):
        packed.append(t.data_ptr())
        return t.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = call(*inputs.leaves, inputs.y, backend)
    assert_equal(torch.autograd.grad(value, inputs.leaves), expected[1:])
    x, w, _ = inputs.leaves
    assert {x.data_ptr(), w.data_ptr()} <= set(packed)


def test_second_backward_under_hooks(inputs, backend):
    """Hooks hand back copies; a loss's parameters still get their gradient."""
    x, w, _ = inputs.leaves
    loss_fn = ScaledFocal()
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, lambda t: t.detach()):
        loss = lossops.linear_loss(
            x, w, inputs.y, loss_fn, parameters=loss_fn.parameters(), backend=backend
        )
    wanted = (x, w, loss_fn.t)
    first = [g.clone() for g in torch.autograd.grad(loss, wanted, retain_graph=True)]
    assert_equal(list(torch.autograd.grad(loss, wanted)), first)


@EVERY_CALL
def test_save_on_cpu(call, inputs):
    expected = run(call, inputs.leaves, inputs.y)
    with torch.autograd.graph.save_on_cpu():
        found = run(call, inputs.leaves, inputs.y)
    assert_equal(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@EVERY_CALL
def test_activation_checkpointing(call, use_reentrant, inputs, backend):
    expected = run(call, inputs.leaves, inputs.y, backend)

    def recomputed(x, w, b, y, k):
        return checkpoint(lambda *t: call(*t, y, k), x, w, b, use_reentrant=use_reentrant)

    value = recomputed(*inputs.leaves, inputs.y, backend)
    value.backward()  # reentrant checkpoints know no autograd.grad
    assert_equal((value.detach(), *(t.grad for t in inputs.leaves)), expected)


# Models


def test_tied_weights(inputs, backend):
    """Embedding and head one parameter: its gradient is the sum of both."""
    tokens = torch.randint(V, (N,))
    w = inputs.leaves[1]
    for loss_of in (
        lambda x: lossops.linear_cross_entropy(x, w, inputs.y, backend=backend),
        lambda x: lossops.linear_loss(x, w, inputs.y, lambda s: -s.log_p, backend=backend),
        lambda x: -lossops.linear_log_prob(x, w, inputs.y, backend=backend).sum() / (N - 2),
    ):
        found = torch.autograd.grad(loss_of(F.embedding(tokens, w).tanh()), w)
        z = F.linear(F.embedding(tokens, w).tanh(), w)
        assert_close(found, torch.autograd.grad(F.cross_entropy(z, inputs.y), w))


@pytest.mark.parametrize("options", [CHUNKS, TWO], ids=["chunks", "two"])
def test_micro_batches_add_up(options, inputs, backend):
    """reduction="sum" over the count of all, accumulated in .grad, is the whole batch."""
    x, w, b = inputs.leaves
    keywords = {"linear_bias": b, "options": options, "backend": backend}
    lossops.linear_cross_entropy(x, w, inputs.y, **keywords).backward()
    expected = [t.grad.clone() for t in inputs.leaves]
    for t in inputs.leaves:
        t.grad = None
    count = (inputs.y >= 0).sum()
    for part in torch.arange(N).split(5):
        loss = lossops.linear_cross_entropy(x[part], w, inputs.y[part], reduction="sum", **keywords)
        (loss / count).backward()
    assert_close([t.grad for t in inputs.leaves], expected)


class ScaledFocal(nn.Module):
    """Focal loss at a learnable temperature."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(0.9))

    def forward(self, s):
        return -F.logsigmoid(self.t * s.target_minus_lse) * s.log_1mp.exp()


MODULES = {
    "LinearCrossEntropyLoss": lambda: lossops.LinearCrossEntropyLoss(
        D, V, bias=True, weight=torch.linspace(0.5, 2, V), label_smoothing=0.1
    ),
    "LinearLogProb": lambda: lossops.LinearLogProb(
        D, V, logit_scale=nn.Parameter(torch.tensor(0.5))
    ),
    "LinearLoss": lambda: lossops.LinearLoss(D, V, ScaledFocal(), reduction="sum"),
    "CrossEntropyLoss": lambda: lossops.CrossEntropyLoss(weight=torch.linspace(0.5, 2, V)),
    "FactoredSphericalHead": lambda: lossops.FactoredSphericalHead(D, V, bias=True),
    "PartialFC": lambda: lossops.PartialFC(D, V, margin=lossops.CosFace(4.0, 0.1)),
}
EVERY_MODULE = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def test_every_module_is_made():
    public = [n for n in lossops.__all__ if isinstance(getattr(lossops, n), type)]
    pairs = {n for n in public if n.endswith("PairwiseLoss")}  # those take two towers' features
    modules = {n for n in public if issubclass(getattr(lossops, n), nn.Module)}
    assert set(MODULES) == modules - pairs


def takes_features(module):
    return not isinstance(module, lossops.CrossEntropyLoss)


@EVERY_MODULE
def test_module_copies(make, inputs):
    """deepcopy, pickle and state_dict give a module with the same results."""
    module = make()
    x = inputs.leaves[0] if takes_features(module) else torch.randn(N, V)
    expected = module(x, inputs.y)
    again = make()
    again.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again):
        assert_equal(other(x, inputs.y), expected)
        assert repr(other) == repr(module)
        assert not {id(p) for p in module.parameters()} & {id(p) for p in other.parameters()}


@EVERY_MODULE
def test_module_moves(make, inputs):
    module = make().double()
    x = torch.randn(N, D if takes_features(module) else V, dtype=torch.float64)
    assert module(x, inputs.y).dtype == torch.float64


def test_modules_take_row_weights_by_call(inputs):
    x, u = inputs.leaves[0], torch.linspace(0.1, 1.0, N)
    for name in ("LinearCrossEntropyLoss", "LinearLoss", "CrossEntropyLoss"):
        module = MODULES[name]()
        x_or_z = x if takes_features(module) else torch.randn(N, V)
        options = {**getattr(module, "keywords", module.options), "sample_weight": u}
        same = copy.deepcopy(module)
        same.options = options
        assert_equal(module(x_or_z, inputs.y, sample_weight=u), same(x_or_z, inputs.y))
        with pytest.raises(AssertionError):
            assert_equal(module(x_or_z, inputs.y), same(x_or_z, inputs.y))
    found = MODULES["LinearLogProb"]()(x, inputs.y, entropy=True)
    assert len(found) == 2


def test_module_state():
    head = MODULES["LinearCrossEntropyLoss"]()
    shapes = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    assert shapes == {"linear_weight": (V, D), "linear_bias": (V,), "weight": (V,)}
    assert [n for n, _ in head.named_parameters()] == ["linear_weight", "linear_bias"]
    scaled = MODULES["LinearLogProb"]()
    assert list(scaled.state_dict()) == ["linear_weight", "tensors.logit_scale"]
    assert len(list(scaled.parameters())) == 2
    assert list(dict(MODULES["LinearLoss"]().named_parameters())) == ["linear_weight", "loss_fn.t"]
    assert "in_features=8, num_classes=37, bias=True, label_smoothing=0.1" in repr(head)
    meta = lossops.LinearLogProb(D, V, device="meta", dtype=torch.bfloat16)
    assert meta.linear_weight.is_meta
    assert meta.linear_weight.dtype == torch.bfloat16


def test_module_starts_and_resets_as_linear():
    torch.manual_seed(5)
    head = lossops.LinearCrossEntropyLoss(D, V, bias=True)
    bound = D**-0.5
    with torch.no_grad():
        head.linear_weight.fill_(100)
    head.reset_parameters()
    for p in head.parameters():
        assert 0.7 * bound < p.abs().max() <= bound


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"FactoredSphericalHead", "PartialFC"}))
def test_module_is_its_function(name, inputs, backend):
    """All but heads that are no function, which have tests of their own."""
    module = MODULES[name]()
    module.options["backend"] = backend
    x = inputs.leaves[0] if takes_features(module) else torch.randn(N, V)
    found = module(x, inputs.y)
    options = {**module.options}
    if isinstance(module, lossops.CrossEntropyLoss):
        expected = lossops.cross_entropy(x, inputs.y, weight=module.weight, **options)
    elif isinstance(module, lossops.LinearLoss):
        expected = lossops.linear_loss(
            x, module.linear_weight, inputs.y, module.loss_fn,
            parameters=tuple(module.loss_fn.parameters()), **options,
        )  # fmt: skip
        (dt,) = torch.autograd.grad(found, module.loss_fn.t, retain_graph=True)
        assert dt != 0
    elif isinstance(module, lossops.LinearLogProb):
        expected = lossops.linear_log_prob(x, module.linear_weight, inputs.y, **module.keywords)
    else:
        expected = lossops.linear_cross_entropy(
            x, module.linear_weight, inputs.y, linear_bias=module.linear_bias,
            weight=module.weight, **options,
        )  # fmt: skip
    assert_equal(found, expected)


# Processes. One group of two serves all tests here: starting one takes seconds.


class Model(nn.Module):
    """Embedding, one layer, fused head."""

    def __init__(self, options):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = lossops.LinearCrossEntropyLoss(D, V, bias=True, options=options)

    def forward(self, tokens, target):
        return self.head(self.layer(self.embedding(tokens)).tanh(), target)


def model_and_batch(options):
    torch.manual_seed(0)
    model = Model(options).double()
    return model, torch.randint(V, (N,)), torch.randint(V, (N,))


def in_each_process(rank, folder):
    """What the tests below compare, saved by each rank."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    found = {}
    for name, options in (("chunks", CHUNKS), ("two", TWO)):
        model, tokens, target = model_and_batch(options)
        half = slice(rank * N // 2, (rank + 1) * N // 2)
        parallel = DistributedDataParallel(model)
        parallel(tokens[half], target[half]).backward()
        found[name] = {n: p.grad for n, p in model.named_parameters()}
        # Its reducer must not be the last to hold the group: freed with the GIL held it joins a
        # gloo thread that wants the GIL, and now and then waits for it for ever.
        del parallel
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(in_each_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("name", "options"), [("chunks", CHUNKS), ("two", TWO)])
def test_distributed_data_parallel(name, options, ranks):
    model, tokens, target = model_and_batch(options)
    model(tokens, target).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for found in ranks:
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


# Threads, fork, switches


def in_threads(function, count=4):
    """Results of ``function`` called by several Python threads at the same time."""
    barrier = threading.Barrier(count)

    def start():
        torch.set_num_threads(1)  # OpenMP keeps this number per thread
        barrier.wait()
        return [function() for _ in range(5)]

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(start) for _ in range(count)]
        return [result for future in futures for result in future.result()]


@EVERY_CALL
def test_threads_get_the_same_bits(call, backend):
    x, w, b, y = make_inputs(150, 300, 16, torch.float32)

    def once():
        leaves = [t.clone().requires_grad_() for t in (x[:, :D], w[:V, :D], b[:V])]
        return run(call, leaves, y % V, backend)

    torch.set_num_threads(1)
    expected = once()
    for found in in_threads(once):
        assert_equal(found, expected)


@EVERY_CALL
def test_backward_in_another_thread(call, inputs, backend):
    expected = run(call, inputs.leaves, inputs.y, backend)
    value = call(*inputs.leaves, inputs.y, backend)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(value.backward).result()
    assert_close([t.grad for t in inputs.leaves], list(expected[1:]))


@EVERY_CALL
def test_number_of_threads(call, backend):
    x, w, b, y = make_inputs(300, V, D, torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(run(call, leaves, y, backend))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert_equal(found[0], found[2])


def in_python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


FORK = """
import os, torch, lossops
torch.set_num_threads(1)  # OpenMP itself does not survive a fork of its threads
x, w = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
y = torch.randint(500, (64,))

def once():
    loss = lossops.linear_cross_entropy(x, w, y)
    stats = lossops.linear_log_prob(x, w, y).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss + stats, (x, w))])

expected = once()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(once(), expected) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(once(), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_fork():
    done = in_python(FORK)
    assert done.returncode == 0, done.stderr


IMPORT = """
import os, torch

def threads():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0

before = threads()
import lossops
assert threads() == before
print(lossops.backends.select("auto", torch.device("cpu"), torch.float32).name)
"""


def test_import_starts_no_threads_and_the_switch_chooses():
    done = in_python(IMPORT, LOSSOPS_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr


def test_unknown_backend_in_the_switch(monkeypatch, inputs):
    monkeypatch.setenv("LOSSOPS_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"LOSSOPS_BACKEND must be one of .*, got 'fastest'"):
        run(CALLS["linear_loss"], inputs.leaves, inputs.y)
