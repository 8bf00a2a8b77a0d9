"""Whether the tensors of a checkpoint fit the model's class. No weight is read, only headers.

Where a packed tensor does not fit, the shape that is stored beside it is read: rows of packed
integers end at a whole word.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moepress.errors import FileError, MoepressError
from moepress.original.checkpoint import Checkpoint
from moepress.original.conversion import Conversion


def check_tensors(
    checkpoint: Checkpoint,
    conversion: Conversion,
    needed: Mapping[str, Tensor],
    stored_as: Mapping[str, str],
) -> None:
    """Compare kind and shape of every tensor with what the model needs.

    Args:
        needed: parameters and buffers of the skeleton, by name.
        stored_as: the name under which a checkpoint stores a parameter, where it is another one.

    Raises:
        FileError: a tensor holds integers where floats are needed, has no scales, cannot be
            converted, or has another shape than the model's.
    """
    shapes: dict[str, torch.Size] = {}
    for name, value in needed.items():
        stored = stored_as.get(name, name)
        checkpoint.check(conversion.sources(stored), value.is_floating_point())
        if stored not in shapes:  # one converter may make several
            shapes |= _shapes(checkpoint, conversion, stored)
        if shapes[stored] != value.shape and checkpoint.quantized:
            checkpoint.read_shapes(conversion.sources(stored))
            shapes |= _shapes(checkpoint, conversion, stored)
        if shapes[stored] != value.shape:
            raise FileError(
                f"{stored} of {conversion.folder} has shape {list(shapes[stored])}. Its config "
                f"says {list(value.shape)}: fetch the model again."
            )


def _shapes(checkpoint: Checkpoint, conversion: Conversion, name: str) -> dict[str, torch.Size]:
    """Shapes of a parameter, and of others that its converter makes, by name."""

    def read(key: str, expert: int | None) -> Tensor:
        return torch.empty(checkpoint.forms[key].shape, device="meta")

    try:
        made = conversion.convert(name, None, read)
        return {each: value.shape for each, value in made.items()}
    except MoepressError:
        raise
    except Exception as error:  # transformers' conversions raise many types
        raise FileError(
            f"{name} cannot be made of the tensors of {conversion.folder}: {error}. They do not "
            "fit the config: fetch the model again."
        ) from error
