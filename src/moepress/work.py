"""The output folder of a run: its identity, its calibration sequences, and checks before writing.

While a run is unfinished, its output folder contains the work folder `.moepress`. That holds the
calibration sequences and, for each stage, the results of the finished layers (format/journal.py).
All work on disk is stored with its identity (model, text, recipe), so that results of different
work are never mixed: a run that finds work of another identity stops with an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from moepress.checks import check_shared
from moepress.costs.scores import ExpertScores
from moepress.errors import FileError, InputError
from moepress.format.checkpoint import (
    CHECKSUMS,
    DROP_COSTS,
    PLAN,
    SCORES,
    SHARDS,
    WORK,
    is_compressed,
)
from moepress.format.journal import (
    IDENTITY_FILE,
    check_identity,
    compare_identity,
    differences,
)
from moepress.format.quantization import quantization_of
from moepress.format.unfinished import load_unfinished, save_unfinished
from moepress.memory import free_memory
from moepress.original.composite import language_model
from moepress.original.folder import weight_files
from moepress.original.remote_code import tokenizer_of
from moepress.original.sizes import original_bytes
from moepress.original.skeleton import open_original
from moepress.original.source import Source
from moepress.original.whole import whole_model
from moepress.ranks import here
from moepress.recipe import FIELDS_AFTER_SCORING, Recipe
from moepress.text import windows
from moepress.text.named import SELF
from moepress.writing.files import check_place, is_of_finder, is_partial, sweep
from moepress.writing.held import LOCK, check_work, discard, held

TEXT = "text.safetensors"  # the calibration sequences, in the work folder
BEGUN = "compress.json"  # the identity of scores, in the work folder
ROUNDING = "quantize"  # the folder in the work folder while a plan is applied
# Parts of an identity that scores do not depend on: the recipe with the budget, the plan.
FULL_RECIPE, PLAN_DIGEST = "full_recipe", "plan"
# What an unfinished output holds beside its work folder.
UNFINISHED = (SCORES, PLAN, DROP_COSTS, CHECKSUMS, *SHARDS)


# What the work depends on


def identity(source: Source, recipe: Recipe, ids: Tensor | None) -> dict[str, str]:
    """The identity of scores: model, text, and the recipe without its allocation fields.

    Args:
        ids: the calibration sequences; None: the text is left out.
    """
    from moepress import __version__

    return {
        "model": Path(source.name).name,
        "model_fingerprint": source.fingerprint,
        "recipe": recipe.digest(*FIELDS_AFTER_SCORING),
        "moepress": __version__,
        **({} if ids is None else {"text": text_digest(ids)}),
    }


def whole_identity(source: Source, recipe: Recipe, ids: Tensor | None) -> dict[str, str]:
    """The identity of scores and, if the recipe has a budget, of the plan that follows."""
    plan = {FULL_RECIPE: recipe.digest()} if recipe.has_budget else {}
    return identity(source, recipe, ids) | plan


def own_text(recipe: Recipe) -> bool:
    """Whether the model writes all of its calibration text itself.

    Then model and recipe tell whose finished work is. To compare the text, it would have to be
    written again, which takes long, and may give another one with another number of threads.
    """
    return all(text == SELF for text, _ in recipe.calib)


def text_digest(ids: Tensor) -> str:
    """A short hash of calibration sequences."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


# The calibration sequences


def calibration_ids(source: Source, recipe: Recipe) -> Tensor:
    """The calibration sequences [S, L] int64 that a recipe asks for."""
    _check_context(source, recipe)
    fits = SELF not in dict(recipe.calib) or _fits(source)
    tokens = windows.load_tokens(
        recipe.calib,
        _tokenizer(source),
        recipe.sequences,
        recipe.sequence_length,
        recipe.seed,
        model=(lambda: _whole_model(source)) if fits else None,
    )
    windows.check_vocab(tokens, source.text_config.vocab_size)
    return tokens.ids


def _check_context(source: Source, recipe: Recipe) -> None:
    windows.check_context(recipe.sequence_length, source.text_config, "--sequence-length")


def kept_ids(folder: Path, source: Source, recipe: Recipe) -> Tensor:
    """The sequences that a stopped run stored in its work folder, or else those of the recipe.

    Text that the model writes itself may depend on the number of threads, so a continued run must
    use the sequences that it began with.
    """
    path = folder / TEXT
    return load_unfinished(path)["ids"] if path.is_file() else calibration_ids(source, recipe)


