"""Partial FC: against a softmax over all cosines, written out; margins; samples; checkpoints."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_no_worse
from torch import Tensor, nn

import lossops
from lossops import ArcFace, CombinedMargin, CosFace, PartialFC, optim, partial_fc
from lossops.rows import select_normalized_rows

N, V, D = 9, 29, 6
MARGINS = {
    "cosface": CosFace(8.0, 0.3),
    "arcface": ArcFace(8.0, 0.5),
    "combined": CombinedMargin(8.0, 1.2, 0.2, 0.1),
    "filtered": CosFace(8.0, 0.3, filter_above=0.2),
}


def batch(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(n, D, generator=draw, dtype=torch.float64)
    return x.to(dtype), torch.randint(V, (n,), generator=draw)


def make(dtype: torch.dtype = torch.float64, **options: Any) -> PartialFC:
    torch.manual_seed(0)
    head = PartialFC(D, V, dtype=dtype, **options)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, dtype=torch.float64))
    return head


def plain_loss(x: Tensor, w: Tensor, y: Tensor, margin: Any, ids: Tensor | None = None) -> Tensor:
    """Mean loss over classes ``ids``, the filter included, every cosine stored."""
    c = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    own = torch.zeros_like(c, dtype=torch.bool).scatter(1, y.clamp_min(0).unsqueeze(1), True)
    z = margin.scale * torch.where(own, margin(c), c)
    if margin.filter_above is not None:
        z = torch.where(~own & (c > margin.filter_above), 0.0, z)
    if ids is not None:
        kept = torch.zeros(len(w), dtype=torch.bool).index_fill(0, ids, True)
        z = z.masked_fill(~kept, -torch.inf)
    return F.cross_entropy(z, y)


def gradients(head: PartialFC, x: Tensor, y: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    head.zero_grad()
    loss = head(x, y)
    loss.backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    return [loss.detach(), x.grad, head.weight.grad.to_dense()]


def plain_gradients(w: Tensor, x: Tensor, y: Tensor, *rest: Any) -> list[Tensor]:
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    loss = plain_loss(x, w, y, *rest)
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


@pytest.mark.parametrize("name", MARGINS)
def test_all_classes_are_the_full_loss(name: str, backend: str) -> None:
    x, y = batch()
    y[4] = -100
    for sparse in (False, True):
        head = make(margin=MARGINS[name], sparse=sparse, backend=backend)
        found = gradients(head, x, y)
        assert head.weight.grad is not None
        assert head.weight.grad.is_sparse == sparse
        for f, e in zip(found, plain_gradients(head.weight, x, y, MARGINS[name]), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MARGINS)
def test_a_sample_is_the_loss_over_it(name: str, backend: str) -> None:
    x, y = batch()
    head = make(margin=MARGINS[name], sample_rate=0.5, backend=backend)
    for step in range(3):
        found = gradients(head, x, y)
        assert head.weight.grad is not None
        ids = head.weight.grad.coalesce().indices()[0]
        assert len(ids) == 14
        assert set(y.tolist()) <= set(ids.tolist())
        expected = plain_gradients(head.weight, x, y, MARGINS[name], ids)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)
        assert head.step == step + 1


def test_more_rows_than_samples() -> None:
    x, y = batch()
    head = make(sample_rate=0.05)
    found = gradients(head, x, y)
    assert head.weight.grad is not None
    ids = head.weight.grad.coalesce().indices()[0]
    assert len(ids) == N
    for f, e in zip(found, plain_gradients(head.weight, x, y, CosFace(), ids), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_error_is_no_worse_than_that_of_pytorch(name: str, dtype: str, backend: str) -> None:
    low = DTYPES[dtype]
    head = make(low, margin=MARGINS[name], backend=backend)
    results = []
    for n in range(8, 16):  # one loss would be one draw, and PyTorch's may come out exact by luck
        x, y = batch(n, low)
        found = gradients(head, x, y)
        assert found[0].dtype == torch.float32
        pytorch = plain_gradients(head.weight, x, y, MARGINS[name])
        exact = plain_gradients(head.weight.double(), x.double(), y, MARGINS[name])
        results.append((found, pytorch, exact))
    for i, name in enumerate(("losses", "dx", "dw")):
        stacked = (torch.cat([r[k][i].flatten() for r in results]) for k in range(3))
        assert_no_worse(name, *stacked)


def test_the_values_of_insightface() -> None:
    # One row whose cosines are given: the features are a unit vector, rows of w have these cosines.
    cosines = torch.tensor([0.6, -0.2, 0.1, 0.75, -0.5, 0.0], dtype=torch.float64)
    w = torch.zeros(6, 7, dtype=torch.float64)
    w[:, 0] = cosines
    w[torch.arange(6), torch.arange(1, 7)] = (1 - cosines.square()).sqrt()
    x = torch.eye(7, dtype=torch.float64)[:1]
    cases = {
        2.43425956: (CosFace(4.0, 0.4), -3.649349),
        2.64419180: (ArcFace(4.0, 0.5), -4.596945),
        2.64419181: (ArcFace(4.0, 0.5, straight_through=True), -3.715749),
    }
    for loss, (margin, at_target) in cases.items():
        head = PartialFC(7, 6, margin=margin, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(w)
        found = head(x, torch.tensor([0]))
        assert abs(found.item() - loss) < 2e-8
        found.backward()
        # dL/dw_0 = dL/dc (x - c w_0) for |w_0| = 1.
        assert head.weight.grad is not None
        slope = head.weight.grad[0, 0] / (1 - cosines[0] ** 2)
        assert abs(slope.item() - at_target) < 1e-6


@pytest.mark.parametrize("margin", [*MARGINS.values(), ArcFace(8.0, 2.0), CombinedMargin(m1=3.0)])
def test_margins_fall_with_the_angle_and_have_their_derivative(margin: Any) -> None:
    angles = torch.linspace(1e-3, math.pi - 1e-3, 400, dtype=torch.float64)
    c = torch.cos(angles).requires_grad_()
    moved = margin(c)
    assert bool((moved.diff() < 0).all()), "ψ must fall as the angle grows, past π too"
    kinks = torch.tensor([math.pi - 0.5, math.pi - 2.0, (math.pi - 0.2) / 1.2, math.pi / 3])
    away = ((angles[:, None] - kinks).abs() > 0.02).all(1) & (angles > 0.05) & (angles < 3.09)
    assert torch.autograd.gradcheck(margin, c[away].detach().requires_grad_())


def test_margins_at_the_ends() -> None:
    for margin in (*MARGINS.values(), ArcFace(straight_through=True)):
        c = torch.tensor([1.0, -1.0, 1 + 1e-7, -1 - 1e-7]).requires_grad_()
        moved = margin(c)
        moved.sum().backward()
        assert c.grad is not None
        assert bool(moved.isfinite().all() & c.grad.isfinite().all())


def test_a_filter_as_insightface_has_it() -> None:
    cosines = torch.tensor([0.6, -0.2, 0.1, 0.75, -0.5, 0.0], dtype=torch.float64)
    z = 4 * cosines
    w = z.unsqueeze(1).requires_grad_()
    stats = lossops.linear_statistics(
        torch.ones(1, 1, dtype=torch.float64), w, torch.tensor([0]), names=("lse<1.6", "target")
    )
    moved = stats.target - 4 * 0.4
    loss = F.softplus(stats.lse_up_to(1.6) - moved).sum()
    assert abs(loss.item() - 1.04087178) < 1e-8
    (g,) = torch.autograd.grad(loss, w)
    expected = torch.tensor([-2.587413, 0.285196, 0.946885, 0, 0.085899, 0.634716]) / 4
    torch.testing.assert_close(g[:, 0], expected.double(), atol=1e-6, rtol=0)
    with pytest.raises(AttributeError, match="statistic 'lse<2' was not collected"):
        stats.lse_up_to(2)


def test_a_filter_of_large_logits() -> None:
    # Logits of 300 are all filtered: what is left must not be lost below a shift of 300.
    z = torch.tensor([[0.0, 300.0, 299.0, -2.0, 1.0]], dtype=torch.float32)
    stats = lossops.linear_statistics(torch.ones(1, 1), z.T, torch.tensor([0]), names=("lse<5",))
    expected = torch.tensor([0.0, 0.0, -2.0, 1.0]).logsumexp(0)
    rounding = 300 * 2.0**-24  # of the stored value, which is relative to the shift
    torch.testing.assert_close(
        stats.lse_up_to(5.0), expected.unsqueeze(0), rtol=0, atol=2 * rounding
    )


def test_straight_through_has_the_value_of_the_margin_and_slope_one() -> None:
    c = torch.linspace(-1, 1, 50, dtype=torch.float64).requires_grad_()
    moved = ArcFace(straight_through=True)(c)
    torch.testing.assert_close(moved, ArcFace()(c))
    (g,) = torch.autograd.grad(moved.sum(), c)
    assert bool((g == 1).all())


def test_a_learned_scale() -> None:
    x, y = batch()
    head = make(margin=CosFace(5.0, 0.2), learn_scale=True)
    assert head.log_scale is not None
    head.log_scale.data = head.log_scale.data.double()
    head(x, y).backward()
    t = torch.tensor(math.log(5.0), dtype=torch.float64, requires_grad=True)

    class Learned(nn.Module):
        filter_above = None
        scale = t.exp()

        def forward(self, c: Tensor) -> Tensor:
            return c - 0.2

    (expected,) = torch.autograd.grad(plain_loss(x, head.weight, y, Learned()), t)
    torch.testing.assert_close(head.log_scale.grad, expected, rtol=1e-6, atol=1e-8)
    assert make().log_scale is None


def test_gradcheck() -> None:
    x, y = batch(4)
    for margin in (CosFace(4.0, 0.2), ArcFace(4.0, 0.3)):
        head = make(margin=margin)

        def f(x: Tensor, w: Tensor) -> Tensor:
            return torch.func.functional_call(head, {"weight": w}, (x, y))  # noqa: B023

        leaves = [t.detach().clone().requires_grad_() for t in (x, head.weight)]
        assert torch.autograd.gradcheck(f, leaves)


def test_ragged_and_empty_batches() -> None:
    head = make(sample_rate=0.3)
    optimizer = optim.RowSGD(head.parameters(), 0.1, 0.9)
    for n in (5, 0, 1, 8):
        loss = head(*batch(n))
        assert bool(loss.isfinite())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert head(batch(3)[0], torch.full((3,), -100)).item() == 0


def test_a_nan_that_does_not_count() -> None:
    x, y = batch()
    y[2] = -100
    expected = gradients(make(), torch.where(torch.arange(N)[:, None] == 2, 0.0, x), y)
    x[2] = torch.nan
    found = gradients(make(), x, y)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_logits_are_never_stored_whole() -> None:
    # 256 rows by 20,000 classes are 20 MB of logits; the chunk is kept below a tenth of that.
    head = PartialFC(4, 20_000, options=lossops.LinearLossOptions(chunk_rows=8), sparse=True)
    x, y = torch.randn(256, 4, requires_grad=True), torch.randint(20_000, (256,))
    with torch.profiler.profile(profile_memory=True) as profile:
        head(x, y).backward()
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert largest < 256 * 20_000 * 4 / 10


@pytest.mark.parametrize("make_optimizer", [
    lambda p: optim.RowSGD(p, 0.1, 0.9),
    lambda p: optim.RowSGD(p, 0.1, 0.9, 0.01, "exact"),
    lambda p: optim.RowAdamW(p),
], ids=["lazy", "exact", "adamw"])  # fmt: skip
def test_memory_of_a_step_follows_the_sample(make_optimizer: Any) -> None:
    classes = 200_000
    head = PartialFC(4, classes, sample_rate=1e-4)  # 20 of them
    optimizer = make_optimizer(head.parameters())

    def step() -> None:
        optimizer.zero_grad()
        head(torch.randn(6, 4), torch.randint(classes, (6,))).backward()
        optimizer.step()

    step()  # makes the state
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    assert max(e.cpu_memory_usage for e in profile.events()) < classes / 4


def test_evaluation_does_not_move_the_sampler() -> None:
    x, y = batch()
    head = make(sample_rate=0.5)
    head.eval()
    first = head(x, y)
    assert head.step == 0
    assert torch.equal(head(x, y), first)
    head.train()
    assert torch.equal(head(x, y), first)
    assert head.step == 1


def test_topk() -> None:
    head = make()
    x, _ = batch()
    cosines = F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T
    expected = cosines.topk(5, dim=1)
    found = head.topk(x, 5)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values.detach())
    assert head.topk(x, 100).indices.shape == (N, V)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_topk_in_half_precision_and_under_autocast(dtype: str) -> None:
    # Cosines of 8 bits are often equal: 3,000 of them would come in no order.
    low = DTYPES[dtype]
    draw = torch.Generator().manual_seed(0)
    head = PartialFC(64, 3000, dtype=low)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3000, 64, generator=draw))
    x = torch.randn(16, 64, generator=draw).to(low)
    cosines = F.normalize(x.double(), dim=1) @ F.normalize(head.weight.double(), dim=1).T
    with torch.autocast("cpu", torch.bfloat16):
        found = head.topk(x, 5)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values.double(), cosines.gather(1, found.indices).detach(),
                               rtol=0, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(found.values.double(), cosines.topk(5, 1).values.detach(),
                               rtol=0, atol=1e-6)  # fmt: skip


def test_topk_of_equal_cosines_is_the_first_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.topk takes any of them, another one where the blocks are others.
    head = make()
    with torch.no_grad():
        head.weight.copy_(torch.eye(D)[torch.arange(V) % 3])  # whose cosines are exact
    x, _ = batch()
    cosines = F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T
    expected = cosines.sort(dim=1, descending=True, stable=True)
    for block in (V, 7, 1):
        monkeypatch.setattr(partial_fc, "BLOCK", block)
        for k in (1, 5, 11, V):
            assert torch.equal(head.topk(x, k).indices, expected.indices[:, :k])


def test_it_trains_and_resumes_bit_for_bit() -> None:
    def build() -> tuple[nn.Linear, PartialFC, list[Any]]:
        torch.manual_seed(1)
        body, head = nn.Linear(D, D), PartialFC(D, V, sample_rate=0.5, margin=CosFace(16.0, 0.1))
        return body, head, [
            torch.optim.SGD(body.parameters(), 0.1),
            optim.RowSGD(head.parameters(), 0.3, 0.9, 1e-3, "exact"),
        ]  # fmt: skip

    def go(body: nn.Linear, head: PartialFC, optimizers: list[Any], steps: range) -> list[float]:
        losses = []
        for step in steps:
            x, y = batch(6 + step % 3, torch.float32)
            for o in optimizers:
                o.zero_grad()
            loss = head(body(x), y)
            loss.backward()
            for o in optimizers:
                o.step()
            losses.append(loss.item())
        return losses

    body, head, optimizers = build()
    losses = go(body, head, optimizers, range(20))
    file = io.BytesIO()
    torch.save([body.state_dict(), head.state_dict(), *[o.state_dict() for o in optimizers]], file)
    losses += go(body, head, optimizers, range(20, 60))
    assert sum(losses[-6:]) < 0.3 * sum(losses[:6])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = build()
    for part, state in zip((again[0], again[1], *again[2]), saved, strict=True):
        part.load_state_dict(state)
    assert go(*again, range(20, 60)) == losses[20:]
    assert torch.equal(again[1].weight, head.weight)


def test_centres_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "centres"
    x, y = batch(dtype=torch.float32)
    torch.manual_seed(3)
    head = PartialFC(D, V, sample_rate=0.5, weight_file=path)
    torch.manual_seed(3)
    plain = PartialFC(D, V, sample_rate=0.5)
    for h, directory in ((head, tmp_path), (plain, None)):
        o = optim.RowSGD(h.parameters(), 0.1, 0.9, state_dir=directory)
        for _ in range(3):
            h.zero_grad()
            h(x, y).backward()
            o.step()
    assert torch.equal(head.weight, plain.weight)
    with pytest.raises(ValueError, match="must have one owner at a time, and a tensor of this pr"):
        PartialFC(D, V, weight_file=path)
    del head, h, o
    again = PartialFC(D, V, sample_rate=0.5, weight_file=path)
    assert torch.equal(again.weight, plain.weight)
    del again
    with pytest.raises(ValueError, match="must hold"):
        PartialFC(D, V + 1, weight_file=path)


def test_autocast_and_a_scaler() -> None:
    x, y = batch(dtype=torch.float32)
    head = make(torch.float32, sample_rate=0.5, margin=CosFace(8.0, 0.2))
    head.eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = head(x, y)
    assert half.dtype == torch.float32
    assert abs(half.item() - head(x, y).item()) < 0.05
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    o = optim.RowSGD(head.parameters(), 0.1)
    before = head.weight.detach().clone()
    scaler.scale(head(x, y)).backward()
    scaler.step(o)
    scaled = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.copy_(before)
    head.zero_grad()
    head(x, y).backward()
    o.step()
    torch.testing.assert_close(head.weight.detach(), scaled)


def test_normalised_rows_follow_the_optimizer() -> None:
    w = nn.Parameter(torch.randn(V, D))
    o = optim.RowSGD([w], 0.1, 0.9, 0.1, "exact")
    w.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, D), (V, D), check_invariants=True)
    o.step()
    before = w.detach().clone()
    select_normalized_rows(w, torch.tensor([5]), sparse=True)
    assert not torch.equal(w[5], before[5])
    assert torch.equal(w[6], before[6])


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: PartialFC(0, 5), ValueError, "dim and num_classes must be positive, got 0 and 5"),
    (lambda: PartialFC(3, 5, sample_rate=0.0), ValueError, r"sample_rate must be in \(0, 1\]"),
    (lambda: PartialFC(3, 5, margin=0.4), TypeError, "margin must be CosFace, ArcFace or"),
    (lambda: PartialFC(3, 5, class_group="w"), ValueError, "class_group needs an initialised"),
    (lambda: CosFace(scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
    (lambda: ArcFace(margin=4.0), ValueError, r"margin must be in \[0, π\), got 4.0"),
    (lambda: CombinedMargin(m1=0.5), ValueError, "m1 must be at least 1, got 0.5"),
    (lambda: make()(torch.zeros(2, D + 1), torch.zeros(2).long()), ValueError,
     rf"features must have shape \(N, {D}\), got \(2, {D + 1}\)"),
    (lambda: make().topk(torch.zeros(2, D + 1), 3), ValueError, "features must have shape"),
    (lambda: make().topk(torch.zeros(2, D), 0), ValueError, "k must be at least 1, got 0"),
    (lambda: make()(torch.zeros(2, D).long(), torch.zeros(2).long()), TypeError,
     "features must be floating point"),
    (lambda: make()(torch.zeros(2, D), torch.tensor([0, V])), IndexError,
     rf"labels must be in \[0, {V}\)"),
    (lambda: make()(torch.zeros(2, D), torch.tensor([0, -1])), IndexError, "labels must be in"),
    (lambda: make()(torch.zeros(2, D), torch.zeros(3).long()), ValueError,
     r"target must have shape \(2,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_calls(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_state_of_another_head() -> None:
    other = PartialFC(D, V + 1, dtype=torch.float64)
    state = other.state_dict()
    state["weight"] = state["weight"][:V]
    with pytest.raises(ValueError, match=f"the state is of {V + 1} classes, this head has {V}"):
        make().load_state_dict(state)
    # Ranks of as many classes have states of the same shapes.
    state = make().state_dict()
    state["_extra_state"]["first"] = V
    with pytest.raises(ValueError, match=f"of classes from {V} on, this rank's begin at 0"):
        make().load_state_dict(state)
