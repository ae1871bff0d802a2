"""What the catalogue has beside losses: schedules, states, candidates, scores; and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import make_inputs
from torch import Tensor

from lossops import catalogue, linear_statistics


def test_ramp() -> None:
    values = [catalogue.ramp(step, 4, 0.1, 0.2) for step in (0, 1, 4, 9)]
    assert values == pytest.approx([0.1, 0.125, 0.2, 0.2])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        catalogue.ramp(1, 0, 0.0, 1.0)


def test_previous_tokens() -> None:
    y = torch.tensor([[5, 6, -100, 7], [1, 1, 2, 3]])
    found = catalogue.previous_tokens(y)
    assert found.shape == (2, 4, 4)
    for b in range(2):
        for t in range(4):
            before = [int(i) for i in y[b, :t].flip(0)]
            before = [-1 if i == -100 else i for i in before]
            assert found[b, t].tolist() == before + [-1] * (4 - t)
    assert torch.equal(catalogue.previous_tokens(y, window=2), found[..., :2])


def test_running_log_partition_is_a_mean_of_exponentials() -> None:
    u, lse = torch.randn(5).double(), torch.randn(5).double()
    found = catalogue.running_log_partition(u, lse, momentum=0.9)
    torch.testing.assert_close(found.exp(), 0.9 * u.exp() + 0.1 * lse.exp())
    torch.testing.assert_close(catalogue.running_log_partition(u, lse, momentum=0.0), lse)


def test_meco_has_the_gradient_of_cross_entropy_at_the_true_log_partition(backend: str) -> None:
    x, w, _, y = make_inputs(6, 23, 5)
    x.requires_grad_()
    u = linear_statistics(x.detach(), w, names=("lse",), backend=backend).lse
    ours = catalogue.linear_meco_loss(x, w, y, log_partition=u, backend=backend)
    plain = torch.nn.functional.cross_entropy(x @ w.T, y)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x)[0], torch.autograd.grad(plain, x)[0], rtol=1e-9, atol=1e-11
    )


def test_adaptive_lambda(backend: str) -> None:
    x, w, _, y = make_inputs(6, 23, 5)
    lam = torch.rand(6).double() + 0.5
    z = x @ w.T
    moved = z + 1.0 - torch.nn.functional.one_hot(y, 23)
    p = ((moved - z.gather(1, y[:, None])) / lam[:, None]).softmax(1)
    divergence = (p * (p * 23).log()).sum(1)
    found = catalogue.adaptive_lambda(x, w, y, lam, lam0=0.7, alpha=2.0, margin=1.0)
    torch.testing.assert_close(found, 0.7 * (1 - divergence / (2.0 * math.log(23))))


def test_adaptive_lambda_of_ignored_rows_and_scaled_logits() -> None:
    """Ignored rows keep their λ: NaN there would be one in dx of the next step."""
    x, w, _, y = make_inputs(6, 23, 5)
    lam, kept = torch.rand(6).double() + 0.5, y.clone()
    kept[2] = 0
    expected = catalogue.adaptive_lambda(0.5 * x, w, y, lam, lam0=0.7, alpha=2.0)
    expected[kept == 0] = lam[kept == 0]
    found = catalogue.adaptive_lambda(
        x, w, kept, lam, lam0=0.7, alpha=2.0, ignore_index=0, logit_scale=0.5
    )
    torch.testing.assert_close(found, expected)
    one = catalogue.adaptive_lambda(x, w[:1], 0 * y, lam, lam0=0.7, alpha=2.0)
    assert (one == 0.7).all()


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("k", [0.2, 0.5, 1.0])
def test_min_k_scores(normalized: bool, k: float, backend: str) -> None:
    x, w, b, y = make_inputs(12, 23, 5)
    x, y = x.reshape(2, 6, 5), y.reshape(2, 6)
    y[0, 4] = -100
    log_p = (x @ w.T + b).log_softmax(-1)
    score = log_p.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    if normalized:
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        score = (score - mean) / ((p * log_p.square()).sum(-1) - mean.square()).sqrt()
    expected = []
    for each, ids in zip(score, y, strict=True):
        counted = each[ids >= 0]
        expected.append(counted.sort().values[: max(1, int(k * len(counted)))].mean())
    found = catalogue.min_k_scores(
        x, w, y, k=k, normalized=normalized, linear_bias=b, backend=backend
    )
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-11)


def test_min_k_takes_no_token_too_many() -> None:
    """The largest of the k / T · T smallest scores tells how many they were."""
    x, w, _, y = make_inputs(100, 23, 5)
    ordered = (x @ w.T).log_softmax(1).gather(1, y[:, None]).squeeze(1).sort().values
    for k in range(1, 101):
        found = catalogue.min_k_scores(x, w, y, k=k / 100)
        torch.testing.assert_close(found, ordered[:k].mean(), rtol=1e-9, atol=0)


def test_tokens_that_are_certain_have_no_deviation() -> None:
    x, w, b = torch.randn(1, 2, 6), torch.randn(5, 6), torch.tensor([0.0, *[-1e9] * 4])
    y = torch.zeros(1, 2, dtype=torch.int64)
    assert catalogue.min_k_scores(x, w, y, k=0.5, normalized=True, linear_bias=b) == 0


def test_texts_without_tokens() -> None:
    x, w, y = torch.randn(2, 3, 5), torch.randn(7, 5), torch.tensor([[-100, -100, -100], [1, 2, 3]])
    found = catalogue.min_k_scores(x, w, y, k=0.5)
    assert found[0].isnan()  # it was inf: the best known of all texts
    assert found[1].isfinite()
    assert catalogue.previous_tokens(y[:, :0]).shape == (2, 0, 0)


def test_preferences_leave_ignored_tokens_out(backend: str) -> None:
    x, w, _, y = make_inputs(20, 23, 5)
    x, y = x.reshape(4, 5, 5), y.reshape(4, 5)
    ignored = y.clone()
    ignored[:, 3:] = -100
    short = catalogue.linear_simpo_loss(x[:, :3], w, y[:, :3], beta=2.0, gamma=0.1, backend=backend)
    found = catalogue.linear_simpo_loss(x, w, ignored, beta=2.0, gamma=0.1, backend=backend)
    torch.testing.assert_close(found, short)


def test_gumbel_noise_is_that_of_the_generator() -> None:
    x, w, _, y = make_inputs(10, 23, 5)
    x, y = x.reshape(2, 5, 5), y.reshape(2, 5)

    def loss(gumbel: bool) -> Tensor:
        torch.manual_seed(1)
        return catalogue.linear_edit_invariant_loss(x, w, y, ngrams=(1, 2), gumbel=gumbel)

    assert loss(True) == loss(True)
    assert loss(True) != loss(False)


X, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, 2, 1])
BY_T = (torch.randn(2, 3, 3), W, torch.zeros(2, 3, dtype=torch.int64))
ERRORS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]] = {
    "q": ("generalized_cross_entropy", (X, W, Y), {"q": 0.0}, r"q must be in \[1e-06, 1\], got 0"),
    "tau": ("logit_clip", (X, W, Y), {"tau": 0.0}, "tau must be above 0 and finite, got 0"),
    "active": (
        "active_passive", (X, W, Y), {"active": "focal"}, "active must be one of cross_entropy",
    ),
    "covariance": (
        "shared_covariance", (X, W, Y), {"covariance": torch.eye(4)},
        r"covariance must have shape \(3, 3\), got \(4, 4\)",
    ),
    "lam": (
        "adaptive_ldr", (X, W, Y), {"lam": torch.ones(3)},
        r"lam must have shape \(4,\) .*, got \(3,\)",
    ),
    "lam wants a gradient": (
        "adaptive_ldr", (X, W, Y), {"lam": torch.ones(4, requires_grad=True)},
        "lam is not differentiated, but wants a gradient; detach it",
    ),
    "reference": (
        "npo", BY_T, {"reference_log_prob": torch.zeros(3)},
        r"reference_log_prob must have shape \(2,\), one value per sequence, got \(3,\)",
    ),
    "halves": (
        "simpo", (torch.randn(3, 2, 3), W, torch.zeros(3, 2, dtype=torch.int64)),
        {"beta": 1.0, "gamma": 0.0}, "as many chosen as rejected sequences",
    ),
    "masked": (
        "masked_diffusion", BY_T, {"masked": torch.ones(2, 3)}, "masked must be bool of shape",
    ),
    "level": (
        "masked_diffusion", BY_T, {"masked": torch.ones(2, 3, dtype=torch.bool)},
        "kind='lambda' needs level, got None; pass level=",
    ),
    "level of one number": (
        "masked_diffusion", BY_T,
        {"masked": torch.ones(2, 3, dtype=torch.bool), "level": torch.tensor(0.5)},
        r"level must have shape \(2,\), one value per sequence, got \(\)",
    ),
    "ngrams": ("edit_invariant", BY_T, {"ngrams": (4,)}, r"lengths in \[1, 3\], got \(4,\)"),
    "candidates": (
        "unlikelihood", (X, W, Y), {"candidates": torch.tensor([1, 2, 3, 4])},
        r"candidates must have shape \(4, 'K'\), padded with -1, got \(4,\)",
    ),
    "false_negatives": (
        "hasa", (X, W, Y), {"false_negatives": torch.zeros(3, 1, dtype=torch.int64)},
        r"false_negatives must have shape \(4, 'K'\), padded with -1, got \(3, 1\)",
    ),
    "false_weights": (
        "hasa", (X, W, Y),
        {"false_negatives": Y.unsqueeze(1), "false_weights": torch.ones(4)},
        r"false_weights must have the shape of false_negatives, \(4, 1\), got \(4,\)",
    ),
    "fraction": (
        "error_norm_fraction", (X, W, Y), {"fraction": 1.0}, r"fraction must be in \[0, 1\), got 1",
    ),
    "numbers": (
        "number_token", (X, W, Y), {"numbers": {5: 1.0}},
        r"numbers must give values of class ids in \[0, 5\), at least one, got {5: 1.0}",
    ),
    "no numbers": ("number_token", (X, W, Y), {"numbers": {}}, "at least one, got {}"),
    "clipped_norm": (
        "logit_clip", (X, W, Y), {"clipped_norm": -1.0}, "clipped_norm must be above 0 and finite",
    ),
    "log_prior": (
        "logit_adjusted", (X, W, Y), {"log_prior": torch.tensor(0.0), "linear_bias": torch.ones(5)},
        r"log_prior must have shape \(5,\), one value per class, got \(\)",
    ),
    "views": (
        "nt_xent_margin", (X, X[:3]), {}, r"the same shape \(N, D\), .*, got \(4, 3\) and \(3, 3\)",
    ),
    "utterances": ("ge2e", (torch.randn(2, 1, 3),), {}, r"with M at least 2, got \(2, 1, 3\)"),
    "log_probs": (
        "top_k_distillation", (X, W, Y.unsqueeze(1)), {"log_probs": torch.zeros(4, 2)},
        r"log_probs must have the shape of ids, \(4, 1\), got \(4, 2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    name, arguments, keywords, message = ERRORS[error]
    with pytest.raises(ValueError, match=message):
        catalogue.RECIPES[name].face(*arguments, **keywords)
