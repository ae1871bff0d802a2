"""Every loss on a GPU backend, forward and backward: tests that Triton and CUDA share.

A suite imports all of this and has the fixtures ``backend``, a name, ``launches``, a context whose
value is true once a kernel ran, and ``device`` where that is not the CPU.

The oracle is the reference backend in float64, the budget its own error in the inputs' dtype; the
losses of the catalogue have their dense definitions for both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from conftest import DTYPES, assert_no_worse, make_inputs, value_and_gradients
from test_catalogue import Case as Recipe
from test_docs import FUNCTIONS, README, backend_table, between_markers
from torch import Tensor
from torch.utils._pytree import tree_map

import lossops
from lossops import LinearLossOptions, catalogue
from lossops.samplers import SampledClasses, Uniform
from lossops.statistics import STATISTICS

N, V, D = 4, 150, 24
SCHEDULES = {
    "one sweep": LinearLossOptions(schedule="one_sweep"),
    "chunks": LinearLossOptions(chunk_rows=3),
    "two sweeps": LinearLossOptions(schedule="two_sweeps"),
}
Y = torch.tensor([3, 149, -100, 140])
SEVERAL = torch.tensor([[3, 140], [0, -1], [-1, -1], [140, 3]])
ROWS = torch.linspace(0.5, 2.0, N)
CLASSES = torch.linspace(0.5, 1.5, V)
TERMS = {"logit_scale": 1.5, "softcap": 6.0, "sample_weight": ROWS}
RICH = {**TERMS, "weight": CLASSES, "label_smoothing": 0.1, "lse_square_scale": 1e-2}


def beside(x: Tensor, values: Any) -> Any:
    """The values with their tensors on the device of x."""
    return tree_map(lambda t: t.to(x.device) if isinstance(t, Tensor) else t, values)


def drawn() -> SampledClasses:
    """The same classes whenever asked, one of them a target."""
    return Uniform(V, 40, seed=1)(Y.clamp_min(0))


def of_statistics(x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
    teacher = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).softmax(1)
    found = lossops.linear_statistics(
        x, w, Y.to(x.device), names=tuple(STATISTICS), linear_bias=b,
        class_vector=CLASSES.to(x), teacher=teacher.to(x), **options,
    ).values  # fmt: skip
    return torch.stack([t for t in found.values() if t.is_floating_point()])[:, Y >= 0]


def of_logits(name: str, **own: Any) -> Callable[..., Tensor]:
    """A loss of logits that exist."""
    return lambda x, w, b, **options: FUNCTIONS[name](
        torch.nn.functional.linear(x, w, b), Y.to(x.device), **beside(x, own), **options
    )


def of_head(name: str, *positional: Any, **own: Any) -> Callable[..., Tensor]:
    """A loss of x and w, targets and what else stands before the keywords."""
    targets = positional or (Y,)

    def loss(x: Tensor, w: Tensor, b: Tensor | None = None, **options: Any) -> Tensor:
        bias = {} if b is None else {"linear_bias": b}
        found = FUNCTIONS[name](x, w, *beside(x, targets), **bias, **beside(x, own), **options)
        return torch.cat(found) if isinstance(found, tuple) else found

    return loss


def of_towers(name: str, *positional: Any, **own: Any) -> Callable[..., Tensor]:
    """A loss of two towers: N images, and as many texts of the rows of w."""
    return lambda x, w, **options: FUNCTIONS[name](x, w[:N], *positional, **own, **options)


def score(target: Tensor, sum: Tensor, sumsq: Tensor, num_classes: int) -> Tensor:
    return sumsq / num_classes - target + 0.1 * sum


def focal(s: Any) -> Tensor:
    return -(s.log_1mp.exp() ** 2) * s.log_p


SWEEP = {"mode": "sweep", "sample_weight": ROWS}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": of_logits("cross_entropy", label_smoothing=0.1, weight=CLASSES),
    **{
        f"linear_cross_entropy {name}": of_head("linear_cross_entropy", **RICH, options=schedule)
        for name, schedule in SCHEDULES.items()
    },
    "linear_log_prob": of_head("linear_log_prob", entropy=True, logit_scale=0.8),
    "linear_statistics": of_statistics,
    "linear_loss": of_head("linear_loss", Y, focal, **TERMS),
    "linear_binary_cross_entropy": of_head("linear_binary_cross_entropy", SEVERAL),
    "linear_binary_cross_entropy weighted": of_head(
        "linear_binary_cross_entropy", SEVERAL, weight=CLASSES, sample_weight=ROWS, logit_scale=1.5
    ),
    "linear_asymmetric_loss": of_head("linear_asymmetric_loss", SEVERAL, reduction="sum"),
    "linear_cosine_contrastive_loss": of_head(
        "linear_cosine_contrastive_loss", SEVERAL, margin=0.1
    ),
    "sampled_softmax_loss": of_head("sampled_softmax_loss", Y, drawn(), sparse=False),
    "nce_loss": of_head("nce_loss", Y, drawn(), sparse=False),
    "negative_sampling_loss": of_head("negative_sampling_loss", Y, drawn(), sparse=False),
    "sigmoid_pairwise_loss": of_towers("sigmoid_pairwise_loss", 3.0, -2.0),
    "softmax_pairwise_loss": of_towers("softmax_pairwise_loss", 3.0),
    "softmax_pairwise_loss margin": of_towers(
        "softmax_pairwise_loss", 3.0, decoupled=True, margin=0.2, label_smoothing=0.1
    ),
    "linear_spherical_loss": of_head("linear_spherical_loss", Y, score, **SWEEP),
    "linear_log_spherical_softmax_loss": of_head("linear_log_spherical_softmax_loss", **SWEEP),
    "linear_log_taylor_softmax_loss": of_head("linear_log_taylor_softmax_loss", **SWEEP),
    "linear_spherical_mse_loss": of_head("linear_spherical_mse_loss", **SWEEP),
    "linear_spherical_z_loss": of_head("linear_spherical_z_loss", **SWEEP),
    "spherical_loss": of_logits("spherical_loss", loss_fn=score),
    "log_spherical_softmax_loss": of_logits("log_spherical_softmax_loss"),
    "log_taylor_softmax_loss": of_logits("log_taylor_softmax_loss"),
    "spherical_mse_loss": of_logits("spherical_mse_loss"),
    "spherical_z_loss": of_logits("spherical_z_loss"),
}
Launches = Callable[[], AbstractContextManager[Any]]
NEAR = of_head("linear_cross_entropy", near_threshold=2.0**-11, options=SCHEDULES["one sweep"])
WITHOUT_BIAS = ("cosine", "pairwise")


def has_backend(function: Callable[..., Any]) -> bool:
    """Whether ``backend`` is among its keywords, written out or unpacked."""
    parameters = inspect.signature(function).parameters
    return "backend" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def test_every_loss_is_here() -> None:
    covered = {name.partition(" ")[0] for name in LOSSES} | {"catalogue.min_k_scores"}
    covered |= {f"catalogue.{recipe.face.__name__}" for recipe in catalogue.RECIPES.values()}
    assert covered == {name for name, function in FUNCTIONS.items() if has_backend(function)}


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(
    backend: str, launches: Launches, device: torch.device, name: str, kind: str
) -> None:
    check(backend, launches, name, LOSSES[name], kind, device)


def check(
    backend: str,
    launches: Launches,
    name: str,
    loss: Callable[..., Tensor],
    kind: str,
    device: torch.device,
) -> None:
    """A loss within its budget, on kernels."""
    x, w, b, _ = (t.to(device) for t in make_inputs(N, V, D, DTYPES[kind], spread=2.0))
    inputs = (x, w) if any(word in name for word in WITHOUT_BIAS) else (x, w, b)

    def run(of: str, *tensors: Tensor) -> list[Tensor]:
        return value_and_gradients(lambda *t: loss(*t, backend=of), tensors)

    with launches() as seen:
        ours = run(backend, *inputs)
    assert seen, "no kernel ran"
    plain, exact = run("reference", *inputs), run("reference", *(t.double() for t in inputs))
    for what, one, same, true in zip(("loss", "dx", "dw", "db"), ours, plain, exact, strict=False):
        assert_no_worse(f"{name} {what}", one, same, true)


@pytest.mark.parametrize("name", catalogue.RECIPES)
def test_losses_of_the_catalogue(backend: str, device: torch.device, name: str) -> None:
    """In one variant each: the others are the same kernels with other coefficients."""
    case = Recipe(name, dtype=torch.float32)
    vars(case).update(beside(torch.empty(0, device=device), vars(case)))
    ours = value_and_gradients(lambda *t: case.ours(*t, backend=backend), case.leaves)
    plain, wide = value_and_gradients(case.plain, case.leaves), case.double()
    exact = value_and_gradients(wide.plain, wide.leaves)
    for what, one, same, true in zip(("loss", "dx", "dw"), ours, plain, exact, strict=False):
        assert_no_worse(f"{name} {what}", one, same, true)


def test_results_of_an_op_share_no_memory(backend: str) -> None:
    x, w, _, y = make_inputs(N, V, D, torch.float32)
    names = ["target", "lse", "entropy", "max"]
    ids = y.unsqueeze(1)
    none = (None, None, names, backend)
    for found in (
        torch.ops.lossops.linear_statistics(x, w, None, None, 0.0, ids, *none),
        torch.ops.lossops.logits_statistics(x @ w.T, ids, *none),
    ):
        memory = {t.untyped_storage().data_ptr() for t in found}
        assert len(memory) == len(found)


def test_scores_that_have_no_gradient(backend: str, device: torch.device) -> None:
    x, w, b, _ = (t.to(device) for t in make_inputs(N, V, D, torch.float32))

    def scores(of: str, *tensors: Tensor) -> Tensor:
        x, w, b = tensors
        return catalogue.min_k_scores(
            x.unsqueeze(0), w, Y.to(device).unsqueeze(0), k=0.5, normalized=True, linear_bias=b,
            backend=of,
        )  # fmt: skip

    exact = scores("reference", *(t.double() for t in (x, w, b)))
    assert_no_worse("scores", scores(backend, x, w, b), scores("reference", x, w, b), exact)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_partial_fc(backend: str, launches: Launches, device: torch.device, kind: str) -> None:
    """A sample of the classes, normalised rows and a margin."""
    x, w, _, y = (t.to(device) for t in make_inputs(N, V, D, DTYPES[kind]))

    def run(of: str, *tensors: Tensor) -> list[Tensor]:
        def loss(x: Tensor, w: Tensor) -> Tensor:
            head = lossops.PartialFC(
                D, V, sample_rate=0.5, margin=lossops.ArcFace(), sparse=False, backend=of,
                device=device, dtype=x.dtype,
            )  # fmt: skip
            return torch.func.functional_call(head, {"weight": w}, (x, y))

        return value_and_gradients(loss, tensors)

    with launches() as seen:
        ours = run(backend, x, w)
    assert seen, "no kernel ran"
    plain, exact = run("reference", x, w), run("reference", x.double(), w.double())
    for what, *three in zip(("loss", "dx", "dw"), ours, plain, exact, strict=True):
        assert_no_worse(f"PartialFC {what}", *three)


def test_the_readme_says_what_ran(backend: str) -> None:
    text = README.read_text(encoding="utf-8")
    assert between_markers("backends").search(text)[0].strip() == backend_table()
