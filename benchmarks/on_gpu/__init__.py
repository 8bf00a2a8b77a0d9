"""The parts of `benchmarks/gpu.py`.

case.py    a named measurement, and what it finds
card.py    the device: clocks, graphs, ceilings
random.py  packed matrices of random codes, made on the device
checks.py  every op against the reference backend
ops.py     times of single ops
model.py   decoding with a model of Mixtral-8x7B's shape
kl.py      KL divergence of small compressed models, beside that of the CPU
search.py  the trellis search, and compression of two layers
"""
