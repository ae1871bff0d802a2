"""What the GPU kernels compile to, without a GPU, and what they do on one.

command.py      `lossops-bench kernels` and `tune`
check.py        `lossops-bench gpu-check`: tests, memory checker and timings on a GPU
offline.py      the library's own launches, specialised and compiled for a pretended device
launches.py     which launches
rivals.py       those of other packages
listing.py      instructions and loops of a disassembly
facts.py        registers, spills, matrix instructions, exponentials, ... of a compiled kernel
cubins.py       compiled CUDA kernels and what they are
devices.py      what a multiprocessor has, and how many programs fit it
report.py       the tables, and the budgets that tests/compiled holds them to
model.py        cycles and bytes of a tile of the fused kernel
timings.py      what `gpu-check` times
tune.py         tiles timed on a GPU, and the tables of configurations.py rewritten
"""
