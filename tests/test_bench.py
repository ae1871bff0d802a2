"""The benchmark: what it prints and writes, and that it can be trusted."""

import io
import json
import mmap
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("typer", reason="the benchmark's extra is not installed")

from rich.console import Console
from typer.testing import CliRunner

import lossops_bench
from lossops_bench import runner
from lossops_bench.case import Case, Problem, Rival
from lossops_bench.cases import CASES, CATALOGUE
from lossops_bench.cli import build_app
from lossops_bench.figures import Report, rows
from lossops_bench.measure import copy_ways, product_ways, seconds
from lossops_bench.memory import RivalSetup, SamplingMeter, peak_extra
from lossops_bench.report import catalogue_table, footnotes, results_table
from lossops_bench.runner import Settings, run
from lossops_bench.shapes import SHAPES, Shape, parse_shape
from lossops_bench.truth import errors, verdict

LINEAR = CASES["linear_cross_entropy"]
TINY = Shape(24, 16, 300)
QUICK = Settings(repeats=2, memory=False)
MIB = 2**20


def problem(dtype: torch.dtype = torch.float32, **changes: object) -> Problem:
    return replace(Problem(TINY, dtype), **changes)


def with_rival(loss, case: Case = LINEAR, **fields: object) -> tuple[Case, Rival]:
    rival = Rival("test", "a rival of this test", loss, workspace=lambda problem: 0, **fields)
    return replace(case, rivals=(*case.rivals, rival)), rival


def text_of(report: Report) -> str:
    console = Console(width=150, file=io.StringIO())
    console.print(results_table(rows(report)), footnotes(rows(report)))
    return console.file.getvalue()


def test_list_shows_cases_rivals_and_shapes():
    result = CliRunner().invoke(build_app(), ["list"])
    assert result.exit_code == 0, result.output
    for word in (*CASES, *(r.name for case in CASES.values() for r in case.rivals), *SHAPES):
        assert word in result.output


def test_run_appends_json_lines_and_draws_a_plot(tmp_path: Path):
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    command = ["run", "linear_cross_entropy", "--shape", "24,16,300", "--repeats", "2"]
    options = ["--rivals", "lossops-reference,plain", "--json", str(out), "--plot", str(plot)]
    result = CliRunner().invoke(build_app(), [*command, *options, "--no-memory"])
    assert result.exit_code == 0, result.output
    written = {row["rival"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(written) == {"GEMM: mm", "GEMM: mm in tiles", "lossops-reference", "plain"}
    ours = written["lossops-reference"]
    assert ours["status"] == "ok", ours["reason"]
    assert ours["shape"] == [24, 16, 300]
    assert len(ours["rounds"]) == 2
    assert set(ours["errors"]) == {"loss", "dx", "dw"}
    assert ours["note"].split()[0] in ("one_sweep", "two_sweeps")
    assert ours["least_units"] == 3
    for key in ("seconds", "rows_per_second", "gigabytes_per_second", "teraflops", "units"):
        assert ours[key] > 0, key
    assert "extra_bytes" in ours
    assert {"torch", "lossops"} <= set(ours["versions"])
    assert {"cpu", "cpu_capability", "threads"} <= set(ours["machine"])
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda **x: LINEAR.rival("plain").loss(**x) * 1.01, id="one-percent"),
        pytest.param(lambda **x: LINEAR.rival("plain").loss(**x) * float("nan"), id="nan"),
    ],
)
def test_a_wrong_result_is_shown_as_wrong_and_not_timed(wrong):
    case, rival = with_rival(wrong)
    report = run(case, problem(), [case.rival("plain"), rival], QUICK)
    figures = {f.name: f for f in report.figures}
    assert figures["plain"].status == "ok"
    assert figures["test"].status == "wrong"
    assert not figures["test"].seconds
    assert "test: wrong: loss is off by" in text_of(report)


