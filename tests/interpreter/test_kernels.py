"""Every kernel, interpreted with all checks on, against the reference in float64.

The budget is that of tests/test_cpu_backend.py: twice the error of the reference in the same dtype.
Programs run in shuffled order. Sizes are small: a program's step takes some milliseconds here.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import hypothesis
import memory
import pytest
import repair  # before any kernel
import torch
from hypothesis import settings
from hypothesis import strategies as st
from test_cpu_backend import EVERYTHING, FLOOR, PLAIN, Case, assert_all_no_worse, strided
from torch import Tensor

import lossops_triton
from lossops import near_far, reference, reference_pairs
from lossops.statistics import outputs
from lossops_triton import configurations, fused, linear, sparse
from lossops_triton.statistics import Logits, Spec, chunk_gradient, chunk_statistics

assert repair.TARGET.backend == "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
FUSED = tuple(name for name in EVERYTHING if name != "below_target")
# dz is rounded to half precision for its products: four roundings of it.
ROUNDED = {F32: FLOOR[F32], BF16: 4 * 2.0**-8, F16: 4 * 2.0**-11}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def hold(case: Case, way: str, *, seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """One way to statistics or gradients within its budget; what it found."""
    with memory.checked(seed):
        ours = getattr(case, way)(lossops_triton, **options)
    theirs = getattr(case, way)(reference, **options)
    exact = getattr(case.doubled(), way)(reference, **options)
    for names, floor in (
        ({"dx", "dw"}, ROUNDED[case.dtype]), (set(exact) - {"dx", "dw"}, FLOOR[F32])
    ):  # fmt: skip
        some = [{k: v for k, v in found.items() if k in names} for found in (ours, theirs, exact)]
        assert_all_no_worse(*some, floor)
    return ours


MAPS = {
    "mapped": {"scale": 0.7, "softcap": 5.0, "bias": True},
    "cross-entropy": {"scale": -1.5, "bias": True, "names": PLAIN},
}


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@every_dtype
def test_everything_at_once(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slabs of classes, ragged tiles, misaligned rows, sums that go on."""
    monkeypatch.setattr(linear, "SLAB_BYTES", 4 * 3 * 256)
    case = Case(3, 33, 271, 2, dtype, **options)
    hold(case, "two_sweeps")
    hold(case, "chunk", padding=5, start=0.5)


