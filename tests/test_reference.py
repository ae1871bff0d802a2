"""The reference proved: by PyTorch in float64, gradcheck, tables worked by hand, and invariants."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_inputs
from torch import Tensor

from lossops import reference
from lossops.statistics import INDEX_OUTPUTS, STATISTICS, RowStatistics, canonical, outputs

V = 7
NAMES = (*STATISTICS, "lse@2", "lse@0.5", "lse<0.3")
TARGETS = {
    "none": None,
    "one": torch.tensor([[2], [0], [6], [-1], [3]]),
    "several": torch.tensor([[2, 5, -1], [0, 6, 1], [-1, 4, -1], [-1, -1, -1], [3, -1, 0]]),
}
COMBINATIONS = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name in NAMES
    for kind in TARGETS
    if kind != "none" or name not in ("target", "below_target")
]


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (5, V), class vector (V,), teacher (5, V) with a zero: float64."""
    draw = torch.Generator().manual_seed(seed)
    z, a, t = (torch.randn(k, V, generator=draw, dtype=torch.float64) for k in (5, 1, 5))
    t = t.softmax(1)
    t[1, 2] = 0.0
    return z * 2, a[0], t


def collect(
    z: Tensor,
    target: Tensor | None,
    names: tuple[str, ...],
    a: Tensor | None = None,
    t: Tensor | None = None,
) -> RowStatistics:
    """`RowStatistics` of logits by the reference, a single target without its last dim."""
    found = reference.logits_statistics(z, target, a, t, names)
    values = dict(zip(outputs(names), found, strict=True))
    if "target" in values and target.shape[1] == 1:
        values["target"] = values["target"][:, 0]
    v = z.shape[1]
    weights = torch.ones(v, dtype=z.dtype) if a is None else a
    return RowStatistics(
        values, v, None if a is None else a.sum(), None if t is None else t @ weights
    )


def names_of(name: str, target: Tensor | None) -> tuple[str, ...]:
    """``name`` with what it needs, and the target where there is one."""
    return canonical([name] if target is None else [name, "lse", "target"])


def as_the_table_says(name: str, z: Tensor, ids: list[int], a: Tensor, t: Tensor) -> list[Tensor]:
    """The outputs of one statistic of one row, absolute, from the words of its table entry."""
    negatives = [j for j in range(V) if j not in ids]
    n = z[negatives]
    if name == "target":
        none = torch.tensor(-math.inf).double()
        found = [z[j] if j >= 0 else none for j in ids]
        return [torch.stack(found) if len(ids) > 1 else found[0]]
    if name == "lse":
        return [torch.logsumexp(n, 0)]
    if name.startswith("lse@"):
        return [torch.logsumexp(float(name[4:]) * n, 0)]
    if name.startswith("lse<"):
        return [torch.logsumexp(torch.where(n > float(name[4:]), 0.0, n), 0)]
    if name == "entropy":
        return [(n.softmax(0) * n).sum()]
    if name == "variance":
        return [(n.softmax(0) * (n - (n.softmax(0) * n).sum()).square()).sum()]
    if name == "stable_sum":
        return [torch.where(n < 0, 1 / (1 - n), 1 + n).sum()]
    if name in ("max", "runner_up", "below_target"):
        rank = sorted(negatives, key=lambda j: -float(z[j]))
        rank = rank[1:] if name == "runner_up" else rank
        if name == "below_target":
            rank = [j for j in rank if ids[0] >= 0 and z[j] < z[ids[0]]]
        if not rank:
            return [torch.tensor(-math.inf).double(), torch.tensor(-1)]
        return [z[rank[0]], torch.tensor(rank[0])]
    if name == "softplus":
        return [torch.log1p(n.exp()).sum()]
    if name == "sum":
        return [z.mean()]
    if name == "sumsq":
        return [z.var(correction=0) * V]
    return [(a * z).sum() if name == "weighted_sum" else (t * a * z).sum()]


