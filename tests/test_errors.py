"""Bad input: the type of each error, and that its message says what, expected and got."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lossops
from lossops import LinearLossOptions, RowStatistics, backends, statistics

N, D, V = 4, 3, 5
X, W, B = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
Y = torch.tensor([0, 4, 2, -100])
Z = torch.randn(N, V)
PROBABILITIES = torch.full((N, V), 1 / V)
META = torch.device("meta")
ONE = LinearLossOptions(schedule="one_sweep")


def nll(s):
    return -s.log_p


def linear_loss(x, w, y, **keywords):
    return lossops.linear_loss(x, w, y, nll, **keywords)


HEADS = {
    "linear_cross_entropy": lossops.linear_cross_entropy,
    "linear_log_prob": lossops.linear_log_prob,
    "linear_statistics": lossops.linear_statistics,
    "linear_loss": linear_loss,
}
EVERY_HEAD = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def raises(error, message):
    return pytest.raises(error, match=message)


# What every head checks: positional arguments, keywords, error, message.
HEAD_ERRORS = {
    "input: no tensor": (([0.0], W, Y), {}, TypeError, r"^input must be a tensor, got list$"),
    "input: integers": (
        (X.long(), W, Y), {}, TypeError, r"^input must be floating point, got torch\.int64$"
    ),
    "input: complex": (
        (X.cfloat(), W, Y), {}, TypeError, r"input must be floating point, got torch\.complex64"
    ),
    "input: D": (
        (X[:, :2], W, Y), {}, ValueError,
        r"linear_weight must have shape \(V, D\) .*, got input \(4, 2\) and linear_weight \(5, 3\)",
    ),
    "input: scalar": ((X[0, 0], W, Y), {}, ValueError, r"got input \(\) and linear_weight"),
    "weight: no tensor": (
        (X, None, Y), {}, TypeError, r"^linear_weight must be a tensor, got NoneType$"
    ),
    "weight: one dim": ((X, W[0], Y), {}, ValueError, r"linear_weight must have shape \(V, D\)"),
    "weight: no classes": (
        (X, W[:0], Y), {}, ValueError,
        r"linear_weight must have at least one class, got shape \(0, D\)",
    ),
    "weight: device": (
        (X, W.to(META), Y), {}, ValueError,
        r"linear_weight must be on the device of input, cpu, got meta",
    ),
    "bias: shape": (
        (X, W, Y), {"linear_bias": B[:2]}, ValueError,
        r"linear_bias must have shape \(5,\), got \(2,\)",
    ),
    "bias: dtype": (
        (X, W, Y), {"linear_bias": B.int()}, TypeError,
        r"linear_bias must be floating point, got torch\.int32",
    ),
    "bias: device": (
        (X, W, Y), {"linear_bias": B.to(META)}, ValueError,
        r"linear_bias must be on the device of input, cpu, got meta",
    ),
    "target: no tensor": ((X, W, [0, 1]), {}, TypeError, r"^target must be a tensor, got list$"),
    "target: booleans": (
        (X, W, Y > 0), {}, TypeError, r"target must hold integer class ids, got torch\.bool"
    ),
    "target: shape": (
        (X, W, Y[:3]), {}, ValueError,
        r"target must have shape \(4,\) \(input without its last dim\), got \(3,\)",
    ),
    "target: a row too deep": (
        (X, W, Y.view(N, 1, 1)), {}, ValueError, r"target must have shape .*, got \(4, 1, 1\)"
    ),
    "target: device": (
        (X, W, Y.to(META)), {}, ValueError,
        r"target must be on the device of input, cpu, got meta",
    ),
    "target: too large": (
        (X, W, Y + 2), {}, IndexError,
        r"target must hold class ids in \[0, 5\) or ignore_index, got one that is 6",
    ),
    "target: negative": (
        (X, W, Y - 1), {}, IndexError, r"class ids in \[0, 5\).*, got one that is 5 or negative"
    ),
    "target: the ignore_index of others": (
        (X, W, Y), {"ignore_index": -1}, IndexError, r"got one that is 5 or negative"
    ),
    "softcap: negative": (
        (X, W, Y), {"softcap": -1.0}, ValueError,
        r"softcap must be None or in \[1e-30, 1e\+30\], got -1\.0",
    ),
    "softcap: zero": ((X, W, Y), {"softcap": 0.0}, ValueError, r"softcap must be .*, got 0\.0"),
    "softcap: infinite": ((X, W, Y), {"softcap": math.inf}, ValueError, r"softcap .*, got inf"),
    "softcap: NaN": ((X, W, Y), {"softcap": math.nan}, ValueError, r"softcap .*, got nan"),
    "softcap: a string": (
        (X, W, Y), {"softcap": "high"}, TypeError, r"^softcap must be a number, got str$"
    ),
    "scale: a list": (
        (X, W, Y), {"logit_scale": [2.0]}, TypeError, r"^logit_scale must be a number, got list$"
    ),
    "ignore_index": (
        (X, W, Y), {"ignore_index": 1.0}, TypeError,
        r"^ignore_index must be an integer or None, got float$",
    ),
    "scale: several": (
        (X, W, Y), {"logit_scale": torch.ones(2)}, ValueError,
        r"logit_scale must be a number or one element, got \(2,\)",
    ),
    "scale: device": (
        (X, W, Y), {"logit_scale": torch.ones(1, device=META)}, ValueError,
        r"logit_scale must be on the device of input, cpu, got meta",
    ),
    "backend": (
        (X, W, Y), {"backend": "gpu"}, ValueError,
        r"backend must be 'auto' or one of cpp, triton, cuda, reference, got 'gpu'",
    ),
    "backend: cuda": (
        (X, W, Y), {"backend": "cuda"}, ValueError,
        r"backend 'cuda' cannot run this call: the CUDA kernels run on CUDA tensors, got cpu",
    ),
    "options: a dict": (
        (X, W, Y), {"options": {"schedule": "auto"}}, TypeError,
        r"options must be LinearLossOptions or None, got dict",
    ),
    "dtype": (
        (X.to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn), Y), {}, ValueError,
        r"inputs must be torch\.float32, .*torch\.float16, got torch\.float8_e4m3fn",
    ),
}  # fmt: skip


@EVERY_HEAD
@pytest.mark.parametrize("case", HEAD_ERRORS.values(), ids=HEAD_ERRORS)
def test_head(case, head):
    arguments, keywords, error, message = case
    with raises(error, message):
        head(*arguments, **keywords)


REDUCED = {
    "linear_cross_entropy": lambda **k: lossops.linear_cross_entropy(X, W, Y, **k),
    "linear_loss": lambda **k: linear_loss(X, W, Y, **k),
    "cross_entropy": lambda **k: lossops.cross_entropy(Z, Y, **k),
}
REDUCED_ERRORS = {
    "reduction": (
        {"reduction": "avg"}, ValueError,
        r"reduction must be one of mean, sum, none, got 'avg'",
    ),
    "weight: shape": (
        {"weight": B[:4]}, ValueError, r"^weight must have shape \(5,\), got \(4,\)"
    ),
    "weight: dtype": (
        {"weight": torch.ones(V, dtype=torch.int64)}, TypeError,
        r"^weight must be floating point, got torch\.int64",
    ),
    "weight: gradient": (
        {"weight": B.clone().requires_grad_()}, ValueError,
        r"^weight is not differentiated; pass weight\.detach\(\)",
    ),
    "weight: device": (
        {"weight": B.to(META)}, ValueError,
        r"^weight must be on the device of input, cpu, got meta",
    ),
    "sample_weight: shape": (
        {"sample_weight": torch.ones(N, 1)}, ValueError,
        r"sample_weight must have shape \(4,\) \(input without its last dim\), got \(4, 1\)",
    ),
    "sample_weight: dtype": (
        {"sample_weight": Y > 0}, TypeError,
        r"sample_weight must be floating point, got torch\.bool",
    ),
    "sample_weight: device": (
        {"sample_weight": torch.ones(N, device=META)}, ValueError,
        r"sample_weight must be on the device of input, cpu, got meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", REDUCED.values(), ids=REDUCED)
@pytest.mark.parametrize("case", REDUCED_ERRORS.values(), ids=REDUCED_ERRORS)
def test_reduced(case, loss):
    keywords, error, message = case
    with raises(error, message):
        loss(**keywords)


CROSS_ENTROPIES = {
    "linear_cross_entropy": lambda target=Y, **k: lossops.linear_cross_entropy(X, W, target, **k),
    "cross_entropy": lambda target=Y, **k: lossops.cross_entropy(Z, target, **k),
}
CROSS_ENTROPY_ERRORS = {
    "label_smoothing": (
        {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1\.5"
    ),
    "label_smoothing: NaN": (
        {"label_smoothing": math.nan}, ValueError, r"label_smoothing must be in .*, got nan"
    ),
    "label_smoothing: None": (
        {"label_smoothing": None}, TypeError, r"^label_smoothing must be a number, got NoneType$"
    ),
    "lse_square_scale": (
        {"lse_square_scale": "small"}, TypeError, r"^lse_square_scale must be a number, got str$"
    ),
    "outputs: a string": (
        {"outputs": "argmax"}, ValueError,
        r"outputs must be names among logsumexp, .*, got 'argmax'",
    ),
    "outputs: unknown": ({"outputs": ("loss",)}, ValueError, r"outputs must be .*'loss'"),
    "probabilities: shape": (
        {"target": PROBABILITIES[:, :3]}, ValueError,
        r"target probabilities must have shape \(4, 5\), got \(4, 3\)",
    ),
    "probabilities: ignore_index": (
        {"target": PROBABILITIES, "ignore_index": -100}, ValueError,
        r"ignore_index applies to class ids, got -100 with class probabilities; .*sample_weight 0",
    ),
    "probabilities: log_prob": (
        {"target": PROBABILITIES, "outputs": ("log_prob",)}, ValueError,
        r"outputs \['log_prob'\] need class ids as targets, got probabilities",
    ),
    "probabilities: correct": (
        {"target": PROBABILITIES, "outputs": ("argmax", "correct")}, ValueError,
        r"outputs \['correct'\] need class ids",
    ),
    "probabilities: backend": (
        {"target": PROBABILITIES.clone().requires_grad_(), "backend": "cuda"}, ValueError,
        r"backend 'cuda' cannot run this call: the CUDA kernels run on CUDA tensors, got cpu",
    ),
    "probabilities: device": (
        {"target": PROBABILITIES.to(META)}, ValueError, r"target must be on the device of input"
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
@pytest.mark.parametrize("case", CROSS_ENTROPY_ERRORS.values(), ids=CROSS_ENTROPY_ERRORS)
def test_cross_entropies(case, loss):
    keywords, error, message = case
    with raises(error, message):
        loss(**keywords)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Z.tolist(), Y), TypeError, r"logits must be a floating point tensor .*, got list"),
        ((Z.long(), Y), TypeError, r"logits must be a floating point tensor .*, got torch\.int64"),
        ((Z[:, :0], Y), ValueError, r"logits must have at least one class, got shape"),
        ((Z, [0, 1]), TypeError, r"target must be a tensor, got list"),
        ((Z, Y[:2]), ValueError, r"target must have shape \(4,\).*, got \(2,\)"),
        ((Z, Y.to(META)), ValueError, r"target must be on the device of input, cpu, got meta"),
        ((Z, Y + 2), IndexError, r"class ids in \[0, 5\) or ignore_index, got one that is 6"),
        ((Z.to(torch.float8_e5m2), Y), ValueError, r"inputs must be .*, got torch\.float8_e5m2"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_logits(arguments, error, message):
    with raises(error, message):
        lossops.cross_entropy(*arguments)


KEYWORDS_OF_TWO_DIMS = {
    "sample_weight": torch.ones(N, 2),
    "logit_scale": 1.0,
    "softcap": 5.0,
    "lse_square_scale": 0.1,
    "outputs": ("argmax",),
    "near_threshold": "auto",
    "class_group": object(),
    "options": ONE,
}


@pytest.mark.parametrize("name", KEYWORDS_OF_TWO_DIMS)
def test_weights_of_several_dims(name):
    """They take PyTorch's keywords, and none is ignored."""
    w, target = torch.randn(V, 2, D), torch.zeros(N, 2, dtype=torch.int64)
    said = "schedule" if name == "options" else name
    with raises(ValueError, rf"^{said} needs linear_weight of shape \(V, D\), got \(5, 2, 3\)"):
        lossops.linear_cross_entropy(X, w, target, **{name: KEYWORDS_OF_TWO_DIMS[name]})


