"""The pairs of the two towers: what a function's docstring says, and its code, as bags of words.

    files → texts in an order drawn from the seed → ast: (words of docstring, words of code)
          → no docstring twice, no code twice → first files held out, the rest to train on → ids

Of a docstring the first paragraph is kept, as in CodeSearchNet: what somebody might type who looks
for the function; where that only repeats the signature, the second. Of the code everything but
docstrings is kept, the function's name, its arguments' names and comments included: a search over
code sees them too, and a part of what is to be learnt is that ``read_csv`` reads a CSV. Decorators
stand before the ``def`` and are not part of it.
"""

from __future__ import annotations

import ast
import gc
import multiprocessing
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lossops_bench.demo_data import UNKNOWN, read_texts

LEAST_DOC_WORDS = 5
LEAST_BODY_LINES = 3
DOC_WORDS, CODE_WORDS = 64, 256
"""Words that are read of a docstring and of a function; the rest is cut off."""
SIGNATURE = 2000
"""Characters of a block in which its docstring begins."""
FILES_PER_PROCESS = 200
"""Fewer are not worth a second process."""

# One part of an identifier: `parseHTTPHeader2` is parse, HTTP, Header, 2.
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
DEF = re.compile(r"^([ \t]*)(?:async[ \t]+)?def\b.*$", re.MULTILINE)
# A colon at the end of a line, and a string on the next: seldom anything else than a docstring.
DOC = re.compile(r":[ \t]*(?:#.*)?\n\s*[rRuU]?[\"']")

Ids = npt.NDArray[np.int32]
Starts = npt.NDArray[np.int64]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Pair:
    """One function: the words of its docstring and of its code, with blanks between them."""

    doc: str
    code: str


@dataclass(frozen=True)
class Bags:
    """Texts as ids, one after the other: text i is ``ids[starts[i] : starts[i + 1]]``."""

    ids: Ids  # (T,)
    starts: Starts  # (P + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Pairs:
    """Docstring i belongs to code i."""

    docs: Bags
    codes: Bags

    def __len__(self) -> int:
        return len(self.docs)


@dataclass(frozen=True)
class PairSet:
    """What to train on and what to retrieve; no file has pairs in both."""

    train: Pairs
    held_out: Pairs
    vocabulary: tuple[str, ...]  # by falling frequency in `train`; id 0 stands for all others
    files: int  # that were read
    capped: bool  # True when max_pairs ended the reading


def words(text: str) -> list[str]:
    """The words of prose or code, lower-case, identifiers in parts; only ASCII letters count."""
    return [word.lower() for word in WORD.findall(text)]


def pairs_of(text: str) -> list[Pair]:
    """The pairs in one Python file.

    Left out: docstrings of fewer than ``LEAST_DOC_WORDS`` words in their first paragraph, bodies of
    fewer than ``LEAST_BODY_LINES`` lines that are neither blank nor docstring.
    """
    with no_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        return [pair for block in blocks(text) if (pair := pair_of(block))]


def blocks(text: str) -> Iterator[str]:
    """What seem to be functions with a docstring, by indentation: `ast` takes those that are.

    It parses a fourth of the text instead of all, and that is most of the time.
    """
    for match in DEF.finditer(text):
        # The next line that is no deeper, but for comments, and brackets that end a signature.
        after = re.compile(rf"^(?!{match[1]}[ \t])[ \t]*[^\s#)\]}}]", re.MULTILINE)
        last = after.search(text, match.end())
        block = text[match.start() : last.start() if last else len(text)]
        if DOC.search(block, 0, SIGNATURE):
            yield f"if True:\n{block}" if match[1] else f"\n{block}"


def pair_of(block: str) -> Pair | None:
    """The pair of a function from the second line on; None where it is none, or too short."""
    try:
        tree = ast.parse(block)
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return None
    nodes = [*definitions(tree.body)]
    own, *others = map(docstring, nodes)
    if own is None:
        return None
    lines = ["", *block.split("\n")]  # as ast counts them: from 1, and only these ends
    for string in (own, *others):  # a function's code holds the functions inside it
        if string is not None:
            lines[string.lineno : end(string)] = [""] * (end(string) - string.lineno)
    doc = words(first_paragraph(str(own.value), nodes[0].name))
    body = [line for line in lines[own.lineno : end(nodes[0])] if line.strip()]
    if len(doc) < LEAST_DOC_WORDS or len(body) < LEAST_BODY_LINES:
        return None
    code = words("\n".join(lines[nodes[0].lineno : end(nodes[0])]))
    return Pair(" ".join(doc[:DOC_WORDS]), " ".join(code[:CODE_WORDS]))


