"""The recipe: all choices a user can make, in one frozen object that is stored with the results.

Only the budget has no default. The reasons for the defaults are in `docs/log.md`.
`Recipe.load("paper")` returns a named recipe, `Recipe.load("my.toml")` reads a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moepress.errors import FileError, InputError
from moepress.format.codec import (
    CODE_BITS,
    GRID_BITS,
    GROUP_SIZES,
    HALF_WIDTHS,
    LEFT_OUT,
    width,
)
from moepress.reading.documents import shown, wrong_field
from moepress.reading.files import read_text
from moepress.reading.json import MOST_DIGITS, kind_of, parse_json
from moepress.text.named import normalised

QuantizerName = Literal["gptq", "gptq-released", "rtn", "sign"]
MeasureName = QuantizerName | Literal["noise"]
CodecFamily = Literal["int", "trellis"]
Cost = Literal["error", "paper", "random", "uniform"]
Scope = Literal["model", "layer"]
SensitivityName = Literal["gradient", "none"]
Over = Literal["mean", "worst"]
HessianWeight = Literal["routing", "none"]
NOISE = "noise"
QUANTIZERS: tuple[str, ...] = get_args(QuantizerName)
TRELLIS = ("gptq", "rtn")  # quantizers that make trellis codes
UNQUANTIZED = 16  # value of a *_bits field: those weights are not quantized
EXPERT_BITS: dict[str, tuple[float, ...]] = {  # offered to routed experts by default, by codec
    "int": (1, 2, 3, 4),
    "trellis": (1, 1.5, 2, 2.5, 3, 3.5, 4),
}
TABLE_BITS = (4, 8, UNQUANTIZED)  # widths offered to the embedding and to the head
MOST_BUDGET = 1 << 60  # bytes, or bits: more than anybody has
FALLBACK_BITS = 4  # width of linears whose cost is unknown


@dataclass(frozen=True)
class Recipe:
    """How to compress a model. Immutable; `dataclasses.replace` makes variants.

    Budget: exactly one of `bits` (average code bits of the routed experts, the paper's k), `bpw`
    (stored bits per weight of the whole model) or `size` (bytes of the folder) is set when an
    allocation is computed; scoring needs none.
    """

    # The budget.
    bits: float | None = None
    bpw: float | None = None
    size: int | None = None

    # Calibration text: (text, weight) pairs, see text/windows.py.
    calib: tuple[tuple[str, float], ...] = (("self", 1.0),)
    sequences: int = 128
    sequence_length: int = 512
    seed: int = 0

    # Widths offered to routed experts and to all other linears. attention_bits to embedding_bits
    # each fix the width of one kind of tensor; with None the allocator chooses the width of each
    # tensor of that kind. With 0 among expert_bits, experts may be left out. Trellis codes of
    # experts also have half widths: 1.5, 2.5 and 3.5.
    expert_codec: CodecFamily = "trellis"  # of all routed experts: scalar grids or trellis codes
    expert_bits: tuple[float, ...] = EXPERT_BITS["trellis"]  # if unset, by expert_codec
    group_size: int = 128
    linear_codec: CodecFamily = "trellis"  # of all other linears; widths it lacks are scalar
    linear_bits: tuple[int, ...] = (2, 3, 4, 8)
    attention_bits: int | None = None
    shared_expert_bits: int | None = None
    dense_mlp_bits: int | None = None
    head_bits: int | None = None
    embedding_bits: int | None = None

    # How weights are rounded.
    quantizer: QuantizerName = "gptq"
    damping: float = 0.01  # of the mean of the Hessian's diagonal
    hessian_weight: HessianWeight = "routing"  # "none": each token counts 1, as in the paper
    sensitivity: SensitivityName = "gradient"  # weight of tokens in costs, costs/sensitivity.py
    token_floor: int = 256  # an expert with fewer tokens borrows some, rounding/tokens.py
    correction: float = 0.5  # share of earlier layers' errors that weights make up for
    balance: bool = True  # evenly scaled channels, balance.py, channel_scale.py

    # How costs are measured, and how the allocator uses them.
    # measure: the quantizer whose error is epsilon. Or "noise": the error that gptq would leave in
    # trellis codes is drawn, without the search for the codes (rounding/noise.py), for experts
    # at three widths (costs/interpolation.py). The errors of scalar codes are those of gptq.
    # score_tokens: with "noise", on how many tokens of an expert, in the mean; 0, and with other
    # quantizers: all (costs/scored.py).
    measure: MeasureName = "noise"
    score_tokens: int = 4096
    cost: Cost = "error"
    over: Over = "mean"  # minimise the mean loss over all calibration text, or the worst text's
    scope: Scope = "model"  # one budget for the model, or the same for every layer
    per_projection: bool = True  # gate/up and down may differ
    alpha: float = 1.0  # exponents of phi, w and epsilon in cost "paper"
    beta: float = 1.0
    gamma: float = 2.0
    at_least_one: tuple[float, ...] = ()  # widths that every layer must use at least once

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON and TOML have lists, no tuples
            value = getattr(self, field.name)
            if isinstance(value, list):
                frozen = tuple(tuple(v) if isinstance(v, list) else v for v in value)
                object.__setattr__(self, field.name, frozen)
        self._check_types()
        if self.expert_codec == "int" and self.expert_bits is EXPERT_BITS["trellis"]:  # unset
            object.__setattr__(self, "expert_bits", EXPERT_BITS["int"])
        for name in ("expert_bits", "at_least_one"):  # 2.0 of a file is 2
            object.__setattr__(self, name, tuple(map(_as_width, getattr(self, name))))
        self._check()
        calib = tuple((normalised(text), weight) for text, weight in self.calib)
        object.__setattr__(self, "calib", calib)

    def _check_types(self) -> None:
        """Raise InputError if a field is not of its declared type, or is no finite number."""
        for name, adapter in _field_types().items():
            try:
                adapter.validate_python(getattr(self, name))
            except ValidationError as error:
                raise InputError(f"The recipe {wrong_field(error, name)}") from error

    def _check(self) -> None:
        set_budgets = [n for n in ("bits", "bpw", "size") if getattr(self, n) is not None]
        if len(set_budgets) > 1:
            raise InputError(
                f"More than one budget is set: {', '.join(set_budgets)}. Give exactly one."
            )
        for name in set_budgets:
            if not 0 < getattr(self, name) < MOST_BUDGET:
                raise InputError(
                    f"{name} must be above 0 and below {MOST_BUDGET}, got "
                    f"{shown(getattr(self, name))}."
                )
        _one_of("quantizer", self.quantizer, QUANTIZERS)
        _one_of("measure", self.measure, (*QUANTIZERS, NOISE))
        _one_of("expert_codec", self.expert_codec, get_args(CodecFamily))
        _one_of("cost", self.cost, get_args(Cost))
        _one_of("linear_codec", self.linear_codec, get_args(CodecFamily))
        _one_of("sensitivity", self.sensitivity, get_args(SensitivityName))
        _one_of("over", self.over, get_args(Over))
        _one_of("scope", self.scope, get_args(Scope))
        _one_of("hessian_weight", self.hessian_weight, get_args(HessianWeight))
        _one_of("group_size", self.group_size, GROUP_SIZES)
        if not self.expert_bits or list(self.expert_bits) != sorted(set(self.expert_bits)):
            raise InputError(
                f"expert_bits must be distinct widths in rising order, got {self.expert_bits}."
            )
        for bits in self.expert_bits:
            _one_of("expert_bits", bits, (LEFT_OUT, *CODE_BITS[self.expert_codec]))
        if self.expert_bits == (LEFT_OUT,):
            raise InputError(
                "expert_bits offers 0 alone, which leaves every expert out. Offer other widths too."
            )
        if not self.linear_bits or list(self.linear_bits) != sorted(set(self.linear_bits)):
            raise InputError(
                f"linear_bits must be distinct widths in rising order, got {self.linear_bits}."
            )
        for bits in self.linear_bits:
            _one_of("linear_bits", bits, GRID_BITS)
        for name in LINEAR_ROLES:
            _one_of(name, getattr(self, name), (None, *GRID_BITS, UNQUANTIZED))
        for name in ("head_bits", "embedding_bits"):
            _one_of(name, getattr(self, name), (None, *TABLE_BITS))
        if self.at_least_one and self.per_projection and LEFT_OUT in self.expert_bits:
            raise InputError(
                f"at_least_one {list(self.at_least_one)} asks for widths of projections, but with "
                "0 among expert_bits experts are allocated whole. Set per_projection to False, or "
                "at_least_one to ()."
            )
        for bits in self.at_least_one:
            if bits not in self.expert_bits:
                raise InputError(
                    f"at_least_one asks for {bits}-bit experts, but expert_bits offers "
                    f"{list(self.expert_bits)}. Offer it or do not ask for it."
                )
        for name, (least, most) in RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(
                    f"{name} must be at least {least} and at most {most}, got "
                    f"{shown(getattr(self, name))}."
                )
        if not 0 < self.damping < 1:
            raise InputError(f"damping must lie between 0 and 1, got {self.damping}.")
        if not 0 <= self.correction <= 1:
            raise InputError(f"correction must lie between 0 and 1, got {self.correction}.")
        if not self.calib or any(weight <= 0 for _, weight in self.calib):
            raise InputError("calib needs at least one text, each with a weight above 0.")
        if "trellis" in (self.expert_codec, self.linear_codec):
            for name, known in (("quantizer", TRELLIS), ("measure", (*TRELLIS, NOISE))):
                if getattr(self, name) not in known:
                    raise InputError(
                        f"{name} '{getattr(self, name)}' makes scalar codes only. Use gptq or rtn, "
                        "or set expert_codec and linear_codec to 'int'."
                    )
        if "sign" in (self.quantizer, self.measure) and self.widths != (1,):
            raise InputError(
                f"Quantizer 'sign' makes 1-bit codes only, but expert_bits is "
                f"{list(self.expert_bits)}. Offer only 1 bit, or use gptq or rtn."
            )

    @classmethod
    def load(cls, name_or_path: str | Path, **changes: Any) -> Recipe:
        """A named recipe, or the recipe of a TOML or JSON file, with some fields changed.

        Raises:
            InputError: there is no such recipe, or a field has a value that is not allowed.
        """
        if str(name_or_path) in NAMED:
            return NAMED[str(name_or_path)].with_changes(**changes)
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(
                f"No recipe '{name_or_path}'. Expected one of {sorted(NAMED)} or a .toml or "
                ".json file."
            )
        text = read_text(path, "The recipe")
        try:
            fields = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
            if not isinstance(fields, dict):
                raise InputError(f"it is {kind_of(fields)}. Expected an object with fields")
            return cls.from_dict({**fields, **changes})
        except (ValueError, RecursionError) as error:  # InputError is a ValueError
            raise FileError(f"Cannot read the recipe {path}: {error} Mend it.") from error

    def with_changes(self, **changes: Any) -> Recipe:
        """This recipe with some fields changed, by name.

        Where only `expert_codec` changes, the half widths of trellis codes are no longer offered.
        """
        fields = {**self.to_dict(), **changes}
        if fields["expert_codec"] == "int" and "expert_bits" not in changes:
            fields["expert_bits"] = [bits for bits in self.expert_bits if bits not in HALF_WIDTHS]
        return Recipe.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """The recipe of these fields; all others have their defaults.

        Raises:
            InputError: a field does not exist, or has a value that is not allowed.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - names):
            raise InputError(
                f"Unknown recipe field {', '.join(unknown)}. Known: {', '.join(sorted(names))}."
            )
        try:
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"A recipe field has the wrong type: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`: all fields."""
        return dataclasses.asdict(self)

    @property
    def widths(self) -> tuple[float, ...]:
        """The expert_bits without LEFT_OUT: widths that an expert can be rounded to."""
        return tuple(bits for bits in self.expert_bits if bits != LEFT_OUT)

    @property
    def has_budget(self) -> bool:
        """Whether `bits`, `bpw` or `size` is set."""
        return any(b is not None for b in (self.bits, self.bpw, self.size))

    def digest(self, *omitted: str) -> str:
        """A short hash of every field but those in `omitted`."""
        fields = {k: v for k, v in self.to_dict().items() if k not in omitted}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _as_width(value: Any) -> Any:
    return width(value) if isinstance(value, float) else value


