"""Losses over a sample of the classes, against TensorFlow's formulas with all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_no_worse, make_inputs, value_and_gradients
from torch import Tensor

import lossops
from lossops import SampledClasses, samplers

N, V, D, S = 9, 41, 6, 7


def drawn(seed: int = 0, *, unique: bool = True) -> SampledClasses:
    """A sample and made-up expected counts of all classes."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randperm(V, generator=draw)[:S]
    if not unique:
        ids = torch.cat([ids, ids[:3], ids[:1]])
    return SampledClasses(ids, all_expected()[ids])


def all_expected() -> Tensor:
    return torch.linspace(-3.0, 0.5, V)


def with_targets(sample: SampledClasses, y: Tensor) -> SampledClasses:
    return sample._replace(target_log_expected=all_expected()[y.clamp_min(0)])


def columns(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, sample: SampledClasses, subtract: bool, remove: bool
) -> tuple[Tensor, Tensor]:
    """Logits of targets (N, K), -inf where there is none, and of negatives (N, S): the oracle."""
    z = x @ w.T + b
    expected = all_expected().to(z.dtype)
    if subtract:
        z = z - expected
    ids = sample.ids.expand(len(x), -1)
    hit = (ids.unsqueeze(2) == y.unsqueeze(1)).any(2) & remove
    negative = z.gather(1, ids).masked_fill(hit, -torch.inf)
    return z.gather(1, y.clamp_min(0)).masked_fill(y < 0, -torch.inf), negative


def plain_softmax(positive: Tensor, negative: Tensor) -> Tensor:
    total = torch.cat([positive, negative], 1).logsumexp(1, keepdim=True)
    present = positive > -torch.inf
    each = torch.where(present, total - positive.masked_fill(~present, 0.0), 0.0)
    return each.sum(1) / present.sum(1).clamp_min(1)


def plain_nce(positive: Tensor, negative: Tensor) -> Tensor:
    present = positive > -torch.inf
    z = positive.masked_fill(~present, 0.0)
    share = present.sum(1, keepdim=True).clamp_min(1)
    each = torch.where(present, F.softplus(z, threshold=50) - z / share, 0.0).sum(1)
    return torch.where(present.any(1), each + F.softplus(negative, threshold=50).sum(1), 0.0)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "softmax": (lossops.sampled_softmax_loss, plain_softmax),
    "nce": (lossops.nce_loss, plain_nce),
}
TARGETS = {
    "one": torch.tensor([0, 1, 2, 3, 40, 40, 5, 6, 7]).unsqueeze(1),
    "several": torch.tensor([[i, (5 * i) % V if i % 2 else -1] for i in range(N)]),
}