def check_text(folder: Path, source: Source, recipe: Recipe) -> Tensor | None:
    """The sequences of `kept_ids`; None if the model has yet to write some of them itself.

    Then the other texts are read, to check that they can be.

    Raises:
        InputError: a text cannot be read or is too short.
    """
    names = [text for text, _ in recipe.calib]
    if SELF not in names or (folder / TEXT).is_file():
        return kept_ids(folder, source, recipe)
    _check_context(source, recipe)
    shares = windows.divide(recipe.sequences, [weight for _, weight in recipe.calib])
    tokenizer = _tokenizer(source)
    for text, share in zip(names, shares, strict=True):
        if text != SELF:
            texts = [(text, 1.0)]
            windows.load_tokens(texts, tokenizer, share, recipe.sequence_length, recipe.seed)
    return None


def keep_ids(folder: Path, ids: Tensor) -> None:
    """Store the sequences in a work folder, unless it has sequences already.

    The identity of the work must be there: else nothing says whose text it is.
    """
    if not (folder / TEXT).is_file():
        save_unfinished(folder / TEXT, {"ids": ids})


def _tokenizer(source: Source) -> object:
    return tokenizer_of(source.folder, source.trust_remote_code)


def _fits(source: Source) -> bool:
    """Whether the original model fits in the memory that is free."""
    need = original_bytes(source.folder, source.trust_remote_code)
    return need <= free_memory(source.device)


def _whole_model(source: Source) -> Any:
    """The original model in memory, to sample text from it."""
    from moepress.hf import no_progress_bars
    from moepress.hf.growing_cache import grow_in_place

    if source.checkpoint.quantized:
        model = whole_model(source)
    else:
        dtype = source.compute_dtype
        with no_progress_bars():
            whole = open_original(source.folder, source.trust_remote_code, dtype=dtype)
        model = language_model(whole.to(source.device))
    grow_in_place(model)
    return model


# The output folder


def check_output(out: Path) -> None:
    """Check, before any work, that `out` can be written: new, empty, or a folder of moepress.

    Raises:
        InputError: it is something else, cannot be made or written, or holds a folder `.moepress`
            that is not ours.
    """
    if out.is_dir():
        if not ((out / WORK).is_dir() or is_compressed(out) or _is_left(out)):
            raise InputError(
                f"{out} is not empty and was not made by moepress. Choose another output folder."
            )
        check_work(out / WORK)
        if not _is_finished(out):
            check_place(out / WORK)
        return
    if out.is_symlink() or out.exists():
        raise InputError(f"{out} is no folder. Expected a folder that is new, empty or ours.")
    check_place(out)


@contextmanager
def output_held(out: Path) -> Iterator[Path]:
    """Hold the output folder of a run inside the `with` statement, against other runs.

    What a killed run left unfinished in single files is deleted. A finished folder is not touched.

    Yields:
        The work folder.

    Raises:
        InputError: another process writes there, the folder is not ours, or not all ranks see it.
    """
    if here().agreed(lambda: _is_finished(out)):
        yield out / WORK
        return
    with work_held(out / WORK, out) as work:
        yield work


@contextmanager
def work_held(folder: Path, out: Path | None = None) -> Iterator[Path]:
    """Hold a work folder inside the `with` statement; see `held`. Rank 0 does so for all ranks.

    Args:
        out: the output that the folder is inside of; None: it is beside one.
    """
    with ExitStack() as stack:
        if here().first:
            stack.enter_context(held(folder, lambda: kept(out or folder)))
            if out is not None:
                sweep(out)
        check_shared(folder, LOCK)
        yield folder


def _is_left(out: Path) -> bool:
    """Whether a folder is empty, or what is left of an unfinished output without its work folder.

    Messages tell users to delete the work folder, and what it took hours to score stays.
    """
    names = [path.name for path in out.iterdir() if not is_of_finder(path.name)]
    return all(is_partial(name) or any(fnmatch(name, one) for one in UNFINISHED) for name in names)


def _is_finished(out: Path) -> bool:
    return is_compressed(out) and not (out / WORK).exists()


def kept(out: Path) -> str:
    """What a stopped run keeps in its output or work folder, in words; empty: nothing."""
    work = out / WORK if (out / WORK).is_dir() else out
    done = ["the calibration text"] if (work / TEXT).is_file() else []
    if (out / SCORES).is_file():
        done.append("all scores")
    for pattern, folder, what in (
        ("sensitivity-*.safetensors", work, "with sensitivities"),
        ("layer-*.safetensors", work, "scored"),
        ("model-layer-*.safetensors", out, "rounded"),
    ):
        if count := len([*folder.rglob(pattern)]):
            done.append(f"{count} layer{'s' if count > 1 else ''} {what}")
    return f"Kept in {out}: {', '.join(done)}." if done else ""