def test_a_rival_that_raises_is_skipped_with_its_words():
    def broken(**inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    case, rival = with_rival(broken)
    report = run(case, problem(), [rival, case.rival("plain")], QUICK)
    assert "test: skipped: RuntimeError: no such kernel" in text_of(report)


def test_a_rival_with_an_objection_is_absent():
    case, rival = with_rival(F.cross_entropy, objection=lambda problem: "it needs a GPU")
    report = run(case, problem(), [rival], QUICK)
    assert [f.status for f in report.figures] == ["absent"]
    assert "test: absent: it needs a GPU" in text_of(report)


def test_what_does_not_fit_is_skipped_before_anything_is_allocated():
    huge = problem(shape=Shape(10**6, 4096, 10**7))
    report = run(LINEAR, huge, [LINEAR.rival("plain")], Settings())
    (figures,) = report.figures
    assert figures.status == "skipped"
    assert figures.reason.startswith("it needs about 120")


def test_a_truth_that_costs_too_much_is_cut_to_fewer_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "TRUTH_FLOPS", LINEAR.truth_flops(TINY) // 3)
    report = run(LINEAR, problem(), [LINEAR.rival("plain")], QUICK)
    assert report.truth_rows == 8
    assert "on the first 8 of 24 rows" in text_of(report)


@pytest.mark.parametrize("name", CASES)
def test_truth_agrees_with_autograd_in_float64(name: str):
    case, where = CASES[name], problem(torch.float64)
    inputs = case.with_gradients(where, case.make_inputs(where))
    found = errors(case.call(case.rival("plain"), "training", inputs), case.truth(where, inputs))
    assert set(found) == {"loss", *case.differentiable.values()}
    assert max(found.values()) < 1e-13


@pytest.mark.parametrize("name", CATALOGUE)
def test_each_loss_of_the_catalogue_runs_beside_its_definition(name: str):
    """Right, timed, and over our plain cross-entropy: what `run catalogue` does, on little."""
    case = CATALOGUE[name]()
    report = run(case, problem(), case.rivals, QUICK)
    assert {f.name: f.status for f in report.figures if f.status != "unit"} == {
        "lossops": "ok", "plain": "ok",
    }, [f.reason for f in report.figures]  # fmt: skip
    text = catalogue_text([rows(report)])
    assert name.partition("/")[2] in text
    assert report.unit.startswith("lossops")


def catalogue_text(cases: list) -> str:
    console = Console(width=150, file=io.StringIO())
    console.print(catalogue_table(cases))
    return console.file.getvalue()


def test_verdict_takes_the_larger_of_floor_and_slack():
    assert verdict({"loss": 9e-6}, {}, torch.float32) is None
    assert verdict({"loss": 3e-5}, {"loss": 1e-5}, torch.float32) is None
    assert "loss is off by 5.0e-05" in str(verdict({"loss": 5e-5}, {"loss": 1e-5}, torch.float32))
    assert verdict({"dx": float("nan")}, {"dx": float("nan")}, torch.bfloat16) is not None


def test_a_consumed_input_is_a_copy():
    case = CASES["cross_entropy"]
    inputs = case.with_gradients(problem(), case.make_inputs(problem()))
    before = inputs["logits"].detach().clone()
    case.prepare(case.rival("lossops-inplace"), "training", inputs)()
    assert torch.equal(inputs["logits"], before)


def test_units_are_positive_and_do_their_work():
    x, w = torch.randn(8, 16), torch.randn(5000, 16)  # two tiles and a part of one
    where = problem(shape=Shape(8, 16, 5000))
    ways = product_ways("x", "w", where, {"x": x, "w": w})
    assert set(ways) == {"mm", "mm in tiles"}
    assert torch.allclose(ways["mm"]()(), x @ w.T, atol=1e-4)
    ways |= copy_ways("x", where, {"x": x})
    assert all(seconds(prepare(), "cpu") > 0 for prepare in ways.values())


def test_half_precision_may_go_through_float32():
    x, w = torch.randn(8, 16).bfloat16(), torch.randn(5000, 16).bfloat16()
    where = problem(torch.bfloat16, shape=Shape(8, 16, 5000))
    ways = product_ways("x", "w", where, {"x": x, "w": w})
    assert "mm in float32 tiles" in ways
    assert all(seconds(prepare(), "cpu") > 0 for prepare in ways.values())


MEMORY_SETUP = """
import torch

def setup():
    small = torch.ones(1)

    def call():
        temporary = torch.ones(64 * 2**18)  # 64 MiB
        return {"output": torch.ones(32 * 2**18), "same": small}  # 32 MiB, an output

    return call, [small]
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="exact on Linux only")
def test_memory_counts_temporaries_and_not_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lossops_bench_setup.py").write_text(MEMORY_SETUP)
    monkeypatch.syspath_prepend(tmp_path)
    from lossops_bench_setup import setup

    reading = peak_extra(setup, timeout=60)
    assert 63 * MIB < reading.extra_bytes < 67 * MIB


def test_memory_of_plain_pytorch_is_its_logits():
    n, v = 256, 32768
    case, where = LINEAR, problem(shape=Shape(n, 16, v))
    reading = peak_extra(RivalSetup(case, case.rival("plain"), where), timeout=60)
    logits, outputs = 4 * n * v, 4 * (n + v) * 16
    # Log-probabilities, their gradient and the logits' gradient; the outputs come after the peak.
    assert 3 * logits - outputs <= reading.extra_bytes < 3.3 * logits


def test_memory_of_a_dead_process_is_an_error_that_says_why():
    with pytest.raises(RuntimeError, match=r"TypeError|not callable|unpack"):
        peak_extra(dict, timeout=60)


def test_sampling_sees_a_lasting_allocation():
    meter = SamplingMeter()
    # Mapped anew: the C library would take it from what other tests gave back.
    kept = torch.frombuffer(mmap.mmap(-1, 64 * MIB), dtype=torch.uint8).fill_(1)
    assert meter.extra() > 0.9 * kept.nbytes


@pytest.mark.parametrize("name", lossops_bench.EXTRA)
def test_without_its_extra_the_command_says_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        lossops_bench.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert name in said
    assert "pip install '.[bench]'" in said


def test_a_long_problem_in_parts_is_the_whole(monkeypatch):
    """Sums over parts of the rows come to the loss and gradients of one call."""
    monkeypatch.setattr(runner, "LONG_FLOPS", 0)
    monkeypatch.setattr(runner, "PART_ROWS", 5)
    monkeypatch.setattr(runner, "PARTS", 4)
    case, where = CASES["sigmoid_pairwise"], problem(shape=Shape(24, 8, 40))
    rival = case.rival("lossops-reference")
    run = runner._Run(case, where, [rival], runner.Settings(), lambda doing: None)
    inputs = case.make_inputs(where)
    _, found = run.in_parts(rival, inputs)
    whole = case.call(rival, "training", case.with_gradients(where, inputs))
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name].reshape(value.shape), value)
    report = runner.run(case, where, [rival], runner.Settings())
    assert [f.status for f in report.figures] == ["unit"] * (len(report.figures) - 1) + ["ok"]
    assert report.figures[-1].note == "4 parts"


def test_shapes_by_number_by_name_and_with_another_n():
    assert parse_shape("2,3,4") == Shape(2, 3, 4)
    assert parse_shape("gemma2-2b") == Shape(8192, 2304, 256000, "gemma2-2b")
    assert parse_shape("gemma2-2b:64").rows == 64


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no_such_case"],
        ["run", "cross_entropy", "--shape", "1,2"],
        ["run", "cross_entropy", "--shape", "0,2,3"],
        ["run", "cross_entropy", "--rivals", "nobody"],
        ["run", "cross_entropy", "--device", "tpu"],
    ],
    ids=["case", "shape", "zero", "rival", "device"],
)
def test_bad_arguments_end_with_a_sentence(arguments: list[str]):
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 2
    assert "got" in result.output or "has no rival" in result.output


class TestTune:
    """Tiles of the fused kernel: what is chosen, and how the tables are rewritten."""

    @pytest.fixture(autouse=True)
    def _triton(self):
        pytest.importorskip("triton", reason="Triton is an optional dependency")

    def test_the_fastest_wins_by_more_than_noise(self):
        from lossops_bench.kernels.tune import fastest
        from lossops_triton.configurations import Tile

        now, other, broken = (
            Tile(128, 64, 64, 8, 3),
            Tile(64, 64, 64, 4, 3),
            Tile(256, 256, 64, 8, 4),
        )
        times = {now: 1.0, other: 0.9, broken: float("inf")}
        assert fastest([now, other, broken], times.__getitem__) == (other, 0.9)
        times[other] = 0.99
        assert fastest([now, other, broken], times.__getitem__) == (now, 1.0)

    def test_candidates_begin_with_the_row_itself_and_differ(self):
        from lossops_bench.kernels.tune import candidates, variants
        from lossops_triton.configurations import TILES

        for tile in TILES.values():
            for listed, least in ((candidates(tile), 10), (variants(tile), 5)):
                assert listed[0] == tile
                assert len(set(listed)) == len(listed) >= least

    def test_tables_are_rewritten_row_by_row(self, capsys):
        from lossops_bench.kernels.tune import WORKLOADS, tune
        from lossops_triton import configurations
        from lossops_triton.configurations import Tile

        source = Path(configurations.__file__).read_text()
        wanted = configurations.TILES["sm_90"]._replace(bm=64, bn=128, stages=4)

        def timer(workload):
            return lambda tile: 1.0 if tile == wanted else 2.0

        def tables(text: str) -> dict[str, dict[str, Tile]]:
            scope: dict[str, dict[str, Tile]] = {}
            exec(text, scope)
            return {one.table: scope[one.table] for one in WORKLOADS}

        before = tables(source)
        tuned = tune("sm_90", "timed on a fake, 2026-01-01", source, timer, WORKLOADS[:1])
        after = tables(tuned)
        assert after["TILES"].pop("sm_90") == wanted
        before["TILES"].pop("sm_90")
        assert after == before
        assert "timed on a fake, 2026-01-01" in tuned
        again = tune("sm_90", "timed on a fake, 2026-01-02", tuned, timer, WORKLOADS[:1])
        assert again.count("timed on a fake") == 1
        unknown = tune("sm_103", "timed on a fake, 2026-01-01", source, timer)
        assert all("sm_103" in rows for rows in tables(unknown).values())

    @pytest.mark.parametrize("command", ["tune", "gpu-check"])
    def test_without_a_gpu_it_says_so(self, command, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = CliRunner().invoke(build_app(), [command])
        assert result.exit_code == 1
        assert "GPU" in result.output


def test_timings_of_a_gpu_on_what_is_here():
    """No backend of a GPU runs, and says why; all else is as there."""
    from lossops_bench.kernels.timings import Sizes, timings

    sizes = Sizes((3, 50), (6, 4, 10), (30, 1000), ((20, 16, 300),), repeats=1)
    text = "\n".join(timings(torch.device("cpu"), sizes))
    for words in ("cuda: the CUDA kernels run on CUDA tensors", "lse: plain", "softmax: plain",
                  "AdamW: plain", "log-uniform, distinct", "linear + cross_entropy"):  # fmt: skip
        assert words in text
    assert "Error" not in text


def test_gpu_check_runs_the_memory_checker_where_it_is_installed(monkeypatch):
    from lossops_bench.kernels import check

    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    assert len(list(check.commands())) == 1
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/bin/{name}")
    tests, *checked = check.commands()
    assert tests[0][-4:] == ["-q", "-m", "gpu", "tests"]
    assert [c[2] for c, _ in checked] == ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert all((check.ROOT / file).exists() for file in check.SANITIZED_FILES)
