"""`linear_cross_entropy`: a superset of PyTorch's, every term composed, both schedules the same."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, FLOOR, make_inputs, plain_losses, value_and_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lossops
from lossops import LinearLossOptions
from lossops.autograd import KeptCrossEntropy
from lossops.reference import accumulate_dtype

REDUCTIONS = ("mean", "sum", "none")
N, V, D = 7, 131, 33  # nothing divides anything; two and a half vectors of 48 classes


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, b and a target with two ignored rows."""
    x, w, b, y = make_inputs(N, V, D, dtype, spread=2.0)
    y[1], y[4] = -100, -100
    return x, w, b, y


def probabilities(seed: int = 0) -> Tensor:
    """Class probabilities (N, V), some exactly 0, one row a class id."""
    draw = torch.Generator().manual_seed(seed)
    p = torch.rand(N, V, generator=draw, dtype=torch.float64)
    p = p.masked_fill(p < 0.4, 0.0)
    p[2] = F.one_hot(torch.tensor(5), V).double()
    return p / p.sum(1, keepdim=True)


def class_weights() -> Tensor:
    """Weights (V,), one of them 0."""
    a = torch.rand(V, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.2
    a[3] = 0.0
    return a


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to float64 rounding."""
    for found, wanted in zip(ours, expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_signature_is_that_of_pytorch_and_more() -> None:
    ours = inspect.signature(lossops.linear_cross_entropy).parameters
    for name, theirs in inspect.signature(F.linear_cross_entropy).parameters.items():
        assert ours[name].kind == theirs.kind, name
        assert ours[name].default == theirs.default, name


CALLS = {
    "plain": {},
    "weight": {"weight": class_weights()},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing1": {"label_smoothing": 1.0},
    "weight-smoothing": {"weight": class_weights(), "label_smoothing": 0.3},
    "ignore7": {"ignore_index": 7},
    "ignore-1": {"ignore_index": -1, "weight": class_weights()},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("call", CALLS)
def test_calls_of_pytorch_with_class_ids_mean_the_same(
    call: str, reduction: str, backend: str
) -> None:
    x, w, b, y = problem()
    options = {"reduction": reduction, **CALLS[call]}
    ignored = options.get("ignore_index", -100)
    y = torch.where(y == -100, ignored, torch.where(y == ignored, 0, y))
    upstream = torch.randn(N, dtype=torch.float64) if reduction == "none" else 1.7
    kinds = {
        "ours": lambda x, w, b: lossops.linear_cross_entropy(
            x, w, y, linear_bias=b, backend=backend, **options
        ),
        "theirs": lambda x, w, b: F.linear_cross_entropy(x, w, y, linear_bias=b, **options),
    }
    assert_close(*(value_and_gradients(f, (x, w, b), upstream) for f in kinds.values()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("call", ["plain", "weight", "smoothing", "weight-smoothing"])
def test_calls_of_pytorch_with_class_probabilities_mean_the_same(
    call: str, reduction: str, backend: str
) -> None:
    x, w, b, _ = problem()
    options = {"reduction": reduction, **CALLS[call]}
    upstream = torch.randn(N, dtype=torch.float64) if reduction == "none" else 1.7
    p = probabilities()

    def ours(*heads: Tensor) -> Tensor:
        x, w, b, *p = heads
        target = p[0] if p else probabilities()
        return lossops.linear_cross_entropy(x, w, target, linear_bias=b, backend=backend, **options)

    def theirs(x: Tensor, w: Tensor, b: Tensor, p: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, w, p, linear_bias=b, **options)

    expected = value_and_gradients(theirs, (x, w, b, p), upstream)
    assert_close(value_and_gradients(ours, (x, w, b), upstream), expected[:-1])
    # Probabilities that want a gradient, also where they are 0: log p is their gradient.
    assert_close(value_and_gradients(ours, (x, w, b, p), upstream), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_weights_beside_probabilities_have_a_gradient(reduction: str, backend: str) -> None:
    x, w, b, _ = problem()
    options = {"reduction": reduction, "label_smoothing": 0.3}
    kinds = {
        lossops.linear_cross_entropy: {"backend": backend},
        F.linear_cross_entropy: {},
    }
    found = [
        value_and_gradients(
            lambda x, w, b, a, f=f, k=k: f(
                x, w, probabilities(), linear_bias=b, weight=a, **options, **k
            ),
            (x, w, b, class_weights()),
        )
        for f, k in kinds.items()
    ]
    assert_close(*found)
    logits = [
        value_and_gradients(
            lambda z, a, f=f, k=k: f(z, probabilities(), weight=a, **options, **k),
            (F.linear(x, w, b), class_weights()),
        )
        for f, k in ((lossops.cross_entropy, {"backend": backend}), (F.cross_entropy, {}))
    ]
    assert_close(*logits)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row_without_a_batch_dimension(reduction: str, backend: str) -> None:
    x, w, b, _ = problem()
    for target in (torch.tensor(5), probabilities()[0], torch.tensor(-1)):
        options = {} if target.ndim else {"ignore_index": -1}
        if reduction == "mean" and target.ndim == 0 and target < 0:
            continue  # PyTorch: NaN; here 0, see the contract
        kinds = {
            "ours": lambda x, w, b, y=target, o=options: lossops.linear_cross_entropy(
                x, w, y, linear_bias=b, reduction=reduction, backend=backend, **o
            ),
            "theirs": lambda x, w, b, y=target, o=options: F.linear_cross_entropy(
                x, w, y, linear_bias=b, reduction=reduction, **o
            ),
        }
        assert_close(*(value_and_gradients(f, (x[0], w, b)) for f in kinds.values()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", ["ids", "probabilities"])
def test_k_dimensional_weights_mean_the_same(target: str, reduction: str, backend: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, b, a = (torch.randn(s, generator=draw, dtype=torch.float64)
                  for s in ((4, 5), (6, 2, 3, 5), (6, 2, 3), (6,)))  # fmt: skip
    y = torch.randint(6, (4, 2, 3), generator=draw)
    y[1, 0, 2] = -100
    if target == "probabilities":
        y = torch.rand(4, 6, 2, 3, generator=draw, dtype=torch.float64).softmax(1)
    options = {"label_smoothing": 0.1, "reduction": reduction, "weight": a.abs()}
    kinds = (
        lambda x, w, b: lossops.linear_cross_entropy(
            x, w, y, linear_bias=b, backend=backend, **options
        ),
        lambda x, w, b: F.linear_cross_entropy(x, w, y, linear_bias=b, **options),
    )
    upstream = torch.randn(4, 2, 3, generator=draw) if reduction == "none" else 1.7
    assert_close(*(value_and_gradients(f, (x, w, b), upstream) for f in kinds))


def test_k_dimensional_weights_keep_the_contract(backend: str) -> None:
    """A float32 loss in half precision, and 0 where nothing is counted."""
    x, w = torch.randn(40, 5).bfloat16(), torch.randn(6, 2, 5).bfloat16()
    y = torch.randint(6, (40, 2))
    found = lossops.linear_cross_entropy(x, w, y, backend=backend)
    exact = F.linear_cross_entropy(x.double(), w.double(), y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    ignored = torch.full_like(y, -100)
    found = value_and_gradients(
        lambda x, w: lossops.linear_cross_entropy(x, w, ignored, backend=backend), (x, w)
    )
    assert not any(t.any() for t in found)


def test_options_of_pytorch_are_accepted(backend: str) -> None:
    x, w, b, y = problem()
    theirs = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    found = lossops.linear_cross_entropy(x, w, y, linear_bias=b, options=theirs, backend=backend)
    torch.testing.assert_close(found, F.linear_cross_entropy(x, w, y, linear_bias=b))


def everything(
    x: Tensor, w: Tensor, b: Tensor, scale: Tensor, rows: Tensor, y: Tensor, reduction: str
) -> Tensor:
    """Every term in one expression of plain PyTorch, `rows` multiplying each row."""
    weight = class_weights().to(x.dtype)
    losses = plain_losses(
        x, w, y, b=b, scale=scale, softcap=4.0, lse_square_scale=0.02,
        weight=weight, label_smoothing=0.2,
    )  # fmt: skip
    losses = losses * rows
    if reduction == "none":
        return losses
    divisor = (rows * weight[y.clamp_min(0)])[y >= 0].sum() if reduction == "mean" else 1.0
    return losses.sum() / divisor


@pytest.mark.parametrize("schedule", ["auto", "two_sweeps", "rows1", "rows3"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_term_in_one_call(reduction: str, schedule: str, backend: str) -> None:
    """Gradients of x, w, b, the scale and the row weights; two sweeps, since the last want one."""
    if schedule.startswith("rows"):
        options = LinearLossOptions(chunk_rows=int(schedule[4:]))
    else:
        options = LinearLossOptions(schedule=schedule)
    x, w, b, y = problem()
    rows = torch.rand(N, dtype=torch.float64) + 0.5
    rows[0] = -0.3  # an advantage may be negative
    scale = torch.tensor(1.3, dtype=torch.float64)
    upstream = torch.randn(N, dtype=torch.float64) if reduction == "none" else 1.7

    def ours(x: Tensor, w: Tensor, b: Tensor, scale: Tensor, rows: Tensor = rows) -> Tensor:
        return lossops.linear_cross_entropy(
            x, w, y, linear_bias=b, weight=class_weights(), sample_weight=rows,
            reduction=reduction, label_smoothing=0.2, logit_scale=scale, softcap=4.0,
            lse_square_scale=0.02, options=options, backend=backend,
        )  # fmt: skip

    inputs = (x, w, b, scale, rows)
    expected = value_and_gradients(lambda *t: everything(*t, y, reduction), inputs, upstream)
    assert_close(value_and_gradients(ours, inputs, upstream), expected)
    # Row weights without a gradient: one sweep where the loss is a scalar.
    assert_close(value_and_gradients(ours, inputs[:4], upstream), expected[:-1])


def test_the_lse_penalty_is_not_multiplied_by_class_weights(backend: str) -> None:
    x, w, b, y = problem()
    weight = class_weights()
    z = F.linear(x, w, b)
    counted = y >= 0
    divisor = weight[y[counted]].sum()
    penalty = 0.5 * (z.logsumexp(1).square() * counted).sum() / divisor
    found = lossops.linear_cross_entropy(
        x, w, y, linear_bias=b, weight=weight, lse_square_scale=0.5, backend=backend
    )
    torch.testing.assert_close(found, F.cross_entropy(z, y, weight=weight) + penalty)


def test_a_number_and_a_tensor_are_the_same_scale(backend: str) -> None:
    x, w, _, y = problem()
    losses = [
        lossops.linear_cross_entropy(x, w, y, logit_scale=s, backend=backend)
        for s in (2.5, torch.tensor(2.5, dtype=torch.float64), torch.tensor([2.5]).double())
    ]
    assert losses[0] == losses[1] == losses[2]


def test_the_gradient_of_a_scale_has_its_shape_and_dtype(backend: str) -> None:
    x, w, _, y = problem(torch.float32)
    scale = torch.full((1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = lossops.linear_cross_entropy(
            x, w, y, logit_scale=scale, reduction=reduction, backend=backend
        )
        (found,) = torch.autograd.grad(loss.sum(), scale)
        assert (found.shape, found.dtype) == ((1, 1), torch.float64)


@pytest.mark.parametrize("schedule", ["auto", "two_sweeps"])
def test_what_an_ignored_row_weighs_goes_nowhere(schedule: str, backend: str) -> None:
    x, w, b, y = problem()
    rows = torch.rand(N, dtype=torch.float64)
    options = {
        "linear_bias": b, "label_smoothing": 0.1, "lse_square_scale": 0.01, "backend": backend,
        "options": LinearLossOptions(schedule=schedule),
    }  # fmt: skip

    def of(weight: float) -> list[Tensor]:
        weights = rows.masked_fill(y < 0, weight)
        return value_and_gradients(
            lambda x, w: lossops.linear_cross_entropy(x, w, y, sample_weight=weights, **options),
            (x, w),
        )

    for weight in (float("nan"), float("inf"), -1.0):
        assert_close(of(weight), of(0.0))


def test_a_masked_class_of_probability_zero_counts_nothing(backend: str) -> None:
    """0 · (-inf) is 0, where PyTorch has NaN: the loss is that of the other classes."""
    x, w, b, _ = problem()
    p = probabilities()
    p[:, 9] = 0.0
    p /= p.sum(1, keepdim=True)
    b[9] = -torch.inf
    others = torch.arange(V) != 9

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return lossops.linear_cross_entropy(x, w, p, linear_bias=b, backend=backend)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w[others], b[others]), p[:, others])

    assert_close(value_and_gradients(ours, (x, w)), value_and_gradients(plain, (x, w)))


SCHEDULES = {
    "auto": None,
    "one_sweep": LinearLossOptions(schedule="one_sweep"),
    "rows1": LinearLossOptions(chunk_rows=1),
    "rows3": LinearLossOptions(chunk_rows=3),
    "two_sweeps": LinearLossOptions(schedule="two_sweeps"),
    "little_memory": LinearLossOptions(max_workspace_bytes=1),
}


@pytest.mark.parametrize("target", ["ids", "probabilities"])
@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_every_schedule_gives_the_same_answer(target: str, dtype: str, backend: str) -> None:
    x, w, b, y = problem(DTYPES[dtype])
    scale = torch.tensor(1.5, dtype=x.dtype)
    y = probabilities() if target == "probabilities" else y
    found = {}
    for name, options in SCHEDULES.items():
        found[name] = value_and_gradients(
            lambda x, w, b, s, o=options: lossops.linear_cross_entropy(
                x, w, y, linear_bias=b, logit_scale=s, label_smoothing=0.1, softcap=8.0,
                lse_square_scale=0.01, options=o, backend=backend,
            ),
            (x, w, b, scale),
            1.7,
        )  # fmt: skip
    for name, values in found.items():
        for mine, theirs in zip(values, found["auto"], strict=True):
            atol = 4 * FLOOR[x.dtype] * float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, msg=f"{name}: {mine}")


def test_one_sweep_that_cannot_be_is_refused(backend: str) -> None:
    x, w, _, y = problem()
    x.requires_grad_()
    options = LinearLossOptions(schedule="one_sweep")
    for more in ({"reduction": "none"}, {"outputs": ("log_prob",)}):
        with pytest.raises(ValueError, match="schedule='one_sweep' needs reduction"):
            lossops.linear_cross_entropy(x, w, y, options=options, backend=backend, **more)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_outputs_have_values_and_gradients(reduction: str, backend: str) -> None:
    x, w, b, y = problem()
    z = F.linear(x, w, b)
    counted = y >= 0
    log_p = z.log_softmax(1)
    expected = {
        "logsumexp": z.logsumexp(1),
        "log_prob": torch.where(counted, log_p[range(N), y.clamp_min(0)], 0.0),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "argmax": z.argmax(1),
        "correct": z.argmax(1) == y,
    }
    found = lossops.linear_cross_entropy(
        x, w, y, linear_bias=b, reduction=reduction, outputs=tuple(expected), backend=backend
    )
    assert found.loss.shape == (() if reduction != "none" else (N,))
    torch.testing.assert_close(found.loss, F.cross_entropy(z, y, reduction=reduction))
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, msg=name)

    c = torch.randn(4, N, dtype=torch.float64)

    def total(ours: bool, *heads: Tensor) -> Tensor:
        x, w, b = heads
        if ours:
            out = lossops.linear_cross_entropy(
                x, w, y, linear_bias=b, reduction=reduction, backend=backend,
                outputs=("entropy", "logsumexp", "log_prob"),
            )  # fmt: skip
            parts = [out.logsumexp, out.log_prob, out.entropy]
            loss = out.loss
        else:
            z = F.linear(x, w, b)
            p = z.log_softmax(1)
            at = torch.where(counted, p[range(N), y.clamp_min(0)], 0.0)
            parts = [z.logsumexp(1), at, -(p.exp() * p).sum(1)]
            loss = F.cross_entropy(z, y, reduction=reduction)
        return (c[3] * loss).sum() + sum((k * p).sum() for k, p in zip(c, parts, strict=False))

    assert_close(
        *(value_and_gradients(lambda *t, o=ours: total(o, *t), (x, w, b)) for ours in (True, False))
    )


def test_outputs_not_asked_for_are_none(backend: str) -> None:
    x, w, _, y = problem()
    x.requires_grad_()
    found = lossops.linear_cross_entropy(x, w, y, outputs=["argmax"], backend=backend)
    assert found.argmax.dtype == torch.int64
    assert found.argmax.shape == (N,)
    assert [n for n in found._fields if getattr(found, n) is not None] == ["loss", "argmax"]
    found.loss.backward()  # argmax comes with one sweep
    with torch.no_grad():
        found = lossops.linear_cross_entropy(x, w, y, outputs=["correct"], backend=backend)
    assert found.correct.dtype == torch.bool
    assert not found.correct[1]  # ignored


def test_outputs_of_class_probabilities(backend: str) -> None:
    x, w, b, _ = problem()
    z, p = F.linear(x, w, b), probabilities()
    found = lossops.linear_cross_entropy(
        x, w, p, linear_bias=b, outputs=("logsumexp", "entropy", "argmax"), backend=backend
    )
    torch.testing.assert_close(found.loss, F.cross_entropy(z, p))
    torch.testing.assert_close(found.logsumexp, z.logsumexp(1))
    torch.testing.assert_close(found.entropy, -(z.softmax(1) * z.log_softmax(1)).sum(1))
    assert torch.equal(found.argmax, z.argmax(1))
    for name in ("log_prob", "correct"):
        with pytest.raises(ValueError, match=rf"outputs \['{name}'\] need class ids"):
            lossops.linear_cross_entropy(x, w, p, outputs=(name,), backend=backend)


def test_argmax_of_ties_is_the_lowest_class(backend: str) -> None:
    x, w = torch.ones(4, 1), torch.tensor([[1.0], [2.0], [2.0], [2.0], [0.0]])
    y = torch.tensor([0, 1, 2, 3])
    for needs in (False, True):  # two sweeps and one
        found = lossops.linear_cross_entropy(
            x.requires_grad_(needs), w, y, outputs=("argmax", "correct"), backend=backend
        )
        assert found.argmax.tolist() == [1, 1, 1, 1]
        assert found.correct.tolist() == [False, True, False, False]


def test_log_prob_and_entropy(backend: str) -> None:
    x, w, b, y = problem()
    counted = y >= 0

    def plain(x: Tensor, w: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        z = 3 * torch.tanh((F.linear(x, w) * scale + b) / 3)
        p = z.log_softmax(1)
        at = p[range(N), y.clamp_min(0)]
        return torch.where(counted, torch.stack([at, -(p.exp() * p).sum(1)]), 0.0)

    def ours(x: Tensor, w: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return torch.stack(
            lossops.linear_log_prob(
                x, w, y, linear_bias=b, logit_scale=scale, softcap=3.0, entropy=True,
                backend=backend,
            )
        )  # fmt: skip

    upstream = torch.randn(2, N, dtype=torch.float64)
    inputs = (x, w, b, torch.tensor(0.8, dtype=torch.float64))
    expected = value_and_gradients(plain, inputs, upstream)
    assert_close(value_and_gradients(ours, inputs, upstream), expected)
    alone = lossops.linear_log_prob(x, w, y, linear_bias=b, backend=backend)
    torch.testing.assert_close(alone, -F.cross_entropy(F.linear(x, w, b), y, reduction="none"))


@pytest.mark.parametrize("function", ["linear", "logits"])
@pytest.mark.parametrize(
    ("smoothing", "loss", "gradient"),
    [
        (0.0, 1.42012638, [-0.758317, 0.012033, 0.053927, 0.656964, 0.002685, 0.032708]),
        (0.1, 1.58679305, [-0.674983, -0.004634, 0.037260, 0.640297, -0.013982, 0.016042]),
    ],
    ids=["plain", "smoothing"],
)
def test_anchor_values(
    smoothing: float, loss: float, gradient: list[float], function: str, backend: str
) -> None:
    """Six classes, from PyTorch's own modules in float64."""
    z = torch.tensor([[2, -1, 0.5, 3, -2.5, 0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0])
    options = {"label_smoothing": smoothing, "backend": backend}
    if function == "linear":
        found = lossops.linear_cross_entropy(z, torch.eye(6).double(), y, **options)
    else:
        found = lossops.cross_entropy(z, y, **options)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-8)
    assert z.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor, str]:
    """Shapes from empty to three leading dimensions, layouts, dtypes; some rows ignored."""
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    v, d = draw(st.integers(1, 40)), draw(st.integers(0, 9))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(*lead, d, generator=random)
    w, b = torch.randn(v, d, generator=random), torch.randn(v, generator=random)
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    if layout == "transposed":
        w = w.T.contiguous().T
        x = x.transpose(0, -1).contiguous().transpose(0, -1) if lead else x
    elif layout == "sliced":
        x, w, b = (torch.stack([t, -t], -1)[..., 0] for t in (x, w, b))
    elif layout == "expanded":
        x, w, b = x[..., :1].expand(*lead, d), w[:1].expand(v, d), b[:1].expand(v)
    y = torch.randint(-1, v, lead, generator=random)
    y = torch.where(y < 0, -100, y)
    has_bias = draw(st.booleans())
    reduction = draw(st.sampled_from(REDUCTIONS))
    return x.to(dtype), w.to(dtype), b.to(dtype) if has_bias else None, y, reduction


