"""Primitives of losses over pairs: the reference against autograd, C++ against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import FLOOR, assert_no_worse, make_inputs
from torch import Tensor

from lossops import backends, reference_pairs
from lossops.binary import Binary, negative, negative_slope, positive, positive_slope
from lossops.reference import accumulate_dtype

# Rows and classes: one of each; fewer than a lane; several 256-row blocks and ragged tiles.
SIZES = ((1, 1, 1), (3, 5, 4), (300, 97, 8))
KINDS = {
    "sigmoid": Binary("sigmoid"),
    "hinge": Binary("hinge", margin=0.3),
    "asymmetric": Binary("asymmetric", 0.0, 4.0, 1.0, 0.05, True),
    "attached": Binary("asymmetric", 0.0, 2.5, 1.5, 0.1, False),
    "gumbel": Binary("gumbel", margin=10.0),
    "unclipped": Binary("asymmetric", 0.0, 1.0, 0.0, 0.0, False),
}
ids = lambda values: "N{}-V{}-D{}".format(*values)  # noqa: E731


def padded(n: int, v: int, k: int = 3, seed: int = 1) -> Tensor:
    """Target ids (N, K), each once a row, some absent."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(n, v, generator=draw).argsort(1)[:, :k]
    some = torch.rand(order.shape, generator=draw) < 0.6
    return torch.where(some, order, -1)


def plain_binary(x: Tensor, w: Tensor, b: Tensor, scale: Tensor, target: Tensor, loss: Binary,
                 weight: Tensor) -> Tensor:  # fmt: skip
    """Losses (N,) from the dense matrix of labels."""
    z = scale * (x @ w.T) + b
    labels = torch.zeros(x.shape[0], w.shape[0] + 1, dtype=torch.bool)
    labels.scatter_(1, torch.where(target < 0, w.shape[0], target), True)
    labels = labels[:, :-1]
    negatives = negative(loss.kind, loss.negative_parameters, z)
    return (torch.where(labels, positive(loss, z), negatives) * weight).sum(1)


def binary_of(
    primitives: object, x: Tensor, w: Tensor, b: Tensor, scale: Tensor, target: Tensor,
    loss: Binary, weight: Tensor | None, factor: Tensor, **tile: int,
) -> list[Tensor]:  # fmt: skip
    """Sums over the negatives, dx, dw and db of one backend, positives included."""
    acc = accumulate_dtype(x.dtype)
    z = reference_pairs.target_logits(x, w, b, scale, target)
    counted = reference_pairs.positive_factor(target, weight, None, acc)
    at = positive_slope(loss, z) * counted * factor.unsqueeze(1)
    dx = torch.empty(x.shape, dtype=acc)
    dw, db = torch.empty(w.shape, dtype=acc), torch.empty(w.shape[0], dtype=acc)
    sums = primitives.linear_binary(  # type: ignore[attr-defined]
        x, w, b, scale, target, weight, loss.kind, loss.negative_parameters, factor, at, dx, dw, db,
        **tile,
    )  # fmt: skip
    return [sums + (positive(loss, z) * counted).sum(1), dx * scale, dw, db]


@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas_and_their_slopes(kind: str) -> None:
    loss, parameters = KINDS[kind], KINDS[kind].negative_parameters
    z = torch.linspace(-30, 30, 601, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(negative(loss.kind, parameters, z).sum(), z)
    torch.testing.assert_close(negative_slope(loss.kind, parameters, z), slope)
    (slope,) = torch.autograd.grad(positive(loss, z).sum(), z)
    torch.testing.assert_close(positive_slope(loss, z), slope)


def test_a_negative_at_minus_infinity_adds_nothing() -> None:
    for loss in KINDS.values():
        z = torch.tensor([-torch.inf], dtype=torch.float64)
        assert negative(loss.kind, loss.negative_parameters, z).item() == 0
        assert negative_slope(loss.kind, loss.negative_parameters, z).item() == 0


@pytest.mark.parametrize("size", SIZES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_binary_against_autograd(kind: str, size: tuple[int, int, int]) -> None:
    n, v, d = size
    x, w, b, _ = make_inputs(n, v, d, spread=2.0)
    target, loss = padded(n, v), KINDS[kind]
    weight, factor = torch.rand(v, dtype=x.dtype) + 0.5, torch.rand(n, dtype=x.dtype)
    scale = torch.tensor(1.3, dtype=x.dtype)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    losses = plain_binary(*leaves, scale, target, loss, weight)
    gradients = torch.autograd.grad(losses, leaves, factor)
    found = binary_of(reference_pairs, x, w, b, scale, target, loss, weight, factor)
    for ours, plain in zip(found, (losses.detach(), *gradients), strict=True):
        torch.testing.assert_close(ours, plain)
    every = reference_pairs.binary_losses(x, w, b, scale, target, weight, None, None, loss)
    torch.testing.assert_close(every, losses.detach())


@pytest.fixture(scope="module")
def cpp() -> object:
    """The compiled module; that it is there wherever it can be built is a test of its own."""
    sentence = backends.BACKENDS["cpp"].objection(torch.device("cpu"), torch.float32)
    if sentence is not None:
        pytest.skip(sentence)
    return backends.BACKENDS["cpp"].primitives()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True], ids=("", "weighted"))