def absolute(stats: RowStatistics, output: str) -> Tensor:
    """A stored output without its shift, in the terms of the class vector and the teacher."""
    value, m = stats.relative(output), stats.shift
    if output.startswith("lse@"):
        return stats.lse_at(float(output[4:]))
    if output in ("moment", "softplus", "stable_sum", "variance", *INDEX_OUTPUTS):
        return value
    if output in ("weighted_sum", "teacher"):
        return getattr(stats, output)
    return value + (m.unsqueeze(1) if value.ndim > 1 else m)


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_each_statistic_is_what_its_table_entry_says(name: str, kind: str) -> None:
    z, a, t = tensors()
    target = TARGETS[kind]
    stats = collect(z, target, names_of(name, target), a, t)
    listed = STATISTICS[name].outputs if name in STATISTICS else (name,)
    rows = [[]] * 5 if target is None else target.tolist()
    said = [as_the_table_says(name, z[i], rows[i], a, t[i]) for i in range(5)]
    for k, output in enumerate(listed):
        expected = torch.stack([row[k] for row in said])
        torch.testing.assert_close(absolute(stats, output), expected, rtol=1e-12, atol=1e-12)


def test_the_teacher_without_a_class_vector_is_the_plain_product() -> None:
    z, _, t = tensors()
    stats = collect(z, None, canonical(["teacher"]), t=t)
    torch.testing.assert_close(stats.teacher, (t * z).sum(1))


SMOOTH = (
    "target", "lse", "logsumexp", "log_p", "log_1mp", "entropy", "max", "runner_up", "below_target",
    "sum", "sumsq", "moment", "softplus", "stable_sum", "variance", "weighted_sum", "teacher",
    "target_minus_lse",
)  # fmt: skip


@pytest.mark.parametrize("attribute", [*SMOOTH, "lse@2"])
def test_gradcheck_of_every_attribute_twice(attribute: str) -> None:
    z, a, t = tensors()
    z, a, t = z[:2, :4], a[:4], t[:2, :4]
    target = torch.tensor([[2], [0]])
    z[range(2), target[:, 0]] = 0.25  # each row has something below its target
    name = "sumsq" if attribute == "moment" else attribute
    names = names_of(name if name in NAMES else "lse", target)

    def of(z: Tensor) -> Tensor:
        # Absolute attributes: the shift is a constant to autograd, and moves under differences.
        stats = collect(z, target, names, a, t)
        return stats.lse_at(2.0) if attribute == "lse@2" else getattr(stats, attribute)

    z = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(of, z)
    assert torch.autograd.gradgradcheck(of, z)


@pytest.mark.parametrize("kind", ["none", "several"])
def test_gradcheck_of_entropy_and_logsumexp_without_and_with_several_targets(kind: str) -> None:
    z, *_ = tensors()
    target = TARGETS[kind]
    attribute = "entropy" if kind == "none" else "logsumexp"

    def of(z: Tensor) -> Tensor:
        return getattr(collect(z, target, names_of("entropy", target)), attribute)

    torch.autograd.gradcheck(of, z.requires_grad_())


