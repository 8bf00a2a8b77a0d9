"""transformers loads our folders: `AutoModelForCausalLM.from_pretrained(folder)`.

transformers reads `quantization_config` from config.json, finds `MoePressQuantizer` by its method
name, builds the model's native class on the meta device, and lets the quantizer exchange modules
before any weight is read. From there on the packed parameters are parameters like any other:
sharding, device maps, offloading and `save_pretrained` need nothing from us, and on the CPU the
bytes stay mapped from the files.

Wrong folders are refused before weights are read: transformers would fill what it misses with
random numbers and go on with a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import FORMAT_VERSION, QUANT_METHOD
from moepress.format.codec import PackedSpec
from moepress.kernels.modules import PackedEmbedding, PackedExperts, PackedLinear
from moepress.kernels.reference import ACTIVATIONS
from moepress.original.architectures import check_supported, is_experts
from moepress.prune import Pruning, prune

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


class MoePressConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The `quantization_config` of a compressed folder's config.json (docs/format.md).

    Args:
        modules: parameter path to {"bits": one digit per matrix, "group_size": G}, and "family"
            where it is not "int".
        format_version: of the byte layout.
        provenance: how the folder was made; carried along, never read.
        pruning: which experts tokens skip whenever the model runs (`Pruning.to_json`); None: none.
        quant_method: "moepress".

    Raises:
        InputError: a newer format, or fields that are not of this format.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, str | int]],
        format_version: int = FORMAT_VERSION,
        provenance: Mapping[str, Any] | None = None,
        pruning: Mapping[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise InputError(f"quant_method is '{quant_method}', expected '{QUANT_METHOD}'.")
        if format_version > FORMAT_VERSION:
            raise InputError(
                f"This model has format version {format_version}; this moepress reads up to "
                f"{FORMAT_VERSION}. Upgrade moepress."
            )
        if unknown:
            raise InputError(
                f"quantization_config of config.json has unknown fields {sorted(unknown)}. The "
                "file is damaged or was edited: restore it."
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = {path: dict(fields) for path, fields in modules.items()}
        self.provenance = dict(provenance or {})
        self.specs()  # refuses damaged entries
        if pruning is not None:  # no field where there is none: older files stay as they are
            self.pruning = Pruning.from_json(pruning).to_json()

    def specs(self) -> dict[str, PackedSpec]:
        """How each packed parameter is stored, by parameter path."""
        return {path: _spec(path, fields) for path, fields in self.modules.items()}


class MoePressQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Exchanges the modules of a model on the meta device for packed ones."""

    requires_calibration = True  # loads packed models; `moepress compress` makes them

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        is_bare = model.base_model is model  # AutoModel: no head, and paths without the prefix
        prefix = f"{model.base_model_prefix}." if is_bare else ""
        given: dict[str, PackedSpec] = self.quantization_config.specs()
        here = {p.removeprefix(prefix): s for p, s in given.items() if p.startswith(prefix)}
        specs = with_tied(model, here)
        pack_modules(model, specs)
        if checkpoint_files is not None:
            stored = specs.keys() - model.all_tied_weights_keys.keys()  # tied: under one name only
            sizes = {prefix + path: model.get_parameter(path).numel() for path in sorted(stored)}
            check_files(checkpoint_files, sizes)
            read_ahead(checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        pruning = getattr(self.quantization_config, "pruning", None)
        if pruning is not None:
            prune(model, Pruning.from_json(pruning))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know `quant_method: moepress`. Safe to repeat."""
    from transformers.quantizers import auto

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(MoePressConfig)
        auto.register_quantizer(QUANT_METHOD)(MoePressQuantizer)


def with_tied(model: Any, specs: Mapping[str, PackedSpec]) -> dict[str, PackedSpec]:
    """Adds the parameters that share a packed parameter: the head with the embedding's table.

    Raises:
        InputError: both are given, and differ.
    """
    tied = dict(specs)
    for pair in model.all_tied_weights_keys.items():
        given = [tied[path] for path in pair if path in tied]
        if len(set(given)) > 1:
            raise InputError(
                f"{' and '.join(pair)} are one tensor (tied), but config.json packs them "
                f"differently: {[spec.to_json() for spec in given]}. The file is damaged."
            )
        if given:
            tied.update(dict.fromkeys(pair, given[0]))
    return tied


def pack_modules(model: nn.Module, specs: Mapping[str, PackedSpec]) -> None:
    """Exchange the modules that own the parameters of `specs` for packed ones, weights unset.

    Raises:
        InputError: no such parameter, or a module that cannot be packed.
    """
    by_module: dict[str, dict[str, PackedSpec]] = {}
    for path, spec in specs.items():
        module, _, name = path.rpartition(".")
        by_module.setdefault(module, {})[name] = spec
    modules = dict(model.named_modules())
    for path, named in by_module.items():
        if path not in modules:
            raise InputError(
                f"config.json packs {path}.{next(iter(named))}, but {type(model).__name__} has no "
                f"module {path}. The file is damaged or belongs to another model."
            )
        try:
            packed = _packed(modules[path], path, named)
        except InputError as error:
            raise InputError(f"Cannot load {path} packed. {error}") from error
        model.set_submodule(path, packed)


def check_files(files: Iterable[str], sizes: Mapping[str, int]) -> None:
    """Compare the headers of safetensors files with what the model expects; read no weights.

    Args:
        files: paths.
        sizes: bytes of each packed parameter, by its name in the files.

    Raises:
        CheckpointError: a file is damaged, or a packed tensor is missing or of another size.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in sizes.keys() & set(file.keys()):
                    tensor = file.get_slice(name)
                    found[name] = tensor.get_dtype(), tensor.get_shape()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Copy it again.") from error
    for name, size in sizes.items():
        if name not in found:
            raise CheckpointError(
                f"Tensor {name} is in none of the model's files. A shard is missing or damaged: "
                "copy the folder again."
            )
        if found[name] != ("U8", [size]):
            raise CheckpointError(
                f"Tensor {name} is {found[name][1]} {found[name][0]}; config.json describes "
                f"[{size}] U8. The files and config.json do not belong together: copy the folder "
                "again."
            )


def read_ahead(files: Iterable[str]) -> threading.Thread | None:
    """Read files once, in order, in the background: they are then in the system's cache.

    Bytes are mapped, not read: without this, the first tokens fetch them page by page, in the order
    of the experts that are chosen, at a fraction of a disk's speed. Files that do not fit in
    free memory are left alone, since reading the last would push out the first.
    """
    paths = [Path(file) for file in files]
    if sum(path.stat().st_size for path in paths) > 0.9 * psutil.virtual_memory().available:
        return None

    def run() -> None:
        buffer = bytearray(8 << 20)
        for path in paths:
            try:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
            except OSError:  # only a help: who needs the bytes will say that they cannot be read
                return

    thread = threading.Thread(target=run, name="moepress-read-ahead", daemon=True)
    thread.start()
    return thread


def activation_name(function: Any) -> str:
    """The name of an activation, found by what it computes.

    Raises:
        InputError: it computes none of `kernels.reference.ACTIVATIONS`.
    """
    near = torch.linspace(-8, 8, 129, dtype=torch.float32, device="cpu")
    probe = torch.cat([near, 1000 * near])  # the far values tell clipped activations apart
    if not (isinstance(function, nn.Module) and any(True for _ in function.parameters())):
        value = function(probe)
        for name, known in ACTIVATIONS.items():
            if torch.allclose(value, known(probe), rtol=1e-5, atol=1e-6):
                return name
    raise InputError(
        f"Its activation is {function}. Expected one that computes the same as one of "
        f"{sorted(ACTIVATIONS)}."
    )


def _spec(path: str, fields: Mapping[str, str | int]) -> PackedSpec:
    try:
        return PackedSpec.from_json(dict(fields))
    except (KeyError, ValueError) as error:  # InputError is a ValueError
        raise InputError(
            f"quantization_config of config.json has {dict(fields)} for {path}. Expected "
            f'{{"bits": one digit per matrix, "group_size": 128}}. {error}'
        ) from error


def _packed(module: nn.Module, path: str, specs: Mapping[str, PackedSpec]) -> nn.Module:
    """The packed module that takes the place of `module`."""
    if is_experts(module):
        return _packed_experts(module, path, specs)
    if specs.keys() != {"weight"} or len(specs["weight"].bits) != 1:
        raise InputError(
            f"It is a {type(module).__name__} with packed {sorted(specs)}. Expected one packed "
            "weight, of one width."
        )
    (codec,) = specs["weight"].codecs
    if type(module) is nn.Embedding and codec.family != "int":
        raise InputError(f"An embedding of {codec.name} cannot be read row by row. Expected int.")
    if type(module) is nn.Linear:  # a subclass may compute something else
        has_bias = module.bias is not None
        return PackedLinear(module.in_features, module.out_features, codec, has_bias)
    if type(module) is nn.Embedding:
        return PackedEmbedding(module.num_embeddings, module.embedding_dim, codec)
    raise InputError(
        f"It is a {type(module).__name__}. Supported: torch.nn.Linear and torch.nn.Embedding "
        "themselves, not subclasses, and transformers' fused experts."
    )


def _packed_experts(module: Any, path: str, specs: Mapping[str, PackedSpec]) -> PackedExperts:
    check_supported(module, path)
    if specs.keys() != set(EXPERT_PARAMETERS):
        raise InputError(
            f"Of these experts {sorted(specs)} is packed. Expected both of "
            f"{list(EXPERT_PARAMETERS)}."
        )
    experts, rows, hidden = module.gate_up_proj.shape
    gate_up, down = (specs[name] for name in EXPERT_PARAMETERS)
    if gate_up.family != down.family:
        raise InputError(
            f"Their codecs are of families '{gate_up.family}' and '{down.family}'. Expected one."
        )
    name = activation_name(module.act_fn)
    return PackedExperts(experts, hidden, rows // 2, gate_up, down, name)


register()  # whoever imports this module first of all, see _plugin.py
