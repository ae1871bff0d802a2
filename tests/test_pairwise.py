"""Sigmoid and softmax losses over pairs against plain PyTorch, and where the alternatives fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_no_worse, value_and_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lossops
from lossops import pair_ops
from lossops.positives import from_csr, pair_ids, transposed

N, M, D = 37, 53, 12


def features(
    n: int = N, m: int = M, d: int = D, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unit vectors (N, D) and (M, D), rows of equal index alike."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(m, d, generator=draw, dtype=torch.float64)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64)
    common = min(n, m)
    x[:common] += w[:common]
    return F.normalize(x, dim=1).to(dtype), F.normalize(w, dim=1).to(dtype)


def labels_of(ids: Tensor, columns: int) -> Tensor:
    """(N, M), True at the positives."""
    labels = torch.zeros(ids.shape[0], columns + 1, dtype=torch.bool)
    return labels.scatter_(1, torch.where(ids < 0, columns, ids), True)[:, :-1]


def plain_sigmoid(
    x: Tensor, w: Tensor, t: Tensor, b: Tensor, labels: Tensor | None = None
) -> Tensor:
    """-log σ of all pairs by the number of rows, logits in the dtype of x, the sum in float32."""
    z = (t * x) @ w.T + b if x.dtype != torch.float64 else t * (x @ w.T) + b
    z = z.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = torch.eye(*z.shape, dtype=torch.bool) if labels is None else labels
    return -F.logsigmoid(torch.where(y, z, -z)).sum() / len(x)


def plain_softmax(x: Tensor, w: Tensor, t: Tensor | float) -> Tensor:
    z, y = t * (x @ w.T), torch.arange(len(x))
    return (F.cross_entropy(z, y) + F.cross_entropy(z.T, y)) / 2


def scalars(*values: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(v, dtype=dtype) for v in values]


# --- Sigmoid


def test_sigmoid_reference_value() -> None:
    # Worked out in float64 from the published formula: log t and b are the learned scalars.
    double = torch.float64
    rows = torch.tensor([(1.0, 0, 2), (0, 1, -1), (0.5, 0.5, 0.5)], dtype=double)
    columns = torch.tensor([(1.0, 0.2, 1.5), (-0.3, 1, -1), (0.1, 0.9, 0.4)], dtype=double)
    x, w = F.normalize(rows, dim=1), F.normalize(columns, dim=1)
    log_t, b = (s.requires_grad_() for s in scalars(math.log(10), -10.0))
    loss = lossops.sigmoid_pairwise_loss(x, w, log_t.exp(), b)
    loss.backward()
    assert log_t.grad is not None
    assert b.grad is not None
    found = torch.stack([loss.detach(), log_t.grad, b.grad])
    expected = torch.tensor([1.25964587, -5.34136620, -0.58326028], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    clip = lossops.softmax_pairwise_loss(x, w, 10.0)
    torch.testing.assert_close(clip, torch.tensor(0.20166522).double(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("n", "m"), [(N, M), (M, N), (1, 1), (300, 300)])
def test_sigmoid_no_worse_than_pytorch(backend: str, dtype: str, n: int, m: int) -> None:
    x, w = features(n, m, dtype=DTYPES[dtype])
    t, b = scalars(10.0, -5.0, dtype=torch.float32)

    def ours(x: Tensor, w: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return lossops.sigmoid_pairwise_loss(x, w, t, b, backend=backend)

    found = value_and_gradients(ours, (x, w, t, b))
    plain = value_and_gradients(plain_sigmoid, (x, w, t.to(x.dtype), b.to(x.dtype)))
    oracle = value_and_gradients(plain_sigmoid, [v.double() for v in (x, w, t, b)])
    for name, *values in zip(("loss", "dx", "dw", "dt", "db"), found, plain, oracle, strict=True):
        assert_no_worse(name, *values)
    assert found[0].dtype == torch.float32


def test_far_negatives_keep_their_digits(backend: str) -> None:
    # Late in training almost every pair lies at -20: 1 + e^-20 has two digits in float32.
    x, w = features(64, 64, dtype=torch.float32)
    t, b = scalars(1.0, -20.0, dtype=torch.float32)
    ours = value_and_gradients(
        lambda *a: lossops.sigmoid_pairwise_loss(*a, positives=no_positives(64), backend=backend),
        (x, w, t, b),
    )
    none = torch.zeros(64, 64, dtype=torch.bool)
    oracle = value_and_gradients(
        lambda *a: plain_sigmoid(*a, none), [v.double() for v in (x, w, t, b)]
    )
    for name, found, true in zip(("loss", "dx", "dw", "dt", "db"), ours, oracle, strict=True):
        error = (found.double() - true).abs().max() / true.abs().max()
        assert error < 2e-6, f"{name}: {error:.1e}"


def no_positives(n: int) -> Tensor:
    return torch.full((n, 1), -1)


def test_scale_of_100_does_not_overflow(backend: str) -> None:
    x, w = features(N, N, dtype=torch.float32)
    for loss in (
        lossops.sigmoid_pairwise_loss(x, w, 100.0, 0.0, backend=backend),
        lossops.softmax_pairwise_loss(x, w, 100.0, backend=backend),
    ):
        assert loss.isfinite()
    huge = lossops.softmax_pairwise_loss(x, w, 1e4, backend=backend)
    torch.testing.assert_close(
        huge.double(), plain_softmax(x.double(), w.double(), 1e4), rtol=1e-5, atol=1e-5
    )


POSITIVES: dict[str, Callable[[], tuple[Any, Tensor]]] = {}


def form(make: Callable[[], tuple[Any, Tensor]]) -> Callable[[], tuple[Any, Tensor]]:
    POSITIVES[make.__name__] = make
    return make


@form
def diagonal() -> tuple[Any, Tensor]:
    return "diagonal", torch.eye(N, M, dtype=torch.bool)


@form
def groups() -> tuple[Any, Tensor]:
    rows, columns = torch.arange(N) % 7 - 1, torch.arange(M) % 9 - 1  # -1: in no group
    return (rows, columns), (rows[:, None] == columns) & (rows[:, None] >= 0)


@form
def sparse() -> tuple[Any, Tensor]:
    labels = torch.rand(N, M, generator=torch.Generator().manual_seed(3)) < 0.1
    labels[0] = False
    return labels.double().to_sparse_csr(), labels


@form
def padded() -> tuple[Any, Tensor]:
    ids = torch.stack([torch.arange(N), torch.arange(N) + 5, torch.arange(N)], 1)  # one twice
    ids[::4, 1] = -1
    return ids, labels_of(ids, M)


@pytest.mark.parametrize("name", POSITIVES)
def test_positives_in_every_form(name: str, backend: str) -> None:
    positives, labels = POSITIVES[name]()
    x, w = features()
    t, b = scalars(8.0, -4.0)

    def ours(*a: Tensor) -> Tensor:
        return lossops.sigmoid_pairwise_loss(*a, positives=positives, backend=backend)

    found = value_and_gradients(ours, (x, w, t, b))
    plain = value_and_gradients(lambda *a: plain_sigmoid(*a, labels), (x, w, t, b))
    torch.testing.assert_close(found, plain)


@given(st.data())
def test_ids_of_any_positives(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    bits = data.draw(st.lists(st.booleans(), min_size=n * m, max_size=n * m))
    labels = torch.tensor(bits).reshape(n, m)
    csr = labels.double().to_sparse_csr()
    ids = pair_ids(csr, n, m, labels)
    assert torch.equal(labels_of(ids, m), labels)
    rows, entries = transposed(ids, m)
    assert torch.equal(labels_of(rows, n), labels.T)
    inside = entries >= 0
    assert torch.equal(ids.flatten()[entries[inside]], torch.arange(m).repeat_interleave(
        inside.sum(1)))  # fmt: skip
    assert torch.equal(from_csr(csr.crow_indices(), csr.col_indices()), ids)


def test_sigmoid_row_by_row_and_weighted(backend: str) -> None:
    x, w = features()
    t, b = scalars(8.0, -4.0)
    u = torch.rand(N, dtype=torch.float64).requires_grad_()
    each = lossops.sigmoid_pairwise_loss(x, w, t, b, reduction="none", backend=backend)
    assert each.shape == (N,)
    once = lossops.sigmoid_pairwise_loss(x, w, t, b, weights=u.detach(), backend=backend)
    torch.testing.assert_close(once, (each * u).sum().detach() / u.sum().detach())
    total = lossops.sigmoid_pairwise_loss(x, w, t, b, weights=u, reduction="sum", backend=backend)
    (du,) = torch.autograd.grad(total, u)
    torch.testing.assert_close(du, each)
    upstream = torch.randn(N, dtype=torch.float64)

    def ours(x: Tensor, w: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return lossops.sigmoid_pairwise_loss(x, w, t, b, reduction="none", backend=backend)

    def plain(x: Tensor, w: Tensor, t: Tensor, b: Tensor) -> Tensor:
        z = t * (x @ w.T) + b
        return -F.logsigmoid(torch.where(torch.eye(N, M, dtype=torch.bool), z, -z)).sum(1)

    torch.testing.assert_close(
        value_and_gradients(ours, (x, w, t, b), upstream),
        value_and_gradients(plain, (x, w, t, b), upstream),
    )


@pytest.mark.parametrize("reduction", ["rows", "none"])
def test_sigmoid_gradcheck_twice(reduction: str, backend: str) -> None:
    x, w = features(4, 5, 3)
    t, b = scalars(3.0, -1.0)
    leaves = [v.requires_grad_() for v in (x, w, t, b)]

    def loss(*a: Tensor) -> Tensor:
        return lossops.sigmoid_pairwise_loss(*a, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_backward_twice_and_scaled(backend: str) -> None:
    x, w = features(dtype=torch.float32)
    leaves = [v.requires_grad_() for v in (x, w, *scalars(8.0, -4.0, dtype=torch.float32))]
    loss = lossops.sigmoid_pairwise_loss(*leaves, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close([3 * g for g in first], list(second))
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_a_constant_logit_adds_up(backend: str) -> None:
    # The same rounding 2,000 times over: a long chain of float32 sums would drift.
    x, w = torch.zeros(2000, 4), torch.zeros(2000, 4)
    b = torch.tensor(3.3)
    none = no_positives(2000)
    loss = lossops.sigmoid_pairwise_loss(x, w, 1.0, b, positives=none, backend=backend)
    true = 2000 * F.softplus(b.double())
    assert abs(loss.double() / true - 1) < 1e-6


@pytest.mark.parametrize("kept", range(4))
def test_only_what_is_wanted_is_computed(
    kept: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[bool]] = []
    primitives = pair_ops.primitives

    class Spy:
        """A backend that notes which of dx, dw and db a call is to fill."""

        def __init__(self, module: Any) -> None:
            self.module = module

        def linear_binary(self, *arguments: Any) -> Tensor:
            asked.append([t is not None for t in arguments[-3:]])
            found: Tensor = self.module.linear_binary(*arguments)
            return found

    monkeypatch.setattr(pair_ops, "primitives", lambda name, x: Spy(primitives(name, x)))
    x, w = features()
    inputs = [x, w, *scalars(8.0, -4.0)]
    every = value_and_gradients(lossops.sigmoid_pairwise_loss, inputs)[1:]
    leaves = [v.detach().requires_grad_(i == kept) for i, v in enumerate(inputs)]
    lossops.sigmoid_pairwise_loss(*leaves, backend=backend).backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i != kept)
    torch.testing.assert_close(leaves[kept].grad, every[kept])
    products = {0: [True, False, False], 1: [False, True, False], 2: [True, False, False],
                3: [False, False, True]}  # fmt: skip
    assert asked[-1] == products[kept]
    asked.clear()
    with torch.no_grad():
        lossops.sigmoid_pairwise_loss(*leaves, backend=backend)
    assert asked == [[False] * 3]


def test_loss_scaler_of_65536_changes_nothing(backend: str) -> None:
    x, w = features(300, 300, dtype=torch.float16)
    leaves = [v.requires_grad_() for v in (x, w)]
    one = torch.autograd.grad(lossops.sigmoid_pairwise_loss(*leaves, 10.0, -10.0), leaves)
    loss = lossops.sigmoid_pairwise_loss(*leaves, 10.0, -10.0, backend=backend)
    scaled = torch.autograd.grad(loss, leaves, torch.tensor(65536.0))
    for a, b in zip(one, scaled, strict=True):
        # What is a normal number in either is the same number.
        normal = a.abs() > 2.0**-13
        torch.testing.assert_close(a[normal].float(), b[normal].float() / 65536, rtol=1e-3, atol=0)
        assert (b != 0).float().mean() > 0.99


def test_nothing_is_saved_of_the_size_of_the_pairs(backend: str) -> None:
    n = 512
    saved: list[int] = []
    x, w = (v.requires_grad_() for v in features(n, n, 4, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        lossops.sigmoid_pairwise_loss(x, w, 10.0, -10.0, backend=backend).backward()
        lossops.softmax_pairwise_loss(x, w, 10.0, backend=backend).backward()
    assert sum(saved) < 100 * n


def test_under_compile_func_and_autocast() -> None:
    x, w = features(dtype=torch.float32)
    t, b = scalars(8.0, -4.0, dtype=torch.float32)
    sigmoid = lossops.sigmoid_pairwise_loss
    both = lossops.softmax_pairwise_loss
    for loss, inputs in ((sigmoid, (x, w, t, b)), (both, (x[:20], w[:20], t))):
        eager = value_and_gradients(loss, inputs)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(value_and_gradients(compiled, inputs), eager)
        argnums = tuple(range(len(inputs)))
        torch.testing.assert_close(
            list(torch.func.grad(lambda *a, f=loss: f(*a), argnums)(*inputs)), eager[1:]
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(*inputs).dtype == torch.float32


@pytest.mark.slow
def test_more_than_31_bits_of_pairs() -> None:
    """2.2e9 of them; the last rows come out as they do alone."""
    x, w = features(66_000, 32_768, 1, torch.float32)
    tail = slice(-50, None)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        none = no_positives(len(x))
        return lossops.sigmoid_pairwise_loss(x, w, 2.0, -4.0, positives=none, reduction="none")

    losses, dx, _ = value_and_gradients(loss, (x, w))
    alone = value_and_gradients(loss, (x[tail], w))
    torch.testing.assert_close([losses[tail], dx[tail]], alone[:2])


# --- Softmax


def dense_softmax(
    z: Tensor, labels: Tensor, excluded: Tensor | None = None, *, decoupled: bool = False,
    smoothing: float = 0.0, moved: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Losses of the rows of z by the definition; ``moved``: positive logits with their margin."""
    moved = z if moved is None else moved
    z = torch.where(labels, moved, z)
    kept = torch.ones_like(labels) if excluded is None else ~(excluded & ~labels)
    summed = kept & ~labels if decoupled else kept
    lse = z.masked_fill(~summed, -torch.inf).logsumexp(1)
    count = labels.sum(1).clamp_min(1)
    loss = lse - torch.where(labels, z, 0.0).sum(1) / count
    if smoothing:
        spread = lse - torch.where(kept, z, 0.0).sum(1) / kept.sum(1)
        loss = (1 - smoothing) * loss + smoothing * spread
    return torch.where(labels.any(1), loss, 0.0)


