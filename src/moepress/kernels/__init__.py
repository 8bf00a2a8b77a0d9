"""The operations on packed weights and on routing, and the backends that run them.

ops.py           the operations, as torch.library ops
small_ops.py     small operations of decoding, likewise; small_reference.py defines them
op.py            an op, and how it runs without torch's dispatcher
gradients.py     the gradients of the ops
backends.py      the table of backends, and which one runs on a device
experts_call.py  the arguments of the experts op as one value
matrix.py        a packed matrix as one value
stores.py        experts on disk, for the op (cpu/expert_store.py reads them)
gate.py          what lies between the two products of an expert
checks.py        checks of tensor arguments
reference.py     the backend in plain PyTorch: the definition of correct
router.py        of it, what a router computes
scalar.py        bytes of scalar codes
trellis.py       trellis codes: values, paths, bytes, rotation
cpu/             the backend in C++ for CPUs
cuda/            the backend in CUDA C++ for NVIDIA cards
modules.py       nn.Modules whose weights stay packed (import it by its own name)
uncommon.py      of them, experts of forms that the op does not know
divided.py       of them, experts on a card and in the machine's memory
shards.py        parts of a packed matrix; expert_shards.py: of the experts of a layer
prepare.py       compiles the CUDA kernels of a loaded model together
random_codes.py  packed matrices of random codes
"""

from moepress.kernels.backends import (
    BACKENDS,
    Backend,
    Status,
    backend_for,
    only,
    register_backend,
    status,
)
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.gate import Gate
from moepress.kernels.gradients import register_gradients
from moepress.kernels.ops import attention, drop, embedding, experts, linear, linears
from moepress.kernels.small_ops import cache_write, rms_norm, rotary, route

__all__ = [
    "BACKENDS",
    "Backend",
    "ExpertsCall",
    "Gate",
    "Status",
    "attention",
    "backend_for",
    "cache_write",
    "drop",
    "embedding",
    "experts",
    "linear",
    "linears",
    "only",
    "register_backend",
    "rms_norm",
    "rotary",
    "route",
    "status",
]

register_gradients()
