"""The Triton kernels on a real device: `pytest -m gpu`, or `make gpu-check` with all around it.

The oracle is the reference in float64 on the same device, the budget twice the error of the
reference in the inputs' dtype there. None of this has run yet: no GPU was at hand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse, make_inputs, value_and_gradients
from test_cpu_backend import EVERYTHING, FLOOR, PLAIN, Case, assert_all_no_worse
from torch import Tensor

import lossops
from lossops import LinearLossOptions, reference

triton = pytest.importorskip("triton", reason="Triton is an optional dependency")
pytestmark = pytest.mark.gpu

# The logic of these tests can be tried without a GPU, in Triton's interpreter: =cpu.
DEVICE = os.environ.get("LOSSOPS_TEST_DEVICE", "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# dz is rounded to half precision for its products: four roundings of it.
ROUNDED = {
    torch.float32: FLOOR[torch.float32],
    torch.bfloat16: 4 * 2.0**-8,
    torch.float16: 4 * 2.0**-11,
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="streams and graphs are CUDA's")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """float32 products as they are: TF32 is the caller's choice, not a test's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def moved(case: Case) -> Case:
    """The same case on the device."""
    case.args = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in case.args)
    case.coefficients = [None if c is None else c.to(DEVICE) for c in case.coefficients]
    return case


def hold(case: Case, way: str, **options: Any) -> None:
    """One way to statistics or gradients within its budget."""
    import lossops_triton

    with torch.device(DEVICE):
        ours = getattr(case, way)(lossops_triton, **options)
        theirs = getattr(case, way)(reference, **options)
        exact = getattr(case.doubled(), way)(reference, **options)
    for names, floor in (
        ({"dx", "dw"}, ROUNDED[case.dtype]),
        (set(exact) - {"dx", "dw"}, FLOOR[torch.float32]),
    ):
        some = [{k: v for k, v in found.items() if k in names} for found in (ours, theirs, exact)]
        assert_all_no_worse(*some, floor)


@pytest.mark.parametrize("names", [PLAIN, EVERYTHING], ids=["cross-entropy", "everything"])
@pytest.mark.parametrize("size", [(5, 33, 531, 2), (2, 64, 9001, 1), (300, 72, 1000, 1)], ids=str)
@every_dtype
def test_primitives(dtype: torch.dtype, size: tuple[int, ...], names: tuple[str, ...]) -> None:
    case = moved(Case(*size, dtype, names=names, scale=0.7, softcap=5.0, bias=True))
    hold(case, "statistics")
    hold(case, "two_sweeps")
    hold(case, "chunk", padding=5)
    hold(case, "chunk", padding=0, start=0.5)


@pytest.mark.parametrize("d", [20, 64, 72, 200])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_statistics_straight_from_x_and_w(dtype: torch.dtype, d: int) -> None:
    names = tuple(name for name in EVERYTHING if name != "below_target")
    for some in (PLAIN, names):
        hold(moved(Case(200, d, 700, 2, dtype, names=some, bias=True)), "statistics")


def losses(backend: str, **options: Any) -> Any:
    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = torch.arange(len(x), device=x.device) % len(w)
        return lossops.linear_cross_entropy(x, w, y, linear_bias=b, backend=backend, **options)

    return loss


@pytest.mark.parametrize("schedule", ["one_sweep", "two_sweeps"])
@every_dtype
def test_cross_entropy(dtype: torch.dtype, schedule: str) -> None:
    options = {"options": LinearLossOptions(schedule=schedule), "label_smoothing": 0.1}
    inputs = [t.to(DEVICE) for t in make_inputs(130, 1000, 64, dtype, spread=2.0)[:3]]
    ours = value_and_gradients(losses("triton", **options), inputs)
    plain = value_and_gradients(losses("reference", **options), inputs)
    exact = value_and_gradients(losses("reference", **options), [t.double() for t in inputs])
    for what, *three in zip(("loss", "dx", "dw", "db"), ours, plain, exact, strict=True):
        floor = ROUNDED[dtype] * float(three[2].abs().max())
        assert_no_worse(what, *three, floor=floor)


@pytest.mark.parametrize("loss", ["sigmoid_pairwise_loss", "softmax_pairwise_loss"])
@every_dtype
def test_pairs(dtype: torch.dtype, loss: str) -> None:
    def of(backend: str) -> Any:
        return lambda x, w: getattr(lossops, loss)(x, w, 3.0, backend=backend)

    x, w = (F.normalize(t).to(DEVICE) for t in make_inputs(300, 300, 64, dtype)[:2])
    ours = value_and_gradients(of("triton"), [x, w])
    plain = value_and_gradients(of("reference"), [x, w])
    exact = value_and_gradients(of("reference"), [x.double(), w.double()])
    for what, *three in zip(("loss", "dx", "dw"), ours, plain, exact, strict=True):
        assert_no_worse(what, *three, floor=ROUNDED[dtype] * float(three[2].abs().max()))


def test_same_bits_every_time() -> None:
    inputs = [t.to(DEVICE) for t in make_inputs(300, 3000, 64, torch.bfloat16)[:3]]
    first = value_and_gradients(losses("triton"), inputs)
    for _ in range(3):
        again = value_and_gradients(losses("triton"), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@on_cuda
def test_nothing_waits_for_the_device() -> None:
    inputs = [t.to(DEVICE) for t in make_inputs(300, 3000, 64, torch.bfloat16)[:3]]
    value_and_gradients(losses("triton"), inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(losses("triton"), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
def test_in_a_graph_and_on_a_stream() -> None:
    inputs = [t.to(DEVICE) for t in make_inputs(300, 3000, 64, torch.bfloat16)[:3]]
    expected = value_and_gradients(losses("triton"), inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            value_and_gradients(losses("triton"), inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(losses("triton"), inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@on_cuda
def test_compiled_whole() -> None:
    inputs = [t.to(DEVICE) for t in make_inputs(300, 3000, 64, torch.bfloat16)[:3]]
    compiled = torch.compile(losses("triton"), fullgraph=True)
    expected = value_and_gradients(losses("triton"), inputs)
    found = value_and_gradients(compiled, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here, two are needed")
def test_the_device_of_the_tensors_not_the_current_one() -> None:
    inputs = [t.to("cuda:1") for t in make_inputs(30, 300, 64, torch.bfloat16)[:3]]
    value, *_ = value_and_gradients(losses("triton"), inputs)
    assert value.device == torch.device("cuda:1")
