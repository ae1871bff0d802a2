"""Near and far gradients against their definition on a dense M, written here once more.

The sweeps give, in float64, what the definition gives to the last digits, whatever the loss, the
schedule and the backend. How far that is from the exact gradient is a property of the method, not
of rounding: it is held against the certificate, against what a trial reports, and against the
promise to take the dense gradient where the far form is not good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_no_worse
from torch import Tensor

import lossops
from lossops import near_far, near_far_errors, near_far_sweep, reference
from lossops.backends import BACKENDS
from lossops.near_far import BLOCK, GROUP, FarSums, NearFar, alike_rows
from lossops.schedules import Head, LinearLossOptions

TAU = 2.0**-11
ONE, TWO = LinearLossOptions(chunk_rows=256), LinearLossOptions(schedule="two_sweeps")
SCHEDULES = {"one": ONE, "two": TWO}
N, V, D = 330, 2 * GROUP + 77, 24  # ragged blocks and groups


def trained(
    n: int = N, v: int = V, d: int = D, dtype: torch.dtype = torch.float64, spread: float = 0.02
) -> tuple[Tensor, Tensor, Tensor]:
    """x, w, target as after training: rows in clusters, peaked logits, a long tail."""
    centres = torch.randn(3, d, dtype=torch.float64)
    x = centres[torch.randint(3, (n,))] + spread * torch.randn(n, d, dtype=torch.float64)
    w = 0.5 * torch.randn(v, d, dtype=torch.float64)
    return x.to(dtype), w.to(dtype), torch.randint(v, (n,))


def definition(m: Tensor, near: Tensor) -> Tensor:
    """M with its far columns in their form, block by block and group by group."""
    out = m.clone()
    for i, rows in enumerate(m.split(BLOCK)):
        for first in range(0, m.shape[1], GROUP):
            part = rows[:, first : first + GROUP]
            far = part.masked_fill(near[i, first : first + GROUP], 0.0)
            size = far.abs().sum()
            if size == 0:
                continue
            r, c, total = far.sum(1), far.sum(0), far.sum()
            u, v = far.abs().sum(0) / size, far.abs().sum(1) / size
            form = r.outer(u) + v.outer(c) - total * v.outer(u)
            block = out[i * BLOCK : i * BLOCK + len(rows), first : first + GROUP]
            block += (form - part).masked_fill(near[i, first : first + GROUP], 0.0)
    return out


def near_columns(m: Tensor, limit: Tensor) -> Tensor:
    """(B, V): whether some |M_ij| of the block is above the row's limit."""
    above = m.abs() > limit.unsqueeze(1)
    return torch.stack([part.any(0) for part in above.split(BLOCK)])


