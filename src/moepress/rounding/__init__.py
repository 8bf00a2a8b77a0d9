"""How weights become codes: methods of rounding, and the statistics of inputs that they share.

methods/       GPTQ, round to nearest, sign, trellis codes: a matrix in, codes out
hessian.py     which errors cost           inputs.py   gathers both for a matrix
correction.py  errors of earlier layers    tokens.py   on which tokens
expert.py      the two projections of an expert         linear.py   all other linears
options.py     what of the recipe all of them need
"""
