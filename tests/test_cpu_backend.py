"""The compiled CPU modules against `lossops.reference`, primitive by primitive.

The oracle is the reference on float64 copies of the inputs, the budget twice the error of the
reference in the inputs' own dtype. Small tiles make small cases cross every tile boundary.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import lossops
from lossops import reference
from lossops.backends import cpu_module_names, load_cpu_module
from lossops.reference import accumulate_dtype
from lossops.schedules import kept_dtype
from lossops.statistics import STATISTICS, canonical, outputs

MODULES = [n for n in cpu_module_names() if importlib.util.find_spec(n) is not None]
pytestmark = pytest.mark.skipif(not MODULES, reason="no compiled CPU module is built")

EVERYTHING = canonical((*STATISTICS, "lse@2", "lse@0.5", "lse<0.3", "lse<-0.5"))
PLAIN = canonical(("target", "lse"))  # what a chunk keeps exponentials for
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
# What the reference may escape by luck in a small case, in units of 1 + |oracle|: eight roundings.
# In float64 it is the oracle itself and has no error to compare with.
FLOOR = {d: 64 * 2.0**-53 if d == torch.float64 else 8 * 2.0**-24 for d in DTYPES}
# The same for dx and dw where a processor multiplies bfloat16 itself: dz is rounded for these two
# products, which the reference does not do; tests/test_contract.py holds them to PyTorch's error.
ROUNDED_FLOOR = 4 * 2.0**-8


@pytest.fixture(params=MODULES, ids=lambda name: name.rpartition("_")[2])
def cpp(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


@pytest.fixture
def best() -> ModuleType:
    return importlib.import_module(MODULES[0])


@pytest.fixture
def half(cpp: ModuleType) -> Iterator[ModuleType]:
    """A module whose products round to bfloat16, on any processor."""
    own = cpp.half_products(2)
    cpp.portable_half_products(not own)
    yield cpp
    cpp.portable_half_products(False)


class Case:
    """Arguments of a linear primitive, and its four ways to statistics and gradients."""

    def __init__(
        self,
        n: int,
        d: int,
        v: int,
        k: int,
        dtype: torch.dtype,
        *,
        names: Sequence[str] = EVERYTHING,
        scale: float | None = None,
        softcap: float = 0.0,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.names = canonical(s for s in names if k or s not in ("target", "below_target"))
        self.outs = outputs(self.names)
        self.dtype, self.acc = dtype, accumulate_dtype(dtype)
        x = torch.randn(n, d, generator=g).to(dtype)
        w = (torch.randn(v, d, generator=g) * (2 / d**0.5)).to(dtype)
        b = torch.randn(v, generator=g).to(dtype) if bias else None
        target = None
        if k:
            ids = torch.rand(n, max(v, k), generator=g).argsort(1)[:, :k]
            target = torch.where(ids < v, ids, -1)
            target[2::4] = -1  # rows without any
            target[1::4, 1:] = -1
        a = torch.randn(v, generator=g).to(dtype)
        teacher = torch.randn(n, v, generator=g).softmax(1).to(dtype)
        teacher = teacher.masked_fill(teacher < 0.02, 0.0)
        s = None if scale is None else torch.tensor(scale)
        self.args: tuple[Any, ...] = (x, w, b, s, softcap, target, a, teacher)
        self.coefficients = [
            None
            if o == "shift" or o == "argmax" or o.endswith("_index")
            else torch.randn((n, k) if o == "target" else (n,), generator=g, dtype=torch.float64)
            for o in self.outs
        ]

    def doubled(self) -> Case:
        """The same numbers in float64."""
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__, dtype=torch.float64, acc=torch.float64)
        other.args = tuple(
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in self.args
        )
        return other

    def statistics(self, module: ModuleType, *tile: int) -> dict[str, Tensor]:
        found = module.linear_statistics(*self.args, self.names, *tile)
        return dict(zip(self.outs, found, strict=True))

    def coefficient_list(self) -> list[Tensor | None]:
        return [None if c is None else c.to(self.acc) for c in self.coefficients]

    def two_sweeps(self, module: ModuleType, *tile: int) -> dict[str, Tensor]:
        dx, dw, db = self._gradients(self.dtype)
        found = module.linear_statistics(*self.args, self.names, *tile)
        module.linear_gradient(
            *self.args, self.names, found, self.coefficient_list(), dx, dw, db, *tile
        )
        return {"dx": dx, "dw": dw, "db": db}

    def chunk(
        self,
        module: ModuleType,
        *tile: int,
        padding: int = 5,
        start: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Statistics and gradients through a buffer of a dtype; ``start`` is what dw and db hold
        before.
        """
        n, v = self.args[0].shape[0], self.args[1].shape[0]
        buffer = torch.full((n, v + padding), torch.nan, dtype=dtype or self.acc)[:, :v]
        wanted = [o for o, c in zip(self.outs, self.coefficients, strict=True) if c is not None]
        found = module.linear_chunk_statistics(*self.args, self.names, wanted, buffer, *tile)
        dx, dw, db = self._gradients(self.acc)
        if start is not None:
            dw.fill_(start), db.fill_(start)
        module.linear_chunk_gradient(
            *self.args, self.names, wanted, buffer, found, self.coefficient_list(),
            dx, dw, db, start is not None, *tile,
        )  # fmt: skip
        return {**dict(zip(self.outs, found, strict=True)), "dx": dx, "dw": dw, "db": db}

    def _gradients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x, w = self.args[:2]
        dx = torch.empty(x.shape, dtype=self.acc)
        return dx, torch.empty(w.shape, dtype=dtype), torch.empty(w.shape[0], dtype=dtype)


