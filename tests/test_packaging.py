"""What is shipped, what is built when, and what importing the package does and does not do."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lossops import backends, info, switches

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "lossops": ROOT / "lossops",
    "lossops_bench": ROOT / "bench" / "lossops_bench",
    "lossops_triton": ROOT / "kernels" / "lossops_triton",
}


def run_python(*arguments, **environment):
    """Runs this Python in the repository, with variables set or, where None, unset."""
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def setup_script():
    """setup.py as a module: it calls setup() only when run."""
    spec = importlib.util.spec_from_file_location("lossops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The names in the sdist, without their first folder, and the wheel built from that sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    litter = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, folder / "tree", ignore=litter)
    # What an earlier build left in place must not be shipped as part of a pure-Python wheel.
    for leftover in ("_cpu_leftover.so", "_cuda.abi3.so"):
        (folder / "tree" / "lossops" / leftover).touch()
    command = ["-m", "build", "--no-isolation", "--outdir", folder, folder / "tree"]
    done = run_python(*command, LOSSOPS_BUILD="none")
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return names, wheel


def sources(folder, *patterns):
    found = {path for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_sdist_holds_all_that_a_build_and_a_test_run_need(archives):
    names, _ = archives
    wanted = (
        sources("lossops", "*.py", "*.pyi") | sources("bench", "*.py") | sources("tests", "*.py")
    )
    wanted |= sources("csrc", "*.cpp", "*.cu", "*.h", "*.md") | sources("kernels", "*.py", "*.md")
    wanted |= sources("tests", "*.cpp", "*.cu", "*.h", "*.json")
    wanted |= {"lossops/py.typed", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    wanted |= {"CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "requirements-dev.txt", ".ci/run"}
    assert wanted - names == set()
    assert {name for name in names if name.endswith((".so", ".pyc"))} == set()


def test_wheel_holds_the_packages_and_nothing_else(archives):
    _, wheel = archives
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {"lossops/py.typed", "lossops/catalogue/__init__.pyi"}
    for package, folder in PACKAGES.items():
        wanted |= {f"{package}/{path.relative_to(folder)}" for path in folder.rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_depends_on_torch_alone(archives):
    _, wheel = archives
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.13"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "lossops-bench = lossops_bench:main" in scripts


WITHOUT_THE_OPTIONAL_PARTS = """
import runpy
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_unless_blocked(name, *where, **also_where):
    blocked = name.partition(".")[0] == "triton" or name.startswith("lossops._")
    return None if blocked else find_spec(name, *where, **also_where)

PathFinder.find_spec = find_unless_blocked

import torch
import lossops

x, w = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
loss = lossops.linear_cross_entropy(x, w, torch.tensor([0, 5, 10, 15]))
loss.backward()
assert loss.isfinite() and w.grad.isfinite().all()
runpy.run_module("lossops.info", run_name="__main__")
"""


def test_works_without_triton_and_without_the_compiled_modules():
    done = run_python("-c", WITHOUT_THE_OPTIONAL_PARTS, LOSSOPS_BACKEND=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not built") == 4
    assert "cpp        no: " in done.stdout
    assert "reference  can run" in done.stdout


IMPORT_AND_WATCH = """
import gc
import sys
import torch

def refuse(*arguments):
    raise AssertionError("asked at import")

torch.backends.cpu.get_cpu_capability = torch.get_num_threads = refuse
torch.cuda.is_available = torch.cuda.device_count = refuse
modules = set(sys.modules)
tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

import lossops

