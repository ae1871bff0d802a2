"""Kernels of other packages, launched by their own code where they have no device to ask.

pip install --no-deps cut-cross-entropy==25.1.1 liger-kernel==0.8.5 siglip-kernel==0.1.2
"""

from __future__ import annotations

import importlib.util

import torch

from lossops_bench.kernels.launches import BF16, Case, D, N, V

PACKAGES = ("cut_cross_entropy", "liger_kernel", "siglip_kernel")
PAIRS, FEATURES = 1024, 1024


def missing() -> list[str]:
    """Packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def rivals() -> dict[str, Case]:
    """Their cases by name; each imports its package when it runs, under a pretended device."""
    tile = ("BLOCK_B", "BLOCK_V")
    pair, block = ("BLOCK_I", "BLOCK_J"), ("BLOCK_M", "BLOCK_N")
    listed = [
        Case("cce forward", "_cce_lse_forward_kernel", _cce_forward, elements=tile),
        Case("cce forward, softcap", "_cce_lse_forward_kernel", _cce_softcap, elements=tile),
        Case("cce backward", "_cce_backward_kernel", _cce_backward, elements=tile),
        Case("liger cross-entropy", "liger_cross_entropy_kernel", _liger, elements=("BLOCK_SIZE",)),
        Case("siglip rows", "_sigmoid_bce_fwd_kernel", _siglip_rows, elements=("BLOCK_SIZE",)),
        Case("siglip epilogue", "_gemm_bce_kernel", _siglip_epilogue, elements=block),
        Case("siglip fused", "_fused_siglip_kernel", _siglip_fused, elements=pair),
        Case("siglip persistent", "_hopper_fused_siglip_kernel", _siglip_persistent, elements=pair),
    ]
    return {case.name: case for case in listed}


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(N, D, dtype=BF16), torch.zeros(V, D, dtype=BF16)


def _cce_forward() -> None:
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    cce_lse_forward_kernel(*_operands())


def _cce_softcap() -> None:
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    cce_lse_forward_kernel(*_operands(), softcap=30.0)


def _cce_backward() -> None:
    from cut_cross_entropy.cce_backward import cce_backward_kernel

    x, w = _operands()
    target = torch.zeros(N, dtype=torch.int64)
    cce_backward_kernel(
        torch.ones(N), x, w.requires_grad_(), torch.zeros(N), None, None, 2.0**-12, target
    )


def _liger() -> None:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    logits = torch.zeros(N, V, dtype=BF16, requires_grad=True)
    target = torch.zeros(N, dtype=torch.int64)
    cross_entropy_forward(logits, target, None, -100, 0.0, 0.0, "mean", None, False)


def _pairs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(PAIRS, FEATURES, dtype=BF16), torch.zeros(PAIRS, FEATURES, dtype=BF16)


def _siglip_rows() -> None:
    from siglip_kernel.triton_sigmoid_bce import sigmoid_bce_forward

    sigmoid_bce_forward(torch.zeros(PAIRS, PAIRS, dtype=BF16), 0, PAIRS, True)


def _siglip_epilogue() -> None:
    from siglip_kernel.fused_chunked_epilogue import _run_gemm_bce

    x, w = _pairs()
    parts = [torch.zeros(PAIRS) for _ in range(3)]
    _run_gemm_bce(x, w, torch.zeros(PAIRS, PAIRS, dtype=BF16), 0, 10.0, -10.0, *parts)


def _siglip_fused() -> None:
    from siglip_kernel.fused_siglip_kernel import _fused_siglip_pass

    _fused_siglip_pass(*_pairs(), 10.0, -10.0)


def _siglip_persistent() -> None:
    from siglip_kernel.hopper_kernel import _hopper_pass

    _hopper_pass(*_pairs(), 10.0, -10.0)
