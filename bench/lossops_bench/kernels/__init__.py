"""What the GPU kernels compile to, without a GPU: `lossops-bench kernels` and `tune`.

offline.py      the library's own launches, specialised and compiled for a pretended device
launches.py     which launches
listing.py      instructions and loops of a disassembly
facts.py        registers, spills, matrix instructions, exponentials, ... of a compiled kernel
devices.py      what a multiprocessor has, and how many programs fit it
report.py       the tables, and the budgets that tests/compiled holds them to
model.py        cycles and bytes of a tile of the fused kernel
tune.py         tiles timed on a GPU, and the tables of configurations.py rewritten
"""
