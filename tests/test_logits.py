"""`cross_entropy` on logits that exist: PyTorch's result, any layout, and the gradient in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, HALF, assert_no_worse, value_and_gradients
from torch import Tensor

import lossops
from lossops.reference import accumulate_dtype

N, V = 9, 131  # V: not a multiple of any vector
REDUCTIONS = ("mean", "sum", "none")


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of a trained model's spread, and a target with ignored rows."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(N, V, generator=draw, dtype=torch.float64) * 3
    y = torch.randint(V, (N,), generator=draw)
    y[3], y[N - 1] = -100, -100
    return z.to(dtype), y


def weights() -> Tensor:
    """Class weights (V,)."""
    return torch.rand(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1


CALLS = {
    "plain": {},
    "weight": {"weight": weights()},
    "smoothing": {"label_smoothing": 0.1},
    "weight-smoothing-ignore": {"weight": weights(), "label_smoothing": 0.2, "ignore_index": 5},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("call", CALLS)
def test_the_result_is_that_of_pytorch(call: str, reduction: str, backend: str) -> None:
    z, y = problem()
    options = {"reduction": reduction, **CALLS[call]}
    y = torch.where(y == -100, options.get("ignore_index", -100), y)
    upstream = torch.randn(N, dtype=torch.float64) if reduction == "none" else 1.7
    expected = value_and_gradients(lambda z: F.cross_entropy(z, y, **options), [z], upstream)
    found = value_and_gradients(
        lambda z: lossops.cross_entropy(z, y, backend=backend, **options), [z], upstream
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_probabilities(reduction: str, backend: str) -> None:
    z, _ = problem()
    p = torch.rand(N, V, dtype=torch.float64).masked_fill(torch.rand(N, V) < 0.3, 0.0)
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": weights()}
    expected = value_and_gradients(lambda z, p: F.cross_entropy(z, p, **options), [z, p])
    both = value_and_gradients(
        lambda z, p: lossops.cross_entropy(z, p, backend=backend, **options), [z, p]
    )
    alone = value_and_gradients(
        lambda z: lossops.cross_entropy(z, p, backend=backend, **options), [z]
    )
    torch.testing.assert_close(both, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(alone, expected[:2], rtol=1e-11, atol=1e-13)


def test_row_weights_penalty_and_outputs_in_one_call(backend: str) -> None:
    z, y = problem()
    rows = torch.rand(N, dtype=torch.float64)
    c = torch.randn(3, N, dtype=torch.float64)
    counted = y >= 0

    def plain(z: Tensor, rows: Tensor) -> Tensor:
        log_p, lse = z.log_softmax(1), z.logsumexp(1)
        losses = F.cross_entropy(z, y, reduction="none") + 0.03 * lse.square() * counted
        loss = (losses * rows).sum() / rows[counted].sum()
        at = torch.where(counted, log_p[range(N), y.clamp_min(0)], 0.0)
        entropy = -(log_p.exp() * log_p).sum(1)
        return loss + sum((k * t).sum() for k, t in zip(c, (lse, at, entropy), strict=True))

    def ours(z: Tensor, rows: Tensor) -> Tensor:
        out = lossops.cross_entropy(
            z, y, sample_weight=rows, lse_square_scale=0.03, backend=backend,
            outputs=("logsumexp", "log_prob", "entropy", "argmax", "correct"),
        )  # fmt: skip
        assert torch.equal(out.argmax, z.argmax(1))
        assert torch.equal(out.correct, z.argmax(1) == y)
        parts = (out.logsumexp, out.log_prob, out.entropy)
        return out.loss + sum((k * t).sum() for k, t in zip(c, parts, strict=True))

    found, expected = (value_and_gradients(f, (z, rows)) for f in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_pytorch_in_the_same_dtype(dtype: str, reduction: str, backend: str) -> None:
    z, y = problem(DTYPES[dtype])

    def of(z: Tensor) -> Tensor:
        return F.cross_entropy(z.to(accumulate_dtype(z.dtype)), y, reduction=reduction)

    oracle = value_and_gradients(of, [z.double()])
    plain = value_and_gradients(of, [z])
    found = value_and_gradients(
        lambda z: lossops.cross_entropy(z, y, reduction=reduction, backend=backend), [z]
    )
    assert found[0].dtype == accumulate_dtype(z.dtype)
    assert found[1].dtype == z.dtype
    for name, *three in zip(("loss", "dz"), found, plain, oracle, strict=True):
        assert_no_worse(name, *three)


LAYOUTS = {
    "transposed": lambda z: z.T.contiguous().T,
    "sliced-columns": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
    "sliced-rows": lambda z: torch.stack([z, -z], 1)[:, 0],
    "every-second-column": lambda z: torch.stack([z, -z], 2)[:, :, 0],
    "expanded-rows": lambda z: z[:1].expand_as(z),
    "expanded-columns": lambda z: z[:, :1].expand_as(z),
    "flipped": lambda z: z.flip(0, 1),
}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(layout: str, dtype: str, backend: str) -> None:
    z, y = problem(DTYPES[dtype])
    strided = LAYOUTS[layout](z).detach().requires_grad_()
    plain = strided.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    losses = [lossops.cross_entropy(t, y, backend=backend) for t in (strided, plain)]
    found, expected = (
        torch.autograd.grad(loss, t)[0] for loss, t in zip(losses, (strided, plain), strict=True)
    )
    assert losses[0] == losses[1]
    assert torch.equal(found, expected)


def test_leading_dimensions_are_rows(backend: str) -> None:
    z, y = problem()
    flat = lossops.cross_entropy(z[:8], y[:8], reduction="none", backend=backend)
    cube = lossops.cross_entropy(
        z[:8].reshape(2, 1, 4, V), y[:8].reshape(2, 1, 4), reduction="none", backend=backend
    )
    assert torch.equal(cube.flatten(), flat)
    one = lossops.cross_entropy(z[0], y[0], backend=backend)
    torch.testing.assert_close(one, F.cross_entropy(z[0], y[0]))


# In place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_in_place_gives_the_same_loss_and_gradient(call: str, dtype: str, backend: str) -> None:
    z, y = problem(DTYPES[dtype])
    options = {"backend": backend, **CALLS[call]}
    y = torch.where(y == -100, options.get("ignore_index", -100), y)
    leaf = z.clone().requires_grad_()
    loss = lossops.cross_entropy(leaf * 1, y, inplace=True, **options)
    loss.backward()
    expected = value_and_gradients(lambda z: lossops.cross_entropy(z, y, **options), [z])
    tolerance = {"rtol": 2e-3, "atol": 1e-4} if dtype in HALF else {"rtol": 1e-6, "atol": 1e-9}
    if dtype == "bf16":
        tolerance["rtol"] = 1e-2  # rounded before and after the division by the number of rows
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, expected[1], **tolerance)


@pytest.mark.parametrize("size", [1e-7, 1e5])
def test_in_place_in_fp16_takes_row_weights_of_any_size(size: float, backend: str) -> None:
    """The mean divides by their sum, in backward: until then they must not leave fp16."""
    z, y = problem(torch.float16)
    p = torch.rand(N, V, dtype=torch.float64).softmax(1)
    options = {"sample_weight": torch.full((N,), size), "backend": backend, "label_smoothing": 0.1}
    for target, weight in ((y, None), (y, weights()), (p, weights())):
        leaf = z.clone().requires_grad_()
        lossops.cross_entropy(leaf * 1, target, weight=weight, inplace=True, **options).backward()
        expected = value_and_gradients(
            lambda z, t=target, a=weight: lossops.cross_entropy(z, t, weight=a, **options), [z]
        )[1]
        torch.testing.assert_close(leaf.grad, expected, rtol=2e-3, atol=1e-6)
    none = z[:0].requires_grad_()
    lossops.cross_entropy(none * 1, y[:0], inplace=True, backend=backend).backward()
    assert none.grad.shape == (0, V)


def test_in_place_needs_no_memory_for_the_gradient(backend: str) -> None:
    z, y = problem(torch.float32)
    leaf = z.requires_grad_()
    logits = leaf * 1
    handed: list[int] = []
    logits.register_hook(lambda g: handed.append(g.data_ptr()))
    lossops.cross_entropy(logits, y, inplace=True, backend=backend).backward()
    assert handed == [logits.data_ptr()]
    torch.testing.assert_close(logits.detach(), leaf.grad)


def test_in_place_reports_argmax_of_the_logits_it_overwrites(backend: str) -> None:
    z, y = problem()
    found = lossops.cross_entropy(
        z.clone().requires_grad_() * 1, y, inplace=True, outputs=("argmax", "correct"),
        backend=backend,
    )  # fmt: skip
    assert torch.equal(found.argmax, z.argmax(1))
    assert torch.equal(found.correct, z.argmax(1) == y)


def test_in_place_with_a_scaled_upstream_gradient(backend: str) -> None:
    z, y = problem()
    expected = value_and_gradients(
        lambda z: F.cross_entropy(z, y, reduction="sum"), [z], upstream=-2.5
    )[1]
    leaf = z.requires_grad_()
    loss = lossops.cross_entropy(leaf * 1, y, reduction="sum", inplace=True, backend=backend)
    (loss * -2.5).backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_a_second_backward_of_in_place_is_refused(backend: str) -> None:
    z, y = problem()
    loss = lossops.cross_entropy(z.requires_grad_() * 1, y, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gave its gradient away in the first backward"):
        loss.backward()


def test_who_saved_the_logits_notices_that_they_are_gone(backend: str) -> None:
    z, y = problem()
    logits = z.requires_grad_() * 1
    elsewhere = logits.square().sum()
    loss = lossops.cross_entropy(logits, y, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + elsewhere).backward()
    logits = z * 1  # through a view too
    lossops.cross_entropy(logits.view(3, 3, V), y.view(3, 3), inplace=True, backend=backend)
    assert logits._version > 0


def test_in_place_without_gradients_leaves_the_logits_alone(backend: str) -> None:
    z, y = problem()
    before = z.clone()
    lossops.cross_entropy(z, y, inplace=True, backend=backend)
    with torch.no_grad():
        lossops.cross_entropy(z.requires_grad_() * 1, y, inplace=True, backend=backend)
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("leaf", {}, "would overwrite a leaf"),
        ("transposed", {}, "needs contiguous logits, got strides"),
        ("result", {"reduction": "none"}, "needs reduction 'mean' or 'sum'"),
        ("result", {"outputs": ("entropy",)}, "no differentiable outputs"),
        ("result", {"sample_weight": torch.ones(N, requires_grad=True)}, "not differentiate"),
    ],
    ids=["leaf", "strided", "none", "outputs", "weights"],
)
def test_in_place_refuses(layout: str, options: dict, message: str, backend: str) -> None:
    z, y = problem(torch.float32)
    leaf = z.requires_grad_()
    logits = {"leaf": leaf, "result": leaf * 1, "transposed": leaf.T.contiguous().T}[layout]
    with pytest.raises(ValueError, match=message):
        lossops.cross_entropy(logits, y, inplace=True, backend=backend, **options)
