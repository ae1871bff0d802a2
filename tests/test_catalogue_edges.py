"""The catalogue where formulas have holes: p of 0 or 1, no rows, no rivals, numbers that learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import assert_no_worse, value_and_gradients
from test_catalogue import FEATURES, RECIPES, Case, assert_same
from test_near_far import always_far, trained
from torch import Tensor

from lossops import LinearLossOptions, catalogue
from lossops_bench.dense import DENSE
from lossops_bench.dense import pairs as dense

EYE = torch.eye(4)
SURE = torch.tensor([[200.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]])  # logits; p of class 0 is 1


def of_sure_rows(name: str, target: list[int], backend: str, **own: Any) -> list[Tensor]:
    """Loss and gradients of logits of which one row has p = 1 in float32; all finite."""
    face, y = catalogue.RECIPES[name].face, torch.tensor(target)
    found = value_and_gradients(lambda x, w: face(x, w, y, backend=backend, **own), (SURE, EYE))
    assert all(t.isfinite().all() for t in found), f"{name}: {found}"
    return found


@pytest.mark.parametrize(
    ("name", "own"),
    [("dual_focal", {"gamma": 0.5}), ("single_label_asymmetric", {"gamma_pos": 0.5})],
    ids=["dual_focal", "single_label_asymmetric"],
)
def test_a_fractional_power_of_what_a_certain_row_misses(
    name: str, own: dict[str, float], backend: str
) -> None:
    """0^γ has an infinite derivative, the row's loss has none."""
    dx = of_sure_rows(name, [0, 1], backend, **own)[1]
    assert float(dx[0].abs().max()) < 1e-7
    assert float(dx[1].abs().max()) > 0.1


