"""Damaged folders of original models, without end, from a seeded generator.

Each variant is a name and a function that damages a copy of an intact folder: bytes, JSON fields,
kinds of files, which shard holds a tensor, dtypes, shapes and values of tensors, files that do not
belong there. The intact folder needs shards, an index and a tokenizer.

>>> for name, apply in islice(variants(folder, random.Random(0)), 100): ...
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Apply = Callable[[Path], None]
INDEX = "model.safetensors.index.json"
HUGE = "9" * 5000  # more digits than Python converts by default
DEEP = "[" * 10_000 + "]" * 10_000
# JSON texts that stand in for the value of a field.
VALUES = (
    *("null", "true", "-1", "0", "1", "3", "1.5", "1e400", "NaN", "Infinity", "-Infinity"),
    *(str(1 << 40), str(10**12), str(-(1 << 63)), str(1 << 70), HUGE, DEEP),
    *('""', '"x"', '"caf\\u00e9"', '"\\ud800"', '"\\u0000"', '"../../x"', "[]", "[1]", "{}"),
    '{"a": {"b": []}}',
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn)
STRAYS = {
    "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "x"}',
    "pytorch_model.bin.index.json": "{}",
    "trainer_state.json": "{}",
    "quantize_config.json": '{"bits": 4}',
    "model.safetensors.index.fp32.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "not JSON",
    "modeling_x.py": "raise SystemExit",
}


def variants(folder: Path, rng: random.Random) -> Iterator[tuple[str, Apply]]:
    """Names of damages, all different, and functions that do them to a copy of the folder."""
    kinds = (_bytes, _field, _field, _kind, _shards, _tensor, _tensor, _header, _stray)
    number = 0
    while True:
        made = rng.choice(kinds)(folder, random.Random(rng.getrandbits(64)))
        if made is not None:
            name, apply = made
            yield f"{number:05d} {name}", apply
            number += 1


Made = tuple[str, Apply] | None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _bytes(folder: Path, rng: random.Random) -> Made:
    """Cut, empty, overwrite or lengthen a file."""
    path = rng.choice(_files(folder))
    content = bytearray(path.read_bytes())
    how = rng.choice(("cut", "emptied", "flipped", "zeros", "longer", "noise", "latin", "bom"))
    at = rng.randrange(len(content))
    if rng.random() < 0.5:  # at the beginning, where headers are
        at = rng.randrange(min(len(content), 600))
    if how == "cut":
        del content[at:]
    elif how == "emptied":
        content.clear()
    elif how == "flipped":
        for _ in range(rng.choice((1, 1, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif how == "longer":
        content += rng.randbytes(17)
    elif how == "noise":
        content[at : at + 32] = rng.randbytes(len(content[at : at + 32]))
    elif how == "latin":
        content[at:at] = b"\xe9"
    else:
        content[:0] = b"\xef\xbb\xbf"
    changed = bytes(content)
    return f"bytes: {path.name} {how} at {at}", lambda to: _write(to / path.name, changed)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _field(folder: Path, rng: random.Random) -> Made:
    """Change, delete or repeat a field of a JSON file; most often of config.json."""
    names = [path.name for path in _files(folder) if path.suffix == ".json"]
    name = rng.choice(["config.json", "config.json", *names])
    fields = json.loads((folder / name).read_text(encoding="utf-8"))
    place, value = _place(fields, rng)
    where = ".".join(map(str, place))
    how = rng.random()
    if how < 0.15 and isinstance(place[-1], str):
        _inside(fields, place[:-1]).pop(place[-1])
        text = json.dumps(fields)
        return f"field: {name} {where} deleted", lambda to: _write(to / name, text.encode())
    new = rng.choice(VALUES)
    if how < 0.3 and isinstance(value, int) and not isinstance(value, bool):
        new = str(rng.choice((value + 1, value - 1, 2 * value, -value)))
    if how > 0.95 and isinstance(place[-1], str):  # an unknown field
        place = (*place[:-1], rng.choice(("auto_map", "transformers_weights", "quantization_config",
                                          "torch_dtype", "model_type", "né")))  # fmt: skip
        where = ".".join(map(str, place))
    _inside(fields, place[:-1])[place[-1]] = "@@"
    text = json.dumps(fields).replace('"@@"', new)
    if rng.random() < 0.03:
        text = text.replace("{", '{"model_type": "llama", ', 1)
    short = new if len(new) < 30 else f"{new[:10]}..."
    return f"field: {name} {where} = {short}", lambda to: _write(to / name, text.encode())


def _place(fields: Any, rng: random.Random) -> tuple[tuple[Any, ...], Any]:
    """The path of a field of an object, mostly near the top, and its value."""
    path: tuple[Any, ...] = ()
    value = fields
    while isinstance(value, dict | list) and value and (not path or rng.random() < 0.5):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        path, value = (*path, key), value[key]
    return path or ("x",), value


def _inside(fields: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        fields = fields[key]
    return fields


def _kind(folder: Path, rng: random.Random) -> Made:
    """Put something else in the place of a file."""
    name = rng.choice(_files(folder)).name
    how = rng.choice(("folder", "fifo", "device", "circle", "nowhere", "missing", "unreadable"))

    def apply(to: Path) -> None:
        path = to / name
        if how == "unreadable":
            path.chmod(0)
            return
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)
        elif how in ("device", "circle", "nowhere"):
            path.symlink_to({"device": "/dev/zero", "circle": path, "nowhere": "nowhere"}[how])

    return f"kind: {name} {how}", apply


def _shards(folder: Path, rng: random.Random) -> Made:
    """Contradictions between the index, the shards and a single file."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assigned: dict[str, Any] = index["weight_map"]
    shards = sorted(set(assigned.values()))
    key = rng.choice(sorted(assigned))
    shard, other = assigned[key], rng.choice(shards)
    how = rng.choice(("moved", "unnamed", "dropped", "wrong", "stale", "single", "twice", "extra"))
    if how == "moved":
        assigned[key] = other
    elif how == "unnamed":
        del assigned[key]
    elif how == "dropped":
        index["weight_map"] = {k: v for k, v in assigned.items() if v != shard}
    elif how == "wrong":
        assigned[key] = rng.choice(
            (3, None, "", "../x.safetensors", "/dev/zero", "x.bin", "config.json", [], "x" * 5000)
        )
    elif how == "extra":
        assigned["model.layers.0.extra.weight"] = shard

    def apply(to: Path) -> None:
        if how in ("stale", "twice"):  # another shard holds the tensor too
            state = load_file(to / other)
            value = load_file(to / shard)[key]
            value = value.clone() if how == "twice" else value.flip(0).contiguous()
            save_file({**state, key: value}, to / other, {"format": "pt"})
        elif how == "single":
            state = {k: v for path in shards for k, v in load_file(to / path).items()}
            changed = {k: v.flip(0).contiguous() for k, v in state.items()}
            save_file(changed, to / "model.safetensors", {"format": "pt"})
        else:
            (to / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return f"shards: {key} {how} {shard} {other}", apply


def _tensor(folder: Path, rng: random.Random) -> Made:
    """Change one tensor, or add one, in a shard; the index stays true."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    state = load_file(path)
    key = rng.choice(sorted(state))
    changes: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
        "dropped": lambda _: {},
        "renamed": lambda v: {f"{key}x": v},
        "cut": lambda v: {key: v[:-1].clone()},
        "longer": lambda v: {key: torch.cat([v, v[:1]])},
        "transposed": lambda v: {key: v.mT.contiguous() if v.dim() > 1 else v[None].clone()},
        "flat": lambda v: {key: v.flatten()},
        "nan": lambda v: {key: _with(v, float("nan"))},
        "inf": lambda v: {key: _with(v, float("-inf"))},
        "large": lambda v: {key: _with(v.float(), 3e38)},
        "zero": lambda v: {key: torch.zeros_like(v)},
        "float": lambda v: {key: v.to(rng.choice(FLOATS))},
        "kind": lambda v: {key: v.to(rng.choice(OTHERS))},
        "scaled": lambda v: {key: v.to(torch.float8_e4m3fn), f"{key}_scale": torch.ones(1)},
        "scale": lambda v: {key: v, f"{key}_scale": torch.ones(1)},
        "bias": lambda v: {key: v, f"{key.rpartition('.')[0]}.bias": v.flatten()[:8].clone()},
        "layer": lambda v: {key: v, key.replace("layers.1.", "layers.7."): v.clone()},
        "again": lambda v: {key: v, key.removeprefix("model."): v.flip(0).contiguous()},
        "beside": lambda v: {key: v, "mtp.fc.weight": v.clone()},
    }
    how = rng.choice(sorted(changes))

    def apply(to: Path) -> None:
        changed = {k: v for k, v in state.items() if k != key} | changes[how](state[key])
        save_file(changed, to / path.name, {"format": "pt"})
        index = json.loads((to / INDEX).read_text(encoding="utf-8"))
        kept = {k: v for k, v in index["weight_map"].items() if v != path.name}
        index["weight_map"] = kept | dict.fromkeys(changed, path.name)
        (to / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return f"tensor: {key} {how}", apply


def _with(value: Tensor, number: float) -> Tensor:
    """A tensor with one other element; of integers, the next ones."""
    if not value.is_floating_point():
        return value + 1
    changed = value.clone()
    changed.view(-1)[changed.numel() // 2] = number
    return changed


def _header(folder: Path, rng: random.Random) -> Made:
    """A safetensors header that says something else than the file holds."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    key = rng.choice(sorted(header))
    field = rng.choice(("dtype", "shape", "data_offsets"))
    new: Any = rng.choice(
        {
            "dtype": ("F64", "I8", "X9", 3, None, "BF16", "F32"),
            "shape": ([10**12, 64], [-1], [1 << 62, 1 << 62], [0], "x", [1.5], [True], [[3]]),
            "data_offsets": ([0, 10**15], [5, 1], [0, 0], [-8, 8], ["0", "8"], [0]),
        }[field]
    )
    how = rng.choice(("field", "field", "field", "length", "again"))
    length = None
    if how == "length":
        length = rng.choice((0, 1, size - 1, size + 1, 10**12, (1 << 64) - 1))
    elif key != "__metadata__":
        header[key][field] = new
    text = json.dumps(header)
    if how == "again":  # the same name twice
        text = text.replace("{", f'{{"{key}": {json.dumps(header[key])}, ', 1)
    encoded = text.encode()
    number = (len(encoded) if length is None else length).to_bytes(8, "little")
    content = number + encoded + raw[8 + size :]
    what = f"length {length}" if how == "length" else f"{key} {field} = {new} {how}"
    return f"header: {path.name} {what}", lambda to: _write(to / path.name, content)


def _stray(folder: Path, rng: random.Random) -> Made:
    """A file that does not belong to the model, or a config that names code."""
    name = rng.choice(sorted(STRAYS))
    if rng.random() < 0.7:
        return f"stray: {name}", lambda to: _write(to / name, STRAYS[name].encode())
    named = rng.choice(("modeling_x.X", "a.b.X", "../x.X", "x--y.Z", "nothing", 3, ["a.B", None]))
    file = rng.choice(("config.json", "tokenizer_config.json"))
    fields = json.loads((folder / file).read_text(encoding="utf-8"))
    key = rng.choice(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"))
    text = json.dumps({**fields, "auto_map": {key: named}})
    return f"stray: {file} auto_map {key} {named}", lambda to: _write(to / file, text.encode())


def damaged(folder: Path, apply: Apply, to: Path) -> Path:
    """A fresh copy of a folder at `to`, damaged."""
    if to.exists():
        for path in to.iterdir():
            path.chmod(0o644, follow_symlinks=False) if not path.is_symlink() else None
        shutil.rmtree(to)
    shutil.copytree(folder, to)
    apply(to)
    return to
