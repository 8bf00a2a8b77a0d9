"""A loaded model, made ready to be served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from moepress.errors import InputError
from moepress.generation import ENDS, checked_settings, context_of
from moepress.memory import free_host_memory
from moepress.serve.asking import Served
from moepress.serve.calling import Calling
from moepress.serve.engine import Engine
from moepress.serve.grammar import Grammars
from moepress.serve.limits import Limits, fitting_body
from moepress.serve.parsing import Parser, answer_template
from moepress.serve.prompts import Prompts
from moepress.serve.sampling import Settings
from moepress.serve.stepping import Stepper
from moepress.store.statistics import store_of

CACHE_SHARE = 0.5  # of the memory that weights leave free, for keys and values
LEAST_SHARE = 0.125  # of all free memory: weights that do not fit come from the disk in any case
IMAGE_SHARE = 0.2  # of the machine's memory that is free after loading, for images that wait
UNLIMITED = 1 << 17  # context of a model whose config says nothing


def opened(
    model: Any, folder: Path, name: str, limits: Limits, remote: bool, reuse: bool = True
) -> Served:
    """The model of a folder with its engine, which is not started yet.

    Args:
        folder: of the model.
        remote: whether the folder's code may run.
        model, name, limits, reuse: of `served_by`.

    Raises:
        InputError: the context asked for is longer than what the model reads.
    """
    return served_by(model, processor_of(folder, remote), name, limits, reuse)


def served_by(model: Any, processor: Any, name: str, limits: Limits, reuse: bool = True) -> Served:
    """A model with its engine, which is not started yet.

    Args:
        model: of transformers, in eval mode. With a processor of images it may be a composite.
        processor: of texts and images, or a tokenizer.
        name: in requests.
        limits: of the server.

    Raises:
        InputError: the context asked for is longer than what the model reads.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    context = served_context(model, limits.context)
    template = answer_template(processor, model)
    room = int(free_host_memory() * IMAGE_SHARE)
    prompts = Prompts(processor, vocabulary_of(model), context, _calls(template), room)
    if limits.body is None:
        limits = replace(limits, body=fitting_body(context, prompts.sees))
    stepper = Stepper(model)
    ends, cache = ends_of(model, tokenizer), cache_of(model, limits)
    engine = Engine(stepper, tokenizer, ends, limits, cache, reuse=reuse)
    grammars = Grammars(tokenizer, ends, template)
    texts = [tokenizer.decode([end]) for end in ends if end < len(tokenizer)]
    return Served(
        name,
        limits,
        engine,
        prompts,
        Settings.of_folder(model.generation_config),
        None if template is None else lambda text, tools: Parser(template, text, tools),
        grammars,
        Calling(grammars, prompts.past, texts),
    )


def processor_of(folder: Path, remote: bool) -> Any:
    """The folder's processor of texts and images, or its tokenizer.

    Raises:
        InputError: the processor needs a library that is not installed, such as torchvision.
    """
    from transformers import AutoProcessor, AutoTokenizer

    has_images = any(
        (folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    )
    kind = AutoProcessor if has_images else AutoTokenizer
    try:
        return kind.from_pretrained(folder, trust_remote_code=remote)
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder} has a processor that cannot be opened: {reason}") from error


def served_context(model: Any, wanted: int | None) -> int:
    """Tokens of the longest prompt with its answer.

    Raises:
        InputError: the model reads fewer than wanted.
    """
    reads = context_of(model.config.get_text_config(decoder=True))
    if wanted is not None and reads is not None and wanted > reads:
        raise InputError(
            f"context is {wanted}. The model reads {reads} tokens (max_position_embeddings): "
            "choose a smaller --context."
        )
    return wanted or reads or UNLIMITED


def vocabulary_of(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, as `generate` has them, else the tokenizer's.

    A stop string that is a special token is one of them: it is no part of the text.

    Raises:
        FileError: a setting of generation_config.json is of a wrong type or out of range.
    """
    found = checked_settings(model.generation_config, ENDS).get("eos_token_id")
    if found is None:
        found = tokenizer.eos_token_id
    texts = Settings.of_folder(model.generation_config).stop
    special = [
        number
        for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special and token.content in texts
    ]
    return [*([found] if isinstance(found, int) else found or ()), *special]


def cache_of(model: Any, limits: Limits) -> int:
    """Bytes that keys and values may take."""
    if limits.cache is not None:
        return limits.cache
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] * CACHE_SHARE)
    free = free_host_memory()
    return int(max((free - weights_to_come(model)) * CACHE_SHARE, free * LEAST_SHARE))


def weights_to_come(model: Any) -> int:
    """Bytes of weights that the system still calls free memory.

    These are mapped files, whose pages it may drop at a price, and experts that a store will hold.
    """
    store = store_of(model)
    if store is not None:
        return int(store.budget - store.counts().bytes_held)
    weights = sum(
        x.nbytes for x in (*model.parameters(), *model.buffers()) if x.device.type == "cpu"
    )
    used = psutil.Process().memory_info()
    own = used.rss - getattr(used, "shared", 0)  # not backed by files; Linux alone says
    return int(max(0, weights - own))


def _calls(template: Any) -> bool:
    """Whether an answer's template has a place for calls of tools."""
    return template is not None and "tool_calls" in template.get("fields", {})
