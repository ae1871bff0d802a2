"""The demo end to end in its `--smoke` size, and its tokeniser and vocabulary."""

import csv
import math
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from lossops_bench import demo
from lossops_bench.demo import OURS, PLAIN, TOLERANCE
from lossops_bench.demo_data import (
    MIN_TOKENS,
    UNKNOWN,
    WORD,
    build_corpus,
    python_sources,
    read_texts,
    text_files,
)
from lossops_bench.demo_report import Run, largest_difference
from lossops_bench.demo_train import LanguageModel, Step, TrainOptions, perplexity

SAMPLE = 'def f(x, *, naïve=3.5):\n    """Größe"""\n\n\treturn x_1 != 0x1F  # ok\n'


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three texts of words drawn with Zipf's weights, a copy of one, and a file that is no text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    draw = random.Random(0)
    words = [f"word{chr(97 + i % 26)}{i}" for i in range(3000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    for name in "abc":
        lines = (" ".join(draw.choices(words, weights, k=12)) + ".\n" for _ in range(1500))
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "copy.txt").write_bytes((folder / "a.txt").read_bytes())
    (folder / "binary.bin").write_bytes(b"\x00\xff" * 100)
    return folder


def test_smoke_run_end_to_end(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lossops_bench.demo", "--smoke", "--threads", "1"]
    done = subprocess.run(
        [*command, "--corpus", str(corpus), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "they agree" in " ".join(done.stdout.split())
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    with (out / "demo.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = {
        run: [float(r["loss"]) for r in rows if r["run"] == run] for run in {r["run"] for r in rows}
    }
    ours, plain = losses["lossops"], losses["plain PyTorch"]
    assert 0 < len(plain) <= len(ours) <= 8
    np.testing.assert_allclose(ours[: len(plain)], plain, rtol=1e-5)
    assert ours[-1] < ours[0]  # it learns
    assert all(float(row["seconds"]) > 0 and int(row["extra_peak_bytes"]) > 0 for row in rows)


@pytest.mark.parametrize(("off", "exit_code"), [(0.0, 0), (2 * TOLERANCE, 1), (math.nan, 1)])
def test_losses_that_differ_fail_the_demo(
    off: float, exit_code: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {OURS: (3.0, 2.0 + off, 1.5), PLAIN: (3.0, 2.0)}

    def finished(head: str, *_: object) -> Run:
        steps = [Step(i, loss, 1.0, 2**20) for i, loss in enumerate(losses[head], start=1)]
        return Run(head, steps, perplexity=9.0)

    monkeypatch.setattr(demo, "run_head", finished)
    app = typer.Typer()
    app.command()(demo.demo_command)
    done = CliRunner().invoke(app, ["--smoke", "--corpus", str(corpus), "--out", str(tmp_path)])
    assert done.exit_code == exit_code, done.output
    assert ("DISAGREE" in done.output) == (exit_code == 1)


def test_a_run_that_dies_is_reported(tmp_path: Path) -> None:
    options = TrainOptions(classes=10)
    with pytest.raises(RuntimeError, match="the lossops run died with exit code 1 after 0 steps"):
        demo.run_head(OURS, tmp_path, options, 1, 1.0, Console())  # the folder holds no tokens


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=r"--corpus must name .* got .*nowhere"):
        text_files([missing])


@given(st.text())
def test_words_partition_any_text(text: str) -> None:
    assert "".join(WORD.findall(text)) == text


def test_words_of_a_sample() -> None:
    assert WORD.findall("if x_1 >= 12:\n\n    go()") == [
        *("if", " x_1", " >", "=", " 12", ":", "\n\n    ", "go", "(", ")")
    ]


def test_encode_decode_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE * 1000, encoding="utf-8")
    text = build_corpus([path], classes=1000, max_tokens=10**6)
    assert text.vocabulary.decode(text.vocabulary.encode(SAMPLE)) == SAMPLE
    assert text.vocabulary.decode(text.train[: len(WORD.findall(SAMPLE))].tolist()) == SAMPLE
    assert text.vocabulary.encode("neverseen") == [0]
    assert text.coverage() == 1.0


def test_vocabulary_is_the_most_frequent_words_of_the_training_part(corpus: Path) -> None:
    text = build_corpus(text_files([corpus]), classes=50, max_tokens=10**6, seed=3)
    assert text.files == 3  # neither the copy nor the binary file
    assert not text.capped
    assert len(text.vocabulary) == 50
    assert text.vocabulary.words[0] == UNKNOWN
    words = WORD.findall("".join(read_texts(text_files([corpus]), seed=3)))
    assert len(words) == len(text.train) + len(text.held_out)
    counts = np.bincount(text.train, minlength=50)
    assert (np.diff(counts[1:]) <= 0).all()
    train = words[: len(text.train)]
    assert [train.count(word) for word in text.vocabulary.words[1:]] == counts[1:].tolist()
    assert text.vocabulary.encode("".join(words[-len(text.held_out) :])) == text.held_out.tolist()


def test_max_tokens_caps_and_the_seed_decides_the_sample(corpus: Path) -> None:
    files = text_files([corpus])
    first, again, other = (
        build_corpus(files, classes=500, max_tokens=MIN_TOKENS, seed=seed) for seed in (0, 0, 1)
    )
    assert first.capped
    assert len(first.train) + len(first.held_out) == MIN_TOKENS
    np.testing.assert_array_equal(first.train, again.train)
    assert not np.array_equal(first.train, other.train)


def test_too_little_text_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=f"at least {MIN_TOKENS} tokens, got 300 in 1 files"):
        build_corpus(text_files([corpus]), classes=500, max_tokens=300)


def test_python_sources_are_the_library_and_the_installed_packages() -> None:
    files = python_sources()
    assert Path(random.__file__).resolve() in files
    packages = Path(sysconfig.get_path("purelib")).resolve()
    assert any(packages in path.parents for path in files)
    assert all(path.suffix == ".py" for path in files)


def test_perplexity_is_that_of_all_logits() -> None:
    options = TrainOptions(classes=40, dim=16, layers=1, context=8, batch_tokens=16)
    torch.manual_seed(0)
    model = LanguageModel(options)
    stream = torch.randint(40, (50,))
    with torch.no_grad():
        logits = model(stream[:48].view(6, 8)) @ model.head.T  # (48, 40)
    expected = math.exp(F.cross_entropy(logits, stream[1:49]))
    assert perplexity(model, stream, options) == pytest.approx(expected, rel=1e-5)


def test_tied_head_is_the_embedding() -> None:
    model = LanguageModel(TrainOptions(classes=10, dim=8, layers=1, tied=True))
    assert model.head is model.embedding.weight


def test_difference_covers_common_steps_and_keeps_nan() -> None:
    def run(*losses: float) -> Run:
        return Run("", [Step(i, loss, 1.0, 1) for i, loss in enumerate(losses, start=1)])

    assert largest_difference(run(3.0, 2.5, 9.0), run(3.0, 2.0)) == 0.5
    assert math.isnan(largest_difference(run(3.0, math.nan, 1.0), run(3.0, 2.0, 1.0)))
