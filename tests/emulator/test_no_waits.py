"""The host side of draws and row updates on tensors without values: nothing waits for one.

Meta tensors take the branches of a GPU; whoever asks one for a value raises. Launches are recorded
and not run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fixtures import built, emulator, loaded
from torch import Tensor

import lossops
from lossops import backends, cuda_rows, optim, rows, samplers
from lossops.sampled import IndexedProducts

META = torch.device("meta")
V, D, N = 1000, 24, 40


@pytest.fixture
def launched(emulator: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the ops that would have been run."""
    names: list[str] = []
    library = torch.library.Library("lossops_cuda", "IMPL", "Meta")
    for name in dir_of_ops():
        library.impl(name, lambda *_, name=name: names.append(name))

    def objection(device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device == META and dtype != torch.float64 else "not here"

    cuda = backends.Backend("cuda", objection, lambda: pytest.fail("no primitives on meta"))
    monkeypatch.setitem(backends.BACKENDS, "cuda", cuda)
    yield names
    library._destroy()


def dir_of_ops() -> list[str]:
    """The ops of this half of the kernels."""
    schemas = torch._C._jit_get_all_schemas()
    ours = {s.name.split("::")[1] for s in schemas if s.name.startswith("lossops_cuda::")}
    wanted = ("_rows", "add_to_", "draw_", "find_", "mark_first", "take_first", "rows_gradient")
    return sorted(name for name in ours if any(part in name for part in wanted))


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=META)


@pytest.mark.parametrize("shape", [(N,), (N, 3)])
def test_samplers(launched, shape):
    target = ids(*shape)
    for sampler, draw in (
        (samplers.Uniform(V, 50), "draw_permuted"),
        (samplers.LogUniform(V, 50), "draw_log_uniform"),
        (samplers.LogUniform(V, 50, unique=False), "draw_log_uniform"),
        (samplers.Frequency(torch.rand(V) + 0.1, 50), "draw_alias"),
        (samplers.Frequency(torch.rand(V) + 0.1, 50, unique=True), "draw_alias"),
    ):
        launched.clear()
        drawn = sampler(target)
        assert all(t.device == META for t in drawn)
        assert drawn.ids.shape == (50,)
        assert drawn.target_position.shape == shape
        distinct = getattr(sampler, "unique", False)
        assert launched == [draw, *(["mark_first", "take_first"] if distinct else []),
                            "find_positions"]  # fmt: skip
        assert sampler.per_row(target).ids.shape == (N, 50)
    kept = samplers.sample_keeping(ids(N), V, 60, 3)
    assert kept.shape == (60,)
    assert launched[-1] == "draw_permuted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [
    lambda p: optim.RowSGD(p, 0.1, 0.9), lambda p: optim.RowAdamW(p),
], ids=["sgd", "adamw"])  # fmt: skip
@pytest.mark.parametrize("sparse", [True, False])
def test_rows_and_their_updates(launched, make, dtype, sparse):
    w = torch.nn.Parameter(torch.empty(V, D, dtype=dtype, device=META))
    optimizer = make([w])
    for select in (
        lambda: rows.select_rows(w, ids(N), sparse=sparse),
        lambda: rows.select_normalized_rows(w, ids(N), sparse=sparse),
    ):
        optimizer.zero_grad()
        select().sum().backward()
        assert w.grad.is_sparse == sparse
        optimizer.step()
    assert ("scatter_rows" in launched) == (not sparse)
    assert {"normalized_rows", "normalized_rows_gradient"} < set(launched)
    assert launched[-1] in ("sgd_rows", "adamw_rows")


def test_products_of_rows(launched):
    x = torch.empty(N, D, device=META, requires_grad=True)
    w = torch.empty(V, D, device=META, requires_grad=True)
    IndexedProducts.apply(x, w, ids(N, 2)).sum().backward()
    assert launched == ["add_to_rows", "add_to_classes"]
    launched.clear()
    dx, dw, db = (torch.empty(s, device=META) for s in ((N, D), (V, D), V))
    scale = torch.empty((), dtype=torch.bfloat16, device=META)
    cuda_rows.add_targets(dx, dw, db, x, scale, w, ids(N, 2), torch.empty(N, 2, device=META))
    assert launched == ["add_to_rows", "add_to_classes"]


def test_a_sample_for_partial_fc(launched):
    head = lossops.PartialFC(D, V, sample_rate=0.1, device=META)
    sample = head._sampled(ids(N, 1), 0)
    assert sample.shape == (100,)
    assert samplers.positions(sample, ids(N, 1)).shape == (N, 1)
    assert launched == ["draw_permuted", "find_positions"]
