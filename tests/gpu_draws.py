"""Draws of class ids in CUDA: bit for bit those of the reference.

The emulator and a GPU share these tests. A suite imports all of this and has the fixtures ``draws``
and ``cuda_draws``, draws on the device and that module for tensors on the CPU, ``shuffle``, which
takes a seed for another order of blocks and threads, and ``device``.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lossops
from lossops import reference_sampling, samplers
from lossops.cuda_draws import draws_needed, law_of, log_uniform_law
from lossops.reference_sampling import stream_key

LARGE = 2**33 + 5  # ids and offsets do not fit 32 bits


@pytest.fixture
def frequencies() -> Tensor:
    return torch.rand(90, generator=torch.Generator().manual_seed(1)) ** 3 + 0.01


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000, 2**31 + 1, LARGE, 2**40])
def test_draws_are_those_of_the_reference(draws, shuffle, count):
    log2 = math.log2(count + 1)
    for seed, num in enumerate((0, 1, 255, 256, 600)):
        shuffle(seed)
        key = stream_key(7, num)
        some = min(num, count)
        assert torch.equal(
            draws.sample_permuted(key, count, some),
            reference_sampling.sample_permuted(key, count, some),
        )
        assert torch.equal(
            draws.sample_uniform(key, count, num),
            reference_sampling.sample_uniform(key, count, num),
        )
        arguments = (key, count, log2, num, False, num)
        ours, tries = draws.sample_log_uniform(*arguments)
        assert torch.equal(ours, reference_sampling.sample_log_uniform(*arguments)[0])
        assert tries == num
        assert not num or 0 <= int(ours.min()) <= int(ours.max()) < count


def test_a_permutation_is_every_id_once(draws):
    for count in (1, 7, 300, 1030):
        ids = draws.sample_permuted(stream_key(count), count, count)
        assert torch.equal(ids.sort().values, torch.arange(count))
    with pytest.raises(RuntimeError, match=r"num must be in \[0, 3\], got 4"):
        draws.sample_permuted(0, 3, 4)


@pytest.mark.parametrize(("num", "most"), [(1, 5), (20, 100), (20, 21), (90, 90), (60, 4000)])
def test_distinct_ids_and_tries_are_those_of_the_reference(draws, shuffle, frequencies, num, most):
    table = reference_sampling.alias_table((frequencies / frequencies.sum()).double())
    for key in range(6):
        shuffle(key)
        for name, arguments in (
            ("sample_log_uniform", (key, 90, math.log2(91))),
            ("sample_alias", (key, *table)),
        ):
            ids, tries = getattr(draws, name)(*arguments, num, True, most)
            expected, taken = getattr(reference_sampling, name)(*arguments, num, True, most)
            assert int(tries) == taken, name
            if taken > 0:
                assert torch.equal(ids, expected), name
            ours, drawn = getattr(draws, name)(*arguments, num, False, num)
            assert torch.equal(
                ours, getattr(reference_sampling, name)(*arguments, num, False, 0)[0]
            )
            assert drawn == num


def test_samplers_draw_where_the_targets_are(device, shuffle, frequencies):
    # Without targets they draw on the CPU.
    target = torch.tensor([[0, 5, -1], [29, 3, -100], [88, 90, 2**40]])
    for sampler in (
        samplers.Uniform(90, 12, seed=1),
        samplers.LogUniform(90, 12, seed=2),
        samplers.LogUniform(90, 40, unique=False),
        samplers.Frequency(frequencies, 12, unique=True),
        samplers.Frequency(frequencies, 150),
    ):
        for step in range(4):
            shuffle(step)
            drawn, theirs = sampler(target.to(device), step), sampler(step=step)
            ours = samplers.SampledClasses(*(t.cpu() for t in drawn))
            assert torch.equal(ours.ids, theirs.ids)
            torch.testing.assert_close(ours.log_expected, theirs.log_expected, rtol=1e-6, atol=0)
            inside = (target.unsqueeze(2) == ours.ids).any(2)
            assert torch.equal(ours.target_position >= 0, inside)
            first = torch.searchsorted(ours.ids, target)
            assert torch.equal(ours.target_position[inside], first[inside])
            if isinstance(sampler, samplers.Uniform):
                continue
            p = sampler._law()[0][target.clamp(0, 89)]
            if sampler.unique:
                tries = sampler._drawn(reference_sampling, stream_key(sampler.seed, step), 12,
                                       True, 10**4)[1]  # fmt: skip
                expected = 1 - (1 - p) ** tries if tries > 12 else 12 * p
            else:
                expected = p * len(ours.ids)
            torch.testing.assert_close(ours.target_log_expected.double(), expected.log(),
                                       rtol=1e-6, atol=1e-6)  # fmt: skip


def test_each_row_draws_its_own(device, shuffle, monkeypatch, frequencies):
    y = torch.tensor([1, 2, 3, 0], device=device)
    for sampler in (
        samplers.Uniform(90, 6), samplers.LogUniform(90, 6), samplers.Frequency(frequencies, 6),
    ):  # fmt: skip
        ours = sampler.per_row(y, 3)
        with monkeypatch.context() as patch:
            patch.setattr(samplers, "primitives", lambda _=None: reference_sampling)
            assert torch.equal(ours.ids, sampler.per_row(y, 3).ids)


def test_targets_are_kept_as_on_the_cpu(device, monkeypatch):
    targets = torch.tensor([3, 3, -1, 77, 4], device=device)
    ours = samplers.sample_keeping(targets, 1000, 30, stream_key(4))
    monkeypatch.setattr(samplers, "primitives", lambda _=None: reference_sampling)
    assert torch.equal(ours, samplers.sample_keeping(targets, 1000, 30, stream_key(4)))


@pytest.mark.parametrize("num", [0, 1, 2, 700])
def test_positions(cuda_draws, shuffle, num):
    shuffle(num)
    ids = torch.randint(300, (num,)).sort().values
    wanted = torch.randint(-2, 302, (20, 30))
    found = cuda_draws.positions(ids, wanted.T)
    first = torch.searchsorted(ids, wanted.T.contiguous())
    inside = torch.isin(wanted.T, ids)
    assert torch.equal(found, torch.where(inside, first, -1))


@pytest.mark.parametrize(("n", "s", "k"), [(0, 3, 2), (3, 0, 2), (3, 4, 0), (1, 1, 1), (9, 77, 3)])
def test_hits(cuda_draws, shuffle, n, s, k):
    shuffle(n)
    drawn, target = torch.randint(20, (n, s)), torch.randint(-1, 20, (n, k))
    expected = (drawn.unsqueeze(2) == target.unsqueeze(1)).any(2)
    assert torch.equal(cuda_draws.hits(drawn, target), expected)


@given(v=st.integers(1, 60), s=st.integers(1, 60), power=st.floats(0, 3), seed=st.integers(0, 99))
def test_as_many_draws_as_are_needed(v, s, power, seed):
    s = min(s, v)
    p = torch.arange(1.0, v + 1, dtype=torch.float64) ** -power
    p = p / p.sum()
    most = samplers._most_draws(s)
    enough = draws_needed(law_of(p), s, most)
    if enough > most:
        return
    draws = torch.multinomial(p, enough, True, generator=torch.Generator().manual_seed(seed))
    assert draws.unique().numel() >= s


def test_laws_of_many_classes_are_theirs():
    v = 200_000  # beyond those that count for themselves
    p, count = log_uniform_law(v)
    for exact in (log_uniform_law(2**16), (p, count)):
        total = (exact[0] * exact[1]).sum()
        assert 0.98 < float(total) < 1 + 1e-9
    assert count.sum() == v
    assert len(p) < 70_000
    k = torch.arange(v, dtype=torch.float64)
    law = torch.log1p(1 / (k + 1)) / math.log(v + 1)
    least, counts = law_of(law)
    assert counts.sum() == v
    assert len(least) < 1000
    for num in (10, 20_000):
        needed = [
            draws_needed(some, num, 10**9)
            for some in ((p, count), (least, counts), (law, torch.ones_like(law)))
        ]
        assert needed[2] <= min(needed)
        assert max(needed) <= 1.03 * needed[2]
    assert sum(log_uniform_law(10**12)[1]) == 10**12


def test_draws_that_cannot_do_say_so(device):
    y = torch.tensor([0], device=device)
    hopeless = samplers.Frequency(torch.tensor([1e15, 1.0, 1.0]), 3, unique=True)
    with pytest.raises(RuntimeError, match="13000 draws did not give 3 distinct classes of 3"):
        hopeless(y)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("loss", [lossops.sampled_softmax_loss, lossops.nce_loss])
def test_losses_are_those_of_draws_on_the_cpu(device, shuffle, monkeypatch, loss, per_row):
    shuffle(1)
    x, w = torch.randn(9, 16).to(device), (torch.randn(50, 16) * 0.1).to(device).requires_grad_()
    y = torch.randint(50, (9, 2)).to(device)
    sampler = samplers.LogUniform(50, 12, seed=3)
    values = []
    for backend in ("auto", "reference"):
        w.grad = None
        if backend == "reference":
            monkeypatch.setenv("LOSSOPS_BACKEND", "reference")
        sample = sampler.per_row(y, 1) if per_row else sampler(y, 1)
        found = loss(x, w, y, sample, remove_accidental_hits=True)
        found.backward()
        values.append((found.detach(), w.grad.to_dense()))
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
