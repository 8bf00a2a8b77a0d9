"""The drop costs that a compressed folder carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moepress.errors import InputError
from moepress.format.checkpoint import DROP_COSTS

if TYPE_CHECKING:
    from moepress.costs.drop_costs import DropCosts


def stored_costs(folder: str | Path) -> DropCosts:
    """The drop costs in a compressed folder.

    Args:
        folder: a local folder, or the id of a model on the hub.

    Raises:
        InputError: there are none.
    """
    from huggingface_hub import hf_hub_download

    from moepress.costs.drop_costs import DropCosts

    path = Path(folder) / DROP_COSTS
    if folder and not path.is_file() and not Path(folder).exists() and str(folder).count("/") == 1:
        try:
            path = Path(hf_hub_download(str(folder), DROP_COSTS))
        except Exception as error:  # the hub client raises many kinds; all mean: not available
            raise InputError(
                f"{folder} is neither a local folder nor a model on the hub with {DROP_COSTS} "
                f"({type(error).__name__}). Give costs of `moepress calibrate`."
            ) from error
    if not folder or not path.is_file():
        raise InputError(
            f"{folder or 'The model'} has no {DROP_COSTS}, which says what dropping experts costs. "
            "Compress the model with this version, copy that file from the folder it came from, or "
            "give costs of `moepress calibrate`."
        )
    return DropCosts.load(path)
