"""The transformers class of a model, and an instance of it without weights.

A composite is a model that reads images or sound beside text: a language model, towers for the
other inputs, and projectors between them. Its config.json names the composite, and the compressed
folder opens as the composite too. So the class is the one that transformers' auto mappings give to
the config, the composite's before the causal LM's, unless `architectures` names the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moepress.blocks import adapt
from moepress.errors import InputError, MoepressError
from moepress.original.remote_code import config_of, is_remote, one_line
from moepress.original.settings import with_plain_outputs

ADAPTER = "adapter_config.json"  # of PEFT
# Modules are made one by one and moved to the meta device when they are complete. A single tensor
# of this many bytes may not fit in memory, so it is made there.
LARGE = 1 << 28
PARAMETERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
TABLES = (torch.arange, torch.linspace, torch.eye)  # which buffers are made of


def auto_class(config: Any) -> Any:
    """The auto class of transformers that opens a model folder with this config.

    Raises:
        InputError: there is none for models that write text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    autos = (AutoModelForMultimodalLM, AutoModelForCausalLM)
    if is_remote(config):  # its config.json names the auto classes that know it
        named_there = getattr(config, "auto_map", None) or {}
        return next((a for a in autos if a.__name__ in named_there), AutoModelForCausalLM)
    fitting = [auto for auto in autos if type(config) in auto._model_mapping]
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(
            "config.json has architectures that are no names of classes. Expected an array of "
            "strings: fetch the config again."
        )
    for auto in fitting:
        if _class_names(auto, config) & set(named):
            return auto
    if not fitting:
        raise InputError(
            f"transformers has no causal LM for model type '{config.model_type}', and no "
            "multimodal one. Expected a Mixture-of-Experts model that writes text."
        )
    return fitting[0]


def _class_names(auto: Any, config: Any) -> set[str]:
    """Names of the classes that an auto class has for a config."""
    found = auto._model_mapping[type(config)]
    return {one.__name__ for one in (found if isinstance(found, list | tuple) else (found,))}


def text_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The config of the language model of a folder, original or compressed."""
    return config_of(folder, trust_remote_code).get_text_config()


def open_folder(folder: Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """A model folder opened by `auto_class`.

    Args:
        trust_remote_code: run code in the folder, if transformers has no class for the model.
        options: of `from_pretrained`.
    """
    config = with_plain_outputs(config_of(folder, trust_remote_code))
    remote = is_remote(config)
    return auto_class(config).from_pretrained(
        folder, config=config, trust_remote_code=remote, **options
    )


def open_original(folder: Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """An original opened by `open_folder`, the model that `Source` reads.

    Args:
        options: of `from_pretrained`.

    Raises:
        InputError: transformers would put an adapter on it that lies in the folder.
    """
    from transformers.utils import is_peft_available

    if is_peft_available() and (folder / ADAPTER).exists():
        raise InputError(
            f"{folder} has an adapter beside the model ({ADAPTER}). transformers would put it on "
            "the model; moepress compresses and measures the model without it. Merge the adapter, "
            "or move its files out of the folder."
        )
    return open_folder(folder, trust_remote_code, **options)


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config with its parameters on the meta device, in eval mode.

    Raises:
        InputError: transformers has no model that writes text for this config.
    """
    from accelerate import init_empty_weights

    auto = auto_class(with_plain_outputs(config))
    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            model = auto.from_config(config, dtype=dtype, trust_remote_code=is_remote(config))
    except MoepressError:
        raise
    except Exception as error:  # the model's own code, which may raise anything
        raise InputError(
            f"transformers cannot make the model of type '{config.model_type}' as config.json "
            f"describes it: {one_line(error)}. Fetch the config again."
        ) from error
    adapt(model)
    return model.eval()


def put_tensor(model: Any, name: str, value: Tensor) -> None:
    """Set one parameter or buffer of a skeleton."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    elif isinstance(value, nn.Parameter):
        module._parameters[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def buffers_to(device: torch.device, root: nn.Module) -> None:
    """Move the buffers of a module that are not on the meta device, in place."""
    for module in root.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)


class _LargeOnMeta(TorchFunctionMode):
    """Inside the `with` statement, large tensors that a model makes take no memory.

    Parameters are made on the meta device. Nothing else in a model is as large, unless its config
    is damaged: a table of positions, for example.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (*PARAMETERS, *TABLES):
            return func(*args, **kwargs)
        tried: Tensor = func(*args, **{**kwargs, "device": "meta"})
        if tried.nbytes < LARGE:
            return func(*args, **kwargs)
        if func in TABLES:
            raise InputError(
                f"config.json asks for a table of {tried.nbytes:,} bytes that is no weight. "
                f"Expected less than {LARGE:,}: it is damaged or was edited; fetch it again."
            )
        return tried
