"""What a compiled kernel is made of, as far as its binary tells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from triton.compiler import CompiledKernel

from lossops_bench.kernels.devices import occupancy
from lossops_bench.kernels.listing import Listing, Loop, of_gcn, of_sass, sass


@dataclass(frozen=True)
class Facts:
    """A kernel on an architecture.

    Attributes:
        kernel, architecture: which.
        warps: of a program.
        registers: of a thread; on AMD vector and accumulation registers of a lane.
        spilled: bytes that a thread stores to and loads from its stack, counted in the code.
        scalar_spills: scalar registers that AMD keeps in vector registers.
        shared: bytes of shared memory of a program.
        tensor_columns: of tensor memory (sm_100).
        blocks, occupancy, limit: programs a multiprocessor, share of its warps, what stops more.
        matrix: matrix instructions by kind.
        main: instructions of the longest loop, over tiles or blocks of a row.
        inner: instructions of the innermost loop that multiplies, and how many of these multiply.
        functions: exponentials, logarithms and reciprocals (MUFU) of a thread in the main loop, or
            anywhere where most of them are elsewhere.
        loads, wide_loads: from global memory in the main loop, and those of 16 bytes or by copy
            engine.
        wide_stores: to global memory in the main loop, of 8 bytes or more.
        atomics: on global memory, anywhere.
        fused_doubles: products and sums of float64 in one instruction.
        instructions: of the kernel.
    """

    kernel: str
    architecture: str
    warps: int
    registers: int
    spilled: int
    scalar_spills: int
    shared: int
    tensor_columns: int
    blocks: int
    occupancy: float
    limit: str
    matrix: dict[str, int]
    main: int
    inner: tuple[int, int] | None
    functions: int
    loads: int
    wide_loads: int
    wide_stores: int
    atomics: int
    fused_doubles: int
    instructions: int


NVIDIA = {
    "matrix": r"(UTC)?[HIQOD]G?MMA\b",
    "functions": r"MUFU",
    "loads": r"(LDG|LDGSTS|UTMALDG)\b",
    "wide": r"(LDG|LDGSTS)\..*128|UTMALDG",
    "wide_stores": r"STG\..*(64|128)",
    "atomics": r"(ATOMG?|REDG?)\b",
}
AMD = {
    "matrix": r"v_s?mfma",
    "functions": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f",
    "loads": r"(global|buffer)_load",
    "wide": r"(global|buffer)_load_dwordx4",
    "wide_stores": r"(global|buffer)_store_dwordx[24]",
    "atomics": r"(global|buffer|flat)_atomic",
}


def facts_of(kernel: CompiledKernel, architecture: str) -> Facts:
    """Of what Triton compiled for an architecture."""
    if architecture.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        listing, kinds = of_gcn(text), AMD
        registers = _number(r"\.vgpr_count:\s*", text)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s*", text)
        scalar_spills = _number(r"\.sgpr_spill_count:\s*", text)
    else:
        text, usage = sass(kernel.asm["cubin"])
        listing, kinds = of_sass(text), NVIDIA
        registers, spilled, scalar_spills = _number("REG:", usage), stack_bytes(listing), 0
    about = kernel.metadata
    return of_listing(
        about.name, architecture, listing, kinds, about.num_warps, registers, spilled,
        about.shared, scalar_spills, getattr(about, "tmem_size", 0) or 0,
    )  # fmt: skip


def of_listing(
    kernel: str,
    architecture: str,
    listing: Listing,
    kinds: Mapping[str, str],
    warps: int,
    registers: int,
    spilled: int,
    shared: int,
    scalar_spills: int = 0,
    tensor_columns: int = 0,
) -> Facts:
    """Of a disassembly and what the compiler says of it."""
    fit = occupancy(architecture, warps, registers, shared, tensor_columns)
    main, inner = listing.main_loop(), listing.inner_loop(kinds["matrix"])
    return Facts(
        kernel=kernel,
        architecture=architecture,
        warps=warps,
        registers=registers,
        spilled=spilled,
        scalar_spills=scalar_spills,
        shared=shared,
        tensor_columns=tensor_columns,
        blocks=fit.blocks,
        occupancy=fit.share,
        limit=fit.limit,
        matrix=dict(Counter(listing.opcodes(kinds["matrix"]))),
        main=0 if main is None else main.last - main.first + 1,
        inner=inner and (inner.last - inner.first + 1, listing.count(kinds["matrix"], inner)),
        functions=_most(listing, kinds["functions"], main),
        loads=listing.count(kinds["loads"], main),
        wide_loads=listing.count(kinds["wide"], main),
        wide_stores=listing.count(kinds["wide_stores"], main),
        atomics=listing.count(kinds["atomics"]),
        fused_doubles=listing.count(r"(DFMA\b|v_fma_f64)"),
        instructions=len(listing.instructions),
    )


def _most(listing: Listing, pattern: str, loop: Loop | None) -> int:
    """Instructions of a loop that has most of them, or of the kernel."""
    within, everywhere = listing.count(pattern, loop), listing.count(pattern)
    return within if 2 * within >= everywhere else everywhere


def stack_bytes(listing: Listing) -> int:
    """Bytes that SASS stores to and loads from a thread's stack."""
    accesses = listing.opcodes(r"(LDL|STL)\b")
    return sum(16 if ".128" in one else 8 if ".64" in one else 4 for one in accesses)


def _number(before: str, text: str) -> int:
    found = re.search(before + r"(\d+)", text)
    if found is None:
        raise ValueError(f"no {before} in what the compiler gave")
    return int(found[1])
