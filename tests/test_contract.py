"""The numerical contract, line by line, for every backend.

1 float32 losses           4 autograd's manners           7 more than 2^31 logits
2 errors like PyTorch's    5 nothing counted, infinities  8 no work nobody asked for
3 free of scale            6 the same bits                9 any layout

Inputs are rounded to their dtype first; the oracle is plain PyTorch in float64 on the rounded ones.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DTYPES,
    FLOOR,
    HALF,
    Inputs,
    assert_no_worse,
    make_inputs,
    plain_losses,
    value_and_gradients,
)
from torch import Tensor

import lossops
from lossops import LinearLossOptions, backends, reference, schedules
from lossops.statistics import canonical

# Regimes: nothing divides anything; several vectors and an odd tail; more than a tile of 4096
# classes, chunks of rows, and targets that share classes.
CASES = {
    "N7-V131-D33": (7, 131, 33),
    "N64-V1031-D48": (64, 1031, 48),
    "N160-V4099-D40": (160, 4099, 40),
}
ROUNDED = ("f32", "bf16", "f16")  # float64 is the oracle
SCHEDULES = {
    "one_sweep": LinearLossOptions(schedule="one_sweep"),
    "chunks": LinearLossOptions(chunk_rows=41),
    "two_sweeps": LinearLossOptions(schedule="two_sweeps"),
}
NAMES = ("loss", "dx", "dw", "db", "dscale")


def ours(y: Tensor, backend: str, **options: object):
    """`linear_cross_entropy` of x, w and perhaps b and a scale."""

    def loss(x: Tensor, w: Tensor, b: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        return lossops.linear_cross_entropy(
            x, w, y, linear_bias=b, logit_scale=scale, backend=backend, **options
        )

    return loss


def plain(y: Tensor, reduction: str = "mean"):
    """The same loss in plain PyTorch."""

    def loss(x: Tensor, w: Tensor, b: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        losses = plain_losses(x, w, y, b=b, scale=scale)
        if reduction == "none":
            return losses
        return losses.sum() / ((y >= 0).sum() if reduction == "mean" else 1)

    return loss


def doubled(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double() for t in tensors]


def small(dtype: torch.dtype = torch.float64) -> Inputs:
    """A problem small enough to run many times, two rows ignored."""
    x, w, b, y = make_inputs(7, 131, 33, dtype, spread=2.0)
    y[1], y[4] = -100, -100
    return Inputs(x, w, b, y)


# 0. No skip may hide the compiled backend.


@pytest.mark.skipif(os.environ.get("LOSSOPS_BUILD") == "none", reason="LOSSOPS_BUILD is none")
def test_0_the_compiled_backend_is_there_where_it_can_be_built() -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    sentence = backends.BACKENDS["cpp"].objection(torch.device("cpu"), torch.float32)
    assert sentence is None, f"{compiler} is here, but: {sentence}"


# 1. Loss and statistics are float32 for half-precision inputs. Nothing is summed in bf16 or fp16.


@pytest.mark.parametrize("dtype", HALF)
def test_1_losses_and_statistics_of_half_inputs_are_float32(dtype: str, backend: str) -> None:
    x, w, b, y = small(DTYPES[dtype])
    x.requires_grad_()
    found = [
        *(ours(y, backend, options=o)(x, w, b) for o in SCHEDULES.values()),
        ours(y, backend, reduction="none")(x, w, b),
        *lossops.linear_log_prob(x, w, y, entropy=True, backend=backend),
        *ours(y, backend, outputs=("logsumexp", "log_prob", "entropy"))(x, w, b)[:4],
        lossops.cross_entropy(x, y.clamp(-100, 32), backend=backend),
    ]
    assert {t.dtype for t in found} == {torch.float32}
    stats = lossops.linear_statistics(x, w, y, names=("entropy", "sumsq"), backend=backend)
    assert {t.dtype for t in stats.values.values()} == {torch.float32}
    for t in found:
        (gradient,) = torch.autograd.grad(t.sum(), x, retain_graph=True)
        assert gradient.dtype == x.dtype


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", HALF)
def test_1_long_sums_of_losses_keep_float32(
    dtype: str, schedule: str, reduction: str, backend: str
) -> None:
    """A bf16 accumulator over chunks is 10 to 36 % off here."""
    x, w, _, y = make_inputs(1500, 200, 8, DTYPES[dtype])
    loss = ours(y, backend, reduction=reduction, options=SCHEDULES[schedule])
    exact = plain(y, reduction)(x.double(), w.double())
    assert loss(x.requires_grad_(), w).item() == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_1_gradients_do_not_get_worse_with_the_number_of_chunks(dtype: str, backend: str) -> None:
    x, w, b, y = make_inputs(256, 300, 16, DTYPES[dtype], spread=2.0)
    exact = value_and_gradients(plain(y), doubled((x, w, b)))
    error = {}
    for rows in (256, 8):
        found = value_and_gradients(
            ours(y, backend, options=LinearLossOptions(chunk_rows=rows)), (x, w, b)
        )
        error[rows] = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
    for name, one, many in zip(NAMES, error[256], error[8], strict=False):
        assert many <= 1.1 * one + 1e-7, f"{name}: {many:.2e} in 32 chunks, {one:.2e} in one"


# 2. An error no more than twice that of plain PyTorch in the same dtype, against float64.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("case", CASES)
def test_2_no_worse_than_pytorch(case: str, dtype: str, schedule: str, backend: str) -> None:
    x, w, b, y = make_inputs(*CASES[case], DTYPES[dtype], spread=2.0)
    y[::3] = y[0]  # many rows add to one class
    scale = torch.tensor(1.25)
    tensors = (x, w, b, scale)
    oracle = value_and_gradients(plain(y), doubled(tensors))
    theirs = value_and_gradients(plain(y), tensors)
    found = value_and_gradients(ours(y, backend, options=SCHEDULES[schedule]), tensors)
    for name, *three in zip(NAMES, found, theirs, oracle, strict=True):
        assert_no_worse(name, *three)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_2_no_worse_row_by_row(dtype: str, backend: str) -> None:
    x, w, b, y = make_inputs(*CASES["N64-V1031-D48"], DTYPES[dtype], spread=2.0)
    upstream = torch.randn(64)
    oracle = value_and_gradients(plain(y, "none"), doubled((x, w, b)), upstream.double())
    theirs = value_and_gradients(plain(y, "none"), (x, w, b), upstream)
    found = value_and_gradients(ours(y, backend, reduction="none"), (x, w, b), upstream)
    for name, *three in zip(NAMES, found, theirs, oracle, strict=False):
        assert_no_worse(name, *three)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ROUNDED)
def test_2_no_worse_class_by_class(dtype: str, schedule: str, backend: str) -> None:
    """Frequent classes, rare ones, and those that are never a target, each on their own scale."""
    n, v, d = 128, 600, 24
    x, w, _, y = make_inputs(n, v, d, torch.float32, spread=1.5)
    b = -torch.arange(v) / 50.0  # from probable to one in a million
    x, w, b = (t.to(DTYPES[dtype]) for t in (x, w, b))
    y = y % 300
    is_target = torch.zeros(v, dtype=torch.bool).index_fill_(0, y, True)
    upstream = 1024.0  # fp16 itself has no smaller gradients
    exact = value_and_gradients(plain(y), doubled((x, w, b)), upstream)[2]
    errors = {}
    for name, function in (
        ("plain", plain(y)), ("ours", ours(y, backend, options=SCHEDULES[schedule]))
    ):  # fmt: skip
        dw = value_and_gradients(function, (x, w, b), upstream)[2].double()
        errors[name] = (dw - exact).norm(dim=1) / exact.norm(dim=1)
    floor = FLOOR[x.dtype]
    for group, classes in (("targets", is_target), ("others", ~is_target)):
        for q in (0.5, 0.9, 1.0):
            mine, theirs = (float(errors[k][classes].quantile(q)) for k in ("ours", "plain"))
            assert mine <= 2 * theirs + floor, f"{group}, quantile {q}: {mine:.2e}, {theirs:.2e}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ROUNDED)
def test_2_a_common_offset_of_the_logits_costs_nothing(
    dtype: str, schedule: str, backend: str
) -> None:
    """Products on a grid of 1/256 and a bias of 9984: exact in float32, in no other dtype.

    An absolute float32 logsumexp would cost 5e-4 of the loss; in bf16 PyTorch has nothing left.
    """
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-16, 17, s, generator=draw) / 16 for s in ((40, 24), (500, 24)))
    x, w = x.to(DTYPES[dtype]), w.to(DTYPES[dtype])
    y = torch.randint(500, (40,), generator=draw)
    loss = ours(y, backend, options=SCHEDULES[schedule])
    oracle = value_and_gradients(plain(y), doubled((x, w, torch.zeros(500))))
    for offset in (0.0, 9984.0, -9984.0):
        found = value_and_gradients(loss, (x, w, torch.full((500,), offset, dtype=x.dtype)))
        for name, mine, exact in zip(NAMES, found, oracle, strict=False):
            # Half precision: dz is rounded too, with as many ulps as PyTorch's without offset.
            atol = (2 if mine.dtype == torch.float32 else 3) * FLOOR[mine.dtype] * exact.abs().max()
            torch.testing.assert_close(
                mine.double(), exact, rtol=0, atol=float(atol), msg=f"{name} at {offset}: {mine}"
            )
    x.requires_grad_()
    b = torch.full((500,), 9984.0, dtype=x.dtype)
    log_p, entropy = lossops.linear_log_prob(x, w, y, linear_bias=b, entropy=True, backend=backend)
    z = F.linear(x.detach().double(), w.double()).log_softmax(1)
    torch.testing.assert_close(log_p.double(), z[range(40), y], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(z.exp() * z).sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ROUNDED)
def test_2_a_confident_row_keeps_its_target_gradient(
    dtype: str, schedule: str, backend: str
) -> None:
    """p - 1 in bf16 is 94 % off at p = .999, and 0 in float32 at p = 1 - 1e-8."""
    n, v = 6, 64
    x = torch.eye(n, dtype=DTYPES[dtype])
    y = torch.arange(n) * 7
    logit = torch.tensor([6.9, 9.0, 11.0, 14.0, 18.0, 22.5])
    w = torch.zeros(v, n).index_put_((y, torch.arange(n)), logit).to(x.dtype)
    loss = ours(y, backend, reduction="sum", options=SCHEDULES[schedule])
    upstream = 2.0**16  # 1e-8 is no fp16 number
    _, dx, dw = value_and_gradients(loss, (x, w), upstream)
    _, dx_exact, dw_exact = value_and_gradients(plain(y, "sum"), doubled((x, w)), upstream)
    at = (y, torch.arange(n))
    rtol = 4 * FLOOR[x.dtype] if dtype == "f32" else 2 * FLOOR[x.dtype]
    torch.testing.assert_close(dw[at].double(), dw_exact[at], rtol=rtol, atol=0)
    torch.testing.assert_close(dx.diag().double(), dx_exact.diag(), rtol=rtol, atol=0)


# 3. Scale-free: fp16 with a loss scaler of 1 or 65536 gives the same gradient.


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_3_fp16_gradients_do_not_depend_on_the_loss_scale(schedule: str, backend: str) -> None:
    """What the scale may change is the rounding of the gradient itself, where fp16 ends."""
    x, w, b, y = make_inputs(512, 4096, 16, torch.float16, spread=1.5)
    x, w, y = x * 4, w / 4, y % 100
    others = slice(100, None)  # classes that are never a target: sums of p / N, about 5e-7 each
    loss = ours(y, backend, options=SCHEDULES[schedule])
    exact = value_and_gradients(plain(y), doubled((x, w, b)))[1:]

    def error(found: Tensor, exact: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    for scaler in (1.0, 65536.0):
        dx, dw, db = value_and_gradients(loss, (x, w, b), scaler)[1:]
        for name, mine, e in (
            ("dx", dx, exact[0]),
            ("dw", dw, exact[1]),
            ("dw of others", dw[others], exact[1][others]),
            ("db of others", db[others], exact[2][others]),
        ):
            rounding = error((e * scaler).half().double() / scaler, e)
            found = error(mine.double() / scaler, e)
            assert found <= 2 * rounding + 5e-4, f"{name} at {scaler}: {found:.1e}, {rounding:.1e}"
    # The budget has teeth: 1/N folded in before dz is rounded does not meet it.
    z = F.linear(x.float(), w.float(), b.float()).requires_grad_()
    (dz,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    e = exact[1][others]
    folded = error((dz.half().double().T @ x.double())[others], e)
    assert folded > 2 * (2 * error(e.half(), e) + 5e-4)


@pytest.mark.parametrize("dtype", HALF)
def test_3_row_factors_may_differ_by_orders_of_magnitude(dtype: str, backend: str) -> None:
    x, w, b, y = make_inputs(64, 300, 16, DTYPES[dtype])
    rows = 10.0 ** torch.linspace(-6, 3, 64)
    oracle = value_and_gradients(plain(y, "none"), doubled((x, w, b)), rows.double())
    theirs = value_and_gradients(plain(y, "none"), (x, w, b), rows)
    found = value_and_gradients(ours(y, backend, reduction="none"), (x, w, b), rows)
    for name, *three in zip(NAMES, found, theirs, oracle, strict=False):
        assert_no_worse(name, *three)
    size = rows.unsqueeze(1).double()  # and each row on its own scale
    assert_no_worse("dx", found[1] / size, theirs[1] / size, oracle[1] / size, floor=1e-3)


# 4. Autograd's manners.

FORMS = {
    "one_sweep": {"options": SCHEDULES["one_sweep"]},
    "two_sweeps": {"options": SCHEDULES["two_sweeps"]},
    "none": {"reduction": "none"},
}


def leaves_and_loss(form: str, backend: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Leaves x, w, b and scale, their summed loss, and its gradients in float64."""
    x, w, b, y = small()
    scale = torch.tensor(1.3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b, scale)]
    loss = ours(y, backend, **FORMS[form])(*leaves).sum()
    expected = value_and_gradients(plain(y, "none" if form == "none" else "mean"), leaves)[1:]
    return leaves, loss, expected


