"""The repaired interpreter does what a GPU does, where the stock one does not."""

from __future__ import annotations

import memory  # noqa: F401  (repairs the interpreter)
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def cast_kernel(x_ptr, out_ptr, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out_ptr + o, tl.load(x_ptr + o).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, K: tl.constexpr, PRECISION: tl.constexpr):
    o, o_k = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(a_ptr + o[:, None] * K + o_k[None, :])
    b = tl.load(b_ptr + o[:, None] * K + o_k[None, :])
    product = tl.dot(a, b.T, input_precision=PRECISION)
    tl.store(out_ptr + o[:, None] * 16 + o[None, :], product)


@triton.jit
def extremes_kernel(x_ptr, y_ptr, out_ptr, B: tl.constexpr):
    x, y = tl.load(x_ptr + tl.arange(0, B)), tl.load(y_ptr + tl.arange(0, B))
    tl.store(out_ptr + tl.arange(0, B), tl.maximum(x, y))
    tl.store(out_ptr + B, tl.max(x, 0))
    tl.store(out_ptr + B + 1, tl.min(tl.minimum(x, y), 0))


@triton.jit
def scalar_kernel(value, out_ptr):
    tl.store(out_ptr, value.to(tl.float32) / 3.0)


@triton.jit
def assert_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "not positive")


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, out, x.shape[0])
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -3.4e38, 1e-40])
    ties = (1 + torch.arange(8) / 2**8) * 2.0 ** torch.arange(8)
    x = torch.cat([torch.randn(240) * torch.logspace(-20, 20, 240), special, ties])
    assert torch.equal(cast(x, dtype).isnan(), x.isnan())
    torch.testing.assert_close(cast(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
    back = cast(x.to(dtype), torch.float32)
    torch.testing.assert_close(back, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def dot(a: Tensor, b: Tensor, precision: str = "tf32") -> Tensor:
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, a.shape[1], precision)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_exact_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 32).to(dtype), torch.randn(16, 32).to(dtype)
    torch.testing.assert_close(dot(a, b), a.float() @ b.float().T)


def test_products_of_float32_are_as_precise_as_they_say() -> None:
    a, b = torch.randn(16, 32), torch.randn(16, 32)
    exact = a.double() @ b.double().T
    size = a.double().abs() @ b.double().abs().T

    def error(precision: str) -> float:
        return float(((dot(a, b, precision) - exact) / size).abs().max())

    assert error("ieee") < 2.0**-22
    assert error("tf32x3") < 2.0**-20
    assert 2.0**-15 < error("tf32") < 2.0**-10


def test_products_have_at_least_16_terms() -> None:
    with pytest.raises(AssertionError, match="K >= 16"):
        dot(torch.randn(16, 8), torch.randn(16, 8))


def test_extremes_drop_nan() -> None:
    x = torch.tensor([1.0, torch.nan, -torch.inf, 4.0])
    y = torch.tensor([torch.nan, 2.0, 3.0, -1.0])
    out = torch.empty(6)
    extremes_kernel[(1,)](x, y, out, 4)
    assert out.tolist() == [1.0, 2.0, 3.0, 4.0, 4.0, -torch.inf]


def test_float_arguments_are_float32() -> None:
    out = torch.empty(1)
    scalar_kernel[(1,)](0.1, out)
    assert out.item() == torch.tensor(0.1).div(3.0).item()


def test_device_assert_fires() -> None:
    assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(AssertionError, match="not positive"):
        assert_kernel[(1,)](torch.zeros(1))
