"""Rotary embeddings of few tokens by one kernel, in the place of transformers' ten or so.

A modeling module of transformers has its own `apply_rotary_pos_emb`. Which style of
kernels/small_reference.py it has, and what it rounds, is found by trying it on random inputs. A
function that none fits is left alone.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moepress.hf.trying import FEW, MOST_TOKENS, disagreement, followed, random_numbers
from moepress.kernels import rotary
from moepress.kernels.small_reference import STYLES

PREFIX = "apply_rotary"  # of the functions' names
PAIR, SINGLE = ("q", "k", "cos", "sin"), ("x", "cos", "sin")  # first parameters of a function
OTHERS = ("unsqueeze_dim", "position_ids")
SIZES = {"whole": (16, 16), "half": (16, 8), "part": (24, 8)}  # numbers of a head, columns: tried

_changing = threading.RLock()  # functions of modules are everyone's


@dataclass(frozen=True)
class Form:
    """What the op computes for a function: its arguments beside the tensors."""

    style: str
    wide: bool


Kind = tuple[torch.dtype, torch.dtype, str]  # of q, of cos; a key of SIZES
Turn = Callable[..., Any]


@contextmanager
def fused_rotary(model: nn.Module, devices: Sequence[str] = ("cuda",)) -> Iterator[None]:
    """While it is entered, a model's `apply_rotary_pos_emb` calls `moepress::rotary`.

    The functions of the modules in which the model's classes are defined are replaced: other models
    of these classes call them too, and get the same, in this thread. For at most MOST_TOKENS tokens
    without gradients, and where the function's form is known. All other calls are computed as ever.
    Another thread that enters waits until this one has left.

    Args:
        model: of transformers, loaded.
        devices: types of devices for whose tensors the op is called.
    """
    replaced: list[tuple[ModuleType, str, Turn]] = []
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    with _changing:
        try:
            if first is not None and first.device.type in devices:
                dtype = getattr(model, "dtype", first.dtype)
                for home, name, plain in _functions(model):
                    forms = forms_of(plain, first.device, dtype)
                    if forms:
                        setattr(home, name, _turn(plain, forms, devices))
                        replaced.append((home, name, plain))
            yield
        finally:
            for home, name, plain in reversed(replaced):
                setattr(home, name, plain)


def _functions(model: nn.Module) -> list[tuple[ModuleType, str, Turn]]:
    """The functions for rotary embeddings of the modules that define a model's classes."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    return [
        (home, name, function)
        for home in (sys.modules[name] for name in names if name in sys.modules)
        for name, function in list(vars(home).items())
        if name.startswith(PREFIX) and callable(function) and _parameters(function)
    ]


def _parameters(function: Turn) -> tuple[str, ...]:
    """The names of a function's tensors, PAIR or SINGLE; none if it is of another kind."""
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()
    for tensors in (PAIR, SINGLE):
        rest = set(names[len(tensors) :])
        if names[: len(tensors)] == tensors and "unsqueeze_dim" in rest and rest <= set(OTHERS):
            return tensors
    return ()


def forms_of(plain: Turn, device: torch.device, dtype: torch.dtype) -> dict[Kind, Form]:
    """The forms of a function by kinds of calls; without those that none fits.

    The host waits for the device.

    Args:
        dtype: of q and k. cos and sin are of that dtype or of float32.
    """
    found = {
        (dtype, angles, part): _form_of(plain, device, dtype, angles, part)
        for angles, part in product({dtype, torch.float32}, SIZES)
    }
    return {kind: form for kind, form in found.items() if form is not None}


