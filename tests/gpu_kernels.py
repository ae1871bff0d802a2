"""The kernels of a GPU backend against `lossops.reference`: tests that Triton and CUDA share.

A suite imports all of this and has the fixtures ``module``, the backend's primitives, and
``shuffled``, a context in which blocks of a launch run in another order.

The oracle is the reference in float64, the budget twice the error of the reference in the inputs'
own dtype (tests/test_cpu_backend.py); where a kernel rounds dr to half precision for the two
products of the gradients, so does that reference. A block takes some 30 ms with all statistics: few
rows, and sizes that each are a regime of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOOR as ROUNDINGS
from conftest import assert_no_worse, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_backend import (
    EVERYTHING,
    FLOOR,
    PLAIN,
    Case,
    assert_all_no_worse,
    strided,
)
from test_pairs import KINDS, binary_of, padded, pair_gradient_of
from torch import Tensor

from lossops import gpu_linear, reference, reference_pairs
from lossops.binary import negative_slope
from lossops.gpu_layout import Logits, Spec
from lossops.gpu_linear import Kernels
from lossops.reference import accumulate_dtype
from lossops.statistics import canonical, outputs

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
Found = dict[str, Tensor]
Shuffled = Callable[[int | None], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def kernels(module: Any) -> Kernels:
    """The kernels of the backend."""
    return module.kernels


def rounded(dr: Tensor, dtype: torch.dtype) -> Tensor:
    """dr as the kernels round it: to bfloat16, or to float16 after a power of two."""
    largest = dr.abs().amax() if dr.numel() else dr.new_zeros(())
    unit = 1.0
    if dtype == torch.float16 and 0 < largest < torch.inf:
        unit = 2.0 ** (14 - torch.frexp(largest).exponent)
    return (dr * unit).to(dtype).float() / unit


def rounding_reference(dtype: torch.dtype) -> Any:
    """`lossops.reference` with dr rounded to a dtype between statistics and products."""

    def chunk_gradient(*args: Any) -> None:
        *head, dx, dw, db, accumulate = args
        x, w, _, scale, softcap, target, a, teacher, names, _, buffer, found, coefficients = head
        factor = reference.linear_chunk_negatives(*head)
        products = (x, w, scale, buffer, factor)
        reference.linear_products(*products, None, None, db, accumulate)
        buffer.copy_(rounded(buffer, dtype))
        reference.linear_products(*products, dx, dw, None, accumulate)
        if target is not None:
            at = reference.target_gradient(
                softcap, w.shape[0], target, a, teacher, names, found, coefficients
            )
            xs = reference.scaled_rows(x, scale, buffer.dtype)
            reference.add_targets(dx, dw, db, xs, w, target, at)

    def gradient(*args: Any) -> None:
        *head, names, found, coefficients, dx, dw, db = args
        x, w = head[:2]
        buffer = torch.empty(x.shape[0], w.shape[0])
        reference.linear_chunk_statistics(*head, names, (), buffer)
        wide = [torch.empty(t.shape) for t in (dw, db)]
        chunk_gradient(*head, names, (), buffer, found, coefficients, dx, *wide, False)
        dw.copy_(wide[0]), db.copy_(wide[1])

    return SimpleNamespace(
        linear_statistics=reference.linear_statistics,
        linear_chunk_statistics=reference.linear_chunk_statistics,
        linear_chunk_gradient=chunk_gradient,
        linear_gradient=gradient,
    )


def budget_of(case: Case, packs: bool = True) -> Any:
    """The reference that a case is measured by; ``packs``: whether its buffer can hold halves."""
    unbounded = case.dtype == torch.float16 and set(gpu_linear.UNBOUNDED) & set(case.outs)
    if case.dtype in HALF and packs and not unbounded:
        return rounding_reference(case.dtype)
    return reference


def check(
    module: Any, case: Case, ways: tuple[str, ...] = ("statistics", "two_sweeps", "chunk")
) -> None:
    """Each way of a case within its budget."""
    exact, budget = case.doubled(), budget_of(case)
    for way in ways:
        ours, theirs = getattr(case, way)(module), getattr(case, way)(budget)
        assert_all_no_worse(ours, theirs, getattr(exact, way)(reference), FLOOR[case.dtype])


# N, D, V, K: rows that are no multiple of anything; vectors without an edge and no target; more
# targets than features; one class, one row, none.
SHAPES = {
    "ragged": (3, 72, 203, 1),
    "no target": (2, 16, 64, 0),
    "three targets": (2, 2, 37, 3),
    "V1": (3, 4, 1, 1),
    "N1": (1, 5, 9, 2),
    "N0": (0, 4, 7, 1),
}
GRID = [
    pytest.param(dtype, *shape, id=f"{dtype}-{name}".removeprefix("torch."))
    for dtype in DTYPES
    for name, shape in SHAPES.items()
    if dtype not in HALF or name in ("ragged", "N1", "N0")
]
MAPS = [
    pytest.param({}, id="plain"),
    pytest.param({"scale": 0.7, "softcap": 5.0, "bias": True}, id="mapped"),
    pytest.param({"scale": -1.5, "bias": True, "names": PLAIN}, id="exponentials"),
]


@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize(("dtype", "n", "d", "v", "k"), GRID)
def test_everything_at_once(
    module: Any, dtype: torch.dtype, n: int, d: int, v: int, k: int, options: Any
) -> None:
    check(module, Case(n, d, v, k, dtype, **options))


@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_buffer_at_any_boundary(module: Any, dtype: torch.dtype, padding: int) -> None:
    """Row strides of 84 to 87: one of them packs, the others begin anywhere in 16 bytes."""
    case = Case(3, 9, 84, 1, dtype, names=PLAIN, bias=True)
    exact, budget = case.doubled(), budget_of(case, packs=padding == 0)
    for start in (None, 0.5):
        assert_all_no_worse(
            case.chunk(module, padding=padding, start=start),
            case.chunk(budget, start=start),
            exact.chunk(reference, start=start),
            FLOOR[dtype],
        )


@pytest.mark.parametrize("name", [n for n in EVERYTHING if n != "target"])
def test_each_statistic_and_its_term(module: Any, name: str) -> None:
    """Alone: a wrong term cannot hide behind another, a flag not behind one that implies it."""
    case = Case(2, 5, 41, 2, torch.float32, names=("target", name), softcap=3.0, bias=True)
    check(module, case)
    case = Case(2, 20, 41, 2, torch.bfloat16, names=("target", name))
    check(module, case, ("statistics",))


def test_many_log_sums(module: Any) -> None:
    """More than a kernel keeps at once; temperatures around 1, limits around 0."""
    temperatures = [f"lse@{t}" for t in (0.1, 0.5, 1, 2, 3, 4, 5)]
    limits = [f"lse<{t}" for t in (-1, 0, 0.5, 2, 100)]
    names = canonical(("target", "lse", *temperatures, *limits))
    check(module, Case(2, 5, 41, 2, torch.float32, names=names, bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits(module: Any, dtype: torch.dtype) -> None:
    """Rows of logits at any boundary, dz out of place, in place, at another boundary, strided."""
    case = Case(4, 9, 131, 2, dtype)
    target, a, teacher = case.args[5:]
    z = reference.linear_logits(*case.args[:5]).to(dtype)
    runs = []
    for primitives, logits in ((module, z), (reference, z), (reference, z.double())):
        wide = [t.to(logits.dtype) for t in (a, teacher)]
        found = primitives.logits_statistics(logits, target, *wide, case.names)
        given = [
            None if c is None else c.to(accumulate_dtype(logits.dtype)) for c in case.coefficients
        ]
        dz = torch.empty_like(logits)
        primitives.logits_gradient(logits, target, *wide, case.names, found, given, dz)
        runs.append({**dict(zip(case.outs, found, strict=True)), "dz": dz})
        if primitives is reference:
            continue
        wider = torch.empty(4, 150, dtype=dtype)
        for out in (logits.clone(), wider[:, 3:134], strided(torch.empty_like(dz))):
            same = out.copy_(logits) if out.stride() == logits.stride() else logits
            module.logits_gradient(same, target, *wide, case.names, found, given, out)
            assert torch.equal(out, dz)
        shifted = torch.empty(4, 150, dtype=dtype)[:, 5:136].copy_(logits)
        again = module.logits_statistics(shifted, target, *wide, case.names)
        assert_all_no_worse(
            dict(zip(case.outs, again, strict=True)),
            dict(zip(case.outs, found, strict=True)),
            {name: t.double() for name, t in zip(case.outs, found, strict=True)},
            FLOOR[torch.float32],
        )
    assert_all_no_worse(*runs, FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(module: Any, dtype: torch.dtype) -> None:
    dense = Case(3, 16, 41, 2, dtype, scale=0.5, bias=True)
    sparse = Case(3, 16, 41, 2, dtype, scale=0.5, bias=True)
    sparse.args = tuple(strided(a) if isinstance(a, Tensor) and a.ndim else a for a in dense.args)
    sparse.coefficients = [None if c is None else strided(c) for c in dense.coefficients]
    for way in ("statistics", "two_sweeps", "chunk"):
        one, other = (getattr(case, way)(module) for case in (dense, sparse))
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=2e-6, atol=2e-6, msg=key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_teachers_of_any_dtype(module: Any, dtype: torch.dtype) -> None:
    """As in the reference: what the kernels do not read is converted."""
    z, teacher = torch.randn(3, 40), torch.randint(0, 2, (3, 40))
    runs = []
    for taught in (teacher.float(), teacher.to(dtype)):
        found = module.logits_statistics(z, None, None, taught, ("teacher",))
        dz = torch.empty_like(z)
        module.logits_gradient(
            z, None, None, taught, ("teacher",), found, [None, torch.ones(3)], dz
        )
        runs.append([*found, dz])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def far_rows(t: Tensor, huge: np.ndarray) -> Tensor:
    """The rows of t more than 2^31 / N elements apart, in memory that takes none."""
    step = (2**31 // (t.shape[0] - 1) + 16) // 16 * 16
    of_dtype = torch.from_numpy(huge).view(t.dtype)
    return of_dtype.as_strided(t.shape, (step, 1)).copy_(t)


@pytest.fixture
def huge() -> np.ndarray:
    """2^31 elements and some of float32, none of which is touched."""
    return np.zeros(2**31 + 2**12, np.float32)


def test_logits_more_than_2_31_elements_apart(kernels: Kernels, huge: np.ndarray) -> None:
    case = Case(3, 9, 131, 1, torch.float32)
    x, w, _, _, _, target, a, teacher = case.args
    logits = Logits(torch.empty(3, 144)[:, :131].copy_(x @ w.T))
    far = Logits(far_rows(logits.r, huge))
    found = []
    for these in (logits, far):
        values = kernels.statistics(these, target, a, teacher, case.names)
        spec = Spec(target, a, teacher, case.names, values, case.coefficient_list())
        db = torch.empty(131)
        kernels.column_sums(these, spec, db, False)
        kernels.gradient(these, spec, these.r)
        found.append([*values, db, these.r])
    for near, other in zip(*found, strict=True):
        torch.testing.assert_close(other, near, rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1], ids=["x", "w"])
def test_operands_more_than_2_31_elements_apart(module: Any, which: int, huge: np.ndarray) -> None:
    case = Case(5, 17, 40, 1, torch.bfloat16, names=PLAIN)
    near = case.statistics(module)
    args = list(case.args)
    args[which] = far_rows(args[which], huge)
    case.args = tuple(args)
    for name, value in case.statistics(module).items():
        torch.testing.assert_close(value, near[name], rtol=0, atol=0, msg=name)


def test_gradients_of_classes_more_than_2_31_elements_apart(
    kernels: Kernels, huge: np.ndarray
) -> None:
    x, w = torch.randn(4, 20).bfloat16(), torch.randn(9, 20).bfloat16()
    target = torch.tensor([[8], [0], [8], [-1]])
    value, dw = torch.randn(4, 1), torch.randn(9, 20)
    far, db = far_rows(dw, huge), torch.zeros(9)
    kernels.add_targets(None, dw, db, x, None, w, target, value)
    kernels.add_targets(None, far, db, x, None, w, target, value)
    assert torch.equal(far, dw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_by_segments(kernels: Kernels, dtype: torch.dtype) -> None:
    """Many pairs of one class, rows without any, ids that are no class, a row stride."""
    x, w = torch.randn(30, 24, dtype=torch.float64).to(dtype)[:, :19], torch.randn(6, 19).to(dtype)
    target = torch.randint(-1, 6, (30, 3)).sort(1).values
    target[:, 1:] = target[:, 1:].masked_fill(target[:, 1:] == target[:, :-1], -1)
    value, scale = torch.randn(30, 3), torch.tensor(0.7)
    start = [torch.randn(30, 19), torch.randn(6, 19), torch.randn(6)]

    def added(function: Callable[..., None], *rest: Any, wide: bool = False) -> list[Tensor]:
        into = [t.double() if wide else t.clone() for t in start]
        function(*into, *rest)
        return into

    ours = added(kernels.add_targets, x, scale, w, target, value)
    theirs = added(reference.add_targets, x.float() * scale, w, target, value)
    xs = x.double() * scale.double()
    exact = added(reference.add_targets, xs, w.double(), target, value.double(), wide=True)
    for name, one, same, true in zip(("dx", "dw", "db"), ours, theirs, exact, strict=True):
        assert_no_worse(name, one, same, true)
    unknown = torch.where(target == -1, 77, target)
    again = added(kernels.add_targets, x, scale, w, unknown, value)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


# Values: infinities, NaN, offsets, coefficients.


@pytest.mark.parametrize("power", [-140, -120, 126])
def test_tiny_and_huge_coefficients_in_float16(module: Any, power: int) -> None:
    """The power of two that dr is multiplied by is a number, whatever the coefficients."""
    case = Case(3, 8, 50, 1, torch.float16, names=("target", "lse"))
    plain = case.chunk(module, padding=2)
    case.coefficients = [None if c is None else c * 2.0**power for c in case.coefficients]
    for name in ("dx", "dw"):
        found = case.chunk(module, padding=2)[name].double() * 2.0**-power
        largest = float(plain[name].abs().max())
        assert (found - plain[name]).abs().max() <= (0.2 if power == -140 else 1e-4) * largest


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_poisoned_coefficients_in_float16(module: Any, size: float, poison: float) -> None:
    """Those of one row leave the dx of all others as it is without them."""
    case = Case(3, 8, 50, 1, torch.float16, names=("target", "lse"))
    found = []
    for of_first in (size, poison):
        case.coefficients[case.outs.index("lse")] = torch.tensor([of_first, size, -size])
        found.append(case.chunk(module, padding=2)["dx"])
    assert not found[1][0].isfinite().any()
    assert torch.equal(found[0][1:], found[1][1:])


@pytest.mark.parametrize("names", [EVERYTHING, PLAIN], ids=["everything", "exponentials"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_minus_infinity(module: Any, names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Classes cut by a bias of -inf: a whole first tile of them, and at a target."""
    names = tuple(n for n in names if n not in ("sum", "sumsq", "weighted_sum", "below_target"))
    case = Case(4, 5, 150, 1, dtype, names=names, bias=True)
    case.args[2][:130] = -torch.inf
    case.args[2][140] = -torch.inf
    check(module, case)