def dense(t: Tensor) -> Tensor:
    return t.to_dense() if t.is_sparse else t


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("kind", ["shared", "repeated", "per-row"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_formula(
    name: str, targets: str, kind: str, remove: bool, subtract: bool, backend: str
) -> None:
    ours, plain = LOSSES[name]
    y = TARGETS[targets]
    x, w, b, _ = make_inputs(N, V, D)
    sample = drawn(unique=kind != "repeated")
    if kind == "per-row":
        ids = torch.stack([drawn(seed).ids for seed in range(N)])
        ids[:, 0] = y[:, 0]
        sample = SampledClasses(ids, all_expected()[ids])
    sample = with_targets(sample, y)
    leaves = (x, w, b, torch.linspace(0.5, 2.0, N, dtype=x.dtype))
    given = y if targets == "several" else y[:, 0]

    def oracle(reduction: str, x: Tensor, w: Tensor, b: Tensor, u: Tensor) -> Tensor:
        losses = plain(*columns(x, w, b, y, sample, subtract, remove)) * u
        return reduce(losses, u, reduction)

    def fused(reduction: str, x: Tensor, w: Tensor, b: Tensor, u: Tensor) -> Tensor:
        return ours(
            x, w, given, sample, linear_bias=b, sample_weight=u, backend=backend,
            subtract_log_q=subtract, remove_accidental_hits=remove, reduction=reduction,
        )  # fmt: skip

    for reduction in ("none", "sum", "mean"):
        upstream = torch.linspace(0.2, 1, N) if reduction == "none" else 1.7
        found = value_and_gradients(partial(fused, reduction), leaves, upstream)
        expected = value_and_gradients(partial(oracle, reduction), leaves, upstream)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(dense(f), e, rtol=1e-10, atol=1e-12)


def reduce(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_error_is_no_worse_than_that_of_pytorch(name: str, dtype: str, backend: str) -> None:
    ours, plain = LOSSES[name]
    x, w, b, y = make_inputs(64, 500, 24, spread=3.0)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randperm(500, generator=draw)[:90]
    zero = torch.zeros(90)
    sample = SampledClasses(ids, zero, torch.zeros(64))
    low = [t.to(DTYPES[dtype]) for t in (x, w, b)]

    def formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = F.linear(x, w, b)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        hit = ids == y.unsqueeze(1)
        return plain(z.gather(1, y.unsqueeze(1)), z[:, ids].masked_fill(hit, -torch.inf)).mean()

    def fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ours(x, w, y, sample, linear_bias=b, remove_accidental_hits=True, backend=backend)

    found = value_and_gradients(fused, low)
    pytorch = value_and_gradients(formula, low)
    exact = value_and_gradients(formula, [t.double() for t in low])
    assert found[0].dtype == torch.float32
    for name, f, p, e in zip(("loss", "dx", "dw", "db"), found, pytorch, exact, strict=True):
        assert_no_worse(name, dense(f), p, e)


def test_the_values_of_tensorflow() -> None:
    # D = 10 logits, y = 3, S = {0, 1, 3, 6} after 7 draws: nn_impl.py's own formulas in float64.
    z = torch.tensor([2, -1, 0.5, 3, -2.5, 0, 1, 0.3, -0.7, 0.9], dtype=torch.float64)
    expected = torch.tensor([0.90820691, 0.72655482, 0.49527327, 0.33040523], dtype=torch.float64)
    p = torch.log((torch.tensor([0, 1, 3, 6]) + 2) / torch.tensor([1.0, 2, 4, 7]).double())
    exact = 1 - (1 - p / torch.log(torch.tensor(11.0).double())) ** 7
    torch.testing.assert_close(exact, expected, rtol=1e-7, atol=0)
    sample = SampledClasses(torch.tensor([0, 1, 3, 6]), exact.log(), exact[2:3].log())
    for remove, loss in ((True, 0.34781282), (False, 0.88209970)):
        found = lossops.sampled_softmax_loss(
            torch.ones(1, 1, dtype=torch.float64), z.unsqueeze(1), torch.tensor([3]), sample,
            remove_accidental_hits=remove,
        )  # fmt: skip
        assert abs(found.item() - loss) < 1e-8


def test_negative_sampling_is_that_of_word2vec() -> None:
    x, w, _, y = make_inputs(N, V, D)
    sample = samplers.Uniform(V, 5).per_row(y)
    found = lossops.negative_sampling_loss(x, w, y, sample, reduction="none")
    z = x @ w.T
    expected = -F.logsigmoid(z.gather(1, y.unsqueeze(1))[:, 0])
    expected -= F.logsigmoid(-z.gather(1, sample.ids)).sum(1)
    torch.testing.assert_close(found, expected)


def test_all_classes_are_the_full_softmax() -> None:
    x, w, b, y = make_inputs(N, V, D)
    sampler = samplers.Uniform(V, V)
    found = value_and_gradients(
        lambda x, w, b: lossops.sampled_softmax_loss(x, w, y, sampler, linear_bias=b), (x, w, b)
    )
    expected = value_and_gradients(
        lambda x, w, b: lossops.linear_cross_entropy(x, w, y, linear_bias=b), (x, w, b)
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(dense(f), e, rtol=1e-9, atol=1e-12)


def test_the_expected_gradient_approaches_that_of_the_full_softmax() -> None:
    # With log E the mean over many samples comes near the full gradient; without it, it does not.
    v, s, trials = 200, 100, 500
    x, w, _, y = make_inputs(8, v, D, torch.float32)
    full = value_and_gradients(lambda x: lossops.linear_cross_entropy(x, w, y), [x])[1]
    away = {}
    for subtract in (True, False):
        sampler = samplers.LogUniform(v, s, unique=False, seed=2)
        total = torch.zeros_like(x)
        for _ in range(trials):
            total += value_and_gradients(
                lambda x: lossops.sampled_softmax_loss(
                    x, w, y, sampler, subtract_log_q=subtract  # noqa: B023
                ), [x],
            )[1]  # fmt: skip
        away[subtract] = float((total / trials - full).norm() / full.norm())
    assert away[True] < 0.08, away
    assert away[False] > 5 * away[True], away


def test_only_drawn_rows_are_read_and_have_gradients() -> None:
    x, w, b, y = make_inputs(N, V, D)
    sample = with_targets(drawn(), y)
    touched = torch.cat([sample.ids, y]).unique()
    w = torch.full_like(w, torch.nan).index_copy(0, touched, w[touched]).requires_grad_()
    b = b.clone().requires_grad_()
    lossops.sampled_softmax_loss(x, w, y, sample, linear_bias=b).backward()
    assert w.grad is not None
    assert b.grad is not None
    assert w.grad.is_sparse
    assert b.grad.is_sparse
    assert torch.equal(w.grad.coalesce().indices()[0], touched)
    assert bool(w.grad.coalesce().values().isfinite().all())
    sparse = w.grad.to_dense()
    w.grad = None
    lossops.sampled_softmax_loss(x, w, y, sample, linear_bias=b, sparse=False).backward()
    assert torch.equal(w.grad, sparse)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_rows_are_as_if_they_were_not_there(name: str, backend: str) -> None:
    ours, _ = LOSSES[name]
    x, w, _, y = make_inputs(N, V, D)
    sample = drawn()
    gone = torch.tensor([0, 4])
    ignored = y.clone()
    ignored[gone] = -100
    poisoned = x.clone()
    poisoned[gone] = torch.nan
    kept = torch.tensor([i for i in range(N) if i not in gone.tolist()])
    expected = value_and_gradients(
        lambda x, w: ours(x, w, y[kept], with_targets(sample, y[kept]), backend=backend),
        (x[kept], w),
    )
    found = value_and_gradients(
        lambda x, w: ours(x, w, ignored, with_targets(sample, y), backend=backend), (poisoned, w)
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][kept], expected[1])
    assert bool((found[1][gone] == 0).all())
    torch.testing.assert_close(dense(found[2]), dense(expected[2]))
    none = ours(x, w, torch.full((N,), -100), sample, subtract_log_q=False, backend=backend)
    assert none.item() == 0
    empty = ours(x[:0], w, y[:0], sample, subtract_log_q=False, backend=backend)
    assert empty.item() == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_nan_weight_of_an_ignored_row_does_not_count(name: str, per_row: bool) -> None:
    ours, _ = LOSSES[name]
    x, w, _, y = make_inputs(N, V, D)
    sampler = samplers.Uniform(V, S)
    y[4] = -100
    sample = sampler.per_row(y) if per_row else sampler(y)
    u = torch.linspace(0.5, 2.0, N, dtype=x.dtype)

    def call(reduction: str, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return ours(x, w, y, sample, sample_weight=u, reduction=reduction)

    poisoned = torch.where(y < 0, torch.nan, u)
    for reduction in ("none", "sum", "mean"):
        upstream = torch.ones(N) if reduction == "none" else 1.0
        found = value_and_gradients(partial(call, reduction), (x, w, poisoned), upstream)
        expected = value_and_gradients(partial(call, reduction), (x, w, u), upstream)
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(dense(f), dense(e))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(name: str, per_row: bool) -> None:
    ours, _ = LOSSES[name]
    x, w, b, y = make_inputs(4, 11, 3)
    ids = torch.tensor([0, 5, 10, 7])
    ids = torch.stack([ids, ids - 1, ids, ids]).clamp_min(0) if per_row else ids
    sample = SampledClasses(ids, torch.zeros(ids.shape), torch.zeros(4))
    scale = torch.tensor(1.3, dtype=torch.float64)

    def f(x: Tensor, w: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return ours(x, w, y, sample, linear_bias=b, logit_scale=scale, sparse=False)

    leaves = [t.clone().requires_grad_() for t in (x, w, b, scale)]
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_leading_dims_and_autocast() -> None:
    x, w, _, y = make_inputs(12, V, D, torch.float32)
    sample = drawn()
    flat = lossops.sampled_softmax_loss(x, w, y, sample, subtract_log_q=False, reduction="none")
    found = lossops.sampled_softmax_loss(
        x.reshape(3, 4, D), w, y.reshape(3, 4), sample, subtract_log_q=False, reduction="none"
    )
    assert torch.equal(found, flat.reshape(3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        half = lossops.sampled_softmax_loss(x, w, y, sample, subtract_log_q=False)
    low = lossops.sampled_softmax_loss(x.bfloat16(), w.bfloat16(), y, sample, subtract_log_q=False)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, low)


def test_a_sampler_is_asked_once_with_the_targets() -> None:
    x, w, _, y = make_inputs(N, V, D)
    asked = []

    def sampler(target: Tensor) -> SampledClasses:
        asked.append(target)
        return with_targets(drawn(), target[:, 0])._replace(
            target_log_expected=all_expected()[target]
        )

    y[3] = -100
    lossops.sampled_softmax_loss(x, w, y, sampler)
    assert len(asked) == 1
    assert torch.equal(asked[0][:, 0], torch.where(y < 0, -1, y))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sampler": drawn()}, ValueError, "sampler must give target_log_expected"),
    ({"sampler": lambda y: drawn().ids}, TypeError, "sampler must give SampledClasses, got Tensor"),
    ({"sampler": SampledClasses(torch.zeros(3).long(), torch.zeros(2), torch.zeros(N))},
     ValueError, r"must have shape \(S,\) or \(N, S\)"),
    ({"sampler": SampledClasses(torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.zeros(N))},
     ValueError, f"must have {N} rows, got 2"),
    ({"sampler": SampledClasses(torch.tensor([V]), torch.zeros(1), torch.zeros(N))},
     IndexError, rf"ids of the sample must be in \[0, {V}\)"),
    ({"target": torch.full((N,), V)}, IndexError, rf"class ids in \[0, {V}\)"),
    ({"target": torch.full((N,), -5)}, IndexError, rf"class ids in \[0, {V}\)"),
    ({"target": torch.zeros(N)}, TypeError, "target must hold integer class ids"),
    ({"linear_bias": torch.zeros(3)}, ValueError, rf"linear_bias must have shape \({V},\)"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    ({"linear_weight": torch.zeros(V, D + 1)}, ValueError, r"linear_weight must have shape \(V, D"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "kind", "message"), BAD)
def test_bad_calls(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    x, w, _, y = make_inputs(N, V, D, torch.float32)
    call = {"input": x, "linear_weight": w, "target": y, "sampler": with_targets(drawn(), y)}
    for loss in (lossops.sampled_softmax_loss, lossops.nce_loss):
        with pytest.raises(kind, match=message):
            loss(**{**call, **changed})  # type: ignore[operator]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("targets", [(2,), (2, 2)])
def test_a_target_that_is_the_only_legal_class(targets: tuple[int, ...], per_row: bool) -> None:
    """All others masked with -inf: loss 0 and no gradient, as of cross-entropy."""
    x, w = torch.randn(2, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    b = torch.full((6,), -torch.inf)
    b[2] = 0.5
    b.requires_grad_()
    ids = torch.arange(6)
    drawn = ids.expand(2, -1).contiguous() if per_row else ids
    sample = lossops.SampledClasses(drawn, torch.zeros(drawn.shape), torch.zeros(2, len(targets)))
    y = torch.tensor(targets).expand(2, -1) if len(targets) > 1 else torch.full((2,), 2)
    loss = lossops.sampled_softmax_loss(x, w, y, sample, linear_bias=b, sparse=False)
    for t in (loss, *torch.autograd.grad(loss, (x, w, b))):
        assert not t.any()