@pytest.mark.parametrize("form", FORMS)
def test_4_backward_twice_with_different_upstream_gradients(form: str, backend: str) -> None:
    leaves, loss, expected = leaves_and_loss(form, backend)
    for factor in (1.0, 3.0, -0.5):
        found = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        for mine, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, factor * exact, rtol=1e-10, atol=1e-12)
        for mine in found:
            mine.zero_()  # a gradient belongs to whoever got it: nothing later may depend on it
    for leaf in leaves:
        leaf.grad = None
    loss.backward(retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    for leaf, exact in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_4_a_second_backward_without_retain_graph_raises(form: str, backend: str) -> None:
    _, loss, _ = leaves_and_loss(form, backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("changed", ["x", "w", "b", "scale"])
@pytest.mark.parametrize("form", FORMS)
def test_4_an_edit_of_an_input_before_backward_raises(
    form: str, changed: str, backend: str
) -> None:
    leaves, loss, _ = leaves_and_loss(form, backend)
    with torch.no_grad():
        leaves[["x", "w", "b", "scale"].index(changed)].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("form", FORMS)
def test_4_every_subset_of_inputs_wanting_a_gradient(form: str, backend: str) -> None:
    _, _, expected = leaves_and_loss(form, backend)
    x, w, b, y = small()
    tensors = (x, w, b, torch.tensor(1.3, dtype=torch.float64))
    for subset in itertools.product([False, True], repeat=4):
        leaves = [t.clone().requires_grad_(needs) for t, needs in zip(tensors, subset, strict=True)]
        loss = ours(y, backend, **FORMS[form])(*leaves).sum()
        assert loss.requires_grad == any(subset)
        if loss.requires_grad:
            loss.backward()
        for leaf, needs, exact in zip(leaves, subset, expected, strict=True):
            assert (leaf.grad is not None) == needs, subset
            if needs:
                torch.testing.assert_close(leaf.grad, exact, rtol=1e-10, atol=1e-12)


def test_4_unreduced_losses_take_any_upstream_gradient(backend: str) -> None:
    x, w, b, y = small()
    for upstream in (
        torch.randn(7, dtype=torch.float64),
        torch.tensor([0.0, 5.0, -1.0, 0.0, 2.0, 1e-8, 1e8], dtype=torch.float64),
        torch.zeros(7, dtype=torch.float64),
    ):
        found = value_and_gradients(ours(y, backend, reduction="none"), (x, w, b), upstream)
        expected = value_and_gradients(plain(y, "none"), (x, w, b), upstream)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["one_sweep", "two_sweeps"])
def test_4_second_derivatives_go_through_the_reference(form: str, backend: str) -> None:
    x, w, b, y = make_inputs(3, 11, 4)
    found = []
    for function in (ours(y, backend, **FORMS[form]), plain(y)):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*found)


