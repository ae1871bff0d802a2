"""Seeded faults: each is found, with its line, and the same kernel without it is clean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import memory
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, LOADS: tl.constexpr, STORES: tl.constexpr, B: tl.constexpr):
    """``LOADS`` and ``STORES``: elements past n that are loaded and stored."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + o, tl.load(x_ptr + o, mask=o < n + LOADS), mask=o < n + STORES)


@triton.jit
def rows_kernel(x_ptr, stride, out_ptr, WIDTH: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(x_ptr + tl.program_id(0) * stride + o, mask=o < WIDTH, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x, 0))


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, EXTRA: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    o_n = tl.program_id(1) * BM + tl.arange(0, BM)[None, :]
    c = tl.zeros([BM, BM], tl.float32)
    for first in range(0, k, BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < k + EXTRA
        a = tl.load(a_ptr + o_m * k + o_k[None, :], mask=(o_m < m) & m_k[None, :], other=0.0)
        b = tl.load(b_ptr + o_n * k + o_k[:, None], mask=(o_n < n) & m_k[:, None], other=0.0)
        c = tl.dot(a, b, c)
    tl.store(c_ptr + o_m * n + o_n, c, mask=(o_m < m) & (o_n < n))


@triton.jit
def gather_kernel(x_ptr, ids_ptr, out_ptr, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out_ptr + o, tl.load(x_ptr + tl.load(ids_ptr + o)))


@triton.jit
def total_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr, ALSO_READS: tl.constexpr, B: tl.constexpr):
    total = tl.sum(tl.load(x_ptr + tl.program_id(0) * B + tl.arange(0, B)), 0)
    if ATOMIC:
        tl.atomic_add(out_ptr, total)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + total)
    if ALSO_READS:
        tl.store(out_ptr + 1 + tl.program_id(0), tl.load(out_ptr))