@pytest.mark.parametrize("head", ["plain", "scale-bias-softcap"])
@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_closed_form_gradients_are_those_of_autograd(
    name: str, kind: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random coefficients, so that every basis meets every other in one row."""
    monkeypatch.setattr(reference, "TILE", 3)  # tiles of 3, 3 and 1 classes
    monkeypatch.setattr(reference, "BLOCK", 2 * V)  # blocks of 2, 2 and 1 rows
    monkeypatch.setattr(reference, "PRODUCT", 3 * V)
    x, w, b, _ = make_inputs(5, V, 4, spread=2.0)
    _, a, t = tensors()
    target = TARGETS[kind]
    names = names_of(name, target)
    bias, scale, softcap = None, None, 0.0
    if head != "plain":
        bias, scale, softcap = b.requires_grad_(), torch.tensor(1.7, dtype=torch.float64), 3.0
        scale.requires_grad_()
    x.requires_grad_()
    w.requires_grad_()
    spec = (target, a, t, names)
    stats = reference.linear_statistics(x, w, bias, scale, softcap, *spec)
    draw = torch.Generator().manual_seed(1)
    coefficients = [
        None if output == "shift" or output in INDEX_OUTPUTS
        else torch.randn(s.shape, generator=draw, dtype=s.dtype)
        for output, s in zip(outputs(names), stats, strict=True)
    ]  # fmt: skip
    total = sum(
        (c * s.masked_fill(s == -torch.inf, 0.0)).sum()
        for c, s in zip(coefficients, stats, strict=True)
        if c is not None
    )
    leaves = [p for p in (x, w, bias, scale) if p is not None]
    dx, dw, *rest = torch.autograd.grad(total, leaves)
    x, w, bias, scale = (None if p is None else p.detach() for p in (x, w, bias, scale))
    stats = [s.detach() for s in stats]
    arguments = (x, w, bias, scale, softcap, *spec)

    def check(found_dx: Tensor, found_dw: Tensor, found_db: Tensor, times: int = 1) -> None:
        close = {"rtol": 1e-10, "atol": 1e-12}
        factor = 1.0 if scale is None else scale
        torch.testing.assert_close(found_dx * factor, dx, **close)
        torch.testing.assert_close(found_dw, times * dw, **close)
        if bias is not None:
            torch.testing.assert_close(found_db, times * rest[0], **close)
        if scale is not None:
            torch.testing.assert_close((x * found_dx).sum(), rest[1], **close)

    found = [torch.full_like(p, math.nan) for p in (x, w, b.detach())]
    reference.linear_gradient(*arguments, stats, coefficients, *found)
    check(*found)

    wanted = [o for o, c in zip(outputs(names), coefficients, strict=True) if c is not None]
    found = [torch.full_like(p, math.nan) for p in (x, w, b.detach())]
    for accumulate in (False, True):
        buffer = torch.full((5, V), math.nan, dtype=torch.float64)
        chunk = reference.linear_chunk_statistics(*arguments, wanted, buffer)
        reference.linear_chunk_gradient(
            *arguments, wanted, buffer, chunk, coefficients, *found, accumulate
        )
        check(*found, times=1 + accumulate)

    z = reference.linear_logits(*arguments[:5]).requires_grad_()
    again = reference.logits_statistics(z, *spec)
    total = sum(
        (c * s.masked_fill(s == -torch.inf, 0.0)).sum()
        for c, s in zip(coefficients, again, strict=True)
        if c is not None
    )
    (dz,) = torch.autograd.grad(total, z)
    z = z.detach()
    reference.logits_gradient(z, *spec, stats, coefficients, z)  # in place
    torch.testing.assert_close(z, dz, rtol=1e-10, atol=1e-12)


def test_a_table_worked_by_hand() -> None:
    ln = math.log
    z = torch.tensor([[0.0, ln(2), ln(3)], [ln(4), ln(2), ln(2)]], dtype=torch.float64)
    names = canonical([n for n in NAMES if n not in ("weighted_sum", "teacher")])
    s = collect(z, torch.tensor([[0], [1]]), names)
    table = {
        "shift": (ln(3), ln(4)),
        "target": (0, ln(2)),
        "lse": (ln(5), ln(6)),
        "logsumexp": (ln(6), ln(8)),
        "log_p": (-ln(6), -ln(4)),
        "log_1mp": (ln(5 / 6), ln(3 / 4)),
        "target_minus_lse": (-ln(5), -ln(3)),
        "entropy": (ln(6) / 6 + ln(3) / 3 + ln(2) / 2, ln(2) / 2 + ln(4) / 2),
        "max": (ln(3), ln(4)),
        "runner_up": (ln(2), ln(2)),
        "below_target": (-math.inf, -math.inf),  # ln 2 is not below a target of ln 2
        "sum": (ln(6), ln(16)),
        "sumsq": (ln(2) ** 2 + ln(3) ** 2, 6 * ln(2) ** 2),
        "softplus": (ln(3 * 4), ln(5 * 3)),
    }
    for attribute, values in table.items():
        expected = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(getattr(s, attribute), expected, msg=attribute)
    torch.testing.assert_close(s.lse_at(2.0), torch.tensor([ln(13), ln(20)]).double())
    assert s.argmax.tolist() == [2, 0]
    assert s.runner_up_index.tolist() == [1, 2]
    assert s.below_target_index.tolist() == [-1, -1]


def test_a_table_of_infinities_and_ties_worked_by_hand() -> None:
    inf, ln = math.inf, math.log
    z = torch.tensor([[5, 5, -inf], [-inf, -inf, 2], [7, 7, 7], [-inf, 1, 1]], dtype=torch.float64)
    names = canonical(["entropy", "max", "runner_up", "below_target", "softplus", "lse@2"])
    target = torch.tensor([[1], [2], [-1], [0]])
    found = reference.logits_statistics(z, target, None, None, names)
    s = dict(zip(outputs(names), found, strict=True))
    table = {
        "shift": (5, 0, 7, 1),  # of row 1, where only the target is finite: 0 by convention
        "target": (5, 2, -inf, -inf),  # as it is
        "lse": (0, -inf, ln(3), ln(2)),
        "mean": (0, 0, 0, 0),
        "max": (0, -inf, 0, 0),
        "argmax": (0, -1, 0, 1),
        "runner_up": (-inf, -inf, 0, 0),
        "runner_up_index": (-1, -1, 1, 2),
        "below_target": (-inf, -inf, -inf, -inf),
        "below_target_index": (-1, -1, -1, -1),
        "softplus": (ln(1 + math.e**5), 0, 3 * ln(1 + math.e**7), 2 * ln(1 + math.e)),
        "lse@2": (0, -inf, ln(3), ln(2)),
    }
    for output, values in table.items():
        expected = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(s[output].flatten().double(), expected, msg=output)


def test_rows_of_infinities_have_finite_gradients() -> None:
    """0 · (-inf) counts 0, and a statistic without negatives has no gradient at all."""
    inf = math.inf
    z = torch.tensor([[5, 5, -inf], [-inf, -inf, 2], [-inf, 1, 1]], dtype=torch.float64)
    target = torch.tensor([[1], [2], [0]])
    names = canonical(["entropy", "max", "runner_up", "softplus", "lse@2", "target"])
    z.requires_grad_()
    stats = reference.logits_statistics(z, target, None, None, names)
    used = [o not in ("shift", *INDEX_OUTPUTS) for o in outputs(names)]
    ones = [torch.ones_like(s) if u else None for s, u in zip(stats, used, strict=True)]
    total = sum(s.masked_fill(s == -inf, 0.0).sum() for s, u in zip(stats, used, strict=True) if u)
    (dz,) = torch.autograd.grad(total, z)
    assert dz.isfinite().all()
    closed = torch.empty_like(z)
    coefficients = [
        None if c is None else c.masked_fill(s == -inf, 0.0)
        for c, s in zip(ones, stats, strict=True)
    ]
    spec = (target, None, None, names, [s.detach() for s in stats], coefficients)
    reference.logits_gradient(z.detach(), *spec, closed)
    torch.testing.assert_close(closed, dz)


def test_statistics_are_relative_to_a_shift_that_takes_all_of_an_offset() -> None:
    z, _, t = tensors()
    target = TARGETS["one"]
    names = canonical(
        [n for n in NAMES if n not in ("softplus", "stable_sum", "weighted_sum", "lse<0.3")]
    )
    here = reference.logits_statistics(z, target, None, t, names)
    there = reference.logits_statistics(z + 1e4, target, None, t, names)
    for output, a, b in zip(outputs(names), here, there, strict=True):
        moved = a + 1e4 if output in ("shift", "target") else a
        torch.testing.assert_close(b, moved, rtol=0, atol=1e-11, msg=output)


def test_half_precision_logits_are_float32_from_the_product_on() -> None:
    x, w, b, y = make_inputs(5, 40, 16, torch.bfloat16)
    stats = reference.linear_statistics(
        x, w, b, None, 0.0, y.unsqueeze(1), None, None, canonical(["lse", "target"])
    )
    assert {s.dtype for s in stats} == {torch.float32}
    z = F.linear(x.double(), w.double(), b.double())
    shift, target, lse = stats
    log_p = F.logsigmoid(target[:, 0] - shift - lse)
    torch.testing.assert_close(log_p.double(), -F.cross_entropy(z, y, reduction="none"))


@pytest.mark.parametrize(
    ("constant", "size"),
    [("TILE", 1), ("TILE", 3), ("BLOCK", 1), ("BLOCK", 44), ("PRODUCT", 1), ("PRODUCT", 50)],
)
def test_the_size_of_a_block_never_changes_the_answer(
    constant: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, b, y = make_inputs(6, 11, 4)
    names = canonical(["entropy", "max", "sumsq", "teacher", "target"])
    teacher = torch.rand(6, 11, dtype=torch.float64)
    spec = (x, w, b, None, 5.0, y.unsqueeze(1), None, teacher, names)

    def run() -> list[Tensor]:
        stats = reference.linear_statistics(*spec)
        coefficients = [None if o in ("shift", *INDEX_OUTPUTS) else torch.ones_like(s)
                        for o, s in zip(outputs(names), stats, strict=True)]  # fmt: skip
        gradients = [torch.empty_like(p) for p in (x, w, b)]
        reference.linear_gradient(*spec, stats, coefficients, *gradients)
        return [*stats, *gradients]

    whole = run()
    monkeypatch.setattr(reference, constant, size)
    torch.testing.assert_close(run(), whole, rtol=1e-12, atol=1e-13)
