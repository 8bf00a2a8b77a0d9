"""A model folder, read a piece at a time: the only way moepress touches original weights.

The model's skeleton lives on the meta device. Checkpoints name and cut their tensors in many ways
(Mixtral keeps w1, w2 and w3 of each expert apart, transformers 5 computes with all experts fused);
transformers' own conversion mapping says how to get from one to the other, and is run here for one
decoder layer, or one expert, at a time. Nothing larger is ever in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moepress.errors import CheckpointError, InputError, NumericalError
from moepress.original.architectures import Experts, decoder_layers, find_experts

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files that belong to a model besides its weights and its config.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")


class ExpertWeights(NamedTuple):
    """The weights of one expert, in the dtype that is computed with."""

    gate_up: Tensor  # [2I, H], gate rows first
    down: Tensor  # [H, I]


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint that goes into a parameter of the model."""

    key: str
    pattern: str | None  # source pattern of the converter that takes it; None: only renamed


class Source:
    """A Mixture-of-Experts model in a local folder of safetensors, or on the model hub.

    Args:
        name: path of a folder, or a hub id to download (or find in the local cache).
        device: where weights are put when they are loaded.

    Raises:
        InputError: no such model, not a Mixture of Experts, or already quantized.
        CheckpointError: a file is missing, truncated or does not fit the model.
    """

    def __init__(self, name: str | Path, device: str | torch.device = "cpu") -> None:
        self.name = str(name)
        self.folder = resolve(name)
        self.device = torch.device(device)
        self.config = read_config(self.folder)
        self.files = weight_files(self.folder)
        self.dtype = self._dtype()  # of the weights on disk
        self.compute_dtype = compute_dtype(self.dtype, self.device)
        self.model = skeleton(self.config, self.compute_dtype)
        self.layers = decoder_layers(self.model)
        self.experts: dict[int, Experts] = find_experts(self.model)
        self._expert_names = {
            f"{e.path}.{part}" for e in self.experts.values() for part in ExpertWeights._fields
        } | {f"{e.path}.{part}_proj" for e in self.experts.values() for part in ("gate_up", "down")}
        self._converters: dict[str, Any] = {}
        self._pieces = self._plan()

    # What there is.

    @cached_property
    def keys(self) -> dict[str, Path]:
        """The file that holds each tensor of the checkpoint."""
        found: dict[str, Path] = {}
        for path in self.files:
            with opened(path) as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config, every file's header and samples of its bytes: cheap."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in self.files:
            with path.open("rb") as file:
                header = file.read(8)
                digest.update(header + file.read(int.from_bytes(header, "little")))
                # Fine-tunes of one model share config and headers; a few bytes tell them apart.
                size = path.stat().st_size
                for place in range(16):
                    file.seek(max(0, size * place // 16 - 64))
                    digest.update(file.read(64))
        return digest.hexdigest()[:16]

    @property
    def hidden(self) -> int:
        return next(iter(self.experts.values())).hidden

    def layer_path(self, index: int) -> str:
        """Module path of a decoder layer, e.g. "model.layers.3"."""
        return self._paths[id(self.layers[index])]

    @cached_property
    def ends(self) -> dict[str, tuple[str, ...]]:
        """Parameter names of the embedding and the head, and which each is: both, if tied."""
        embedding, head = (
            f"{self._paths[id(module)]}.weight"
            for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        if head not in self._targets:  # tied: one tensor, stored once
            return {embedding: ("embedding", "head")}
        return {embedding: ("embedding",), head: ("head",)}

    @cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in self.model.named_modules()}

    def names(self, prefix: str | None = None) -> list[str]:
        """Parameters and persistent buffers, routed experts left out, in the model's order.

        Args:
            prefix: a decoder layer's path; None for all that is outside the decoder layers.
        """
        layers = tuple(self.layer_path(i) + "." for i in range(len(self.layers)))
        return [
            name
            for name in self._targets
            if name not in self._expert_names
            and (name.startswith(prefix + ".") if prefix else not name.startswith(layers))
        ]

    @cached_property
    def _targets(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint must give; a tied one only once."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        state = self.model.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if name not in tied}

    def shape(self, name: str) -> torch.Size:
        return self._targets[name].shape

    def companions(self) -> list[Path]:
        """Tokenizer, generation and licence files that a copy of this model needs."""
        skip = {"config.json", INDEX}
        found = {p for pattern in COMPANIONS for p in self.folder.glob(pattern) if p.is_file()}
        return sorted(p for p in found if p.name not in skip)

    # Reading.

    def tensor(self, name: str) -> Tensor:
        """One parameter or buffer that is not a routed expert, on the device."""
        return self._convert(name, None)[name]

    def expert(self, layer: int, index: int) -> ExpertWeights:
        """The weights of expert `index` of decoder layer `layer`, and of no other expert."""
        path = self.experts[layer].path
        gate_up, down = (
            self._convert(name, index)[name].squeeze(0)
            for name in (f"{path}.gate_up_proj", f"{path}.down_proj")
        )
        weights = ExpertWeights(self._computed(gate_up), self._computed(down))
        shapes = self.experts[layer].gate_up_shape, self.experts[layer].down_shape
        if (tuple(gate_up.shape), tuple(down.shape)) != shapes:
            raise CheckpointError(
                f"Expert {index} of {path} has weights of {tuple(gate_up.shape)} and "
                f"{tuple(down.shape)} in {self.folder}; its config says {shapes[0]} and "
                f"{shapes[1]}. Fetch the model again."
            )
        return weights

    @contextmanager
    def loaded(self, prefix: str | None) -> Iterator[None]:
        """Within the block, the tensors `names(prefix)` are in the skeleton; then meta again."""
        self.load(prefix)
        try:
            yield
        finally:
            self.unload(prefix)

    def load(self, prefix: str | None) -> None:
        """Put the tensors `names(prefix)` into the skeleton, and its computed buffers beside."""
        for name in self.names(prefix):
            self.put(name, self._computed(self.tensor(name)))
        root = self.model.get_submodule(prefix) if prefix else self.model
        for module in root.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self.device)
        self.model.tie_weights()

    def _computed(self, value: Tensor) -> Tensor:
        """A tensor of the model's dtype in the one that is computed with."""
        return value.to(self.compute_dtype) if value.dtype == self.dtype else value

    def unload(self, prefix: str | None) -> None:
        for name in self.names(prefix):
            self.put(name, self._targets[name])
        self.model.tie_weights()

    def current(self, name: str) -> Tensor:
        """The tensor that is in the skeleton now."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        value: Tensor = getattr(module, leaf)
        return value.detach()

    def put(self, name: str, value: Tensor) -> None:
        """Set one parameter or buffer of the skeleton."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        elif isinstance(value, nn.Parameter):
            module._parameters[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    # How.

    def _dtype(self) -> torch.dtype:
        """The dtype of the config, or else of the first tensor on disk."""
        dtype = getattr(self.config, "dtype", None)
        if dtype is None:
            with opened(self.files[0]) as file:
                dtype = file.get_tensor(next(iter(file.keys()))).dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(
                f"{self.name} holds {dtype} weights. Expected float32, bfloat16 or float16: give "
                "the original model, not a quantized one."
            )
        return dtype  # type: ignore[no-any-return]  # config attributes are untyped

    def _plan(self) -> dict[str, list[Piece]]:
        """Which tensors of the checkpoint each parameter is made of, by transformers' mapping."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model) or []
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._converters = {p: c for c in converters for p in c.source_patterns}
        state = self.model.state_dict()
        pieces: dict[str, list[Piece]] = defaultdict(list)
        prefix = self.model.base_model_prefix
        for key in sorted(self.keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = key, None
            if name in state:
                pieces[name].append(Piece(key, pattern))
        made = set(pieces)
        for name, parts in pieces.items():  # one converter may fill several parameters
            if parts[0].pattern is not None:
                targets = self._converters[parts[0].pattern].target_patterns
                made |= {name.replace(targets[0], target) for target in targets}
        wanted = [n for n in self._targets if n not in made]
        if wanted:
            raise CheckpointError(
                f"{self.folder} has no tensor for {len(wanted)} parameters of "
                f"{type(self.model).__name__}, the first {wanted[0]}. A shard is missing or the "
                "config is another model's: fetch the model again."
            )
        self._check_experts(pieces)
        return pieces

    def _check_experts(self, pieces: dict[str, list[Piece]]) -> None:
        """Raise CheckpointError if experts that are apart on disk are not all there."""
        for experts in self.experts.values():
            for name in (f"{experts.path}.gate_up_proj", f"{experts.path}.down_proj"):
                patterns = [str(p.pattern) for p in pieces.get(name, ()) if "*" in str(p.pattern)]
                for pattern in set(patterns):
                    if patterns.count(pattern) != experts.experts:
                        raise CheckpointError(
                            f"{self.folder} has {patterns.count(pattern)} of {experts.experts} "
                            f"experts' {pattern} for {name}. Fetch the model again."
                        )

    def _convert(self, name: str, expert: int | None) -> dict[str, Tensor]:
        """Run the conversion that makes `name`, for all of it or for one expert of it."""
        pieces = self._pieces.get(name) or self._pieces[self._sibling(name)]
        pattern = pieces[0].pattern
        if pattern is None:
            value = self._read(pieces[0].key, expert)
            return {name: self._finish(name, value)}
        converter = deepcopy(self._converters[pattern])
        listed: dict[str | None, list[Piece]] = defaultdict(list)
        for piece in pieces:
            listed[piece.pattern].append(piece)
        for source, parts in listed.items():
            if expert is not None and "*" in str(source):
                parts = [parts[expert]]  # one tensor on disk for each expert
                values = [self._read(parts[0].key, None)]
            else:
                values = [self._read(p.key, expert) for p in parts]
            for part, value in zip(parts, values, strict=True):
                converter.add_tensor(name, part.key, source, lambda value=value: value)
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {
            key: self._finish(key, value[0] if isinstance(value, list) else value)
            for key, value in made.items()
        }

    def _sibling(self, name: str) -> str:
        """The first target of the converter that also makes `name`."""
        for first, pieces in self._pieces.items():
            if pieces[0].pattern is not None:
                targets = self._converters[pieces[0].pattern].target_patterns
                if name in {first.replace(targets[0], target) for target in targets[1:]}:
                    return first
        raise CheckpointError(f"{self.folder} has no tensor for {name}. Fetch the model again.")

    def _read(self, key: str, expert: int | None) -> Tensor:
        """A tensor of the checkpoint, or row `expert` of it, copied out of the mapped file."""
        try:
            with opened(self.keys[key]) as file:
                part = file.get_slice(key)
                value = part[...] if expert is None else part[expert : expert + 1]
                return value.clone()  # type: ignore[no-any-return]  # safetensors is untyped
        except SafetensorError as error:
            raise CheckpointError(
                f"Cannot read {key} from {self.keys[key]}: {error}. Fetch the file again."
            ) from error

    def _finish(self, name: str, value: Tensor) -> Tensor:
        if value.is_floating_point():
            if not torch.isfinite(value).all():
                raise NumericalError(
                    f"{name} of {self.folder} contains NaN or infinite weights. Expected finite "
                    "numbers: the file is damaged or the model is broken; fetch it again."
                )
            value = value.to(self.stored_dtype(name))
        return value.to(self.device)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor has in the model and, unpacked, on disk.

        The model's dtype, but float32 for the few modules that transformers keeps there.
        """
        declared = self._targets[name].dtype if name in self._targets else self.dtype
        if not declared.is_floating_point:
            return declared
        keep: set[str] = set(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        if self.dtype == torch.float16:
            keep |= set(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        return torch.float32 if any(part in name.split(".") for part in keep) else self.dtype


def resolve(name: str | Path) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"No model folder {name}. Give a folder with config.json, or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", *COMPANIONS]))
    except Exception as error:  # the hub client raises many kinds: all mean it is not to be had
        raise InputError(
            f"{name} is neither a local folder nor a model that can be fetched "
            f"({type(error).__name__}). Check the name and the network, or give a local folder."
        ) from error


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder, checked to be an original model."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json. Expected a transformers model folder.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method:
        raise InputError(
            f"{folder} is already quantized ({method}). Give the original model's folder."
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to exist and to be whole."""
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged: {error!r}.") from error
        paths = [folder / name for name in sorted(names)]
    elif (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    else:
        raise InputError(
            f"{folder} has neither {SINGLE} nor {INDEX}. Expected weights as safetensors."
        )
    for path in paths:
        if not path.is_file():
            raise CheckpointError(
                f"{INDEX} names {path.name}, which is not in {folder}. Fetch that shard."
            )
        with opened(path):
            pass
    return paths


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file opened for reading; it is unmapped as soon as its tensors are gone."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}. It is truncated or damaged; fetch "
            "it again."
        ) from error


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute with: the model's, but float32 where the CPU has no products for it.

    There a product of 16-bit numbers takes some eight times as long as one of float32.
    """
    native = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    if device.type != "cpu" or dtype not in native:
        return dtype
    asks = (getattr(torch.cpu, name, None) for name in native[dtype])
    return dtype if any(ask is not None and ask() for ask in asks) else torch.float32


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The causal LM of a config with its parameters on the meta device, in eval mode."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise InputError(
            f"transformers has no causal LM for model type '{config.model_type}': {error}"
        ) from error
    return model.eval()
