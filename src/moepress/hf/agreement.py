"""Whether the files of a folder hold exactly the tensors of the model that config.json describes.

transformers fills what is missing, or has another shape, with random numbers and goes on with a
warning. Here names, shapes and dtypes are compared with the headers of the files before a weight
is read, for packed and unpacked tensors alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from moepress.errors import FileError
from moepress.original.composite import is_inside
from moepress.reading.documents import shown
from moepress.reading.headers import Entry, read_header

FLOATS = ("F64", "F32", "F16", "BF16")  # any of them may be cast to the model's dtype
DTYPES = {
    "torch.uint8": "U8", "torch.int8": "I8", "torch.int16": "I16", "torch.int32": "I32",
    "torch.int64": "I64", "torch.bool": "BOOL",
}  # fmt: skip
MOST = {"layer": 1 << 12, "depth": 1 << 12, "expert": 1 << 16}  # by a word in the field's name
COPY = "The files and config.json do not belong together: copy the folder again."


def check_sizes(config: Any) -> None:
    """Refuse a config with numbers of modules that no model has, before they are built.

    Raises:
        FileError: a number of layers or experts is too large.
    """
    todo: list[tuple[str, Any]] = list(config.to_dict().items())
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += value.items()
        words = () if "size" in str(name) else MOST  # vocab_size_per_layer_input of gemma4
        most = next((MOST[word] for word in words if word in str(name)), None)
        if type(value) is int and most is not None and value > most:
            raise FileError(
                f"config.json has {name} = {shown(value)}. Expected at most {most}: restore it."
            )


def stored_tensors(files: Iterable[str]) -> dict[str, Entry]:
    """Every tensor of some safetensors files, by name.

    Raises:
        FileError: a file is damaged, or two hold a tensor of the same name.
    """
    found: dict[str, Entry] = {}
    for path in files:
        header = read_header(path)
        twice = sorted(found.keys() & header.tensors.keys())
        if twice:
            raise FileError(
                f"Tensor {twice[0]} is in {path} and in another file of the model too. Expected it "
                "once: copy the folder again."
            )
        found |= header.tensors
    return found


def places_of(model: Any, stored: Iterable[str], conversions: Collection[Any]) -> dict[str, str]:
    """The name that each stored tensor has in the model: transformers' own rule.

    Args:
        conversions: the renamings that transformers will apply.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for name in sorted(stored, key=dot_natural_key):  # in this order: renamings may have a state
        place, _ = rename_source_key(name, [*conversions], [], prefix, state)
        if place not in state and name in state:
            place, _ = rename_source_key(name, [], [], prefix, state)
        found[name] = place
    return found


def check_agreement(
    model: Any, stored: Mapping[str, Entry], places: Mapping[str, str], same_class: bool
) -> None:
    """Compare the stored tensors with those of a packed model on the meta device.

    A class other than the folder's may lack tensors that the folder has, such as its head, and may
    have a head of its own that the folder lacks (a classifier's). Its decoder is the folder's.

    Args:
        stored: by name.
        places: the name in the model of each of them.
        same_class: whether the model is of the class that `architectures` of config.json names.

    Raises:
        FileError: a tensor is missing, has no place, has another shape, or a dtype that cannot be
            cast.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    by_place: dict[str, str] = {}
    for name, place in places.items():
        if place in by_place:
            raise FileError(f"Tensors {by_place[place]} and {name} are both {place}. {COPY}")
        by_place[place] = name
    heads_of_others = not same_class and model.get_output_embeddings() is None
    base = _base_path(model)
    for name in wanted:
        needed = not heads_of_others or is_inside(name, [base])
        if needed and not _is_there(name, by_place, model):
            raise FileError(
                f"Tensor {name} is in none of the model's files. A shard is missing or damaged, or "
                "config.json was changed: copy the folder again."
            )
    for place, name in by_place.items():
        if place in wanted:
            _check_tensor(name, stored[name], wanted[place])
        elif same_class or _is_inside_decoder(place, model, base):
            raise FileError(
                f"The files hold tensor {name}, which {type(model).__name__} of this config.json "
                f"has no place for. {COPY}"
            )


def _check_tensor(name: str, found: Entry, wanted: Tensor) -> None:
    floats = wanted.is_floating_point()
    dtypes = FLOATS if floats else (DTYPES.get(str(wanted.dtype), str(wanted.dtype)),)
    if found.dtype in dtypes and found.shape == tuple(wanted.shape):
        return
    dtype = "floats" if floats else dtypes[0]
    raise FileError(
        f"Tensor {name} is {list(found.shape)} {found.dtype}; config.json describes "
        f"{list(wanted.shape)} {dtype}. {COPY}"
    )


def _is_there(name: str, by_place: Collection[str], model: Any) -> bool:
    """Whether a tensor of the model is stored, under its own name or that of one it is tied to."""
    if name in by_place:
        return True
    ties: Mapping[str, str] = model.all_tied_weights_keys
    first = ties.get(name, name)
    return any(one in by_place for one in (first, *(t for t, s in ties.items() if s == first)))


def _base_path(model: Any) -> str:
    """Path of the model without its head; empty: the model has none."""
    prefix = str(model.base_model_prefix)
    return prefix if prefix and hasattr(model, prefix) else ""


def _is_inside_decoder(place: str, model: Any, base: str) -> bool:
    """Whether a tensor belongs to a module of the model without its head, such as a layer."""
    modules = {path for path, _ in model.named_modules()}
    owner = place if base else place.removeprefix(f"{model.base_model_prefix}.")
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner not in ("", base) and is_inside(owner, [base])
