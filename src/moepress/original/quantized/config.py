"""What a config.json says of a quantized original, and which methods cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.errors import InputError
from moepress.format.checkpoint import QUANTIZATION_FIELDS
from moepress.original.quantized.grids import Sizes
from moepress.reading.config import config_fields
from moepress.reading.json import kind_of

PARTS = ("text_config", "thinker_config", "language_config", "llm_config")  # of composite models
BLOCK = 128  # rows and columns of an FP8 block where the config says none
MICRO = (32, 16)  # columns of a block in the MX formats and in NVFP4

COMPRESSED_TENSORS = "compressed-tensors"
READ = {
    "fp8": "FP8",
    "mxfp8": "MXFP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    COMPRESSED_TENSORS: COMPRESSED_TENSORS,
}
FORMATS = (  # of compressed-tensors
    "dense",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
)
FLOATS: Mapping[str, Any] = {"type": "float"}
FLOATS_BY_32, FLOATS_BY_16 = ({**FLOATS, "group_size": columns} for columns in MICRO)
# Weights of the schemes that compressed-tensors has names for: `config_groups` may give the modules
# of a name in place of a scheme. Those of other widths are not read.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "UNQUANTIZED": {},
    **{f"W{b}A{a}": {"num_bits": b, "group_size": 128} for b in (2, 4, 8) for a in (4, 8, 16)},
    "W8A8": {"num_bits": 8},
    "INT8": {"num_bits": 8},
    "W4AFP8": {"num_bits": 4, "group_size": 128},
    "W4A16_ASYM": {"num_bits": 4, "group_size": 128, "symmetric": False},
    **dict.fromkeys(("FP8", "FP8_DYNAMIC"), FLOATS),
    "FP8_BLOCK": {**FLOATS, "block_structure": [128, 128]},
    **dict.fromkeys(("MXFP8", "MXFP8A16", "MXFP4", "MXFP4A16", "MXFP4XFP8"), FLOATS_BY_32),
    **dict.fromkeys(("NVFP4", "NVFP4A16"), FLOATS_BY_16),
}
ROUNDED_BY_OTHERS = (
    "was rounded to few bits from an original with more, and rounding it again adds to that loss"
)
OWN_TENSORS = "stores weights in the form of its own kernels"
REFUSED = {
    "moepress": "was made by moepress",
    "awq": ROUNDED_BY_OTHERS,
    "gptq": ROUNDED_BY_OTHERS,
    "auto-round": ROUNDED_BY_OTHERS,
    "bitsandbytes": ROUNDED_BY_OTHERS,
    "gguf": "is in GGUF, not in safetensors",
    "hqq": ROUNDED_BY_OTHERS,
    "quanto": ROUNDED_BY_OTHERS,
    "aqlm": ROUNDED_BY_OTHERS,
    "vptq": ROUNDED_BY_OTHERS,
    "spqr": ROUNDED_BY_OTHERS,
    "higgs": ROUNDED_BY_OTHERS,
    "exl2": ROUNDED_BY_OTHERS,
    "exl3": ROUNDED_BY_OTHERS,
    "sinq": ROUNDED_BY_OTHERS,
    "eetq": OWN_TENSORS,
    "torchao": OWN_TENSORS,
    "metal": OWN_TENSORS,
    "quark": ROUNDED_BY_OTHERS,
    "modelopt": ROUNDED_BY_OTHERS,
    "nvfp4": ROUNDED_BY_OTHERS,
    "fp_quant": ROUNDED_BY_OTHERS,
    "fouroversix": ROUNDED_BY_OTHERS,
}


@dataclass(frozen=True)
class IntGroup:
    """Integers that compressed-tensors packs: their bits, and the columns of a group."""

    bits: int
    group: int | None  # None: one scale for a row or for the whole tensor


@dataclass(frozen=True)
class Quantization:
    """How the weights of an original are quantized, as far as its tensors do not show it."""

    method: str = ""  # "": config.json says nothing
    block: tuple[int, int] | None = None  # rows and columns that share a scale
    columns: tuple[int, ...] = ()  # sizes of groups of columns
    ints: tuple[IntGroup, ...] = ()  # packed integers
    asymmetric: tuple[int, ...] = ()  # bits of integers that all have zero points

    @property
    def sizes(self) -> Sizes:
        """The blocks that scales may have."""
        columns = tuple(dict.fromkeys((*self.columns, *MICRO)))
        return Sizes(self.block or (BLOCK, BLOCK), columns, self.block is not None)

    def describe(self) -> str:
        """One line for people."""
        text = READ.get(self.method, "8-bit floats")
        if self.block is not None:
            text += f", blocks of {self.block[0]} x {self.block[1]}"
        if self.ints:
            text += ", " + " and ".join(f"int{group.bits}" for group in self.ints)
        return text


def read_quantization(folder: Path) -> Quantization | None:
    """The quantization that config.json of a model folder declares; None: none.

    Raises:
        InputError: it is one that moepress does not read, or config.json is damaged.
    """
    declared = declared_quantization(config_fields(folder))
    return None if declared is None else parse_quantization(declared, folder)


def declared_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a model's config, or of the text part of a composite's.

    Raises:
        InputError: it is no object.
    """
    for part in (config, *(config.get(name) or {} for name in PARTS)):
        for field in QUANTIZATION_FIELDS:
            found = part.get(field) if isinstance(part, Mapping) else None
            if found:
                if not isinstance(found, Mapping):
                    raise InputError(
                        f"config.json has {field} = {kind_of(found)}. Expected an object, or none: "
                        "fetch the config again."
                    )
                return found
    return None


