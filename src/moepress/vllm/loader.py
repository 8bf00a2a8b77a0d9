"""vLLM's default model loader, with a path of its own for compressed folders."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import extract_layer_index

from moepress.errors import InputError
from moepress.format.checkpoint import QUANT_METHOD
from moepress.hf.agreement import stored_tensors
from moepress.hf.files import check_written
from moepress.kernels.modules import PackedExperts
from moepress.prune import Pruning
from moepress.vllm.experts import Thresholds, give_experts
from moepress.vllm.heads import mend_heads
from moepress.vllm.limits import check_layers, check_ranks
from moepress.vllm.linears import LinearMethod
from moepress.vllm.placement import Ranks, calibration_tokens, divide
from moepress.vllm.rotary import mend_rotary
from moepress.vllm.routers import mend_routers, take_biases
from moepress.vllm.stored import StoredModel
from moepress.vllm.windows import Window

LOAD_FORMATS = ("auto", "hf", "safetensors")  # under which a folder may be opened

# What vLLM's classes raise for tensors that they have no place for.
_OF_VLLM = (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)

logger = init_logger("vllm.moepress")  # below vLLM's own logger, which has a handler


class Loader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not seen by mypy
    """Loads compressed folders, and all other models as vLLM does."""

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        """vLLM's model without weights.

        Raises:
            InputError: vLLM's class cannot be made from a folder's config.json.
        """
        if model_config.quantization != QUANT_METHOD:
            return super().create_model(vllm_config, model_config, prefix)
        check_ranks(vllm_config)
        try:
            return super().create_model(vllm_config, model_config, prefix)
        except InputError:
            raise
        except _OF_VLLM as error:
            raise InputError(
                f"vLLM cannot make {', '.join(model_config.architectures)} from config.json: "
                f"{type(error).__name__}: {error}. It cannot run this model here, or wants a field "
                "that the original's config.json had not; `moepress serve` can serve it."
            ) from error

    def load_weights(self, model: Any, model_config: Any) -> None:
        if model_config.quantization != QUANT_METHOD:
            super().load_weights(model, model_config)
            return
        begin = time.perf_counter()
        folder, files, _, _ = self._prepare_weights(
            model_config.model, None, model_config.revision, False, ["*.safetensors"]
        )
        files = _of_model(files)
        check_written(files, stored_tensors(files))
        stored = StoredModel(Path(folder), model_config.dtype, model_config.trust_remote_code)
        check_layers(model, stored.own)
        mend_routers(model)
        mend_rotary(model)
        mend_heads(model)
        _take_embeddings(model)
        _load(model, stored.tensors(files))
        _give_all_experts(model, stored, _pruning(model_config), calibration_tokens(Path(folder)))
        logger.info("Loading packed weights took %.2f seconds", time.perf_counter() - begin)


def register_loader() -> None:
    """Put `Loader` in place of vLLM's default one. Safe to repeat."""
    log = logging.getLogger("vllm.model_executor.model_loader")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of each format that is registered again
    try:
        for load_format in LOAD_FORMATS:
            register_model_loader(load_format)(Loader)
    finally:
        log.setLevel(level)


