"""Evaluate a model: perplexity, and the KL divergence of its predictions from the original's.

Optional: repetition in its generations, zero-shot tasks, speed and memory.

A compressed folder is loaded packed. An original is streamed layer by layer, so it need not fit in
memory. Both models get the same tokens in the same batches.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import InputError, NumericalError
from moepress.evaluation.performance import Performance, forget_peak, measure_performance
from moepress.evaluation.repetition import Repetition, measure_repetition, prompts_of
from moepress.evaluation.request import check_comparable, check_options
from moepress.evaluation.tasks import find_tasks, run_tasks
from moepress.format.checkpoint import folder_bytes, is_compressed, save_json
from moepress.format.quantization import quantization_of
from moepress.memory import free_memory
from moepress.original.batches import batches, logit_tokens
from moepress.original.folder import resolve
from moepress.original.remote_code import tokenizer_of
from moepress.original.sizes import PartBytes, bytes_by_part, original_bytes
from moepress.original.skeleton import text_config
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.original.whole import whole_model
from moepress.progress import Progress
from moepress.prune import Pruning, Strength, count_dropped
from moepress.store.memory import Memory
from moepress.text import windows

logger = logging.getLogger(__name__)

FITS = 0.8  # share of the free memory that an original may take to be loaded whole
MOST_LOSS = 700  # nats: the perplexity of a larger loss is beyond a float
ROWS = 512  # tokens whose float32 logits are in memory at once


@dataclass(frozen=True)
class TextResult:
    """Results on one text. KL is KL(original || model) per token, in nats.

    The fields that need an original are None without one.
    """

    text: str
    tokens: int  # predicted tokens
    perplexity: float
    original_perplexity: float | None = None
    kl: float | None = None  # mean
    kl_p99: float | None = None  # 99th percentile
    changed_top: float | None = None  # share of tokens whose most likely next token differs

    @property
    def ratio(self) -> float | None:
        """Perplexity over the original's."""
        if self.original_perplexity is None:
            return None
        return self.perplexity / self.original_perplexity


@dataclass(frozen=True)
class Evaluation:
    """Results by text, and what is needed to reproduce them."""

    model: str
    original: str | None
    length: int  # tokens of a window
    folder_bytes: int
    texts: tuple[TextResult, ...]
    seconds: float
    provenance: Mapping[str, str]
    parts: Mapping[str, PartBytes]  # bytes of the model's parts
    repetition: Repetition | None = None
    original_repetition: Repetition | None = None
    performance: Performance | None = None
    tasks: Mapping[str, Mapping[str, float]] | None = None  # by task, then lm-eval's metric name
    pruning: Mapping[str, Any] | None = None  # PruningStatistics, if the model is pruned

    @property
    def kl(self) -> float | None:
        """Mean over texts of the mean KL divergence."""
        values = [t.kl for t in self.texts if t.kl is not None]
        return sum(values) / len(values) if values else None

    @property
    def ratio(self) -> float | None:
        """Geometric mean over texts of the perplexity ratio."""
        logs = [math.log(t.ratio) for t in self.texts if t.ratio is not None]
        return math.exp(sum(logs) / len(logs)) if logs else None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "evaluation", **asdict(self), "kl": self.kl, "ratio": self.ratio}

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        save_json(path, self.to_dict())