def second_derivatives(gradients: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of the squared gradients, with a graph of their own."""
    total = sum(g.square().sum() for g in gradients)
    return list(torch.autograd.grad(total, leaves, create_graph=True))


@pytest.mark.parametrize("form", FORMS)
def test_4_third_derivatives_are_no_less_than_all_of_them(form: str, backend: str) -> None:
    """once_differentiable refuses in ``backward``; ``autograd.grad`` leaves its part out."""
    x, w, b, y = make_inputs(3, 11, 4)
    found = []
    for function in (
        ours(y, backend, **FORMS[form]),
        plain(y, FORMS[form].get("reduction", "mean")),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        found.append(second_derivatives(second_derivatives(first, leaves), leaves))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", FORMS)
def test_4_second_derivatives_by_transforms(form: str, backend: str) -> None:
    x, w, b, y = make_inputs(3, 11, 4)

    def twice(function, *tensors):
        def size(*tensors):
            return sum(g.square().sum() for g in torch.func.grad(function, (0, 1, 2))(*tensors))

        return torch.func.grad(size, (0, 1, 2))(*tensors)

    loss, same = ours(y, backend, **FORMS[form]), plain(y, FORMS[form].get("reduction", "mean"))
    found = twice(lambda *t: loss(*t).sum(), x, w, b)
    torch.testing.assert_close(found, twice(lambda *t: same(*t).sum(), x, w, b))


def test_4_what_is_not_differentiated_is_refused(backend: str) -> None:
    x, w, _, y = small()
    a = torch.rand(131, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="weight is not differentiated"):
        lossops.linear_cross_entropy(x, w, y, weight=a, backend=backend)
    with pytest.raises(ValueError, match="weight is not differentiated"):
        lossops.cross_entropy(x @ w.T, y, weight=a, label_smoothing=0.1, backend=backend)
    with pytest.raises(ValueError, match="class_vector is not differentiated"):
        lossops.linear_statistics(x, w, names=("weighted_sum",), class_vector=a, backend=backend)
    with pytest.raises(ValueError, match="teacher is not differentiated"):
        lossops.linear_statistics(
            x, w, names=("teacher",), teacher=a.expand(7, -1), backend=backend
        )


FIRST_ONLY = {
    "in place": lambda x, y: lossops.cross_entropy(x * 1, y, inplace=True),
    "normalised rows": lambda x, y: lossops.PartialFC(33, 33)(x, y),
    "factored": lambda x, y: lossops.FactoredSphericalHead(33, 33)(x, y),
    "chunks of logits": lambda x, y: lossops.catalogue.linear_normalized_focal_loss(x, x, y),
}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", FIRST_ONLY)
def test_4_second_derivatives_that_are_not_there_are_refused(name: str) -> None:
    """Not left out as zero: the upstream gradient of a loss itself is a constant."""
    x = torch.randn(5, 33, requires_grad=True)
    loss = FIRST_ONLY[name](x, torch.arange(5))
    with pytest.raises(RuntimeError, match="has first derivatives only, not for create_graph=True"):
        loss.backward(create_graph=True)


def test_4_losses_over_chunks_of_logits_do_not_pass_for_constants() -> None:
    """As torch's own ``once_differentiable`` would have it in ``autograd.grad``."""
    x = torch.randn(5, 33, requires_grad=True)
    loss = FIRST_ONLY["chunks of logits"](x, torch.arange(5))
    with pytest.raises(RuntimeError, match="a loss over chunks of logits has first derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


# 5. All rows ignored or weights summing to zero; targets out of range; NaN and infinities.

NOTHING = {
    "all-ignored": {"y": torch.full((7,), -100)},
    "class-weights-0": {"weight": torch.zeros(131, dtype=torch.float64)},
    "row-weights-0": {"sample_weight": torch.zeros(7, dtype=torch.float64)},
    "row-weights-cancel": {"sample_weight": torch.tensor([1.0, 9, -1, 2, 9, -2, 0]).double()},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("nothing", NOTHING)
def test_5_nothing_counted_is_loss_zero_and_gradient_zero(
    nothing: str, schedule: str, reduction: str, backend: str
) -> None:
    x, w, b, y = small()
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.01, **NOTHING[nothing]}
    y = options.pop("y", y)
    if nothing == "row-weights-cancel" and reduction != "mean":
        return  # only a mean divides by their sum
    if nothing == "class-weights-0" and reduction != "mean":
        del options["lse_square_scale"]  # which class weights leave alone
    if schedule != "one_sweep" or reduction != "none":
        options["options"] = SCHEDULES[schedule]
    scale = torch.tensor(1.5, dtype=torch.float64)
    found = value_and_gradients(ours(y, backend, reduction=reduction, **options), (x, w, b, scale))
    for name, value in zip(NAMES, found, strict=True):
        assert torch.equal(value, torch.zeros_like(value)), name
    if "options" not in options:
        return
    del options["options"]
    z = F.linear(x, w, b)
    found = value_and_gradients(
        lambda z: lossops.cross_entropy(z, y, reduction=reduction, backend=backend, **options), [z]
    )
    assert not any(value.any() for value in found)


def masked(case: str, position: int, mask: float, dtype: torch.dtype) -> dict[str, Any]:
    """Classes that are masked with a finite number: one, or all but the legal ones."""
    x, w, _, y = make_inputs(7, 131, 33, torch.float64, spread=2.0)
    y = torch.where(y == position, position + 1, y)
    b = torch.zeros(131, dtype=torch.float64)
    if position >= 0:
        b[position] = mask
    else:
        b, y = torch.full_like(b, mask), torch.full_like(y, 100)
        b[100], b[101] = 0.0, 0.0 if case == "several targets" else mask
    t = torch.rand(7, 131, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = t * (b == 0)
    leaves = [v.to(dtype) for v in (x, w, b)]
    return {"leaves": leaves, "y": y, "t": (t / t.sum(1, keepdim=True)).to(dtype),
            "a": torch.where(b == 0, 0.5, 0.0).to(dtype)}  # fmt: skip


MASKED: dict[str, tuple[Any, Any]] = {
    "probabilities": (
        lambda x, w, b, i, own: lossops.linear_cross_entropy(x, w, i["t"], linear_bias=b, **own),
        lambda z, i: F.cross_entropy(z, i["t"]),
    ),
    "probabilities, logits": (
        lambda x, w, b, i, own: lossops.cross_entropy(x @ w.T + b, i["t"], **own),
        lambda z, i: F.cross_entropy(z, i["t"]),
    ),
    "smoothing": (
        lambda x, w, b, i, own: lossops.linear_cross_entropy(
            x, w, i["y"], linear_bias=b, weight=i["a"], label_smoothing=0.1, **own
        ),
        lambda z, i: F.cross_entropy(z, i["y"], i["a"], label_smoothing=0.1),
    ),
    "smoothing of masks, too": (
        lambda x, w, b, i, own: lossops.linear_cross_entropy(
            x, w, i["y"], linear_bias=b, label_smoothing=0.1, **own
        ),
        lambda z, i: F.cross_entropy(z, i["y"], label_smoothing=0.1),
    ),
    "lse²": (
        lambda x, w, b, i, own: lossops.linear_cross_entropy(
            x, w, i["y"], linear_bias=b, lse_square_scale=1.0, **own
        ),
        lambda z, i: F.cross_entropy(z, i["y"]) + z.logsumexp(1).square().mean(),
    ),
    "several targets": (
        lambda x, w, b, i, own: lossops.linear_loss(
            x, w, torch.stack([i["y"], i["y"] + 1], 1), lambda s: -s.log_p[:, 0] + s.logsumexp,
            linear_bias=b, **own,
        ),
        lambda z, i: F.cross_entropy(z, i["y"]) + z.logsumexp(1).mean(),
    ),
    "statistics": (
        lambda x, w, b, i, own: lossops.linear_loss(
            x, w, i["y"], lambda s: s.logsumexp - s.target / 2, linear_bias=b, **own
        ),
        lambda z, i: (z.logsumexp(1) - z.gather(1, i["y"][:, None])[:, 0] / 2).mean(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30])
@pytest.mark.parametrize(
    ("case", "position"),
    # Of one legal class there are no probabilities.
    [(c, p) for c in MASKED for p in (0, 5, -1) if p >= 0 or "probabilities" not in c],
)
def test_5_classes_masked_with_a_finite_number(
    case: str, position: int, mask: float, backend: str
) -> None:
    """Others keep their digits: sums are not relative to a mask, nor targets to masks alone."""
    ours, plain = MASKED[case]
    given = masked(case, position, mask, torch.float32)
    leaves = given["leaves"]
    wide = {"y": given["y"], "t": given["t"].double(), "a": given["a"].double()}
    found = value_and_gradients(lambda *t: ours(*t, given, {"backend": backend}), leaves)
    dense = value_and_gradients(lambda x, w, b: plain(x @ w.T + b, given), leaves)
    exact = value_and_gradients(
        lambda x, w, b: plain(x @ w.T + b, wide), [t.double() for t in leaves]
    )
    for what, a, b, c in zip(("loss", "dx", "dw", "db"), found, dense, exact, strict=True):
        assert_no_worse(f"{case} {what}", a, b, c)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_5_no_rows_at_all(reduction: str, backend: str) -> None:
    x, w, b, y = make_inputs(0, 5, 3)
    loss, dx, dw, db = value_and_gradients(ours(y, backend, reduction=reduction), (x, w, b))
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert dx.shape == (0, 3)
    assert not any(t.any() for t in (loss, dw, db))


def test_5_a_half_precision_head_without_rows_or_with_all_ignored(backend: str) -> None:
    for dtype in HALF:
        x, w, b, y = make_inputs(9, 70, 8, DTYPES[dtype])
        found = value_and_gradients(ours(torch.full_like(y, -100), backend), (x, w, b))
        assert not any(value.any() for value in found)


@pytest.mark.parametrize("bad", [131, 10**12, -1, -99, -(10**12)])
def test_5_a_target_out_of_range_is_an_index_error(bad: int, backend: str) -> None:
    x, w, _, y = small()
    y[2] = bad
    x.requires_grad_()
    calls = [
        *(lambda o=o: ours(y, backend, options=o)(x, w) for o in SCHEDULES.values()),
        lambda: ours(y, backend, reduction="none")(x, w),
        lambda: lossops.linear_log_prob(x, w, y, backend=backend),
        lambda: lossops.linear_loss(x, w, y, lambda s: -s.log_p, backend=backend),
        lambda: lossops.cross_entropy(x @ w.T, y, backend=backend),
        lambda: lossops.cross_entropy(x @ w.T, y, inplace=True, backend=backend),
    ]
    if bad != -1:  # which pads where several are allowed
        calls.append(lambda: lossops.linear_statistics(x, w, y, backend=backend))
    for call in calls:
        with pytest.raises(IndexError, match=r"class ids in \[0, 131\) or ignore_index"):
            call()
    with torch.no_grad(), pytest.raises(IndexError, match="class ids"):
        ours(y, backend)(x, w)


POISONS = {
    "nan-in-x": ("x", (2, 0), float("nan")),
    "nan-in-w": ("w", (9, 1), float("nan")),
    "nan-in-b": ("b", (9,), float("nan")),
    "inf-in-x": ("x", (2, 0), float("inf")),
    "inf-logit": ("b", (9,), float("inf")),
    "inf-at-a-target": ("b", (5,), float("inf")),
    "masked-class": ("b", (9,), float("-inf")),
    "masked-target": ("b", (5,), float("-inf")),
    "masked-row": ("b", (slice(None),), float("-inf")),
}


@pytest.mark.parametrize("form", [*FORMS, "logits"])
@pytest.mark.parametrize("poison", POISONS)
def test_5_nan_and_infinities_propagate_as_in_pytorch(poison: str, form: str, backend: str) -> None:
    """That is how a loss scaler notices an overflow, and how a class is masked."""
    x, w, b, y = small()
    y[0] = 5
    name, at, value = POISONS[poison]
    {"x": x, "w": w, "b": b}[name][at] = value
    tensors = (x, w, b)
    if form == "logits":
        found = value_and_gradients(
            lambda x, w, b: lossops.cross_entropy(F.linear(x, w, b), y, backend=backend), tensors
        )
    else:
        found = value_and_gradients(ours(y, backend, **FORMS[form]), tensors)
    expected = value_and_gradients(plain(y, "none" if form == "none" else "mean"), tensors)
    # Rows nobody counts: 0 where they are skipped; PyTorch spreads the NaN of a class to them.
    found[1][y < 0] = expected[1][y < 0] = 0.0
    for name, mine, theirs in zip(NAMES, found, expected, strict=False):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-10, atol=1e-12, equal_nan=True, msg=f"{name}: {mine}"
        )


@pytest.mark.parametrize("form", [*FORMS, "logits"])
@pytest.mark.parametrize("poison", [p for p in POISONS if p != "masked-class"])
def test_5_so_they_do_where_targets_are_probabilities(poison: str, form: str, backend: str) -> None:
    x, w, b, _ = small()
    name, at, value = POISONS[poison]
    {"x": x, "w": w, "b": b}[name][at] = value
    p = torch.rand(7, 131, dtype=torch.float64)
    reduction = "none" if form == "none" else "mean"

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if form == "logits":
            return lossops.cross_entropy(F.linear(x, w, b), p, backend=backend)
        return ours(p, backend, **FORMS[form])(x, w, b)

    found = value_and_gradients(loss, (x, w, b))
    expected = value_and_gradients(
        lambda *t: F.cross_entropy(F.linear(*t), p, reduction=reduction), (x, w, b)
    )
    for name, mine, theirs in zip(NAMES, found, expected, strict=False):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-10, atol=1e-12, equal_nan=True, msg=f"{name}: {mine}"
        )


def test_5_an_fp16_product_that_overflows_is_no_overflow_here(backend: str) -> None:
    """Logits of 90,000 are infinite in fp16 and finite in float32."""
    x = torch.full((2, 4), 150.0, dtype=torch.float16)
    w = torch.stack([torch.full((4,), 150.0), torch.full((4,), 149.875), torch.zeros(4)]).half()
    loss = ours(torch.tensor([0, 1]), backend)(x, w)
    exact = plain(torch.tensor([0, 1]))(x.double(), w.double())
    torch.testing.assert_close(loss.double(), exact)


@pytest.mark.parametrize("size", [1e5, 1e8, 1e30])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_5_huge_finite_logits_are_no_overflow(schedule: str, size: float, backend: str) -> None:
    x, w, b, y = make_inputs(7, 300, 33, torch.float32)
    loss = ours(y, backend, options=SCHEDULES[schedule])
    found = value_and_gradients(loss, (x * size, w, b))
    exact = value_and_gradients(plain(y), doubled((x * size, w, b)))
    for name, mine, e in zip(NAMES, found, exact, strict=False):
        atol = 1e-5 * float(e.abs().max())
        torch.testing.assert_close(mine.double(), e, rtol=0, atol=atol, msg=f"{name}: {mine}")


# 6. Deterministic: the same bits for the same inputs.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_6_the_same_bits_again(dtype: str, form: str, backend: str) -> None:
    """Targets shared by many rows, whose order of summation must not depend on threads."""
    x, w, b, y = make_inputs(150, 4099, 16, DTYPES[dtype])
    y %= 5
    scale = torch.tensor(1.5)
    first = value_and_gradients(ours(y, backend, **FORMS[form]), (x, w, b, scale))
    for _ in range(2):
        again = value_and_gradients(ours(y, backend, **FORMS[form]), (x, w, b, scale))
        for name, a, b_ in zip(NAMES, first, again, strict=True):
            assert torch.equal(a, b_), name


# 7. N·V beyond 2^31. No buffer is N·V long, so what could overflow is an offset into what the
# caller gave, or into a chunk he asked to be large. Rows 2^30 elements apart in a sparse file have
# such offsets in a few pages of memory.


def far_apart(values: Tensor, folder: Path) -> Tensor:
    """The same rows, 2^30 + 24 elements apart."""
    n, width = values.shape
    stride = 2**30 + 24
    count = (n - 1) * stride + width
    path = folder / f"sparse{len(list(folder.iterdir()))}"
    with path.open("wb") as file:
        file.truncate(count * values.element_size())
    memory = torch.from_file(str(path), shared=True, size=count, dtype=values.dtype)
    return memory.as_strided((n, width), (stride, 1)).copy_(values)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_7_offsets_beyond_31_bits_into_inputs(dtype: str, backend: str, tmp_path: Path) -> None:
    x, w, b, y = make_inputs(4, 50, 16, DTYPES[dtype])
    for form in FORMS.values():
        found = []
        for rows in (x, far_apart(x, tmp_path)):
            leaves = [t.detach().requires_grad_() for t in (rows, w, b)]
            loss = ours(y, backend, **form)(*leaves)
            found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        assert all(torch.equal(near, far) for near, far in zip(*found, strict=True))
    z, p = F.linear(x, w, b), torch.rand(4, 50)
    far = far_apart(z, tmp_path)
    for target in (y, p):
        losses = [lossops.cross_entropy(t, target, reduction="none", backend=backend)
                  for t in (z, far)]  # fmt: skip
        assert torch.equal(*losses)
    losses = [ours(t, backend)(x, w, b) for t in (p, far_apart(p, tmp_path))]
    assert torch.equal(*losses)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
def test_7_offsets_beyond_31_bits_into_a_chunk(backend: str, tmp_path: Path) -> None:
    x, w, b, y = make_inputs(3, 50, 16, torch.float32)
    primitives = backends.BACKENDS[backend].primitives()
    names = canonical(["lse", "target"])
    head = (x, w, b, None, 0.0, y.unsqueeze(1), None, None, names)
    found = []
    stride = schedules.row_stride(50)
    near = torch.empty(3 * stride).as_strided((3, 50), (stride, 1))
    far = far_apart(torch.zeros(3, 51), tmp_path)[:, :50]  # with the room of a `row_stride`
    for buffer in (near, far):
        stats = primitives.linear_chunk_statistics(*head, ["lse", "target"], buffer)
        coefficients = [None, -torch.ones(3, 1), torch.ones(3)]
        gradients = [torch.empty_like(t) for t in (x, w, b)]
        primitives.linear_chunk_gradient(
            *head, ["lse", "target"], buffer, stats, coefficients, *gradients, False
        )
        found.append([*stats, *gradients])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)  # a GEMM may mind the stride


@pytest.mark.slow
def test_7_more_than_31_bits_of_logits(backend: str) -> None:
    """2.2e9 of them; the last rows come out as they do alone."""
    if backend == "reference":
        pytest.skip("minutes, and the reference has no offsets of its own")
    x, w, _, y = make_inputs(66_000, 32_768, 1, torch.float32)
    tail = slice(-50, None)
    loss = ours(y, backend, reduction="none")
    losses, dx, _ = value_and_gradients(loss, (x, w))
    alone = value_and_gradients(ours(y[tail], backend, reduction="none"), (x[tail], w))
    torch.testing.assert_close([losses[tail], dx[tail]], alone[:2])


# 8. Frozen inputs skip their GEMM; under no_grad no gradient is computed.


class Spy:
    """A backend's primitives, each call recorded with the names of the reference's arguments."""

    def __init__(self, module: object) -> None:
        self.module = module
        self.calls: list[tuple[str, dict]] = []

    def __getattr__(self, name: str):
        function = getattr(self.module, name)

        def recorded(*arguments: object) -> object:
            bound = inspect.signature(getattr(reference, name)).bind(*arguments)
            self.calls.append((name, bound.arguments))
            return function(*arguments)

        return recorded


@pytest.fixture
def spy(backend: str, monkeypatch: pytest.MonkeyPatch) -> Spy:
    entry = backends.BACKENDS[backend]
    found = Spy(entry.primitives())
    monkeypatch.setitem(backends.BACKENDS, backend, replace(entry, primitives=lambda: found))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", ["x", "w", "b", "scale", "x-w"])
def test_8_frozen_inputs_skip_their_product(wanted: str, form: str, backend: str, spy: Spy) -> None:
    x, w, b, y = small()
    leaves = {"x": x, "w": w, "b": b, "scale": torch.tensor(1.3, dtype=torch.float64)}
    for name in wanted.split("-"):
        leaves[name].requires_grad_()
    ours(y, backend, **FORMS[form])(*leaves.values()).sum().backward()
    gradients = [arguments for name, arguments in spy.calls if name.endswith("_gradient")]
    assert gradients
    for arguments in gradients:
        assert (arguments["dx"] is not None) == (wanted in ("x", "scale", "x-w"))
        assert (arguments["dw"] is not None) == (wanted in ("w", "x-w"))
        assert (arguments["db"] is not None) == (wanted == "b")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, None])
