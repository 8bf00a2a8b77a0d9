"""The original model, read a tensor at a time.

The skeleton is an instance of transformers' own class on the meta device, without weights. The
weights of one decoder layer, or of one expert, are read from the checkpoint (folder.py), converted
to the parameters of that class (conversion.py), put into the skeleton, and removed again after use.
Nothing larger is ever in memory.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moepress.errors import CheckpointError, InputError, NumericalError
from moepress.format.checkpoint import load_json
from moepress.format.codec import GROUP_SIZES, fitting_group_size
from moepress.original.architectures import Experts, decoder_layers, find_experts, linear_role
from moepress.original.checkpoint import Checkpoint
from moepress.original.conversion import Conversion
from moepress.original.experts import ExpertWeights
from moepress.original.finite import all_finite
from moepress.original.folder import companions, read_config, resolve, weight_files
from moepress.original.quantized.config import read_quantization
from moepress.original.ties import settle, untied_config

READERS = 4  # threads that read experts for a card; one alone would keep it waiting


class Source:
    """A Mixture-of-Experts model in a local folder of safetensors, or on the model hub.

    Args:
        name: path of a folder, or a hub id to download (or find in the local cache).
        device: where weights are put when they are loaded.

    Raises:
        InputError: no such model, not a Mixture of Experts, or quantized in a way that is not
            read.
        CheckpointError: a file is missing, truncated or does not fit the model, or a tensor
            holds codes without scales.
    """

    checkpoint = Checkpoint({}, None)  # of a source that has no weights, as tools make them

    def __init__(self, name: str | Path, device: str | torch.device = "cpu") -> None:
        self.name = str(name)
        self.folder = resolve(name)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.config = read_config(self.folder)
        self.files = weight_files(self.folder)
        self.checkpoint = Checkpoint.of(self.files, read_quantization(self.folder))
        self.dtype = self._dtype()  # of the weights, dequantized if they are not so on disk
        self.compute_dtype = compute_dtype(self.dtype, self.device)
        self.model = skeleton(self.config, self.compute_dtype)
        self.layers = decoder_layers(self.model)
        self.experts: dict[int, Experts] = find_experts(self.model)
        self._conversion = Conversion.of(self.model, self.folder, self.checkpoint.names)
        self._ties = settle(self.model, self._conversion.made, self._equal)
        stored = [name for name in self._needed if name not in self._ties.stored_as]
        self._conversion.check(stored, self.experts.values())
        floats = (name for name, value in self._needed.items() if value.is_floating_point())
        self.checkpoint.check(key for name in floats for key in self.keys_of(name))

    # Names, shapes and roles of the tensors

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the config, and of the header and samples of the bytes of every file."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in self.files:
            with path.open("rb") as file:
                header = file.read(8)
                digest.update(header + file.read(int.from_bytes(header, "little")))
                # Fine-tunes of one model have equal configs and headers; the samples differ.
                size = path.stat().st_size
                for place in range(16):
                    file.seek(max(0, size * place // 16 - 64))
                    digest.update(file.read(64))
        return digest.hexdigest()[:16]

    @property
    def one_layer_of_experts(self) -> Experts:
        """The routed experts of the first layer that has them. All layers have equal shapes."""
        return next(iter(self.experts.values()))

    @property
    def hidden(self) -> int:
        return self.one_layer_of_experts.hidden

    @cached_property
    def layer_paths(self) -> tuple[str, ...]:
        """Module path of each decoder layer, such as "model.layers.3"."""
        return tuple(self._paths[id(layer)] for layer in self.layers)

    def layer_path(self, index: int) -> str:
        """Module path of one decoder layer."""
        return self.layer_paths[index]

    @cached_property
    def embedding_and_head(self) -> dict[str, tuple[str, ...]]:
        """Roles, "embedding" or "head", by parameter name. A tied tensor has both."""
        embedding, head = (
            f"{self._paths[id(module)]}.weight"
            for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        if head not in self._needed:  # tied: one tensor, stored once
            return {embedding: ("embedding", "head")}
        return {embedding: ("embedding",), head: ("head",)}

    @cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in self.model.named_modules()}

    def names(self, prefix: str | None = None) -> list[str]:
        """Names of parameters and persistent buffers, except routed experts, in the model's order.

        Args:
            prefix: a decoder layer's path; None: everything outside the decoder layers.
        """
        layers = tuple(path + "." for path in self.layer_paths)
        return [
            name
            for name in self._needed
            if name not in self._expert_names
            and (name.startswith(prefix + ".") if prefix else not name.startswith(layers))
        ]

    @cached_property
    def all_names(self) -> tuple[str, ...]:
        """Names of all tensors except routed experts: outside the layers, then layer by layer."""
        return tuple(name for prefix in (None, *self.layer_paths) for name in self.names(prefix))

    @cached_property
    def packable(self) -> tuple[Mapping[str, nn.Linear], ...]:
        """The linears of each decoder layer that can be packed, by parameter name."""
        return tuple(
            {
                f"{self.layer_paths[index]}.{path}.weight": module
                for path, module in layer.named_modules()
                if type(module) is nn.Linear
                and linear_role(path, index in self.experts) is not None
                and fitting_group_size(module.in_features, GROUP_SIZES[0]) is not None
            }
            for index, layer in enumerate(self.layers)
        )

    def role(self, layer: int, name: str) -> str | None:
        """Role of a layer's linear by parameter name, see architectures.ROLES."""
        path = name.removeprefix(self.layer_paths[layer] + ".").removesuffix(".weight")
        return linear_role(path, layer in self.experts)

    @cached_property
    def _expert_names(self) -> set[str]:
        return {name for experts in self.experts.values() for name in experts.parameters}

    @cached_property
    def _needed(self) -> dict[str, Tensor]:
        """Every tensor that the checkpoint must provide; a tied one only once."""
        state = self.model.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if name not in self._ties.tied}

    def shape(self, name: str) -> torch.Size:
        return self._needed[name].shape

    def nbytes(self, name: str) -> int:
        """Stored bytes of a tensor that is not packed."""
        return self.shape(name).numel() * self.stored_dtype(name).itemsize

    def keys_of(self, name: str) -> list[str]:
        """Names in the checkpoint of what a parameter is made of, routed experts included.

        Those of parameters that one converter makes together belong to the first of them.
        """
        return [piece.key for piece in self._conversion.pieces.get(name, ())]

    def module(self, name: str) -> nn.Module:
        """The module of the skeleton that owns the weight of this name."""
        module: nn.Module = self.model.get_submodule(name.removesuffix(".weight"))
        return module

    def config_json(self) -> dict[str, Any]:
        """The fields of config.json; they say of tied parameters what the checkpoint says."""
        read = load_json(self.folder / "config.json")
        return untied_config(read) if self._ties.untied else read

    def companions(self) -> list[Path]:
        """The tokenizer, generation and licence files that a copy of this model needs."""
        return companions(self.folder)

    # Reading tensors, and putting them into the skeleton

    def tensor(self, name: str) -> Tensor:
        """One parameter or buffer that is not a routed expert, on the device."""
        stored = self._ties.stored_as.get(name, name)
        return self._converted(stored, None)[stored]

    def expert(self, layer: int, index: int) -> ExpertWeights:
        """The weights of expert `index` of a decoder layer; no other expert is read.

        Raises:
            CheckpointError: their shapes are not those of the config.
        """
        experts = self.experts[layer]
        gate_up, down = (
            self._converted(name, index)[name].squeeze(0) for name in experts.parameters
        )
        shapes = experts.gate_up_shape, experts.down_shape
        if (tuple(gate_up.shape), tuple(down.shape)) != shapes:
            raise CheckpointError(
                f"Expert {index} of {experts.path} has weights of {tuple(gate_up.shape)} and "
                f"{tuple(down.shape)} in {self.folder}; its config says {shapes[0]} and "
                f"{shapes[1]}. Fetch the model again."
            )
        return ExpertWeights(self._for_computing(gate_up), self._for_computing(down))

    def fused(self, name: str) -> Tensor:
        """A parameter of all routed experts of a layer, in the dtype of the computation."""
        return self._for_computing(self._converted(name, None)[name])

    def experts_in_turn(self, layer: int, numbers: Iterable[int]) -> Iterator[ExpertWeights]:
        """`expert` for each of `numbers`. A card gets the next ones while one is in use."""
        if self.device.type != "cuda":
            yield from (self.expert(layer, number) for number in numbers)
            return

        def read(number: int, stream: torch.cuda.Stream) -> ExpertWeights:
            with torch.cuda.stream(stream):
                weights = self.expert(layer, number)
            stream.synchronize()
            return weights

        with ThreadPoolExecutor(READERS) as pool:
            ahead: deque[Future[ExpertWeights]] = deque()
            for place, number in enumerate(numbers):
                ahead.append(pool.submit(read, number, self._streams[place % READERS]))
                if len(ahead) > READERS:
                    yield self._in_use(ahead.popleft().result())
            while ahead:
                yield self._in_use(ahead.popleft().result())

    @cached_property
    def _streams(self) -> list[torch.cuda.Stream]:
        """Of the readers. They are kept, because freed memory is only used again on its stream."""
        return [
            torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            for _ in range(READERS)
        ]

    def _in_use(self, weights: ExpertWeights) -> ExpertWeights:
        """Weights that were made on another stream: their memory is kept until this one is done."""
        for value in weights:
            value.record_stream(torch.cuda.current_stream(self.device))
        return weights

    @contextmanager
    def loaded(self, prefix: str | None) -> Iterator[None]:
        """Inside the `with` statement, the skeleton holds the tensors `names(prefix)`."""
        self.load(prefix)
        try:
            yield
        finally:
            self.unload(prefix)

    @contextmanager
    def layer_loaded(self, layer: int) -> Iterator[None]:
        """`loaded` for a decoder layer. Its routed experts stay on disk."""
        with self.loaded(self.layer_paths[layer]):
            yield

    def load(self, prefix: str | None) -> None:
        """Put the tensors `names(prefix)` into the skeleton; move its buffers to the device."""
        for name in self.names(prefix):
            self.put(name, self._for_computing(self.tensor(name)))
        root = self.model.get_submodule(prefix) if prefix else self.model
        for module in root.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self.device)
        self.model.tie_weights()

    def unload(self, prefix: str | None) -> None:
        """Put meta tensors back in place of `names(prefix)`."""
        for name in self.names(prefix):
            self.put(name, self._needed[name])
        self.model.tie_weights()

    def current(self, name: str) -> Tensor:
        """The tensor that the skeleton holds now."""
        path, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self.model.get_submodule(path), leaf)
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

    # Conversion, checks and dtypes

    def _for_computing(self, value: Tensor) -> Tensor:
        """A tensor of the model's dtype, cast to the dtype of the computation; others unchanged."""
        return value.to(self.compute_dtype) if value.dtype == self.dtype else value

    def _dtype(self) -> torch.dtype:
        """The dtype of the config, or else of the checkpoint."""
        dtype = getattr(self.config, "dtype", None)
        if dtype is None or dtype.itemsize == 1:  # some configs name the dtype of the codes
            dtype = self.checkpoint.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(
                f"{self.name} holds {dtype} weights. Expected float32, bfloat16 or float16: give "
                "the original model, not a quantized one."
            )
        return dtype

    def _converted(self, name: str, expert: int | None) -> dict[str, Tensor]:
        """The parameter `name`, or one expert's row, and others that its converter makes."""
        made = self._conversion.convert(name, expert, self._read)
        return {key: self._finished(key, value) for key, value in made.items()}

    def _read(self, key: str, expert: int | None) -> Tensor:
        """A tensor of the checkpoint, or row `expert` of it, dequantized, on the device."""
        return self.checkpoint.read(key, expert, self.dtype, self.device)

    def _equal(self, *names: str) -> bool:
        """Whether two parameters are equal in the checkpoint."""
        first, second = (self._conversion.convert(n, None, self._read)[n] for n in names)
        return torch.equal(first, second)

    def _finished(self, name: str, value: Tensor) -> Tensor:
        """A converted tensor, checked to be finite, in its stored dtype, on the device."""
        if value.is_floating_point():
            if not all_finite(value):
                raise NumericalError(
                    f"{name} of {self.folder} contains NaN or infinite weights. Expected finite "
                    "numbers: the file is damaged or the model is broken; fetch it again."
                )
            value = value.to(self.stored_dtype(name))
        return value.to(self.device)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the model and, if it is not packed, in a compressed folder.

        It is the model's dtype, or float32 for the few modules that transformers keeps in float32.
        """
        declared = self._needed[name].dtype if name in self._needed else self.dtype
        if not declared.is_floating_point:
            return declared
        keep: set[str] = set(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        if self.dtype == torch.float16:
            keep |= set(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        return torch.float32 if any(part in name.split(".") for part in keep) else self.dtype


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute with: the model's, or float32 on CPUs without 16-bit products.

    There a product of 16-bit numbers takes about eight times as long (docs/log.md#float32-on-cpus).
    """
    native = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    if device.type != "cpu" or dtype not in native:
        return dtype
    probes = (getattr(torch.cpu, name, None) for name in native[dtype])
    return dtype if any(probe is not None and probe() for probe in probes) else torch.float32


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
