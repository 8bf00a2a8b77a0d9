"""Load compressed folders with transformers: `AutoModelForCausalLM.from_pretrained(folder)`.

transformers reads `quantization_config` from config.json, finds `MoePressQuantizer` by its method
name, and builds the model's native class on the meta device. Before any weight is read, the
quantizer replaces modules by packed ones (packing.py) and checks the files (files.py). After that,
packed parameters are ordinary parameters, which transformers loads and places; on the CPU their
bytes stay memory-mapped. Code of our own has what it does otherwise: experts that stay on disk, or
on the CPU where a card is too small (store/attach.py, devices.py), copies by `save_pretrained`
(saving.py), and questions about sizes (methods.py).

Damaged folders are refused before weights are read: transformers would fill missing parameters
with random numbers and continue with a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from moepress.errors import FileError, InputError, MoepressError
from moepress.format.checkpoint import FORMAT_VERSION, QUANT_METHOD, is_compressed
from moepress.format.codec import PackedSpec
from moepress.format.quantization import Quantization
from moepress.hf.agreement import (
    check_agreement,
    check_sizes,
    places_of,
    stored_tensors,
)
from moepress.hf.devices import device_types, keep_experts_on_cpu, only_device
from moepress.hf.files import check_written, read_ahead
from moepress.hf.grouped_attention import group_queries
from moepress.hf.growing_cache import grow_in_place
from moepress.hf.mend import mend
from moepress.hf.methods import answer_for_packed
from moepress.hf.own_attention import attend_on_card
from moepress.hf.packing import pack_modules, with_tied
from moepress.hf.places import names_only, places_in
from moepress.hf.saving import remember_pruning
from moepress.kernels.modules import PackedExperts, set_activation_bits
from moepress.kernels.prepare import prepare
from moepress.memory import free_memory
from moepress.original.composite import language_model
from moepress.original.remote_code import one_line
from moepress.original.skeleton import open_folder, open_original
from moepress.prune import Pruning, Strength, prune
from moepress.pruning.stored import check_fits
from moepress.store.attach import (
    ExpertFiles,
    OnDisk,
    attach_store,
    divide,
    expert_files,
    leave_on_disk,
)
from moepress.store.memory import (
    Memory,
    card_budget,
    gpu_wanted,
    memory_wanted,
    refuse_bytes,
    wanted,
)

MOST_THREADS = 1024  # OpenMP fails without a message where it cannot start as many as it is told


class MoePressConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The `quantization_config` of a compressed folder's config.json (docs/format.md).

    Args:
        modules: parameter path to {"bits": one width per matrix, "group_size": G}, and "family"
            unless it is "int".
        format_version: version of the byte layout.
        provenance: how the folder was made; kept when the model is saved, otherwise unused.
        pruning: which experts tokens drop whenever the model runs (`Pruning.to_json`); None: none.
        quant_method: "moepress".

    Raises:
        InputError: a format version that cannot be read.
        FileError: a field is unknown, of a wrong type, or has a value that does not exist.
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
        given = {"format_version": format_version, "modules": modules, **unknown}
        checked = Quantization.of(given | {"provenance": provenance or {}}, "this model")
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = {path: dict(fields) for path, fields in modules.items()}
        self.provenance = checked.provenance
        if pruning is not None:  # else no such attribute: config.json of older folders has no field
            self.pruning = Pruning.from_json(pruning).to_json()

    def specs(self) -> dict[str, PackedSpec]:
        """How each packed parameter is stored, by parameter path."""
        fields = {"format_version": self.format_version, "modules": self.modules}
        return Quantization.of(fields, "this model").specs()


class MoePressQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Replace the modules of a model on the meta device by packed ones."""

    requires_calibration = True  # loads packed models; `moepress compress` makes them
    _renamed = False  # whether the model is of another class than the one that was compressed
    _on_disk: OnDisk | None = None  # experts that transformers does not load
    _opening: tuple[Any, ExpertFiles] | None = None  # the model, and where its experts lie

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        answer_for_packed()
        given: dict[str, PackedSpec] = self.quantization_config.specs()
        same_class = type(model).__name__ in (model.config.architectures or ())
        places = places_in(model, given, same_class)
        self._renamed = any(stored != path for stored, path in places.items())
        specs = with_tied(model, {path: given[stored] for stored, path in places.items()})
        pack_modules(model, specs)
        if checkpoint_files is not None:
            stored = stored_tensors(checkpoint_files)
            conversions = get_model_conversion_mapping(model, hf_quantizer=self)
            placed = places_of(model, stored, conversions)
            check_agreement(model, stored, placed, same_class)
            check_written(checkpoint_files, stored)
            names = {path: name for name, path in placed.items()}
            experts = expert_files(model, names, checkpoint_files)
            if experts is None:
                refuse_bytes(type(model).__name__)
            else:
                self._opening = model, experts
                self._on_disk = _left_out(model, experts, kwargs.get("device_map"))
            if self._on_disk is None:
                read_ahead(checkpoint_files)

    def adjust_max_memory(self, max_memory: dict[int | str, Any]) -> dict[int | str, Any]:
        """Called for a device map such as "auto", with bytes by device, once the model is packed.

        Where the model does not fit on the only card, it gets the most used experts, and the others
        run on the CPU. Several cards: accelerate divides the layers.
        """
        cards = [d for d, size in max_memory.items() if d not in ("cpu", "disk") and size > 0]
        if self._opening is None or self._on_disk is not None or len(cards) != 1:
            return max_memory
        model, experts = self._opening
        room, total = int(max_memory[cards[0]]), experts.nbytes + experts.rest
        if room <= experts.rest:  # then accelerate moves whole layers
            return max_memory
        if room < total:
            card = torch.device("cuda", cards[0]) if isinstance(cards[0], int) else cards[0]
            self._on_disk = divide(model, experts, torch.device(card), room - experts.rest)
        return max_memory | {cards[0]: 2 * total}  # no room for layers that come and go is needed

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """The conversions that apply to a compressed folder: at most renamings.

        Its tensors have the form and the names of the class that was compressed. Conversions of
        the original's files could transpose or divide packed bytes.
        """
        return names_only(weight_conversions) if self._renamed else []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._on_disk is not None:
            attach_store(model, self._on_disk)
        self._opening = None
        keep_experts_on_cpu(model)
        for module in model.modules():
            if (
                isinstance(module, PackedExperts)
                and module.stored is None
                and not module.first_proj.is_meta
            ):
                module.place_tables(module.first_proj.device)
        prepare(model)
        mend(model)
        group_queries(model)
        attend_on_card(model)
        grow_in_place(model)
        fields = getattr(self.quantization_config, "pruning", None)
        if fields is not None:
            pruning = Pruning.from_json(fields)
            check_fits(pruning, Path(model.name_or_path))
            prune(model, pruning)
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the model is built."""
        check_sizes(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """Called before the model is built, by versions that do not call the one above."""
        check_sizes(config)
        return config

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called before a model is saved: its config gets the pruning in force."""
        remember_pruning(model)
        return None, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> NoReturn:
        """Called by `model.dequantize()`."""
        raise InputError(
            "A loaded model stays packed. `moepress dequantize FOLDER OUT` writes a plain model of "
            "its weights: open that."
        )

    def is_serializable(self) -> bool:
        return self._on_disk is None

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top of it: packed weights get no gradient

    @property
    def is_compileable(self) -> bool:
        return self._on_disk is None


