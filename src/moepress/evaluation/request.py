"""What an evaluation is asked to do, checked before any work: models may take hours to run."""

from __future__ import annotations

from pathlib import Path

from moepress.errors import InputError
from moepress.format.checkpoint import is_compressed
from moepress.original.skeleton import text_config
from moepress.original.source import Source


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
    """
    own, other = (
        int(text_config(path, trust_remote_code).vocab_size) for path in (folder, original)
    )
    if own != other:
        raise InputError(
            f"{folder} predicts {own:,} different tokens, and {original} {other:,}. Expected the "
            "original that the model was made from."
        )
    if not is_compressed(original):
        Source(original, trust_remote_code=trust_remote_code)
