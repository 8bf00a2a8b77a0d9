"""The tensors of a compressed folder as vLLM's model classes want them.

A folder names its tensors by transformers' class. vLLM's classes read the names of the original's
files: transformers' own conversion mapping, run backwards, gives these. Packed linears take part as
windows (windows.py); experts go to their layers directly, by the number of the decoder layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moepress.errors import InputError
from moepress.format.codec import PackedSpec
from moepress.format.quantization import packed_specs
from moepress.hf.packing import pack_modules
from moepress.kernels.modules import PackedExperts
from moepress.original.architectures import find_experts
from moepress.original.sizes import unpacked_model
from moepress.vllm.windows import Stored, Window


class StoredModel:
    """A compressed folder, read file by file.

    Args:
        folder: of config.json.
        dtype: of plain weights.
        trust_remote_code: run code in the folder, where transformers has no class for it.

    Attributes:
        own: the model of transformers' class, on the meta device but for packed experts.

    Raises:
        InputError: transformers has no class for the model, or its experts are not packed.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> None:
        self._dtype = dtype
        self._specs = packed_specs(folder)
        self.own = unpacked_model(folder, trust_remote_code)
        self._shapes = {name: value.shape for name, value in self.own.named_parameters()}
        found = find_experts(self.own)
        own = {name for one in found.values() for name in one.parameters}
        missing = sorted(own - self._specs.keys())
        if missing:
            raise InputError(f"{missing[0]} is not packed. vLLM can serve packed experts only.")
        with torch.device("meta"):
            pack_modules(self.own, {name: self._specs[name] for name in own})
        self._experts = {f"{one.path}.": number for number, one in found.items()}
        self.experts: Mapping[int, PackedExperts] = {
            number: self.own.get_submodule(one.path) for number, one in found.items()
        }

    def tensors(self, files: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by the names in the original's files; experts are kept in `experts`.

        Args:
            files: paths of safetensors files.
        """
        from transformers.core_model_loading import revert_weight_conversion

        state: dict[str, Tensor] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                    value = file.get_tensor(name)
                    if not self._keep_of_experts(name, value):
                        state[name] = self._window(name, value)
        # Of all files at once: one of the original's tensors may be made of several of these.
        yield from revert_weight_conversion(self.own, state).items()

    def _keep_of_experts(self, name: str, value: Tensor) -> bool:
        """Put a tensor of the routed experts into their module; False: it is none."""
        prefix = next((prefix for prefix in self._experts if name.startswith(prefix)), None)
        if prefix is None:
            return False
        owner, _, leaf = name.removeprefix(prefix).rpartition(".")
        module: nn.Module = self.experts[self._experts[prefix]].get_submodule(owner)
        expected = module.get_parameter(leaf)
        if expected.shape != value.shape:
            raise InputError(
                f"{name} is {list(value.shape)}; config.json describes {list(expected.shape)}. "
                "The files do not belong together: copy the folder again."
            )
        value = value.to(self._dtype) if value.is_floating_point() else value
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        return True

    def _window(self, name: str, value: Tensor) -> Tensor:
        spec = self._specs.get(name)
        if spec is None:
            return value
        return Window(self._stored(name, value, spec))

    def _stored(self, name: str, value: Tensor, spec: PackedSpec) -> Stored:
        if name not in self._shapes:
            raise InputError(
                f"config.json packs {name}, which {type(self.own).__name__} has not. The file "
                "is damaged or belongs to another model: copy the folder again."
            )
        rows, cols = self._shapes[name]
        (codec,) = spec.codecs
        expected = [codec.nbytes(rows, cols)]
        if list(value.shape) != expected:
            raise InputError(
                f"{name} is {list(value.shape)}; config.json describes {expected}. The files do "
                "not belong together: copy the folder again."
            )
        return Stored(name, value, rows, cols, codec, self._dtype)