@pytest.mark.parametrize("token", [-1, -100, 4])
def test_every_token_of_an_edit_invariant_loss_counts(token: int, backend: str) -> None:
    y = torch.tensor([[0, token, 2]])
    with pytest.raises(IndexError, match=r"target must hold class ids in \[0, 4\)"):
        catalogue.linear_edit_invariant_loss(
            torch.randn(1, 3, 4), EYE, y, ngrams=(1,), backend=backend
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_ignored_number_is_no_number(reduction: str, backend: str) -> None:
    """Padding may be a number token: ``ignore_index=3``, and 3 has a value."""
    x, y = torch.randn(4, 4), torch.tensor([3, 1, 3, 0])

    def loss(rows: Any) -> Tensor:
        return catalogue.linear_number_token_loss(
            x[rows], EYE, y[rows], numbers={3: 9.0, 1: 1.0}, ignore_index=3, lam=1.0,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    torch.testing.assert_close(loss([0, 1, 2, 3]), loss([1, 3]))


@pytest.mark.parametrize("compiled", [False, True])
def test_how_many_rows_are_a_fraction_of_them(compiled: bool) -> None:
    """Of n rows k / n are k, also where float32 has k - 2e-6; under a compiler as without one."""

    def loss(fraction: float) -> Tensor:
        x = torch.randn(100, 4)
        y = torch.zeros(100, dtype=torch.int64)
        return catalogue.linear_sovr_loss(
            x, EYE, y, fraction=fraction, lam=0.0, reduction="none", backend="reference"
        )

    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    for k in (0, 55, 100) if compiled else range(101):
        assert int((call(k / 100) == 0).sum()) == k


@pytest.mark.parametrize("name", ["number_token", "shared_covariance"])
def test_products_beside_the_head_under_autocast(name: str, backend: str) -> None:
    """Autocast rounds inputs, not what is computed of them: as with bfloat16 inputs."""
    case = Case(name, dtype=torch.bfloat16)
    half = value_and_gradients(lambda *t: case.ours(*t, backend=backend), case.leaves)
    case.extras = {n: t.float() for n, t in case.extras.items()}

    def loss(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.ours(*leaves, backend=backend)

    wide = value_and_gradients(loss, [t.float() for t in case.leaves])
    for a, b in zip(wide, half, strict=True):
        assert_no_worse(name, a.to(b.dtype), b, b.double())


def test_a_time_in_half_precision_is_not_rounded_again(backend: str) -> None:
    t = torch.tensor([0.7, 0.9]).bfloat16()
    y = torch.tensor([0, 1])

    def loss(t: Tensor) -> Tensor:
        return catalogue.linear_bayesian_flow_loss(
            SURE, EYE, y, time=t, accuracy=3.0, reduction="none", backend=backend
        )

    assert torch.equal(loss(t), loss(t.float()))


@pytest.mark.parametrize("name", ["focal", "poly_focal"])
def test_no_focus_on_the_one_class_there_is(name: str, backend: str) -> None:
    """γ = 0 is cross-entropy: 0 of one class, not 0 · log 0."""
    face, x, w, y = RECIPES[name].face, torch.randn(2, 4), EYE[:1], torch.tensor([0, 0])
    found = value_and_gradients(lambda x, w: face(x, w, y, gamma=0.0, backend=backend), (x, w))
    assert not any(t.any() for t in found)


def test_the_form_of_a_covariance_sees_its_symmetric_part(backend: str) -> None:
    """Value and gradient of any S are those of the quadratic form as it is written."""
    case = Case("shared_covariance")
    skew = case.extras.pop("covariance")
    skew[0, 1] += 0.3

    def ours(s: Tensor) -> Tensor:
        return case.ours(*case.leaves, covariance=s, backend=backend)

    def plain(s: Tensor) -> Tensor:
        return DENSE["shared_covariance"].losses(*case.leaves, case.y, s, **case.own).mean()

    assert_same(value_and_gradients(ours, (skew,)), value_and_gradients(plain, (skew,)))


def test_a_scale_of_one_element_for_one_row(backend: str) -> None:
    """Features (D,), a scale (1,): no dim of the scale gets among those of the rows."""
    x, y, scale = torch.randn(4), torch.tensor(2), torch.tensor([3.0])
    for name in ("focal", "logit_clip"):
        face = RECIPES[name].face
        one = face(x, EYE, y, logit_scale=scale, reduction="none", backend=backend)
        rows = face(x[None], EYE, y[None], logit_scale=3.0, reduction="none", backend=backend)
        assert torch.equal(one, rows[0])


def test_options_of_another_gradient_are_refused() -> None:
    options = LinearLossOptions(near_target_error=0.01)
    with pytest.raises(ValueError, match=r"near_target_error=0\.01 needs near_threshold='auto'"):
        catalogue.linear_normalized_focal_loss(SURE, EYE, torch.tensor([0, 1]), options=options)


def test_a_positive_below_every_one_of_many_negatives(backend: str) -> None:
    """Pairwise logistic: dz_y is a sum of 50 000 slopes near 1, which nothing may add in a row."""
    w = torch.rand(50_000, 4) / 8
    w[0] = -1.0
    x, y = torch.rand(3, 4) + 0.5, torch.zeros(3, dtype=torch.int64)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return catalogue.linear_pairwise_logistic_loss(x, w, y, backend=backend)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return DENSE["pairwise_logistic"].losses(x @ w.T, y).mean()

    found, same = value_and_gradients(ours, (x, w)), value_and_gradients(plain, (x, w))
    exact = value_and_gradients(plain, (x.double(), w.double()))
    for a, b, c in zip(found, same, exact, strict=True):
        assert_no_worse("pairwise logistic", a, b, c)


@pytest.mark.parametrize(
    "name",
    [
        "decoupled_contrastive", "nt_xent_margin", "debiased_contrastive",
        "hard_negative_contrastive",
    ],
)  # fmt: skip
def test_a_temperature_that_learns(name: str, backend: str) -> None:
    """As that of CLIP: a contrastive loss is the place where a temperature is learned."""
    for variant in range(len(DENSE[name].variants)):
        case = Case(name, variant)
        case.own.pop("temperature", None)

        def ours(a: Tensor, b: Tensor, t: Tensor, case: Case = case) -> Tensor:
            return case.ours(a, b, temperature=t, backend=backend)

        def plain(a: Tensor, b: Tensor, t: Tensor, case: Case = case) -> Tensor:
            return case.row.losses(a, b, temperature=t, **case.own).mean()

        inputs = (*case.leaves, torch.tensor(0.3, dtype=torch.float64))
        assert_same(value_and_gradients(ours, inputs), value_and_gradients(plain, inputs))


def test_what_ignored_rows_hold_does_not_matter(backend: str) -> None:
    """λ = 0 of a padded row, features that are NaN there: no NaN in the loss or in dx."""
    x, y = torch.randn(3, 4), torch.tensor([1, -100, 3])
    lam = torch.tensor([0.5, 0.0, 2.0])
    found = value_and_gradients(
        lambda x: catalogue.linear_adaptive_ldr_loss(x, EYE, y, lam=lam, backend=backend), (x,)
    )
    assert all(t.isfinite().all() for t in found)
    assert catalogue.adaptive_lambda(x, EYE, y, lam, lam0=1.0, alpha=2.0)[1] == 0
    x[1] = torch.nan
    found = value_and_gradients(
        lambda x: catalogue.linear_number_token_loss(
            x, EYE, y, numbers={1: 1.0, 2: 5.0}, backend=backend
        ),
        (x,),
    )
    assert all(t.isfinite().all() for t in found)


def test_a_candidate_that_is_certain(backend: str) -> None:
    """1 - p_c is at its floor, where it has no gradient: that of cross-entropy is left."""
    candidates = torch.tensor([[0], [-1]])
    found = of_sure_rows("unlikelihood", [1, 1], backend, candidates=candidates)
    plain = of_sure_rows("focal", [1, 1], backend, gamma=0.0)
    torch.testing.assert_close(found[1:], plain[1:])
    assert float(found[0] - plain[0]) == pytest.approx(-torch.tensor(1e-5).log().item() / 2)


@pytest.mark.parametrize("certain", [[0], [2], [0, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("ignored", [True, False])
def test_odds_of_sequences_that_are_certain(
    certain: list[int], ignored: bool, backend: str
) -> None:
    """ORPO of sequences without tokens, or with p = 1: no inf - inf, and no gradient from them."""
    x, w, y = 0.1 * torch.randn(4, 3, 4), 4 * EYE, torch.zeros(4, 3, dtype=torch.int64)
    if ignored:
        y[certain] = -100
    else:
        x[certain] = torch.tensor([100.0, 0.0, 0.0, 0.0])
    found = value_and_gradients(
        lambda x, w: catalogue.linear_orpo_loss(x, w, y, lam=0.1, backend=backend), (x, w)
    )
    assert all(t.isfinite().all() for t in found)
    assert not found[1][certain].any()
    others = [i for i in range(4) if i not in certain]
    assert all(found[1][i].any() for i in others if i < 2)


@pytest.mark.parametrize("ids", [[5, 5], [5, 1]], ids=["twice", "the target"])
@pytest.mark.parametrize("weighted", [False, True])
def test_false_negatives_that_count_once(ids: list[int], weighted: bool, backend: str) -> None:
    x, w, y = torch.randn(4, 6), torch.randn(9, 6), torch.full((4,), 1)

    def loss(listed: list[int]) -> Tensor:
        given = torch.tensor([listed] * 4)
        weights = torch.full((4, 2), 0.7) if weighted else None
        return catalogue.linear_hasa_loss(
            x, w, y, false_negatives=given, false_weights=weights, tau=0.5, backend=backend
        )

    torch.testing.assert_close(loss(ids), loss([5, -1]))


@pytest.mark.parametrize("weight", [1.0, 100.0], ids=["some left", "nothing left"])
@pytest.mark.parametrize("false", [[2, -1, -1], [1, 2, 3], [3, -1, -1]])
def test_hard_negatives_beyond_float32(false: list[int], weight: float, backend: str) -> None:
    """HaSa where e^z of a negative, false or not, is infinite; G is ``least`` below 0."""
    x, y, ids = torch.tensor([[1.0, 2.0, 150.0, 0.0]]), torch.tensor([0]), torch.tensor([false])

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return catalogue.linear_hasa_loss(
            x, w, y, false_negatives=ids, tau=0.05,
            false_weights=torch.full((1, 3), weight), backend=backend,
        )  # fmt: skip

    found = value_and_gradients(loss, (x, EYE))
    assert all(t.isfinite().all() for t in found)
    relative = (x[0].double() - 150).exp()
    g = (x[0, 1:].softmax(0) * relative[1:]).sum() - 0.05 * weight * sum(
        relative[f] for f in false if f >= 0
    )
    log_g = g.log() + 150 if g > 0 else torch.tensor(0.0)
    odds = (log_g + torch.tensor(4 / 0.95).log()).float()  # of e^{z_y - m} = 1
    torch.testing.assert_close(found[0], torch.nn.functional.softplus(odds))


@pytest.mark.parametrize("tau_plus", [0.1, 0.0])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_positives_far_above_all_negatives(tau_plus: float, beta: float, backend: str) -> None:
    """At T = 0.01 e^{s_ip / T} of a pair is beyond float32, relative to the negatives' largest."""
    first, _ = torch.linalg.qr(torch.randn(4, 4))
    views = (first, first[[1, 0, 2, 3]])  # the first two rows are pairs of strangers
    own = {"beta": beta, "temperature": 0.01, "tau_plus": tau_plus}

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return catalogue.hard_negative_contrastive_loss(
            a, b, reduction="sum", backend=backend, **own
        )

    found = value_and_gradients(loss, views)
    expected = value_and_gradients(
        lambda a, b: dense.hard_negative_contrastive(a, b, **own).sum(), [t.double() for t in views]
    )
    for a, b in zip(found, expected, strict=True):
        assert_no_worse("hard negatives", a, b, b)  # in float32 the definition is inf / inf
    one = value_and_gradients(loss, [t[:1] for t in views])
    assert not any(t.any() for t in one)


@pytest.mark.parametrize("off", [0.0, 1e-9, 1e-4, -0.03, 0.2])
def test_the_gradient_of_an_exponent_where_it_is_0(off: float, backend: str) -> None:
    """Comp-sum at τ = 1 is cross-entropy, but its derivative in τ is (log p)² / 2 and more."""
    x, w, y = SURE.double(), EYE.double(), torch.tensor([1, 3])

    def loss(x: Tensor, tau: Any) -> Tensor:
        return catalogue.linear_comp_sum_loss(x, w, y, tau=tau, reduction="sum", backend=backend)

    # Rows of log p = -2.44 and -0.44, so that both branches are met.
    x[0] = torch.tensor([3.0, 1.0, 2.0, 0.0])
    x.requires_grad_()
    tau = torch.tensor(1 + off, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(loss(x, tau), (tau, x))
    a, t = x.detach().log_softmax(1).gather(1, y[:, None]), tau.item() - 1
    slope = sum(-(k - 1) / math.factorial(k) * t ** (k - 2) * a**k for k in range(2, 40)).sum()
    torch.testing.assert_close(found[0], slope, rtol=1e-13, atol=0)
    plain = torch.autograd.grad(loss(x, tau.item()), x)[0]
    torch.testing.assert_close(found[1], plain, rtol=1e-12, atol=1e-15)


NEAR = [n for n, r in RECIPES.items() if "near_threshold" in r.head and not DENSE[n].whole]


@pytest.mark.parametrize("name", NEAR)
def test_near_and_far_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach every recipe that takes them: the same loss, another gradient."""
    always_far(monkeypatch)
    case, (x, w, y) = Case(name, rows=256, classes=300), trained(n=256, v=300, d=FEATURES)
    case.y, case.targets = y, (y,) if case.targets else ()

    def of(near: float | None) -> list[Tensor]:
        return value_and_gradients(lambda x, w: case.ours(x, w, near_threshold=near), (x, w))

    found, exact = of(0.5), of(None)
    torch.testing.assert_close(found[0], exact[0])
    assert not torch.equal(found[2], exact[2])
    assert (found[2] - exact[2]).norm() < exact[2].norm()
