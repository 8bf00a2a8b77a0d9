"""Random cases of the CUDA ops; tests/kernels/cuda/fuzz.py runs them."""
