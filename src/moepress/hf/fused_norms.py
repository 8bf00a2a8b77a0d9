"""Norms of few rows by one kernel, in the place of transformers' five or six.

Classes of root mean square norms differ in what they round, and in what they do with their weight.
Which formula a class has is found by trying: a copy with a random weight is compared with the
candidates. A class that none fits is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepress.hf.trying import FEW, disagreement, followed, random_numbers
from moepress.kernels import rms_norm
from moepress.kernels.small_reference import FORMULAS

MOST_ROWS = 128  # heads of a token, say; the kernel has one block for each
EPSILONS = ("variance_epsilon", "eps", "epsilon")  # names of the attribute
SCALES = (1.0, 30.0, 1e-3, 0.1)  # of the rows that are tried: of some, the epsilon matters
COLUMNS = 64  # of rows that are tried, where there is no weight


@dataclass(frozen=True)
class Norm:
    """What the op computes for a class: its arguments beside x and weight."""

    epsilon: str  # name of the attribute
    formula: str


@contextmanager
def fused_norms(model: nn.Module, devices: Sequence[str] = ("cuda",)) -> Iterator[None]:
    """While it is entered, root mean square norms of a model call `moepress::rms_norm`.

    For inputs of at most MOST_ROWS rows without gradients, and where the formula of the module's
    class is known. All others are computed as ever.

    Args:
        model: of transformers, loaded.
        devices: types of devices on which modules are changed.
    """
    known: dict[Any, Mapping[torch.dtype, Norm]] = {}  # by kind; tried again for each module
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            device, dtype = _place(module, model)
            if device is None or device.type not in devices or not _may_be_norm(module):
                continue
            weight = _weight(module)
            of_weight = None if weight is None else (weight.dtype, weight.shape)
            kind = type(module), device, of_weight
            norms = norms_of(module, device, {dtype, torch.float32}, known.get(kind))
            known.setdefault(kind, norms)
            if norms:
                module.forward = _forward(module, module.forward, norms)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def norms_of(
    module: nn.Module,
    device: torch.device,
    dtypes: set[torch.dtype],
    known: Mapping[torch.dtype, Norm] | None = None,
) -> dict[torch.dtype, Norm]:
    """The norm that a module computes for inputs of each dtype; without those that none fits.

    The host waits for the device.

    Args:
        known: those of another module of its kind, to be tried alone; None: all are.
    """
    every = [Norm(name, formula) for name in _epsilons(module) for formula in FORMULAS]
    found = {}
    for dtype in dtypes:
        norms = every if known is None else [known[dtype]] if dtype in known else []
        norm = _norm_of(module, device, dtype, norms)
        if norm is not None:
            found[dtype] = norm
    return found


@torch.no_grad()
def _norm_of(
    module: nn.Module, device: torch.device, dtype: torch.dtype, norms: Sequence[Norm]
) -> Norm | None:
    """The norm of some that a module computes, of rows [R, D] and of heads [1, 1, R, D]."""
    if not norms:
        return None
    tried = copy.deepcopy(module)
    columns, weight = COLUMNS, _weight(module)
    if weight is not None:
        columns = len(weight)
        # As drawn, all formulas would be alike where weights are 1.
        drawn = 1 + random_numbers(weight.shape, device, weight.dtype, seed=1)
        tried.weight = nn.Parameter(drawn, requires_grad=False)
    x = random_numbers((len(SCALES), columns), device, dtype)
    x = x * torch.tensor(SCALES, device=device, dtype=dtype)[:, None]
    try:
        pairs = [(given, tried.forward(given)) for given in (x, x[None, None])]
    except Exception:  # it is no norm, or wants more than x
        return None
    far = [
        max(disagreement(_run(tried, norm, given), expected, dtype) for given, expected in pairs)
        for norm in norms
    ]
    best = min(range(len(norms)), key=far.__getitem__)
    return None if far[best] > FEW else norms[best]


def _forward(
    module: nn.Module, plain: Callable[..., Any], norms: Mapping[torch.dtype, Norm]
) -> Callable[..., Any]:
    """The forward of a module by the op, where it fits."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        norm = norms.get(x.dtype) if isinstance(x, Tensor) else None
        if norm is None or x is None or not _fits(module, x):
            return plain(*args, **kwargs)
        return _run(module, norm, x)

    return forward


def _run(module: nn.Module, norm: Norm, x: Tensor) -> Tensor:
    return rms_norm(x, _weight(module), getattr(module, norm.epsilon), norm.formula)


def _fits(module: nn.Module, x: Tensor) -> bool:
    """Whether the op takes an input: few rows on the weight's device, without gradients."""
    weight = _weight(module)
    if not x.dim() or not 0 < x.numel() <= MOST_ROWS * x.shape[-1]:
        return False
    if weight is None:
        return not followed((x,))
    return x.device == weight.device and x.shape[-1] == len(weight) and not followed((x, weight))


def _may_be_norm(module: nn.Module) -> bool:
    """Whether a module has what a root mean square norm has, and nothing else."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    weight = _weight(module)
    return (
        names <= {"weight"}
        and (weight is None or weight.dim() == 1)
        and "forward" not in vars(module)  # accelerate's, say
        and not any(True for _ in module.children())
        and not any(True for _ in module.buffers(recurse=False))
        and bool(_epsilons(module))
    )


def _weight(module: nn.Module) -> Tensor | None:
    found = module._parameters.get("weight")
    return found if isinstance(found, Tensor) else None


def _epsilons(module: nn.Module) -> list[str]:
    return [name for name in EPSILONS if isinstance(getattr(module, name, None), float)]


def _place(module: nn.Module, model: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """The device of a module, or of the model if the module has no weight; dtype of the model."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    weight = _weight(module)
    at = first if weight is None else weight
    dtype = getattr(model, "dtype", None if first is None else first.dtype)
    return None if at is None else at.device, dtype or torch.float32
