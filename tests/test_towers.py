"""`lossops-bench towers` and `ring`: the pairs, the retrieval, and what the commands print."""

import csv
import json
import math
from pathlib import Path
from textwrap import dedent

import pytest
import torch

pytest.importorskip("typer", reason="the benchmark's extra is not installed")

from torch import Tensor
from typer.testing import CliRunner

from lossops_bench import towers_data
from lossops_bench.cli import build_app
from lossops_bench.ring import Measured, run
from lossops_bench.ring_work import Configuration, Work
from lossops_bench.towers_data import Bags, Pair, PairSet, build_pairs, encode, pairs_of, words
from lossops_bench.towers_train import (
    KS,
    LOSSES,
    Runner,
    Texts,
    TowersOptions,
    batches,
    rarity,
    retrieval,
    start,
    train_in_turns,
    word_overlap,
)

FILE = '''
"""The docstring of the module is nobody's."""

class Reader:
    """What a class says is no pair, however long it may be."""

    @decorated
    def readCSV_file(self, path, *, sep=","):
        """Read the rows of a comma-separated file.

        The second paragraph is not a query.
        """
        # skipsHeader
        with open(path) as file:
            return [line.split(sep) for line in file]

    def short(self):
        """Too few words.

        However long what follows may become.
        """
        a = 1
        b = 2
        return a + b


async def outer(x):
    """outer(x) -> int

    Count what an inner function yields to us.
    """
    def inner():
        """Yield all numbers, one after the other."""
        yield 1
        yield 2

        yield 3
    return len([*inner()])


def brief():
    """Return one, in a body of two lines only."""
    one = 1
    return one


def one_line(): "Everything stands in a single line here"


if True:
    def nothing():
        """It has no docstring if it is f-formatted""".format()
        a = 1
        b = 2
        return a, b
'''


@pytest.fixture(autouse=True)
def one_thread(fixed_seed_and_threads: None) -> None:
    """What is so small takes longer with two."""
    torch.set_num_threads(1)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Forty files of ten functions, whose docstrings name what their code does."""
    for file in range(40):
        text = "".join(made(file, function) for function in range(10))
        (tmp_path / f"file{file}.py").write_text(text, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    return tmp_path


def made(file: int, function: int) -> str:
    a, b = letters(file), letters(100 + 10 * file + function)
    return dedent(f'''
        def do_{a}_{b}(x):
            """Do what {a} does to the {b} of it."""
            y = {a}(x)
            z = {b}(y)
            return z
    ''')


def letters(number: int) -> str:
    """A word for a number."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:04}") + "x"


def read(folder: Path, **options: int) -> PairSet:
    settings = {"max_pairs": 1000, "held_out": 25, "max_words": 500} | options
    return build_pairs(sorted(folder.glob("*.py")), **settings)


def texts(bags: Bags, vocabulary: tuple[str, ...]) -> list[str]:
    ends = zip(bags.starts[:-1], bags.starts[1:], strict=True)
    return [" ".join(vocabulary[i] for i in bags.ids[a:b]) for a, b in ends]


def test_words_are_the_parts_of_identifiers():
    assert words("parseHTTPHeader2(read_csv, __init__): 'Ä-B' é utf8") == (
        ["parse", "http", "header", "2", "read", "csv", "init", "b", "utf", "8"]
    )


def test_pairs_are_functions_with_what_they_say():
    with_csv, outer, inner = pairs_of(FILE)
    assert with_csv == Pair(
        "read the rows of a comma separated file",
        "def read csv file self path sep skips header with open path as file "
        "return line split sep for line in file",
    )
    assert outer == Pair(
        "count what an inner function yields to us",
        "async def outer x def inner yield 1 yield 2 yield 3 return len inner",
    )
    assert inner == Pair(
        "yield all numbers one after the other", "def inner yield 1 yield 2 yield 3"
    )


def test_a_file_that_is_not_python_has_no_pairs():
    assert pairs_of('def f(x):\n    """One two three four five six."""\n    print x\n') == []
    assert pairs_of("def f():\n    return '\0'\n") == []