def test_8_no_gradient_is_computed_that_nobody_can_ask_for(
    context: type | None, reduction: str, backend: str, spy: Spy
) -> None:
    x, w, b, y = small()
    call = ours(y, backend, reduction=reduction)
    if context is None:  # nothing requires a gradient
        loss = call(x, w, b)
    else:
        with context():
            loss = call(x.clone().requires_grad_(), w.clone().requires_grad_(), b)
    assert not loss.requires_grad
    assert [name for name, _ in spy.calls] == ["linear_statistics"]
    assert all(buffer.get("buffer") is None for _, buffer in spy.calls)


def test_8_a_gradient_of_the_logits_is_computed_in_backward_only(backend: str, spy: Spy) -> None:
    x, w, _, y = small()
    loss = lossops.cross_entropy((x @ w.T).requires_grad_(), y, backend=backend)
    assert [name for name, _ in spy.calls] == ["logits_statistics"]
    loss.backward()
    assert [name for name, _ in spy.calls] == ["logits_statistics", "logits_gradient"]


def test_8_ignored_rows_cost_nothing_in_one_sweep(backend: str, spy: Spy) -> None:
    x, w, b, y = small()
    ours(y, backend, options=SCHEDULES["one_sweep"])(x.requires_grad_(), w, b).backward()
    rows = [arguments["x"].shape[0] for name, arguments in spy.calls if "chunk" in name]
    assert set(rows) == {5}


