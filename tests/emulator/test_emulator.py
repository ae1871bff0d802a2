"""The emulator itself: kernels that are right pass, and each seeded fault is found."""

from __future__ import annotations

import re
import subprocess

import builder
import pytest
import torch
from fixtures import built, emulator, loaded, run

RIGHT = ["row_lse", "reverse", "talk", "pass_on", "side_by_side", "first_of_rows", "launches"]
DIVERGES = "waits for ever in {}, which {} threads reach"
UNWRITTEN = "reads shared memory that no thread of its block wrote"
UNORDERED = r"race: {} what thread .* of block .* {} at faults.cpp:\d+, and nothing orders the two"
OVERFLOW = "the product of an index overflows"

# What each variant says; a fault that one cannot see is left out.
FAULTS = {
    "no barrier": {"races": UNWRITTEN},
    "no second barrier": {"races": UNORDERED.format("writes", "read")},
    "no warp barrier": {"races": UNWRITTEN, "addresses": "reversed is -?nan"},
    "divergent barrier": {"addresses": DIVERGES.format("__syncthreads", "64 of 96")},
    "early exit": {
        "races": "__shfl_xor_sync takes the value of lane 16",
        "addresses": "__shfl_xor_sync takes the value of lane 16",
    },
    "shared overrun": {"addresses": "index 3 out of bounds"},
    "global overrun": {"addresses": "heap-buffer-overflow"},
    "uninitialised shared memory": {"races": UNWRITTEN, "addresses": "lse of row 0 is -?nan"},
    "two threads, one address": {"races": UNORDERED.format("writes", "wrote")},
    "two blocks, one address": {"races": UNORDERED.format("writes", "wrote")},
    "shuffle from outside the mask": {
        "races": "__shfl_sync takes the value of lane 9",
        "addresses": "__shfl_sync takes the value of lane 9",
    },
    "shuffle by a lane not in its mask": {"races": "which is not in its mask"},
    "shuffle that lanes miss": {"races": DIVERGES.format("__shfl_sync", "16 of 48")},
    "order by a shuffle": {"races": UNORDERED.format("reads", "wrote")},
    "overlapping vectors": {"races": UNORDERED.format("writes", "wrote")},
    "misaligned vectors": {"races": "at a misaligned address", "addresses": "misaligned address"},
    "vectors of shared floats": {"addresses": "misaligned address"},
    "signed index overflow": {"addresses": "signed integer overflow"},
    "unsigned index overflow": {"races": OVERFLOW, "addresses": OVERFLOW},
    "too much shared memory": {"races": "56000 bytes, more than 49152"},
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", builder.VARIANTS)
@pytest.mark.parametrize("check", RIGHT)
def test_right_kernels_pass(run, check, variant, seed):
    done = run("faults", variant, seed, check)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("fault", "variant"), [(fault, variant) for fault, said in FAULTS.items() for variant in said]
)
def test_fault_is_found(run, fault, variant, seed):
    done = run("faults", variant, seed, fault)
    assert done.returncode != 0
    assert re.search(FAULTS[fault][variant], done.stderr), done.stderr


def test_report_names_kernel_block_thread_and_line(run):
    done = run("faults", "races", 0, "two blocks, one address")
    line = (
        r"kernel row_lse<T, FAULT>, block \(1, 0, 0\), thread \(0, 0, 0\), at faults.cpp:\d+: race"
    )
    assert re.match(line, done.stderr), done.stderr


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_op_runs_on_cpu_tensors(emulator, dtype, seed):
    emulator(seed)
    x = torch.randn(7, 2 * 101).to(dtype)[:, :101]
    out = torch.empty(7, 101)
    torch.ops.lossops_cuda.standin_reverse(x, out, True)
    assert torch.equal(out, x.flip(1).float())


def test_fault_in_an_op_is_an_error_and_the_next_call_is_right(emulator):
    x, out = torch.randn(3, 100), torch.empty(3, 100)
    told = r"kernel reverse_rows<T>, block .*, thread .*, at standin.cu:\d+: " + UNWRITTEN
    with pytest.raises(RuntimeError, match=told):
        torch.ops.lossops_cuda.standin_reverse(x, out, False)
    torch.ops.lossops_cuda.standin_reverse(x, out, True)
    assert torch.equal(out, x.flip(1))


def test_op_refuses_what_does_not_fit(emulator):
    reverse = torch.ops.lossops_cuda.standin_reverse
    with pytest.raises(RuntimeError, match="could not be launched: invalid configuration"):
        reverse(torch.empty(0, 9), torch.empty(0, 9), True)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got Double"):
        reverse(torch.empty(2, 9).double(), torch.empty(2, 9), True)
    with pytest.raises(RuntimeError, match=r"out must have shape \(2, 9\), got 2 dims, \(9, 2\)"):
        reverse(torch.empty(2, 9), torch.empty(9, 2), True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("atomicAdd(out, 1.0f);", "deleted function"),
        ("__shared__ float x[32]; *out = x[0];", "__shared__"),
        ("*out = 1.0f;", ""),
    ],
)
def test_what_kernels_may_not_use_does_not_compile(built, tmp_path, body, said):
    source = tmp_path / "kernel.cpp"
    source.write_text(f'#include "cuda/device.h"\n__global__ void f(float* out) {{ {body} }}\n')
    command = [*builder.compiler(), *builder.compiled(source, "-fsyntax-only").command, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(said), done.stderr
    assert said in done.stderr
