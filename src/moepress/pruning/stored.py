"""What a compressed folder says of pruning: the rule that is in force, and the drop costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moepress.errors import InputError
from moepress.format.checkpoint import DROP_COSTS
from moepress.format.quantization import quantization_of
from moepress.pruning.rule import Pruning

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


def stored_pruning(folder: Path) -> Pruning | None:
    """The pruning that is in force whenever a compressed folder is opened; None: none.

    Raises:
        InputError: it is damaged, or of another model.
    """
    fields = quantization_of(folder).pruning
    if fields is None:
        return None
    pruning = Pruning.from_json(fields)
    check_fits(pruning, folder)
    return pruning


def check_fits(pruning: Pruning, folder: Path) -> None:
    """Raise InputError where the thresholds are for other layers or another number of choices.

    The folder's drop costs tell; without them, nothing is checked until the model is opened.
    """
    if not (folder / DROP_COSTS).is_file():
        return
    costs = stored_costs(folder)
    strangers = sorted(pruning.thresholds.keys() - set(costs.layers))
    sizes = {len(ratios) for ratios in pruning.thresholds.values()} - {costs.top_k}
    if strangers or sizes:
        raise InputError(
            f"The pruning has thresholds for layers {sorted(pruning.thresholds)}, "
            f"{sorted(sizes) or costs.top_k} of each. This model has routed experts in layers "
            f"{list(costs.layers)}, and a token chooses {costs.top_k}."
        )
