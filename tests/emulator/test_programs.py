"""Kernels called from C++, on memory of exactly the size that they are told, by both variants."""

import builder
import pytest
from fixtures import built, run


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", builder.VARIANTS)
@pytest.mark.parametrize("program", builder.PROGRAMS)
def test_program(run, program, variant, seed):
    done = run(program, variant, seed)
    assert done.returncode == 0, done.stderr