def _load(model: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Let vLLM's class load all tensors but those of routed experts.

    Raises:
        InputError: it does not find its tensors, or has no place for one.
    """
    biases: set[str] = set()
    try:
        loaded = model.load_weights(take_biases(model, tensors, biases))
    except InputError:
        raise
    except _OF_VLLM as error:
        raise InputError(
            f"vLLM's {type(model).__name__} cannot load this folder: {type(error).__name__}: "
            f"{error}. Its tensors are not those that vLLM expects of such a model; `moepress "
            "serve` can serve it."
        ) from error
    if loaded is not None:
        _check_loaded(model, {*loaded, *biases})


def _check_loaded(model: nn.Module, loaded: Collection[str]) -> None:
    """Raise InputError for a plain weight that no tensor was loaded to: it would hold any numbers.

    Packed ones are checked when they are cut (linears.py).
    """
    named = list(model.named_parameters(remove_duplicate=False))  # a gate may have two names
    full = {id(value) for name, value in named if name in loaded}
    missing = sorted(
        name
        for name, value in named
        if id(value) not in full and not isinstance(value, Window) and not _not_used(model, name)
    )
    if missing:
        raise InputError(
            f"vLLM's {type(model).__name__} wants weights that the folder has not, such as "
            f"{missing[0]}. `moepress serve` can serve it."
        )


def _not_used(model: nn.Module, name: str) -> bool:
    """Whether a weight is one that vLLM's class has and never reads.

    A.X K1: the norm after the experts, in dense layers. transformers' class has it in the others.
    """
    layer, _, leaf = name.partition(".post_mlp_layernorm.")
    return leaf != "" and getattr(model.get_submodule(layer), "is_layer_sparse", None) is False


def _of_model(files: list[str]) -> list[str]:
    """The files with weights: not those that describe how the folder was made."""
    return sorted(path for path in files if not Path(path).name.startswith("moepress_"))


def _take_embeddings(model: nn.Module) -> None:
    """Give embeddings our method, also where vLLM's class does not ask the config for one."""
    taken: dict[int, Any] = {}
    module: Any
    for module in model.modules():
        if not isinstance(module, VocabParallelEmbedding):
            continue
        if type(module.quant_method) is not UnquantizedEmbeddingMethod:
            continue
        weight = module.weight
        attributes = {"weight_loader": module.weight_loader}
        module.quant_method = LinearMethod()
        module.use_fused_embedding = False
        with weight.device:
            module.quant_method.create_weights(
                module,
                module.input_size_per_partition,
                module.output_partition_sizes,
                module.input_size,
                module.output_size,
                module.params_dtype,
                **attributes,
            )
        if id(weight) in taken:
            module.quant_method.tie_weights(module, taken[id(weight)])
        taken[id(weight)] = module


def _pruning(model_config: Any) -> Pruning | None:
    fields = model_config.hf_config.quantization_config.get("pruning")
    return None if fields is None else Pruning.from_json(fields)


def _give_all_experts(
    model: nn.Module,
    stored: StoredModel,
    pruning: Pruning | None,
    tokens: Mapping[int, Sequence[int]],
) -> None:
    """Give each layer of routed experts those of the decoder layer with its number.

    A rank of a pipeline has some layers only, perhaps none with experts.

    Raises:
        InputError: vLLM has no such layer, or the folder has not.
    """
    layers = {
        extract_layer_index(module.layer_name): module
        for module in model.modules()
        if isinstance(module, RoutedExperts)
    }
    a_part = get_pp_group().world_size > 1 and layers.keys() <= stored.experts.keys()
    if not a_part and layers.keys() != stored.experts.keys():
        raise InputError(
            f"{type(model).__name__} of vLLM has routed experts in layers {sorted(layers)}, the "
            f"folder in layers {sorted(stored.experts)}. vLLM cannot serve this model from a "
            "compressed folder; `moepress serve` can."
        )
    if pruning is not None:
        pruning.check_layers(stored.experts.keys(), type(stored.own).__name__)
    for number, layer in layers.items():
        packed = stored.experts[number]
        unset = [name for name, value in packed.named_parameters() if value.is_meta]
        if unset:
            raise InputError(
                f"The folder has no {unset[0]} of the experts of layer {number}. A file is missing."
            )
        pruned = _thresholds(packed, pruning, number)  # it must see all experts of the folder
        divide(packed, Ranks.of(layer), tokens.get(number))
        give_experts(layer, packed, pruned)


def _thresholds(packed: PackedExperts, pruning: Pruning | None, layer: int) -> Thresholds | None:
    ratios = () if pruning is None else pruning.thresholds.get(layer, ())
    if pruning is None or not any(ratios):
        return None
    return Thresholds(tuple(ratios), pruning.renormalise, packed.left_out, packed.num_experts)