@given(calls())
def test_any_shape_layout_and_dtype(
    backend: str, call: tuple[Tensor, Tensor, Tensor | None, Tensor, str]
) -> None:
    x, w, b, y, reduction = call
    flat = x.double().reshape(y.numel(), x.shape[-1])

    def plain(x: Tensor, w: Tensor, *b: Tensor) -> Tensor:
        losses = plain_losses(x, w, y.reshape(-1), b=b[0] if b else None)
        if reduction == "none":
            return losses.reshape(y.shape)
        return losses.sum() / ((y >= 0).sum().clamp_min(1) if reduction == "mean" else 1)

    def ours(x: Tensor, w: Tensor, *b: Tensor) -> Tensor:
        return lossops.linear_cross_entropy(
            x, w, y, linear_bias=b[0] if b else None, reduction=reduction, backend=backend
        )

    heads = (x, w) if b is None else (x, w, b)
    # Leaves in the very layout: a clone of an expanded tensor would be contiguous.
    leaves = [t.detach().requires_grad_() for t in heads]
    loss = ours(*leaves)
    assert loss.dtype == accumulate_dtype(x.dtype)
    found = [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
    expected = value_and_gradients(plain, (flat, *(t.double() for t in heads[1:])))
    expected[1] = expected[1].reshape(x.shape)
    for mine, exact in zip(found, expected, strict=True):
        assert mine.shape == exact.shape
        # A few roundings of its own dtype, of terms of order 1, which may cancel in the result; the
        # strict budgets are in the tests of the contract.
        atol = 16 * FLOOR[mine.dtype] * max([1.0, *exact.abs().flatten().tolist()])
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("ignored", [0, 3, 9], ids=["all rows", "some", "none"])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"reduction": "sum", "lse_square_scale": 1e-2},
        {"sample_weight": torch.linspace(0, 2, 9)},
        {"outputs": ("argmax",)},
        {"label_smoothing": 0.1},  # keeps logits, the others exponentials
        {"softcap": 3.0},  # keeps nothing
    ],
    ids=["mean", "sum", "weighted", "argmax", "smoothed", "capped"],
)
@pytest.mark.usefixtures("rounded_products")
def test_a_chunk_that_waits_for_backward(
    ignored: int, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products in bfloat16 keep one chunk: any gradients, any number of times."""
    random = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(*s, generator=random).bfloat16() for s in ((9, 8), (51, 8), (51,)))
    y = torch.randint(51, (9,), generator=random)
    y[:ignored] = -100
    scale, kept = torch.tensor(0.7), []
    forward = KeptCrossEntropy.forward
    monkeypatch.setattr(
        KeptCrossEntropy, "forward", staticmethod(lambda *a: kept.append(1) or forward(*a))
    )

    def loss(leaves: list[Tensor], **keywords: Any) -> Tensor:
        x, w, b, scale = leaves
        found = lossops.linear_cross_entropy(
            x, w, y, linear_bias=b, logit_scale=scale, **own, **keywords
        )
        return found.loss if "outputs" in own else found

    for frozen in ((), (0,), (1,), (2, 3)):
        leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate((x, w, b, scale))]
        wanted = [t for t in leaves if t.requires_grad]
        ours, theirs = loss(leaves), loss(leaves, options=LinearLossOptions(chunk_rows=4))
        torch.testing.assert_close(ours, theirs)
        expected = torch.autograd.grad(3.1 * theirs, wanted)
        for _ in range(2):  # the chunk is not used up
            found = torch.autograd.grad(3.1 * ours, wanted, retain_graph=True)
            for t, mine, other in zip(wanted, found, expected, strict=True):
                assert mine.dtype == t.dtype
                # From logits dz is rounded times the upstream factor, from exponentials before it.
                floor = FLOOR[x.dtype if "label_smoothing" in own else t.dtype]
                size = 2 * floor * (1 + float(other.double().abs().max()))
                torch.testing.assert_close(mine, other, rtol=0, atol=size)
    again = loss([t.clone().requires_grad_() for t in (x, w, b, scale)])
    again.backward()
    with pytest.raises(RuntimeError, match="second time"):
        again.backward()
    assert len(kept) == (0 if "softcap" in own else 5)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    ours = lossops.linear_cross_entropy(*leaves, y, **own)
    ours = ours.loss if "outputs" in own else ours
    first = torch.autograd.grad(ours, leaves, create_graph=True)
    second = torch.autograd.grad(sum(t.float().square().sum() for t in first), leaves)
    assert all(t.isfinite().all() for t in second)
    assert bool(second[1].any()) == (ignored < 9)
