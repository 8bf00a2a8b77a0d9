"""What random cases draw from: parameters that a failure prints, numbers, places in memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Dtypes = tuple[torch.dtype, ...]
FLOATS: Dtypes = (torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """The draws of one case. They depend on the op, the seed and the number of the case alone.

    Attributes:
        parameters: what was drawn, by name.
    """

    def __init__(self, op: str, seed: int, case: int) -> None:
        self.random = random.Random(f"{op} {seed} {case}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.parameters: dict[str, object] = {}

    def note(self, name: str, value: T) -> T:
        """Remember a parameter."""
        self.parameters[name] = value
        return value

    def one(self, name: str, options: Sequence[T]) -> T:
        return self.note(name, self.random.choice(options))

    def some(self, name: str, options: Sequence[T], count: int) -> list[T]:
        """`count` of the options, each as often as chance has it."""
        return self.note(name, self.random.choices(options, k=count))

    def integer(self, name: str, least: int, most: int) -> int:
        return self.note(name, self.random.randint(least, most))

    def chance(self, name: str, probability: float) -> bool:
        return self.note(name, self.random.random() < probability)

    def dtype(self, name: str = "dtype") -> torch.dtype:
        return self.one(name, FLOATS)

    def tokens(self, most: int = 40) -> int:
        """Mostly few, now and then none or some hundreds."""
        kind = self.random.random()
        if kind < 0.03:
            return self.note("tokens", 0)
        if kind < 0.08:
            return self.integer("tokens", most, 8 * most)
        return self.integer("tokens", 1, self.random.choice((2, 17, most)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, least: int, most: int, *shape: int) -> Tensor:
        """Of least .. most, both included."""
        return torch.randint(least, most + 1, shape, generator=self.generator)

    def spoiled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, K] with NaN or infinities in some rows, or as it is; which rows [T] are whole."""
        whole = torch.ones(len(x), dtype=torch.bool)
        if x.numel() and self.chance("spoiled", 0.15):
            x = x.clone()
            for row in self.integers(0, len(x) - 1, 2).tolist():
                bad = self.random.choice((torch.nan, torch.inf, -torch.inf))
                x[row, self.random.randrange(x.shape[1])] = bad
                whole[row] = False
        return x, whole

    def placed(self, name: str, x: Tensor, *, contiguous: bool = False, unit: int = 1) -> Tensor:
        """The numbers of x elsewhere: in a larger storage, at an odd place, with other strides.

        Beside them are NaN (bytes of 255, True): what a kernel must not use shows up.

        Args:
            contiguous: whether only the place in the storage may differ.
            unit: numbers of which the place is a multiple.
        """
        ways = ["plain", "plain", "inside", "at the end"]
        if x.dim() > 1 and not contiguous:
            ways += ["columns", "turned", "every other"]
        way = self.random.choice(ways)
        self.note(f"{name} is", way)
        if way in ("inside", "at the end"):
            before = unit * self.random.randint(1, 20)
            after = 0 if way == "at the end" else self.random.randint(1, 40)
            flat = torch.cat([_filler(x, (before,)), x.flatten(), _filler(x, (after,))])
            return flat[before : before + x.numel()].view(x.shape)
        if way == "columns":
            before, after = self.random.randint(0, 9), self.random.randint(0, 9)
            sides = [_filler(x, (*x.shape[:-1], n)) for n in (before, after)]
            return torch.cat([sides[0], x, sides[1]], -1)[..., before : before + x.shape[-1]]
        if way == "turned":
            first, second = self.random.sample(range(x.dim()), 2)
            return x.transpose(first, second).contiguous().transpose(first, second)
        if way == "every other":
            dim = self.random.randrange(x.dim())
            return torch.stack([x, _filler(x, x.shape)], dim + 1).select(dim + 1, 0)
        return x.clone()


def _filler(x: Tensor, shape: Sequence[int]) -> Tensor:
    if x.is_floating_point():
        return torch.full(shape, torch.nan, dtype=x.dtype)
    return torch.full(shape, 255 if x.dtype == torch.uint8 else -1, dtype=torch.int64).to(x.dtype)


def twin(x: Tensor) -> Tensor:
    """A copy of x with its whole storage and its strides."""
    storage = x.untyped_storage().clone()
    place = x.storage_offset(), x.shape, x.stride()
    return torch.empty(0, dtype=x.dtype).set_(storage, *place)  # type: ignore[call-overload]


def storage_bytes(x: Tensor) -> Tensor:
    """The bytes of the whole storage of x."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())  # type: ignore[call-overload]
