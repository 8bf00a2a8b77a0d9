"""Rounding weights to codes, and the input statistics that it needs.

methods/       GPTQ, round to nearest, sign, trellis codes: from a matrix to its codes
sweep.py       visits columns in order, with feedback of the errors of those before
balance.py     equal experts, scaled so that `down` rounds better; even_linears.py: linears, by
               balanced_linears.py and folded_scale.py
channel_scale.py    scales of inputs with which a matrix loses least when it is rounded:
               pre_quant_scale.py  stored, for the inputs of routed experts
               folded_scale.py     put into the norm that gives the inputs of linears
same_layer.py  whether a layer computes the same with other weights
hessian.py     how much each rounding error costs at the outputs of a matrix
factor.py      the factorization of a Hessian; token_factor.py: of few tokens, without the Hessian
correction.py  weights that make up for the rounding errors of earlier layers
inputs.py      gathers the statistics of both for one matrix: as sums (summed_tokens.py), or as
               the tokens themselves where they are few (kept_tokens.py)
tokens.py      which tokens an expert's statistics are gathered on
expert.py      rounds the two projections of a routed expert
linear.py      rounds all other linears
options.py     the fields of a recipe that rounding reads
"""
