"""The tensors of a router: its matrix, a bias, and what is added to scores for the choice alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn

from moepress.kernels.router import FLOATS

CLASSES = ("router", "gate", "gating")  # in the names of the classes of routers
CORRECTIONS = ("correction", "expert_bias")  # in the names of vectors that count for the choice


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor is, which may be moved or replaced."""

    module: nn.Module
    name: str

    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.module, self.name)
        return found

    def vector(self) -> Tensor:
        return self.tensor().detach().flatten()


@dataclass(frozen=True, eq=False)
class RouterParts:
    """The tensors of a router.

    Attributes:
        matrix: [E, H].
        bias: [E] in some shape, of the logits; None: there is none.
        correction: [E] in some shape, for the choice; None: there is none, or it is an argument.
        corrected: whether the correction is the second argument of the module's forward.
        top_k: experts that a token gets.
    """

    matrix: Place
    bias: Place | None
    correction: Place | None
    corrected: bool
    top_k: int

    @property
    def weight(self) -> Tensor:
        return self.matrix.tensor().detach()


def parts_of(module: nn.Module) -> RouterParts | None:
    """The parts of a module that looks like a router; None: it does not, or has other parts too.

    Whether it is one, its forward must tell (router_formula.py).
    """
    name = type(module).__name__.lower()
    top_k = getattr(module, "top_k", None)
    if not any(word in name for word in CLASSES) or not isinstance(top_k, int) or _changed(module):
        return None
    arguments = list(inspect.signature(module.forward).parameters)
    if len(arguments) not in (1, 2) or (len(arguments) == 2 and not arguments[1].endswith("bias")):
        return None
    places = [
        (path, Place(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]))
        for path, _ in chain(module.named_parameters(), module.named_buffers())
    ]
    matrices = [place for _, place in places if _is_matrix(place.tensor())]
    if len(matrices) != 1:
        return None
    experts = len(matrices[0].tensor())
    vectors = {path: place for path, place in places if place not in matrices}
    if any(p.tensor().numel() != experts for p in vectors.values()):
        return None
    corrections = [p for n, p in vectors.items() if any(word in n for word in CORRECTIONS)]
    biases = [p for n, p in vectors.items() if n.endswith("bias") and p not in corrections]
    corrected = len(arguments) == 2
    if len(corrections) + corrected > 1 or len(biases) > 1:
        return None
    if len(corrections) + len(biases) < len(vectors):
        return None
    if any(p.tensor().dtype not in FLOATS for _, p in places):
        return None
    return RouterParts(
        matrices[0],
        biases[0] if biases else None,
        corrections[0] if corrections else None,
        corrected,
        top_k,
    )


def _is_matrix(x: Tensor) -> bool:
    return x.dim() == 2 and min(x.shape) > 1 and x.is_floating_point()


def _changed(module: nn.Module) -> bool:
    """Whether something hooks into what the forward of a module does."""
    return any(
        "forward" in vars(inner)
        or hasattr(inner, "_hf_hook")
        or hasattr(inner, "parametrizations")
        or (inner is not module and (inner._forward_hooks or inner._forward_pre_hooks))
        for inner in module.modules()
    )