# 9. Any layout.

LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "every-second-row": lambda t: torch.stack([t, -t], 1)[:, 0],
    "every-second-column": lambda t: torch.stack([t, -t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_9_the_layout_of_every_input_is_free(
    form: str, layout: str, dtype: str, backend: str
) -> None:
    x, w, b, y = small(DTYPES[dtype])
    weight, rows = torch.rand(131), torch.rand(7)

    def run(change) -> list[Tensor]:
        leaves = [change(t).detach().requires_grad_() for t in (x, w, b)]
        options = {"weight": change(weight), "sample_weight": change(rows), **FORMS[form]}
        loss = ours(change(y), backend, label_smoothing=0.1, **options)(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    for name, mine, exact in zip(NAMES, run(LAYOUTS[layout]), run(lambda t: t), strict=False):
        atol = 2 * FLOOR[mine.dtype] * float(exact.abs().max())
        torch.testing.assert_close(mine, exact, rtol=0, atol=atol, msg=f"{name}: {mine}")


def test_9_expanded_inputs(backend: str) -> None:
    """Stride 0, also for the upstream gradient."""
    x, w, b, y = small()
    for form in FORMS.values():
        parts = (x[:1], w[:, :1], b[:1])

        def expanded(function, parts=parts):
            return lambda x, w, b: function(x.expand(7, 33), w.expand(131, 33), b.expand(131))

        kind = "none" if form.get("reduction") == "none" else "mean"
        found = value_and_gradients(expanded(ours(y, backend, **form)), parts)
        expected = value_and_gradients(expanded(plain(y, kind)), parts)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_9_leading_dimensions_are_flattened(backend: str) -> None:
    x, w, b, y = make_inputs(24, 131, 33)
    rows = torch.rand(24, dtype=torch.float64)
    flat = ours(y, backend, reduction="none", sample_weight=rows)(x, w, b)
    cube = ours(y.view(2, 3, 4), backend, reduction="none", sample_weight=rows.view(2, 3, 4))
    # A batch-first view of time-first activations: flattening it copies.
    turned = x.view(2, 3, 4, 33).transpose(0, 2).contiguous().transpose(0, 2)
    for shaped in (x.view(2, 3, 4, 33), turned):
        found = cube(shaped, w, b)
        assert found.shape == (2, 3, 4)
        torch.testing.assert_close(found.flatten(), flat)
    one = ours(y[0], backend)(x[0], w, b)
    torch.testing.assert_close(one, F.cross_entropy(F.linear(x[0], w, b), y[0]))


@pytest.mark.parametrize("form", FORMS)
def test_9_mixed_dtypes_are_promoted_and_gradients_come_back_in_their_own(
    form: str, backend: str
) -> None:
    x, w, b, y = small(torch.float32)
    half = x.bfloat16()
    found = value_and_gradients(ours(y, backend, **FORMS[form]), (half, w, b.double().half()))
    expected = value_and_gradients(
        ours(y, backend, **FORMS[form]), (half.float(), w, b.half().float())
    )
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact.to(mine.dtype))


@pytest.mark.parametrize("form", FORMS)
def test_9_autocast_computes_in_its_dtype(form: str, backend: str) -> None:
    x, w, b, y = small(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(ours(y, backend, **FORMS[form]), (x, w, b))
    expected = value_and_gradients(
        ours(y, backend, **FORMS[form]), [t.bfloat16() for t in (x, w, b)]
    )
    assert {t.dtype for t in found} == {torch.float32}
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=2**-7, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # float64 stays, as in PyTorch's own rules
        assert ours(y, backend)(x.double(), w.double(), b.double()).dtype == torch.float64


# Memory, which is a test as well: peak bytes stay under the formula of the docstring.

MIB = 2**20
HEAD = (1024, 32, 32768)  # N, D, V: 128 MiB of float32 logits, of which none of these may hold half
MEMORY = {
    "one_sweep-f32": ("f32", {"max_workspace_bytes": 32 * MIB}, 32 * MIB),
    "one_sweep-bf16": ("bf16", {"max_workspace_bytes": 32 * MIB}, 32 * MIB),
    "two_sweeps-f32": ("f32", {"schedule": "two_sweeps"}, 64 * MIB),
    "two_sweeps-bf16": ("bf16", {"schedule": "two_sweeps"}, 64 * MIB + 4 * 32 * 1024),
    "sigmoid-f32": ("f32", {}, 16 * MIB),
    "sigmoid-bf16": ("bf16", {}, 16 * MIB + 4 * 32 * (1024 + 32768)),
    "softmax-f32": ("f32", {}, 16 * MIB),
}
PAIRS = {
    "sigmoid": lambda x, w, **o: lossops.sigmoid_pairwise_loss(x, w, 10.0, -10.0, **o),
    "softmax": lambda x, w, **o: lossops.softmax_pairwise_loss(x, w, 10.0, **o),
}


def peak_bytes(*backends: str) -> None:
    """Run each case in a fork of this process and print its peak beyond inputs and gradients."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    for backend, case in itertools.product(backends, MEMORY):
        if os.fork():
            os.wait()
            continue
        torch.set_num_threads(2)
        dtype, options, _ = MEMORY[case]
        n, d, v = HEAD
        leaves = [torch.empty(k, d, dtype=DTYPES[dtype]).uniform_(-1, 1).requires_grad_()
                  for k in (n, v)]  # fmt: skip
        y = torch.arange(n)
        options = {"options": LinearLossOptions(**options)} if options else {}
        loss = PAIRS.get(case.partition("-")[0])
        call = loss and functools.partial(loss, backend=backend)
        # Threads, GEMM's own buffers and lazy imports are paid once, not by this call.
        (call or ours(y[:64], backend))(leaves[0][:64], leaves[1][:64]).backward()
        leaves[0].grad = leaves[1].grad = None
        before = status("VmRSS")
        (call or ours(y, backend, **options))(*leaves).backward()
        gradients = sum(t.grad.nbytes for t in leaves)
        print(json.dumps([backend, case, status("VmHWM") - before - gradients]), flush=True)
        os._exit(0)


@pytest.fixture(scope="session")
def measured() -> dict[tuple[str, str], int]:
    """Peak bytes of each backend and case, in a process whose malloc gives back what is freed."""
    cpu = torch.device("cpu")
    able = [n for n, b in backends.BACKENDS.items() if b.objection(cpu, torch.float32) is None]
    folder = str(Path(__file__).parent)
    command = f"import sys; sys.path.insert(0, {folder!r}); from test_contract import peak_bytes"
    done = subprocess.run(
        [sys.executable, "-c", f"{command}; peak_bytes(*sys.argv[1:])", *able],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB // 2)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(backend, case): size for backend, case, size in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", MEMORY)
def test_peak_memory_stays_under_the_formula(
    case: str, backend: str, measured: dict[tuple[str, str], int]
) -> None:
    bound, peak = MEMORY[case][2], measured[backend, case]
    assert peak <= bound + 8 * MIB, f"{peak / MIB:.0f} MiB, allowed {bound / MIB:.0f}"
