"""How good a model is: perplexity, and how far its predictions moved from the original's.

Also, where asked: whether its generations loop, zero-shot tasks, speed and memory.

A compressed folder is loaded as it is, packed. An original is streamed layer by layer, so it need
not fit in memory. Both see the same tokens, in the same batches.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import InputError
from moepress.evaluation.performance import Performance, forget_peak, measure_performance
from moepress.evaluation.repetition import Repetition, measure_repetition, prompts_of
from moepress.evaluation.tasks import find_tasks, run_tasks
from moepress.format.checkpoint import folder_bytes, is_compressed, load_json, save_json
from moepress.kernels.modules import set_activation_bits
from moepress.original.batches import batches, logit_tokens
from moepress.original.folder import resolve, weight_files
from moepress.original.sizes import PartBytes, bytes_by_part
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.progress import Progress
from moepress.prune import Pruning, Strength, count_dropped, prune
from moepress.text import windows

logger = logging.getLogger(__name__)

FITS = 0.8  # of the free memory that an original may take to be loaded whole
ROWS = 512  # tokens whose float32 predictions are in memory together


@dataclass(frozen=True)
class TextResult:
    """One text. Where there is an original: KL(original || model) per token, in nats."""

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
    """Results by text, and what is needed to run them again."""

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
    tasks: Mapping[str, Mapping[str, float]] | None = None  # figures by task, named by lm-eval
    pruning: Mapping[str, Any] | None = None  # PruningStatistics, if experts were skipped

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
) -> Evaluation:
    """Perplexity of a model on texts, and its divergence from another.

    Args:
        model: a folder made by moepress, or an original model (folder or hub id).
        texts: sources as `text/documents.py` knows them, such as files.
        against: the original model to compare with.
        length: tokens of a window; windows do not overlap, each is predicted from its second
            token on.
        limit: windows per text; None: the whole text.
        activation_bits: of a compressed model, see `modules.set_activation_bits`.
        generations: how many beginnings of the texts to continue, to see whether the model loops;
            the original does the same if it fits in memory.
        speed: whether to measure tokens per second and memory.
        tasks, include_path, task_limit, run_code: zero-shot tasks by name, see `tasks.py`.
        pruning: of a compressed model, see `prune.prune`; None: as its folder says.

    Raises:
        InputError: a model, text or task cannot be used.
        MoepressError: a task fails.
    """
    from transformers import AutoTokenizer

    started = time.monotonic()
    if not texts:
        raise InputError("No text to evaluate on. Give at least one file or text source.")
    folder = resolve(model)
    if pruning is not None and not is_compressed(folder):
        raise InputError(
            f"{folder} is an original model: it is streamed, and not pruned. Expected a folder "
            "made by moepress; mp.prune(model, ..., costs=...) prunes an original in memory."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = windows.evaluation_tokens([(t, 1.0) for t in texts], tokenizer, length, limit)
    windows.check_vocab(tokens, _vocab_size(folder))
    found = find_tasks(tasks, include_path) if tasks else None
    prompts = prompts_of(tokens.ids, generations) if generations else None
    forget_peak(torch.device(device))
    whole = bool(generations or speed or tasks)
    loaded = _loaded(folder, device, activation_bits, pruning, whole=whole)
    performance = repetition = original_repetition = figures = None
    if loaded is not None and speed:
        performance = measure_performance(loaded, tokens.ids[0])
    if loaded is not None and prompts is not None:
        repetition = measure_repetition(loaded, prompts)
    if loaded is not None and found is not None:
        figures = run_tasks(loaded, tokenizer, found, limit=task_limit, run_code=run_code)
    pruned = count_dropped(loaded) if is_compressed(folder) else None
    predictions = _predictions(folder, loaded, tokens.ids, device)
    reference = None
    if against is not None:
        other = resolve(against)
        original = _loaded(other, device, whole=prompts is not None)
        if original is not None and prompts is not None:
            original_repetition = measure_repetition(original, prompts)
        reference = _predictions(other, original, tokens.ids, device)
    measured = [compare(tokens.ids[b], p, r) for b, p, r in _paired(predictions, reference)]
    columns = {k: torch.cat([m[k] for m in measured]) for k in measured[0]}  # each [S, L - 1]
    results = []
    for name in dict.fromkeys(tokens.texts):
        rows = torch.tensor([text == name for text in tokens.texts])
        results.append(summary(name, {k: v[rows].flatten() for k, v in columns.items()}))
    return Evaluation(
        model=folder.name,
        original=Path(against).name if against is not None else None,
        length=length,
        folder_bytes=folder_bytes(folder),
        texts=tuple(results),
        seconds=time.monotonic() - started,
        provenance=_provenance(folder, activation_bits),
        parts=bytes_by_part(folder),
        repetition=repetition,
        original_repetition=original_repetition,
        performance=performance,
        tasks=figures,
        pruning=None if pruned is None else pruned.statistics().to_dict(),
    )


def _loaded(
    folder: Path,
    device: str,
    activation_bits: int = 8,
    pruning: Strength | Pruning | None = None,
    *,
    whole: bool = False,
) -> Any | None:
    """A model in memory: a compressed one always, an original where `whole` asks and it fits."""
    if is_compressed(folder):
        return load_model(folder, device, activation_bits, pruning)
    if not whole:
        return None
    need, free = sum(path.stat().st_size for path in weight_files(folder)), free_bytes(device)
    if need > FITS * free:
        logger.warning(
            "%s takes %s bytes and %s are free: it is not let write, timed, or given tasks.",
            folder.name, f"{need:,}", f"{free:,}",
        )  # fmt: skip
        return None
    return load_model(folder, device)


def _predictions(
    folder: Path, model: Any | None, ids: Tensor, device: str
) -> Iterator[tuple[slice, Tensor]]:
    """(batch, logits [b, L, V]) of a model for every batch of sequences, in order.

    Args:
        model: the model if it is in memory; None: it is streamed from the folder.
    """
    if model is None or not is_compressed(folder):
        walk = Walk(Source(folder, device), ids)
        with Progress("original", total=len(walk.source.layers)) as progress:
            walk.finish(progress)
        yield from walk.logits()
        return
    parts = batches(ids, logit_tokens(_vocab_size(folder)))
    with Progress("packed", total=len(parts)) as progress:
        for batch in parts:
            with torch.inference_mode():  # left before yielding, see Walk.logits
                logits = model(input_ids=ids[batch].to(model.device), use_cache=False).logits
            yield batch, logits
            progress.advance()


def free_bytes(device: str) -> int:
    """Memory that is free for a model, on the GPU or in the machine."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def load_model(
    folder: Path,
    device: str = "cpu",
    activation_bits: int = 8,
    pruning: Strength | Pruning | None = None,
) -> Any:
    """A folder as a transformers model; a compressed one stays packed in memory.

    Args:
        pruning: of a compressed model, see `prune.prune`; None: as its folder says.
    """
    from transformers import AutoModelForCausalLM

    from moepress import hf

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    if is_compressed(folder):
        set_activation_bits(model, activation_bits)
    if pruning is not None:
        prune(model, pruning)
    return model