def mean_of(losses: Tensor, labels: Tensor) -> Tensor:
    return losses.sum() / labels.any(1).sum()


SOFTMAX = {
    "plain": {},
    "decoupled": {"decoupled": True},
    "smoothed": {"label_smoothing": 0.1},
    "margin": {"margin": 0.2},
    "angle": {"angular_margin": 0.3},
    "together": {"margin": 0.1, "angular_margin": 0.1, "label_smoothing": 0.2},
}


@pytest.mark.parametrize("form_name", POSITIVES)
@pytest.mark.parametrize("option", SOFTMAX)
@pytest.mark.parametrize("direction", ["rows", "columns", "both"])
def test_softmax_against_its_definition(
    direction: str, option: str, form_name: str, backend: str
) -> None:
    positives, labels = POSITIVES[form_name]()
    options = SOFTMAX[option]
    x, w = features()
    (t,) = scalars(9.0)
    excluded = torch.rand(N, M, generator=torch.Generator().manual_seed(5)) < 0.05

    def definition(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        z = t * (x @ w.T)
        cosine = (z / t).clamp(-1 + 1e-7, 1 - 1e-7)
        turned = torch.cos(cosine.acos() + options.get("angular_margin", 0.0))
        if not options.get("angular_margin"):
            turned = cosine
        moved = t * (turned - options.get("margin", 0.0))
        spec = {"decoupled": options.get("decoupled", False),
                "smoothing": options.get("label_smoothing", 0.0)}  # fmt: skip
        rows = mean_of(dense_softmax(z, labels, excluded, moved=moved, **spec), labels)
        columns = mean_of(dense_softmax(z.T, labels.T, excluded.T, moved=moved.T, **spec), labels.T)
        return {"rows": rows, "columns": columns, "both": (rows + columns) / 2}[direction]

    def ours(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return lossops.softmax_pairwise_loss(
            x, w, t, direction=direction, positives=positives,
            exclude=excluded.double().to_sparse_csr(), backend=backend, **options,
        )  # fmt: skip

    found = value_and_gradients(ours, (x, w, t))
    torch.testing.assert_close(found, value_and_gradients(definition, (x, w, t)))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_softmax_no_worse_than_pytorch(dtype: str, backend: str) -> None:
    x, w = features(300, 300, dtype=DTYPES[dtype])
    (t,) = scalars(20.0, dtype=torch.float32)

    def plain(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        z, y = (
            ((t * x) @ w.T).to(t.dtype if x.dtype != torch.float64 else x.dtype),
            torch.arange(300),
        )
        return (F.cross_entropy(z.float() if dtype != "f32" and x.dtype != torch.float64 else z, y)
                + F.cross_entropy(z.T.float() if dtype != "f32" and x.dtype != torch.float64
                                  else z.T, y)) / 2  # fmt: skip

    def ours(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return lossops.softmax_pairwise_loss(x, w, t, backend=backend)

    found = value_and_gradients(ours, (x, w, t))
    same = value_and_gradients(plain, (x, w, t.to(x.dtype)))
    oracle = value_and_gradients(plain, (x.double(), w.double(), t.double()))
    for name, *values in zip(("loss", "dx", "dw", "dt"), found, same, oracle, strict=True):
        assert_no_worse(name, *values)


def test_further_negatives(backend: str) -> None:
    x, w = features(N, N)
    queue, images = features(11, 13, seed=4)
    (t,) = scalars(9.0)

    def definition(x: Tensor, w: Tensor, t: Tensor, queue: Tensor, images: Tensor) -> Tensor:
        y = torch.arange(N)
        rows = F.cross_entropy(t * (x @ torch.cat([w, queue]).T), y)
        return (rows + F.cross_entropy(t * (w @ torch.cat([x, images]).T), y)) / 2

    def ours(x: Tensor, w: Tensor, t: Tensor, queue: Tensor, images: Tensor) -> Tensor:
        return lossops.softmax_pairwise_loss(
            x, w, t, negatives=queue, image_negatives=images, backend=backend
        )

    inputs = (x, w, t, queue, images)
    torch.testing.assert_close(
        value_and_gradients(ours, inputs), value_and_gradients(definition, inputs)
    )


def test_softmax_row_by_row_and_weighted(backend: str) -> None:
    x, w = features(N, N)
    u = torch.rand(N, dtype=torch.float64)
    z, y = 9.0 * (x @ w.T), torch.arange(N)
    each = (F.cross_entropy(z, y, reduction="none") + F.cross_entropy(z.T, y, reduction="none")) / 2

    def ours(**options: Any) -> Tensor:
        return lossops.softmax_pairwise_loss(x, w, 9.0, backend=backend, **options)

    torch.testing.assert_close(ours(reduction="none"), each)
    torch.testing.assert_close(ours(weights=u), (each * u).sum() / u.sum())
    torch.testing.assert_close(ours(weights=u, reduction="sum"), (each * u).sum())


def test_softmax_gradcheck_twice(backend: str) -> None:
    x, w = features(4, 4, 3)
    leaves = [v.requires_grad_() for v in (x, w, *scalars(3.0))]

    def loss(*a: Tensor) -> Tensor:
        return lossops.softmax_pairwise_loss(*a, backend=backend)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_rows_without_positives_and_single_pairs(backend: str) -> None:
    x, w = (v.requires_grad_() for v in features(3, 3))
    nothing = lossops.softmax_pairwise_loss(x, w, 9.0, positives=no_positives(3), backend=backend)
    assert nothing.item() == 0
    for g in torch.autograd.grad(nothing, (x, w)):
        assert not g.any()
    one = lossops.softmax_pairwise_loss(x[:1], w[:1], 9.0, backend=backend)
    assert one.item() == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(one, (x, w)))
    empty = x[:0]
    assert lossops.sigmoid_pairwise_loss(empty, w, 9.0, backend=backend).item() == 0


@pytest.mark.parametrize("direction", ["rows", "columns", "both"])
def test_no_rows_at_all(direction: str, backend: str) -> None:
    x, w = features(3, 4, dtype=torch.float32)
    leaves = [x[:0].clone().requires_grad_(), w.requires_grad_()]
    loss = lossops.softmax_pairwise_loss(*leaves, 9.0, direction=direction, backend=backend)
    assert loss.item() == 0
    for g, leaf in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
        assert g.shape == leaf.shape
        assert not g.any()


@pytest.mark.parametrize("direction", ["rows", "columns", "both"])
def test_a_row_with_everything_excluded_does_not_count(direction: str, backend: str) -> None:
    x, w = (t.requires_grad_() for t in features(3, 3))
    groups = (torch.tensor([0, 1, -1]), torch.tensor([0, 1, 2]))
    zeros = torch.zeros(3).long()
    loss = lossops.softmax_pairwise_loss(
        x, w, 9.0, direction=direction, positives=groups, exclude=(zeros, zeros),
        label_smoothing=0.1, backend=backend,
    )  # fmt: skip
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("direction", ["rows", "both"])
def test_confident_pairs_keep_their_digits(direction: str, backend: str) -> None:
    x, w = features(60, 60, 32, torch.float32)
    x = F.normalize(w + 0.1 * x, dim=1)  # losses near 1e-8
    ours = lossops.softmax_pairwise_loss(x, w, 60.0, direction=direction, backend=backend)
    z, y = 60.0 * x.double() @ w.double().T, torch.eye(60, dtype=torch.bool)
    losses = []
    for logits in (z, z.T):
        others = logits.masked_fill(y, -torch.inf).logsumexp(1)
        losses.append(-F.logsigmoid(logits[y] - others).mean())
    true = losses[0] if direction == "rows" else (losses[0] + losses[1]) / 2
    assert 0 < true < 1e-3
    assert abs(ours.double() / true - 1) < 1e-4


def test_a_margin_stays_in_one_sweep(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The scale is no leaf there, and the loss has it as a parameter.
    def refuse(*_: object) -> None:
        raise AssertionError("two sweeps")

    monkeypatch.setattr("lossops.linear.head_statistics", refuse)
    x, w = features(N, N)
    (log_t,) = scalars(2.0)
    log_t.requires_grad_()
    loss = lossops.softmax_pairwise_loss(
        x, w, log_t.exp(), direction="rows", margin=0.1, backend=backend
    )
    found = torch.autograd.grad(loss, log_t)[0]
    z = log_t.exp() * (x @ w.T - 0.1 * torch.eye(N))
    plain = torch.autograd.grad(F.cross_entropy(z, torch.arange(N)), log_t)[0]
    torch.testing.assert_close(found, plain)


# --- Modules and errors


def test_modules_are_called_as_those_of_open_clip() -> None:
    x, w = features(N, N, dtype=torch.float32)
    t, b = scalars(10.0, -10.0, dtype=torch.float32)
    sigmoid, softmax = lossops.SigmoidPairwiseLoss(), lossops.SoftmaxPairwiseLoss()
    assert not [*sigmoid.parameters(), *softmax.parameters()]
    expected = lossops.sigmoid_pairwise_loss(x, w, t, b)
    assert sigmoid(x, w, t, b) == expected
    assert sigmoid(image_features=x, text_features=w, logit_scale=t, logit_bias=b,
                   output_dict=True) == {"contrastive_loss": expected}  # fmt: skip
    clip = lossops.softmax_pairwise_loss(x, w, t)
    assert softmax(x, w, t) == clip
    assert softmax(x, w, t, output_dict=True) == {"contrastive_loss": clip}
    own = lossops.SigmoidPairwiseLoss(learnable=True)
    torch.testing.assert_close(own(x, w), expected)
    own(x, w).backward()
    assert all(p.grad is not None for p in own.parameters())
    with pytest.raises(ValueError, match="the module's own"):
        own(x, w, t)
    with pytest.raises(ValueError, match="must be given"):
        sigmoid(x, w)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w: lossops.sigmoid_pairwise_loss(x, w[:, :3], 1.0), ValueError, "the same D"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(x[0], w, 1.0), ValueError, "rows, D"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(x, w, 1.0, positives="all"), ValueError,
         "'diagonal'"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(x, w, 1.0, reduction="mean"), ValueError,
         "rows, sum, none"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(x, w, torch.ones(2)), ValueError,
         "logit_scale"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(x, w, 1.0, torch.ones(2)), ValueError,
         "logit_bias"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(x, w, 1.0, positives=torch.zeros(N, 1)),
         TypeError, "integers"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(
            x, w, 1.0, positives=torch.full((N, 1), M)), IndexError, r"\[0, 53\)"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(
            x, w, 1.0, positives=(torch.zeros(N).long(), torch.zeros(N).long())), ValueError,
         "column ids"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, 1.0, direction="up"), ValueError,
         "direction"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, 1.0, reduction="none"), ValueError,
         "as many rows as columns"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, 1.0, label_smoothing=1.0), ValueError,
         "label_smoothing"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, 1.0, negatives=w[:, :2]), ValueError,
         "negatives"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(x, w, 1.0, batch_group="world"), ValueError,
         "init_process_group"),
        (lambda x, w: lossops.sigmoid_pairwise_loss([x], w, 1.0), TypeError, "image_features"),
        (lambda x, w: lossops.sigmoid_pairwise_loss(x, w, 1.0, reduction="none",
                                                    batch_group="g"), ValueError, "'rows' or"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, 1.0, reduction="none", direction="rows",
                                                    batch_group="g"), ValueError, "'mean' or"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, None), TypeError, "logit_scale"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, 1.0, weights=torch.ones(3),
                                                    direction="rows"), ValueError, "weights must"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, 1.0, direction="rows",
                                                    image_negatives=x), ValueError, "no use"),
        (lambda x, w: lossops.softmax_pairwise_loss(x, w, 1.0, options="junk"), TypeError,
         "LinearLossOptions"),
        (lambda x, w: lossops.softmax_pairwise_loss(
            x, w, 1.0, direction="columns", positives=torch.full((N, 1), M)), IndexError, "53"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(
    call: Callable[[Tensor, Tensor], Tensor], error: type[Exception], message: str
) -> None:
    x, w = features()
    with pytest.raises(error, match=message):
        call(x, w)
