"""Distillation in every form of a teacher, and the sweep over chunks of logits it stands on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import value_and_gradients
from torch import Tensor

from lossops import LinearLossOptions, catalogue
from lossops.catalogue import chunked
from lossops_bench.dense import distillation as dense

N, V, D, WIDTH = 11, 37, 7, 5
CHUNKS = LinearLossOptions(chunk_rows=4)
SCHEDULES = pytest.mark.parametrize("options", [None, CHUNKS], ids=["whole", "chunks"])


class Head:
    """Leaves x, w, b, scale, the teacher's features and weight, weights of rows: float64."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        self.leaves = (normal(N, D), normal(V, D), normal(V), torch.tensor(0.8).double())
        self.teacher = (normal(N, WIDTH), normal(V, WIDTH), normal(V))
        self.rows = torch.rand(N, generator=draw, dtype=torch.float64)

    @property
    def teacher_logits(self) -> Tensor:
        return F.linear(*self.teacher)


def ours(head: Head, teacher: Any, backend: str, **keywords: Any) -> list[Tensor]:
    def loss(x: Tensor, w: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return catalogue.linear_distillation_loss(
            x, w, teacher, linear_bias=b, logit_scale=scale, softcap=4.0, temperature=2.0,
            sample_weight=head.rows, backend=backend, **keywords,
        )  # fmt: skip

    return value_and_gradients(loss, head.leaves, keywords.pop("upstream", 1.0))


def plain(head: Head, kind: str, reduction: str) -> list[Tensor]:
    def loss(x: Tensor, w: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        z = 4.0 * torch.tanh((scale * (x @ w.T) + b) / 4.0)
        eye = torch.eye(V, dtype=z.dtype)
        each = dense.distillation(z, torch.zeros(N), (head.teacher_logits, eye), kind, 2.0)
        each = each * head.rows
        if reduction == "none":
            return each
        return each.sum() / (head.rows.sum() if reduction == "mean" else 1)

    return value_and_gradients(loss, head.leaves)


@SCHEDULES
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd", "binary_kl"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_head_keywords(
    kind: str,
    reduction: str,
    options: LinearLossOptions | None,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked, "BLOCK", 3 * V)  # of chunks of 4 rows: blocks of 3 and 1
    head = Head()
    found = ours(head, head.teacher, backend, kind=kind, reduction=reduction, options=options)
    torch.testing.assert_close(found, plain(head, kind, reduction), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["logits", "function"])
def test_forms_of_a_teacher(form: str, backend: str) -> None:
    head = Head()
    logits, asked = head.teacher_logits, []

    def part(first: int, stop: int) -> Tensor:
        asked.append(stop - first)
        return logits[first:stop]

    found = ours(head, logits if form == "logits" else part, backend, options=CHUNKS)
    expected = ours(head, head.teacher, backend, options=CHUNKS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not asked or asked == [4, 4, 3]  # never the logits of all rows at once


def test_a_teacher_without_a_bias() -> None:
    """``(features, layer.weight, layer.bias)`` of a layer that has none."""
    head = Head()
    two = ours(head, head.teacher[:2], "auto")
    torch.testing.assert_close(ours(head, (*head.teacher[:2], None), "auto"), two)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd", "binary_kl"])
def test_classes_that_neither_can_choose(kind: str, backend: str) -> None:
    """Padding of the vocabulary, -inf in both: as if it were not there."""
    head, kept = Head(), torch.arange(V) % 5 != 3
    x, w = head.leaves[:2]
    closed = torch.zeros(V, dtype=x.dtype).masked_fill(~kept, -torch.inf)
    teacher = head.teacher_logits

    def loss(x: Tensor, w: Tensor, zt: Tensor, b: Tensor | None = None) -> Tensor:
        return catalogue.linear_distillation_loss(
            x, w, zt, kind=kind, linear_bias=b, backend=backend
        )

    found = value_and_gradients(lambda x, w: loss(x, w, teacher + closed, closed), (x, w))
    fewer = value_and_gradients(lambda x, w: loss(x, w[kept], teacher[:, kept]), (x, w))
    torch.testing.assert_close(found, fewer, rtol=1e-9, atol=1e-11)


def test_backward_twice_and_scaled(backend: str) -> None:
    head = Head()
    x = head.leaves[0].requires_grad_()
    for reduction in ("mean", "none"):
        loss = catalogue.linear_distillation_loss(
            x, head.leaves[1], head.teacher, reduction=reduction, backend=backend
        ).sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (again,) = torch.autograd.grad(3 * loss, x)
        torch.testing.assert_close(again, 3 * first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, x)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), ()])
def test_any_subset_of_gradients(wanted: tuple[int, ...], backend: str) -> None:
    head = Head()
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(head.leaves)]
    loss = catalogue.linear_distillation_loss(
        leaves[0], leaves[1], head.teacher, linear_bias=leaves[2], logit_scale=leaves[3],
        backend=backend,
    )  # fmt: skip
    assert loss.requires_grad == bool(wanted)
    if wanted:
        (found,) = torch.autograd.grad(loss, [leaves[i] for i in wanted])
        leaves = [t.detach().requires_grad_() for t in leaves]
        z = leaves[3] * (leaves[0] @ leaves[1].T) + leaves[2]
        eye = torch.eye(V, dtype=z.dtype)
        value = dense.distillation(z, torch.zeros(N), (head.teacher_logits, eye), "kl").mean()
        (expected,) = torch.autograd.grad(value, [leaves[i] for i in wanted])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_no_rows_and_weights_of_zero(backend: str) -> None:
    head = Head()
    for rows, weights in ((0, None), (N, torch.zeros(N, dtype=torch.float64))):
        x, w = head.leaves[0][:rows], head.leaves[1]
        teacher = (head.teacher[0][:rows], head.teacher[1])

        def loss(x: Tensor, w: Tensor, t: Any = teacher, u: Any = weights) -> Tensor:
            return catalogue.linear_distillation_loss(x, w, t, sample_weight=u, backend=backend)

        assert not any(t.any() for t in value_and_gradients(loss, (x, w)))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(backend: str) -> None:
    """Also where probabilities underflow: float32 logits of some hundreds."""
    x, w = 40 * torch.randn(N, D), torch.randn(V, D)
    for kind in ("kl", "reverse_kl", "jsd", "binary_kl"):
        found = value_and_gradients(
            lambda x, w, k=kind: catalogue.linear_distillation_loss(
                x, w, (x.detach(), w.detach()), kind=k, backend=backend
            ),
            (x, w),
        )
        assert float(found[0].abs()) < 1e-6
        assert float(found[1].abs().max()) < 1e-6


