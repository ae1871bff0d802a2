"""`lossops-bench heads` and `race`: what they print and write, and that the heads do their work."""

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("typer", reason="the benchmark's extra is not installed")

from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from lossops.near_far import DEFAULT_THRESHOLD
from lossops_bench import partial_fc
from lossops_bench.cli import build_app
from lossops_bench.contenders import (
    CONTENDERS,
    AdaptiveHead,
    DenseHead,
    FactoredHead,
    Head,
)
from lossops_bench.demo_data import Corpus, Vocabulary
from lossops_bench.heads import LEAST_STEPS, RIVALS, ROUNDS, Work, head_rows, measure_heads
from lossops_bench.identities import Identities, Run, train
from lossops_bench.identities import Options as IdentityOptions
from lossops_bench.inputs import log_uniform
from lossops_bench.near_far_training import dropping_cross_entropy
from lossops_bench.partial_fc import TRAINERS, measure_steps
from lossops_bench.partial_fc import Work as StepWork
from lossops_bench.race import HEADS, parse_entry
from lossops_bench.race_report import race_table, write_curves
from lossops_bench.race_train import KS, RaceOptions, race, start
from lossops_bench.shapes import Shape

N, D, V = 6, 8, 40
NEAR = {"atol": 1e-5, "rtol": 1e-4}
TINY = RaceOptions(classes=V, dim=16, batch=32, embedding=8, hidden=32, seconds=0.2, evaluations=2)
STREAM = (torch.arange(4000) % V).int()  # each word says which one follows


@pytest.fixture(autouse=True)
def one_thread(fixed_seed_and_threads: None) -> None:
    """What is so small takes longer with two."""
    torch.set_num_threads(1)


def inputs(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, D, requires_grad=True), torch.randint(V, (n,))


def scores(head: Head, x: Tensor) -> Tensor:
    """What each class (N, V) gets, the plain way."""
    if isinstance(head, AdaptiveHead):
        each = [head.softmax(x, torch.full((len(x),), y)).output for y in range(V)]
        return torch.stack(each, dim=-1)
    weight = head.factored.dense() if isinstance(head, FactoredHead) else head.linear.weight
    return x @ weight.T


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twenty-five thousand words drawn with Zipf's weights."""
    draw = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    text = " ".join(draw.choices(words, [1 / (i + 1) for i in range(500)], k=25_000))
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    return tmp_path / "corpus.txt"