def parse_quantization(declared: Mapping[str, Any], folder: Path) -> Quantization:
    """What a quantization_config says.

    Raises:
        InputError: moepress does not read this method, or the fields are damaged.
    """
    named = declared.get("quant_method")
    if named is not None and not (isinstance(named, str) and named):
        raise InputError(
            f"The quantization_config of {folder / 'config.json'} has quant_method = "
            f"{kind_of(named)}. Expected the name of a method: fetch it again."
        )
    method = (named or "").lower().replace("_", "-")
    if "config_groups" in declared and not method:
        method = COMPRESSED_TENSORS
    method = {"fbgemm-fp8": "fbgemm_fp8", "fp-quant": "fp_quant"}.get(method, method)
    if method not in READ:
        _refuse(folder, method or "no quant_method", REFUSED.get(method, "is not known here"))
    try:
        if method == COMPRESSED_TENSORS:
            return _compressed_tensors(declared, folder)
        size = declared.get("weight_block_size") if method in ("fp8", "mxfp8") else None
        return Quantization(method, None if size is None else _block(size))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(
            f"The quantization_config of {folder / 'config.json'} is damaged: {error!r}. Fetch it "
            "again."
        ) from error


def _block(size: Sequence[Any]) -> tuple[int, int]:
    """Rows and columns of a block."""
    rows, columns = (int(each) for each in size)
    if min(rows, columns) < 1:
        raise ValueError(f"blocks of {rows} x {columns}")
    return rows, columns


def _compressed_tensors(declared: Mapping[str, Any], folder: Path) -> Quantization:
    """A quantization_config of the library compressed-tensors."""
    given = (declared.get("config_groups") or {}).items()
    groups = [_scheme(name, scheme, folder) for name, scheme in given]
    formats = [declared.get("format"), *(group.get("format") for group in groups)]
    for name in filter(None, formats):
        if name not in FORMATS:
            _refuse(folder, f"compressed-tensors {name}", ROUNDED_BY_OTHERS)
    if (declared.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        _refuse(folder, "compressed-tensors with sparsity", "has lost weights of the original")
    if (declared.get("transform_config") or {}).get("config_groups"):
        _refuse(folder, "compressed-tensors with transforms", "stores rotated weights")
    weights = [group["weights"] for group in groups if group.get("weights")]
    sizes = [int(w["group_size"]) for w in weights if (w.get("group_size") or -1) > 0]
    blocks = [w["block_structure"] for w in weights if w.get("block_structure")]
    integers = [w for w in weights if w.get("type", "int") == "int"]
    ints = [
        IntGroup(
            int(w["num_bits"]), next((s for s in [int(w.get("group_size") or -1)] if s > 0), None)
        )
        for w in integers
    ]
    symmetric = {int(w["num_bits"]) for w in integers if w.get("symmetric") is not False}
    return Quantization(
        COMPRESSED_TENSORS,
        _block(blocks[0]) if blocks else None,
        tuple(dict.fromkeys(sizes)),
        tuple(dict.fromkeys(ints)),
        tuple({group.bits for group in ints} - symmetric),
    )


def _scheme(name: str, given: Mapping[str, Any] | list[str], folder: Path) -> Mapping[str, Any]:
    """The scheme of a group; one that is given by name alone has a list of modules there."""
    if not isinstance(given, list):
        return given
    if name.upper() not in PRESETS:
        reason = "names a scheme of weights that moepress does not read"
        _refuse(folder, f"compressed-tensors {name[:80]}", reason)
    return {"weights": PRESETS[name.upper()]}


def _refuse(folder: Path, method: str, reason: str) -> None:
    raise InputError(
        f"{folder} is already quantized ({method}): it {reason}. Expected 16-bit weights, FP8, "
        "MXFP4 or compressed-tensors. Give the original model's folder."
    )
