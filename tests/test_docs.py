"""What is written is what the code does: defaults, examples, commands, tables.

``python tests/test_docs.py`` writes the tables of README.md and docs/ anew.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from catalogue_listing import stub, tables
from conftest import make_inputs
from torch import nn

import lossops
from lossops import backends, statistics, switches

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CPU = torch.device("cpu")
PUBLIC = {name: getattr(lossops, name) for name in lossops.__all__}
for _name in ("catalogue", "optim", "samplers"):
    _room = PUBLIC.pop(_name)
    PUBLIC |= {f"{_name}.{name}": getattr(_room, name) for name in _room.__all__}
PUBLIC.pop("catalogue.RECIPES")
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Note", "Example", "Reference")
EVERY_PUBLIC = pytest.mark.parametrize("name", PUBLIC)
EVERY_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)


def sections(thing):
    """Texts of a docstring by section, in their order; what stands before them under ''."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.getdoc(thing), flags=re.MULTILINE)
    return {"": parts[0].strip(), **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(text):
    """Texts of "name: ..." entries, by name; "a, b: ..." counts for both."""
    found = re.findall(r"^    (\w[\w, ]*): (.*(?:\n     .*)*)", text, flags=re.MULTILINE)
    return {name: body for names, body in found for name in names.split(", ")}


def documented(thing):
    found = sections(thing)
    return entries(found.get("Args", "")) | entries(found.get("Attributes", ""))


def parameters(thing):
    return {
        name: p
        for name, p in inspect.signature(thing).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


@EVERY_PUBLIC
def test_documented_defaults_are_those_of_the_signature(name):
    thing = PUBLIC[name]
    given = parameters(thing)
    for argument, text in documented(thing).items():
        written = re.search(r"Default:\s+``(.*?)``", text)
        default = given[argument].default if argument in given else inspect.Parameter.empty
        if default is inspect.Parameter.empty and written and isinstance(thing, type):
            default = inspect.signature(thing.__mro__[1]).parameters[argument].default
        if default is inspect.Parameter.empty:
            assert not written, f"{name}: {argument} has no default, documented {written[1]}"
        elif written:
            stated = ast.literal_eval(written[1])
            assert stated == default, f"{name}: {argument} is {default!r}, documented {stated!r}"


@EVERY_FUNCTION
def test_every_argument_is_documented_with_its_default(name):
    function = FUNCTIONS[name]
    described = documented(function)
    assert list(described) == list(parameters(function))
    for argument, p in parameters(function).items():
        has_default = p.default is not inspect.Parameter.empty
        assert ("Default:" in described[argument]) == has_default, f"{name}: {argument}"


@EVERY_PUBLIC
def test_docstring_order(name):
    found = sections(PUBLIC[name])
    summary = found[""].split("\n\n")[0]
    assert "\n" not in summary, "the first line is one line"
    assert summary.endswith(".")
    listed = [section for section in found if section]
    assert listed == sorted(listed, key=SECTIONS.index)
    assert ">>> " in found["Example"]  # run as a doctest, see below


@EVERY_FUNCTION
def test_docstring_of_a_function(name):
    found = sections(FUNCTIONS[name])
    assert {"Args", "Returns", "Raises", "Example"} <= set(found)
    if re.search("(loss|entropy)$", name):
        assert "Note" in found, "what a loss takes stands in its Note"
    formula = found[""].split("\n\n")[1]
    assert re.search("[=∂Σ]", formula), "the formula follows the first line"


def test_doctests_are_collected(pytestconfig):
    """Each ``make test`` runs the examples of the library."""
    assert "--doctest-modules" in pytestconfig.getini("addopts")
    assert "lossops" in pytestconfig.getini("testpaths")


# README


def blocks(path, language):
    """Fenced blocks of a Markdown file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def markdown():
    return sorted(
        path for folder in (".", "docs", "kernels", "csrc") for path in ROOT.glob(f"{folder}/*.md")
    )


def test_python_of_the_readme_runs():
    """In one session, with fewer classes than it shows."""
    session = {}
    for block in blocks("README.md", "python"):
        exec(block.replace("50_000", "500"), session)
    assert session["loss"].isfinite()


def commands():
    found = []
    for path in markdown():
        for block in blocks(path.relative_to(ROOT), "sh"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True) for line in lines]
    return [command for command in found if command]


def make_targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split())


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_exists(command):
    """Each command of the documents; the long ones run in tests of their own.

    `make demo` in test_demo.py, what `lossops-bench` does in test_bench.py, pip in
    test_packaging.py.
    """
    while "=" in command[0]:
        variable, value = command[0].split("=", 1)
        assert value in switches.CHOICES.get(variable, (value,))
        command = command[1:]
    program, *arguments = command
    if program == "make":
        assert {a for a in arguments if "=" not in a} <= make_targets()
    elif program == "lossops-bench":
        check_benchmark(arguments)
    elif program == "pip":
        assert arguments[0] == "install"
        extras = re.findall(r"\[(.*)\]", " ".join(arguments))
        pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras)
    elif command == ["python", "-m", "lossops.info"]:
        text = io.StringIO()
        with redirect_stdout(text):
            runpy.run_module("lossops.info", run_name="__main__")
        assert "backends on cpu" in text.getvalue()
    elif re.fullmatch(r"python[\d.]*", program):
        if arguments[0] == "-c":
            ast.parse(arguments[1])
        elif arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1])
        else:
            assert (ROOT / arguments[0]).is_file()
    elif program == "pytest":
        paths = [a.partition("::")[0] for a in arguments if a.startswith("tests")]
        assert all((ROOT / path).exists() for path in paths)
    else:
        assert (ROOT / program).exists(), f"{program} is neither here nor known to this test"


def check_benchmark(arguments):
    """The command line takes the arguments, and its case and shapes exist."""
    typer = pytest.importorskip("typer")
    from lossops_bench.cases import CASES, CATALOGUE
    from lossops_bench.cli import build_app
    from lossops_bench.shapes import parse_shape

    name, *rest = arguments
    command = typer.main.get_command(build_app()).commands[name]
    found = command.make_context(name, rest).params
    assert found.get("case") in (None, "catalogue", *CASES, *CATALOGUE)
    for shape in found.get("shape") or []:
        parse_shape(shape)


def test_the_recipe_of_contributing_is_one_of_the_catalogue_and_short():
    places = [*(ROOT / "lossops" / "catalogue").glob("*.py"),
              *(ROOT / "bench" / "lossops_bench" / "dense").glob("*.py")]  # fmt: skip
    sources = "".join(path.read_text(encoding="utf-8") for path in places)
    shown = blocks("CONTRIBUTING.md", "python")
    assert len(shown) == 2
    assert all(block in sources for block in shown)
    assert sum(block.count("\n") for block in shown) < 30


def test_links_lead_somewhere():
    for path in markdown():
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_files_named_in_the_documents_exist():
    for path in markdown():
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:lossops|csrc|tests|bench|docs)/[\w./]*)`", text):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_tests_named_in_the_documents_exist():
    """`test_x` of CONTRIBUTING.md and docs/ is a function or a file here."""
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py"))
    for path in markdown():
        for name in re.findall(r"`(test_\w+)`", path.read_text(encoding="utf-8")):
            assert f"def {name}(" in sources, f"{path.name}: {name}"


def test_nothing_refers_to_where_it_was_made():
    words = ["../" + "shared", "/work/" + "shared", "before" + "-stop"]
    skipped = {".git", ".venv", "build", "dist", "__pycache__", ".hypothesis"}
    suffixes = {".py", ".pyi", ".md", ".toml", ".txt", ".yaml", ".cpp", ".cu", ".h", ".in", ""}
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if skipped & set(inside) or inside[0].endswith("_cache") or not path.is_file():
            continue
        if path.suffix in suffixes and path.stat().st_size < 1_000_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [word for word in words if word in text], path


# Tables that follow the code


def runs(function, backend):
    """Whether a public function runs here with this backend, forward and backward."""
    x, w, _, y = make_inputs(4, 5, 3, torch.float32)
    x.requires_grad_()
    calls = {
        "cross_entropy": lambda: lossops.cross_entropy(x @ w.T, y, backend=backend),
        "linear_loss": lambda: lossops.linear_loss(x, w, y, lambda s: s.log_p, backend=backend),
        "linear_statistics": lambda: lossops.linear_statistics(x, w, y, backend=backend).log_p,
    }
    several = ("asymmetric", "binary", "cosine")
    sampler = lossops.samplers.Uniform(5, 3)
    options = {"backend": backend}
    if "taylor" in function or "spherical" in function:
        if function.endswith("spherical_loss"):
            options["loss_fn"] = lambda target, sum, sumsq, num_classes: sumsq - target
        if function.startswith("linear"):
            options["mode"] = "sweep"  # Gram mode is the same on all of them
        else:
            calls[function] = lambda: FUNCTIONS[function](x @ w.T, y, **options)
    if function.endswith("pairwise_loss"):
        calls[function] = lambda: FUNCTIONS[function](x, w, 10.0, **options)
    elif any(word in function for word in several):
        calls[function] = lambda: FUNCTIONS[function](x, w, y.unsqueeze(1), **options)
    if "sampl" in function or function == "nce_loss":
        calls[function] = lambda: FUNCTIONS[function](x, w, y, sampler, **options)
    call = calls.get(function, lambda: FUNCTIONS[function](x, w, y, **options))
    try:
        call().sum().backward()
    except (ValueError, NotImplementedError):
        return False
    return True


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# How a backend's results are verified, said in each cell of the table of backends.
VERIFIED = {"cpp": "tested", "cuda": "emulated", "reference": "tested", "triton": "interpreted"}


def backend_table():
    """Columns of backends that cannot run in this process stay as the README has them.

    With TRITON_INTERPRET=1, as tests/interpreter runs it, Triton's can, with the library of
    tests/emulator those in CUDA.
    """
    names = sorted(VERIFIED)
    here = {n for n in names if backends.BACKENDS[n].objection(CPU, torch.float32) is None}
    written = {}
    text = between_markers("backends").search(README.read_text(encoding="utf-8"))[0]
    header, _, *lines = (
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.split("\n") if line
    )
    for cells in lines:
        written[cells[0]] = dict(zip(header[1:], cells[1:], strict=True))
    rows = []
    for function, call in FUNCTIONS.items():
        if "." not in function and "backend" in inspect.signature(call).parameters:
            old = written.get(f"`{function}`", {})
            cells = [
                (VERIFIED[name] if runs(function, name) else "no")
                if name in here
                else old.get(name, "no")
                for name in names
            ]
            rows.append([f"`{function}`", *cells])
    return table(["family", *names], rows)


def statistics_table():
    rows = []
    for name, s in statistics.STATISTICS.items():
        attributes = [o for o in s.outputs if hasattr(lossops.RowStatistics, o)]
        if hasattr(lossops.RowStatistics, name) and name not in attributes:
            attributes = [name, *attributes]
        attributes = ", ".join(f"`{a}`" for a in attributes)
        needs = ", ".join(f"`{n}`" for n in s.needs)
        rows.append([f"`{name}`", attributes, s.value, s.basis, needs])
    return table(["name", "attributes", "value", "basis in dz", "needs"], rows)


TABLES = {
    "backends": ("README.md", backend_table),
    "statistics": ("docs/statistics.md", statistics_table),
    "catalogue": ("docs/catalogue.md", tables),
}
STUB = ROOT / "lossops" / "catalogue" / "__init__.pyi"


def between_markers(name):
    return re.compile(rf"(?<=<!-- table:{name} -->\n).*?(?=<!-- /table -->)", flags=re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_table(name):
    path, make = TABLES[name]
    if isinstance(module := backends.load_cpu_module(), str) and name == "backends":
        pytest.skip(module)
    written = between_markers(name).search((ROOT / path).read_text(encoding="utf-8"))
    assert written, f"{path} must hold a table between table:{name} and /table"
    assert written[0].strip() == make(), f"{path} is out of date; run: python tests/test_docs.py"


def test_the_stub_of_the_catalogue_is_that_of_its_table():
    assert STUB.read_text(encoding="utf-8") == stub(), "run: python tests/test_docs.py"


def test_every_statistic_has_its_row():
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    rows = between_markers("statistics").search(text)[0]
    for name, s in statistics.STATISTICS.items():
        assert f"| `{name}` |" in rows
        assert s.value in rows


def test_switches_are_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for switch, choices in switches.CHOICES.items():
        values = ", ".join(f"`{c}`" for c in choices)
        assert f"| `{switch}` | {values} |" in text


@EVERY_FUNCTION
def test_function_is_in_the_readme(name):
    """Of the catalogue, in its own document."""
    room, _, short = name.rpartition(".")
    path, said = (
        ("docs/catalogue.md", f"`{short}") if room == "catalogue" else ("README.md", f"`{name}(")
    )
    assert said in (ROOT / path).read_text(encoding="utf-8")


def test_modules_are_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = [
        n
        for n, t in PUBLIC.items()
        if isinstance(t, type) and issubclass(t, nn.Module) and "catalogue." not in n
    ]
    assert all(f"`{name}`" in text for name in modules)


def test_modules_of_the_library_say_what_they_are():
    for path in sorted((ROOT / "lossops").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert importlib.import_module(name).__doc__, name


if __name__ == "__main__":
    for library in sys.argv[1:]:  # that of tests/emulator
        torch.ops.load_library(library)
    torch.manual_seed(0)
    for name, (path, make) in TABLES.items():
        old = (ROOT / path).read_text(encoding="utf-8")
        new = between_markers(name).sub(lambda _, make=make: make() + "\n", old)
        (ROOT / path).write_text(new, encoding="utf-8")
        print(f"{path}: {name} {'as it was' if new == old else 'written anew'}")
    STUB.write_text(stub(), encoding="utf-8")
