"""The CUDA kernels on logits and pairs in the emulator, every access watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from fixtures import built, emulator, loaded
from gpu_kernels import *  # noqa: F403
from gpu_kernels import (
    DTYPES,
    check,
    reference,
    reference_pairs,
    test_columns_whose_largest_comes_last_or_never,
)
from test_cpu_backend import FLOOR, PLAIN, Case, assert_all_no_worse

import lossops.cuda
from lossops.statistics import canonical, outputs


@pytest.fixture(scope="session")
def module(loaded: Any) -> Any:
    """The backend."""
    return lossops.cuda.primitives


@pytest.fixture
def shuffled(
    emulator: Callable[[int], None],
) -> Callable[[int | None], AbstractContextManager[None]]:
    """Blocks and threads of a launch in another order."""

    @contextmanager
    def shuffled(seed: int | None) -> Iterator[None]:
        emulator(0 if seed is None else 1 + seed)
        yield
        emulator(0)

    return shuffled


def of(r: torch.Tensor, **changed: Any) -> dict[str, Any]:
    """Arguments of logits_statistics for four rows of eight logits, some of them changed."""
    fitting: dict[str, Any] = {
        "r": r, "scale": None, "b": None, "softcap": 0.0, "target": None, "class_vector": None,
        "teacher": None, "kept": 1, "temperatures": [], "limits": [], "parts": 1, "states": None,
        "values": torch.empty(13, 4), "ids": torch.empty(3, 4, dtype=torch.int64),
        "at_target": None,
    }  # fmt: skip
    return {**fitting, **changed}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"b": torch.ones(3)}, "b must have 8 elements, got 3"),
        ({"class_vector": torch.ones(9)}, "class_vector must have 8 elements, got 9"),
        ({"scale": torch.ones(2)}, "scale must have 1 elements, got 2"),
        ({"b": torch.ones(8).double()}, "b must be Float without holes, got Double"),
        (
            {"values": torch.empty(12, 4)},
            r"values must have shape \(13, 4\), got 2 dims, ",
        ),
        ({"parts": 2}, "states must have"),
        ({"parts": 0}, r"parts must be in \[1, 65535\], got 0"),
        ({"kept": 1 << 14}, "no statistics are kept as 16384"),
        ({"temperatures": [1.0] * 5, "limits": [1.0] * 5}, "at most 4 log-sums, got 5"),
        ({"temperatures": [1.0], "limits": []}, "1 temperatures and 0 limits"),
        ({"temperatures": [1.0], "limits": [1.0]}, "1 log-sums, room is kept for 0"),
        (
            {"temperatures": [1.0] * 2, "limits": [1.0] * 2, "kept": 4097},
            "2 log-sums, room is kept for 1",
        ),
        (
            {"target": torch.zeros(4, 2).long(), "at_target": torch.empty(4, 1)},
            "at_target must have 8 elements, got 4",
        ),
    ],
)
def test_statistics_refuse_what_does_not_fit(
    loaded: Any, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        torch.ops.lossops_cuda.logits_statistics(**of(torch.randn(4, 8), **changed))


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (7, [None] * 8, "a gradient needs the shift of its rows"),
        (
            7,
            [torch.zeros(4), torch.zeros(2), *[None] * 6],
            "a statistic must have 4 elements, got 2",
        ),
        (8, [torch.zeros(3), *[None] * 11], "a coefficient must have 4 elements, got 3"),
        (8, [*[None] * 8, torch.zeros(4), *[None] * 3], "no teacher"),
        (
            8,
            [*[None] * 9, torch.zeros(4), None, None],
            "an extreme .* needs its id",
        ),
        (18, torch.empty(4, 8).double(), "out must be float32, float16 or bfloat16"),
        (18, torch.empty(4, 9), r"out must have shape \(4, 8\)"),
    ],
)
def test_gradients_refuse_what_does_not_fit(loaded: Any, at: int, value: Any, said: str) -> None:
    arguments = [*slopes(), None, None, 1, torch.empty(4, 8)]
    arguments[at] = value
    with pytest.raises(RuntimeError, match=said):
        torch.ops.lossops_cuda.logits_gradient(*arguments)


def slopes() -> list[Any]:
    """What gradients and sums of columns of four rows of eight logits have in common."""
    return [
        torch.randn(4, 8), None, None, 0.0, None, None, None,
        [torch.zeros(4), torch.zeros(4), *[None] * 6], [torch.zeros(4), *[None] * 11],
        [], [], [], [], 0, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("wanted", [16, 17])
def test_sixteen_log_sums_have_coefficients_at_most(module: Any, wanted: int) -> None:
    """Of any number of them."""
    names = canonical(["lse", *(f"lse@{1 + t / 10}" for t in range(1, 20))])
    z = torch.randn(2, 40)
    found = module.logits_statistics(z, None, None, None, names)
    coefficients = [None, None, *(torch.randn(2) if k < wanted else None for k in range(19))]
    dz = [torch.empty_like(z), torch.empty_like(z)]
    call = (z, None, None, None, names, found, coefficients)
    if wanted > 16:
        with pytest.raises(ValueError, match="at most 16 log-sums with a coefficient, got 17"):
            module.logits_gradient(*call, dz[0])
        return
    for primitives, out in zip((module, reference), dz, strict=True):
        primitives.logits_gradient(*call, out)
    torch.testing.assert_close(*dz)


@pytest.mark.parametrize("missing", [10, 11, 12])
def test_lists_of_log_sums_are_of_one_length(loaded: Any, missing: int) -> None:
    arguments = slopes()
    arguments[9:13] = [1.0], [1.0], [torch.zeros(4)], [torch.zeros(4)]
    arguments[missing] = []
    with pytest.raises(RuntimeError, match="one limit, log-sum and coefficient for each"):
        torch.ops.lossops_cuda.logits_gradient(*arguments, None, None, 1, torch.empty(4, 8))
    with pytest.raises(RuntimeError, match="one limit, log-sum and coefficient for each"):
        torch.ops.lossops_cuda.column_sums(*arguments, False, 1, torch.empty(8))


def test_a_coefficient_needs_its_log_sum(loaded: Any) -> None:
    arguments = slopes()
    arguments[9:13] = [1.0], [1.0], [None], [torch.zeros(4)]
    with pytest.raises(RuntimeError, match="a log-sum with a coefficient is missing"):
        torch.ops.lossops_cuda.column_sums(*arguments, False, 1, torch.empty(8))


@pytest.mark.parametrize("parts", [0, 65536])
def test_parts_are_those_of_a_grid(loaded: Any, parts: int) -> None:
    ops, none = torch.ops.lossops_cuda, torch.empty(parts * 8)
    calls: list[Callable[[], object]] = [
        lambda: ops.logits_gradient(*slopes(), None, None, parts, torch.empty(4, 8)),
        lambda: ops.column_sums(*slopes(), False, parts, none),
        lambda: ops.pair_columns(torch.randn(4, 8), None, None, parts, none, none.clone()),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"parts must be in \[1, 65535\]"):
            call()


# More parts of a row than its classes suggest: ties, log-sums and extremes meet across them.


@pytest.fixture(params=[64, 8], ids=["4 parts", "8 parts"])
def many_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(lossops.cuda, "PART", request.param)
    return 256 // request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_in_parts(module: Any, many_parts: int, dtype: torch.dtype) -> None:
    check(module, Case(1, 9, 301, 3, dtype, scale=0.7, softcap=5.0, bias=True))
    check(module, Case(1, 9, 301, 40, dtype, names=PLAIN, bias=True))
    names = canonical(("target", "lse", "lse@0.5", "lse@3", "lse<0", "lse<100", "lse<-100"))
    check(module, Case(1, 9, 301, 1, dtype, names=names))


def test_ties_across_parts(module: Any, many_parts: int) -> None:
    names = canonical(("target", "max", "runner_up", "below_target", "sumsq", "variance"))
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        z = torch.randint(0, 3, (1, 259), generator=draw).float()
        target = torch.randint(0, 259, (1, 1), generator=draw)
        want = reference.logits_statistics(z, target, None, None, names)
        found = module.logits_statistics(z, target, None, None, names)
        for name, ours, theirs in zip(outputs(names), found, want, strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_poison_in_parts(module: Any, many_parts: int, value: float) -> None:
    names = ("lse", "entropy", "softplus", "lse@2", "lse<3")
    for at in (0, 130, 258):
        z = 200 * torch.rand(1, 259) - 300
        z[0, at] = value
        want = reference.logits_statistics(z, None, None, None, names)[1:]
        found = module.logits_statistics(z, None, None, None, names)[1:]
        torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-5, atol=1e-4)


def test_columns_in_parts(module: Any, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of columns in four parts of the rows, the last one shorter."""
    monkeypatch.setattr(lossops.cuda, "PART_ROWS", 4)
    assert lossops.cuda._column_parts(torch.empty(33, 140)) == 4
    case = Case(33, 9, 140, 1, torch.float32, names=PLAIN, bias=True)
    exact = case.doubled()
    for start in (None, 0.5):
        runs = (case.chunk(module, start=start), case.chunk(reference, start=start))
        assert_all_no_worse(*runs, exact.chunk(reference, start=start), FLOOR[torch.float32])
    test_columns_whose_largest_comes_last_or_never(module)
    for value in (torch.inf, torch.nan):
        x, w = torch.randn(33, 5), torch.randn(140, 5)
        x[20, 0] = value
        ours = module.linear_pair_statistics(x, w, None, None)
        plain = reference_pairs.linear_pair_statistics(x, w, None, None)
        for at in (0, 2):  # log-sums of rows, of columns
            one, other = (found[at] + found[at + 1] for found in (ours, plain))
            torch.testing.assert_close(one, other, equal_nan=True)
