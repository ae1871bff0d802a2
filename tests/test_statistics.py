"""RowStatistics: what it offers, and that shards of classes merge to the whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lossops
from lossops import RowStatistics, reference
from lossops.statistics import (
    INDEX_OUTPUTS,
    STATISTICS,
    canonical,
    outputs,
    temperature,
)

MERGEABLE = canonical(["lse@2", "lse<0.3", *(n for n in STATISTICS if n != "below_target")])
# Sums over all classes are -inf or NaN as soon as one logit is -inf, as they should be.
WITH_HOLES = canonical(
    ["lse@2", "lse<0.3", "variance", "runner_up", "softplus", "stable_sum", "target"]
)
ATTRIBUTES = (
    "target", "lse", "logsumexp", "log_p", "log_1mp", "target_minus_lse", "entropy", "max",
    "argmax", "runner_up", "runner_up_index", "sum", "sumsq", "moment", "softplus", "stable_sum",
    "variance",
    "weighted_sum", "teacher",
)  # fmt: skip
OF_ONE = ("log_1mp", "target_minus_lse", "entropy", "variance")
OF_SEVERAL = tuple(a for a in ATTRIBUTES if a not in OF_ONE)


def collect(
    z: Tensor,
    target: Tensor | None,
    names: tuple[str, ...],
    a: Tensor | None = None,
    t: Tensor | None = None,
) -> RowStatistics:
    """Statistics of logits, target (N,) or (N, K), by the reference."""
    ids = target if target is None or target.ndim == 2 else target.unsqueeze(1)
    found = reference.logits_statistics(z, ids, a, t, names)
    values = dict(zip(outputs(names), found, strict=True))
    if "target" in values and target.ndim == 1:
        values["target"] = values["target"].squeeze(1)
    taught = None
    if t is not None:
        taught = t.sum(1) if a is None else (t * a).sum(1)
    return RowStatistics(values, z.shape[1], None if a is None else a.sum(), taught)


def shards(
    z: Tensor,
    target: Tensor | None,
    names: tuple[str, ...],
    cuts: list[int],
    a: Tensor | None = None,
    t: Tensor | None = None,
) -> list[RowStatistics]:
    """The same statistics of consecutive class ranges; ids outside a range are absent from it."""
    parts = []
    for low, high in zip([0, *cuts], [*cuts, z.shape[1]], strict=True):
        local = None
        if target is not None:
            local = torch.where((target >= low) & (target < high), target - low, -1)
        columns = slice(low, high)
        parts.append(
            collect(
                z[:, columns],
                local,
                names,
                None if a is None else a[columns],
                None if t is None else t[:, columns],
            )
        )
    return parts


def merged(parts: list[RowStatistics]) -> RowStatistics:
    """Shards merged from the left."""
    whole = parts[0]
    for part in parts[1:]:
        whole = RowStatistics.merge(whole, part)
    return whole


def inputs(n: int, v: int, seed: int, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits on a grid of 1/64, so that an offset of 1e4 is exact in float32; a (V,), t (N, V)."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randint(-256, 256, (n, v), generator=draw) / 64 + offset
    a = torch.rand(v, generator=draw) + 0.5
    return z, a, torch.rand(n, v, generator=draw).softmax(1)


@st.composite
def sharded(draw: st.DrawFn, several: bool = False) -> tuple[Tensor, Tensor, list[int], int]:
    """Logits near an offset, targets (N,) or (N, K) with absent ones, cuts, and the seed."""
    v, seed = draw(st.integers(2, 12)), draw(st.integers(0, 2**16))
    offset = draw(st.sampled_from([0.0, 1e4, -1e4]))
    z, *_ = inputs(4, v, seed, offset)
    if several:
        ids = draw(st.lists(st.permutations(range(v)).map(lambda p: p[:2]), min_size=4, max_size=4))
        target = torch.tensor(ids)
        target[draw(st.integers(0, 3)), draw(st.integers(0, 1))] = -1
    else:
        target = torch.tensor(draw(st.lists(st.integers(-1, v - 1), min_size=4, max_size=4)))
    cuts = draw(st.lists(st.integers(1, v - 1), unique=True, max_size=4).map(sorted))
    return z, target, cuts, seed


def assert_same(whole: RowStatistics, parts: RowStatistics, attributes: tuple[str, ...]) -> None:
    """Equal attributes, up to what float32 costs relative to the row's shift."""
    torch.testing.assert_close(parts.lse_at(2.0), whole.lse_at(2.0), rtol=1e-6, atol=1e-5)
    for name in attributes:
        a, b = getattr(whole, name), getattr(parts, name)
        if name in ("argmax", "runner_up_index"):
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(
                b, a, rtol=3e-6, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_canonical_orders_completes_and_does_not_repeat() -> None:
    assert canonical(["argmax"]) == ("max",)
    assert canonical(["runner_up", "max", "argmax"]) == ("max", "runner_up")
    assert canonical(["lse@2", "entropy", "target"]) == ("target", "lse", "entropy", "lse@2")
    assert canonical(["sumsq"]) == ("sum", "sumsq")
    assert canonical([]) == ()
    assert canonical(STATISTICS) == tuple(STATISTICS)
    for name, statistic in STATISTICS.items():
        assert set(statistic.needs) <= set(canonical([name])), name


@pytest.mark.parametrize("name", ["lsw", "", "lse@", "lse@0", "lse@-1", "lse@t", "lse@nan", "mean"])
def test_an_unknown_statistic_is_refused_with_the_table(name: str) -> None:
    with pytest.raises(ValueError, match=r"names must be among target, lse, .* or 'lse@t'"):
        canonical([name])


@pytest.mark.parametrize(
    ("name", "t"), [("lse@2", 2.0), ("lse@0.5", 0.5), ("lse@.25", 0.25), ("lse@1e-3", 1e-3)]
)
def test_a_temperature_is_read_from_its_name(name: str, t: float) -> None:
    assert canonical([name]) == (name,)
    assert temperature(name) == t


def test_outputs_begin_with_the_shift_and_follow_the_table() -> None:
    assert outputs(()) == ("shift",)
    listed = ("shift", "target", "lse", "max", "argmax", "lse@2")
    assert outputs(canonical(["lse@2", "max", "lse", "target"])) == listed


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "below_target", "below_target_index"])
def test_a_statistic_not_collected_is_an_error_that_names_it(attribute: str) -> None:
    z, *_ = inputs(3, 5, seed=0)
    asked_for = {
        "argmax": "max", "runner_up_index": "runner_up", "below_target_index": "below_target",
        "moment": "sumsq", "logsumexp": "lse", "log_p": "target", "log_1mp": "target",
        "target_minus_lse": "target",
    }.get(attribute, attribute)  # fmt: skip
    with pytest.raises(AttributeError, match=rf"names=\(\.\.\., '{asked_for}'\)"):
        getattr(collect(z, None, ()), attribute)
    with pytest.raises(AttributeError, match=r"names=\(\.\.\., 'lse@3'\)"):
        collect(z, None, ("lse@2",)).lse_at(3)