@torch.no_grad()
def _form_of(
    plain: Turn, device: torch.device, dtype: torch.dtype, angles: torch.dtype, part: str
) -> Form | None:
    batches, tokens, (size, columns) = 2, 3, SIZES[part]
    q, k = (
        random_numbers((batches, heads, tokens, size), device, dtype, seed)
        for seed, heads in ((0, 4), (1, 2))
    )
    cos, sin = (random_numbers((batches, tokens, columns), device, angles, seed) for seed in (2, 3))
    given = (q, k) if _parameters(plain) == PAIR else (q,)
    try:
        expected = plain(*given, cos, sin)
    except Exception:  # such sizes are not for this function
        return None
    wanted = expected if len(given) == 2 else (expected,)
    if not isinstance(wanted, tuple | list) or len(wanted) != len(given):
        return None
    forms = [
        Form(style, wide)
        for style, wide in product(STYLES, (False, True))
        if STYLES[style].rotated(columns) <= size and (wide or angles == dtype)
    ]
    differ = partial(disagreement, dtype=dtype)
    far = [
        max(map(differ, rotary(q, k, cos, sin, form.style, form.wide), wanted)) for form in forms
    ]
    best = min(range(len(forms)), key=far.__getitem__, default=None)
    return None if best is None or far[best] > FEW else forms[best]


def _turn(plain: Turn, forms: Mapping[Kind, Form], devices: Sequence[str]) -> Turn:
    """A function in the place of transformers', which calls the op in this thread where it fits."""
    tensors, thread = _parameters(plain), threading.get_ident()

    @wraps(plain)
    def turned(*args: Any, **kwargs: Any) -> Any:
        ours = threading.get_ident() == thread
        call = _Call.of(tensors, args, kwargs) if ours else None
        form = None if call is None else call.form(forms, devices)
        if call is None or form is None:
            return plain(*args, **kwargs)
        return call.run(form)

    return turned


@dataclass(frozen=True, eq=False)
class _Call:
    """A call with heads before tokens, as the op takes it."""

    given: tuple[Tensor, ...]  # q and k, or one of them: [B, heads, T, D]
    cos: Tensor
    sin: Tensor
    heads: int  # their dimension in the tensors that were given

    @classmethod
    def of(
        cls, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> _Call | None:
        """The call with these arguments; None: it is of another kind."""
        if len(args) > len(names) or not kwargs.keys() <= {*names[len(args) :], *OTHERS}:
            return None
        values = [*args, *(kwargs.get(name) for name in names[len(args) :])]
        heads = kwargs.get("unsqueeze_dim", 1)
        if heads not in (1, 2) or not all(isinstance(value, Tensor) for value in values):
            return None
        *given, cos, sin = values
        if any(x.dim() != 4 for x in given) or cos.dim() != 3:
            return None
        return cls(tuple(x.transpose(1, heads) for x in given), cos, sin, heads)

    def form(self, forms: Mapping[Kind, Form], devices: Sequence[str]) -> Form | None:
        """The form in which the op computes it; None: it does not."""
        q, k = self.given[0], self.given[-1]
        batches, _, tokens, size = q.shape
        columns = self.cos.shape[-1]
        part = "whole" if columns == size else "half" if 2 * columns == size else "part"
        form = forms.get((q.dtype, self.cos.dtype, part))
        if (
            form is None
            or STYLES[form.style].rotated(columns) > size
            or columns % 2
            or not 0 < batches * tokens <= MOST_TOKENS
            or (k.shape[0], *k.shape[2:], k.dtype) != (batches, tokens, size, q.dtype)
            or self.cos.shape[:2] not in ((1, tokens), (batches, tokens))
            or (self.sin.shape, self.sin.dtype) != (self.cos.shape, self.cos.dtype)
            or any(x.device != q.device for x in (k, self.cos, self.sin))
            or q.device.type not in devices
            or followed((*self.given, self.cos, self.sin))
        ):
            return None
        return form

    def run(self, form: Form) -> Any:
        q, k = self.given if len(self.given) == 2 else (self.given[0], self.given[0][:, :0])
        found = rotary(q, k, self.cos, self.sin, form.style, form.wide)
        turned = tuple(x.transpose(1, self.heads) for x in found)
        return turned if len(self.given) == 2 else turned[0]