new = {name for name in set(sys.modules) - modules if not name.startswith("lossops")}
heavy = {name for name in new if name.startswith(("triton", "torch._inductor", "torch._dynamo"))}
assert not heavy, heavy
assert not [name for name in sys.modules if name.startswith("lossops._cpu")]
assert tensors == sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
assert not torch.cuda.is_initialized()
"""


def test_import_allocates_compiles_and_asks_nothing():
    done = run_python("-c", IMPORT_AND_WATCH)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("switch", switches.CHOICES)
def test_switch_takes_its_choices_and_names_them_in_its_error(monkeypatch, switch):
    choices = switches.CHOICES[switch]
    for value in choices:
        monkeypatch.setenv(switch, value)
        assert switches.chosen(switch) == value
    monkeypatch.setenv(switch, "")
    assert switches.chosen(switch) == "auto"
    monkeypatch.delenv(switch)
    assert switches.chosen(switch) == "auto"
    monkeypatch.setenv(switch, "gpu")
    with pytest.raises(
        ValueError, match=f"{switch} must be one of {', '.join(choices)}, got 'gpu'"
    ):
        switches.chosen(switch)


def test_setup_reads_the_switch_as_the_library_does(monkeypatch, setup_script):
    monkeypatch.setenv("LOSSOPS_BUILD", "none")
    assert setup_script.requested_build() == "none"
    monkeypatch.setenv("LOSSOPS_BUILD", "gpu")
    with pytest.raises(ValueError, match="LOSSOPS_BUILD must be one of auto, cpu, cuda, none"):
        setup_script.requested_build()


@pytest.fixture(params=["no compiler", "no torch", "windows"])
def cannot_build(request, monkeypatch, setup_script, tmp_path):
    """An environment that cannot build the modules, and a word of the reason."""
    if request.param == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        return "'c\\+\\+' is not on PATH"
    if request.param == "no torch":
        monkeypatch.setattr(setup_script.importlib.util, "find_spec", lambda name: None)
        return "--no-build-isolation"
    monkeypatch.setattr(setup_script.sys, "platform", "win32")
    return "gcc and clang"


def test_auto_gives_pure_python_and_says_so(capsys, setup_script, cannot_build):
    assert setup_script.wanted_parts("auto") == []
    assert "without the compiled cpu part" in capsys.readouterr().err


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_what_is_asked_for_is_built_or_refused(setup_script, cannot_build, build):
    with pytest.raises(SystemExit, match=cannot_build):
        setup_script.wanted_parts(build)


def test_none_builds_nothing_even_where_it_could(capsys, setup_script):
    assert setup_script.wanted_parts("none") == []
    assert "LOSSOPS_BUILD=none" in capsys.readouterr().err


def test_cuda_kernels_are_built_where_nvcc_is(capsys, monkeypatch, setup_script):
    monkeypatch.setattr(setup_script, "cuda_home", lambda: None)
    assert setup_script.wanted_parts("auto") == ["cpu"]
    assert "without the compiled cuda part: nvcc is not on PATH" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="LOSSOPS_BUILD=cuda, but no cuda part: nvcc"):
        setup_script.wanted_parts("cuda")
    monkeypatch.setattr(setup_script, "cuda_home", lambda: "/usr/local/cuda")
    assert setup_script.wanted_parts("auto") == setup_script.wanted_parts("cuda") == ["cpu", "cuda"]
    assert setup_script.wanted_parts("cpu") == ["cpu"]


@pytest.mark.parametrize(
    ("listed", "architectures"),
    [
        ("sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 sm_121", "8.0;8.6;9.0;10.0;12.0+PTX"),
        ("sm_50 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a", "8.0;8.6;9.0+PTX"),  # CUDA 12.6
    ],
)
def test_cuda_kernels_are_built_for_what_nvcc_knows(
    monkeypatch, setup_script, tmp_path, listed, architectures
):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --list-gpu-code ] && echo {listed}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(setup_script, "cuda_home", lambda: str(tmp_path))
    assert setup_script.architectures() == architectures


@pytest.mark.skipif(not Path("/bin/false").exists(), reason="needs a program that always fails")
def test_failing_compiler_is_an_error_under_auto(tmp_path):
    command = ["setup.py", "--quiet", "build_ext", "-b", tmp_path, "-t", tmp_path]
    done = run_python(*command, LOSSOPS_BUILD="auto", CXX="/bin/false")
    assert done.returncode != 0
    assert "/bin/false" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_an_older_processor_gets_its_module(capability):
    """As ATEN_CPU_CAPABILITY pretends, through the public functions."""
    script = """
import torch, lossops
from lossops import backends
x, w = torch.randn(9, 8), torch.randn(70, 8, requires_grad=True)
found = [
    torch.autograd.grad(lossops.linear_cross_entropy(x, w, torch.arange(9), backend=k), w)[0]
    for k in ("cpp", "reference")
]
torch.testing.assert_close(*found)
print(backends.load_cpu_module().__name__)
"""
    names = [f"lossops._cpu_{name}" for name in ("avx2", "default")]
    able = [n for n in names if importlib.util.find_spec(n) and n in backends.cpu_module_names()]
    wanted = f"lossops._cpu_{capability}"
    if wanted not in able:
        pytest.skip(f"{wanted} is not built, or this processor is older")
    done = run_python("-c", script, ATEN_CPU_CAPABILITY=capability, LOSSOPS_BACKEND=None)
    assert done.stdout.strip() == wanted, done.stderr


def undefined_symbol(name):
    raise ImportError("undefined symbol: at")


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda name: SimpleNamespace(torch_version="1.0"), "was built for torch 1.0, this is "),
        (undefined_symbol, "does not load (undefined symbol: at)"),
    ],
    ids=["another version", "another ABI"],
)
def test_an_extension_for_another_torch_is_an_objection(monkeypatch, load, said):
    """With the command that builds it anew, in `lossops.info` and in errors; never at import."""
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: object())
        patched.setattr(importlib, "import_module", load)
        sentence = backends.load_cpu_module.__wrapped__()
    assert said in sentence
    assert sentence.endswith(f"rebuild it: {backends.REBUILD}")
    monkeypatch.setattr(backends, "load_cpu_module", lambda: sentence)
    assert info._backends(torch.device("cpu"))["cpp"] == f"no: {sentence}"
    assert backends.select("auto", torch.device("cpu"), torch.float32).name != "cpp"
    with pytest.raises(ValueError, match="backend 'cpp' cannot run this call: the compiled ext"):
        backends.select("cpp", torch.device("cpu"), torch.float32)


def test_every_capability_is_built_and_knows_its_torch(setup_script):
    built = {path.name.partition(".")[0] for path in PACKAGES["lossops"].glob("_cpu_*.so")}
    if not built:
        pytest.skip("no compiled modules here: built with LOSSOPS_BUILD=none")
    assert built == {f"_cpu_{name}" for name in setup_script.CAPABILITIES}
    module = backends.load_cpu_module()
    assert not isinstance(module, str), module
    assert module.torch_version == importlib.metadata.version("torch").partition("+")[0]