@triton.jit
def tuple_kernel(x_ptr, outs, FIRST: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(x_ptr + tl.program_id(0) * B + o)
    tl.store(outs[1] + tl.program_id(0) * (B - FIRST) + o, x)


@triton.jit
def reversed_kernel(out_ptr, back_ptr, BARRIER: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out_ptr + o, o * 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(back_ptr + o, tl.load(out_ptr + (B - 1 - o)))


@triton.jit
def same_lane_kernel(out_ptr, back_ptr, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out_ptr + o, o * 1.0)
    tl.store(back_ptr + o, tl.load(out_ptr + o))


@triton.jit
def pack_kernel(x_ptr, half_ptr, BARRIER: tl.constexpr, B: tl.constexpr):
    """Half precision into the first half of the float32 it comes from."""
    o = tl.arange(0, B)
    x = tl.load(x_ptr + o)
    if BARRIER:
        tl.debug_barrier()
    tl.store(half_ptr + o, x.to(half_ptr.dtype.element_ty))


@triton.jit
def pairs_kernel(out_ptr, PLACES: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out_ptr + o // PLACES, o * 1.0)


@triton.jit
def tiles_kernel(x_ptr, out_ptr, n, OVERLAP: tl.constexpr, B: tl.constexpr):
    o = tl.program_id(0) * (B - OVERLAP) + tl.arange(0, B)
    tl.store(out_ptr + o, tl.load(x_ptr + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def offset_kernel(x_ptr, row, stride, out_ptr, WIDE: tl.constexpr, B: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    o = tl.arange(0, B)
    tl.store(out_ptr + o, tl.load(x_ptr + (row * stride) % 4 + o))


@triton.jit
def described_kernel(x_ptr, out_ptr, rows, D: tl.constexpr, B: tl.constexpr):
    """``rows``: how many the descriptor believes there are."""
    x = tl.make_tensor_descriptor(x_ptr, [rows, D], [D, 1], [B, D])
    out = tl.make_tensor_descriptor(out_ptr, [40, D], [D, 1], [B, D])
    out.store([tl.program_id(0) * B, 0], 2.0 * x.load([tl.program_id(0) * B, 0]))


@triton.jit
def descriptor_kernel(x, out, OVERLAP: tl.constexpr, B: tl.constexpr):
    out.store([tl.program_id(0) * (B - OVERLAP), 0], x.load([tl.program_id(0) * B, 0]))


@triton.jit
def other_kernel(x_ptr, distance, out_ptr, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out_ptr + o, tl.load(x_ptr + distance + o))


@triton.jit
def half_kernel(x_ptr, out_ptr, CONVERTS: tl.constexpr, B: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, B))
    if CONVERTS:
        x = x.to(tl.float32)
    tl.store(out_ptr + tl.arange(0, B), x + x)


def copied(loads: int = 0, stores: int = 0, n: int = 100) -> None:
    x = torch.randn(2 * n)[:n]  # what lies past the end exists, and is not the argument's
    out = torch.zeros(2 * n)[:n]
    copy_kernel[(4,)](x, out, n, loads, stores, 32)
    assert torch.equal(out, x)


def summed(width: int) -> None:
    x, out = torch.randn(3, 16)[:, :12], torch.zeros(3)
    rows_kernel[(3,)](x, 16, out, width, 16)
    torch.testing.assert_close(out, x.sum(1))


def multiplied(extra: int) -> None:
    a, b, c = torch.randn(50, 40), torch.randn(60, 40), torch.zeros(50, 60)
    product_kernel[(2, 2)](a, b, c, 50, 60, 40, extra, 32, 32)
    torch.testing.assert_close(c, a @ b.T, atol=0.02, rtol=0.02)  # TF32


def gathered(last: int) -> None:
    ids = torch.arange(16)
    ids[3] = last
    gather_kernel[(1,)](torch.randn(100), ids, torch.zeros(16), 16)


def totalled(atomic: bool, also_reads: bool) -> None:
    x, out = torch.randn(4, 32), torch.zeros(5)
    total_kernel[(4,)](x, out, atomic, also_reads, 32)
    torch.testing.assert_close(out[0], x.sum())


def in_a_tuple(overlap: int, size: int) -> None:
    tuple_kernel[(2,)](torch.randn(32), (torch.zeros(99), torch.zeros(size)), overlap, 16)


def in_reverse(barrier: bool) -> None:
    reversed_kernel[(2,)](torch.zeros(1, 32)[0], torch.zeros(32), barrier, 32)


def packed(barrier: bool) -> None:
    x = torch.randn(32)
    half = x.view(torch.bfloat16)[:32]
    expected = x.bfloat16()
    pack_kernel[(1,)](x, half, barrier, 32)
    assert torch.equal(half, expected)


def described(rows: int) -> None:
    described_kernel[(3,)](torch.randn(80, 16)[:40], torch.zeros(40, 16), rows, 16, 16)


def descriptor(overlap: int, rows: int) -> None:
    x, out = torch.randn(64, 16)[:40], torch.zeros(40, 16)
    believed = TensorDescriptor(x, [rows, 16], [16, 1], [16, 16])
    descriptor_kernel[(3,)](
        believed, TensorDescriptor.from_tensor(out, [16, 16]), overlap, 16
    )  # fmt: skip


def into_another_argument() -> None:
    both = torch.randn(32)
    other_kernel[(1,)](both[:16], 16, both[16:], 16)


CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...], str | None]] = {
    "masked copy": (copied, (), None),
    "load past the end of a view": (copied, (1, 0), r"reads element 100 of 'x_ptr' \(100,\)"),
    "store past the end of a view": (copied, (0, 1), "writes element 100 of 'out_ptr'"),
    "rows of a view": (summed, (12,), None),
    "load between the rows of a view": (summed, (13,), "reads element 12 of 'x_ptr'"),
    "ragged product": (multiplied, (0,), None),
    "mask of features too wide": (multiplied, (8,), "out of bounds.* reads element"),
    "gather": (gathered, (99,), None),
    "gather one past the end": (gathered, (100,), "reads element 100 of 'x_ptr'"),
    "gather before the start": (gathered, (-1,), "reads element -1 of 'x_ptr'"),
    "one argument from another": (into_another_argument, (), "reads element 16 of 'x_ptr'"),
    "sum over programs": (totalled, (False, False), "race.* element 0 of 'out_ptr'"),
    "atomic sum": (totalled, (True, False), None),
    "atomic sum that others read": (totalled, (True, True), "race.* atomically updates"),
    "tuple": (in_a_tuple, (0, 32), None),
    "out of bounds in a tuple": (in_a_tuple, (0, 31), r"element 31 of 'outs\[1\]'"),
    "race in a tuple": (in_a_tuple, (1, 32), r"race.* element 15 of 'outs\[1\]'"),
    "other lanes after a barrier": (in_reverse, (True,), "race"),
    "other lanes without a barrier": (in_reverse, (False,), "hazard.* no tl.debug_barrier"),
    "packing after a barrier": (packed, (True,), None),
    "packing without a barrier": (packed, (False,), "hazard.* writes .* other lanes"),
    "descriptors": (described, (40,), None),
    "descriptor of too many rows": (described, (41,), "reads element 640 of 'x_ptr'"),
    "descriptor arguments": (descriptor, (0, 40), None),
    "descriptor argument of too many rows": (descriptor, (0, 41), "reads element 640 of 'x'"),
    "race of descriptors": (descriptor, (1, 40), "race.* of 'out'"),
}


@pytest.mark.parametrize("name", CASES)
def test_faults_are_found_and_nothing_else(name: str) -> None:
    run, arguments, message = CASES[name]
    if message is None:
        run(*arguments)
    else:
        with pytest.raises(memory.Fault, match=message):
            run(*arguments)


def test_lanes_of_one_program() -> None:
    """A barrier is enough within a program; the same lane needs none."""
    out, back = torch.zeros(32), torch.zeros(32)
    reversed_kernel[(1,)](out, back, True, 32)
    assert torch.equal(back, out.flip(0))
    same_lane_kernel[(1,)](out, back, 32)
    assert torch.equal(back, out)


def test_an_address_written_twice() -> None:
    pairs_kernel[(1,)](torch.zeros(32), 1, 32)
    with pytest.raises(memory.Fault, match=r"writes an address twice, at test_faults\.py"):
        pairs_kernel[(1,)](torch.zeros(32), 2, 32)


def test_tiles_that_overlap_with_the_same_values() -> None:
    x, out = torch.randn(96), torch.zeros(96)
    tiles_kernel[(3,)](x, out, 96, 0, 32)
    assert torch.equal(out, x)
    with pytest.raises(memory.Fault, match=r"race.* writes element 31 of 'out_ptr'"):
        tiles_kernel[(3,)](x, out, 94, 1, 32)


def test_offsets_beyond_int32() -> None:
    x, out = torch.randn(40), torch.zeros(32)
    offset_kernel[(1,)](x, 69_999, 32_768, out, True, 32)
    assert torch.equal(out, x[:32])
    with pytest.raises(AssertionError, match="int32 overflow"):
        offset_kernel[(1,)](x, 69_999, 32_768, out, False, 32)


def test_arithmetic_in_bfloat16_is_refused() -> None:
    x, out = torch.randn(32).bfloat16(), torch.zeros(32)
    half_kernel[(1,)](x, out, True, 32)
    assert torch.equal(out, 2 * x.float())
    with pytest.raises(TypeError, match="add of bfloat16: convert to float32 first"):
        half_kernel[(1,)](x, out, False, 32)


def test_empty_arguments_hold_nothing() -> None:
    with pytest.raises(memory.Fault, match=r"reads element 0 of 'x_ptr' \(0,\)"):
        copy_kernel[(1,)](torch.zeros(0), torch.zeros(1), 0, 1, 1, 32)


def test_shuffled_programs_and_bytes() -> None:
    x, out = torch.randn(100), torch.zeros(100)
    with memory.shuffled(0), memory.launches() as seen:
        copy_kernel[(4,)](x, out, 100, 0, 0, 32)
    assert torch.equal(out, x)
    (launch,) = seen
    assert launch.kernel == "copy_kernel"
    assert sorted(launch.programs) == [(i, 0, 0) for i in range(4)] != launch.programs
    assert (launch.bytes_read, launch.bytes_written) == (400, 400)


def extent(t: Tensor) -> memory.Extent:
    return memory.Extent(t, "t")


@pytest.mark.parametrize(
    "view",
    [
        torch.zeros(6, 8),
        torch.zeros(6, 8)[1:5:2, 2:7],
        torch.zeros(6, 8).T[2:],
        torch.zeros(2, 3, 8)[:, 1:, ::3],
        torch.zeros(3, 1).expand(3, 5),
        torch.zeros(()),
    ],
    ids=lambda t: f"{tuple(t.shape)}-{t.stride()}",
)
def test_extents_are_the_elements(view: Tensor) -> None:
    memory_of = view.untyped_storage()
    every = torch.arange(memory_of.data_ptr() - 8, memory_of.data_ptr() + memory_of.nbytes() + 8)
    offsets = torch.zeros(view.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        shape = [1] * view.ndim
        shape[dim] = size
        offsets = offsets + 4 * stride * torch.arange(size).view(shape)
    expected = torch.isin(every, view.data_ptr() + offsets)
    assert torch.equal(torch.from_numpy(extent(view).holds(every.numpy())), expected)