def evaluate(
    model: str | Path,
    texts: Sequence[str],
    *,
    against: str | Path | None = None,
    length: int = 256,
    limit: int | None = None,
    device: str = "cpu",
    activation_bits: int = 8,
    generations: int = 0,
    speed: bool = False,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    task_limit: int | None = None,
    run_code: bool = False,
    pruning: Strength | Pruning | None = None,
    memory: Memory | None = None,
    gpu_memory: int | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure a model's perplexity on texts, and its KL divergence from the original.

    Args:
        model: a folder made by moepress, or an original model (folder or hub id).
        texts: names of texts, such as files (text/documents.py lists what is accepted).
        against: the original model to compare with.
        length: tokens per window, the special tokens that a text begins with included. Windows do
            not overlap; all text tokens of a window but the first are predicted.
        limit: windows per text; None: the whole text.
        device: "cpu", or a card such as "cuda" or "cuda:1".
        activation_bits: for a compressed model, see `set_activation_bits`.
        generations: how many beginnings of the texts the model continues, to count how often it
            loops. The original does the same if it fits in memory.
        speed: whether to measure tokens per second and memory.
        tasks, include_path, task_limit, run_code: zero-shot tasks, see evaluation/tasks.py.
        pruning: for a compressed model, see `prune`; None: as stored in the folder.
        memory: for a compressed model, bytes for its weights, "all" or "mapped"
            (store/memory.py); None: mapped if it fits.
        gpu_memory: for a compressed model on a card, bytes of its memory for weights, see
            `hf.load_model`.
        trust_remote_code: run code in the folders of the model and of the original, where
            transformers has no class for them.

    Raises:
        InputError: a model, text or task cannot be used.
        NumericalError: a model gives NaN, or assigns no probability to the text.
        MoepressError: a task fails.
    """
    started = time.monotonic()
    if not texts:
        raise InputError("No text to evaluate on. Give at least one, such as a file.")
    folder = resolve(model)
    check_options(
        folder,
        pruned=pruning is not None,
        limited=memory is not None or gpu_memory is not None,
        generations=generations,
        task_limit=task_limit,
    )
    other = resolve(against) if against is not None else None
    if other is not None:
        check_comparable(folder, other, trust_remote_code)
    config = text_config(folder, trust_remote_code)
    windows.check_context(length, config, "--length")
    if other is not None:
        windows.check_context(length, text_config(other, trust_remote_code), "--length")
    tokenizer = tokenizer_of(folder, trust_remote_code)
    tokens = windows.evaluation_tokens([(t, 1.0) for t in texts], tokenizer, length, limit)
    windows.check_vocab(tokens, int(config.vocab_size))
    selected = find_tasks(tasks, include_path) if tasks else None
    prompts = prompts_of(tokens.ids, generations) if generations else None
    forget_peak(torch.device(device))
    whole = bool(generations or speed or tasks)
    loaded = _loaded(
        folder,
        device,
        activation_bits,
        pruning,
        memory,
        gpu_memory,
        whole=whole,
        trust_remote_code=trust_remote_code,
    )
    performance = repetition = original_repetition = metrics = None
    if loaded is not None and speed:
        performance = measure_performance(loaded, tokens.ids[0])
    if loaded is not None and prompts is not None:
        repetition = measure_repetition(loaded, prompts)
    if loaded is not None and selected is not None:
        metrics = run_tasks(loaded, tokenizer, selected, limit=task_limit, run_code=run_code)
    pruned = count_dropped(loaded) if is_compressed(folder) else None
    predictions = _predictions(folder, loaded, tokens.ids, device, trust_remote_code)
    reference = None
    if other is not None:
        original = _loaded(
            other, device, whole=prompts is not None, trust_remote_code=trust_remote_code
        )
        if original is not None and prompts is not None:
            original_repetition = measure_repetition(original, prompts)
        reference = _predictions(other, original, tokens.ids, device, trust_remote_code)
    measured = [compare(tokens.ids[b], p, r) for b, p, r in _paired(predictions, reference)]
    by_name = {k: tokens.scored(torch.cat([m[k] for m in measured])) for k in measured[0]}
    results = []
    for name in dict.fromkeys(tokens.texts):
        rows = torch.tensor([text == name for text in tokens.texts])
        results.append(summary(name, {k: v[rows].flatten() for k, v in by_name.items()}))
    return Evaluation(
        model=folder.absolute().name,  # of "." too
        original=Path(against).absolute().name if against is not None else None,
        length=length,
        folder_bytes=folder_bytes(folder),
        texts=tuple(results),
        seconds=time.monotonic() - started,
        provenance=_provenance(folder, activation_bits, None if pruned is None else pruned.pruning),
        parts=bytes_by_part(folder, trust_remote_code),
        repetition=repetition,
        original_repetition=original_repetition,
        performance=performance,
        tasks=metrics,
        pruning=None if pruned is None else pruned.statistics().to_dict(),
    )


def _loaded(
    folder: Path,
    device: str,
    activation_bits: int = 8,
    pruning: Strength | Pruning | None = None,
    memory: Memory | None = None,
    gpu_memory: int | None = None,
    *,
    whole: bool = False,
    trust_remote_code: bool = False,
) -> Any | None:
    """Load a compressed folder; an original only if `whole` is set and it fits in memory.

    Returns:
        The model; None for an original that is to be streamed.
    """
    from moepress.hf import load_model, text_model  # imports transformers

    if is_compressed(folder):
        return text_model(
            load_model(
                folder, device, activation_bits, pruning, trust_remote_code, memory, gpu_memory
            )
        )
    if not whole:
        return None
    need = original_bytes(folder, trust_remote_code)
    free = free_memory(torch.device(device))
    if need > FITS * free:
        logger.warning(
            "%s takes %s bytes and %s are free: skipping generation, timing and tasks.",
            folder.name, f"{need:,}", f"{free:,}",
        )  # fmt: skip
        return None
    source = Source(folder, device, trust_remote_code)
    if source.checkpoint.quantized:
        return whole_model(source)
    return text_model(load_model(folder, device, trust_remote_code=trust_remote_code))


def _predictions(
    folder: Path, model: Any | None, ids: Tensor, device: str, trust_remote_code: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (batch, logits [b, L, V]) for every batch of the sequences `ids` [S, L], in order.

    Args:
        model: the loaded model; None: stream it from the folder. Originals are always streamed.
    """
    if model is None or not is_compressed(folder):
        walk = Walk(Source(folder, device, trust_remote_code), ids)
        with Progress("original", total=len(walk.source.layers)) as progress:
            walk.finish(progress)
        yield from walk.logits()
        return
    slices = batches(ids, logit_tokens(int(model.config.get_text_config().vocab_size)))
    with Progress("packed", total=len(slices)) as progress:
        for batch in slices:
            with torch.inference_mode():  # ends before the yield, see Walk.logits
                logits = model(input_ids=ids[batch].to(model.device), use_cache=False).logits
            yield batch, logits
            progress.advance()


def _paired(
    predictions: Iterator[tuple[slice, Tensor]],
    reference: Iterator[tuple[slice, Tensor]] | None,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield (batch, logits, original's logits) for every batch."""
    if reference is None:
        for batch, logits in predictions:
            yield batch, logits, None
        return
    for (batch, original), (same, logits) in zip(reference, predictions, strict=True):
        if batch != same:
            raise InputError("The two models cut the text into different batches.")
        yield batch, logits, original


def compare(ids: Tensor, logits: Tensor, original: Tensor | None) -> dict[str, Tensor]:
    """Compare logits [b, L, V] of a model with the original's, token by token.

    Returns:
        "loss", and with an original "original_loss", "kl" and "changed" (1 where the most likely
        token differs): each [b, L - 1] float32, in nats, one value per predicted token.
    """
    shape = ids[:, 1:].shape
    target = ids[:, 1:].flatten().to(logits.device)
    flat = logits[:, :-1].flatten(0, 1)
    other = original[:, :-1].flatten(0, 1) if original is not None else None
    measured: dict[str, list[Tensor]] = {}
    for start in range(0, len(flat), ROWS):
        rows = slice(start, start + ROWS)
        _check_logits(flat[rows], "The model")
        if other is not None:
            _check_logits(other[rows], "The original")
        log_p = F.log_softmax(flat[rows].float(), dim=-1)
        values = {"loss": F.nll_loss(log_p, target[rows], reduction="none")}
        if other is not None:
            log_q = F.log_softmax(other[rows].float(), dim=-1)
            values["original_loss"] = F.nll_loss(log_q, target[rows], reduction="none")
            terms = (log_q.exp() * (log_q - log_p)).masked_fill(log_q.isneginf(), 0)  # 0 log 0
            values["kl"] = terms.sum(-1).clamp(min=0)
            values["changed"] = (log_p.argmax(-1) != log_q.argmax(-1)).float()
        for name, value in values.items():
            measured.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(chunks).view(shape) for name, chunks in measured.items()}


def _check_logits(logits: Tensor, whose: str) -> None:
    """Raise NumericalError if there is a NaN among logits: no figure would mean anything."""
    if torch.isnan(logits).any():
        raise NumericalError(
            f"{whose} gives NaN where it should give logits, so it cannot be evaluated. Its "
            "weights are damaged (`moepress inspect --verify` finds out which), or its numbers "
            "exceed its dtype."
        )


def summary(text: str, values: Mapping[str, Tensor]) -> TextResult:
    """Average the values of one text's tokens (see `compare`)."""
    result = TextResult(text, values["loss"].numel(), _perplexity(values["loss"]))
    if "kl" not in values:
        return result
    return TextResult(
        text,
        result.tokens,
        result.perplexity,
        original_perplexity=_perplexity(values["original_loss"]),
        kl=values["kl"].double().mean().item(),
        kl_p99=float(np.quantile(values["kl"].double().numpy(), 0.99)),
        changed_top=values["changed"].double().mean().item(),
    )


def _perplexity(loss: Tensor) -> float:
    mean = loss.double().mean().item()
    if not mean < MOST_LOSS:
        raise NumericalError(
            f"The mean loss of a text is {mean:.4g} nats per token. Expected one below {MOST_LOSS}:"
            " the weights are damaged (`moepress inspect --verify` finds out which)."
        )
    return math.exp(mean)


def _provenance(folder: Path, activation_bits: int, pruning: Pruning | None) -> dict[str, str]:
    import transformers

    from moepress import __version__

    provenance = quantization_of(folder).provenance if is_compressed(folder) else {}
    made = {f"made_with_{k}": str(v) for k, v in provenance.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if made:
        made["activation_bits"] = str(activation_bits)
    if pruning is not None:
        made["pruning"] = pruning.digest()
    return {"moepress": __version__, **versions, **made}
