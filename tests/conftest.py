"""What the tests stand on: poisoned memory, fixed seeds, backends, and float64 as the oracle.

The budget of a result is plain PyTorch's own error in the same dtype (`assert_no_worse`), never a
tolerance somebody liked.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor

from lossops.backends import BACKENDS, load_cpu_module
from lossops.reference import accumulate_dtype

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
HALF = ("bf16", "f16")

# What a budget may not undercut, as a part of the largest entry. Half precision: the one rounding
# of the result itself. Full precision: eight, since one scalar is one draw, and PyTorch's may have
# come out exact by luck.
FLOOR = {
    torch.float64: 8 * 2.0**-53,
    torch.float32: 8 * 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}

# The same examples in every run: a failure that comes and goes is nobody's.
settings.register_profile(
    "lossops",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lossops")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` is filled with NaN: what nobody wrote, nobody may read.

    Not with LOSSOPS_TEST_POISON=0, for a checker that knows of itself what nobody wrote.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(os.environ.get("LOSSOPS_TEST_POISON") != "0", warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def fixed_seed_and_threads() -> None:
    """The same numbers in any order of the tests, and two threads, on a machine of any size."""
    torch.manual_seed(0)
    if torch.get_num_threads() != 2:
        torch.set_num_threads(2)


@pytest.fixture
def rounded_products() -> Iterator[None]:
    """The C++ backend keeps chunks in bfloat16, on any processor."""
    module = load_cpu_module()
    if isinstance(module, str):
        pytest.skip(module)
    module.portable_half_products(not module.half_products(2))
    yield
    module.portable_half_products(False)


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend by name; skipped, with its objection, only where it cannot run.

    That the compiled one is there wherever it can be built is a test of its own.
    """
    name: str = request.param
    sentence = BACKENDS[name].objection(torch.device("cpu"), torch.float32)
    if sentence is not None:
        pytest.skip(f"backend {name!r}: {sentence}")
    return name


@pytest.fixture
def device() -> torch.device:
    """Where tests that a GPU's share have their tensors: tests/gpu_device.py has the other one."""
    return torch.device("cpu")


class Inputs(NamedTuple):
    """Inputs of a head: x (N, D), w (V, D), b (V,) and target y (N,)."""

    x: Tensor
    w: Tensor
    b: Tensor
    y: Tensor


def make_inputs(
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype = torch.float64,
    *,
    spread: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs whose logits have standard deviation ``spread``."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64)
    w = torch.randn(v, d, generator=draw, dtype=torch.float64) * (spread / max(d, 1) ** 0.5)
    b = torch.randn(v, generator=draw, dtype=torch.float64) * (0.3 * spread)
    y = torch.randint(v, (n,), generator=draw)
    return Inputs(x.to(dtype), w.to(dtype), b.to(dtype), y)


def plain_losses(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    b: Tensor | None = None,
    scale: Tensor | float | None = None,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    sample_weight: Tensor | None = None,
    **options: object,
) -> Tensor:
    """Losses (N,) in plain PyTorch: all logits stored in the dtype of x, then upcast."""
    z = F.linear(x if scale is None else x * scale, w, b).to(accumulate_dtype(x.dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, y, reduction="none", **options)  # type: ignore[arg-type]
    if lse_square_scale:
        penalty = lse_square_scale * z.logsumexp(-1).square()
        counted = True if y.is_floating_point() else y != options.get("ignore_index", -100)
        losses = losses + torch.where(torch.as_tensor(counted), penalty, 0.0)
    return losses if sample_weight is None else losses * sample_weight


def value_and_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], upstream: Tensor | float = 1.0
) -> list[Tensor]:
    """``function(*tensors)`` and its gradients for each of them, times ``upstream``."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    if isinstance(upstream, Tensor):
        factor = upstream.to(value).expand_as(value)
    else:  # on the device itself: a copy from the host would wait for it
        factor = torch.full_like(value, upstream)
    return [value.detach(), *torch.autograd.grad(value, leaves, factor)]


def assert_no_worse(
    name: str,
    ours: Tensor,
    plain: Tensor,
    oracle: Tensor,
    *,
    slack: float = 2.0,
    floor: float | None = None,
) -> None:
    """No entry of ``ours`` is further from the oracle than ``slack`` times PyTorch's worst.

    Args:
        name: what is compared.
        ours: the result under test.
        plain: that of plain PyTorch in the same dtype.
        oracle: that of plain PyTorch in float64.
        slack: factor on PyTorch's worst error.
        floor: error that is always allowed; ``FLOOR`` of the dtype by default.
    """
    assert ours.shape == oracle.shape, f"{name}: shape {tuple(ours.shape)} != {tuple(oracle.shape)}"
    if not ours.numel():
        return
    error = (ours.double() - oracle).abs()
    worst_plain = float((plain.double() - oracle).abs().max())
    if floor is None:
        floor = FLOOR[ours.dtype] * float(oracle.abs().max())
    i = int(error.argmax())
    at = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), ours.shape))
    assert error.max() <= slack * worst_plain + floor, (
        f"{name}: error {float(error.max()):.3e} > {slack} x {worst_plain:.3e} + {floor:.1e} "
        f"at {at}: ours {ours[at]:.9g}, plain {plain[at]:.9g}, float64 {oracle[at]:.9g}"
    )


TIMEOUT = 60  # seconds, for a group of processes and for each of its exchanges
PRELOADED = ["torch", "torch._dynamo", "torch.nn.parallel.distributed", "pytest", "lossops"]


def from_ranks(work: Callable[..., dict[str, Any]], rows: list[int]) -> list[dict[str, Any]]:
    """What ``work(rank, rows)`` returns on each rank of a gloo group, a rank per entry of rows."""
    with tempfile.TemporaryDirectory() as folder:
        # A clean process that has imported torch once, and forks: ten imports would take a minute.
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        context = mp.start_processes(
            _rank, (work, rows, folder), len(rows), join=False, start_method="forkserver"
        )
        assert context is not None
        ended = context.join(timeout=TIMEOUT)
        while not ended and any(p.is_alive() for p in context.processes):
            ended = context.join(timeout=TIMEOUT)
            if not ended and all(p.is_alive() for p in context.processes):
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{len(rows)} processes did not end within {2 * TIMEOUT} s")
        return [torch.load(Path(folder, f"{r}.pt")) for r in range(len(rows))]


def _rank(rank: int, work: Callable[..., dict[str, Any]], rows: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", len(rows))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=len(rows), timeout=timedelta(seconds=TIMEOUT)
    )
    torch.save(work(rank, rows), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
