"""The registry: one file per case, one line here."""

from lossops_bench.case import Case
from lossops_bench.cases.binary_cross_entropy import CASE as BINARY_CROSS_ENTROPY
from lossops_bench.cases.catalogue import CATALOGUE
from lossops_bench.cases.cross_entropy import CASE as CROSS_ENTROPY
from lossops_bench.cases.linear_cross_entropy import CASE as LINEAR_CROSS_ENTROPY
from lossops_bench.cases.pairwise import SIGMOID, SOFTMAX
from lossops_bench.cases.spherical import CASE as SPHERICAL

__all__ = ["CASES", "CATALOGUE"]

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        LINEAR_CROSS_ENTROPY,
        CROSS_ENTROPY,
        SPHERICAL,
        SIGMOID,
        SOFTMAX,
        BINARY_CROSS_ENTROPY,
    )
}
