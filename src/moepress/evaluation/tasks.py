"""Zero-shot tasks, run by lm-eval: results equal those of lm-eval's own command.

`paper` stands for the eight tasks of arXiv:2410.06270. Any task of lm-eval can be given by name,
and tasks of your own through `include_path`: a folder of task definitions (.yaml), which need no
network if their data is in local files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepress.errors import InputError, MoepressError, install_extra
from moepress.generation import following

SETS = {
    "paper": (
        "piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "mathqa", "mmlu",
    ),
}  # fmt: skip
MISSING = f"Tasks need lm-eval, which is not installed: {install_extra('eval')}."


def task_names(asked: Sequence[str]) -> list[str]:
    """The tasks named in texts such as "paper,gsm8k": sets expanded, duplicates removed."""
    names = [name.strip() for text in asked for name in text.split(",") if name.strip()]
    return list(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))


def find_tasks(asked: Sequence[str], include_path: str | Path | None = None) -> tuple[Any, Any]:
    """Look tasks up in lm-eval. Cheap, so that wrong names are refused before any work.

    Returns:
        lm-eval's task manager, and the names of the tasks.

    Raises:
        InputError: no task is named, lm-eval is not installed, the folder is missing, or a task
            does not exist.
    """
    names = task_names(asked)
    if not names:
        raise InputError(f"No task is named in {list(asked)}. Expected some, such as piqa,gsm8k.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(MISSING) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"No folder {include_path}. Expected one with task definitions (.yaml).")
    # Reading lm-eval's own definitions takes seconds, so they are read only if needed.
    for defaults in (False, True) if include_path is not None else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager, names
    raise InputError(
        f"lm-eval has no task {', '.join(unknown)}. `lm-eval ls tasks` lists its tasks. Also "
        f"accepted: the set {', '.join(SETS)}, and tasks in a folder of yours (--include-path)."
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
    """Run tasks.

    Args:
        model: a loaded causal LM of transformers.
        tokenizer: the model's.
        found: result of `find_tasks`.
        limit: examples per task; None: all.
        batch_size: examples per forward pass.
        run_code: allow tasks that execute generated code (humaneval).

    Returns:
        Metrics by task or group, then by lm-eval's name such as "acc,none".

    Raises:
        MoepressError: a task's data is not available, or the task fails.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, names = found
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        with following(model):
            results = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=names,
                task_manager=manager,
                limit=limit,
                confirm_run_unsafe_code=run_code,
                log_samples=False,
            )
    except Exception as error:  # lm-eval, datasets and the network raise errors of their own
        raise MoepressError(
            f"lm-eval could not run {', '.join(names)}: {type(error).__name__}: {error}. Tasks "
            "download their data, unless it is cached or in local files (--include-path)."
        ) from error
    if results is None:
        raise MoepressError("lm-eval gave no results. Run moepress in the process of rank 0.")
    return {
        task: {
            k: float(v)
            for k, v in metrics.items()
            if "," in k and type(v) in (int, float) and math.isfinite(v)  # one example has no error
        }
        for task, metrics in results["results"].items()
    }