def test_the_k_best_of_all_classes_are_the_whole_teacher(backend: str) -> None:
    """With the tail in a bucket, K = V and K = V - 1 lose nothing."""
    head = Head()
    x, w = head.leaves[:2]
    best = (head.teacher_logits / 2).log_softmax(1).topk(V)
    whole = value_and_gradients(
        lambda x, w: catalogue.linear_distillation_loss(
            x, w, head.teacher_logits, temperature=2.0, backend=backend
        ),
        (x, w),
    )
    for k in (V, V - 1):
        found = value_and_gradients(
            lambda x, w, k=k: catalogue.linear_top_k_distillation_loss(
                x, w, best.indices[:, :k], log_probs=best.values[:, :k], temperature=2.0,
                backend=backend,
            ),
            (x, w),
        )  # fmt: skip
        torch.testing.assert_close(found, whole, rtol=1e-8, atol=1e-10)


def test_a_tail_of_half_a_millionth(backend: str) -> None:
    """A teacher in float64 has one, however small; only rounding has none."""
    head = Head()
    x, w = head.leaves[:2]
    ids = torch.arange(N).unsqueeze(1)
    log_t = torch.full((N, 1), -5e-7, dtype=x.dtype)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return dense.top_k_distillation(x @ w.T, torch.zeros(N), ids, log_t).mean()

    found = value_and_gradients(
        lambda x, w: catalogue.linear_top_k_distillation_loss(
            x, w, ids, log_probs=log_t, backend=backend
        ),
        (x, w),
    )
    torch.testing.assert_close(found, value_and_gradients(plain, (x, w)), rtol=1e-9, atol=1e-11)


def test_rows_without_any_id_are_ignored(backend: str) -> None:
    head = Head()
    x, w = head.leaves[:2]
    best = head.teacher_logits.log_softmax(1).topk(4)
    ids = best.indices.clone()
    ids[3] = -1
    kept = torch.arange(N) != 3

    def loss(x: Tensor, w: Tensor, rows: Any = slice(None)) -> Tensor:
        return catalogue.linear_top_k_distillation_loss(
            x, w, ids[rows], log_probs=best.values[rows], backend=backend
        )

    found = value_and_gradients(loss, (x, w))
    fewer = value_and_gradients(lambda x, w: loss(x[kept], w, kept), (x, w))
    torch.testing.assert_close(found, fewer, rtol=1e-9, atol=1e-11)


def test_the_centre_of_dino_moves_to_the_mean_logits() -> None:
    head = Head()
    c = torch.randn(V, dtype=torch.float64)
    found = catalogue.dino_center(c, *head.teacher, momentum=0.8)
    torch.testing.assert_close(found, 0.8 * c + 0.2 * head.teacher_logits.mean(0))
    features, weight, bias = head.teacher
    assert torch.equal(catalogue.dino_center(c, features[:0], weight, bias), c)


ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "form": (3, {}, TypeError, r"teacher must be logits, .*, got int"),
    "logits": (
        torch.zeros(N, V - 1), {}, ValueError, r"teacher logits must have shape \(11, 37\), got"
    ),
    "rows": (
        (torch.zeros(N - 1, 3), torch.zeros(V, 3)), {}, ValueError,
        r"teacher must have the rows \(11,\) and 37 classes of the student, got features \(10, 3\)",
    ),
    "function": (
        lambda first, stop: torch.zeros(1, V), {}, ValueError,
        r"teacher\(0, 11\) must give logits of shape \(11, 37\), got \(1, 37\)",
    ),
    "no logits": (
        lambda first, stop: [0.0], {}, TypeError,
        r"what teacher\(0, 11\) gives must be a tensor, got list",
    ),
    "no tensor": (
        (torch.zeros(N, 3), None), {}, TypeError,
        "each tensor of teacher must be a tensor, got None",
    ),
    "gradient": (
        torch.zeros(N, V, requires_grad=True), {}, ValueError,
        "teacher is not differentiated, but wants a gradient; detach it",
    ),
    "kind": (torch.zeros(N, V), {"kind": "kld"}, ValueError, "kind must be one of kl, reverse_kl"),
    "temperature": (
        torch.zeros(N, V), {"temperature": 0.0}, ValueError, "temperature must be above 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    teacher, keywords, kind, message = ERRORS[error]
    x, w = torch.randn(N, D), torch.randn(V, D)
    with pytest.raises(kind, match=message):
        catalogue.linear_distillation_loss(x, w, teacher, **keywords)


@pytest.mark.parametrize("name", ["normalized_focal", "distillation"])
def test_a_compiler_is_told_why(name: str) -> None:
    x, w = torch.randn(N, D), torch.randn(V, D)
    other = (x, w) if name == "distillation" else torch.arange(N)
    call = torch.compile(catalogue.RECIPES[name].face, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="over chunks of logits does not go into a graph"):
        call(x, w, other)