@pytest.mark.parametrize(
    ("n", "d", "v", "k"), [(0, 4, 7, 1), (1, 5, 9, 2), (3, 4, 1, 1), (4, 3, 8, 0), (6, 16, 64, 3)]
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_small_and_empty(n: int, d: int, v: int, k: int, dtype: torch.dtype) -> None:
    case = Case(n, d, v, k, dtype, bias=True)
    hold(case, "two_sweeps")
    hold(case, "chunk", padding=0)


@pytest.mark.parametrize("name", [n for n in EVERYTHING if n != "target"])
def test_each_statistic_alone(name: str) -> None:
    hold(Case(4, 5, 41, 2, F32, names=("target", name), softcap=3.0, bias=True), "chunk")


@pytest.mark.parametrize(
    ("dtype", "names"), [*((dtype, PLAIN) for dtype in DTYPES), (F32, EVERYTHING)], ids=str
)
def test_classes_in_parts(dtype: torch.dtype, names: Sequence[str]) -> None:
    """Two rows: their classes are split, and the parts merged in order, the same bits always."""
    torch.manual_seed(0)
    case = Case(2, 3, 9001, 1, dtype, names=names)
    ours = hold(case, "chunk", padding=3, seed=1)
    with memory.checked(seed=2):
        again = case.chunk(lossops_triton, padding=3)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("names", [PLAIN, FUSED], ids=["cross-entropy", "everything"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_statistics_straight_from_x_and_w(
    dtype: torch.dtype, names: Sequence[str], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configurations, "architecture", lambda: architecture)
    case = Case(20, 72, 200, 2, dtype, names=names, scale=0.7, softcap=5.0, bias=True)
    assert fused.fuses(*case.args[:2], case.names)
    hold(case, "statistics")
    hold(Case(3, 20, 300, 1, dtype, names=names), "statistics")  # D below a tile, split classes


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_layout(dtype: torch.dtype) -> None:
    case = Case(6, 5, 41, 2, dtype, scale=0.5, bias=True)
    other = Case(6, 5, 41, 2, dtype, scale=0.5, bias=True)
    other.args = tuple(strided(a) if isinstance(a, Tensor) and a.ndim else a for a in case.args)
    other.coefficients = [None if c is None else strided(c) for c in case.coefficients]
    for way in ("statistics", "two_sweeps", "chunk"):
        hold(other, way)


@settings(max_examples=8)
@hypothesis.given(
    n=st.integers(1, 5), d=st.integers(1, 40), v=st.integers(1, 300), k=st.integers(0, 2),
    padding=st.integers(0, 5), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_size(n: int, d: int, v: int, k: int, padding: int, dtype: torch.dtype) -> None:
    case = Case(n, d, v, k, dtype, names=PLAIN, bias=True)
    hold(case, "statistics")
    hold(case, "chunk", padding=padding)


LOGITS = {
    "+inf": [torch.inf, 1.0, -2.0],
    "-inf": [-torch.inf, 1.0, 3.0],
    "all -inf": [-torch.inf] * 3,
    "two +inf": [torch.inf, torch.inf, 0.0],
    "nan": [torch.nan, 0.0, 1.0],
    "large": [3e38, 1e38, 3e38],
    "equal": [2.0, 2.0, 2.0],
}


@pytest.mark.parametrize("target", [0, 1, -1], ids=["at 0", "at 1", "ignored"])
def test_logits_at_the_edges(target: int) -> None:
    """All rows as the reference has them, with their infinities and NaN."""
    z = torch.tensor(list(LOGITS.values()))
    y = torch.full((len(LOGITS), 1), target)
    names = ("target", "lse", "max", "runner_up", "softplus")
    with memory.checked():
        ours = lossops_triton.logits_statistics(z, y, None, None, names)
    theirs = reference.logits_statistics(z, y, None, None, names)
    ordered = ~z.isnan().any(1)  # what is largest among NaN, and relative to it, is nobody's
    for name, a, b in zip(outputs(names), ours, theirs, strict=True):
        rows = slice(None) if name in ("lse", "softplus") else ordered
        torch.testing.assert_close(a[rows], b[rows], equal_nan=True, msg=name)
    given = {"target": torch.ones(len(z), 1), "lse": torch.ones(len(z))}
    coefficients = [given.get(name) for name in outputs(names)]
    dz, expected = torch.empty_like(z), torch.empty_like(z)
    for module, found, out in (
        (lossops_triton, ours, dz), (reference, theirs, expected)
    ):  # fmt: skip
        module.logits_gradient(z, y, None, None, names, found, coefficients, out)
    torch.testing.assert_close(dz, expected, equal_nan=True)


def test_rows_beyond_int32() -> None:
    """The third row begins 2^31 elements after the first; the memory is mapped, not touched."""
    v, stride = 40, 2**30
    mapped = mmap.mmap(-1, 4 * (2 * stride + v))
    z = torch.frombuffer(mapped, dtype=F32).as_strided((3, v), (stride, 1))
    z.copy_(torch.randn(3, v))
    y = torch.tensor([[1], [2], [3]])
    with memory.checked():
        ours = chunk_statistics(Logits(z), y, None, None, PLAIN)
        theirs = chunk_statistics(Logits(z.contiguous()), y, None, None, PLAIN)
        spec = Spec(y, None, None, PLAIN, ours, [None, None, torch.ones(3)])
        dense = torch.empty(3, v)
        chunk_gradient(Logits(z.contiguous()), spec, dense)
        chunk_gradient(Logits(z), spec, z)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(z, dense)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_each_logit_is_read_once_and_written_once(dtype: torch.dtype, packed: bool) -> None:
    n, v = 4, 5003
    z = torch.randn(n, v + 5).to(F32 if packed else dtype)[:, :v]
    y = torch.zeros(n, 1, dtype=torch.int64)
    with memory.checked() as read:
        found = chunk_statistics(Logits(z), y, None, None, PLAIN)
    size = n * v * z.element_size()
    assert size <= read.read <= 1.02 * size
    spec = Spec(y, None, None, PLAIN, found, [None, None, torch.ones(n)])
    with memory.checked() as both:
        out = z
        if packed:
            wide = torch.empty(n, v + 1)[:, :v].copy_(z)  # rows at multiples of 16 bytes
            z, out = wide, wide.view(BF16)[:, :v]
        chunk_gradient(Logits(z), spec, out)
    assert size <= both.read <= 1.02 * size
    assert both.written == n * v * out.element_size()


def test_the_fused_kernel_moves_what_its_tiles_do() -> None:
    """Within 10 % of the tile model of fused.py."""
    n, d, v = 256, 128, 512
    x, w = torch.randn(n, d).to(BF16), torch.randn(v, d).to(BF16)
    tile = configurations.tile_of(x, w, 0)
    with memory.checked() as traffic:
        fused.fused_statistics(x, w, None, None, 0.0, None, None, None, ("lse",))
    tiles = math.ceil(n / tile.bm) * math.ceil(v / tile.bn)
    model = tiles * (tile.bm + tile.bn) * d * 2
    assert 0.99 * model <= traffic.read <= 1.1 * model


PAIR_SIZES = [(9, 600, 24, 2), (7, 300, 16, 0), (1, 1, 8, 1), (0, 5, 8, 1)]


def pair_inputs(n: int, v: int, d: int, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of pairs; targets distinct within a row."""
    target = torch.rand(n, max(v, k)).argsort(1)[:, :k]
    target[2::4] = -1
    return {
        "x": torch.randn(n, d).to(dtype), "w": (torch.randn(v, d) / 2).to(dtype),
        "b": torch.randn(v).to(dtype), "scale": torch.tensor(1.3), "target": target,
        "weight": torch.rand(v).to(dtype), "factor": torch.rand(n), "at": torch.randn(n, k),
        "rows": torch.randn(n), "columns": torch.randn(v),
    }  # fmt: skip


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}


def hold_pairs(run: Any, inputs: dict[str, Tensor], dtype: torch.dtype, unrounded: str) -> None:
    """``run(module, inputs)`` -> results by name, as in `hold`."""
    with memory.checked(seed=1):
        ours = run(lossops_triton, inputs)
    theirs, exact = run(reference_pairs, inputs), run(reference_pairs, doubled(inputs))
    for name in exact:
        floor = FLOOR[F32] if name in unrounded.split() else ROUNDED[dtype]
        assert_all_no_worse({name: ours[name]}, {name: theirs[name]}, {name: exact[name]}, floor)


def room(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x, w = inputs["x"], inputs["w"]
    acc = reference.accumulate_dtype(x.dtype)
    return {"dx": torch.empty(x.shape, dtype=acc), "dw": torch.empty_like(w)}


KINDS = {
    "sigmoid": [], "hinge": [0.2], "gumbel": [1.5], "asymmetric": [2.0, 0.05, 0.0],
    "asymmetric, detached": [4.0, 0.0, 1.0],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@every_dtype
def test_binary(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SLAB_BYTES", 4 * 9 * 256)

    def run(module: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        out, again = room(t), room(t)
        db = torch.empty_like(t["b"])
        first = (t["x"], t["w"], t["b"], t["scale"], t["target"], t["weight"])
        rest = (kind.partition(",")[0], KINDS[kind], t["factor"], t["at"])
        sums = module.linear_binary(*first, *rest, out["dx"], out["dw"], db)
        module.linear_binary(*first, *rest, again["dx"], again["dw"], None)
        return {"sums": sums, "db": db, **out, "dx alone": again["dx"], "dw alone": again["dw"]}

    for size in PAIR_SIZES if kind == "sigmoid" else PAIR_SIZES[:1]:
        hold_pairs(run, pair_inputs(*size, dtype), dtype, "sums db dx dw")


@pytest.mark.parametrize("size", PAIR_SIZES, ids=str)
@every_dtype
def test_log_sums_of_rows_and_columns(
    size: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "SLAB_BYTES", 4 * 9 * 256)

    def run(module: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        out = room(t)
        args = (t["x"], t["w"], t["scale"], t["target"])
        found = module.linear_pair_statistics(*args)
        coefficients = [t["rows"], t["columns"], t["at"]]
        module.linear_pair_gradient(*args, found, coefficients, out["dx"], out["dw"])
        names = ("shift", "lse", "column_shift", "column_lse", "target")
        return {**dict(zip(names, found, strict=True)), **out}

    hold_pairs(run, pair_inputs(*size, dtype), dtype, "shift lse column_shift column_lse target")


@pytest.mark.parametrize("signed", [False, True], ids=["one sign", "both signs"])
@pytest.mark.parametrize(
    ("n", "v", "d", "block"), [(300, 200, 40, 128), (50, 130, 70, 32), (1, 1, 1, 128)]
)
def test_near_and_far(n: int, v: int, d: int, block: int, signed: bool) -> None:
    m = torch.rand(n, v + 3)[:, :v] * torch.where(torch.rand(v) < 0.2, 1.0, 0.01)
    m = m * torch.randn(n, v).sign() if signed else m
    factor, limit = torch.rand(n), 0.1 + 0.5 * torch.rand(n)
    xs, w = torch.randn(n, d), torch.randn(v, d).bfloat16()

    def run(module: Any, acc: torch.dtype) -> list[Tensor]:
        far = module.far_sums(m.to(acc), factor.to(acc), limit.to(acc), block, 64)
        products = sparse if module is lossops_triton else near_far
        into = [torch.ones(s, dtype=acc) for s in ((n, d), (v, d), (v,))]
        mass = products.near_products(
            m.to(acc), factor.to(acc), far[0], xs.to(acc), w, *into, block
        )
        return [*far, *into, torch.tensor(mass)]

    with memory.checked(seed=1):
        ours = run(lossops_triton, F32)
    theirs, exact = run(reference, F32), run(reference, torch.float64)
    assert torch.equal(ours[0], exact[0])
    for a, b, c in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        budget = (b.double() - c).abs().max()
        assert (a.double() - c).abs().max() <= 2 * budget + FLOOR[F32] * (1 + c.abs().max())