def assert_all_no_worse(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    oracle: dict[str, Tensor],
    floor: float,
    rounded: bool = False,
) -> None:
    """Errors at most twice those of ``theirs``; the same infinities and NaN, the same ids."""
    assert ours.keys() == oracle.keys()
    for name, exact in oracle.items():
        a, b = ours[name], theirs[name]
        assert (a.shape, a.dtype) == (exact.shape, b.dtype), name
        finite = exact.isfinite()
        if not finite.all():
            torch.testing.assert_close(
                a.double()[~finite], exact.double()[~finite], equal_nan=True, msg=name
            )
        if not finite.any():
            continue
        error = (a.double() - exact)[finite].abs()
        budget = (b.double() - exact)[finite].abs().max()
        each = ROUNDED_FLOOR if rounded and name in ("dx", "dw") else floor
        limit = 2 * budget + each * (1 + exact[finite].abs().max())
        assert error.max() <= limit, (
            f"{name}: error {error.max():.2e} > {limit:.2e} (reference {budget:.2e}), "
            f"worst of {a.tolist() if a.numel() < 20 else a.shape}"
        )


# One tile and several; a vector and less; more targets than one and none; N = 0 and 1, V = 1. Half
# precision differs only in how numbers are read and written: two shapes are enough.
SHAPES = {
    "ragged tiles": (7, 33, 131, 1, 64),
    "three targets": (5, 8, 37, 3, 16),
    "tiles below a vector": (4, 3, 8, 2, 3),
    "no target, one tile": (6, 16, 64, 0, 2048),
    "V1": (3, 4, 1, 1, 8),
    "N1": (1, 5, 9, 2, 4),
    "N0": (0, 4, 7, 1, 4),
}
GRID = [
    pytest.param(dtype, *shape, id=f"{dtype}-{name}".removeprefix("torch."))
    for dtype in DTYPES
    for name, shape in SHAPES.items()
    if dtype not in HALF or name in ("ragged tiles", "N0")
]
MAPS = [
    pytest.param({}, id="plain"),
    pytest.param({"scale": 0.7, "softcap": 5.0, "bias": True}, id="mapped"),
    pytest.param({"scale": -1.5, "bias": True, "names": PLAIN}, id="exponentials"),
]


@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize(("dtype", "n", "d", "v", "k", "tile"), GRID)
def test_everything_at_once(
    cpp: ModuleType, dtype: torch.dtype, n: int, d: int, v: int, k: int, tile: int, options: Any
) -> None:
    everything_at_once(cpp, Case(n, d, v, k, dtype, **options), tile)


@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize(("n", "d", "v", "k", "tile"), [(7, 34, 131, 1, 64), (5, 8, 37, 3, 16)])
def test_everything_with_rounded_products(
    half: ModuleType, n: int, d: int, v: int, k: int, tile: int, options: Any
) -> None:
    everything_at_once(half, Case(n, d, v, k, torch.bfloat16, **options), tile)


