"""The parts of `benchmarks/gpu.py`.

case.py          a named measurement, and what it finds
card.py          the device: clocks, graphs, ceilings
compare.py       results beside those of an oracle
start.py         whether kernels run here; all of them compiled
checks.py        every op against the reference backend
blocks.py        half a decoder layer: CUDA graphs, torch.compile
grouped.py       products by decoded weights, beside those by integers
divided.py       experts on the card and on the CPU
ops.py           times of single ops
model.py         decoding with a model of Mixtral-8x7B's shape
kl.py            KL divergence of small compressed models, beside that of the CPU
search.py        the trellis search, and compression of two layers
families.py      tiny models of all families, compressed and run on the card and on the CPU
sanitized.py     small runs of every kernel, by group
sanitizer.py     compute-sanitizer on them; imports no torch
"""