def test_attributes_for_one_target_refuse_several() -> None:
    z, *_ = inputs(2, 5, seed=0)
    stats = collect(z, torch.tensor([[0, 1], [2, -1]]), canonical(["entropy", "target"]))
    for attribute in ("log_1mp", "target_minus_lse", "entropy"):
        with pytest.raises(ValueError, match="one target per row, got 2"):
            getattr(stats, attribute)
    expected = z.log_softmax(1)[[[0, 0], [1, 1]], [[0, 1], [2, 0]]]
    expected[1, 1] = -math.inf
    torch.testing.assert_close(stats.log_p, expected)
    torch.testing.assert_close(stats.logsumexp, z.logsumexp(1))


def test_a_confident_row_keeps_a_loss_that_one_minus_p_would_lose() -> None:
    """-log p = 2e-31 and log(1 - p) of it: logsumexp - target is 0 already at 1e-8."""
    z = torch.tensor([[70.0, 0.0, 0.0]])
    stats = collect(z, torch.tensor([0]), canonical(["target", "lse", "entropy"]))
    exact = 2 * math.exp(-70)
    assert float(-stats.log_p) == pytest.approx(exact, rel=1e-5)
    assert float(stats.log_1mp) == pytest.approx(math.log(exact), rel=1e-6)
    assert float(stats.entropy) == pytest.approx(exact * (71 - math.log(2) + math.log(2)), rel=1e-5)


