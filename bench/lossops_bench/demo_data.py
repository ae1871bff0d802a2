"""The demo's text: files, a lossless word tokeniser, a vocabulary and a held-out part.

    text → WORD.findall → ids as first seen → counts → ids by falling frequency (T,)

Id 0 is every word outside the vocabulary.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

UNKNOWN = "<unknown>"
HELD_OUT = 0.02  # of the tokens
MIN_TOKENS = 20_000  # of which the held-out part is longer than the model's context

# A word, a number or one punctuation mark, each with the single space before it; line breaks with
# the indentation that follows; other white space. Every character belongs to exactly one match, so
# joining the matches restores the text.
WORD = re.compile(r" ?(?:[^\W\d]\w*|\d+|[^\w\s])|\n+ *|[^\S\n]+")

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Vocabulary:
    """Words by falling frequency; id 0 stands for all others."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, 0 for each word outside the vocabulary."""
        ids = {word: i for i, word in enumerate(self.words)}
        return [ids.get(word, 0) for word in WORD.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``: the inverse of `encode` where every word is known."""
        return "".join(self.words[i] for i in ids)


@dataclass(frozen=True)
class Corpus:
    """Encoded text, split into a part to train on and a part held out."""

    train: Ids  # (T,)
    held_out: Ids  # (T',)
    vocabulary: Vocabulary
    distinct: int  # words before the vocabulary was cut
    files: int
    capped: bool  # True when max_tokens ended the reading

    def coverage(self) -> float:
        """The share of the training text that is in the vocabulary."""
        return float(np.count_nonzero(self.train) / len(self.train))

    def unigram_perplexity(self) -> float:
        """What word frequencies alone reach on the held-out text, each count raised by one."""
        counts = np.bincount(self.train, minlength=len(self.vocabulary)) + 1
        return float(np.exp(-np.log(counts / counts.sum())[self.held_out].mean()))


def python_sources() -> list[Path]:
    """The Python sources of the standard library and of the running environment's packages."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    # Without a virtual environment site-packages lies inside the standard library; with one, the
    # packages that lie there are another environment's.
    others = {"site-packages", "dist-packages"}
    files = {p for p in library.rglob("*.py") if others.isdisjoint(p.parts)}
    return sorted(files.union(*(root.rglob("*.py") for root in installed)))


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths`` and all files below the folders among them.

    Raises:
        FileNotFoundError: if a path does not exist.
    """
    files: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--corpus must name an existing file or folder, got {path}")
        files.update((p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])
    return sorted(files)


def read_texts(files: Sequence[Path], seed: int) -> Iterator[str]:
    """The texts of ``files`` in an order drawn from ``seed``: no binary file, no text twice.

    Packages vendor copies of each other, and a copy of what was trained on is not held out.
    """
    seen: set[int] = set()
    for path in random.Random(seed).sample(files, len(files)):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if "\0" not in text and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def build_corpus(
    files: Sequence[Path],
    *,
    classes: int,
    max_tokens: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Corpus:
    """Tokenise ``files`` in one pass and hold out the end; the vocabulary is of the rest.

    Args:
        files: read in an order drawn from ``seed``, so that ``max_tokens`` takes a sample.
        classes: the size V of the vocabulary: the unknown word and the most frequent ones.
        max_tokens: reading stops here.
        progress: called with the number of tokens after each file.

    Raises:
        ValueError: if there are fewer than ``MIN_TOKENS`` tokens.
    """
    # A word gets the next free id where it is first seen: one look-up a token, all of it in C.
    first_seen: defaultdict[str, int] = defaultdict()
    first_seen.default_factory = first_seen.__len__
    chunks: list[Ids] = []
    tokens = 0
    for text in read_texts(files, seed):
        words = WORD.findall(text)[: max_tokens - tokens]
        chunks.append(np.fromiter(map(first_seen.__getitem__, words), np.int32, len(words)))
        tokens += len(words)
        progress(tokens)
        if tokens >= max_tokens:
            break
    if tokens < MIN_TOKENS:
        raise ValueError(
            f"the corpus must have at least {MIN_TOKENS} tokens, got {tokens} in {len(chunks)} "
            "files of text: give more with --corpus, or raise --max-tokens"
        )
    held_out = int(tokens * HELD_OUT)
    stream = np.concatenate(chunks)  # (tokens,)
    counts = np.bincount(stream[:-held_out], minlength=len(first_seen))
    kept = np.argsort(-counts, kind="stable")[: classes - 1]
    kept = kept[counts[kept] > 0]
    rank = np.zeros(len(first_seen), np.int32)
    rank[kept] = np.arange(1, len(kept) + 1)
    spelling = list(first_seen)
    return Corpus(
        train=rank[stream[:-held_out]],
        held_out=rank[stream[-held_out:]],
        vocabulary=Vocabulary((UNKNOWN, *(spelling[i] for i in kept))),
        distinct=len(first_seen),
        files=len(chunks),
        capped=tokens >= max_tokens,
    )