def always_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial rejects anything: the far form whatever it is worth."""
    monkeypatch.setattr(near_far_errors, "MAX_NEAR", 1.0)
    monkeypatch.setattr(near_far_errors, "MAX_ERROR", math.inf)
    monkeypatch.setattr(near_far_errors, "MAX_CLASS_ERROR", math.inf)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def dense_m(x: Tensor, w: Tensor, y: Tensor | None, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """∂loss/∂(x wᵀ) by autograd through stored logits, 0 at the targets."""
    z = (x @ w.T).detach().requires_grad_()
    m = torch.autograd.grad(loss(z), z)[0]
    if y is not None:
        m = m.clone()
        m[y >= 0] = m[y >= 0].scatter(1, y[y >= 0].unsqueeze(1), 0.0)
    return m


# One regime each: nothing beside the softmax; terms that are class vectors times a row; one that
# changes all of M; factors of both signs, where the form is the signed one.
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weighted_smoothing": {"label_smoothing": 0.1, "weight": "classes"},
    "bias": {"linear_bias": "classes"},
    "softcap": {"softcap": 20.0},
    "softcap_smoothing": {"softcap": 20.0, "label_smoothing": 0.1},
    "lse_square": {"lse_square_scale": 1e-2},
    "scale": {"logit_scale": 0.8},
    "signed": {"sample_weight": "rows"},
}


def keywords(terms: str) -> dict[str, Any]:
    made = {"classes": 0.5 + torch.rand(V, dtype=torch.float64),
            "rows": torch.randn(N, dtype=torch.float64)}  # fmt: skip
    return {k: made[t] if isinstance(t, str) else t for k, t in TERMS[terms].items()}


def plain_loss(z: Tensor, y: Tensor, terms: dict[str, Any]) -> Tensor:
    """Cross-entropy with all terms, on logits x wᵀ."""
    z = z * terms.get("logit_scale", 1.0) + terms.get("linear_bias", 0.0)
    if cap := terms.get("softcap"):
        z = cap * torch.tanh(z / cap)
    counted = y >= 0
    a = terms.get("weight", torch.ones(z.shape[1], dtype=z.dtype))
    s = terms.get("sample_weight", torch.ones(len(y), dtype=z.dtype))
    eps, log_p = terms.get("label_smoothing", 0.0), z.log_softmax(1)
    u = s * a[y.clamp_min(0)]
    nll = -u * log_p.gather(1, y.clamp_min(0).unsqueeze(1)).squeeze(1)
    smooth = -s * (log_p * a).mean(1)
    square = s * terms.get("lse_square_scale", 0.0) * z.logsumexp(1).square()
    total = torch.where(counted, (1 - eps) * nll + eps * smooth + square, 0.0).sum()
    return total / torch.where(counted, u, 0.0).sum()


@pytest.mark.parametrize("terms", TERMS)
def test_one_sweep_is_the_definition(
    backend: str, terms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_far(monkeypatch)
    x, w, y = trained()
    y[::7] = -100
    given = keywords(terms)
    x.requires_grad_()
    w.requires_grad_()
    loss = lossops.linear_cross_entropy(
        x, w, y, near_threshold=TAU, options=ONE, backend=backend, **given
    )
    exact = plain_loss(x @ w.T, y, given)
    assert torch.allclose(loss, exact, rtol=1e-12)
    dx, dw = gradients(loss, x, w)
    true_dx, true_dw = gradients(exact, x, w)

    # Rows of a class vector times a coefficient stay exact, and out of M.
    constant = torch.zeros(N, V, dtype=x.dtype)
    counted = y >= 0
    if given.get("label_smoothing") and not given.get("softcap"):
        a = given.get("weight", torch.ones(V, dtype=x.dtype))
        s = torch.ones(N, dtype=x.dtype)
        divisor = a[y[counted]].sum() if "weight" in given else counted.sum()
        constant[counted] = -(0.1 / V) * s[counted].unsqueeze(1) * a / divisor
    m = dense_m(x, w, None, lambda z: plain_loss(z, y, given))
    rest = m - constant
    rest[counted] = rest[counted].scatter(1, y[counted].unsqueeze(1), 0.0)

    order = counted.nonzero().squeeze(1)
    order = order[alike_rows(x.detach()[order])]
    g = row_scale(y, given)[order] * given.get("logit_scale", 1.0)  # m has the scale, dz not
    near = near_columns(rest[order], TAU * g)
    assert 0 < near.double().mean() < 0.5
    far = definition(rest[order], near)
    approximated = m.clone()
    approximated[order] += far - rest[order]
    assert torch.allclose(dx, approximated @ w, rtol=0, atol=1e-12 * true_dx.abs().max())
    assert torch.allclose(dw, approximated.T @ x, rtol=0, atol=1e-12 * true_dw.abs().max())
    assert (dw - true_dw).abs().max() > 1e-9 * true_dw.abs().max()  # it was not dense after all


def row_scale(y: Tensor, given: dict[str, Any]) -> Tensor:
    """g: the sum of a row's factors, over the divisor of the mean."""
    counted = y >= 0
    a = given.get("weight", torch.ones(V, dtype=torch.float64))
    s = given.get("sample_weight", torch.ones(N, dtype=torch.float64))
    eps = given.get("label_smoothing", 0.0)
    u = s * a[y.clamp_min(0)]
    total = ((1 - eps) * u).abs() + (given.get("lse_square_scale", 0.0) * s).abs()
    if eps:
        each = s * eps if "weight" not in given else s * eps / V
        total = total + each.abs() + (each if "weight" not in given else each * a.sum()).abs()
    return total / torch.where(counted, u, 0.0).sum().abs()