def definitions(body: Iterable[ast.AST]) -> Iterator[Definition]:
    """Functions and classes among the statements and inside them, in the order of the text.

    It takes a tenth of the time of `ast.walk`, which looks into every expression.
    """
    for node in body:
        if isinstance(node, Definition):
            yield node
        for name in ("body", "cases", "handlers", "orelse", "finalbody"):
            yield from definitions(getattr(node, name, ()))


def docstring(node: Definition) -> ast.Constant | None:
    """The string that is the first statement of a function or class, if there is one."""
    first = node.body[0]
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
        return None
    return first.value if isinstance(first.value.value, str) else None


def first_paragraph(text: str, name: str) -> str:
    """What stands before the first blank line; a signature, ``name(...)``, is no paragraph."""
    first, *others = re.split(r"\n[ \t]*\n", text.strip(), maxsplit=2)
    return others[0] if others and first.startswith(f"{name}(") else first


def end(node: ast.stmt | ast.expr) -> int:
    """The line after the last one of a node."""
    assert node.end_lineno is not None  # all that come from a text have one
    return node.end_lineno + 1


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector, which the nodes of a tree start too often: thrice as fast."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build_pairs(
    files: Sequence[Path],
    *,
    max_pairs: int,
    held_out: int,
    max_words: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda files, pairs: None,
) -> PairSet:
    """Read the pairs of ``files``, hold out those of the first files, encode all.

    The same files and seed give the same pairs, whatever the number of processes. Of functions that
    share a docstring or their code only the first counts: the others would be negatives that are
    none, and answers seen in training.

    Args:
        files: read in an order drawn from ``seed``, so that ``max_pairs`` takes a sample.
        max_pairs: reading stops here.
        held_out: the pairs to retrieve; what else is in the last file of them is left out.
        max_words: the most words of the vocabulary, the unknown one included.
        progress: called with the numbers of files and pairs after each file.

    Raises:
        ValueError: if fewer than ``2 * held_out`` pairs are found.
    """
    per_file: list[list[Pair]] = []
    docs: set[str] = set()
    codes: set[str] = set()
    for pairs in read_pairs(files, seed):
        new = []
        for pair in pairs:
            if pair.doc not in docs and pair.code not in codes and len(docs) < max_pairs:
                docs.add(pair.doc)
                codes.add(pair.code)
                new.append(pair)
        per_file.append(new)
        progress(len(per_file), len(docs))
        if len(docs) == max_pairs:
            break
    if len(docs) < 2 * held_out:
        raise ValueError(
            f"there must be at least {2 * held_out} functions with a docstring, twice as many as "
            f"are held out, got {len(docs)} in {len(per_file)} Python files: give more with "
            "--corpus, or raise --max-pairs"
        )
    split, seen = 0, 0
    while seen < held_out:
        seen += len(per_file[split])
        split += 1
    answers = [pair for pairs in per_file[:split] for pair in pairs][:held_out]
    train = [pair for pairs in per_file[split:] for pair in pairs]
    counts = Counter(
        word for pair in train for text in (pair.doc, pair.code) for word in text.split()
    )
    ids = {word: i for i, (word, _) in enumerate(counts.most_common(max_words - 1), start=1)}
    return PairSet(
        encode_pairs(train, ids),
        encode_pairs(answers, ids),
        (UNKNOWN, *ids),
        files=len(per_file),
        capped=len(docs) == max_pairs,
    )


def read_pairs(files: Sequence[Path], seed: int) -> Iterator[list[Pair]]:
    """The pairs of each file in an order drawn from ``seed``; parsed in several processes."""
    texts = read_texts(files, seed)
    processes = min(os.cpu_count() or 1, len(files) // FILES_PER_PROCESS)
    if processes < 2:
        yield from map(pairs_of, texts)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(pairs_of, texts, chunksize=4)


def encode_pairs(pairs: Sequence[Pair], ids: dict[str, int]) -> Pairs:
    """The two sides of the pairs as ids, 0 for each word outside the vocabulary."""
    return Pairs(
        encode([pair.doc for pair in pairs], ids), encode([pair.code for pair in pairs], ids)
    )


def encode(texts: Sequence[str], ids: dict[str, int]) -> Bags:
    """Texts of words between blanks as ids."""
    bags = [[ids.get(word, 0) for word in text.split()] for text in texts]
    starts = np.cumsum([0, *map(len, bags)], dtype=np.int64)
    flat = np.fromiter((i for bag in bags for i in bag), np.int32, starts[-1])
    return Bags(flat, starts)
