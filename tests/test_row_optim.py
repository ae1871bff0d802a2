"""Optimizers of rows: against torch's dense ones, and against formulas for one row at a time."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DTYPES, make_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lossops
from lossops import backends, optim, reference_rows, row_optim, rows
from lossops.row_optim import StepProducts

V, D = 23, 5


def sparse_gradient(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A gradient of some rows, one of them twice, others in every, in no or in late steps."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randperm(V - 2, generator=draw)[:4]
    ids = torch.cat([ids, ids[:1], torch.tensor([V - 2] if step > 30 else [0])])
    values = torch.randn(len(ids), D, generator=draw, dtype=torch.float64)
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0), values.to(dtype), (V, D), check_invariants=True
    )


def table(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(make_inputs(1, V, D, dtype).w)


@pytest.fixture(params=["reference", "compiled"])
def primitives(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = reference_rows
    if request.param == "compiled":
        module = backends.load_cpu_module()
        if isinstance(module, str):
            pytest.skip(module)
    for place in (rows, row_optim):
        monkeypatch.setattr(place, "primitives", lambda _: module)
    return module


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_exact_is_dense_sgd(momentum: float, weight_decay: float, primitives: Any) -> None:
    ours, dense = table(), table()
    mine = optim.RowSGD([ours], 0.1, momentum, weight_decay, skipped="exact")
    torchs = torch.optim.SGD([dense], 0.1, momentum, weight_decay=weight_decay)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.99) for o in (mine, torchs)]
    for step in range(60):
        ours.grad = sparse_gradient(step)
        dense.grad = ours.grad.to_dense()
        for o in (mine, torchs, *schedules):
            o.step()
        # Rows about to be picked are what dense SGD has, whatever they missed.
        ids = torch.tensor([step % V, 1])
        picked = rows.select_rows(ours, ids, sparse=True)
        torch.testing.assert_close(picked, dense[ids], rtol=1e-12, atol=1e-13)
    mine.refresh()
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-13)
    if momentum:
        torch.testing.assert_close(
            mine.state[ours]["momentum_buffer"], torchs.state[dense]["momentum_buffer"],
            rtol=1e-12, atol=1e-13,
        )  # fmt: skip


def test_exact_through_a_loss() -> None:
    # Gradients of sampled losses depend on the rows picked: they must have been brought up to date.
    x, _, _, y = make_inputs(6, V, D)
    ours, dense = table(), table()
    mine = optim.RowSGD([ours], 0.5, 0.9, 0.02, skipped="exact")
    torchs = torch.optim.SGD([dense], 0.5, 0.9, weight_decay=0.02)
    sampler = lossops.samplers.Uniform(V, 4)
    for step in range(40):
        sample = sampler(y, step)
        for p, o in ((ours, mine), (dense, torchs)):
            o.zero_grad()
            lossops.sampled_softmax_loss(x, p, y, sample, sparse=p is ours).backward()
            o.step()
    mine.refresh()
    torch.testing.assert_close(ours, dense, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("momenta", [(0.0, 0.9, 0.9, 0.5), (0.9, 0.9, 0.0, 0.8)])
def test_a_momentum_that_changes(momenta: tuple[float, ...], primitives: Any) -> None:
    ours, dense = table(), table()
    mine = optim.RowSGD([ours], 0.1, momenta[0], 0.05, skipped="exact")
    torchs = torch.optim.SGD([dense], 0.1, momenta[0], weight_decay=0.05)
    for step in range(24):
        for o in (mine, torchs):
            o.param_groups[0]["momentum"] = momenta[step % 4]
        ours.grad = sparse_gradient(step)
        dense.grad = ours.grad.to_dense()
        mine.step()
        torchs.step()
    mine.refresh()
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-13)


def test_a_group_added_later_is_brought_up_to_date() -> None:
    ours, dense = table(), table()
    mine = optim.RowSGD([table()], 0.1, 0.9, 0.05, skipped="exact")
    mine.add_param_group({"params": [ours], "lr": 0.2})
    torchs = torch.optim.SGD([dense], 0.2, 0.9, weight_decay=0.05)
    for step in range(8):
        ours.grad = sparse_gradient(step)
        dense.grad = ours.grad.to_dense()
        mine.step()
        torchs.step()
    ids = torch.arange(V)
    picked = rows.select_rows(ours, ids, sparse=True)
    torch.testing.assert_close(picked, dense[ids], rtol=1e-12, atol=1e-13)


def test_lazy_rows_wait(primitives: Any) -> None:
    ours = table()
    expected, velocity = ours.detach().clone(), torch.zeros(V, D, dtype=torch.float64)
    mine = optim.RowSGD([ours], 0.1, 0.9, 0.05)
    for step in range(20):
        ours.grad = sparse_gradient(step)
        g = ours.grad.coalesce()
        for i, row in zip(g.indices()[0].tolist(), g.values(), strict=True):
            velocity[i] = 0.9 * velocity[i] + row + 0.05 * expected[i]
            expected[i] -= 0.1 * velocity[i]
        mine.step()
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-12, atol=1e-13)


def test_lazy_adamw_is_torchs_for_each_row(primitives: Any) -> None:
    ours = table()
    each = [nn.Parameter(row.clone()) for row in ours.detach()]
    mine = optim.RowAdamW([ours], 0.1, (0.8, 0.95), 1e-6, 0.03)
    theirs = [torch.optim.AdamW([p], 0.1, (0.8, 0.95), 1e-6, 0.03) for p in each]
    for step in range(40):
        ours.grad = sparse_gradient(step)
        g = ours.grad.coalesce()
        for i, row in zip(g.indices()[0].tolist(), g.values(), strict=True):
            each[i].grad = row.clone()
            theirs[i].step()
        mine.step()
    expected = torch.stack([p.detach() for p in each])
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_an_update_rounds_once(dtype: str, primitives: Any) -> None:
    low = DTYPES[dtype]
    ids = torch.tensor([0, 3, 4, 22])
    g = torch.randn(4, D, dtype=torch.float64).to(low)
    w, v, m, s = (torch.randn(V, D, dtype=torch.float64).to(low) for _ in range(4))
    s = s.abs()
    count = torch.arange(V, dtype=torch.int32)
    for name, tensors, numbers in (
        ("sgd_rows", [w, v], (0.1, 0.9, 0.05)),
        ("adamw_rows", [w, m, s, count], (0.1, 0.8, 0.95, 1e-6, 0.03)),
    ):
        found = [t.clone() for t in tensors]
        exact = [t.double() if t.is_floating_point() else t.clone() for t in tensors]
        getattr(primitives, name)(*found, ids, g, *numbers)
        getattr(reference_rows, name)(*exact, ids, g.double(), *numbers)
        untouched = [i for i in range(V) if i not in ids.tolist()]
        for f, e, before in zip(found, exact, tensors, strict=True):
            assert torch.equal(f[untouched], before[untouched])
            if f.is_floating_point():
                eps = torch.finfo(low).eps
                torch.testing.assert_close(f.double(), e, rtol=4 * eps, atol=4 * eps)
            else:
                assert torch.equal(f, e)


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
def test_normalised_rows(dtype: str, primitives: Any) -> None:
    low = DTYPES[dtype]
    w = make_inputs(1, V, 37).w.to(low)
    w[3] = 0
    ids = torch.tensor([0, 3, 7, 22])
    unit, norms = primitives.normalized_rows(w, ids, 1e-12)
    assert unit.dtype == low
    exact = w[ids].double().requires_grad_()
    expected = torch.nn.functional.normalize(exact, dim=1)
    eps = torch.finfo(low).eps
    torch.testing.assert_close(unit.double(), expected.detach(), rtol=2 * eps, atol=eps)
    g = torch.randn(4, 37).to(low)
    (dw,) = torch.autograd.grad(expected, exact, g.double())
    found = primitives.normalized_rows_gradient(unit, norms, g)
    kept = torch.tensor([0, 2, 3])  # the row of zeros has no direction
    torch.testing.assert_close(found[kept].double(), dw[kept], rtol=4 * eps, atol=8 * eps)


def test_strides_and_dense_gradients(primitives: Any) -> None:
    wide = torch.randn(V, 2 * D, dtype=torch.float64)
    ours = nn.Parameter(wide[:, ::2])
    dense = nn.Parameter(wide[:, ::2].clone())
    assert not ours.is_contiguous()
    mine, torchs = optim.RowSGD([ours], 0.1, 0.9), torch.optim.SGD([dense], 0.1, 0.9)
    for step in range(3):
        ours.grad = sparse_gradient(step).to_dense()
        dense.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, dense)


def test_steps_are_forgotten(monkeypatch: pytest.MonkeyPatch, primitives: Any) -> None:
    monkeypatch.setattr(row_optim, "STEPS", 8)
    ours, dense = table(), table()
    mine = optim.RowSGD([ours], 0.1, 0.9, 0.05, skipped="exact")
    torchs = torch.optim.SGD([dense], 0.1, 0.9, weight_decay=0.05)
    for step in range(90):
        ours.grad = sparse_gradient(step)
        dense.grad = ours.grad.to_dense()
        mine.step()
        torchs.step()
        assert len(mine.steps(ours)) == (step + 1) % 8
        assert int(mine.state[ours]["known"].max()) <= (step + 1) % 8
        mine.state_dict()  # changes nothing
        if step % 20 == 19:  # also across a checkpoint
            state = copy.deepcopy(mine.state_dict())
            mine = optim.RowSGD([ours], 0.1, 0.9, 0.05, skipped="exact")
            mine.load_state_dict(state)
    mine.refresh()
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-13)


def test_memory_of_steps() -> None:
    products = StepProducts()
    for _ in range(1024):
        products.append([[1.0, 0.0], [0.0, 1.0]])
    assert sum(8 * level.numel() for level in products.levels) <= 64 * 1024 + 1024


@given(steps=st.integers(1, 70), at=st.lists(st.integers(0, 70), min_size=1, max_size=9))
def test_products_of_steps(steps: int, at: list[int]) -> None:
    draw = torch.Generator().manual_seed(steps)
    matrices = torch.randn(steps, 2, 2, generator=draw, dtype=torch.float64)
    grown = StepProducts()
    for matrix in matrices.tolist():
        grown.append(matrix)
    first = torch.tensor([min(s, steps) for s in at])
    expected = []
    for s in first.tolist():
        total = torch.eye(2, dtype=torch.float64)
        for matrix in matrices[s:]:
            total = matrix @ total
        expected.append(total)
    for products in (grown, StepProducts(matrices)):
        assert len(products) == steps
        assert torch.equal(products.steps, matrices)
        torch.testing.assert_close(products.since(first), torch.stack(expected))


@pytest.mark.parametrize("make", [
    lambda p: optim.RowSGD(p, 0.1, 0.9, 0.05, skipped="exact"),
    lambda p: optim.RowSGD(p, 0.1, 0.9, 0.05),
    lambda p: optim.RowAdamW(p, 0.1),
], ids=["exact", "lazy", "adamw"])  # fmt: skip
def test_a_checkpoint_goes_on_bit_for_bit(make: Any) -> None:
    p = table(torch.float32)
    optimizer = make([p])

    def go(p: nn.Parameter, optimizer: Any, steps: range) -> None:
        for step in steps:
            p.grad = sparse_gradient(step, torch.float32)
            optimizer.step()

    go(p, optimizer, range(15))
    file = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, file)
    go(p, optimizer, range(15, 40))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    q = nn.Parameter(saved["p"])
    again = make([q])
    again.load_state_dict(saved["optimizer"])
    go(q, again, range(15, 40))
    for o in (optimizer, again):
        if hasattr(o, "refresh"):
            o.refresh()
    assert torch.equal(p, q)


@pytest.mark.parametrize("make", [
    lambda p: optim.RowSGD(p, 0.1, 0.9, 0.05, skipped="exact"),
    lambda p: optim.RowAdamW(p, 0.1),
], ids=["exact", "adamw"])  # fmt: skip
def test_a_copy_goes_on_alone(make: Any) -> None:
    p = table()
    optimizer = make([p])
    for step in range(6):
        p.grad = sparse_gradient(step)
        optimizer.step()
    q, other = copy.deepcopy((p, optimizer))
    assert other.param_groups[0]["params"][0] is q
    for step in range(6, 12):
        for t, o in ((p, optimizer), (q, other)):
            t.grad = sparse_gradient(step)
            o.step()
            rows.select_rows(t, torch.tensor([5]), sparse=True)
    assert torch.equal(p, q)


def test_state_in_a_file(tmp_path: Path) -> None:
    inside, outside = table(), table()
    path = tmp_path / "state"
    ours = optim.RowSGD([outside], 0.1, 0.9, state_dir=path)
    plain = optim.RowSGD([inside], 0.1, 0.9)
    for step in range(5):
        for p, o in ((inside, plain), (outside, ours)):
            p.grad = sparse_gradient(step)
            o.step()
    assert torch.equal(inside, outside)
    buffer = plain.state[inside]["momentum_buffer"]
    stored = torch.from_file(str(path / "0.momentum_buffer"), size=V * D, dtype=torch.float64)
    assert torch.equal(stored.reshape(V, D), buffer)
    again = optim.RowSGD([outside], 0.1, 0.9, state_dir=tmp_path / "elsewhere")
    again.load_state_dict(ours.state_dict())
    loaded = again.state[outside]["momentum_buffer"]
    assert torch.equal(loaded, buffer)
    stored = torch.from_file(
        str(tmp_path / "elsewhere" / "0.momentum_buffer"), size=V * D, dtype=torch.float64
    )
    assert torch.equal(stored.reshape(V, D), buffer)
    del ours, o  # a file has one owner
    other = nn.Parameter(torch.zeros(V + 1, D, dtype=torch.float64))
    other.grad = torch.zeros_like(other)
    larger = optim.RowSGD([other], 0.1, 0.9, state_dir=path)
    with pytest.raises(ValueError, match="must hold"):
        larger.step()


@pytest.mark.parametrize("make", [optim.RowSGD, optim.RowAdamW])
def test_optimizers_do_not_share_files(tmp_path: Path, make: Any) -> None:
    options = {"momentum": 0.9} if make is optim.RowSGD else {}

    def first_step(*tables: nn.Parameter) -> Any:
        optimizer = make(tables, lr=0.1, state_dir=tmp_path, **options)
        for p in tables:
            p.grad = sparse_gradient(0)
        optimizer.step()
        return optimizer

    p, q = table(), table()
    ours = first_step(p, q)  # each parameter has its own
    states = [t for r in (p, q) for t in ours.state[r].values()]
    assert len({t.data_ptr() for t in states}) == len(states)
    kept = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"one owner at a time.*a path of its own, or delete what"):
        first_step(table())
    copied = copy.deepcopy(ours)
    with pytest.raises(ValueError, match="one owner at a time"):
        copied.load_state_dict(kept)
    ours.load_state_dict(ours.state_dict())
    for number, r in enumerate((p, q)):
        for name, value in kept["state"][number].items():
            assert torch.equal(ours.state[r][name], value)
    torch.optim.lr_scheduler.ExponentialLR(ours, 0.9)  # they hold each other
    del ours, states
    first_step(table())


def test_clipping_sparse_gradients() -> None:
    p, q = table(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad, q.grad = sparse_gradient(1), torch.full((3,), 2.0, dtype=torch.float64)
    dense = [p.grad.to_dense(), q.grad.clone()]
    expected = torch.stack([g.norm() for g in dense]).norm()
    found = optim.clip_grad_norm_([p, q], 1.5)
    torch.testing.assert_close(found, expected)
    assert p.grad.is_sparse
    for t, g in zip((p, q), dense, strict=True):
        torch.testing.assert_close(t.grad.to_dense(), g * 1.5 / (expected + 1e-6))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_finite_is_clipped_to_zero_beside_what_is_not(value: float) -> None:
    p, q = table(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad, q.grad = sparse_gradient(1), torch.full((3,), 2.0, dtype=torch.float64)
    p.grad._values()[0, 0] = value
    norm = optim.clip_grad_norm_([p, q], 1.5)
    assert not norm.isfinite()
    assert torch.equal(q.grad, torch.zeros(3, dtype=torch.float64))
    assert not p.grad.to_dense().isfinite().all()


def test_a_norm_past_half_precision() -> None:
    p, q = table(torch.float16), table(torch.float16)
    p.grad, q.grad = (torch.full((V, D), 3e4, dtype=torch.float16) for _ in range(2))
    q.grad = q.grad.to_sparse(1)
    found = optim.clip_grad_norm_([p, q], 1.0)
    expected = 3e4 * (2 * V * D) ** 0.5
    assert abs(found.item() / expected - 1) < 1e-3
    for g in (p.grad, q.grad.to_dense()):
        torch.testing.assert_close(g, torch.full_like(g, 3e4 / expected))


@pytest.mark.parametrize("make", [lambda p: optim.RowSGD(p, 0.1), lambda p: optim.RowAdamW(p)])
def test_a_grad_scaler_skips_overflows(make: Any) -> None:
    p = table(torch.float32)
    optimizer, scaler = make([p]), torch.amp.GradScaler("cpu", init_scale=8.0)
    plain = table(torch.float32)
    other = make([plain])
    for step in range(4):
        g = sparse_gradient(step, torch.float32)
        before = p.detach().clone()
        scaler.scale(torch.zeros(()))
        p.grad = 8.0 * g if step != 2 else torch.inf * g
        scaler.unscale_(optimizer)
        optim.clip_grad_norm_([p], 1e9)
        scaler.step(optimizer)
        if step == 2:
            assert torch.equal(p, before)
            scaler.update(8.0)
            continue
        scaler.update()
        plain.grad = g
        other.step()
    torch.testing.assert_close(p, plain)


def test_sparse_gradients_suit_torchs_optimizers() -> None:
    x, w, _, y = make_inputs(6, V, D, torch.float32)
    for make in (
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.Adagrad(p, 0.1),
        lambda p: torch.optim.SparseAdam(p, 0.1),
    ):
        p = nn.Parameter(w.clone())
        sampler = lossops.samplers.Uniform(V, 6)
        losses = []
        optimizer = make([p])
        for _ in range(30):
            optimizer.zero_grad()
            loss = lossops.sampled_softmax_loss(x, p, y, sampler)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optim.RowSGD([p], -1.0), "lr must be at least 0, got -1.0"),
        (lambda p: optim.RowSGD([p], 0.1, 1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda p: optim.RowSGD([p], 0.1, skipped="no"), "skipped must be one of lazy, exact"),
        (lambda p: optim.RowSGD([{"params": [p], "skipped": "no"}], 0.1), "skipped must be one of"),
        (lambda p: optim.RowAdamW([p], betas=(0.9, 1.0)), r"betas must be in \[0, 1\)"),
        (lambda p: optim.RowAdamW([p], eps=-1.0), "eps must be at least 0"),
        (lambda p: optim.RowAdamW([{"params": [p], "lr": -1.0}]), "lr must be at least 0"),
    ],
)
def test_bad_options(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(table())


def test_only_tables() -> None:
    bias = nn.Parameter(torch.zeros(3))
    bias.grad = torch.zeros(3)
    with pytest.raises(ValueError, match=r"parameters must have shape \(V, D\), got \(3,\)"):
        optim.RowSGD([bias], 0.1).step()


def test_only_gradients_of_whole_rows(primitives: Any) -> None:
    for make in (lambda p: optim.RowSGD([p], 0.1), lambda p: optim.RowAdamW([p])):
        p = table()
        p.grad = torch.eye(V, D, dtype=torch.float64).to_sparse()  # one value of each row
        with pytest.raises(ValueError, match="must hold whole rows, sparse_dim 1, got one of sing"):
            make(p).step()


def test_rows_must_rise_strictly(primitives: Any) -> None:
    if primitives is reference_rows:
        pytest.skip("the reference takes what it is given")
    w, g = torch.zeros(4, 2), torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match="ids must rise strictly, got 2 before 2"):
        primitives.sgd_rows(w, None, torch.tensor([2, 2]), g, 0.1, 0.0, 0.0)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 4\), got 4"):
        primitives.normalized_rows(w, torch.tensor([4]), 1e-12)