OF_SEVERAL_DIMS = {
    "input: no tensor": ({"input": [0.0]}, TypeError, r"input must be a tensor, got list"),
    "input: a row": (
        {"input": X[0]}, ValueError,
        r"input must have shape \(N, D\) where .*, got \(3,\) and \(5, 2, 3\)",
    ),
    "bias": (
        {"linear_bias": B}, ValueError, r"linear_bias must have shape \(5, 2\), got \(5,\)"
    ),
    "target": (
        {"target": torch.full((N, 2), 7)}, IndexError, r"class ids in \[0, 5\).*, got one that is 7"
    ),
    "backend": ({"backend": "gpu"}, ValueError, r"backend must be 'auto' or one of .*, got 'gpu'"),
    "options": ({"options": 3}, TypeError, r"options must be LinearLossOptions or None, got int"),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_SEVERAL_DIMS.values(), ids=OF_SEVERAL_DIMS)
def test_arguments_beside_weights_of_several_dims(case):
    given, error, message = case
    call = {"input": X, "target": torch.zeros(N, 2, dtype=torch.int64), **given}
    with raises(error, message):
        lossops.linear_cross_entropy(linear_weight=torch.randn(V, 2, D), **call)


def test_pytorch_options_are_accepted():
    expected = lossops.linear_cross_entropy(X, W, Y)
    options = nn.LinearCrossEntropyOptions()
    assert lossops.linear_cross_entropy(X, W, Y, options=options) == expected