def test_heads_writes_a_row_for_each_head(tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    sizes = ["--classes", "3000", "--dim", "64", "--batch", "8", "--steps", "10", "--seconds", "1"]
    result = CliRunner().invoke(build_app(), ["heads", *sizes, "--json", str(out)])
    assert result.exit_code == 0, result.output
    written = {row["rival"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(written) == list(RIVALS)
    for name, row in written.items():
        assert row["status"] == "ok", f"{name}: {row['reason']}"
        assert LEAST_STEPS <= row["steps"] <= 10
        assert 0 < len(row["rounds"]) <= ROUNDS
        assert min(row["rounds"]) <= row["seconds"] <= max(row["rounds"])
        assert row["make_seconds"] > 0
        assert row["first_step_seconds"] > 0
        assert row["shape"] == [8, 64, 3000]
        assert name in result.output
    assert "× factored-z" in result.output


def test_a_slow_head_takes_three_steps():
    work = Work(Shape(N, D, V), steps=50, patience=0.0)
    (figures,) = measure_heads([CONTENDERS["softmax"]], work)
    assert figures.steps == len(figures.seconds) == LEAST_STEPS


def test_heads_that_do_not_fit_are_skipped_before_anything_is_allocated():
    work = Work(Shape(10**4, 4096, 10**8), steps=3, patience=1.0)
    found = measure_heads([CONTENDERS["softmax"], CONTENDERS["factored-z"]], work)
    assert [each.status for each in found] == ["skipped"] * 2
    assert found[0].reason.startswith("it needs about")
    assert head_rows(found, work)[0]["seconds"] is None


def test_targets_follow_zipf_and_stay_in_range():
    ids = log_uniform((100, 1000), V, torch.Generator().manual_seed(0))
    shares = torch.bincount(ids.flatten(), minlength=V) / ids.numel()
    expected = torch.log1p(1 / torch.arange(1, V + 1)) / math.log(V + 1)
    assert (ids.min(), ids.max(), len(shares)) == (0, V - 1, V)
    torch.testing.assert_close(shares, expected, atol=0.005, rtol=0)


@pytest.mark.parametrize("name", ["softmax", "softmax-lossops"])
def test_a_dense_step_is_sgd(name: str):
    head = CONTENDERS[name].make(D, V, 0.5)
    assert isinstance(head, DenseHead)
    x, y = inputs()
    weight = head.linear.weight.detach().clone().requires_grad_()
    dx, dw = torch.autograd.grad(F.cross_entropy(x @ weight.T, y), (x, weight))
    head.loss(x, y).backward()
    head.step()
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(head.linear.weight, weight - 0.5 * dw)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_head_learns_a_batch(name: str):
    head = CONTENDERS[name].make(D, V, min(CONTENDERS[name].lr, 0.3))
    x, y = inputs()
    losses = []
    for _ in range(50):
        loss = head.loss(x, y)
        loss.backward()
        head.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert x.grad.isfinite().all()
    assert (x.grad != 0).any(-1).all()


def test_the_factored_and_the_dense_weight_take_the_same_steps():
    dense, factored = (CONTENDERS[name].make(D, V, 0.5) for name in ("gram-z", "factored-z"))
    factored.factored.load_dense(dense.linear.weight)
    for _ in range(20):
        x, y = inputs(30)
        losses = [head.loss(x, y) for head in (dense, factored)]
        for head, loss in zip((dense, factored), losses, strict=True):
            loss.backward()
            head.step()
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(factored.factored.dense(), dense.linear.weight, **NEAR)


@pytest.mark.parametrize("name", CONTENDERS)
def test_the_top_classes_are_those_of_all_scores(name: str):
    head = CONTENDERS[name].make(D, V, 0.1)
    with torch.no_grad():
        x, _ = inputs(30)
        every = scores(head, x)
        top = head.top(x, 5)
    assert top.shape == (30, 5)
    torch.testing.assert_close(every.gather(1, top), every.topk(5).values)


def test_race_writes_points_and_curves(corpus: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = ["--smoke", "--seconds", "0.1", "--corpus", str(corpus), "--out", str(out)]
    result = CliRunner().invoke(build_app(), ["race", *options])
    assert result.exit_code == 0, result.output
    assert (out / "race.png").read_bytes().startswith(b"\x89PNG")
    with (out / "race.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["head"] for row in rows)) == list(HEADS)
    for name in HEADS:
        mine = [row for row in rows if row["head"] == name]
        steps = [int(row["step"]) for row in mine[:: len(KS)]]
        assert 1 <= len(steps) <= 3
        assert steps == sorted(set(steps))
        last = mine[-len(KS) :]
        assert [int(row["k"]) for row in last] == list(KS)
        assert float(last[0]["seconds"]) >= 0.1
        errors = [float(row["error"]) for row in last]
        assert errors == sorted(errors, reverse=True)
        assert 0 < errors[-1] <= errors[0] < 1
        assert name in result.output


@pytest.mark.filterwarnings("ignore:the factor of the head")  # few features, and fast growing
@pytest.mark.parametrize("name", HEADS)
def test_every_racer_learns_which_word_follows(name: str):
    runner = start(parse_entry(f"{name}:0.3"), STREAM, TINY)
    for _ in range(150):
        runner.train_until(math.nextafter(runner.seconds, math.inf))  # one step
    assert runner.steps == 150
    assert not runner.diverged
    runner.evaluate(STREAM[:900].view(100, 9).long(), V)
    assert runner.points[-1].errors[1] < 0.5  # by chance 0.975


def test_racers_begin_alike_and_see_the_same_batches():
    one, other = (start(parse_entry(name), STREAM, TINY) for name in ("softmax", "adaptive"))
    for mine, theirs in zip(one.body.parameters(), other.body.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    other.train_until(math.ulp(0.0))
    next(one.windows)
    batch = next(one.windows)
    assert batch.shape == (TINY.batch, TINY.context + 1)
    assert torch.equal(batch, next(other.windows))


def test_errors_count_the_words_that_are_not_among_the_best():
    class Fixed:
        def top(self, x: Tensor, k: int) -> Tensor:
            return torch.arange(k).expand(len(x), k)

    runner = start(parse_entry("softmax"), STREAM, TINY)
    runner.head = Fixed()
    text = torch.zeros(4, 9, dtype=torch.long)
    text[:, -1] = torch.tensor([0, 3, 7, 30])
    runner.evaluate(text, V)
    assert runner.points[0].errors == {1: 0.75, 5: 0.5, 10: 0.25, 50: 0.0, 100: 0.0}


def test_a_head_that_diverges_ends_and_is_named(tmp_path: Path):
    entries = [parse_entry("softmax"), parse_entry("adaptive:1e38")]
    runners = race(entries, STREAM.numpy(), STREAM.numpy(), TINY)
    assert [runner.diverged for runner in runners] == [False, True]
    console = Console(width=100, record=True)
    console.print(race_table(runners, TINY))
    assert console.export_text().count("diverged") == 1
    write_curves(tmp_path / "curves.png", runners, TINY)


def test_evaluations_are_spaced_by_one_factor():
    times = RaceOptions(classes=V, seconds=640.0, evaluations=7).times()
    assert times == pytest.approx([10, 20, 40, 80, 160, 320, 640])


@pytest.mark.parametrize(
    "arguments",
    [
        ["heads", "--rivals", "nobody"],
        ["race", "--head", "nobody"],
        ["race", "--head", "softmax:fast"],
        ["race", "--head", "softmax:-1"],
    ],
    ids=["rival", "head", "word", "negative"],
)
def test_bad_arguments_end_with_a_sentence(arguments: list[str]):
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 2
    assert "got" in result.output


# A training step over very many classes


def test_partial_fc_says_what_a_step_costs(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    line = ["run", "partial_fc", "--classes", "300", "--dim", "8", "--batch", "6", "--repeats", "2"]
    result = CliRunner().invoke(build_app(), [*line, "--json", str(file), "--threads", "1"])
    assert result.exit_code == 0, result.output
    found = [json.loads(text) for text in file.read_text().splitlines()]
    assert [row["rival"] for row in found] == list(TRAINERS)
    for row in found:
        assert row["status"] == "ok", row["reason"]
        assert len(row["rounds"]) == 2
        assert row["extra_bytes"] >= 0
        assert row["rival"] in result.output


def test_partial_fc_does_not_start_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_fc, "free_bytes", lambda device: 1000)
    (found,) = measure_steps(["lossops"], StepWork(300, 8, 0.1, 6, 1, 1), memory=False)
    assert found.status == "skipped"
    assert "GB are free" in found.reason


def test_partial_fc_rivals_compute_the_same_loss() -> None:
    work = StepWork(classes=50, dim=8, rate=1.0, batch=6, rounds=1, threads=1)
    losses = {name: [TRAINERS[name](work).step()] for name in TRAINERS}
    trainers = {name: TRAINERS[name](work) for name in TRAINERS}
    for _ in range(4):
        for name, trainer in trainers.items():
            losses[name].append(trainer.step())
    for name in TRAINERS:
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-4), name


def test_partial_fc_knows_its_rivals() -> None:
    result = CliRunner().invoke(build_app(), ["partial-fc", "--rivals", "lossops,other"])
    assert result.exit_code == 2
    assert "other" in result.output


# An identity classifier with Partial FC

FEW = IdentityOptions(classes=40, dim=8, latent=6, noise=0.2, batch=16, steps=60, scale=16.0)


def test_identities_writes_a_picture_and_goes_on_where_it_was(tmp_path: Path) -> None:
    line = ["identities", "--classes", "40", "--dim", "8", "--batch", "8", "--steps", "20"]
    result = CliRunner().invoke(build_app(), [*line, "--rates", "1,0.5", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    with (tmp_path / "identities.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(2 * n) for n in range(1, 11)] * 2
    assert (tmp_path / "identities.png").stat().st_size > 10_000
    written = (tmp_path / "rate-0.5.pt").stat().st_mtime_ns
    again = CliRunner().invoke(build_app(), [*line, "--rates", "0.5", "--out", str(tmp_path)])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "rate-0.5.pt").stat().st_mtime_ns == written, "there was nothing left to do"


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_identities_are_learnt_and_a_checkpoint_is_exact(rate: float, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(run: Run) -> None:
        if run.step == 45:
            raise StopError

    data = Identities(FEW)
    whole, stopped, resumed = (Run(rate, FEW) for _ in range(3))
    train(whole, data)
    assert whole.points[-1].held_out > 10 / FEW.classes
    with pytest.raises(StopError):
        train(stopped, data, tmp_path / "run.pt", stop)
    train(resumed, data, tmp_path / "run.pt")
    assert resumed.step == FEW.steps
    assert torch.equal(resumed.head.weight, whole.head.weight)
    for reached, there in zip(resumed.points, whole.points, strict=True):
        assert reached._replace(seconds=there.seconds) == there
    other = Run(rate, replace(FEW, seed=1))
    other.resume(tmp_path / "run.pt")
    assert other.step == 0, "a checkpoint of another task"


def test_strangers_are_others_and_found_where_their_pictures_are_alike() -> None:
    for noise, least, most in ((0.0, 1.0, 1.0), (100.0, 0.0, 0.25)):
        data, run = Identities(replace(FEW, noise=noise)), Run(1.0, FEW)
        run.evaluate(data)
        assert least <= run.points[-1].strangers <= most
        assert not torch.isin(data.new_latents, data.latents).any()


def test_identities_refuses_rates_that_are_none() -> None:
    for rates in ("0.1,2", "half"):
        result = CliRunner().invoke(build_app(), ["identities", "--rates", rates])
        assert result.exit_code == 2


def test_near_far_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head is trained, measured and drawn, and the demo's model trained each way."""
    monkeypatch.setattr("lossops_bench.near_far.load_corpus", small_corpus)
    runner = CliRunner()
    command = ["near-far", "--smoke", "--steps", "2", "--out", str(tmp_path)]
    result = runner.invoke(build_app(), command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for way in ("trained float32: near/far", "random float32: dense", "dropping"):
        assert way in result.output
    for name in ("near-far.json", "frontier.csv", "training.csv"):
        assert (tmp_path / name).stat().st_size > 0
    for name in ("frontier.png", "classes.png", "training.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((tmp_path / "near-far.json").read_text())
    dense = next(r for r in rows if r["way"] == "dense")
    assert dense["error_dx"] < 1e-5
    assert dense["of_dense"] == [1.0]
    again = runner.invoke(build_app(), [*command[:2], *command[4:]], catch_exceptions=False)
    assert again.exit_code == 0
    assert "head" in again.output


def small_corpus(*_: object) -> Corpus:
    """Words that follow each other, with a tail of rare ones."""
    words = torch.arange(30_000) % 700
    words[::7] = torch.randint(700, 3000, (len(words[::7]),))
    stream = words.int().numpy()
    names = tuple(map(str, range(3000)))
    return Corpus(stream[:28_000], stream[28_000:], Vocabulary(names), 3000, 1, False)


def test_dropping_loses_what_is_small() -> None:
    """PyTorch's loss; the gradient lacks the entries below the threshold, no others."""
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(9000, 4, requires_grad=True)
    y = torch.randint(9000, (5,))
    loss = dropping_cross_entropy(x, w, y)
    assert torch.allclose(loss, F.cross_entropy(x @ w.T, y))
    dz = (x @ w.T).softmax(1).detach() - F.one_hot(y, 9000)
    dz[dz.abs() <= DEFAULT_THRESHOLD] = 0.0
    assert 0 < (dz != 0).sum() < dz.numel() / 2
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert torch.allclose(dx, dz @ w / 5, atol=1e-6)
    assert torch.allclose(dw, dz.T @ x / 5, atol=1e-6)
