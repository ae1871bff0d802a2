"""The losses on a real device, by Triton and by CUDA: `pytest -m gpu`; `make gpu-check` has more.

Beside this file: test_gpu_kernels.py, test_gpu_rows.py. The oracle is the reference in float64, the
budget twice the error of the reference in the inputs' dtype. None of this has run on a GPU yet:
none was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse, make_inputs, value_and_gradients
from gpu_device import (
    DEVICE,
    backend,
    device,
    full_precision,
    needs,
    needs_room,
    on_cuda,
)
from gpu_losses import *  # noqa: F403
from test_cpu_backend import FLOOR
from torch import Tensor

import lossops
from lossops import LinearLossOptions, optim, samplers
from lossops.backends import BACKENDS
from lossops.schedules import MIB

pytestmark = pytest.mark.gpu

KINDS = [torch.float32, torch.bfloat16, torch.float16]
# dz is rounded to half precision for its products: four roundings of it.
ROUNDED = {
    torch.float32: FLOOR[torch.float32],
    torch.bfloat16: 4 * 2.0**-8,
    torch.float16: 4 * 2.0**-11,
}
every_dtype = pytest.mark.parametrize("dtype", KINDS, ids=str)
every_schedule = pytest.mark.parametrize("schedule", ["one_sweep", "two_sweeps"])


@pytest.fixture
def launches(backend: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """How often the backend was asked for its kernels."""

    @contextmanager
    def launches() -> Iterator[list[str]]:
        seen: list[str] = []
        own = BACKENDS[backend].primitives

        def primitives() -> Any:
            seen.append(backend)
            return own()

        with monkeypatch.context() as patch:
            patch.setitem(BACKENDS, backend, replace(BACKENDS[backend], primitives=primitives))
            yield seen

    return launches


def losses(backend: str, **options: Any) -> Any:
    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = torch.arange(len(x), device=x.device) % len(w)
        return lossops.linear_cross_entropy(x, w, y, linear_bias=b, backend=backend, **options)

    return loss


def inputs(n: int, v: int, d: int, dtype: torch.dtype, spread: float = 1.0) -> list[Tensor]:
    """x, w and b on the device."""
    return [t.to(DEVICE) for t in make_inputs(n, v, d, dtype, spread=spread)[:3]]


def hold(of: Callable[[str], Any], backend: str, tensors: list[Tensor], dtype: torch.dtype) -> None:
    """A loss and its gradients, each within its budget."""
    ours = value_and_gradients(of(backend), tensors)
    plain = value_and_gradients(of("reference"), tensors)
    exact = value_and_gradients(of("reference"), [t.double() for t in tensors])
    for what, *three in zip(("loss", "dx", "dw", "db"), ours, plain, exact, strict=False):
        assert_no_worse(what, *three, floor=ROUNDED[dtype] * float(three[2].abs().max()))


# N, D, V: several blocks of rows, rows of several parts, more rows than a grid has blocks in y.
SIZES = [(130, 64, 1000), (2, 72, 20_011), pytest.param(66_000, 8, 40, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("n", "d", "v"), SIZES)
@every_schedule
@every_dtype
def test_cross_entropy(
    backend: str, dtype: torch.dtype, schedule: str, n: int, d: int, v: int
) -> None:
    options = {"options": LinearLossOptions(schedule=schedule), "label_smoothing": 0.1}
    hold(lambda of: losses(of, **options), backend, inputs(n, v, d, dtype, 2.0), dtype)


PAIRS = [
    ("sigmoid_pairwise_loss", 300, 300),
    ("softmax_pairwise_loss", 300, 300),
    pytest.param("sigmoid_pairwise_loss", 66_000, 40, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("loss", "n", "v"), PAIRS)
@every_dtype
def test_pairs(backend: str, dtype: torch.dtype, loss: str, n: int, v: int) -> None:
    def of(backend: str) -> Any:
        return lambda x, w: getattr(lossops, loss)(x, w, 3.0, backend=backend)

    hold(of, backend, [F.normalize(t) for t in inputs(n, v, 64, dtype)[:2]], dtype)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_logits_at_every_place(backend: str, dtype: torch.dtype) -> None:
    """Rows that begin at any element of 16 bytes, with strides of any remainder."""
    y = torch.tensor([3, 530, -100], device=DEVICE)
    z = torch.randn(3, 531).to(dtype).to(DEVICE)
    exact = value_and_gradients(lambda t: F.cross_entropy(t, y), [z.double()])
    plain = value_and_gradients(lambda t: F.cross_entropy(t.float(), y), [z])
    for begin in range(16 // dtype.itemsize):
        for padding in (0, 1, 5):
            room = torch.empty(3, begin + 531 + padding, dtype=dtype, device=DEVICE)
            leaf = room[:, begin : begin + 531].copy_(z).requires_grad_()
            loss = lossops.cross_entropy(leaf, y, backend=backend)
            found = [loss.detach(), *torch.autograd.grad(loss, leaf)]
            for what, *three in zip(("loss", "dz"), found, plain, exact, strict=True):
                assert_no_worse(f"{what}, {begin}, {padding}", *three)


@on_cuda
@pytest.mark.slow
def test_logits_of_more_than_2_31_elements(backend: str) -> None:
    """4.3 GB, their gradient in the same place; some rows against float64."""
    needs_room(10)
    n, v = 32_800, 65_536
    z = torch.empty(n, v, dtype=torch.bfloat16, device=DEVICE).normal_()
    y = torch.arange(n, device=DEVICE)
    rows = torch.tensor([0, 1, 16_384, 32_767, 32_768, n - 1], device=DEVICE)
    some = z[rows].double().requires_grad_()
    (dz,) = torch.autograd.grad(F.cross_entropy(some, y[rows], reduction="sum"), some)
    parts = zip(z.split(512), y.split(512), strict=True)
    exact = sum(F.cross_entropy(t.double(), ids, reduction="sum") for t, ids in parts)
    z.requires_grad_()
    found = lossops.cross_entropy(z.view_as(z), y, reduction="sum", inplace=True, backend=backend)
    (ours,) = torch.autograd.grad(found, z)
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(ours[rows].double(), dz, rtol=2.0**-7, atol=1e-7)


@on_cuda
@pytest.mark.slow
@every_schedule
def test_weights_of_more_than_2_31_elements(backend: str, schedule: str) -> None:
    """4.3 GB of w and as much of dw, with targets at both ends."""
    needs_room(40)
    d, v = 512, 2**22 + 64
    w = torch.empty(v, d, dtype=torch.bfloat16, device=DEVICE).normal_().mul_(d**-0.5)
    x = torch.randn(6, d).bfloat16().to(DEVICE)
    ids = torch.tensor([0, 1, 2**22 - 1, 2**22, 2**22 + 1, v - 1], device=DEVICE)
    w.requires_grad_(), x.requires_grad_()
    options = LinearLossOptions(schedule=schedule, max_workspace_bytes=2**34)
    loss = lossops.linear_cross_entropy(
        x, w, ids, reduction="sum", options=options, backend=backend
    )
    dx, dw = torch.autograd.grad(loss, (x, w))
    with torch.no_grad():
        z = torch.cat([x.float() @ part.float().T for part in w.split(2**18)], 1).double()
        p = z.softmax(1)
        exact = z.logsumexp(1).sum() - z.gather(1, ids.unsqueeze(1)).sum()
        p[torch.arange(6, device=DEVICE), ids] -= 1
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            dw[ids].double(), p[:, ids].T @ x.double(), rtol=2.0**-6, atol=1e-3
        )
        parts = zip(p.split(2**18, 1), w.split(2**18), strict=True)
        true = sum(part.float() @ some.float() for part, some in parts)
        torch.testing.assert_close(dx.float(), true, rtol=2.0**-6, atol=1e-3)


# Nothing below is about values: the same bits, when, where and with how much memory.


def test_same_bits_every_time(backend: str) -> None:
    tensors = inputs(300, 3000, 64, torch.bfloat16)
    first = value_and_gradients(losses(backend), tensors)
    for _ in range(3):
        again = value_and_gradients(losses(backend), tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
@every_schedule
def test_nothing_waits_for_the_device(backend: str, schedule: str) -> None:
    loss = losses(backend, options=LinearLossOptions(schedule=schedule))
    tensors = inputs(300, 3000, 64, torch.bfloat16)
    value_and_gradients(loss, tensors)  # compiles
    with no_waiting():
        value_and_gradients(loss, tensors)


@on_cuda
@pytest.mark.parametrize("optimizer", [optim.RowSGD, optim.RowAdamW])
def test_training_on_samples_waits_for_nothing(optimizer: Any) -> None:
    needs("cuda")
    x, w, _ = inputs(64, 10_000, 32, torch.float32)
    y = torch.randint(10_000, (64,)).to(DEVICE)
    head = lossops.PartialFC(32, 10_000, sample_rate=0.1, device=DEVICE)
    table, frequencies = w.requires_grad_(), torch.rand(10_000) + 0.1
    of_head, of_table = optimizer(head.parameters(), 0.1), optimizer([table], 0.1)
    drawing = [
        samplers.Uniform(10_000, 500), samplers.LogUniform(10_000, 500),
        samplers.Frequency(frequencies, 500, unique=True),
    ]  # fmt: skip

    def step() -> None:
        head(x, y).backward()
        of_head.step()
        for sampler in drawing:
            for loss in (lossops.sampled_softmax_loss, lossops.nce_loss):
                loss(x, table, y, sampler).backward()
                of_table.step()
                of_table.zero_grad()
            sampler.per_row(y)
        of_head.zero_grad()

    step()
    with no_waiting():
        step()


@on_cuda
@every_schedule
def test_in_a_graph_and_on_a_stream(backend: str, schedule: str) -> None:
    loss = losses(backend, options=LinearLossOptions(schedule=schedule))
    tensors = inputs(300, 3000, 64, torch.bfloat16)
    expected = value_and_gradients(loss, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            value_and_gradients(loss, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(loss, tensors)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@on_cuda
def test_compiled_whole(backend: str) -> None:
    tensors = inputs(300, 3000, 64, torch.bfloat16)
    compiled = torch.compile(losses(backend), fullgraph=True)
    expected = value_and_gradients(losses(backend), tensors)
    found = value_and_gradients(compiled, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_cuda
@every_schedule
def test_memory(backend: str, schedule: str) -> None:
    """Beyond inputs and gradients: the stated workspace, where all logits would be 1 GiB."""
    n, d, v, workspace = 8192, 256, 32_768, 256 * MIB
    options = LinearLossOptions(schedule=schedule, max_workspace_bytes=workspace)
    tensors = inputs(n, v, d, torch.bfloat16)
    value_and_gradients(losses(backend, options=options), tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = value_and_gradients(losses(backend, options=options), tensors)
    torch.cuda.synchronize()
    # Clones of the inputs, gradients, dx in float32 and its sum over slabs, a slab's dw.
    own = 2 * sum(t.nbytes for t in tensors) + 8 * n * d + 4 * v * d
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < own + workspace + 32 * MIB, f"{extra / MIB:.0f} MiB"
    del found


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here, two are needed")
def test_the_device_of_the_tensors_not_the_current_one(backend: str) -> None:
    tensors = [t.to("cuda:1") for t in make_inputs(30, 300, 64, torch.bfloat16)[:3]]
    value, *_ = value_and_gradients(losses(backend), tensors)
    assert value.device == torch.device("cuda:1")
