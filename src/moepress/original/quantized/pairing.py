"""Which tensors of the files belong together: codes, and the scales that make them weights.

What the files hold decides, by names and dtypes; config.json only tells sizes of blocks. So modules
that a checkpoint keeps in 16 bits need no list. The names are those of transformers' loaders and of
compressed-tensors. Nothing is read but headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moepress.errors import FileError
from moepress.original.quantized.config import COMPRESSED_TENSORS, Quantization
from moepress.original.quantized.fitting import check_beside
from moepress.original.quantized.forms import Form, Plain, Quantized, Unreadable
from moepress.original.quantized.grids import Blocks
from moepress.original.quantized.headers import BYTES, FLOAT8, WIDE, Entry
from moepress.original.quantized.numbers import CAST, FP4, PACKED_BITS, packed_int

AGAIN = "Fetch the file again, or the model whose config.json this is."
# Endings of the scales of X.weight or of X, in the order in which they are looked for.
SCALES = ("_scale_inv", "_scale")
SCALES_OF_WEIGHT = (".scale", ".qscale_weight")  # DeepSeek-V4; Mistral
# Endings of tensors that only quantized checkpoints have: one without its codes is damage.
COMPANIONS = (
    ".weight_scale_inv",
    ".weight_scale",
    ".qscale_weight",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_global_scale",
    "_proj_scale_inv",
    "_proj_blocks",
    "_proj_scales",
)
# Endings of scales of activations and of caches, which nothing here needs.
OF_ACTIVATIONS = (
    ".input_scale",
    ".input_scale_ub",
    ".input_global_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".activation_scale",
    "_activation_scale",
    ".qscale_act",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
)
NO_SCALES = (
    "has no scales in the checkpoint, so its numbers are unknown. Expected 16-bit floats, or codes "
    f"with scales beside them. {AGAIN}"
)


def find_forms(entries: Mapping[str, Entry], quantization: Quantization | None) -> dict[str, Form]:
    """How each tensor of the unquantized checkpoint is held, by its name there.

    Args:
        entries: all tensors of the files.
        quantization: what config.json says; None: nothing.

    Raises:
        FileError: scales do not fit their tensor, or have none, or config.json does not say
            that there are scales.
    """
    said = quantization or Quantization()
    forms: dict[str, Form] = {}
    used: set[str] = set()
    filled = {key: entry for key, entry in entries.items() if entry.nbytes}
    for key, entry in filled.items():
        for find in (_blocks, _packed, _fp4_of_inkling, _beside):
            found = find(key, entry, entries, said)
            if found is not None:
                name, form = found
                if quantization is None:
                    raise FileError(
                        f"{entry.text} has scales beside it ({form.scale.text}), but config.json "
                        "has no quantization_config that says what they mean. Expected one: fetch "
                        "the config that belongs to these files, or give the original model."
                    )
                check_beside(form, said.asymmetric, AGAIN)
                forms[name] = form
                used |= {part.key for part in form.entries}
                break
    for key, entry in entries.items():
        if key not in used and not (quantization and key.endswith(OF_ACTIVATIONS)):
            forms[key] = _alone(entry, entries)
    return forms


Found = tuple[str, Quantized] | None


def _beside(key: str, entry: Entry, entries: Mapping[str, Entry], said: Quantization) -> Found:
    """8-bit floats, FP4 or int8 with scales beside them: X and X_scale_inv."""
    if entry.dtype not in (*FLOAT8, "I8"):
        return None
    scale = _scale_of(key, entries)
    if scale is None:
        return None
    numbers = CAST
    zero = None
    if entry.dtype == "I8":
        if said.method == COMPRESSED_TENSORS:
            zero = entries.get(f"{key}_zero_point")
        elif said.method:  # transformers reads int8 of its FP8 checkpoints as two FP4 codes
            numbers = FP4
        else:
            return None
    return key, _fitted(Quantized(entry, numbers, scale, Blocks(1), Blocks(1), zero=zero), said)


def _blocks(key: str, entry: Entry, entries: Mapping[str, Entry], said: Quantization) -> Found:
    """MXFP4 of gpt-oss: X_blocks [E, N, blocks, 16] and X_scales [E, N, blocks], of X [E, K, N]."""
    name = key.removesuffix("_blocks")
    scale = entries.get(f"{name}_scales")
    if name == key or scale is None or entry.dtype != "U8" or len(entry.shape) < 3:
        return None
    if scale.dtype != "U8" or scale.shape != entry.shape[:-1]:
        raise FileError(
            f"{scale.text} does not fit {entry.text}. Expected one byte for each block: U8 "
            f"{list(entry.shape[:-1])}. {AGAIN}"
        )
    columns = Blocks(2 * entry.shape[-1])
    form = Quantized(entry, FP4, scale, Blocks(1), columns, flattened=2, transposed=True)
    return name, form


def _packed(key: str, entry: Entry, entries: Mapping[str, Entry], said: Quantization) -> Found:
    """compressed-tensors: X_packed, X_scale and others, of X."""
    name = key.removesuffix("_packed")
    scale = entries.get(f"{name}_scale")
    if name == key or not name.endswith("weight"):
        return None
    if f"{name}_g_idx" in entries:
        raise FileError(
            f"{name}_g_idx orders the columns of {entry.text} by activations, which is not "
            "supported. Give the model that this one was made from."
        )
    if scale is None:
        raise FileError(f"{entry.text} {NO_SCALES}")
    if len(entry.shape) < 2:
        raise FileError(f"{entry.text}: expected packed matrices. {AGAIN}")
    zero = entries.get(f"{name}_zero_point")
    if entry.dtype == "U8":
        form = _fitted(Quantized(entry, FP4, scale, Blocks(1), Blocks(1)), said)
        return name, replace(form, divisor=_divisor(name, form, entries))
    if entry.dtype != "I32":
        raise FileError(f"{entry.text}: expected packed integers, I32 or U8. {AGAIN}")
    form = _packed_ints(entry, scale, entries.get(f"{name}_shape"), said)
    if zero is None:
        return name, form
    packed = form.numbers if zero.dtype == "I32" else CAST
    return name, replace(form, zero=zero, zero_numbers=packed)


def _divisor(name: str, form: Quantized, entries: Mapping[str, Entry]) -> Entry | None:
    """The number that scales of NVFP4 are divided by; MXFP4 has none, its scales are exponents.

    Raises:
        FileError: it is missing.
    """
    found = entries.get(f"{name}_global_scale")
    if found is None and form.scale.dtype in FLOAT8:
        raise FileError(
            f"{form.codes.text} has no {name}_global_scale beside it. Expected the number that the "
            f"scales of NVFP4 are divided by. {AGAIN}"
        )
    return found


def _packed_ints(entry: Entry, scale: Entry, shape: Entry | None, said: Quantization) -> Quantized:
    """Packed integers, of the one width of the config that fits their scales.

    The last word of a row may be filled up. How far it is counts only where the scales do not fit
    full words, or where they fit words of several widths, as scales of whole rows do: `shape` says
    it, and reading it from thousands of places takes long on some disks.

    Args:
        shape: the tensor that holds rows and columns; None: there is none.
    """
    fitting = _fitting(entry, scale, shape, said, full=True)
    if len(fitting) != 1 and shape is not None:
        fitting = _fitting(entry, scale, shape, said, full=False)
    if len(fitting) != 1:
        offered = " or ".join(
            f"int{group.bits} in groups of {group.group or 'a row'}" for group in said.ints
        )
        raise FileError(
            f"{scale.text} does not fit {entry.text}. Expected {offered or 'no packed integers'} "
            f"(of {', '.join(map(str, PACKED_BITS))} bits), as config.json says. {AGAIN}"
        )
    return fitting[0] if _count(scale) > 1 else replace(fitting[0], rows=Blocks(entry.shape[-2]))


def _fitting(
    entry: Entry, scale: Entry, shape: Entry | None, said: Quantization, full: bool
) -> list[Quantized]:
    """A form for each width of the config that fits the scales.

    Args:
        full: whether all words are full; else `shape` says how many columns there are.
    """
    fitting = []
    for group in said.ints:
        if group.bits not in PACKED_BITS:
            continue
        codes = packed_int(group.bits)
        form = Quantized(entry, codes, scale, Blocks(1), Blocks(1), shape_entry=shape)
        if not full:
            try:
                form = form.without_padding()
            except FileError:
                continue  # it is not of this width
        size = group.group or form.matrix[1]
        grid = form.matrix[0], -(-form.matrix[1] // size)
        if scale.shape == grid or (group.group is None and _count(scale) == 1):
            fitting.append(replace(form, rows=Blocks(1), columns=Blocks(size)))
    return list(dict.fromkeys(fitting))


def _fp4_of_inkling(
    key: str, entry: Entry, entries: Mapping[str, Entry], said: Quantization
) -> Found:
    """NVFP4 of Inkling: X, X_scale, X_amax and X_outer_scale_denominator."""
    parts = [f"{key}_scale", f"{key}_amax", f"{key}_outer_scale_denominator"]
    if entry.dtype not in BYTES or not all(part in entries for part in parts):
        return None
    scale, *factor = (entries[part] for part in parts)
    form = Quantized(entry, FP4, scale, Blocks(1), Blocks(1), factor=(factor[0], factor[1]))
    return key, _fitted(form, said)


def _alone(entry: Entry, entries: Mapping[str, Entry]) -> Form:
    """The form of a tensor that no other one belongs to.

    Raises:
        FileError: it is a scale whose codes are missing, or beside a tensor that needs none.
    """
    for ending in COMPANIONS:
        if entry.key.endswith(ending):
            raise FileError(
                f"{entry.text} belongs to a quantized tensor, but the checkpoint has no codes that "
                f"it fits beside it ({_beside_text(entry, entries)}). {AGAIN}"
            )
    if entry.dtype in WIDE:
        return Plain(entry)
    if entry.dtype in ("BOOL", "I16", "I32", "I64", "U16", "U32", "U64"):
        return Plain(entry)
    return Unreadable(entry, NO_SCALES)


def _beside_text(entry: Entry, entries: Mapping[str, Entry]) -> str:
    """The tensors of the same module, for a message."""
    module = entry.key.rpartition(".")[0]
    found = [
        other.text
        for key, other in entries.items()
        if key.rpartition(".")[0] == module and other is not entry
    ]
    return f"{module} has {', '.join(found[:3]) or 'nothing else'}"


def _scale_of(key: str, entries: Mapping[str, Entry]) -> Entry | None:
    """The scales of a tensor; None: it has none."""
    names = [key + ending for ending in SCALES]
    if key.endswith(".weight"):
        names += [key.removesuffix(".weight") + ending for ending in SCALES_OF_WEIGHT]
    return next((entries[name] for name in names if name in entries), None)


def _count(entry: Entry) -> int:
    """Number of elements."""
    count = 1
    for size in entry.shape:
        count *= size
    return count


def _of_columns(leading: tuple[int, ...], width: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the scales of fused experts [E, K, N] of FBGEMM: of gate_up, and of down."""
    return (*leading, 1, width), (*leading, width, 1)