# Options and schedules


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"schedule": "fast"},
            r"schedule must be one of auto, one_sweep, two_sweeps, got 'fast'",
        ),
        ({"max_workspace_bytes": 0}, r"max_workspace_bytes must be positive, got 0"),
        ({"max_workspace_bytes": -5}, r"max_workspace_bytes must be positive, got -5"),
        ({"chunk_rows": 0}, r"chunk_rows must be None or at least 1, got 0"),
    ],
)
def test_options(keywords, message):
    with raises(ValueError, message):
        LinearLossOptions(**keywords)


@pytest.mark.parametrize("name", ["max_workspace_bytes", "chunk_rows"])
def test_options_of_another_type(name):
    with raises(TypeError, rf"^{name} must be an integer, got float$"):
        LinearLossOptions(**{name: 1e6})


MODULES = {
    "LinearCrossEntropyLoss": (
        lambda **k: lossops.LinearCrossEntropyLoss(D, V, **k),
        "linear_bias",
    ),
    "LinearLogProb": (lambda **k: lossops.LinearLogProb(D, V, **k), "reduction"),
    "LinearLoss": (lambda **k: lossops.LinearLoss(D, V, nll, **k), "label_smoothing"),
    "CrossEntropyLoss": (lambda **k: lossops.CrossEntropyLoss(**k), "softcap"),
    "SigmoidPairwiseLoss": (lambda **k: lossops.SigmoidPairwiseLoss(**k), "margin"),
    "SoftmaxPairwiseLoss": (lambda **k: lossops.SoftmaxPairwiseLoss(**k), "logit_bias"),
}