def test_cpp_binary_against_float64(
    cpp: object, kind: str, size: tuple[int, int, int], dtype: torch.dtype, weighted: bool
) -> None:
    n, v, d = size
    x, w, b, _ = make_inputs(n, v, d, dtype, spread=3.0)
    target, loss = padded(n, v), KINDS[kind]
    acc = accumulate_dtype(dtype)
    weight = torch.rand(v, dtype=acc) + 0.5 if weighted else None
    factor, scale = torch.rand(n, dtype=acc) + 0.5, torch.tensor(1.3, dtype=acc)
    xt, wt = x.T.contiguous().T, torch.stack([w, w], 2)[..., 0]  # strides of their own
    ours = binary_of(cpp, xt, wt, b, scale, target, loss, weight, factor, tile=32)
    plain = binary_of(reference_pairs, x, w, b, scale, target, loss, weight, factor)
    wide = [t.double() for t in (x, w, b, scale)]
    heavy = None if weight is None else weight.double()
    oracle = binary_of(reference_pairs, *wide, target, loss, heavy, factor.double())
    for name, found, same, true in zip(
        ("loss", "dx", "dw", "db"), ours, plain, oracle, strict=True
    ):
        floor = 4 * FLOOR[acc] * max(1.0, float(true.abs().max()))
        if dtype == torch.bfloat16 and backends.load_cpu_module().half_products(d):  # type: ignore[union-attr]
            floor = FLOOR[dtype] * float(true.abs().max())  # dz is rounded for its products
        assert_no_worse(name, found, same, true, floor=floor)


def test_far_logits_keep_their_digits(cpp: object) -> None:
    # 1 + e^-30 is 1 in float32: a product of such factors would lose the whole loss.
    x = torch.ones(2, 1)
    w = torch.full((1000, 1), -30.0)
    sums = cpp.linear_binary(  # type: ignore[attr-defined]
        x, w, None, None, None, None, "sigmoid", [], None, None, None, None, None
    )
    true = 1000 * torch.nn.functional.softplus(torch.tensor(-30.0, dtype=torch.float64))
    assert abs(sums[0].double() / true - 1) < 1e-5


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_logits_reach_the_loss(cpp: object, kind: str, value: float) -> None:
    x, w = torch.ones(2, 1), torch.zeros(40, 1)
    b = torch.zeros(40)
    b[7] = value
    loss = KINDS[kind]
    call = (x, w, b, None, None, None, loss.kind, loss.negative_parameters, None, None)
    ours = cpp.linear_binary(*call, None, None, None)  # type: ignore[attr-defined]
    plain = reference_pairs.linear_binary(*call, None, None, None)
    torch.testing.assert_close(ours, plain, equal_nan=True)
    assert not ours.isfinite().any() or (kind != "sigmoid" and value == torch.inf)


