"""What a compression takes: counted operations, their measured rates, memory and disk.

shapes.py       the shapes of a model that decide it, from its config and headers
operations.py   operations of one step: a product, a factorization, the rounding of a matrix
task.py         what is compressed, with which recipe and text
stages.py       operations of each stage
rates.py        seconds for each operation, measured on this machine
memory.py       peak memory of each stage
disk.py         bytes on disk while a stage runs
"""