def _fitted(form: Quantized, said: Quantization) -> Quantized:
    """The form with the blocks that the shape of its scales shows.

    Raises:
        FileError: the scales fit no blocks.
    """
    shape, leading = form.scale.shape, form.leading
    if len(form.codes.shape) >= 2:
        length, width = form.matrix
        grid = None
        if leading and said.method == "fbgemm_fp8" and shape in _of_columns(leading, width):
            grid = Blocks(length), Blocks(1)
        elif shape in ((), (1,), leading, (*leading, 1)):  # one for each matrix, or for all
            grid = Blocks(length), Blocks(width)
        elif shape == (*leading, length):  # one for each row
            grid = Blocks(1), Blocks(width)
        elif len(shape) == len(leading) + 2 and shape[: len(leading)] == leading:
            grid = said.sizes.fitting(length, width, (shape[-2], shape[-1]), bool(leading))
        if grid is not None:
            return replace(form, rows=grid[0], columns=grid[1])
    rows, columns = said.sizes.block
    groups = ", ".join(map(str, said.sizes.columns))
    raise FileError(
        f"{form.scale.text} does not fit {form.codes.text}. Expected a scale for each block of "
        f"{rows} x {columns}, for each row, for {groups} columns of a row, or for the whole "
        f"matrix. {AGAIN}"
    )