def everything_at_once(cpp: ModuleType, case: Case, tile: int) -> None:
    """Statistics, two sweeps, and chunks with and without room or a start, against the oracle."""
    exact = case.doubled()
    floor = FLOOR[case.dtype]
    rounded = case.dtype == torch.bfloat16 and cpp.half_products(case.args[0].shape[1])
    assert_all_no_worse(
        case.statistics(cpp, tile), case.statistics(reference), exact.statistics(reference), floor
    )
    assert_all_no_worse(
        case.two_sweeps(cpp, tile),
        case.two_sweeps(reference),
        exact.two_sweeps(reference),
        floor,
        rounded,
    )
    for padding, start in ((5, None), (0, 0.5)):
        assert_all_no_worse(
            case.chunk(cpp, tile, padding=padding, start=start),
            case.chunk(reference, start=start),
            exact.chunk(reference, start=start),
            floor,
            rounded,
        )


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("name", [n for n in EVERYTHING if n != "target"])
def test_each_statistic_and_its_term(cpp: ModuleType, name: str, softcap: float) -> None:
    """Alone, in float64, where a wrong term cannot hide behind another or behind rounding."""
    case = Case(6, 5, 41, 2, torch.float64, names=("target", name), softcap=softcap, bias=True)
    for way in (case.statistics, case.two_sweeps, case.chunk):
        ours, exact = way(cpp, 16), way(reference)
        for key in exact:
            torch.testing.assert_close(ours[key], exact[key], rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("v", [131, 4099], ids=["one tile", "three tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits(cpp: ModuleType, dtype: torch.dtype, v: int) -> None:
    case = Case(5, 9, v, 2, dtype)
    target, a, teacher = case.args[5:]
    z = reference.linear_logits(*case.args[:5]).to(dtype)
    runs = []
    for module, logits in ((cpp, z), (reference, z), (reference, z.double())):
        wide = [t.to(logits.dtype) for t in (a, teacher)]
        found = module.logits_statistics(logits, target, *wide, case.names)
        coefficients = [
            None if c is None else c.to(accumulate_dtype(logits.dtype)) for c in case.coefficients
        ]
        dz = torch.empty_like(logits)
        module.logits_gradient(logits, target, *wide, case.names, found, coefficients, dz)
        in_place = logits.clone()
        module.logits_gradient(in_place, target, *wide, case.names, found, coefficients, in_place)
        assert torch.equal(in_place, dz)
        runs.append({**dict(zip(case.outs, found, strict=True)), "dz": dz})
    assert_all_no_worse(*runs, FLOOR[dtype])


def strided(t: Tensor) -> Tensor:
    """The same values with no dense dimension."""
    if t.ndim == 1:
        return torch.stack([t, torch.full_like(t, 9)], 1)[:, 0]
    return torch.stack([t.T, torch.full_like(t.T, 9)], 2)[:, :, 0].T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(best: ModuleType, dtype: torch.dtype) -> None:
    case = Case(6, 5, 41, 2, dtype, scale=0.5, bias=True)
    other = Case(6, 5, 41, 2, dtype, scale=0.5, bias=True)
    other.args = tuple(strided(a) if isinstance(a, Tensor) and a.ndim else a for a in case.args)
    other.coefficients = [None if c is None else strided(c) for c in case.coefficients]
    for way, twin in (
        (case.statistics, other.statistics),
        (case.two_sweeps, other.two_sweeps),
        (case.chunk, other.chunk),
    ):
        dense, sparse = way(best, 16), twin(best, 16)
        for key in dense:
            torch.testing.assert_close(sparse[key], dense[key], rtol=2e-6, atol=2e-6, msg=key)


def test_expanded_operands(best: ModuleType) -> None:
    case = Case(4, 5, 19, 1, torch.float32, bias=True)
    x, w, b, s, softcap, _, a, teacher = case.args
    case.args = (
        x[:1].expand(4, 5), w, b[:1].expand(19), s, softcap,
        torch.tensor([[3]]).expand(4, 1), a[:1].expand(19), teacher[:1].expand(4, 19),
    )  # fmt: skip
    exact = case.doubled()
    for way, truth in ((case.two_sweeps, exact.two_sweeps), (case.chunk, exact.chunk)):
        assert_all_no_worse(way(best, 8), way(reference), truth(reference), FLOOR[torch.float32])


def test_gradients_of_any_layout(best: ModuleType) -> None:
    """dx, dw and db that the caller laid out in its own way."""
    case = Case(6, 5, 41, 1, torch.float32, names=PLAIN)
    found = best.linear_statistics(*case.args, case.names, 16)
    dense = case.two_sweeps(best, 16)
    dx, dw = torch.empty(5, 6).T, torch.empty(5, 41).T
    db = torch.empty(41, 2)[:, 0]
    best.linear_gradient(*case.args, case.names, found, case.coefficient_list(), dx, dw, db, 16)
    for ours, theirs in zip((dx, dw, db), dense.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for skipped in range(3):
        wanted: list[Tensor | None] = [torch.empty_like(t) for t in dense.values()]
        wanted[skipped] = None
        best.linear_gradient(*case.args, case.names, found, case.coefficient_list(), *wanted, 16)
        for ours, theirs in zip(wanted, dense.values(), strict=True):
            assert ours is None or torch.equal(ours, theirs)


def test_more_rows_than_a_block(best: ModuleType) -> None:
    """Two blocks of rows (2048 and 2): dw and db are summed across them, dx is not."""
    case = Case(2050, 3, 20, 1, torch.float32, names=("target", "lse", "sum"), bias=True)
    exact = case.doubled()
    assert_all_no_worse(
        case.two_sweeps(best, 8), case.two_sweeps(reference), exact.two_sweeps(reference), 1e-6
    )


@pytest.mark.parametrize("names", [EVERYTHING, PLAIN], ids=["everything", "exponentials"])
def test_common_offset(cpp: ModuleType, names: Sequence[str]) -> None:
    """Logits near 1e4 cost no more than in PyTorch: statistics are relative."""
    names = [n for n in names if n != "softplus"]  # absolute by definition
    case = Case(6, 7, 90, 1, torch.float32, names=names, bias=True)
    x, w, b, *rest = case.args
    # Exact in float32: the logits are multiples of 1/64 near 1e4.
    x, w, b = (x * 2).round() / 4, (w * 2).round() / 4, (b * 4).round() / 16 + 10000.0
    case.args = (x, w, b, *rest)
    exact = case.doubled()
    for way, truth in ((case.statistics, exact.statistics), (case.chunk, exact.chunk)):
        assert_all_no_worse(way(cpp, 32), way(reference), truth(reference), 4e-7)


@pytest.mark.parametrize("names", [EVERYTHING, PLAIN], ids=["everything", "exponentials"])
def test_minus_infinity(cpp: ModuleType, names: Sequence[str]) -> None:
    """Classes cut by a bias of -inf: a whole first tile of them, and at a target."""
    names = [n for n in names if n not in ("sum", "sumsq", "weighted_sum", "below_target")]
    case = Case(8, 5, 70, 1, torch.float32, names=names, bias=True)
    case.args[2][:20] = -torch.inf
    case.args[2][60] = -torch.inf
    exact = case.doubled()
    for way, truth in (
        (case.statistics, exact.statistics),
        (case.two_sweeps, exact.two_sweeps),
        (case.chunk, exact.chunk),
    ):
        assert_all_no_worse(way(cpp, 16), way(reference), truth(reference), FLOOR[torch.float32])


@pytest.mark.parametrize("names", [("target", "lse", "entropy", "max", "lse@2"), PLAIN])
def test_no_negatives(cpp: ModuleType, names: Sequence[str]) -> None:
    """V = 1 with its target, and rows whose negatives are all -inf: finite gradients."""
    case = Case(3, 4, 9, 1, torch.float32, names=names, bias=True)
    case.args[5][:] = 4
    case.args[2][:] = -torch.inf
    case.args[2][4] = 0.0
    found = case.chunk(cpp, 4)
    expected = {"lse": -torch.inf, "shift": 0.0, "argmax": -1, "mean": 0.0}
    for key in expected.keys() & found.keys():
        assert found[key].tolist() == [expected[key]] * 3, key
    exact = case.doubled().chunk(reference)
    for key in ("dx", "dw", "db"):
        torch.testing.assert_close(found[key].double(), exact[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
@pytest.mark.parametrize("column", [1, 33], ids=["first tile", "last tile"])
def test_poison(cpp: ModuleType, column: int, poison: float) -> None:
    """+inf and NaN reach lse and, by NaN coefficients or not, the row's whole gradient."""
    for names in (PLAIN, ("target", "lse", "entropy", "lse@2")):
        case = Case(3, 4, 34, 1, torch.float32, names=names)
        x, w, _, *rest = case.args
        case.args = (x, w, torch.zeros(34), *rest)
        case.args[5][:, 0] = 5
        case.args[2][column] = poison
        for found in (case.statistics(cpp, 16), case.chunk(cpp, 16)):
            want = reference.linear_statistics(*case.args, case.names)
            for name, value in zip(case.outs, want, strict=True):
                torch.testing.assert_close(found[name], value, equal_nan=True, msg=name)
        assert case.chunk(cpp, 16)["dx"].isnan().all()
    clean = Case(3, 4, 34, 1, torch.float32, names=PLAIN)
    clean.args[0][1] = poison
    dx = clean.chunk(cpp, 16)["dx"]
    assert dx.isnan().all(1).tolist() == [False, True, False]
    assert dx[[0, 2]].isfinite().all()


@pytest.mark.parametrize("above", [30.0, 50.0, 200.0], ids=lambda a: f"{a:g} above")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_late_maximum(cpp: ModuleType, dtype: torch.dtype, above: float) -> None:
    """The largest logit comes last: what was kept relative to the first tile is rescaled."""
    case = Case(5, 4, 67, 1, dtype, names=PLAIN, bias=True)
    case.args[5][:, 0] = torch.tensor([3, 66, -1, 20, 65])
    case.args[2][65] += above / 2
    case.args[2][66] += above
    exact = case.doubled()
    assert_all_no_worse(
        case.chunk(cpp, 16), case.chunk(reference), exact.chunk(reference), FLOOR[dtype]
    )


@pytest.mark.parametrize("scale", [1.0, 2.0**-30, 2.0**-100], ids=lambda s: f"{s:.0e}")
def test_negligible_dz(cpp: ModuleType, scale: float) -> None:
    """A float32 row far below the largest coefficient counts 0, whatever the scale of them all."""
    case = Case(4, 5, 70, 1, torch.float32, names=("target", "lse", "lse@2"))
    for coefficient in case.coefficients:
        if coefficient is not None:
            coefficient *= scale
            coefficient[1] *= 0 if coefficient.dim() == 2 else 2.0**-110
    exact = case.doubled()
    for ours, truth in (
        (case.two_sweeps(cpp, 16), exact.two_sweeps(cpp, 16)),
        (case.chunk(cpp, 16), exact.chunk(cpp, 16)),
    ):
        assert (ours["dx"][1] == 0).all()
        assert (truth["dx"][1] != 0).all()
        for key in ("dx", "dw", "db"):
            found, value = ours[key].double() / scale, truth[key] / scale
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5, msg=key)


def test_a_small_class_vector_is_not_negligible(cpp: ModuleType) -> None:
    case = Case(4, 5, 70, 0, torch.float32, names=("weighted_sum",))
    case.args[6].mul_(2.0**-110)
    exact = case.doubled()
    for ours, truth in (
        (case.two_sweeps(cpp, 16), exact.two_sweeps(cpp, 16)),
        (case.chunk(cpp, 16), exact.chunk(cpp, 16)),
    ):
        for key in ("dx", "dw", "db"):
            found, value = ours[key].double() * 2.0**110, truth[key] * 2.0**110
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5, msg=key)


def test_ties_take_the_lowest_id(cpp: ModuleType) -> None:
    z = torch.zeros(1, 50)
    z[0, [11, 30, 31]] = 2.0
    z[0, [7, 40]] = 1.0
    names = canonical(("target", "max", "runner_up", "below_target"))
    for target, expected in ((30, (11, 31, 7)), (11, (30, 31, 7)), (40, (11, 30, 0))):
        found = dict(
            zip(
                outputs(names),
                cpp.logits_statistics(z, torch.tensor([[target]]), None, None, names),
                strict=True,
            )
        )
        ids = tuple(int(found[i]) for i in ("argmax", "runner_up_index", "below_target_index"))
        assert ids == expected


def test_extremes_across_tiles(cpp: ModuleType) -> None:
    """Values of few levels, so that ties meet at every kind of tile boundary."""
    g = torch.Generator().manual_seed(0)
    x = torch.ones(64, 1)
    names = canonical(("target", "max", "runner_up", "below_target"))
    target = torch.randint(0, 23, (64, 1), generator=g)
    for seed in range(8):
        w = torch.randint(0, 4, (23, 1), generator=g.manual_seed(seed)).float()
        args = (x, w, None, None, 0.0, target, None, None, names)
        want = reference.linear_statistics(*args)
        for ours, theirs in zip(cpp.linear_statistics(*args, 4), want, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("names", [EVERYTHING, PLAIN], ids=["everything", "exponentials"])
def test_same_bits_twice(best: ModuleType, names: Sequence[str]) -> None:
    case = Case(65, 16, 300, 2, torch.float32, names=names, bias=True)
    for way in (case.statistics, case.two_sweeps, case.chunk):
        once, twice = way(best, 64), way(best, 64)
        assert all(torch.equal(once[key], twice[key]) for key in once)


def test_schedules_agree(best: ModuleType) -> None:
    case = Case(33, 16, 300, 1, torch.float32, names=PLAIN, bias=True)
    one, two = case.chunk(best, 64), case.two_sweeps(best, 64)
    for key in two:
        torch.testing.assert_close(one[key], two[key], rtol=2e-6, atol=2e-6)


def test_chunks_accumulate(best: ModuleType) -> None:
    """Rows in two chunks give the dw and db of all of them at once."""
    case = Case(10, 6, 40, 1, torch.float32, names=PLAIN, bias=True)
    whole = case.chunk(best, 16)
    x, w, b, s, softcap, target, a, teacher = case.args
    dw, db = torch.empty_like(w), torch.empty_like(b)
    wanted = ["target", "lse"]
    for rows in (slice(0, 7), slice(7, 10)):
        part = (x[rows], w, b, s, softcap, target[rows], a, teacher[rows], case.names, wanted)
        buffer = torch.empty(part[0].shape[0], 48)[:, :40]
        found = best.linear_chunk_statistics(*part, buffer, 16)
        coefficients = [None if c is None else c[rows] for c in case.coefficient_list()]
        dx = torch.empty_like(part[0])
        best.linear_chunk_gradient(
            *part, buffer, found, coefficients, dx, dw, db, rows.start > 0, 16
        )
        torch.testing.assert_close(dx, whole["dx"][rows])
    torch.testing.assert_close(dw, whole["dw"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, whole["db"], rtol=1e-5, atol=1e-5)


def test_a_buffer_of_bfloat16(half: ModuleType) -> None:
    """It holds the bits that the products would round to, so that only db differs."""
    for n, d, v, k, tile, last in (
        (7, 8, 33, 1, 16, 1.0),
        (65, 64, 1001, 2, 128, 1.0),
        (9, 6, 50, 1, 7, 40.0),
        (3, 2, 1, 1, 4, 1.0),
        (4, 2, 9, 0, 4, 1.0),
    ):
        case = Case(n, d, v, k, torch.bfloat16, names=PLAIN, scale=1.5, bias=True)
        x, w = case.args[:2]
        w[-2:] *= last  # offsets of early tiles are far too low then
        if n > 7:
            x[0], x[1, 0] = 0.0, torch.inf
            case.args[2][v // 2] = -torch.inf
        room = 3 + (v + 3) % 2
        rounded = case.chunk(half, tile, padding=room, dtype=torch.bfloat16)
        for name, whole in case.chunk(half, tile, padding=room).items():
            if name == "db":
                torch.testing.assert_close(
                    rounded[name], whole, rtol=0, atol=2.0**-8 * n, equal_nan=True
                )
            else:
                torch.testing.assert_close(rounded[name], whole, rtol=0, atol=0, equal_nan=True)
        with pytest.raises(RuntimeError, match="and room for 3 more values a row"):
            case.chunk(half, tile, padding=1 + v % 2, dtype=torch.bfloat16)


# A maximum that comes last, one that rises from tile to tile, an offset in common, absent classes;
# multiples of 1/4, which bfloat16 has.
ROWS = {
    "random": lambda g: torch.randn(48, generator=g) * 3,
    "last": lambda g: torch.cat([torch.randn(47, generator=g), torch.tensor([20.0])]),
    "rising": lambda g: torch.arange(48.0) / 4 + torch.randn(48, generator=g),
    "offset": lambda g: torch.randn(48, generator=g) * 2 + 50,
    "absent": lambda g: torch.where(torch.rand(48, generator=g) < 0.8, -torch.inf, 1.0),
}


@pytest.mark.parametrize("tile", [8, 13, 64])
@pytest.mark.parametrize("row", ROWS)
def test_the_error_of_logits_in_float16(half: ModuleType, row: str, tile: int) -> None:
    """Of q = softmax(z): w is the identity, so that dx is dz; a scale gives z more digits than
    float16 has.
    """
    random = torch.Generator().manual_seed(3)
    case = Case(6, 48, 48, 0, torch.bfloat16, names=("lse", "sum"))
    rows = (torch.stack([ROWS[row](random) for _ in range(6)]) * 4).round() / 4
    absent = row == "absent"
    x = torch.randn(6, 48, generator=random).bfloat16() if absent else rows.bfloat16()
    b = rows[0].bfloat16() if absent else None
    case.args = (x, torch.eye(48).bfloat16(), b, torch.tensor(1.37), 0.0, None, None, None)
    exact = case.doubled()
    z = reference.linear_logits(*exact.args[:5])
    given = dict(zip(case.outs, case.coefficients, strict=True))
    slope = z.softmax(1) * given["lse"].abs().unsqueeze(1)
    # Each tile may move the origin once, to where no later logit is more than 1 above it.
    off = (z.amax(1, keepdim=True) - z + 1) * 2.0**-11 * -(-48 // tile)
    dz = exact.chunk(reference)["dx"]
    limit = (slope * off.exp() * off).nan_to_num(0.0) + 2.0**-8 * dz.abs() + 1e-6
    found = case.chunk(half, tile, padding=4, dtype=torch.float16)["dx"]
    assert ((found - dz).abs() <= limit).all()


KEPT = [
    canonical(names)
    for name in (*STATISTICS, "lse@2", "lse@0.5")
    for names in (("target", "lse", name), ("target", name))
    if kept_dtype(0.0, names, names) == torch.float16
]


@pytest.mark.parametrize("names", KEPT, ids="-".join)
def test_each_term_of_logits_in_float16(half: ModuleType, names: Sequence[str]) -> None:
    """Statistics are those of logits that were not rounded; no term of the gradient is missing."""
    for n, v, tile in ((6, 41, 16), (5, 96, 2048)):
        case = Case(n, 8, v, 2, torch.bfloat16, names=names, bias=True, scale=1.3)
        room = 4 + v % 2
        whole = case.chunk(half, tile, padding=room)
        found = case.chunk(half, tile, padding=room, dtype=torch.float16)
        for key in case.outs:
            torch.testing.assert_close(found[key], whole[key], rtol=1e-6, atol=1e-6)
        exact = case.doubled().chunk(reference)
        for key in ("dx", "dw", "db"):
            # db sums dz as it was rounded for the products, whose terms may cancel.
            atol = (0.03 if key == "db" else 0.01) * float(exact[key].abs().max())
            torch.testing.assert_close(found[key].double(), exact[key], rtol=0, atol=atol, msg=key)
        added = case.chunk(half, tile, padding=room, dtype=torch.float16, start=0.5)
        for key in ("dw", "db"):
            torch.testing.assert_close(added[key], found[key] + 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("lse", "sum"), ("lse", "entropy"), ("softplus",)])
def test_logits_in_float16_that_are_no_numbers(half: ModuleType, names: Sequence[str]) -> None:
    """Rows with infinities and NaN in any tile are what they are with a buffer of float32."""
    for bad in (torch.inf, -torch.inf, torch.nan):
        for column in (0, 20, 39):
            case = Case(4, 6, 40, 1, torch.bfloat16, names=("target", *names), bias=True)
            case.args[2][column] = bad
            case.args[5][:, 0] = torch.tensor([5, 20, -1, column])
            whole = case.chunk(half, 16, padding=4)
            rounded = case.chunk(half, 16, padding=4, dtype=torch.float16)
            for key, value in whole.items():
                if key in ("dx", "dw", "db"):
                    finite = value.nan_to_num(0, 0, 0).abs()
                    atol = 0.01 * float(finite.max())
                else:
                    atol = 0.0
                torch.testing.assert_close(
                    rounded[key], value, rtol=0, atol=atol, equal_nan=True, msg=f"{key}, {bad}"
                )


@pytest.mark.parametrize("tile", [16, 2048])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_ties_with_a_target_that_is_looked_up_first(
    half: ModuleType, softcap: float, tile: int
) -> None:
    """Classes equal to the target's, before its tile and behind it, are none below it."""
    case = Case(70, 34, 51, 2, torch.bfloat16, names=("target", "below_target"), softcap=softcap,
                bias=True, scale=0.7)  # fmt: skip
    x, w, b, _, _, target, *_ = case.args
    w[::5], b[::5] = w[20].clone(), b[20].clone()
    target[::2, 0] = 20
    target[:, 1] = -1
    for bad in (None, torch.nan):  # a target that is no number takes a second look at all rows
        if bad is not None:
            x[3, 0] = bad
        z = half_logits(half, case)
        for found in (
            case.statistics(half, tile),
            case.chunk(half, tile),
            *([] if softcap else [case.chunk(half, tile, padding=5, dtype=torch.float16)]),
        ):
            at = torch.arange(70)
            own = target[:, 0]
            limit = torch.where(own < 0, -torch.inf, z[at, own.clamp_min(0)])
            below = z.masked_fill(~(z < limit.unsqueeze(1)), -torch.inf)
            top, index = below.max(1)
            index = torch.where(top == -torch.inf, -1, index)
            shift = z.scatter(1, own.clamp_min(0).unsqueeze(1), -torch.inf).amax(1)
            rows = at[(own >= 0) & (at != 3)]
            assert torch.equal(found["below_target_index"][rows], index[rows])
            torch.testing.assert_close(found["below_target"][rows], (top - shift)[rows])


def half_logits(half: ModuleType, case: Case) -> Tensor:
    """The module's own logits (N, V), to their last bits: what a chunk of float32 holds."""
    x, w = case.args[:2]
    buffer = torch.empty(x.shape[0], w.shape[0])
    half.linear_chunk_statistics(*case.args[:5], None, None, None, ("max",), ["max"], buffer)
    return buffer


def test_products_that_do_not_round(cpp: ModuleType) -> None:
    case = Case(3, 5, 20, 1, torch.bfloat16, names=PLAIN)  # an odd depth
    with pytest.raises(RuntimeError, match="a buffer of BFloat16 needs products of bfloat16"):
        case.chunk(cpp, 8, padding=4, dtype=torch.bfloat16)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("name", [*STATISTICS, "lse@2", "lse@5", "lse<0.3"])
@pytest.mark.parametrize("collected", [False, True], ids=["wanted", "collected"])
def test_what_is_kept(half: ModuleType, name: str, collected: bool, softcap: float) -> None:
    """The rule that plans a chunk is the one that the kernels hold it to."""
    for names in (canonical((*PLAIN, name)), canonical(("target", name))):
        case = Case(3, 4, 20, 1, torch.bfloat16, names=names, softcap=softcap)
        if collected:
            kinds = zip(case.coefficients, case.outs, strict=True)
            case.coefficients = [c if o in ("target", "lse") else None for c, o in kinds]
        wanted = [o for o, c in zip(case.outs, case.coefficients, strict=True) if c is not None]
        kept = kept_dtype(softcap, case.names, wanted)
        if kept is not None:
            case.chunk(half, 8, padding=4, dtype=kept)
        refused = {torch.float16: {torch.bfloat16}, torch.bfloat16: set()}
        for dtype in refused.get(kept, {torch.float16, torch.bfloat16}):  # type: ignore[arg-type]
            with pytest.raises(RuntimeError, match="needs products of bfloat16"):
                case.chunk(half, 8, padding=4, dtype=dtype)


def test_logits_further_apart_than_float16_reaches(half: ModuleType) -> None:
    """They are as far as it reaches, and the gradient stays finite."""
    case = Case(3, 4, 40, 1, torch.bfloat16, names=("target", "lse", "sum"), bias=True)
    case.args[2][::3] = -2e5
    case.args[2][30] = 7e4  # the origin moves by more than float16 reaches
    found = case.chunk(half, 16, padding=4, dtype=torch.float16)
    for key in ("dx", "dw", "db"):
        assert found[key].isfinite().all()


@pytest.fixture
def loaded() -> Iterator[ModuleType]:
    """The module that public functions take, whose products round to bfloat16."""
    module = load_cpu_module()
    assert isinstance(module, ModuleType)
    own = module.half_products(2)
    module.portable_half_products(not own)
    yield module
    module.portable_half_products(False)


SQUARES = {
    "masked": lambda s: s.logsumexp + 1e-12 * s.sumsq,
    "far": lambda s: s.moment,
    "small": lambda s: s.moment,
    "small, variance": lambda s: s.variance,
}


@pytest.mark.parametrize("kind", SQUARES)
def test_squares_of_logits_that_float16_does_not_reach(loaded: ModuleType, kind: str) -> None:
    """dz is linear in z there, however small or far: such chunks are float32."""
    random = torch.Generator().manual_seed(5)
    size = {"masked": 0.3, "far": 1e5}.get(kind, 1e-8)
    x = torch.randn(64, 32, generator=random).bfloat16()
    w = (torch.randn(512, 32, generator=random) * size).bfloat16()
    b = torch.zeros(512).bfloat16()
    if kind == "masked":
        b[:200] = -1e4
    y = torch.randint(200, 512, (64,), generator=random)
    names = ("target", "lse", "sumsq" if "variance" not in kind else "variance")

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w)]
        loss = lossops.linear_loss(
            *leaves, y, SQUARES[kind], names=names, linear_bias=b.to(dtype),
            backend="cpp" if dtype == torch.bfloat16 else "reference",
        )  # fmt: skip
        return list(torch.autograd.grad(loss, leaves))

    for found, true in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert float((found.double() - true).norm()) <= 0.01 * float(true.norm())


def test_capabilities_agree() -> None:
    """The module for any processor and the one for this one differ by rounding."""
    modules = [importlib.import_module(name) for name in MODULES]
    case = Case(9, 16, 200, 2, torch.float32, scale=0.5, bias=True)
    for way in (case.statistics, case.two_sweeps, case.chunk):
        first, *others = [way(module, 64) for module in modules]
        for other in others:
            for key in first:
                torch.testing.assert_close(other[key], first[key], rtol=3e-6, atol=3e-6, msg=key)
    assert [m.capability for m in modules] == [n.rpartition("_")[2] for n in MODULES]


def test_threads(best: ModuleType) -> None:
    """Python threads share nothing; the thread count of torch is only a matter of speed."""
    case = Case(65, 16, 300, 1, torch.float32, bias=True)
    alone = case.chunk(best, 64)
    results: list[dict[str, Tensor]] = []
    workers = [
        threading.Thread(target=lambda: results.append(case.chunk(best, 64))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3
    for result in results:
        for key in alone:
            torch.testing.assert_close(result[key], alone[key], rtol=2e-6, atol=2e-6, msg=key)


def test_wrong_arguments(best: ModuleType) -> None:
    x, w = torch.zeros(3, 4), torch.zeros(5, 4)
    rest = (None, None, None)
    with pytest.raises(RuntimeError, match=r"w must have shape \(V, 4\)"):
        best.linear_statistics(x, w[:, :3], None, None, 0.0, *rest, ("lse",))
    with pytest.raises(RuntimeError, match=r"b must have shape \(5,\)"):
        best.linear_statistics(x, w, torch.zeros(4), None, 0.0, *rest, ("lse",))
    with pytest.raises(RuntimeError, match="statistic 'teacher' needs teacher"):
        best.linear_statistics(x, w, None, None, 0.0, *rest, ("teacher",))
    with pytest.raises(RuntimeError, match="must be canonical statistics, got 'entropies'"):
        best.linear_statistics(x, w, None, None, 0.0, *rest, ("entropies",))
    with pytest.raises(RuntimeError, match=r"target must be int64 of shape \(3, K\)"):
        best.linear_statistics(x, w, None, None, 0.0, torch.zeros(3), None, None, ("lse",))
    with pytest.raises(RuntimeError, match="buffer must be Float of shape"):
        best.linear_chunk_statistics(
            x, w, None, None, 0.0, *rest, ("lse",), ("lse",), torch.zeros(3, 6)
        )
    buffer = torch.zeros(3, 6)[:, :5]
    head = (x, w, None, None, 0.0, *rest, ("lse", "sum"), ("lse",), buffer)
    found = best.linear_chunk_statistics(*head)
    ones = [None, torch.ones(3), torch.ones(3)]
    with pytest.raises(RuntimeError, match="coefficients must be of the outputs in wanted"):
        best.linear_chunk_gradient(*head, found, ones, torch.empty(3, 4), None, None, False)
