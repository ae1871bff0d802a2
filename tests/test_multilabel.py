"""Multi-label losses with sparse positives and dense negatives, against all logits in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_no_worse, make_inputs, value_and_gradients
from torch import Tensor

import lossops

N, V, D = 23, 131, 9


def padded(seed: int = 1, k: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.rand(N, V, generator=draw).argsort(1)[:, :k]
    ids[torch.rand(ids.shape, generator=draw) < 0.4] = -1
    ids[0] = -1  # a row without positives counts
    return ids


def dense(ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    labels = torch.zeros(ids.shape[0], V + 1, dtype=dtype)
    return labels.scatter_(1, torch.where(ids < 0, V, ids), 1.0)[:, :-1]


def plain_bce(x: Tensor, w: Tensor, b: Tensor, y: Tensor, **options: Any) -> Tensor:
    z = F.linear(x, w, b)
    z = z if z.dtype == torch.float64 else z.float()
    return F.binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction="sum", **options) / len(x)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_binary_cross_entropy_no_worse_than_pytorch(dtype: str, backend: str) -> None:
    x, w, b, _ = make_inputs(N, V, D, DTYPES[dtype], spread=3.0)
    ids = padded()

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return lossops.linear_binary_cross_entropy(x, w, ids, linear_bias=b, backend=backend)

    found = value_and_gradients(ours, (x, w, b))
    plain = value_and_gradients(lambda *a: plain_bce(*a, dense(ids)), (x, w, b))
    oracle = value_and_gradients(
        lambda *a: plain_bce(*a, dense(ids)), [t.double() for t in (x, w, b)]
    )
    for name, *values in zip(("loss", "dx", "dw", "db"), found, plain, oracle, strict=True):
        assert_no_worse(name, *values)


def test_weights_of_classes_positives_and_rows(backend: str) -> None:
    x, w, b, _ = make_inputs(N, V, D)
    ids, y = padded(), dense(padded())
    a, p = torch.rand(V, dtype=x.dtype) + 0.5, torch.rand(V, dtype=x.dtype) + 2
    u = torch.rand(N, dtype=x.dtype)

    def rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = F.linear(x, w, b)
        return F.binary_cross_entropy_with_logits(
            z, y, weight=a, pos_weight=p, reduction="none"
        ).sum(1)

    def ours(x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
        return lossops.linear_binary_cross_entropy(
            x, w, ids, linear_bias=b, weight=a, pos_weight=p, sample_weight=u, backend=backend,
            **options,
        )  # fmt: skip

    inputs = (x, w, b)
    torch.testing.assert_close(
        value_and_gradients(ours, inputs),
        value_and_gradients(lambda *t: (rows(*t) * u).sum() / u.sum(), inputs),
    )
    upstream = torch.randn(N, dtype=x.dtype)
    torch.testing.assert_close(
        value_and_gradients(lambda *t: ours(*t, reduction="none"), inputs, upstream),
        value_and_gradients(lambda *t: rows(*t) * u, inputs, upstream),
    )


def test_sparse_forms_and_leading_dims(backend: str) -> None:
    x, w, _, _ = make_inputs(N, V, D)
    ids = padded()
    expected = lossops.linear_binary_cross_entropy(x, w, ids, backend=backend)
    torch.testing.assert_close(expected, plain_bce(x, w, torch.zeros(V).double(), dense(ids)))
    csr = dense(ids).to_sparse_csr()
    pair = (csr.crow_indices(), csr.col_indices())
    for form in (csr, pair, torch.cat([ids, ids], 1)):  # a class named twice counts once
        torch.testing.assert_close(
            lossops.linear_binary_cross_entropy(x, w, form, backend=backend), expected
        )
    lead = x[:20].reshape(4, 5, D)
    each = lossops.linear_binary_cross_entropy(
        lead, w, ids[:20].reshape(4, 5, -1), reduction="none", backend=backend
    )
    assert each.shape == (4, 5)
    none = lossops.linear_binary_cross_entropy(x, w, torch.empty(N, 0).long(), backend=backend)
    torch.testing.assert_close(none, plain_bce(x, w, torch.zeros(V).double(), torch.zeros(N, V)))


def test_asymmetric_reference_values(backend: str) -> None:
    # The values of the authors' module in float64, one row of logits, class 0 positive.
    z = torch.tensor([2, -1, 0.5, 3, -2.5, 0], dtype=torch.float64).unsqueeze(0)
    eye = torch.eye(6, dtype=torch.float64)
    full = [-0.027536, 0.002618, 0.208874, 0.617138, 0, 0.073117]
    detached = [-0.014209, 0.000578, 0.059030, 0.307731, 0, 0.018639]
    for detach, gradient in ((False, full), (True, detached)):
        loss, dz = value_and_gradients(
            lambda z, d=detach: lossops.linear_asymmetric_loss(
                z, eye, torch.tensor([[0]]), reduction="sum", detach_focus=d, backend=backend
            ),
            (z,),
        )
        assert abs(loss.item() - 1.67685660) < 1e-7
        expected = torch.tensor([gradient], dtype=torch.float64)
        torch.testing.assert_close(dz, expected, rtol=0, atol=1e-6)


def test_one_versus_rest_reference_value(backend: str) -> None:
    z = torch.tensor([2, -1, 0.5, 3, -2.5, 0], dtype=torch.float64).unsqueeze(0)
    loss, dz = value_and_gradients(
        lambda z: lossops.linear_binary_cross_entropy(
            z, torch.eye(6, dtype=torch.float64), torch.tensor([[0]]), backend=backend
        ),
        (z,),
    )
    assert abs(loss.item() - 5.23489095) < 1e-7
    expected = [[-0.119203, 0.268941, 0.622459, 0.952574, 0.075858, 0.5]]
    torch.testing.assert_close(dz, torch.tensor(expected, dtype=dz.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), [(4, 1, 0.05), (2.5, 0, 0.0)])
def test_asymmetric_against_the_authors_form(
    gamma_neg: float, gamma_pos: float, clip: float, detach: bool, backend: str
) -> None:
    x, w, b, _ = make_inputs(N, V, D, spread=2.0)
    ids, y = padded(), dense(padded())

    def authors(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        p = torch.sigmoid(F.linear(x, w, b))
        q = (1 - p + clip).clamp(max=1)
        logs = y * p.log() + (1 - y) * q.log()
        focus = (1 - (p * y + q * (1 - y))) ** (gamma_pos * y + gamma_neg * (1 - y))
        return -(logs * (focus.detach() if detach else focus)).sum() / N

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return lossops.linear_asymmetric_loss(
            x, w, ids, linear_bias=b, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip,
            detach_focus=detach, backend=backend,
        )  # fmt: skip

    inputs = (x, w, b)
    torch.testing.assert_close(
        value_and_gradients(ours, inputs), value_and_gradients(authors, inputs)
    )


def test_asymmetric_of_confident_negatives_is_finite(backend: str) -> None:
    x = torch.tensor([[200.0]]).requires_grad_()
    loss = lossops.linear_asymmetric_loss(
        x, torch.ones(3, 1), torch.tensor([[1]]), clip=0.0, gamma_neg=1.0, backend=backend
    )
    assert abs(loss.item() - 400) < 1e-3  # two negatives of probability 1 cost 200 each
    assert torch.autograd.grad(loss, x)[0].item() == 2


@pytest.mark.parametrize("normalize", [True, False])
def test_cosine_contrastive(normalize: bool, backend: str) -> None:
    x, w, _, _ = make_inputs(N, V, D)
    ids, y = padded(), dense(padded())

    def plain(x: Tensor, w: Tensor) -> Tensor:
        if normalize:
            x, w = F.normalize(x, dim=1), F.normalize(w, dim=1)
        s = x @ w.T
        positives = ((1 - s).relu() * y).sum(1)
        negatives = ((s - 0.3).relu() * (1 - y)).sum(1) / (1 - y).sum(1)
        return (positives + 150 * negatives).mean()

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return lossops.linear_cosine_contrastive_loss(
            x, w, ids, margin=0.3, negative_weight=150, normalize=normalize, backend=backend
        )

    torch.testing.assert_close(
        value_and_gradients(ours, (x, w)), value_and_gradients(plain, (x, w))
    )


LOSSES = {
    "binary": lambda x, w, b, **o: lossops.linear_binary_cross_entropy(
        x, w, padded()[:4], linear_bias=b, **o
    ),
    "asymmetric": lambda x, w, b, **o: lossops.linear_asymmetric_loss(
        x, w, padded()[:4], linear_bias=b, detach_focus=False, gamma_neg=2.0, **o
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_twice(name: str, reduction: str, backend: str) -> None:
    x, w, b, _ = make_inputs(4, V, 2, spread=0.7)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def loss(*a: Tensor) -> Tensor:
        return LOSSES[name](*a, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


def test_memory_is_a_tile(backend: str) -> None:
    saved: list[int] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    x, w = torch.randn(64, 4, requires_grad=True), torch.randn(30_000, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lossops.linear_binary_cross_entropy(
            x, w, torch.arange(64).unsqueeze(1), backend=backend
        ).backward()
    assert sum(saved) < 5 * w.numel()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positives": torch.zeros(3, 1).long()}, ValueError, r"\(23, 'K'\)"),
        ({"positives": torch.zeros(N, 1)}, TypeError, "integers"),
        ({"positives": torch.full((N, 1), V)}, IndexError, r"\[0, 131\)"),
        ({"positives": (torch.zeros(3).long(), torch.zeros(2).long())}, ValueError, "crow"),
        ({"positives": torch.zeros(N, V).to_sparse()}, ValueError, "to_sparse_csr"),
        (
            {"positives": (torch.arange(N + 1), torch.zeros(N + 5).long())},
            ValueError,
            "from 0 to the 28 entries",
        ),
        ({"weight": torch.ones(3)}, ValueError, "weight must have shape"),
        ({"pos_weight": torch.ones(3)}, ValueError, "pos_weight must have shape"),
        ({"reduction": "rows"}, ValueError, "mean, sum, none"),
        ({"gamma_neg": -1.0}, ValueError, "gamma_neg"),
        ({"clip": 1.0}, ValueError, "clip"),
    ],
)
def test_errors_say_what_to_do(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, w, _, _ = make_inputs(N, V, D)
    with pytest.raises(error, match=message):
        lossops.linear_asymmetric_loss(x, w, **{"positives": padded(), **options})
