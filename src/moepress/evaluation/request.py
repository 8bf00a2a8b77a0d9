"""What an evaluation is asked to do, checked before any work: models may take hours to run."""

from __future__ import annotations

import logging
from pathlib import Path

from moepress.errors import InputError
from moepress.format.checkpoint import is_compressed
from moepress.format.quantization import quantization_of
from moepress.original.skeleton import text_config
from moepress.original.source import Source

logger = logging.getLogger(__name__)


def check_options(
    folder: Path, *, pruned: bool, limited: bool, generations: int, task_limit: int | None
) -> None:
    """Check the options of an evaluation.

    Args:
        folder: of the model.
        pruned: whether the model is to be pruned.
        limited: whether its weights get a limited memory.
        generations, task_limit: as of `evaluate`.

    Raises:
        InputError: one cannot be used, or not with an original model.
    """
    if pruned and not is_compressed(folder):
        raise InputError(
            f"{folder} is an original model: it is streamed, and not pruned. Expected a folder "
            "made by moepress; mp.prune(model, ..., costs=...) prunes an original in memory."
        )
    if limited and not is_compressed(folder):
        raise InputError(
            f"{folder} is an original model: its layers are read one by one. Expected a folder "
            "made by moepress with memory."
        )
    if generations < 0:
        raise InputError(f"generations is {generations}. Expected at least 0; 0 for none.")
    if task_limit is not None and task_limit < 1:
        raise InputError(
            f"task_limit is {task_limit}. Expected at least 1 example, or none for no limit."
        )


def check_comparable(folder: Path, original: Path, trust_remote_code: bool) -> None:
    """Check that a model can be compared with an original.

    Args:
        folder: of the model.
        original: folder of the model that it is compared with.
        trust_remote_code: as of `evaluate`.

    Raises:
        InputError: the original cannot be used, or the two predict different vocabularies.

    An original that is not the one that the model was made from is told: an instructed model and
    its base have the same vocabulary.
    """
    own, other = (
        int(text_config(path, trust_remote_code).vocab_size) for path in (folder, original)
    )
    if own != other:
        raise InputError(
            f"{folder} predicts {own:,} different tokens, and {original} {other:,}. Expected the "
            "original that the model was made from."
        )
    if is_compressed(original):
        return
    source = Source(original, trust_remote_code=trust_remote_code)
    made = quantization_of(folder).provenance if is_compressed(folder) else {}
    if made.get("model_fingerprint", source.fingerprint) != source.fingerprint:
        logger.warning(
            "%s was made from %s, whose files are not those of %s: if these are other weights, the "
            "comparison is with another model.",
            folder, made.get("model"), original,
        )  # fmt: skip