@given(sharded())
def test_shards_merge_to_the_whole(example: tuple[Tensor, Tensor, list[int], int]) -> None:
    z, target, cuts, seed = example
    _, a, t = inputs(4, z.shape[1], seed)
    whole = collect(z, target, MERGEABLE, a, t)
    found = merged(shards(z, target, MERGEABLE, cuts, a, t))
    assert found.num_classes == z.shape[1]
    assert list(found.values) == list(whole.values)
    assert_same(whole, found, ATTRIBUTES)


@given(sharded(several=True))
def test_shards_of_rows_with_several_targets_merge(
    example: tuple[Tensor, Tensor, list[int], int],
) -> None:
    z, target, cuts, seed = example
    _, a, t = inputs(4, z.shape[1], seed)
    whole = collect(z, target, MERGEABLE, a, t)
    assert_same(whole, merged(shards(z, target, MERGEABLE, cuts, a, t)), OF_SEVERAL)


@given(sharded(), st.data())
def test_shards_with_masked_logits_merge(
    example: tuple[Tensor, Tensor, list[int], int], data: st.DataObject
) -> None:
    """Whole shards and whole rows of -inf too: empty negatives on either side of a merge."""
    z, target, cuts, _ = example
    holes = data.draw(st.lists(st.booleans(), min_size=z.numel(), max_size=z.numel()))
    mask = torch.tensor(holes).view_as(z)
    mask[torch.arange(4), target.clamp_min(0)] = False  # log p of a masked target is -inf
    z = z.masked_fill(mask, -math.inf)
    whole = collect(z, target, WITH_HOLES)
    found = merged(shards(z, target, WITH_HOLES, cuts))
    assert_same(whole, found, ("target", "lse", "max", "argmax", "runner_up", "runner_up_index",
                               "softplus", "logsumexp", "log_p", "entropy"))  # fmt: skip


@given(sharded())
def test_the_order_of_merges_changes_nothing(
    example: tuple[Tensor, Tensor, list[int], int],
) -> None:
    z, target, cuts, seed = example
    _, a, t = inputs(4, z.shape[1], seed)
    left = shards(z, target, MERGEABLE, cuts, a, t)
    right = left[-1]
    for part in reversed(left[:-1]):
        right = RowStatistics.merge(part, right)
    assert_same(merged(left), right, ATTRIBUTES)


def test_ties_go_to_the_lowest_class_in_every_order() -> None:
    z = torch.ones(1, 6)
    for cuts in ([1], [3], [5], [2, 4], [1, 2, 3, 4, 5]):
        stats = merged(shards(z, None, canonical(["runner_up"]), cuts))
        assert (stats.argmax.item(), stats.runner_up_index.item()) == (0, 1), cuts


@given(sharded())
def test_gradients_go_through_a_merge(example: tuple[Tensor, Tensor, list[int], int]) -> None:
    z, target, cuts, seed = example
    z = z.double() - z.mean()  # gradients of the sums need no offset, float64 no tolerance
    target = target.clamp_min(0)
    _, a, t = (k.double() for k in inputs(4, z.shape[1], seed))
    draw = torch.Generator().manual_seed(seed)
    kept = [n for n in ATTRIBUTES if n not in INDEX_OUTPUTS]

    def total(stats: RowStatistics) -> Tensor:
        draw.manual_seed(seed)
        found = [*(getattr(stats, n) for n in kept), stats.lse_at(2.0)]
        finite = [f.masked_fill(f.isinf(), 0.0) for f in found]
        return sum((torch.randn(4, generator=draw, dtype=f.dtype) * f).sum() for f in finite)

    # Distinct logits: at a tie the gradient of a maximum belongs to either.
    z = (z + torch.rand(z.shape, generator=draw, dtype=z.dtype) * 1e-3).requires_grad_()
    (whole,) = torch.autograd.grad(total(collect(z, target, MERGEABLE, a, t)), z)
    found = merged(shards(z, target, MERGEABLE, cuts, a, t))
    (parts,) = torch.autograd.grad(total(found), z)
    torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-9)


def test_what_cannot_be_merged_is_refused() -> None:
    z, *_ = inputs(2, 4, seed=0)
    target = torch.tensor([0, 1])
    below = collect(z, target, canonical(["below_target"]))
    with pytest.raises(ValueError, match="'below_target' cannot be merged: a part without"):
        RowStatistics.merge(below, below)
    one, other = collect(z, target, ("lse",)), collect(z, target, canonical(["max"]))
    with pytest.raises(ValueError, match=r"the same statistics, got \['lse', 'shift'\] and"):
        RowStatistics.merge(one, other)