def test_long_texts_are_cut():
    body = "\n".join(f"    print({i})" for i in range(500))
    (pair,) = pairs_of(f'def f():\n    """{"word " * 500}"""\n{body}\n')
    assert len(pair.doc.split()) == towers_data.DOC_WORDS
    assert len(pair.code.split()) == towers_data.CODE_WORDS


def test_no_file_is_on_both_sides(sources: Path):
    pairs = read(sources)
    assert (len(pairs.train), len(pairs.held_out)) == (370, 25)  # 5 of the third file are left out
    files = {letters(file) for file in range(40)}
    assert len(files.intersection(pairs.vocabulary)) == 37
    for text in texts(pairs.held_out.docs, pairs.vocabulary):
        assert text == "do what <unknown> does to the <unknown> of it"
    trained_on = [text.split()[2] for text in texts(pairs.train.docs, pairs.vocabulary)]
    assert files.issuperset(trained_on)


def test_docstring_and_code_stay_together(sources: Path):
    pairs = read(sources)
    sides = (texts(side, pairs.vocabulary) for side in (pairs.train.docs, pairs.train.codes))
    for doc, code in zip(*sides, strict=True):
        _, _, a, _, _, _, b, *_ = doc.split()
        assert code == f"def do {a} {b} x y {a} x z {b} y return z"


def test_no_docstring_and_no_code_comes_twice(sources: Path):
    code = (sources / "file0.py").read_text(encoding="utf-8")
    (sources / "same_docs.py").write_text(code.replace("return z", "return y"), encoding="utf-8")
    (sources / "same_code.py").write_text(code.replace("Do what", "See what"), encoding="utf-8")
    pairs = read(sources)
    for side in (pairs.train.docs, pairs.train.codes):
        every = texts(side, pairs.vocabulary)
        assert len(set(every)) == len(every)
    assert pairs.files == 43  # one that is broken too
    assert 395 <= len(pairs.train) + len(pairs.held_out) <= 410  # 5 of a file are left out


def test_the_same_seed_gives_the_same_pairs_in_any_number_of_processes(
    sources: Path, monkeypatch: pytest.MonkeyPatch
):
    one = read(sources, max_pairs=300)
    monkeypatch.setattr(towers_data, "FILES_PER_PROCESS", 10)
    monkeypatch.setattr(towers_data.os, "cpu_count", lambda: 2)
    other = read(sources, max_pairs=300)
    assert one.capped
    assert len(one.train) == 270
    assert one.vocabulary == other.vocabulary
    assert one.files == other.files == 30
    assert (one.train.codes.ids == other.train.codes.ids).all()
    assert one.vocabulary != read(sources, max_pairs=300, seed=1).vocabulary


def test_too_few_pairs_are_refused(sources: Path):
    with pytest.raises(ValueError, match=r"at least 1000 functions .* got 400 in 41 Python files"):
        read(sources, held_out=500)


def test_the_vocabulary_keeps_what_is_frequent(sources: Path):
    pairs = read(sources, max_words=6)
    assert len(pairs.vocabulary) == 6
    assert pairs.train.docs.ids.max() == 5
    assert {"do", "y", "z"} <= set(pairs.vocabulary)


def test_some_texts_in_any_order():
    bags = encode(["a b", "c", "a a c unheard"], {"a": 1, "b": 2, "c": 3})
    chosen = Texts(bags, torch.tensor([0.0, 1.0, 1.0, 2.0])).take(torch.tensor([2, 0, 1, 2]))
    assert chosen.ids.tolist() == [0, 1, 3, 1, 2, 3, 0, 1, 3]
    assert chosen.offsets.tolist() == [0, 3, 5, 6]
    a, c = torch.tensor([3.0, 4.0]).log()  # counts 2 and 1, rarities 1 and 2
    expected = torch.nn.functional.normalize(torch.stack([torch.zeros(()), a, c]), dim=0)
    torch.testing.assert_close(chosen.weights[:3], expected)
    torch.testing.assert_close(chosen.weights[3:6], torch.tensor([0.5**0.5, 0.5**0.5, 1.0]))


def test_a_text_of_unknown_words_weighs_nothing():
    assert Texts(encode(["?", "!"], {}), torch.zeros(1)).weights.tolist() == [0.0, 0.0]


