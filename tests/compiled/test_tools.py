"""The tools of the report: that they see what they are there to see."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency")

import torch
import triton
import triton.language as tl

from lossops.gpu_layout import Logits
from lossops_bench.kernels.devices import occupancy
from lossops_bench.kernels.facts import facts_of
from lossops_bench.kernels.launches import Case, compiled, gradient_spec
from lossops_bench.kernels.listing import of_gcn, of_sass, sass
from lossops_bench.kernels.offline import pretending
from lossops_bench.kernels.report import Row, budget_of, regressions, table
from lossops_triton.launch import architecture, float32_precision
from lossops_triton.statistics import chunk_gradient


@pytest.mark.parametrize(
    ("device", "warps", "registers", "shared", "columns", "blocks", "limit"),
    [
        # From cuda_occupancy.h.
        ("sm_80", 4, 255, 49152, 0, 2, "registers"),
        ("sm_80", 16, 34, 512, 0, 3, "registers"),
        ("sm_90", 8, 128, 98304, 0, 2, "registers, shared memory"),
        ("sm_90", 8, 32, 0, 0, 8, "registers, warps"),
        ("sm_90", 1, 16, 0, 0, 32, "blocks"),
        ("sm_100", 8, 64, 16384, 256, 2, "tensor memory"),
        ("sm_120", 4, 56, 16, 0, 9, "registers"),
        ("sm_120", 8, 255, 139264, 0, 0, "shared memory 139264 > 101376"),
        # 512 registers a lane: 3 waves of 168 on each of four SIMDs.
        ("gfx942", 8, 161, 32768, 0, 1, "registers"),
        ("gfx942", 4, 64, 65536, 0, 1, "shared memory"),
        ("gfx950", 4, 64, 65536, 0, 2, "shared memory"),
    ],
)
def test_occupancy(device, warps, registers, shared, columns, blocks, limit):
    assert occupancy(device, warps, registers, shared, columns)[::2] == (blocks, limit)


@triton.jit
def dot_kernel(x_ptr, PRECISION: tl.constexpr):
    o = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + o)
    tl.store(x_ptr + o, tl.dot(x, x, input_precision=PRECISION))


@pytest.mark.parametrize(("device", "products"), [("sm_90", 0), ("sm_100", 3)])
def test_float32_products_keep_their_digits(device, products):
    """No products of tensor cores, or thrice as many as in TF32."""

    def count(precision: str) -> int:
        def launch() -> None:
            dot_kernel[(1,)](torch.empty(64, 64), PRECISION=precision)

        return sum(compiled(Case("dot", "dot_kernel", launch), device)[1].matrix.values())

    with pretending(device):
        precision = float32_precision()
    assert count(precision) == products * count("tf32")


@triton.jit
def many_values_kernel(x_ptr, N: tl.constexpr, ROUNDS: tl.constexpr):
    """Every value lives until the end, in another order."""
    o = tl.arange(0, N)
    kept = ()
    for k in tl.static_range(ROUNDS):
        kept += (tl.load(x_ptr + k * N + o),)
    tl.debug_barrier()
    for k in tl.static_range(ROUNDS):
        tl.store(x_ptr + k * N + o, kept[ROUNDS - 1 - k])


@pytest.mark.parametrize(("registers", "spills"), [(None, False), (32, True)])
def test_spills_are_counted(registers, spills):
    bound = {} if registers is None else {"maxnreg": registers}
    with pretending("sm_90") as launches:
        many_values_kernel[(1,)](torch.empty(1 << 16), N=512, ROUNDS=32, num_warps=4, **bound)
    facts = facts_of(launches[0].kernel, "sm_90")
    assert (facts.spilled > 0) == spills
    assert facts.registers >= 32 * 4 if registers is None else facts.registers <= registers


@triton.jit
def add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        total += tl.exp(tl.load(x_ptr + first + tl.arange(0, BLOCK)))
    tl.atomic_add(y_ptr, tl.sum(total, 0))


@pytest.mark.parametrize("device", ["sm_80", "sm_100", "gfx942"])
def test_atomics_loads_and_exponentials_are_counted(device):
    def launch() -> None:
        add_kernel[(1,)](torch.empty(4096), torch.zeros(1), 4096, BLOCK=1024, num_warps=4)

    _, facts = compiled(Case("add", "add_kernel", launch), device)
    assert facts.atomics == 1
    assert facts.wide_loads == facts.loads > 0
    assert facts.functions >= 4  # more where the loop is unrolled
    assert not facts.matrix


def test_the_device_is_pretended_only_within():
    with pretending("gfx950"):
        assert architecture() == "gfx950"
        with pretending("sm_120"):
            assert architecture() == "sm_120"
            assert torch.cuda.get_device_capability() == (12, 0)
    assert architecture() == "sm_80"  # what there is where there is none


def test_loops_of_sass_and_of_gcn():
    listing = of_sass(
        """
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""
    )
    assert listing.loops == [(1, 2), (0, 4)]
    assert listing.main_loop() == (0, 4)
    assert listing.inner_loop("HMMA") == (1, 2)
    assert listing.count("MUFU", listing.main_loop()) == 1
    listing = of_gcn(
        """
.LBB0_1:
	global_load_dwordx4 v[0:3], v4, s[0:1]
	v_exp_f32_e32 v0, v0
	s_cbranch_scc1 .LBB0_1
"""
    )
    assert listing.loops == [(0, 2)]


def test_rows_elsewhere_are_not_written_by_vectors():
    """Rows of dz that begin elsewhere within 16 bytes than those of the logits."""

    def wide_stores(out: torch.Tensor) -> int:
        def launch() -> None:
            chunk_gradient(Logits(r), gradient_spec(("target", "lse"), r.shape[0]), out)

        kernel = compiled(Case("gradient", "chunk_gradient_kernel", launch), "sm_90")[0].kernel
        return of_sass(sass(kernel.asm["cubin"])[0]).count(r"STG\..*128")

    r = torch.empty(64, 32769)[:, 1:]
    assert wide_stores(r) > 0
    assert wide_stores(torch.empty_like(r)) == 0


def test_a_worse_kernel_is_a_regression():
    with pretending("sm_90") as launches:
        many_values_kernel[(1,)](torch.empty(1 << 16), N=512, ROUNDS=8, num_warps=4)
    row = Row("values", facts_of(launches[0].kernel, "sm_90"), 0.0)
    budget = budget_of(row)
    assert not regressions(row, budget)
    assert regressions(row, {**budget, "blocks": budget["blocks"] + 1})
    assert regressions(row, {**budget, "spilled": -1})
    assert regressions(row, {**budget, "matrix": {"HGMMA": 1}})
    assert "| values | 0 | 0 |" in table([row])