@pytest.mark.parametrize("name", MODULES)
def test_keywords_of_modules(name):
    """When it is made, not in its first forward."""
    make, foreign = MODULES[name]
    with raises(TypeError, rf"^{name} must get keywords among .*backend.*, got {foreign}$"):
        make(**{foreign: None})


def test_options_are_frozen():
    with raises(AttributeError, "schedule"):
        LinearLossOptions().schedule = "one_sweep"


def wanting(t):
    return t.clone().requires_grad_()


ONE_SWEEP_IMPOSSIBLE = {
    "rows": lambda: lossops.linear_cross_entropy(
        X, wanting(W), Y, reduction="none", options=ONE
    ),
    "outputs": lambda: lossops.linear_cross_entropy(
        X, wanting(W), Y, outputs=("entropy",), options=ONE
    ),
    "row weights with a gradient": lambda: lossops.linear_cross_entropy(
        X, wanting(W), Y, sample_weight=wanting(torch.ones(N)), options=ONE
    ),
    "log-probabilities": lambda: lossops.linear_log_prob(X, wanting(W), Y, options=ONE),
    "statistics": lambda: lossops.linear_statistics(X, wanting(W), Y, options=ONE),
    "a loss of rows": lambda: linear_loss(X, wanting(W), Y, reduction="none", options=ONE),
    "a loss across rows": lambda: linear_loss(X, wanting(W), Y, rowwise=False, options=ONE),
    "torch.func": lambda: torch.func.grad(
        lambda w: linear_loss(X, w, Y, options=ONE)
    )(W),
    "probabilities with a gradient": lambda: lossops.linear_cross_entropy(
        X, W, wanting(PROBABILITIES), options=ONE
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", ONE_SWEEP_IMPOSSIBLE.values(), ids=ONE_SWEEP_IMPOSSIBLE)
def test_one_sweep_where_it_cannot_be(call):
    with raises(ValueError, r"schedule='one_sweep' needs .*use schedule='auto'"):
        call()


def test_one_sweep_without_gradients_is_no_sweep_to_refuse():
    for head in HEADS.values():
        head(X, W, Y, options=ONE)


# Statistics


STATISTICS_ERRORS = {
    "names: unknown": (
        {"names": ("lse", "median")}, ValueError,
        r"names must be among target, lse, .* or 'lse@t' .* or 'lse<t' .*, got 'median'",
    ),
    "names: a string": (
        {"names": "lse"}, TypeError,
        r"names must be a sequence of names, got 'lse'; write \('lse',\)",
    ),
    "names: temperature": ({"names": ("lse@-1",)}, ValueError, r"got 'lse@-1'"),
    "names: zero temperature": ({"names": ("lse@0",)}, ValueError, r"got 'lse@0'"),
    "names: no temperature": ({"names": ("lse@hot",)}, ValueError, r"got 'lse@hot'"),
    "weighted_sum": (
        {"names": ("weighted_sum",)}, ValueError,
        r"statistic 'weighted_sum' needs class_vector, got None; pass class_vector=",
    ),
    "class_vector: shape": (
        {"class_vector": B[:2]}, ValueError, r"class_vector must have shape \(5,\), got \(2,\)"
    ),
    "class_vector: gradient": (
        {"class_vector": B.clone().requires_grad_()}, ValueError,
        r"class_vector is not differentiated; pass class_vector\.detach\(\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", [HEADS["linear_statistics"], linear_loss],
                         ids=["linear_statistics", "linear_loss"])  # fmt: skip
@pytest.mark.parametrize("case", STATISTICS_ERRORS.values(), ids=STATISTICS_ERRORS)
def test_statistics(case, head):
    keywords, error, message = case
    with raises(error, message):
        head(X, W, Y, **keywords)


TEACHER_ERRORS = {
    "missing": ({}, ValueError, r"statistic 'teacher' needs teacher, got None; pass teacher="),
    "shape": (
        {"teacher": PROBABILITIES[0]}, ValueError,
        r"teacher must have shape \(4, 5\), got \(5,\)",
    ),
    "device": (
        {"teacher": PROBABILITIES.to(META)}, ValueError,
        r"teacher must be on the device of input, cpu, got meta",
    ),
    "gradient": (
        {"teacher": PROBABILITIES.clone().requires_grad_()}, ValueError,
        r"teacher is not differentiated; pass teacher\.detach\(\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TEACHER_ERRORS.values(), ids=TEACHER_ERRORS)
def test_teacher(case):
    keywords, error, message = case
    with raises(error, message):
        lossops.linear_statistics(X, W, Y, names=("teacher",), **keywords)


def test_below_no_target():
    with raises(ValueError, r"statistic 'below_target' needs target, got None"):
        lossops.linear_statistics(X, W, names=("below_target",))


@pytest.mark.parametrize(
    ("attribute", "name"),
    [
        ("max", "max"),
        ("argmax", "max"),
        ("runner_up_index", "runner_up"),
        ("below_target", "below_target"),
        ("sum", "sum"),
        ("sumsq", "sumsq"),
        ("moment", "sumsq"),
        ("entropy", "entropy"),
        ("softplus", "softplus"),
        ("weighted_sum", "weighted_sum"),
        ("teacher", "teacher"),
    ],
)
def test_statistic_not_collected(attribute, name):
    s = lossops.linear_statistics(X, W, Y)
    with raises(AttributeError, rf"was not collected; add names=\(\.\.\., '{name}'\)"):
        getattr(s, attribute)
    without = lossops.linear_statistics(X, W)
    with raises(AttributeError, "'target' was not collected"):
        _ = without.log_p


def test_merge():
    a, b = (lossops.linear_statistics(X, W, Y, names=n) for n in (("lse",), ("max",)))
    with raises(ValueError, r"both sides must hold the same statistics, got \['lse'.*'argmax'"):
        RowStatistics.merge(a, b)
    below = lossops.linear_statistics(X, W, Y, names=("below_target",))
    with raises(ValueError, r"'below_target' cannot be merged"):
        RowStatistics.merge(below, below)


def test_canonical():
    with raises(ValueError, r"names must be among .*, got 'lse@nan'"):
        statistics.canonical(["lse@nan"])


# A loss of the user's own


LOSS_FUNCTIONS = {
    "a scalar": (
        lambda s: s.log_p.sum(), ValueError,
        r"loss_fn must return one loss per row, shape \(ROWS,\), got \(\)",
    ),
    "a column": (
        lambda s: s.log_p.unsqueeze(1), ValueError,
        r"loss_fn must return one loss per row, shape \(ROWS,\), got \(ROWS, 1\)",
    ),
    "a number": (lambda s: 0.0, TypeError, r"what loss_fn returns must be a tensor, got float"),
    "nothing": (lambda s: None, TypeError, r"what loss_fn returns must be a tensor, got NoneType"),
    "what was not collected": (
        lambda s: s.sumsq, AttributeError, r"add names=\(\.\.\., 'sumsq'\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("wants_gradient", [True, False])
@pytest.mark.parametrize("case", LOSS_FUNCTIONS.values(), ids=LOSS_FUNCTIONS)
def test_loss_fn(case, wants_gradient):
    loss_fn, error, message = case
    w = W.clone().requires_grad_(wants_gradient)
    rows = (Y >= 0).sum() if wants_gradient else N  # one sweep leaves ignored rows out
    with raises(error, message.replace("ROWS", str(int(rows)))):
        lossops.linear_loss(X, w, Y, loss_fn)


LOSS_ARGUMENTS = {
    "row_inputs: shape": (
        {"row_inputs": {"a": torch.ones(N - 1)}}, ValueError,
        r"row_inputs\['a'\] must have the leading dims of input, \(4,\), got shape \(3,\)",
    ),
    "row_inputs: no tensor": (
        {"row_inputs": {"a": 1.0}}, TypeError, r"row_inputs\['a'\] must be a tensor, got float"
    ),
    "row_inputs: device": (
        {"row_inputs": {"a": torch.ones(N, device=META)}}, ValueError,
        r"a must be on the device of input, cpu, got meta",
    ),
    "parameters: no tensor": (
        {"parameters": (1.0,)}, TypeError, r"parameters\[0\] must be a tensor, got float"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSS_ARGUMENTS.values(), ids=LOSS_ARGUMENTS)
def test_arguments_of_the_loss(case):
    keywords, error, message = case
    with raises(error, message):
        linear_loss(X, W, Y, **keywords)


def test_probabilities_are_no_target_of_a_loss():
    for head in ("linear_loss", "linear_statistics", "linear_log_prob"):
        with raises(TypeError, r"target must hold integer class ids, got torch\.float32"):
            HEADS[head](X, W, PROBABILITIES)


# In place


def result(shape=(N, V)):
    """Logits that are a result, so that they may be overwritten."""
    return torch.randn(shape, requires_grad=True) + 0.0


INPLACE_ERRORS = {
    "a leaf": (lambda: Z.clone().requires_grad_(), {}, r"would overwrite a leaf"),
    "transposed": (
        lambda: result((V, N)).T, {}, r"needs contiguous logits, got strides \(1, 4\)"
    ),
    "expanded": (
        lambda: result((1, V)).expand(N, V), {}, r"needs contiguous logits, got strides \(0, 1\)"
    ),
    "rows": (
        result, {"reduction": "none"},
        r"needs reduction 'mean' or 'sum'.*got reduction='none', outputs=\(\)",
    ),
    "outputs": (result, {"outputs": ("entropy",)}, r"outputs=\('entropy',\)"),
    "weights": (
        result, {"sample_weight": torch.ones(N, requires_grad=True)},
        r"does not differentiate weights; detach them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INPLACE_ERRORS.values(), ids=INPLACE_ERRORS)
def test_inplace(case):
    logits, keywords, message = case
    with raises(ValueError, rf"^inplace=True.*{message}"):
        lossops.cross_entropy(logits(), Y, inplace=True, **keywords)


def test_inplace_of_probabilities_that_want_a_gradient():
    for target, weight in ((wanting(PROBABILITIES), None), (PROBABILITIES, wanting(B))):
        with raises(ValueError, r"^inplace=True does not differentiate target probabilities"):
            lossops.cross_entropy(result(), target, weight=weight, inplace=True)


def test_inplace_under_torch_func():
    with raises(ValueError, r"inplace=True is not available under torch.compile and torch.func"):
        torch.func.grad(lambda z: lossops.cross_entropy(z * 1, Y, inplace=True))(Z)


def test_inplace_backward_twice():
    loss = lossops.cross_entropy(result(), Y, inplace=True)
    loss.backward(retain_graph=True)
    with raises(RuntimeError, r"gave its gradient away .* needs inplace=False"):
        loss.backward()


def test_inplace_under_an_operation_that_saved_the_logits():
    logits = torch.randn(N, V, requires_grad=True).exp()  # exp saves its result
    with raises(RuntimeError, "modified by an inplace operation"):
        lossops.cross_entropy(logits, Y, inplace=True).backward()


# Backends and freed graphs


def test_backend_objection(monkeypatch):
    sentence = "no compiled extension is installed"
    monkeypatch.setattr(backends, "load_cpu_module", lambda: sentence)
    for head in HEADS.values():
        with raises(ValueError, rf"backend 'cpp' cannot run this call: {sentence}"):
            head(X, W, Y, backend="cpp")
        head(X, W, Y, backend="auto")


def test_cpp_takes_no_other_devices():
    tensors = [t.to(META) for t in (X, W, Y)]
    with raises(ValueError, r"backend 'cpp' cannot run this call: .*CPU tensors, got meta"):
        lossops.linear_cross_entropy(*tensors, backend="cpp")


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_log_prob", "linear_loss"])
def test_freed_graph(name):
    loss = HEADS[name](X, wanting(W), Y).sum()
    loss.backward()
    with raises(RuntimeError, "second time"):
        loss.backward()


def test_module_arguments():
    with raises(TypeError, "reduction_"):
        lossops.LinearCrossEntropyLoss(D, V, reduction_="sum")(X, Y)
    head = lossops.LinearCrossEntropyLoss(D, V, weight=torch.ones(V - 1))
    with raises(ValueError, r"weight must have shape \(5,\), got \(4,\)"):
        head(X, Y)


IDS = Y.unsqueeze(1)


def want(value):
    return torch.tensor(value, requires_grad=True)


CONSTANTS = {
    "softcap": lambda: lossops.linear_cross_entropy(X, W, Y, softcap=want(3.0)),
    "gamma_neg": lambda: lossops.linear_asymmetric_loss(X, W, IDS, gamma_neg=want(3.0)),
    "gamma_pos": lambda: lossops.linear_asymmetric_loss(X, W, IDS, gamma_pos=want(3.0)),
    "clip": lambda: lossops.linear_asymmetric_loss(X, W, IDS, clip=want(0.1)),
    "margin": lambda: lossops.linear_cosine_contrastive_loss(X, W, IDS, margin=want(0.1)),
    "negative_weight": lambda: lossops.linear_cosine_contrastive_loss(
        X, W, IDS, negative_weight=want(0.5)
    ),
    "angular_margin": lambda: lossops.softmax_pairwise_loss(X, X, 1.0, angular_margin=want(0.1)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_numbers_without_a_gradient_refuse_to_want_one(name):
    with raises(ValueError, rf"^{name} must be a number, it is not differentiated, got a tensor"):
        CONSTANTS[name]()


def test_ignore_index_of_several_targets():
    with raises(ValueError, "ignore_index is of one target per row, got 1 with a target of shape"):
        lossops.linear_loss(X, W, torch.stack([Y, Y], 1), nll, ignore_index=1)
