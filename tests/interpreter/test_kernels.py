"""Every kernel of the Triton backend in the interpreter, its memory watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import memory
import pytest
import torch
from conftest import assert_no_worse
from gpu_kernels import *  # noqa: F403
from gpu_kernels import HALF, check
from test_cpu_backend import EVERYTHING, PLAIN, Case
from torch import Tensor

from lossops import near_far, reference
from lossops.statistics import canonical
from lossops_triton import configurations, fused, primitives

FUSED = canonical(name for name in EVERYTHING if name != "below_target")


@pytest.fixture(scope="session")
def module() -> Any:
    """The backend."""
    return primitives


@pytest.fixture
def shuffled() -> Any:
    """Programs of a launch in another order."""
    return memory.shuffled


@pytest.mark.parametrize(
    ("names", "v"), [(EVERYTHING, 1100), (PLAIN, 8300)], ids=["everything", "exponentials"]
)
def test_parts_of_the_classes(names: tuple[str, ...], v: int) -> None:
    """Three programs a row, whose states are merged in order."""
    case = Case(2, 4, v, 2, torch.float32, names=names, bias=True)
    with memory.launches() as seen:
        check(primitives, case)
    kernels = [launch.kernel for launch in seen]
    assert kernels.count("merge_kernel") == 3
    assert {len(launch.programs) for launch in seen if "statistics" in launch.kernel} == {6}


@pytest.fixture(params=["sm_80", "sm_90"], ids=["pointers", "descriptors"])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiles of an architecture without TMA, and of one with it."""
    monkeypatch.setattr(configurations, "architecture", lambda: request.param)
    return request.param


# Rows: one block and a ragged second; classes: ragged, and several parts; features: several steps
# with and without a rest; a tile as long as D.
@pytest.mark.parametrize(
    ("n", "d", "v", "names"),
    [
        pytest.param(20, 72, 200, PLAIN, id="ragged"),
        pytest.param(130, 64, 300, PLAIN, id="two blocks of rows"),
        pytest.param(70, 136, 70, FUSED, id="everything"),
        pytest.param(9, 80, 65, ("lse", "max"), id="rich"),
    ],
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fused_statistics(
    dtype: torch.dtype, n: int, d: int, v: int, names: tuple[str, ...], architecture: str
) -> None:
    case = Case(n, d, v, 2, dtype, names=("target", *names), scale=1.5, softcap=9.0, bias=True)
    if names == PLAIN:
        case = Case(n, d, v, 2, dtype, names=names)
    tile = configurations.tile_of(*case.args[:2], len(case.names) - 2 + bool(case.args[4]))
    assert tile.descriptors == (architecture == "sm_90")
    with memory.launches() as seen:
        check(primitives, case, ("statistics",))
    assert seen[1].kernel == "fused_statistics_kernel"


@pytest.mark.parametrize("d", [1, 17, 64, 70])
def test_fused_statistics_of_any_width(d: int, architecture: str) -> None:
    """D below a tile, odd, a tile, and rows that no descriptor can have."""
    check(primitives, Case(5, d, 70, 1, torch.bfloat16, names=PLAIN), ("statistics",))


@pytest.mark.parametrize("signed", [False, True], ids=["one sign", "both signs"])
@pytest.mark.parametrize(
    ("n", "v", "block", "group"), [(1, 1, 4, 8), (37, 300, 16, 128)], ids=["one", "ragged"]
)
def test_near_and_far(n: int, v: int, block: int, group: int, signed: bool) -> None:
    m = torch.rand(n, v + 5)[:, :v]
    m[:, ::3] *= 0.05
    factor = torch.rand(n) - (0.5 if signed else 0.0)
    limit = torch.full((n,), 0.3)
    args = (m, factor, limit)
    found = primitives.far_sums(*args, block, group)
    plain = reference.far_sums(*args, block, group)
    exact = reference.far_sums(*(t.double() for t in args), block, group)
    assert len(found) == len(exact)
    assert torch.equal(found[0], exact[0])
    for name, ours, same, true in zip("rcrc", found[1:], plain[1:], exact[1:], strict=False):
        assert_no_worse(name, ours, same, true)

    xs, w = torch.randn(n, 72), torch.randn(v, 72)

    def added(function: Callable[..., float], dtype: torch.dtype) -> list[Tensor]:
        into = [torch.ones(t.shape, dtype=dtype) for t in (xs, w, w[:, 0])]
        of = [t.to(dtype) for t in (m, factor)]
        mass = function(*of, found[0], xs.to(dtype), w.to(dtype), *into, block)
        return [*into, torch.tensor(mass, dtype=dtype)]

    ours = added(primitives.near_products, torch.float32)
    plain = added(near_far.near_products, torch.float32)
    exact = added(near_far.near_products, torch.float64)
    for name, one, same, true in zip(("dx", "dw", "db", "mass"), ours, plain, exact, strict=True):
        assert_no_worse(name, one, same, true)


def test_bytes() -> None:
    """A logit is read once for its statistics, once for db, and once, and written, for dr."""
    case = Case(2, 8, 4000, 1, torch.bfloat16, names=PLAIN)
    with memory.launches() as seen:
        case.chunk(primitives, padding=0)
    logits = 2 * 4000
    by_kernel = {launch.kernel: launch for launch in seen}
    assert by_kernel["chunk_statistics_kernel"].bytes_read == pytest.approx(4 * logits, rel=0.01)
    gradient = by_kernel["chunk_gradient_kernel"]
    assert gradient.bytes_read == pytest.approx(4 * logits, rel=0.01)
    assert gradient.bytes_written == 2 * logits


def test_bytes_of_the_fused_kernel() -> None:
    """Within 10 % of the model of fused.py: BM + BN rows of D for each tile."""
    n, d, v = 256, 128, 512
    x, w = torch.randn(n, d).to(torch.bfloat16), torch.randn(v, d).to(torch.bfloat16)
    tile = configurations.tile_of(x, w, 0)
    with memory.launches() as seen:
        fused.fused_statistics(x, w, None, None, 0.0, None, None, None, ("lse",))
    (launch,) = [one for one in seen if one.kernel == "fused_statistics_kernel"]
    tiles = -(-n // tile.bm) * -(-v // tile.bn)
    assert launch.bytes_read == pytest.approx(tiles * (tile.bm + tile.bn) * d * 2, rel=0.1)