@cache
def _field_types() -> dict[str, TypeAdapter[Any]]:
    """What checks the type of each field; names of choices are checked by `_check`."""
    strict = ConfigDict(strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    hints = get_type_hints(Recipe)
    return {
        name: TypeAdapter(hint, config=strict)
        for name, hint in hints.items()
        if not all(get_origin(one) is Literal for one in (get_args(hint) or (hint,)))
        and get_origin(hint) is not Literal
    }


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}. Expected one of {list(allowed)}.")


def fallback_width(offered: Sequence[int]) -> int:
    """Fallback width when no cost is known: 16 if offered, else the nearest to 4."""
    if UNQUANTIZED in offered:
        return UNQUANTIZED
    return min(offered, key=lambda bits: abs(bits - FALLBACK_BITS))


def parse_size(text: str) -> int:
    """Bytes of "16GB", "15.5 GiB", "700MB" or "123456"; GB is 1000^3, GiB is 1024^3."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise InputError(
            f"Size {text!r} is not understood. Expected something like 16GB or 900MiB."
        )
    number, prefix, binary = match.groups()
    if len(number) > MOST_DIGITS:
        raise InputError(f"Size {shown(text)} has too many digits. Expected something like 16GB.")
    unit = (1024 if binary else 1000) ** (" KMGT".index(prefix.upper() or " "))
    return int(float(number) * unit)


def parse_widths(text: str) -> tuple[float, ...]:
    """The widths of "1,1.5,2", in rising order."""
    try:
        return tuple(sorted({width(float(bits)) for bits in text.split(",")}))
    except ValueError as error:
        raise InputError(f"Widths {text!r} are not understood. Expected e.g. 1,1.5,2.") from error


# Least and most of numbers that work or memory grow with, or that a generator takes.
RANGES = {
    "sequences": (1, 1 << 24), "sequence_length": (2, 1 << 24), "token_floor": (0, 1 << 48),
    "score_tokens": (0, 1 << 48),
    "seed": (0, (1 << 32) - 1), "alpha": (-64, 64), "beta": (-64, 64), "gamma": (-64, 64),
}  # fmt: skip

# Fields that only the allocation and later stages read: scores do not depend on them.
FIELDS_AFTER_SCORING = (
    "bits", "bpw", "size", "cost", "scope", "per_projection",
    "alpha", "beta", "gamma", "at_least_one", "quantizer", "correction", "over",
)  # fmt: skip
# What the recipes in older plans and scores lack: they were made when all tokens were scored, and
# channels left as they were.
BEFORE = {"score_tokens": 0, "balance": False}
LINEAR_ROLES = ("attention_bits", "shared_expert_bits", "dense_mlp_bits")

# Without the two slow steps: the backward walk and the trellis search.
FAST = Recipe(
    expert_codec="int",
    linear_codec="int",
    measure="gptq",
    sensitivity="none",
    attention_bits=FALLBACK_BITS,
    shared_expert_bits=FALLBACK_BITS,
    dense_mlp_bits=FALLBACK_BITS,
    head_bits=UNQUANTIZED,
    embedding_bits=UNQUANTIZED,
)

# The MC paper, arXiv:2410.06270: eq. 3-5 per layer, epsilon measured with round to nearest, one
# width per expert.
PAPER = dataclasses.replace(
    FAST,
    expert_bits=(1, 2, 3),
    measure="rtn",
    cost="paper",
    scope="layer",
    per_projection=False,
    hessian_weight="none",
    correction=0.0,
    balance=False,
    at_least_one=(2, 3),
)
NAMED = {
    "default": Recipe(),
    "fast": FAST,
    "paper": PAPER,
    # As in MC's released code: its exponents, and its GPTQ, which has min-max grids and, at 3 bits
    # and below, no feedback inside a released block of 128 columns. For comparison only.
    "paper-released": dataclasses.replace(PAPER, quantizer="gptq-released", beta=1.5, gamma=1.0),
}