@pytest.mark.parametrize("name", ["sum", "weighted_sum", "teacher"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_logits_reach_sums_over_all_classes(module: Any, name: str, value: float) -> None:
    """As they are, not as NaN; a factor below 0 turns them round."""
    z, a, teacher = torch.randn(3, 700), torch.rand(700), torch.rand(3, 700)
    z[0, 500], z[1, 0], a[0] = value, value, -1.0
    want = reference.logits_statistics(z, None, a, teacher, (name,))
    found = module.logits_statistics(z, None, a, teacher, (name,))
    torch.testing.assert_close(found[1], want[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("names", [("weighted_sum",), ("teacher",), EVERYTHING], ids=len)
@pytest.mark.parametrize(("offset", "masked"), [(0.0, -1e9), (1e4, -torch.inf), (1e4, -3e38)])
def test_masked_classes_cost_sums_nothing(
    module: Any, names: tuple[str, ...], offset: float, masked: float
) -> None:
    """What no weight takes, the first logit among it, is not what others are relative to."""
    names = tuple(n for n in names if n not in ("target", "below_target"))
    z, a, teacher = torch.randn(3, 700), torch.rand(700), torch.rand(3, 700).softmax(1)
    z = (z * 64).round() / 64 + offset
    for some in (slice(1), slice(650, 699)):
        z[:, some], teacher[:, some], a[some] = masked, 0.0, 0.0
    runs = []
    for primitives, acc in ((module, torch.float32), (reference, torch.float64)):
        call = (z.to(acc), None, a.to(acc), teacher.to(acc), names)
        found = dict(zip(outputs(names), primitives.logits_statistics(*call), strict=True))
        kept = ("weighted_sum", "teacher") if masked > -torch.inf else ("teacher",)
        runs.append({name: found[name] for name in kept if name in found})
    for name, ours in runs[0].items():
        torch.testing.assert_close(ours.double(), runs[1][name], rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("names", [("target", "lse", "entropy", "max", "lse@2"), PLAIN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_negatives(module: Any, names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Rows whose negatives are all -inf: finite gradients."""
    case = Case(3, 4, 9, 1, dtype, names=names, bias=True)
    case.args[5][:] = 4
    case.args[2][:] = -torch.inf
    case.args[2][4] = 0.0
    check(module, case)
    found = case.statistics(module)
    expected = {"lse": -torch.inf, "shift": 0.0, "argmax": -1, "mean": 0.0}
    for key in expected.keys() & found.keys():
        assert found[key].tolist() == [expected[key]] * 3, key


@pytest.mark.parametrize("mask", [-1e4, -1e9])
@pytest.mark.parametrize("first", [True, False])
def test_classes_masked_with_a_finite_number(module: Any, first: bool, mask: float) -> None:
    """Sums in which they have no part keep the digits of the others; so does a lone target."""
    case = Case(3, 4, 203, 1, torch.float32, names=("target", "lse", "weighted_sum"), bias=True)
    _, _, bias, *_, target, vector, _ = case.args
    masked = torch.arange(203) < 130 if first else torch.arange(203) != 7
    bias[masked], vector[masked] = mask, 0.0
    target[:, 0] = 150 if first else 7
    check(module, case)


def absolute(found: Found) -> Found:
    """Statistics that no shift matters to: what a row with NaN is relative to is nobody's."""
    values = {"lse": found["lse"] + found["shift"], "target": found["target"]}
    return {**values, **{name: found[name] for name in ("mean", "lse@2") if name in found}}


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_poison(module: Any, dtype: torch.dtype, poison: float) -> None:
    """+inf and NaN reach lse and the row's whole gradient, and no other row's."""
    for names in (PLAIN, ("target", "lse", "entropy", "lse@2")):
        case = Case(3, 4, 34, 1, dtype, names=names, bias=True)
        case.args[5][:, 0] = 5
        case.args[2][33] = poison
        want = absolute(case.statistics(reference))
        for found in (case.statistics(module), case.chunk(module)):
            ours = absolute(found)
            for name, value in want.items():
                torch.testing.assert_close(
                    ours[name], value, equal_nan=True, rtol=1e-5, atol=1e-5, msg=name
                )
        assert case.chunk(module)["dx"].isnan().all()
    clean = Case(3, 4, 34, 1, dtype, names=PLAIN)
    clean.args[0][1] = poison
    dx = clean.chunk(module)["dx"]
    assert dx.isnan().all(1).tolist() == [False, True, False]
    assert dx[[0, 2]].isfinite().all()


@pytest.mark.parametrize("above", [30.0, 200.0], ids=lambda a: f"{a:g} above")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_late_maximum(module: Any, dtype: torch.dtype, above: float) -> None:
    """The largest logit comes last: what was kept relative to an earlier part is rescaled."""
    case = Case(2, 16, 4300 if dtype == torch.float32 else 200, 1, dtype, names=PLAIN, bias=True)
    case.args[2][-2:] += torch.tensor([above / 2, above])
    check(module, case)


@pytest.mark.parametrize("names", [EVERYTHING, PLAIN], ids=["everything", "exponentials"])
@pytest.mark.parametrize("offset", [10000.0, -10000.0])
def test_common_offset(module: Any, offset: float, names: tuple[str, ...]) -> None:
    """Logits near ±1e4 cost no more than in PyTorch: statistics are relative."""
    names = tuple(n for n in names if n != "softplus")  # absolute by definition
    case = Case(3, 7, 90, 1, torch.float32, names=names, bias=True)
    x, w, b, *rest = case.args
    # Exact in float32: the logits are multiples of 1/64 near 1e4.
    x, w, b = (x * 2).round() / 4, (w * 2).round() / 4, (b * 4).round() / 16 + offset
    case.args = (x, w, b, *rest)
    check(module, case)


def test_extremes_across_tiles(module: Any) -> None:
    """Values of few levels, so that ties meet within and between parts; the lowest id wins."""
    draw = torch.Generator().manual_seed(0)
    names = canonical(("target", "max", "runner_up", "below_target"))
    z = torch.randint(0, 3, (2, 1100), generator=draw).float()
    z[1] = z[1].sort().values
    target = torch.tensor([[700], [3]])
    want = reference.logits_statistics(z, target, None, None, names)
    found = module.logits_statistics(z, target, None, None, names)
    for name, ours, theirs in zip(outputs(names), found, want, strict=True):
        assert torch.equal(ours, theirs), name
    x, w = torch.ones(3, 16).bfloat16(), torch.zeros(300, 16).bfloat16()
    w[:, 0] = z[0, :300]
    args = (x, w, None, None, 0.0, None, None, None, canonical(("max", "runner_up")))
    want = reference.linear_statistics(*args)
    for ours, theirs in zip(module.linear_statistics(*args), want, strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=15)
@given(
    n=st.integers(1, 3),
    d=st.integers(1, 20),
    v=st.integers(1, 150),
    k=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    begins=st.integers(0, 7),
)
def test_any_size(
    module: Any, n: int, d: int, v: int, k: int, dtype: torch.dtype, begins: int
) -> None:
    """x begins at any element of 16 bytes, as do the rows of the buffer."""
    case = Case(n, d, v, k, dtype, names=PLAIN, scale=0.5, bias=True)
    x = torch.empty(n, d + begins, dtype=dtype)[:, begins:].copy_(case.args[0])
    case.args = (x, *case.args[1:])
    check(module, case, ("statistics", "two_sweeps"))


# Pairs. dz is rounded to bfloat16 over its products, but for db, whose sums take it as it is.


def products_of_rounded(
    x: Tensor, w: Tensor, scale: Tensor, dz: Tensor, target: Tensor, at_target: Tensor
) -> list[Tensor]:
    """dx, before the factor scale, and dw of dz in float32, rounded as the kernels round it."""
    dx, dw = torch.empty(x.shape), torch.empty(w.shape)
    dz = rounded(dz, x.dtype) if x.dtype == torch.bfloat16 else dz
    reference.linear_products(x, w, scale, dz, torch.ones(x.shape[0]), dx, dw, None, False)
    reference.add_targets(dx, dw, None, x.float() * scale, w, target, at_target)
    return [dx, dw]


def pair_inputs(
    n: int, v: int, d: int, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, w, b, scale and target; the logits spread by 3."""
    x, w, b, _ = make_inputs(n, v, d, dtype, spread=3.0)
    return x, w, b, torch.tensor(1.3), padded(n, v, k)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of 256 classes."""
    monkeypatch.setattr(gpu_linear, "SLAB_BYTES", 1)


# Each kind in each dtype; one pair; several slabs of classes.
BINARY = [
    *((kind, 3, 97, 8, dtype) for kind in KINDS for dtype in DTYPES),
    *((kind, 1, 1, 1, torch.float32) for kind in KINDS),
    *(("sigmoid", 2, 530, 20, dtype) for dtype in DTYPES),
]


@pytest.mark.parametrize(("kind", "n", "v", "d", "dtype"), BINARY, ids=str)
def test_binary_sums(
    module: Any, kind: str, n: int, v: int, d: int, dtype: torch.dtype, small_slabs: None
) -> None:
    x, w, b, scale, target = pair_inputs(n, v, d, 3, dtype)
    weight, factor, loss = torch.rand(v) + 0.5, torch.rand(n) + 0.5, KINDS[kind]
    inputs = (x, w, b, scale)
    wide = [t.double() for t in inputs]
    ours = binary_of(module, *inputs, target, loss, weight, factor)
    plain = binary_of(reference_pairs, *inputs, target, loss, weight, factor)
    oracle = binary_of(
        reference_pairs, *wide, target, loss, weight.double(), factor.double()
    )  # fmt: skip
    for name, found, same, true in zip(
        ("loss", "dx", "dw", "db"), ours, plain, oracle, strict=True
    ):
        floor = 4 * ROUNDINGS[torch.float32] * max(1.0, float(true.abs().max()))
        assert_no_worse(name, found, same, true, floor=floor)


@pytest.mark.parametrize("kind", KINDS)
def test_binary_gradients_in_bfloat16(module: Any, kind: str) -> None:
    """Without db, dz is rounded where it is made."""
    x, w, _, scale, target = pair_inputs(3, 100, 24, 2, torch.bfloat16)
    loss, at = KINDS[kind], torch.randn(target.shape)

    def gradients(primitives: Any, *inputs: Tensor) -> list[Tensor]:
        acc = accumulate_dtype(inputs[0].dtype)
        dx, dw = (torch.empty(t.shape, dtype=acc) for t in inputs[:2])
        primitives.linear_binary(
            *inputs[:2], None, inputs[2], target, None, loss.kind, loss.negative_parameters, None,
            at.to(acc), dx, dw, None,
        )  # fmt: skip
        return [dx, dw]

    ours = gradients(module, x, w, scale)
    oracle = gradients(reference_pairs, x.double(), w.double(), scale.double())
    z = reference.linear_logits(x, w, None, scale, 0.0)
    mask = reference.target_mask(target, *z.shape)
    dz = negative_slope(loss.kind, loss.negative_parameters, z.masked_fill(mask, -torch.inf))
    plain = products_of_rounded(x, w, scale, dz, target, at)
    for name, found, same, true in zip(("dx", "dw"), ours, plain, oracle, strict=True):
        assert_no_worse(
            name, found, same, true, floor=ROUNDINGS[torch.float32] * float(true.abs().max())
        )


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_logits_reach_the_binary_loss(module: Any, kind: str, value: float) -> None:
    b = torch.zeros(40)
    b[7] = value
    call = (
        torch.ones(2, 1), torch.zeros(40, 1), b, None, None, None, KINDS[kind].kind,
        KINDS[kind].negative_parameters, None, None, None, None, None,
    )  # fmt: skip
    ours, plain = (m.linear_binary(*call) for m in (module, reference_pairs))
    torch.testing.assert_close(ours, plain, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "v", "d"),
    [(2, 2, 1), (3, 97, 8), (40, 20, 5), (3, 530, 20)],
    ids=["two", "ragged", "steps of rows", "slabs"],
)
def test_log_sums_of_rows_and_columns(
    module: Any, n: int, v: int, d: int, dtype: torch.dtype, small_slabs: None
) -> None:
    x, w, _, scale, target = pair_inputs(n, v, d, 2, dtype)
    coefficients = [torch.randn(shape) for shape in ((n,), (v,), target.shape)]
    ours = pair_gradient_of(module, x, w, scale, target, coefficients)
    plain = pair_gradient_of(reference_pairs, x, w, scale, target, coefficients)
    if dtype == torch.bfloat16:
        z = reference.linear_logits(x, w, None, scale, 0.0)
        shift, lse, column_shift, column_lse, _ = reference_pairs.linear_pair_statistics(
            x, w, scale, target
        )
        by_row, by_column, at = coefficients
        dz = by_row[:, None] * (z - (shift + lse)[:, None]).exp()
        dz += by_column * (z - column_shift - column_lse).exp()
        dz = dz.masked_fill(reference.target_mask(target, n, v), 0.0)
        dx, dw = products_of_rounded(x, w, scale, dz, target, at)
        plain[3:] = [dx * scale, dw]
    oracle = pair_gradient_of(
        reference_pairs, x.double(), w.double(), scale.double(), target,
        [c.double() for c in coefficients],
    )  # fmt: skip
    names = ("lse", "column lse", "target", "dx", "dw")
    for name, found, same, true in zip(names, ours, plain, oracle, strict=True):
        floor = 8 * ROUNDINGS[torch.float32] * max(1.0, float(true[true.isfinite()].abs().max()))
        assert_no_worse(name, found, same, true, floor=floor)


def test_columns_whose_largest_comes_last_or_never(module: Any) -> None:
    # Column 0 rises by 200 with the rows, column 1 has no negative at all, column 2 is -inf.
    x = torch.linspace(-100, 100, 70).unsqueeze(1)
    w = torch.tensor([[1.0], [0.5], [0.0]])
    target = torch.full((70, 1), 1)
    found = module.linear_pair_statistics(x, w, None, target)
    plain = reference_pairs.linear_pair_statistics(x.double(), w.double(), None, target)
    torch.testing.assert_close(
        [t.double() for t in found[2:4]], list(plain[2:4]), rtol=1e-6, atol=1e-6
    )
    assert found[3][1] == -torch.inf


# The same bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_in_any_order(module: Any, shuffled: Shuffled, dtype: torch.dtype) -> None:
    case = Case(2, 16, 4300, 2, dtype, names=PLAIN, bias=True)
    x, w, b, scale, target = pair_inputs(3, 100, 8, 2, dtype)
    coefficients = [torch.randn(shape) for shape in ((3,), (100,), target.shape)]
    runs = []
    for seed in (None, 0):
        with shuffled(seed):
            runs.append([
                *case.two_sweeps(module).values(), *case.chunk(module).values(),
                *binary_of(module, x, w, b, scale, target, KINDS["sigmoid"], None,
                           torch.ones(3)),
                *pair_gradient_of(module, x, w, scale, target, coefficients),
            ])  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