@pytest.mark.parametrize("terms", TERMS)
def test_two_sweeps_are_the_definition(
    backend: str, terms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rows are held against is the largest coefficient: here of lse, over all rows."""
    always_far(monkeypatch)
    x, w, y = trained()
    y[::7] = -100
    given = keywords(terms)
    x.requires_grad_()
    w.requires_grad_()
    loss = lossops.linear_cross_entropy(
        x, w, y, near_threshold=TAU, options=TWO, backend=backend, **given
    )
    dx, dw = gradients(loss, x, w)
    exact = plain_loss(x @ w.T, y, given)
    true_dx, true_dw = gradients(exact, x, w)
    error_x = (dx - true_dx).norm() / true_dx.norm()
    error_w = (dw - true_dw).norm() / true_dw.norm()
    assert 0 < error_x < 0.05
    assert 0 < error_w < 0.02
    one = lossops.linear_cross_entropy(
        x, w, y, near_threshold=2.0**-40, options=TWO, backend=backend, **given
    )
    for found, true in zip(gradients(one, x, w), (true_dx, true_dw), strict=True):
        assert torch.allclose(found, true, rtol=0, atol=1e-9 * true.abs().max())


def test_statistics_are_the_definition_in_two_sweeps(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed coefficients of several statistics at once, no target."""
    always_far(monkeypatch)
    x, w, _ = trained()
    x.requires_grad_()
    w.requires_grad_()
    c = torch.randn(N, dtype=x.dtype)
    stats = lossops.linear_statistics(
        x, w, names=("lse", "entropy"), near_threshold=TAU, backend=backend
    )
    dx, dw = gradients((c * stats.lse + 0.3 * stats.entropy).sum(), x, w)

    def plain(z: Tensor) -> Tensor:
        p, log_p = z.softmax(1), z.log_softmax(1)
        return (c * z.logsumexp(1) - 0.3 * (p * log_p).sum(1)).sum()

    m = dense_m(x, w, None, plain)
    order = alike_rows(x.detach())
    # The entropy is lse - mean of z under q: coefficients c + 0.3 of lse and -0.3 of the mean.
    scale = ((c + 0.3).abs() + 0.3).max().expand(N)
    near = near_columns(m[order], TAU * scale)
    far = torch.empty_like(m)
    far[order] = definition(m[order], near)
    assert 0 < near.double().mean() < 0.5
    assert torch.allclose(dx, far @ w, rtol=0, atol=1e-11 * dx.abs().max())
    assert torch.allclose(dw, far.T @ x, rtol=0, atol=1e-11 * dw.abs().max())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("terms", ["plain", "signed"])
def test_row_and_column_sums_are_exact(
    backend: str, schedule: str, terms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a feature of w is 1, dx is a row sum of dz; of x, dw a column sum, as db is."""
    always_far(monkeypatch)
    x, w, y = trained()
    x[:, 0] = w[:, 1] = 1.0
    b = torch.zeros(V, dtype=x.dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    given = keywords(terms)

    def grads(**more: Any) -> list[Tensor]:
        loss = lossops.linear_cross_entropy(
            x, w, y, linear_bias=b, options=SCHEDULES[schedule], backend=backend, **given, **more
        )
        return gradients(loss, *leaves)

    (dx, dw, db), (true_dx, true_dw, true_db) = grads(near_threshold=0.5), grads()
    assert torch.allclose(dx[:, 1], true_dx[:, 1], rtol=0, atol=1e-13 * true_dx.abs().max())
    assert torch.allclose(dw[:, 0], true_dw[:, 0], rtol=0, atol=1e-13 * true_dw.abs().max())
    assert torch.allclose(db, true_db, rtol=0, atol=1e-13 * true_db.abs().max())
    assert not torch.allclose(dx, true_dx, rtol=0, atol=1e-9 * true_dx.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("signed", [False, True])
def test_far_sums_of_the_compiled_backend(dtype: torch.dtype, signed: bool) -> None:
    """Ragged blocks, groups and vectors, a row stride, limits that some entries meet exactly."""
    cpp = BACKENDS["cpp"]
    if sentence := cpp.objection(torch.device("cpu"), dtype):
        pytest.skip(sentence)
    for n, v, block, group in ((1, 1, 4, 8), (37, 300, 16, 128), (130, 2049, 128, 2048)):
        m = torch.rand(n, v + 5, dtype=dtype)[:, :v]
        m[:, ::3] *= 0.05
        factor = torch.rand(n, dtype=dtype) - (0.5 if signed else 0.0)
        limit = torch.full((n,), 0.3, dtype=dtype)
        limit[0] = 0.0
        m[0, ::2] = 0.0
        found = cpp.primitives().far_sums(m, factor, limit, block, group)
        true = reference.far_sums(m.double(), factor.double(), limit.double(), block, group)
        assert len(found) == len(true) == (5 if signed and n > 1 else 3)
        exact = reference.far_sums(m, factor, limit, block, group)
        assert torch.equal(found[0], exact[0])
        for name, ours, plain, oracle in zip("rcrc", found[1:], exact[1:], true[1:], strict=False):
            if dtype == torch.float64:  # the oracle is the reference itself
                assert torch.allclose(ours, oracle, rtol=1e-13, atol=1e-14)
            else:
                assert_no_worse(name, ours, plain, oracle)


def test_alike_rows_is_a_permutation_that_groups_alike_rows() -> None:
    x, _, _ = trained(n=1000)
    for rows in (x, x[:5], x[:0], x.float(), torch.zeros_like(x), torch.full_like(x, torch.nan)):
        assert torch.equal(alike_rows(rows).sort()[0], torch.arange(len(rows)))
    ordered = x[alike_rows(x)]
    within = torch.stack([part.var(0).sum() for part in ordered.split(BLOCK)]).mean()
    assert within < 0.25 * x.var(0).sum()  # 3 clusters in 8 blocks: at most 2 blocks are mixed


def test_certificate_is_never_below_the_error(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the far form is bad, and with signs; on trained rows it says something."""
    always_far(monkeypatch)
    options = LinearLossOptions(chunk_rows=256, near_certificate=True)
    ratios = []
    for spread, threshold, weight in (
        (0.02, TAU, None), (0.02, 0.5, None), (1.0, 2.0**-8, None), (0.1, TAU, torch.randn(N)),
    ):  # fmt: skip
        x, w, y = trained(spread=spread)
        x.requires_grad_()
        w.requires_grad_()
        true = gradients(lossops.linear_cross_entropy(x, w, y, sample_weight=weight), x, w)
        found = lossops.linear_cross_entropy(
            x, w, y, near_threshold=threshold, options=options, backend=backend,
            sample_weight=weight, outputs=("near_far",),
        )  # fmt: skip
        grads = gradients(found.loss, x, w)
        report = found.near_far
        assert report is not None
        assert report.dense_fraction == 0
        bounds = (report.certificate_dx, report.certificate_dw)
        for g, t, bound in zip(grads, true, bounds, strict=True):
            error = (g - t).norm() / g.norm()
            assert error <= bound
            ratios.append(float(bound / error))
    assert min(ratios[:2]) < 30


def test_report_tells_what_happened(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    always_far(monkeypatch)
    x, w, y = trained(n=512)
    x.requires_grad_()
    w.requires_grad_()
    true = gradients(lossops.linear_cross_entropy(x, w, y), x, w)
    found = lossops.linear_cross_entropy(
        x, w, y, near_threshold=TAU, options=ONE, backend=backend, outputs=("near_far",)
    )
    grads, report = gradients(found.loss, x, w), found.near_far
    assert report is not None
    assert report.dense_fraction == 0
    assert 0 < report.near_fraction < 0.3
    m = dense_m(x, w, y, lambda z: plain_loss(z, y, {}))
    order = alike_rows(x.detach())
    near = near_columns(m[order], torch.full((512,), TAU / 512, dtype=x.dtype))
    assert torch.allclose(report.near_fraction, near.double().mean())
    far = m[order].masked_fill(near.repeat_interleave(BLOCK, 0)[:512], 0.0)
    assert torch.allclose(report.far_mass, far.sum() / m.sum())
    for g, t, said in zip(grads, true, (report.error_dx, report.error_dw), strict=True):
        error = (g - t).norm() / t.norm()
        assert (
            error / 4 < said < 4 * error
        )  # a sample of rows, classes and features, the worst chunk
    assert report.certificate_dx.isnan()


def test_target_error_chooses_a_threshold(backend: str) -> None:
    x, w, y = trained(n=512)
    x.requires_grad_()
    w.requires_grad_()
    true = gradients(lossops.linear_cross_entropy(x, w, y), x, w)
    fractions = []
    for target in (0.02, 0.0005):
        options = LinearLossOptions(chunk_rows=256, near_target_error=target)
        found = lossops.linear_cross_entropy(
            x, w, y, near_threshold="auto", options=options, backend=backend, outputs=("near_far",)
        )
        report = found.near_far
        assert report is not None
        assert max(report.error_dx, report.error_dw) <= target
        for g, t in zip(gradients(found.loss, x, w), true, strict=True):
            assert (g - t).norm() / t.norm() <= 4 * target
        fractions.append(float(report.near_fraction))
    assert fractions[0] < fractions[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_aside_where_it_is_no_good(backend: str, schedule: str) -> None:
    """Flat logits, and logits with a peak in every column: the dense products."""
    for scale in (0.02, 3.0):
        x, w = torch.randn(300, 64), scale * torch.randn(3000, 64)
        y = torch.randint(3000, (300,))
        x.requires_grad_()
        w.requires_grad_()
        call = {"options": SCHEDULES[schedule], "backend": backend}
        true = gradients(lossops.linear_cross_entropy(x, w, y, **call), x, w)
        found = gradients(
            lossops.linear_cross_entropy(x, w, y, near_threshold="auto", **call), x, w
        )
        for g, t in zip(found, true, strict=True):
            assert torch.allclose(g, t, rtol=0, atol=1e-6 * t.abs().max())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(backend: str, bad: float) -> None:
    x, w, y = trained()
    x[5, 3] = bad
    x.requires_grad_()
    w.requires_grad_()
    dx, _ = gradients(
        lossops.linear_cross_entropy(x, w, y, near_threshold=TAU, options=ONE, backend=backend),
        x, w,
    )  # fmt: skip
    assert dx[5].isnan().any()
    assert dx[:5].isfinite().all()
    assert dx[6:].isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_rows_ignored_and_no_rows(backend: str, schedule: str) -> None:
    for n in (0, 9):
        x, w, _ = trained(n=n)
        x.requires_grad_()
        w.requires_grad_()
        y = torch.full((n,), -100)
        loss = lossops.linear_cross_entropy(
            x, w, y, near_threshold=TAU, options=SCHEDULES[schedule], backend=backend
        )
        assert loss == 0
        for g in gradients(loss, x, w):
            assert (g == 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_bits_twice_and_for_every_subset_of_gradients(backend: str, schedule: str) -> None:
    x, w, y = trained(dtype=torch.float32)
    b, t = torch.zeros(V), torch.tensor(1.1)
    leaves = [p.requires_grad_() for p in (x, w, b, t)]

    def loss() -> Tensor:
        return lossops.linear_cross_entropy(
            x, w, y, linear_bias=b, logit_scale=t, near_threshold=TAU,
            options=SCHEDULES[schedule], backend=backend,
        )  # fmt: skip

    full = gradients(loss(), *leaves)
    for g, again in zip(full, gradients(loss(), *leaves), strict=True):
        assert torch.equal(g, again)
    for i, leaf in enumerate(leaves):
        for p in leaves:
            p.requires_grad_(p is leaf)
        assert torch.equal(gradients(loss(), leaf)[0], full[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_dtypes_have_the_error_of_float64(
    backend: str, dtype: torch.dtype, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method's own error on the same numbers, and the rounding of the dense gradient."""
    always_far(monkeypatch)
    x, w, y = trained(dtype=dtype)
    wide = [t.double().requires_grad_() for t in (x, w)]
    x.requires_grad_()
    w.requires_grad_()

    def grads(x: Tensor, w: Tensor, **more: Any) -> list[Tensor]:
        loss = lossops.linear_cross_entropy(
            x, w, y, options=SCHEDULES[schedule], backend=backend, **more
        )
        assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        return gradients(loss * 65536, x, w)  # a loss scale: fp16 has no digits for 1 / N

    true, far = grads(*wide), grads(*wide, near_threshold=TAU)
    rounded = grads(x, w)
    for ours, t, f, r in zip(grads(x, w, near_threshold=TAU), true, far, rounded, strict=True):
        budget = 2 * (r.double() - t).norm() + 1.2 * (f - t).norm()
        assert (ours.double() - t).norm() <= budget


def test_linear_loss_in_one_sweep_and_two(backend: str) -> None:
    def focal(stats: lossops.RowStatistics) -> Tensor:
        return -(2 * stats.log_1mp).exp() * stats.log_p

    x, w, y = trained(n=512)
    x.requires_grad_()
    w.requires_grad_()
    true = gradients(lossops.linear_loss(x, w, y, focal), x, w)
    for options in (ONE, TWO):
        loss = lossops.linear_loss(
            x, w, y, focal, near_threshold=TAU, options=options, backend=backend
        )
        for g, t in zip(gradients(loss, x, w), true, strict=True):
            assert 0 < (g - t).norm() / t.norm() < 0.01


def test_second_backward_and_log_prob(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    always_far(monkeypatch)
    x, w, y = trained(n=256)
    x.requires_grad_()
    w.requires_grad_()
    loss = lossops.linear_cross_entropy(x, w, y, near_threshold=TAU, options=ONE, backend=backend)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for g, again in zip(first, torch.autograd.grad(3 * loss, (x, w)), strict=True):
        assert torch.allclose(3 * g, again, rtol=1e-12)
    log_prob = lossops.linear_log_prob(x, w, y, near_threshold=2.0**-14, backend=backend)
    true = gradients(lossops.linear_log_prob(x, w, y, backend=backend).sum(), x, w)
    for g, t in zip(gradients(log_prob.sum(), x, w), true, strict=True):
        assert 0 < (g - t).norm() / t.norm() < 0.01


def test_compiles_into_one_graph() -> None:
    x, w, y = trained(n=256, dtype=torch.float32)
    x.requires_grad_()
    w.requires_grad_()

    def step(x: Tensor, w: Tensor) -> Tensor:
        return lossops.linear_cross_entropy(x, w, y, near_threshold=TAU, options=ONE)

    plain = gradients(step(x, w), x, w)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for g, t in zip(gradients(compiled(x, w), x, w), plain, strict=True):
        assert torch.equal(g, t)


@pytest.mark.parametrize("rows", [0, 4])
def test_a_certificate_of_no_rows(rows: int) -> None:
    """Bounds of a gradient that is 0: of no rows, or of rows that are all ignored."""
    x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(50, 8)
    found = lossops.linear_cross_entropy(
        x, w, torch.full((rows,), -100), near_threshold="auto", outputs=("near_far",),
        options=LinearLossOptions(near_certificate=True),
    )  # fmt: skip
    found.loss.backward()
    assert found.loss == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_what_is_refused() -> None:
    x, w, y = trained(n=8)
    loss = lossops.linear_cross_entropy
    with pytest.raises(ValueError, match=r"near_threshold must be None, 'auto' or a number in"):
        loss(x, w, y, near_threshold=1.5)
    with pytest.raises(ValueError, match=r"near_threshold must be None, 'auto' or a number in"):
        loss(x, w, y, near_threshold="exact")
    with pytest.raises(ValueError, match=r"near_target_error must be None or in \(0, 1\), got 2"):
        LinearLossOptions(near_target_error=2)
    options = LinearLossOptions(near_target_error=0.01)
    with pytest.raises(ValueError, match=r"needs near_threshold='auto', got None"):
        loss(x, w, y, options=options)
    with pytest.raises(ValueError, match=r"chooses the threshold itself"):
        loss(x, w, y, near_threshold=0.1, options=options)
    with pytest.raises(ValueError, match=r"'near_far' tells of gradients"):
        loss(x, w, y, near_threshold="auto", outputs=("near_far",))
    with pytest.raises(ValueError, match=r"'near_far' needs near_threshold, got None"):
        loss(x, w, y, outputs=("near_far",))
    with pytest.raises(ValueError, match=r"logits have exact gradients"):
        lossops.cross_entropy(x @ w.T, y, outputs=("near_far",))
    with pytest.raises(TypeError, match=r"near_target_error must be .* got str"):
        LinearLossOptions(near_target_error="a")  # type: ignore[arg-type]
    certified = LinearLossOptions(near_certificate=True)
    with pytest.raises(ValueError, match=r"near_certificate needs outputs=\('near_far',\)"):
        loss(x, w, y, near_threshold="auto", options=certified)
    with pytest.raises(ValueError, match=r"near_certificate needs outputs=\('near_far',\)"):
        lossops.linear_log_prob(x, w, y, near_threshold="auto", options=certified)
    with pytest.raises(ValueError, match=r"near_certificate needs near_threshold"):
        loss(x, w, y, options=LinearLossOptions(near_certificate=True))
    with pytest.raises(TypeError, match=r"near_threshold must be .* got list"):
        loss(x, w, y, near_threshold=[0.1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"near_threshold needs linear_weight of shape"):
        loss(x, torch.randn(9, 2, D), torch.zeros(8, 2, dtype=torch.int64), near_threshold="auto")
    taught = torch.full((8, V), 1 / V, dtype=x.dtype, requires_grad=True)
    with pytest.raises(ValueError, match=r"target probabilities that want a gradient"):
        loss(x, w, taught, near_threshold="auto")


def test_primitives_are_one_gradient(backend: str) -> None:
    """Negatives, products and targets apart are the chunk's gradient in one piece."""
    primitives = BACKENDS[backend].primitives()
    x, w, y = trained(n=40, v=700)
    names = wanted = ["target", "lse"]
    head = Head(
        x, w, None, torch.tensor(0.7, dtype=x.dtype), 0.0, y.unsqueeze(1), None, None, names
    )
    coefficients = [None, torch.randn(40, 1).double(), torch.randn(40).double()]

    def buffer() -> tuple[Tensor, list[Tensor]]:
        chunk = torch.empty(40 * 704, dtype=x.dtype).as_strided((40, 700), (704, 1))
        return chunk, primitives.linear_chunk_statistics(*head, wanted, chunk)

    whole, parts = ([x.new_zeros(40, D), x.new_zeros(700, D), x.new_zeros(700)] for _ in range(2))
    chunk, stats = buffer()
    primitives.linear_chunk_gradient(*head, wanted, chunk, stats, coefficients, *whole, False)
    chunk, stats = buffer()
    factor = primitives.linear_chunk_negatives(*head, wanted, chunk, stats, coefficients)
    m = chunk * factor.unsqueeze(1)
    primitives.linear_products(x, w, head.scale, chunk, factor, *parts, False)
    value = reference.target_gradient(0.0, 700, head.target, None, None, names, stats, coefficients)
    reference.add_targets(*parts, 0.7 * x, w, y.unsqueeze(1), value)
    for a, t in zip(parts, whole, strict=True):
        assert torch.allclose(a, t, rtol=0, atol=1e-13 * t.abs().max())
    again = torch.empty(40, 300, dtype=x.dtype)
    primitives.linear_negatives(*head, stats, coefficients, 350, again)
    assert torch.allclose(again, m[:, 350:650], rtol=0, atol=1e-14 * m.abs().max())


def test_flushes_its_sums_in_parts(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more blocks come than are kept, and slabs of rows in two sweeps, nothing is lost."""
    x, w, y = trained(n=700)
    x.requires_grad_()
    w.requires_grad_()
    found = []
    for flush, rows in ((near_far.FLUSH, near_far.ROWS), (2, 256)):
        monkeypatch.setattr(near_far_sweep, "FLUSH", flush)
        monkeypatch.setattr(near_far_sweep, "ROWS", rows)
        for options in (ONE, TWO):
            loss = lossops.linear_cross_entropy(
                x, w, y, near_threshold=TAU, options=options, backend=backend
            )
            found.append(gradients(loss, x, w))
    for a, b in ((found[0], found[2]), (found[1], found[3])):
        for g, t in zip(a, b, strict=True):
            assert torch.allclose(g, t, rtol=0, atol=1e-13 * t.abs().max())


def test_one_sign_and_two_signs_are_one_form() -> None:
    """Far products of sums of one sign, told as if there were two."""
    m = torch.rand(200, 3000, dtype=torch.float64)
    far = FarSums.of(reference.far_sums(m, torch.ones(200), torch.ones(200), BLOCK, GROUP))
    signed = far._replace(r_abs=far.r.clone(), c_abs=far.c.clone())
    assert signed.signed
    assert not far.signed
    x, w = torch.randn(200, 5).double(), torch.randn(3000, 5).double()
    found = []
    for each in (far, signed):
        into = [torch.zeros_like(x), torch.zeros_like(w), w.new_zeros(3000)]
        near_far.far_products(each, x, w, *into)
        found.append(into)
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-11)


def test_off_is_off() -> None:
    assert not NearFar().on
    assert NearFar(0.1).on


def blind_spots() -> dict[str, tuple[Tensor, Tensor, float]]:
    """Features of which some are 0; one block in eight unlike the others."""
    x, w = torch.randn(1000, 64), 0.2 * torch.randn(8000, 64)
    x[:, 24:40] = w[:, 24:40] = 0.0
    y, v = torch.randn(1000, 64), 0.2 * torch.randn(8000, 64)
    y[:750] = 2 * torch.randn(1, 64) + 0.01 * torch.randn(750, 64)
    return {"zero features": (x, w, 2.0**-6), "alike and unlike rows": (y, v, 2.0**-6)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ["zero features", "alike and unlike rows"])
def test_what_trials_once_missed(case: str, schedule: str) -> None:
    x, w, threshold = blind_spots()[case]
    x.requires_grad_()
    w.requires_grad_()
    y = torch.randint(8000, (1000,))
    options = SCHEDULES[schedule]
    true = gradients(lossops.linear_cross_entropy(x, w, y), x, w)
    loss = lossops.linear_cross_entropy(x, w, y, near_threshold=threshold, options=options)
    for g, t in zip(gradients(loss, x, w), true, strict=True):
        assert (g - t).norm() / t.norm() < 0.015


def test_sums_too_small_for_a_reciprocal() -> None:
    m, ones = torch.full((1, 4), 3e-40), torch.ones(1)
    far = FarSums.of(reference.far_sums(m, ones, ones, BLOCK, GROUP))
    x, w = torch.ones(1, 3), torch.ones(4, 3)
    dx, dw = torch.zeros(1, 3), torch.zeros(4, 3)
    near_far.far_products(far, x, w, dx, dw, None)
    assert dx.isfinite().all()
    assert dw.isfinite().all()


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_spread_of_tiny_and_huge_rows(size: float) -> None:
    rows = torch.randn(20, 7) * size
    largest = torch.linalg.matrix_norm((rows - rows.mean(0)).double(), 2)
    assert largest <= near_far_errors.spread(rows) < 2 * largest


def test_errors_that_are_no_numbers_are_not_within() -> None:
    assert not near_far_errors.Errors(1e-3, math.nan, 0.0).within(NearFar(TAU))
