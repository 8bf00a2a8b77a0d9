"""Rounding weights to codes, and the input statistics that it needs.

methods/       GPTQ, round to nearest, sign, trellis codes: from a matrix to its codes
hessian.py     how much each rounding error costs at the outputs of a matrix
correction.py  weights that make up for the rounding errors of earlier layers
inputs.py      gathers the statistics of both for one matrix
tokens.py      which tokens an expert's statistics are gathered on
expert.py      rounds the two projections of a routed expert
linear.py      rounds all other linears
options.py     the fields of a recipe that rounding reads
"""