def register() -> None:
    """Register `quant_method: moepress` with transformers. Safe to repeat."""
    from transformers.quantizers import auto

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(MoePressConfig)
        auto.register_quantizer(QUANT_METHOD)(MoePressQuantizer)


def load_model(
    folder: Path,
    device: str = "cpu",
    activation_bits: int = 8,
    pruning: Strength | Pruning | None = None,
    trust_remote_code: bool = False,
    memory: Memory | None = None,
    gpu_memory: int | None = None,
) -> Any:
    """Load a folder as a transformers model; a compressed one stays packed in memory.

    Args:
        folder: a folder made by moepress, or an original model that fits in memory.
        device: "cpu", or a card such as "cuda" or "cuda:1".
            Tensors go to a card straight from the files.
        activation_bits: for a compressed model, see `set_activation_bits`.
        pruning: for a compressed model, see `prune`; None: as stored in the folder.
        trust_remote_code: run code in the folder, if transformers has no class for the model.
        memory: for a compressed model, bytes of the machine's memory for its weights
            (store/memory.py). None: what the environment says, else "fit".
        gpu_memory: for a compressed model on a card, bytes of the card's memory for its weights.
            Experts that do not fit run on the CPU. None: all of them if the model fits in free
            memory, else as many as leave some free.

    Returns:
        A composite is returned whole; `text_model` gives what writes its text.

    Raises:
        InputError: `memory` or `gpu_memory` is given for an original model, or does not do, or
            `gpu_memory` is given without a card; or an original has an adapter in its folder.
    """
    register()
    where = {} if device == "cpu" else {"device_map": {"": device}}
    given = memory is not None or gpu_memory is not None
    if given and not is_compressed(folder):
        raise InputError(f"{folder} is an original model. Expected a compressed one with memory.")
    if gpu_memory is not None and device == "cpu":
        raise InputError("gpu_memory is given with device 'cpu'. Expected a card, such as 'cuda'.")
    host = memory or wanted(otherwise="fit")
    opened = open_folder if is_compressed(folder) else open_original
    try:
        with no_progress_bars(), memory_wanted(host, gpu_memory or "fit"):
            model = opened(folder, trust_remote_code, dtype="auto", **where).eval()
    except (MoepressError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged config takes transformers to errors of any type
        raise FileError(
            f"transformers cannot open {folder} ({one_line(error)}). Expected the folder of a "
            "model: check its config.json, or copy it again."
        ) from error
    mend(model)
    if is_compressed(folder):
        set_activation_bits(model, activation_bits)
    if pruning is not None:
        prune(model, pruning)
    return model


def text_model(model: Any) -> Any:
    """The language model of a composite that is none itself (Qwen3-Omni); else the model."""
    text = language_model(model)
    text.name_or_path = model.name_or_path  # where `prune` looks for the costs of dropping
    return text


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None: leave it as it is.

    Raises:
        InputError: fewer than one, or so many that the process may crash.
    """
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise InputError(f"threads is {threads}. Expected at least 1 and at most {MOST_THREADS}.")
    torch.set_num_threads(threads)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars ("Loading weights") inside the `with` statement.

    Uses the hook through which transformers makes each bar: unlike `disable_progress_bar`, it
    leaves the bars of huggingface_hub and the caller's settings alone. The hook belongs to the
    process, so of overlapping blocks (threads) the first sets it and the last restores it.
    """
    with _HIDING.lock:
        if _HIDING.depth == 0:
            _HIDING.before = transformers_logging.set_tqdm_hook(_no_bar)
        _HIDING.depth += 1
    try:
        yield
    finally:
        with _HIDING.lock:
            _HIDING.depth -= 1
            if _HIDING.depth == 0:
                transformers_logging.set_tqdm_hook(_HIDING.before)


class _Hiding:
    """How many blocks of `no_progress_bars` are open, and the hook from before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.before: Any = None


_HIDING = _Hiding()


def _no_bar(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return transformers_logging.EmptyTqdm(*args, **options)


def _left_out(model: Any, experts: ExpertFiles, device_map: Any) -> OnDisk | None:
    """The experts that a model's memory, or its card's, has no room for."""
    gpu_memory, card = gpu_wanted(), only_device(device_map)
    if gpu_memory is None or card is None:
        return leave_on_disk(model, experts, device_types(device_map))
    budget = card_budget(gpu_memory, experts.nbytes, experts.rest, free_memory(card))
    return None if budget is None else divide(model, experts, card, budget)


register()  # for processes that import this module before transformers, see _plugin.py