def _paired(
    predictions: Iterator[tuple[slice, Tensor]],
    reference: Iterator[tuple[slice, Tensor]] | None,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    if reference is None:
        for batch, logits in predictions:
            yield batch, logits, None
        return
    for (batch, original), (same, logits) in zip(reference, predictions, strict=True):
        if batch != same:
            raise InputError("The two models cut the text differently.")
        yield batch, logits, original


def compare(ids: Tensor, logits: Tensor, original: Tensor | None) -> dict[str, Tensor]:
    """Per predicted token [b, L - 1] float32: loss, and what moved from the original."""
    shape = ids[:, 1:].shape
    target = ids[:, 1:].flatten().to(logits.device)
    flat = logits[:, :-1].flatten(0, 1)
    other = original[:, :-1].flatten(0, 1) if original is not None else None
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(flat), ROWS):
        rows = slice(start, start + ROWS)
        log_p = F.log_softmax(flat[rows].float(), dim=-1)
        values = {"loss": F.nll_loss(log_p, target[rows], reduction="none")}
        if other is not None:
            log_q = F.log_softmax(other[rows].float(), dim=-1)
            values["original_loss"] = F.nll_loss(log_q, target[rows], reduction="none")
            values["kl"] = (log_q.exp() * (log_q - log_p)).sum(-1).clamp(min=0)
            values["changed"] = (log_p.argmax(-1) != log_q.argmax(-1)).float()
        for name, value in values.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(value).view(shape) for name, value in parts.items()}


def summary(text: str, values: Mapping[str, Tensor]) -> TextResult:
    """Averages of one text's tokens."""
    result = TextResult(text, values["loss"].numel(), _perplexity(values["loss"]))
    if "kl" not in values:
        return result
    return TextResult(
        text,
        result.tokens,
        result.perplexity,
        original_perplexity=_perplexity(values["original_loss"]),
        kl=values["kl"].double().mean().item(),
        kl_p99=values["kl"].double().quantile(0.99).item(),
        changed_top=values["changed"].double().mean().item(),
    )


def _perplexity(loss: Tensor) -> float:
    return math.exp(loss.double().mean().item())


def _vocab_size(folder: Path) -> int:
    config = load_json(folder / "config.json")
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size)


def _provenance(folder: Path, activation_bits: int) -> dict[str, str]:
    import transformers

    from moepress import __version__

    config = load_json(folder / "config.json").get("quantization_config") or {}
    made = {f"made_with_{k}": str(v) for k, v in config.get("provenance", {}).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if made:
        made["activation_bits"] = str(activation_bits)
    return {"moepress": __version__, **versions, **made}