def test_rare_words_count():
    idf = rarity(encode(["a b", "a a", "a ?"], {"a": 1, "b": 2}), 4)
    torch.testing.assert_close(idf, torch.tensor([1.0, 1.0, 2.0, 4.0]).log())


def test_dropout_takes_words_of_every_text():
    texts = Texts(encode(["a b"] * 1000, {"a": 1, "b": 2}), torch.ones(3))
    chosen = texts.take(torch.arange(1000))
    some = chosen.some(0.25, torch.Generator().manual_seed(0))
    assert 0.2 < (some.weights == 0).double().mean() < 0.3
    assert torch.equal(some.weights[some.weights > 0], chosen.weights[some.weights > 0])


def test_batches_hold_no_pair_twice_in_a_pass():
    stream = batches(10, 4, seed=0)
    first, second, third = (next(stream).tolist() for _ in range(3))
    assert len({*first, *second}) == 8
    assert [first, second] != [third, next(stream).tolist()]
    assert next(batches(10, 4, seed=0)).tolist() == first


def test_recall_and_mrr_by_hand():
    scores = torch.full((4, 12), 0.0)
    scores.diagonal().copy_(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    scores[1, 5:7] = 2.0  # the partner is third
    scores[2, 4:11] = 2.0  # eighth
    scores[3] = 2.0
    scores[3, 3] = 1.0  # twelfth
    found = retrieval(scores)
    assert found.recall == {1: 0.25, 5: 0.5, 10: 0.75}
    assert found.mrr == pytest.approx((1 + 1 / 3 + 1 / 8 + 1 / 12) / 4)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_towers_that_tell_nothing_apart_find_nothing(value: float):
    found = retrieval(torch.full((20, 20), value))
    assert found.recall == dict.fromkeys(KS, 0.0)
    assert found.mrr == pytest.approx(1 / 20)


def test_common_words_find_what_shares_rare_ones():
    ids = {word: i for i, word in enumerate(["def", "rare", "one", "two", "three"], start=1)}
    docs, codes = (
        encode(side, ids)
        for side in (
            ["def one", "def two rare", "def three rare"],
            ["def one", "def two", "def def three"],
        )
    )
    idf = rarity(codes, 6)
    by_doc, by_code = word_overlap(Texts(docs, idf), Texts(codes, idf), 6)
    assert by_doc.recall[1] == by_code.recall[1] == 1
    unknown = Texts(encode(["?", "!"], ids), idf)
    assert word_overlap(unknown, unknown, 6)[0].recall[1] == 0


def test_both_losses_learn_and_begin_alike(sources: Path):
    pairs = read(sources)
    options = TowersOptions(words=len(pairs.vocabulary), dim=32, hidden=64, batch=128, steps=40)
    idf = torch.ones(options.words)
    sides = Texts(pairs.train.docs, idf), Texts(pairs.train.codes, idf)  # what it saw it finds
    runners = [start(name, len(pairs.train), options) for name in LOSSES]
    losses: dict[str, list[float]] = {name: [] for name in LOSSES}

    def on_step(runner: Runner) -> None:
        losses[runner.name].append(runner.loss)

    train_in_turns(runners, sides, sides, options, on_step)
    one, other = runners
    assert one.points[0].by_doc == other.points[0].by_doc
    assert torch.equal(next(one.batches), next(other.batches))
    for runner in runners:
        assert runner.steps == runner.points[-1].step == len(losses[runner.name]) == 40
        assert len(runner.points) <= options.evaluations + 1
        first, last = runner.points[0], runner.points[-1]
        assert losses[runner.name][-1] < losses[runner.name][0]
        assert first.by_doc.recall[1] < 0.5 < 0.8 < last.by_doc.recall[1]


def test_the_scale_of_the_softmax_loss_is_clamped():
    loss = LOSSES["softmax"]()
    torch.nn.init.constant_(loss.log_scale, 7.0)
    loss.clamp()
    assert loss.log_scale.exp().item() == pytest.approx(100.0)


def test_towers_writes_points_and_curves(sources: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = ["--smoke", "--steps", "4", "--batch", "64", "--held-out", "50"]
    places = ["--corpus", str(sources), "--out", str(out)]
    result = CliRunner().invoke(build_app(), ["towers", *options, *places])
    assert result.exit_code == 0, result.output
    assert (out / "towers.png").read_bytes().startswith(b"\x89PNG")
    with (out / "towers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["loss"] for row in rows)) == list(LOSSES)
    for name in LOSSES:
        mine = [row for row in rows if row["loss"] == name]
        assert [row["query"] for row in mine] == ["docstring", "code"] * (len(mine) // 2)
        assert [int(row["step"]) for row in mine[::2]] == [0, 1, 4]
        for row in mine:
            recalls = [float(row[f"recall@{k}"]) for k in KS]
            assert recalls == sorted(recalls)
            assert 0 <= recalls[-1] <= 1
            assert float(row["mrr"]) > 0
        assert bool(mine[0]["b"]) == (name == "sigmoid")
    output = " ".join(result.output.split())
    for name in (*LOSSES, "overlap", "untrained", "41 files", "350 functions"):
        assert name in output


def smallest(loss: str = "sigmoid") -> Work:
    return Work(loss, batch=64, dim=8, dtype=torch.float64, repeats=2)


def test_two_processes_come_to_what_one_comes_to(tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    sizes = ["--processes", "2", "--batch", "64", "--dim", "8", "--repeats", "2"]
    options = ["--exchange", "ring", "--no-plain", "--json", str(out)]
    result = CliRunner().invoke(build_app(), ["ring", *sizes, *options])
    assert result.exit_code == 0, result.output
    one, two = map(json.loads, out.read_text().splitlines())
    assert (one["processes"], two["processes"], two["exchange"]) == (1, 2, "ring")
    assert two["loss_error"] <= 1e-5
    assert two["gradient_error"] <= 1e-5
    for row in (one, two):
        assert len(row["rounds"]) == 2
        assert row["seconds"] > 0
        assert row["cpu_seconds"] > 0
        assert row["memory_method"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_every_configuration_comes_to_the_same(loss: str):
    one, *others = (
        run(configuration, smallest(loss), timeout=120.0)
        for configuration in (
            Configuration(1),
            Configuration(2, "ring"),
            Configuration(2, "gather"),
            Configuration(1, plain=True),
            Configuration(2, "gather", plain=True),
        )
    )
    for each in others:
        assert not each.failure, each.failure
        assert each.results.keys() == one.results.keys()
        each.compare(one)
        assert each.sound(1e-12), f"{each.of}: {each.loss_error}, {each.gradient_error}"


def test_a_configuration_that_takes_too_long_is_ended():
    found = run(Configuration(1, plain=True), smallest(), timeout=0.01)
    assert "took more than 0.01 s" in found.failure
    assert not found.sound(1.0)


def test_logits_that_do_not_fit_are_skipped_before_anything_is_started():
    work = Work("sigmoid", 10**7, 8, torch.float32, repeats=1)
    assert run(Configuration(1, plain=True), work, 60.0).failure.startswith("skipped: it needs")


def test_errors_are_relative_to_the_largest_entry():
    def found(loss: float, x: list[float]) -> Measured:
        results: dict[str, Tensor] = {"loss": torch.tensor(loss), "x": torch.tensor(x)}
        return Measured(Configuration(1), results=results)

    one, same, off, nan = (
        found(2.0, [1.0, -4.0]),
        found(2.0, [1.0, -4.0]),
        found(2.5, [1.5, -4.0]),
        found(2.0, [1.0, math.nan]),
    )
    for each in (same, off, nan):
        each.compare(one)
    assert (same.loss_error, same.gradient_error) == (0.0, 0.0)
    assert (off.loss_error, off.gradient_error) == (0.25, 0.125)
    assert [each.sound(0.2) for each in (one, same, off, nan)] == [True, True, False, False]


@pytest.mark.parametrize(
    "arguments",
    [
        ["towers", "--loss", "nobody"],
        ["towers", "--corpus", "nowhere"],
        ["ring", "--processes", "3", "--batch", "64"],
        ["ring", "--loss", "nobody"],
    ],
    ids=["loss", "corpus", "batch", "ring"],
)
def test_bad_arguments_end_with_a_sentence(arguments: list[str]):
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 2
    assert "got" in result.output or "is not one of" in result.output