def test_public_statistics_of_weight_shards_merge(backend: str) -> None:
    """As a user holds them: rows (2, 3), a slice of w each, targets absent elsewhere ignored."""
    x, w = torch.randn(2, 3, 8), torch.randn(10, 8)
    target = torch.tensor([[0, 9, 4], [5, -100, 3]])
    names = ("entropy", "runner_up", "sumsq", "target")
    whole = lossops.linear_statistics(x, w, target, names=names, backend=backend)
    parts = []
    for low, high in ((0, 4), (4, 10)):
        inside = (target >= low) & (target < high)
        local = torch.where(inside, target - low, -100)
        parts.append(lossops.linear_statistics(x, w[low:high], local, names=names, backend=backend))
    found = RowStatistics.merge(*parts)
    counted = target != -100
    for name in ("lse", "logsumexp", "max", "runner_up", "sum", "sumsq"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), msg=name)
    for name in ("argmax", "runner_up_index"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    for name in ("target", "log_p", "entropy"):
        a, b = getattr(found, name)[counted], getattr(whole, name)[counted]
        torch.testing.assert_close(a, b, msg=name)


def test_statistics_have_the_shape_of_the_rows(backend: str) -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(10, 8)
    one = lossops.linear_statistics(x, w, torch.zeros(2, 3, dtype=torch.long), backend=backend)
    assert one.target.shape == one.lse.shape == one.log_p.shape == (2, 3)
    ids = torch.tensor([[0, 1, -1, 0]]).expand(2, 3, 4)
    several = lossops.linear_statistics(x, w, ids, backend=backend)
    assert several.target.shape == (2, 3, 4)
    assert several.lse.shape == (2, 3)
    assert several.target[..., 2:].isneginf().all()  # absent, and a repeated id counts once
    none = lossops.linear_statistics(x[0, 0], w, names=("max", "target"), backend=backend)
    assert none.argmax.shape == ()
    torch.testing.assert_close(none.max, (w @ x[0, 0]).max())


# One group of two processes runs everything below; a test looks at what it wrote.

RANKS = 2


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    z, target, a, t = _sharded_problem()
    z.requires_grad_()
    part = shards(z, target, MERGEABLE, [3], a, t)[rank]
    stats = part.all_reduce()
    (-stats.log_p + stats.entropy).sum().backward()
    found = {n: getattr(stats, n).detach() for n in ATTRIBUTES}
    torch.save((found, stats.num_classes, z.grad), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _sharded_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, a, t = inputs(4, 8, seed=3, offset=1e4)
    return z, torch.tensor([0, 2, 3, 7]), a, t


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], int, Tensor]]:
    """What each rank of a gloo group of class shards holds after `all_reduce`."""
    folder = tmp_path_factory.mktemp("group")
    mp.spawn(_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_all_reduce_gives_every_rank_the_whole(group: list) -> None:
    z, target, a, t = _sharded_problem()
    whole = collect(z, target, MERGEABLE, a, t)
    for found, num_classes, _ in group:
        assert num_classes == 8
        for name, value in found.items():
            torch.testing.assert_close(
                value, getattr(whole, name), rtol=3e-6, atol=1e-5, msg=f"{name}: {value}"
            )


def test_all_reduce_gives_every_rank_the_same_bits(group: list) -> None:
    first, second = (found for found, *_ in group)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_all_reduce_gives_each_rank_the_gradient_of_its_own_classes(group: list) -> None:
    z, target, *_ = _sharded_problem()
    z.requires_grad_()
    p = z.softmax(1)
    entropy = -(p * p.log()).sum(1)
    (F.cross_entropy(z, target, reduction="sum") + entropy.sum()).backward()
    for rank, columns in enumerate((slice(0, 3), slice(3, 8))):
        gradient = group[rank][2]
        torch.testing.assert_close(gradient[:, columns], z.grad[:, columns], rtol=1e-5, atol=1e-5)
        others = torch.ones(8, dtype=torch.bool)
        others[columns] = False
        assert not gradient[:, others].any()
