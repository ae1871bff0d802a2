"""Samples of classes: every set as likely as it should be, the same in every backend and again."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lossops
from lossops import backends, reference_sampling, samplers
from lossops.reference_sampling import stream_key

MODULES = [reference_sampling, backends.load_cpu_module()]


def modules() -> list[object]:
    """Both forms of the draws, where the compiled one is there at all."""
    return [m for m in MODULES if not isinstance(m, str)]


@pytest.fixture(params=["reference", "compiled"])
def draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """The module that draws, also for the samplers of lossops."""
    module = MODULES[request.param == "compiled"]
    if isinstance(module, str):
        pytest.skip(module)
    monkeypatch.setattr(samplers, "primitives", lambda _=None: module)
    return module


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """Standard deviations by which Σ (o - e)² / e lies above its mean."""
    statistic = ((observed - expected).square() / expected).sum()
    freedom = observed.numel() - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@given(count=st.integers(1, 3000), key=st.integers(-(2**63), 2**63 - 1))
def test_all_of_a_permutation_is_every_id_once(count: int, key: int) -> None:
    for module in modules():
        ids = module.sample_permuted(key, count, count)  # type: ignore[attr-defined]
        assert torch.equal(ids.sort().values, torch.arange(count))


@given(count=st.integers(1, 2**40), key=st.integers(-(2**63), 2**63 - 1), num=st.integers(1, 50))
def test_backends_draw_the_same(count: int, key: int, num: int) -> None:
    if isinstance(MODULES[1], str):
        pytest.skip(MODULES[1])
    log2, some = math.log2(count + 1), min(num, count)
    calls = {
        "sample_permuted": (key, count, some),
        "sample_uniform": (key, count, num),
        "sample_log_uniform": (key, count, log2, num, False, 1000),
    }
    for name, arguments in calls.items():
        ours, theirs = (getattr(m, name)(*arguments) for m in MODULES)
        ids = ours if isinstance(ours, Tensor) else ours[0]
        assert torch.equal(ids, theirs if isinstance(theirs, Tensor) else theirs[0]), name
        assert 0 <= int(ids.min()) <= int(ids.max()) < count


@pytest.mark.parametrize(("count", "num", "most"), [(50, 20, 10_000), (50, 50, 40), (7, 3, 100)])
def test_backends_take_as_many_draws_for_distinct_ids(count: int, num: int, most: int) -> None:
    if isinstance(MODULES[1], str):
        pytest.skip(MODULES[1])
    probability = torch.rand(count, dtype=torch.float64) + 0.01
    table = [m.alias_table(probability / probability.sum()) for m in MODULES]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*table, strict=True))
    for key in range(5):
        for name, arguments in (
            ("sample_log_uniform", (key, count, math.log2(count + 1))),
            ("sample_alias", (key, *table[0])),
        ):
            ours, theirs = (getattr(m, name)(*arguments, num, True, most) for m in MODULES)
            assert ours[1] == theirs[1], name
            if ours[1] >= 0:
                assert torch.equal(ours[0], theirs[0]), name
                assert ours[0].unique().numel() == num <= ours[1] <= most


def test_a_permutation_leaves_no_pattern(draws: object) -> None:
    # Any two classes are drawn together as often as any other two, and each comes first as often.
    v, s, trials = 200, 20, 600
    pairs, first = torch.zeros(v, v), torch.zeros(v)
    for key in range(trials):
        ids = draws.sample_permuted(stream_key(3, key), v, s)  # type: ignore[attr-defined]
        first[ids[0]] += 1
        ids = ids.sort().values
        pairs[ids.unsqueeze(1), ids] += 1
    expected = trials * (s * (s - 1)) / (v * (v - 1))
    found = pairs[torch.triu(torch.ones(v, v, dtype=torch.bool), 1)]
    assert abs(chi_square(found, torch.full_like(found, expected))) < 4
    assert abs(chi_square(first, torch.full_like(first, trials / v))) < 4


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.Uniform(37, 8, seed=5),
        samplers.LogUniform(37, 8, unique=False, seed=5),
        samplers.Frequency(torch.arange(1.0, 38.0), 8, seed=5),
    ],
    ids=["uniform", "log-uniform", "frequency"],
)
def test_classes_are_drawn_as_often_as_expected(sampler: samplers.Uniform) -> None:
    counts, expected = totals(sampler, 2000)
    # Draws without replacement vary less than independent ones do: the bound is one-sided.
    assert chi_square(counts, expected) < 4


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.LogUniform(300, 20, seed=5),
        samplers.Frequency(torch.arange(1.0, 301.0) ** 2, 20, unique=True, seed=5),
    ],
    ids=["log-uniform", "frequency"],
)
def test_distinct_classes_are_drawn_about_as_often_as_expected(sampler: samplers.Uniform) -> None:
    # The formula takes the number of draws as if it were not the one at which S ids were found.
    counts, expected = totals(sampler, 1500)
    assert bool(((counts - expected).abs() < 0.04 * expected + 5 * expected.sqrt()).all())
    assert chi_square(counts, 0.8 * expected) > 4
    assert chi_square(counts, 1.2 * expected) > 4


def totals(sampler: samplers.Uniform, trials: int) -> tuple[Tensor, Tensor]:
    """How often each class was drawn, and how often the sampler expected it to be."""
    everything = torch.arange(sampler.num_classes)
    counts, expected = torch.zeros(2, sampler.num_classes, dtype=torch.float64)
    for step in range(trials):
        drawn = sampler(everything, step)
        counts += torch.bincount(drawn.ids, minlength=sampler.num_classes)
        assert drawn.target_log_expected is not None
        expected += drawn.target_log_expected.double().exp()
    return counts, expected


def test_the_log_uniform_law() -> None:
    # Every class within five standard deviations of its probability, by draws with replacement.
    v, n = 1000, 400_000
    ids = samplers.LogUniform(v, n, unique=False)(step=0).ids
    k = torch.arange(v, dtype=torch.float64)
    p = torch.log((k + 2) / (k + 1)) / math.log(v + 1)
    counts = torch.bincount(ids, minlength=v)
    assert float(((counts - n * p).abs() / (n * p * (1 - p)).sqrt()).max()) < 5


def test_expected_counts_are_those_of_tensorflow() -> None:
    # E = 1 - (1 - P)^tries where repeats were drawn, S P where none was.
    sampler = samplers.LogUniform(20, 8, seed=1)
    module = samplers.primitives()
    seen = set()
    for step in range(200):
        ids, tries = module.sample_log_uniform(
            stream_key(1, step), 20, math.log2(21), 8, True, 10_000
        )
        drawn = sampler(step=step)
        assert torch.equal(drawn.ids, ids.sort().values)
        p = torch.log((drawn.ids + 2) / (drawn.ids + 1).double()) / math.log(21)
        expected = p * 8 if tries == 8 else 1 - (1 - p) ** tries
        assert torch.allclose(drawn.log_expected, expected.log().float(), rtol=1e-6)
        seen.add(tries == 8)
    assert seen == {True, False}


def test_positions_of_targets() -> None:
    sampler = samplers.Uniform(30, 12)
    target = torch.tensor([[0, 5, -1], [29, 3, -100]])
    drawn = sampler(target)
    assert drawn.target_position is not None
    for y, at in zip(
        target.flatten().tolist(), drawn.target_position.flatten().tolist(), strict=True
    ):
        inside = y in drawn.ids.tolist()
        assert (at >= 0) == inside
        assert not inside or int(drawn.ids[at]) == y


@given(n=st.integers(0, 12), v=st.integers(1, 40), s=st.integers(1, 40), seed=st.integers(0, 99))
def test_targets_are_kept(n: int, v: int, s: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, v, (n,), generator=draw)
    s = min(v, max(n, s))
    ids = samplers.sample_keeping(targets, v, s, seed)
    assert ids.shape == (s,)
    assert torch.equal(ids, ids.unique())
    assert 0 <= int(ids.min()) <= int(ids.max()) < v
    assert set(targets[targets >= 0].tolist()) <= set(ids.tolist())
    # The others are the first of the permutation that are no targets.
    drawn = samplers.primitives().sample_permuted(seed, v, s).tolist()
    others = [i for i in drawn if i not in set(targets.tolist())]
    known = set(targets[targets >= 0].tolist())
    assert set(ids.tolist()) == known | set(others[: s - len(known)])


def test_other_classes_than_the_targets_are_equally_likely() -> None:
    counts, trials = torch.zeros(20), 3000
    for step in range(trials):
        counts[samplers.sample_keeping(torch.tensor([3, 3, -1]), 20, 6, stream_key(0, step))] += 1
    assert counts[3] == trials
    others = counts[torch.arange(20) != 3]
    assert chi_square(others, torch.full_like(others, trials * 5 / 19)) < 4


def test_a_draw_follows_from_seed_and_step() -> None:
    a, b = samplers.LogUniform(500, 9, seed=3), samplers.LogUniform(500, 9, seed=3)
    first = [a().ids for _ in range(3)]
    b.load_state_dict({"step": 2})
    assert torch.equal(b().ids, first[2])
    assert b.state_dict() == {"step": 3} == a.state_dict()
    assert torch.equal(a(step=0).ids, first[0])
    assert a.step == 3
    assert not torch.equal(samplers.LogUniform(500, 9, seed=4)(step=0).ids, first[0])
    assert not torch.equal(first[0], first[1])


def test_streams_of_other_names_differ() -> None:
    keys = {stream_key(*parts) for parts in itertools.product(range(20), repeat=2)}
    assert len(keys) == 400
    assert stream_key(1, 2) != stream_key(2, 1)
    assert stream_key(2**63) == stream_key(-(2**63))


def test_cost_follows_the_sample() -> None:
    drawn = samplers.Uniform(10**12, 5)()
    assert drawn.ids.numel() == 5
    assert int(drawn.ids.max()) < 10**12


def test_each_row_draws_its_own() -> None:
    y = torch.tensor([1, 2, 3, 0])
    for sampler in (
        samplers.Uniform(9, 6),
        samplers.LogUniform(9, 6),
        samplers.Frequency(torch.arange(1.0, 10), 6),
    ):
        drawn = sampler.per_row(y)
        assert drawn.ids.shape == drawn.log_expected.shape == (4, 6)
        assert sampler.step == 1
        assert drawn.target_log_expected is not None
        assert drawn.target_log_expected.shape == (4,)
        assert not torch.equal(drawn.ids[0], drawn.ids[1])
        each = torch.stack([sampler.per_row(y, s).ids for s in range(300)])
        counts = torch.bincount(each.flatten(), minlength=9).double()
        expected = sampler._log_expected(torch.arange(9), 6).exp() * (300 * 4)
        assert chi_square(counts, expected) < 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: samplers.Uniform(0, 1), "num_classes must be at least 1, got 0"),
        (lambda: samplers.Uniform(5, 0), "num_samples must be at least 1, got 0"),
        (lambda: samplers.Uniform(5, 6), "num_samples must be at most num_classes, 5"),
        (lambda: samplers.LogUniform(5, 6), "num_samples must be at most num_classes, 5"),
        (lambda: samplers.Frequency(torch.tensor([1.0, 0.0]), 1), "counts must be positive"),
        (lambda: samplers.Frequency(torch.ones(2, 2), 1), r"counts must have shape \(V,\)"),
        (lambda: samplers.Frequency(torch.ones(0), 1), r"counts must have shape \(V,\)"),
        (lambda: reference_sampling.sample_permuted(0, 3, 4), r"num must be in \[0, 3\], got 4"),
    ],
)
def test_bad_samplers(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_a_draw_that_does_not_end_says_so(draws: object) -> None:
    sampler = samplers.Frequency(torch.tensor([1e15, 1.0, 1.0]), 3, unique=True)
    with pytest.raises(RuntimeError, match="did not give 3 distinct classes of 3"):
        sampler()
    assert isinstance(lossops.samplers.LogUniform(5, 5)().ids, Tensor)
