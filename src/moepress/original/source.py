"""The original model, read a tensor at a time.

The skeleton is an instance of transformers' own class on the meta device, without weights. The
weights of one decoder layer, or of one expert, are read from the checkpoint (folder.py), converted
to the parameters of that class (conversion.py), put into the skeleton, and removed again after use.
Nothing larger is ever in memory. A thread reads the files ahead of that (upcoming.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moepress.format.codec import GROUP_SIZES, fitting_group_size
from moepress.original.architectures import Bias, Experts, decoder_layers, find_experts, linear_role
from moepress.original.card_readers import CardReaders, in_use
from moepress.original.checkpoint import Checkpoint
from moepress.original.composite import copied, decoder, is_inside, language_model, other_models
from moepress.original.conversion import Conversion
from moepress.original.dtypes import (
    compute_dtype,
    dtype_of_weights,
    in_float32,
    loaded_dtypes,
    with_dtype,
)
from moepress.original.expert_reading import as_packed, read_expert
from moepress.original.experts import ExpertWeights
from moepress.original.folder import find_weights, fingerprint, read_config, resolve
from moepress.original.quantized.config import read_quantization
from moepress.original.remote_code import without_missing_code
from moepress.original.shapes import check_tensors
from moepress.original.skeleton import buffers_to, put_tensor, skeleton
from moepress.original.ties import embedding_and_head, settle, untied_config
from moepress.original.unneeded import check_unneeded
from moepress.original.upcoming import Upcoming
from moepress.original.values import Values
from moepress.reading.config import check_layers, config_fields, known_type


class Source:
    """A Mixture-of-Experts model in a local folder of safetensors, or on the model hub.

    Args:
        name: path of a folder, or a hub id to download (or find in the local cache).
        device: where weights are put when they are loaded.
        trust_remote_code: run code in the model's folder, if transformers has no class for it.

    Raises:
        InputError: no such model, not a Mixture of Experts, or quantized in a way that is not
            read.
        FileError: a file is missing, truncated or does not fit the model or another file, a
            tensor holds codes without scales, or the model would leave out a part of itself.
    """

    checkpoint = Checkpoint({}, None)  # of a source that has no weights, as tools make them

    def __init__(
        self,
        name: str | Path,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.name = str(name)
        self.trust_remote_code = trust_remote_code
        self.folder = resolve(name)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        quantization = read_quantization(self.folder)
        weights = find_weights(self.folder)
        self.files = list(weights.paths)
        self.checkpoint = Checkpoint.of(self.files, quantization, weights.assigned)
        check_layers(self.folder, len(self.checkpoint.names))  # before transformers makes them
        self.config = read_config(self.folder, trust_remote_code)
        self.dtype = dtype_of_weights(self.name, self.config, self.checkpoint.dtype)  # dequantized
        self.compute_dtype = compute_dtype(self.dtype, self.device)
        self.model = skeleton(self.config, self.compute_dtype)
        self.layers = decoder_layers(self.model)
        self.experts: dict[int, Experts] = find_experts(self.model)
        self._conversion = Conversion.of(self.model, self.folder, self.checkpoint.names)
        self.unused = self._conversion.unused  # tensors that transformers leaves out too
        check_unneeded(
            self.folder, self.model, self.unused, *self._conversion.taken(self.layer_paths)
        )
        self._values = Values(self.folder)
        self.upcoming = Upcoming(self)
        self._ties = settle(self.model, self._conversion.made, self._equal)
        stored = [name for name in self._needed if name not in self._ties.stored_as]
        self._conversion.check(stored, self.experts.values())
        check_tensors(self.checkpoint, self._conversion, self._needed, self._ties.stored_as)

    # Names, shapes and roles of the tensors

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the config, and of the header and samples of the bytes of every file."""
        return fingerprint(self.folder, self.files)

    @cached_property
    def language_model(self) -> Any:
        """The part of the skeleton that reads token ids and returns logits, perhaps all of it."""
        return language_model(self.model)

    @property
    def text_config(self) -> Any:
        """The config of the language model: the model's, or a part of a composite's."""
        return decoder(self.model).config

    @property
    def one_layer_of_experts(self) -> Experts:
        """The routed experts of the first layer that has them. All layers have equal shapes."""
        return next(iter(self.experts.values()))

    @property
    def has_common_experts(self) -> bool:
        """Whether the experts of all layers have the form that every format version has."""
        return all(experts.form.common for experts in self.experts.values())

    @property
    def hidden(self) -> int:
        """Size of the states between the layers. That of the experts' inputs may differ."""
        return int(self.config.get_text_config().hidden_size)

    @cached_property
    def layer_paths(self) -> tuple[str, ...]:
        """Module path of each decoder layer, such as "model.layers.3"."""
        return tuple(self._paths[id(layer)] for layer in self.layers)

    @cached_property
    def embedding_and_head(self) -> dict[str, tuple[str, ...]]:
        """Roles, "embedding" or "head", by parameter name. A tied tensor has both."""
        return embedding_and_head(self.language_model, self._paths, self._needed)

    @cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in self.model.named_modules()}

    def names(self, prefix: str | None = None) -> list[str]:
        """Names of parameters and persistent buffers, except routed experts, in the model's order.

        Args:
            prefix: a decoder layer's path; None: everything of the language model that is outside
                the decoder layers.
        """
        layers = tuple(path + "." for path in self.layer_paths)
        return [
            name
            for name in self._needed
            if name not in self._expert_names
            and (
                name.startswith(prefix + ".")
                if prefix
                else not name.startswith(layers) and name not in self.copied
            )
        ]

    @cached_property
    def copied(self) -> dict[str, torch.dtype]:
        """Dtypes on disk, by name, of a composite's tensors outside its language model.

        They are stored unchanged.
        """
        return {
            name: self.checkpoint.dtype_of(key) or self.dtype
            for name in copied(self.model)
            if name in self._needed
            for key in self._conversion.sources(name)[:1]
        }

    @cached_property
    def all_names(self) -> tuple[str, ...]:
        """Names of all tensors except routed experts.

        First those outside the layers, then layer by layer, then those that are copied.
        """
        read = (name for prefix in (None, *self.layer_paths) for name in self.names(prefix))
        return (*read, *self.copied)

    @cached_property
    def _beside(self) -> tuple[str, ...]:
        """Names of copied tensors that are loaded for a text: all that are in no other model."""
        others = other_models(self.model)
        return tuple(name for name in self.copied if not is_inside(name, others))

    @cached_property
    def packable(self) -> tuple[Mapping[str, nn.Linear], ...]:
        """The linears of each decoder layer that can be packed, by parameter name."""
        return tuple(
            {
                f"{self.layer_paths[index]}.{path}.weight": module
                for path, module in layer.named_modules()
                if type(module) is nn.Linear
                and module.weight.numel()  # none in Granite without shared experts
                and linear_role(path, index in self.experts) is not None
                and self.has_models_dtype(f"{self.layer_paths[index]}.{path}.weight")
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
        return {name for experts in self.experts.values() for name in experts.matrix_names}

    @cached_property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    @cached_property
    def _needed(self) -> dict[str, Tensor]:
        """Every tensor that the checkpoint must provide; a tied one only once."""
        state = self.model.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if name not in self._ties.tied}

    def shape(self, name: str) -> torch.Size:
        return self._needed[name].shape

    def nbytes(self, name: str) -> int:
        """Stored bytes of a tensor that is not packed. Biases of experts are padded."""
        shape, bias = self.shape(name), self._expert_biases.get(name)
        count = shape.numel() if bias is None else shape[0] * bias.parts * bias.rows
        return count * self.stored_dtype(name).itemsize

    @cached_property
    def _expert_biases(self) -> dict[str, Bias]:
        return {k: v for experts in self.experts.values() for k, v in experts.biases.items()}

    def keys_of(self, name: str) -> list[str]:
        """Names in the checkpoint of what a parameter is made of, routed experts included.

        Those of parameters that one converter makes together belong to the first of them.
        """
        return [piece.key for piece in self._conversion.pieces.get(name, ())]

    def reads(self, name: str, expert: int | None) -> list[tuple[str, int | None]]:
        """Names in the checkpoint, each with a row or None for all, that a parameter is read from.

        Args:
            expert: only what the parameter has of this routed expert; None: all of it.
        """
        stored = self._ties.stored_as.get(name, name)
        return [(piece.key, row) for piece, row in self._conversion.reads(stored, expert)]

    def module(self, name: str) -> nn.Module:
        """The module of the skeleton that owns the weight of this name."""
        module: nn.Module = self.model.get_submodule(name.removesuffix(".weight"))
        return module

    def config_json(self) -> dict[str, Any]:
        """The fields of config.json; they say of tied parameters what the checkpoint says.

        They name the model's dtype. Classes whose code is not in the folder are left out.
        """
        read = without_missing_code(self.folder, known_type(config_fields(self.folder)))
        named = with_dtype(read, self.dtype)
        return untied_config(named) if self._ties.untied else named

    # Reading tensors, and putting them into the skeleton

    def tensor(self, name: str) -> Tensor:
        """One parameter or buffer that is not a routed expert, on the device."""
        stored = self._ties.stored_as.get(name, name)
        return self._converted(stored, None)[stored]

    def expert(self, layer: int, index: int) -> ExpertWeights:
        """The weights of expert `index` of a decoder layer; no other expert is read.

        Raises:
            FileError: their shapes are not those of the config.
        """
        return read_expert(self.experts[layer], index, self._rows).map(self._for_computing)

    def _rows(self, name: str, index: int, rows: int) -> Tensor:
        """What a parameter has of expert `index`: `rows` entries of its first dimension."""
        return self._converted(name, index, rows)[name]

    def as_packed(self, layer: int, name: str, value: Tensor) -> Tensor:
        """A layer's tensor that is not packed, as the packed modules expect it."""
        return as_packed(self.experts.get(layer), name, value)

    def fused(self, name: str) -> Tensor:
        """A parameter of all routed experts of a layer, in the dtype of the computation."""
        return self._for_computing(self._converted(name, None)[name])

    def experts_in_turn(self, layer: int, numbers: Sequence[int]) -> Iterator[ExpertWeights]:
        """`expert` for each of `numbers`. A card gets the next ones while one is in use."""
        self.upcoming.experts(layer, numbers)
        if self.device.type != "cuda":
            yield from (self.expert(layer, number) for number in numbers)
            return
        yield from map(partial(in_use, device=self.device), self.experts_to_card(layer, numbers))

    def experts_to_card(self, layer: int, numbers: Sequence[int]) -> Iterator[ExpertWeights]:
        """`experts_in_turn` for a card, of files that are being read already; `in_use` is left."""
        return self._readers.in_turn(partial(self.expert, layer), numbers)

    @cached_property
    def _readers(self) -> CardReaders:
        return CardReaders(self.device)

    @contextmanager
    def loaded(self, prefix: str | None) -> Iterator[None]:
        """Inside the `with` statement, the skeleton holds the tensors `names(prefix)`."""
        self.load(prefix)
        try:
            yield
        finally:
            self.unload(prefix)

    @contextmanager
    def layer_loaded(self, layer: int, following: int | None = None) -> Iterator[None]:
        """`loaded` for a decoder layer. Its routed experts stay on disk.

        Args:
            following: the layer that is needed next; None: the one after it.
        """
        self.upcoming.layer(layer, layer + 1 if following is None else following)
        with self.loaded(self.layer_paths[layer]):
            yield

    def load(self, prefix: str | None) -> None:
        """Put the tensors `names(prefix)` into the skeleton; move its buffers to the device.

        Outside the layers also small parts of a composite, such as projectors.
        """
        names = (*self.names(prefix), *(() if prefix else self._beside))
        if prefix is None:
            self.upcoming.tensors(names, "the tensors outside the layers")
        for name in names:
            self.put(name, self._for_computing(self.tensor(name)))
        buffers_to(self.device, self.model.get_submodule(prefix) if prefix else self.model)
        self.model.tie_weights()

    def unload(self, prefix: str | None) -> None:
        """Put meta tensors back in place of what `load(prefix)` has put there."""
        for name in (*self.names(prefix), *(() if prefix else self._beside)):
            self.put(name, self._needed[name])
        self.model.tie_weights()

    def current(self, name: str) -> Tensor:
        """The tensor that the skeleton holds now."""
        path, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self.model.get_submodule(path), leaf)
        return value.detach()

    def put(self, name: str, value: Tensor) -> None:
        """Set one parameter or buffer of the skeleton."""
        put_tensor(self.model, name, value)

    # Conversion, checks and dtypes

    def _for_computing(self, value: Tensor) -> Tensor:
        """A tensor of the model's dtype, cast to the dtype of the computation; others unchanged."""
        return value.to(self.compute_dtype) if value.dtype == self.dtype else value

    def _converted(self, name: str, expert: int | None, rows: int = 1) -> dict[str, Tensor]:
        """The parameter `name`, or one expert's rows, and others that its converter makes."""
        made = self._conversion.convert(name, expert, partial(self._read, rows=rows))
        return {key: self._finished(key, value) for key, value in made.items()}

    def _read(self, key: str, expert: int | None, rows: int = 1) -> Tensor:
        """A tensor of the checkpoint, or the rows of an expert, dequantized, on the device."""
        self.upcoming.wait_for((key, expert))
        return self.checkpoint.read(key, expert, self.dtype, self.device, rows)

    def _equal(self, *names: str) -> bool:
        """Whether two parameters are equal in the checkpoint."""
        first, second = (self._conversion.convert(n, None, self._read)[n] for n in names)
        return torch.equal(first.to(self.dtype), second.to(self.dtype))

    def _finished(self, name: str, value: Tensor) -> Tensor:
        """A converted tensor, checked to be finite, in its stored dtype, on the device."""
        if not value.is_floating_point():
            return value.to(self.device)
        stored = value.to(self.stored_dtype(name))
        if name not in self.copied:
            self._values.check(name, value, stored)
        elif name in self._parameters:  # copied buffers may be infinite: masks are
            self._values.check(name, value, stored.to(self.dtype))  # as transformers opens them
        return stored.to(self.device)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the model and, if it is not packed, in a compressed folder.

        It is the one that transformers loads it in: the model's, or float32 for a few. Copied
        tensors keep the dtype that they have on disk.
        """
        return self.copied.get(name) or self._loaded_dtypes.get(name, self.dtype)

    def has_models_dtype(self, name: str) -> bool:
        """Whether a weight can be packed: models cast states to the dtype of one in float32."""
        if in_float32(self.model, self.dtype, name):
            return False
        return self.stored_dtype(name) == self.dtype

    @cached_property
    def _loaded_dtypes(self) -> dict[str, torch.dtype]:
        same = self.compute_dtype == self.dtype
        model = self.model if same else skeleton(self.config, self.dtype)
        return loaded_dtypes(model, self.dtype)
