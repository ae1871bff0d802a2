"""The environment switches of lossops: all of them, parsed here and nowhere else.

``LOSSOPS_BUILD``: what ``setup.py`` compiles.
    ``auto`` (default): the CPU modules where torch and a C++ compiler are found, and the CUDA
    kernels where nvcc is found as well; ``cpu``: the CPU modules, or an error; ``cuda``: both, or
    an error; ``none``: nothing, a package of pure Python.
``LOSSOPS_BACKEND``: the backend of calls that say ``backend="auto"``.
    ``auto`` (default): the first that can run the call; ``reference``; ``cpp``;
    ``triton``; ``cuda``.

This module imports the standard library alone: ``setup.py`` runs it where there is no torch.
"""

import os

CHOICES = {
    "LOSSOPS_BUILD": ("auto", "cpu", "cuda", "none"),
    "LOSSOPS_BACKEND": ("auto", "reference", "cpp", "triton", "cuda"),
}


def build() -> str:
    """What ``setup.py`` compiles: :func:`chosen` of ``LOSSOPS_BUILD``."""
    return chosen("LOSSOPS_BUILD")


def default_backend() -> str:
    """The backend of a call that says ``"auto"``: :func:`chosen` of ``LOSSOPS_BACKEND``.

    Note:
        Read at every call; ``torch.compile`` reads it once, when it traces the call.
    """
    return chosen("LOSSOPS_BACKEND")


def chosen(switch: str) -> str:
    """The value of a switch in the environment, or its default.

    Args:
        switch: a key of ``CHOICES``.

    Returns:
        One of ``CHOICES[switch]``; the first where the variable is unset or empty.

    Raises:
        ValueError: the environment holds another value.

    Example:
        >>> from lossops import switches
        >>> switches.chosen("LOSSOPS_BUILD") in switches.CHOICES["LOSSOPS_BUILD"]
        True
    """
    choices = CHOICES[switch]
    value = os.environ.get(switch) or choices[0]
    if value not in choices:
        raise ValueError(
            f"{switch} must be one of {', '.join(choices)}, got {value!r}; "
            f"unset it for the default, {choices[0]}"
        )
    return value
