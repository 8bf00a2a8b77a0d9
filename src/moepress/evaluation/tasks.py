"""Zero-shot tasks, run by lm-eval: the figures are those that its own command gives.

`paper` names the eight tasks of arXiv:2410.06270. Any task of lm-eval can be asked for by name,
tasks of one's own through `include_path`: a folder of task definitions (.yaml), which need no
network if their data lies beside them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepress.errors import InputError, MoepressError

SETS = {
    "paper": (
        "piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "mathqa", "mmlu",
    ),
}  # fmt: skip
MISSING = "Tasks need lm-eval, which is not installed: pip install 'moepress[eval]'."


def task_names(asked: Sequence[str]) -> list[str]:
    """The tasks of "paper,gsm8k" and the like, sets replaced by their tasks, each once."""
    names = [name.strip() for text in asked for name in text.split(",") if name.strip()]
    return list(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))


def find_tasks(asked: Sequence[str], include_path: str | Path | None = None) -> tuple[Any, Any]:
    """lm-eval's task manager and the names of the tasks asked for: cheap, to refuse early.

    Raises:
        InputError: lm-eval is not installed, the folder is missing, or a task does not exist.
    """
    names = task_names(asked)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(MISSING) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"No folder {include_path}. Expected one of task definitions (.yaml).")
    # Reading all of lm-eval's own definitions takes seconds: only if they are asked for.
    for defaults in (False, True) if include_path is not None else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager, names
    raise InputError(
        f"lm-eval has no task {', '.join(unknown)}. `lm-eval ls tasks` lists them; the set "
        f"{', '.join(SETS)} and a folder of your own (--include-path) are known too."
    )


def run_tasks(
    model: Any,
    tokenizer: Any,
    found: tuple[Any, Any],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    run_code: bool = False,
) -> dict[str, dict[str, float]]:
    """The figures of each task, by task or group and then by lm-eval's name of the figure.

    Args:
        model: a causal LM of transformers, loaded.
        tokenizer: its own.
        found: what `find_tasks` gave.
        limit: examples of each task; None: all.
        run_code: allow tasks that run what the model writes (humaneval).

    Raises:
        MoepressError: a task's data cannot be had, or it fails.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, names = found
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=names,
            task_manager=manager,
            limit=limit,
            confirm_run_unsafe_code=run_code,
            log_samples=False,
        )
    except Exception as error:  # lm-eval, datasets and the network each raise their own
        raise MoepressError(
            f"lm-eval could not run {', '.join(names)}: {type(error).__name__}: {error}. Tasks "
            "fetch their data from the network unless they are cached, or local (--include-path)."
        ) from error
    if results is None:
        raise MoepressError("lm-eval gave no results: run moepress as the first process (rank 0).")
    return {
        task: {k: float(v) for k, v in figures.items() if type(v) in (int, float) and "," in k}
        for task, figures in results["results"].items()
    }