def plain_sums(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> list[Tensor]:
    """Absolute log-sums of rows and columns and the target logits, from all logits."""
    z = scale * (x @ w.T)
    mask = torch.zeros(x.shape[0], w.shape[0] + 1, dtype=torch.bool)
    mask = mask.scatter_(1, torch.where(target < 0, w.shape[0], target), True)[:, :-1]
    negatives = z.masked_fill(mask, -torch.inf)
    at = z.gather(1, target.clamp_min(0)).masked_fill(target < 0, 0.0)
    return [negatives.logsumexp(1), negatives.logsumexp(0), at]


def absolute(found: Sequence[Tensor], target: Tensor) -> list[Tensor]:
    shift, lse, column_shift, column_lse, at = found
    at = torch.where(target < 0, 0.0, at + shift.unsqueeze(1))
    return [shift + lse, column_shift + column_lse, at]


def pair_gradient_of(primitives: object, x: Tensor, w: Tensor, scale: Tensor, target: Tensor,
                     coefficients: list[Tensor], **tile: int) -> list[Tensor]:  # fmt: skip
    acc = accumulate_dtype(x.dtype)
    dx, dw = torch.empty(x.shape, dtype=acc), torch.empty(w.shape, dtype=acc)
    found = primitives.linear_pair_statistics(x, w, scale, target, **tile)  # type: ignore[attr-defined]
    primitives.linear_pair_gradient(  # type: ignore[attr-defined]
        x, w, scale, target, found, coefficients, dx, dw, **tile
    )
    return [*absolute(found, target), dx * scale, dw]


PAIR_SIZES = ((2, 2, 1), (5, 3, 4), (300, 97, 8), (70, 530, 5))


@pytest.mark.parametrize("size", PAIR_SIZES, ids=ids)
def test_reference_sums_of_rows_and_columns(size: tuple[int, int, int]) -> None:
    n, v, d = size
    x, w, _, _ = make_inputs(n, v, d, spread=2.0)
    target = padded(n, v, k=1)
    scale = torch.tensor(1.7, dtype=x.dtype)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    plain = plain_sums(*leaves, scale, target)
    coefficients = [torch.randn(t.shape, dtype=x.dtype) for t in plain]
    gradients = torch.autograd.grad(plain, leaves, coefficients)
    found = pair_gradient_of(reference_pairs, x, w, scale, target, coefficients)
    for ours, true in zip(found, (*plain, *gradients), strict=True):
        torch.testing.assert_close(ours, true.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", PAIR_SIZES, ids=ids)
def test_cpp_sums_of_rows_and_columns(
    cpp: object, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, v, d = size
    x, w, _, _ = make_inputs(n, v, d, dtype, spread=3.0)
    target = padded(n, v, k=2)
    acc = accumulate_dtype(dtype)
    scale = torch.tensor(1.7, dtype=acc)
    coefficients = [torch.randn(shape, dtype=acc) for shape in ((n,), (v,), target.shape)]
    ours = pair_gradient_of(cpp, x, w, scale, target, coefficients, tile=32)
    plain = pair_gradient_of(reference_pairs, x, w, scale, target, coefficients)
    oracle = pair_gradient_of(
        reference_pairs, x.double(), w.double(), scale.double(), target,
        [c.double() for c in coefficients],
    )  # fmt: skip
    names = ("lse", "column lse", "target", "dx", "dw")
    for name, found, same, true in zip(names, ours, plain, oracle, strict=True):
        floor = 8 * FLOOR[acc] * max(1.0, float(true.abs().max()))
        if dtype == torch.bfloat16 and backends.load_cpu_module().half_products(d):  # type: ignore[union-attr]
            floor = FLOOR[dtype] * float(true.abs().max())
        assert_no_worse(name, found, same, true, floor=floor)


def test_columns_whose_largest_comes_last_or_never(cpp: object) -> None:
    # Column 0 rises by 200 with the rows, column 1 has no negative at all, column 2 is -inf.
    x = torch.linspace(-100, 100, 4100).unsqueeze(1)
    w = torch.tensor([[1.0], [0.5], [0.0]])
    target = torch.full((4100, 1), 1)
    found = cpp.linear_pair_statistics(x, w, None, target)  # type: ignore[attr-defined]
    plain = reference_pairs.linear_pair_statistics(x.double(), w.double(), None, target)
    torch.testing.assert_close(
        [t.double() for t in found[2:4]], list(plain[2:4]), rtol=1e-6, atol=1e-6
    )
    assert found[3][1] == -torch.inf