def begin(out: Path, ids: Tensor, work: Mapping[str, str]) -> None:
    """Store in the work folder of `out`, which is held, the text and whose it is.

    Args:
        work: identity of the scores, and of the plan if there is a budget. A run that was stopped
            before it applied its plan may go on with another one.

    Raises:
        InputError: there is unfinished work of another identity.
    """
    compare_begun(out, work)
    check_identity(out / WORK / BEGUN, of_scores(work))
    keep_ids(out / WORK, ids)


def compare_begun(out: Path, work: Mapping[str, str]) -> None:
    """Compare the unfinished work in `out`, if there is some. Arguments, errors: as of `begin`."""
    compare_identity(out / WORK / BEGUN, of_scores(work))
    rounding = out / WORK / ROUNDING
    compare_identity(rounding / IDENTITY_FILE, work)
    plan_comes_later = FULL_RECIPE in work and PLAN_DIGEST not in work
    given = (rounding / IDENTITY_FILE).is_file() and not (out / SCORES).is_file()
    if plan_comes_later and given:
        raise InputError(
            f"{rounding} holds unfinished work of `moepress quantize`: whether its plan is the one "
            "that would be chosen here is known only after scoring. Continue it with `moepress "
            f"quantize` and its plan, choose another output, or delete {rounding} to start over."
        )


def of_scores(work: Mapping[str, str]) -> dict[str, str]:
    """The identity of the scores that are part of a work."""
    return {k: value for k, value in work.items() if k not in (FULL_RECIPE, PLAN_DIGEST)}


def claim(out: Path, work: Mapping[str, str]) -> bool:
    """Check that the folder `out`, which is held, can be used for this work.

    If `out` holds the finished work already, its work folder is deleted.

    Args:
        work: identity of the work.

    Returns:
        Whether `out` holds the finished work already.

    Raises:
        InputError: `out` holds work of another identity, or files that are not of moepress.
    """
    if holds_finished(out, work):
        discard(out / WORK)
        return True
    return False


def holds_finished(out: Path, work: Mapping[str, str]) -> bool:
    """Whether `out` holds the finished work already. Nothing is written.

    Raises:
        InputError: `out` holds finished work of another identity, or files that are not of
            moepress.
        FileError: it holds this work, but a file of the tensors is missing or damaged.
    """
    if not (out.is_dir() and is_compressed(out)):
        check_output(out)
        return False
    made = quantization_of(out).provenance
    if differs := differences({key: made.get(key) for key in work}, work):
        raise InputError(
            f"{out} is a finished model of other work (differs in: {differs}). "
            "Choose another output or delete that folder."
        )
    try:
        weight_files(out)
    except FileError as error:
        raise FileError(
            f"{out} was finished, but is damaged since: copy it again, or delete it to make it "
            f"again. {error}"
        ) from error
    return True


def check_unfinished(
    out: Path, source: Source, recipe: Recipe, ids: Tensor | None
) -> ExpertScores | None:
    """Check that `compress` could begin or continue in `out`. Nothing is written.

    Args:
        ids: None: the model has yet to write some of the text itself, which is not compared.

    Returns:
        The scores in `out`; None: it has none, or is finished.

    Raises:
        InputError: `out` holds work of another identity, or files that are not of moepress.
    """
    work = whole_identity(source, recipe, ids)
    if recipe.has_budget and holds_finished(out, work):
        return None
    scores = stored_scores(out, of_scores(work))
    compare_begun(out, work)
    return scores


def stored_scores(out: Path, made_of: Mapping[str, str]) -> ExpertScores | None:
    """The scores in an output folder; None: it has none.

    Args:
        made_of: the `identity` that they must have.

    Raises:
        InputError: they are of another model, text or recipe.
    """
    path = out / SCORES
    if not path.is_file():
        return None
    scores = ExpertScores.load(path)
    if differs := differences({key: scores.provenance.get(key) for key in made_of}, made_of):
        raise InputError(
            f"{path} holds scores that differ in: {differs}. Give the model, text and "
            f"options they were made with, choose another output, or delete {out}."
        )
    return scores
