"""The spherical family on logits, in sweeps and in Gram mode, against float64 logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_no_worse, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

import lossops
from lossops import gram, spherical

# On logits z (N, V) by textbook formulas, in the dtype of z.


def textbook_z(z, y, a=1.0, b=0.0):
    score = (z.gather(1, y) - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, correction=0)
    return F.softplus(a * (b - score)) / a


def textbook_taylor(z, y):
    weights = 1 + z + z.square() / 2
    return weights.sum(1, keepdim=True).log() - weights.gather(1, y).log()


def textbook_spherical(z, y, eps=0.1):
    weights = z.square() + eps
    return weights.sum(1, keepdim=True).log() - weights.gather(1, y).log()


def textbook_mse(z, y):
    one_hot = F.one_hot(y, z.shape[1]).to(z.dtype)  # (N, K, V)
    return (z.unsqueeze(1) - one_hot).square().sum(2)


LOSSES = {
    "z": (lossops.linear_spherical_z_loss, lossops.spherical_z_loss, textbook_z,
          {"a": 0.7, "b": 1.5}),
    "taylor": (lossops.linear_log_taylor_softmax_loss, lossops.log_taylor_softmax_loss,
               textbook_taylor, {}),
    "spherical": (lossops.linear_log_spherical_softmax_loss, lossops.log_spherical_softmax_loss,
                  textbook_spherical, {"eps": 0.3}),
    "mse": (lossops.linear_spherical_mse_loss, lossops.spherical_mse_loss, textbook_mse, {}),
}  # fmt: skip
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)
EVERY_MODE = pytest.mark.parametrize("mode", ["gram", "sweep"])


def textbook(name, x, w, b, y, sample_weight=None):
    """Mean loss of plain PyTorch from all logits; y (N, K) padded with -1."""
    z = F.linear(x, w, b)
    z = z if z.itemsize > 2 else z.float()
    _, _, formula, options = LOSSES[name]
    losses = torch.where(y >= 0, formula(z, y.clamp_min(0), **options), 0.0).sum(1)
    counted = (y >= 0).any(1).to(losses.dtype)
    weight = counted if sample_weight is None else sample_weight * counted
    return (losses * weight).sum() / weight.sum()


def with_gradients(loss, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# Values and gradients by the modules of the papers' own authors, float64.
ROW = [2.0, -1.0, 0.5, 3.0, -2.5, 0.0]
ANCHORS = [
    ("z", {"a": 1.0, "b": 0.0}, 0.33635575,
     [-0.108916, 0.008581, 0.028384, 0.061389, -0.011222, 0.021783]),
    ("z", {"a": 0.1, "b": 10.0}, 12.47083313,
     [-0.271748, 0.021410, 0.070819, 0.153167, -0.027998, 0.054350]),
    ("taylor", {}, 1.29472717, [-0.435616, 0, 0.082192, 0.219178, -0.082192, 0.054795]),
    ("spherical", {"eps": 0.1}, 1.63828607,
     [-0.786036, -0.094787, 0.047393, 0.284360, -0.236967, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "value", "gradient"), ANCHORS)
def test_anchors(name, options, value, gradient, backend):
    z = torch.tensor([ROW], dtype=torch.float64)
    loss = partial(
        LOSSES[name][1], target=torch.tensor([0]), reduction="sum", backend=backend, **options
    )
    found, dz = with_gradients(loss, z)
    assert float(found) == pytest.approx(value, abs=5e-9)
    assert dz[0].tolist() == pytest.approx(gradient, abs=5e-7)


# Ragged sizes: V past two blocks of classes, D past one block of columns, N past one of rows.
@pytest.fixture
def small_blocks(monkeypatch):
    for name, size in (("CLASSES", 16), ("COLUMNS", 4), ("ROWS", 8)):
        monkeypatch.setattr(gram, name, size)


@EVERY_LOSS
@EVERY_MODE
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("targets", [1, 3])
def test_as_accurate_as_all_logits(name, mode, dtype, targets, small_blocks):
    x, w, b, _ = make_inputs(21, 37, 6, DTYPES[dtype])
    y = torch.rand(21, 37).topk(targets).indices  # distinct in each row
    y[4] = -1  # no target at all
    if targets > 1:
        y[:5, 1] = -1
        y[9, 2] = y[9, 0]  # said twice, counts once
    weight = torch.rand(21)
    distinct = y.clone()
    if targets > 1:
        distinct[9, 2] = -1
    given = y if targets > 1 else torch.where(y[:, 0] < 0, -100, y[:, 0])
    function, _, _, options = LOSSES[name]

    def ours(x, w, b):
        return function(x, w, given, linear_bias=b, mode=mode, sample_weight=weight, **options)

    def plain(x, w, b):
        return textbook(name, x, w, b, distinct, weight)

    found, budget = with_gradients(ours, x, w, b), with_gradients(plain, x, w, b)
    oracle = with_gradients(plain, *(t.double() for t in (x, w, b)))
    assert found[0].dtype == (torch.float64 if dtype == "f64" else torch.float32)
    for what, *three in zip(("loss", "dx", "dw", "db"), found, budget, oracle, strict=True):
        # In float64 the budget is the oracle itself and has no error to compare with: the roundings
        # that tests/test_cpu_backend.py allows there.
        floor = 64 * 2.0**-53 * float(three[2].abs().max()) if dtype == "f64" else None
        assert_no_worse(f"{name} {mode} {what}", *three, floor=floor)


@EVERY_LOSS
@EVERY_MODE
def test_gradients_by_finite_differences(name, mode):
    x, w, b, y = make_inputs(3, 4, 2)
    function, _, _, options = LOSSES[name]
    learnt = {k: torch.tensor(v, dtype=torch.float64) for k, v in options.items()}

    def loss(x, w, b, *values):
        named = dict(zip(learnt, values, strict=True))
        schedule = lossops.LinearLossOptions(schedule="two_sweeps")
        return function(x, w, y, linear_bias=b, mode=mode, options=schedule, **named)

    leaves = [t.requires_grad_() for t in (x, w, b, *learnt.values())]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gram_mode_rounds_no_bias_again(dtype):
    """A bias in half precision meets the mean of the weights in the accumulate dtype."""
    x, w = (0.1 * torch.randn(64, 16)).to(dtype), (0.1 * torch.randn(33, 16)).to(dtype)
    b, y = torch.randn(33).to(dtype), torch.randint(0, 33, (64,))
    loss = lossops.linear_spherical_mse_loss
    true = loss(x.double(), w.double(), y, linear_bias=b.double(), mode="sweep")
    found = loss(x, w, y, linear_bias=b, mode="gram")
    torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=0)


@EVERY_MODE
def test_features_made_from_the_weight(mode):
    """Tied weights: with create_graph the path through x counts once."""
    _, w, _, y = make_inputs(12, 9, 4)
    ids = torch.arange(12) % 9
    found = []
    for create_graph in (False, True):
        leaf = w.clone().requires_grad_()
        loss = lossops.linear_spherical_z_loss(leaf[ids].tanh(), leaf, y, mode=mode)
        found.append(torch.autograd.grad(loss, leaf, create_graph=create_graph)[0].detach())
    torch.testing.assert_close(*found)


@EVERY_MODE
def test_ignored_rows_may_hold_anything(mode):
    x, w, _, y = make_inputs(9, 5, 3, torch.float32)
    x[4], y[4] = float("nan"), -100

    def root(target, sum, sumsq, num_classes):  # no slope at 0
        return sumsq.sqrt() - target

    def loss(x, w):
        return lossops.linear_spherical_loss(x, w, y, root, mode=mode)

    found = with_gradients(loss, x, w)
    assert all(t.isfinite().all() for t in found)
    assert not found[1][4].any()


def test_learnable_position_in_one_sweep():
    x, w, _, y = make_inputs(40, 50, 60, torch.float32)
    found = []
    for mode in ("gram", "sweep"):
        b = torch.tensor(0.5, requires_grad=True)
        lossops.linear_spherical_z_loss(x, w.clone().requires_grad_(), y, b=b, mode=mode).backward()
        found.append(b.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@EVERY_MODE
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_leading_dims_and_reductions(mode, reduction):
    x, w, _, y = make_inputs(12, 9, 4)
    each = textbook_z(x @ w.T, y.unsqueeze(1)).squeeze(1)
    y[5] = -7
    each[5] = 0
    expected = {"none": each.reshape(3, 4), "sum": each.sum(), "mean": each.sum() / 11}[reduction]
    found = lossops.linear_spherical_z_loss(
        x.reshape(3, 4, 4), w, y.reshape(3, 4), a=1.0, b=0.0, mode=mode, reduction=reduction,
        ignore_index=-7,
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    logits = lossops.spherical_z_loss(
        (x @ w.T).reshape(3, 4, 9),
        y.reshape(3, 4),
        a=1.0,
        b=0.0,
        reduction=reduction,
        ignore_index=-7,
    )
    torch.testing.assert_close(logits, expected)


def test_z_loss_sees_neither_shift_nor_scale():
    """So its gradient sums to 0 over the classes and is orthogonal to the logits."""
    z = torch.randn(6, 50, dtype=torch.float64)
    y = torch.randint(50, (6,))
    loss = partial(lossops.spherical_z_loss, target=y, reduction="sum")
    value, dz = with_gradients(loss, z)
    moved, _ = with_gradients(loss, 3.7 * z - 11)
    assert float(moved) == pytest.approx(float(value), rel=1e-12)
    size = dz.abs().sum(1)
    assert (dz.sum(1).abs() <= 1e-14 * size).all()
    assert ((dz * z).sum(1).abs() <= 1e-14 * size).all()


@EVERY_MODE
def test_equal_logits_have_no_score(mode):
    """A row of zeros, and one class alone: constant, not NaN."""
    x, w, _, y = make_inputs(6, 8, 4, torch.float32)
    x[2] = 0
    loss, dx, dw = with_gradients(
        lambda x, w: lossops.linear_spherical_z_loss(x, w, y, mode=mode), x, w
    )
    assert loss.isfinite()
    assert dw.isfinite().all()
    assert not dx[2].any()
    loss, dx = with_gradients(
        lambda x: lossops.linear_spherical_z_loss(x, w[:1], y * 0, mode=mode), x
    )
    assert loss.isfinite()
    assert not dx.any()


@pytest.mark.parametrize("mode", ["gram", "sweep"])
def test_a_common_mean_costs_no_digits(mode):
    """Logits at 1000 ± 1: Σz² / V - mean² in float32 would leave none."""
    x, w, _, y = make_inputs(64, 300, 16, torch.float32)
    x = x.abs() + 0.5
    w = w * 0.1 + 40
    found = lossops.linear_spherical_z_loss(x, w, y, a=1.0, b=0.0, mode=mode)
    oracle = textbook_z(x.double() @ w.double().T, y.unsqueeze(1)).mean()
    plain = textbook_z(x @ w.T, y.unsqueeze(1)).mean()
    assert_no_worse(f"{mode} loss", found, plain, oracle)


def hidden_direction(dtype, ratio):
    """Rows x orthogonal to the one direction in which the classes differ ``ratio`` times more."""
    x, w, _, y = make_inputs(40, 200, 8, torch.float64)
    x[:20, 0] = 0  # the other rows see it
    w[:, 0] *= ratio
    return x.to(dtype), w.to(dtype), y


@pytest.mark.parametrize(
    ("dtype", "ratio", "made", "swept"),
    [("f32", 1.0, 1, 0), ("f32", 1e4, 2, 0), ("f64", 1.0, 1, 0), ("f64", 1e5, 1, 1)],
)
def test_rows_that_float32_cannot_resolve(dtype, ratio, made, swept, monkeypatch):
    """They get a Gram matrix made in float64, or their own logits, and only they pay."""
    calls = {"class_moments": 0, "swept_moments": 0}

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            if name == "swept_moments":
                assert len(arguments[0]) == 20
            return function(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(gram, name, counted(name, getattr(gram, name)))
    x, w, y = hidden_direction(DTYPES[dtype], ratio)
    found = lossops.linear_spherical_z_loss(x, w, y, a=1.0, b=0.0, mode="gram", reduction="none")
    assert calls == {"class_moments": made, "swept_moments": swept}
    oracle = textbook_z(x.double() @ w.double().T, y.unsqueeze(1)).squeeze(1)
    plain = textbook_z(x @ w.T, y.unsqueeze(1)).squeeze(1)
    assert_no_worse("loss", found, plain, oracle)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for t in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return found


def test_gram_mode_holds_nothing_of_the_size_of_the_logits():
    n, v, d = 3000, 4000, 8
    x, w, _, y = make_inputs(n, v, d, torch.float32)
    ids = y.unsqueeze(1)
    with LargestResult() as largest:
        found, moments = gram.statistics(x, w, None, ids)
        gram.gradient(x, w, None, ids, moments, found, (True, True, False))
    assert largest.elements <= max(v, gram.CLASSES, 2 * n) * d < n * v / 100


def test_auto_takes_gram_where_it_takes_fewer_operations(monkeypatch):
    taken = []
    monkeypatch.setattr(spherical, "linear_loss", lambda *a, **k: taken.append("sweep"))
    x, w, _, y = make_inputs(12, 18, 6)
    assert lossops.linear_spherical_mse_loss(x, w, y).isfinite()
    lossops.linear_spherical_mse_loss(x[:5], w, y[:5])
    lossops.linear_spherical_mse_loss(x, w[:6], y % 6)
    assert taken == ["sweep"] * 2


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_any_subset_of_gradients(needed):
    x, w, b, y = make_inputs(9, 11, 4)
    tensors = [x, w, b]
    all_of_them = with_gradients(partial(textbook, "mse", y=y.unsqueeze(1)), *tensors)[1:]
    leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    loss = lossops.linear_spherical_mse_loss(
        leaves[0], leaves[1], y, linear_bias=leaves[2], mode="gram"
    )
    loss.backward()
    for i, (leaf, expected) in enumerate(zip(leaves, all_of_them, strict=True)):
        if i in needed:
            torch.testing.assert_close(leaf.grad, expected)
        else:
            assert leaf.grad is None


def test_same_bits_again():
    x, w, b, y = make_inputs(300, 500, 20, torch.float32)
    y[:200] = y[0]  # many pulls on one class

    def once():
        return with_gradients(
            lambda *t: lossops.linear_spherical_z_loss(t[0], t[1], y, linear_bias=t[2]), x, w, b
        )

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_autocast_rounds_the_inputs_and_nothing_else():
    x, w, _, y = make_inputs(12, 20, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = lossops.linear_spherical_z_loss(x, w, y)
    expected = lossops.linear_spherical_z_loss(x.bfloat16(), w.bfloat16(), y)
    assert torch.equal(found, expected)


@EVERY_MODE
def test_any_function_of_the_three(mode):
    def cosine(target, sum, sumsq, num_classes):
        return 1 - (target - sum / num_classes) / sumsq.sqrt()

    x, w, _, y = make_inputs(9, 11, 4)
    z = x @ w.T
    expected = cosine(z.gather(1, y.unsqueeze(1))[:, 0], z.sum(1), z.square().sum(1), 11).mean()
    found = lossops.linear_spherical_loss(x, w, y, cosine, mode=mode)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lossops.spherical_loss(z, y, cosine), expected)


@EVERY_MODE
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_average_is_zero(mode, rows):
    x, w, _, _ = make_inputs(rows, 11, 4, torch.float32)
    y = torch.full((rows,), -100)
    loss, dx, dw = with_gradients(
        lambda x, w: lossops.linear_spherical_z_loss(x, w, y, mode=mode), x, w
    )
    assert loss == 0
    assert not dx.any()
    assert not dw.any()


X, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lossops.linear_spherical_z_loss(X, W, Y, mode="fast"), ValueError,
         "mode must be one of auto, gram, sweep, got 'fast'"),
        (lambda: lossops.linear_spherical_z_loss(X, W, Y, a=0.0), ValueError,
         "a must be positive, got 0.0"),
        (lambda: lossops.linear_log_spherical_softmax_loss(X, W, Y, eps=-1.0), ValueError,
         "eps must be positive"),
        (lambda: lossops.linear_spherical_z_loss(X, W, Y + 5, mode="gram"), IndexError,
         r"class ids in \[0, 5\)"),
        (lambda: lossops.linear_spherical_z_loss(X, W, Y + 5, mode="sweep"), IndexError,
         r"class ids in \[0, 5\)"),
        (lambda: lossops.spherical_z_loss(X, Y), IndexError, r"class ids in \[0, 3\)"),
        (lambda: lossops.linear_spherical_loss(X, W, Y, lambda t, s, q, v: t.sum(), mode="gram"),
         ValueError, "one loss per row"),
        (lambda: lossops.linear_spherical_mse_loss(X, W[:, :2], Y), ValueError,
         "linear_weight must have shape"),
        (lambda: lossops.linear_spherical_mse_loss(X, W, Y.unsqueeze(1)[:, :0]), ValueError,
         "at least one column"),
        (lambda: lossops.spherical_mse_loss(Y, Y), TypeError, "logits must be a floating point"),
        (lambda: lossops.linear_spherical_mse_loss(X, W, Y, mode="gram", backend="fast"),
         ValueError, "backend"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
