"""Files of arrays with a document beside them: scores, calibration, drop costs.

One safetensors file holds the arrays as tensors, and a JSON document in its metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moepress.errors import FileError, InputError
from moepress.format.checkpoint import load_tensors, read_about
from moepress.reading.documents import Document, parse
from moepress.reading.json import parse_json

Arrays = dict[str, npt.NDArray[Any]]


def read_document(path: Path, kind: str, what: str, do: str) -> dict[str, Any]:
    """The fields of the document in such a file, without its kind.

    Args:
        kind: what the document must say that it is.
        what: names the content in messages, such as "scores".
        do: what the user can do, a sentence.

    Raises:
        FileError: the file is missing, damaged, or of another kind.
    """
    about = read_about(path)
    try:
        fields = parse_json(about) if about is not None else {}
    except InputError as error:
        raise FileError(f"The metadata of {path} is no JSON: {error}. {do}") from error
    if not isinstance(fields, dict) or fields.pop("kind", None) != kind:
        raise FileError(f"{path} holds no {what}. Expected a file that moepress wrote. {do}")
    return fields


def kind_in(path: Path) -> str | None:
    """What the document of such a file says that it is; None: it has none."""
    try:
        fields = parse_json(read_about(path) or "{}")
    except InputError:
        return None
    kind = fields.get("kind") if isinstance(fields, dict) else None
    return kind if isinstance(kind, str) else None


def read_arrays(
    path: Path, fields: Mapping[str, Any], document: type[Document], dtypes: Mapping[str, str],
    do: str,
) -> Arrays:  # fmt: skip
    """The arrays of such a file; its document is checked first.

    Args:
        fields: the document's.
        dtypes: numpy's name of the dtype of each array. Floats must be finite, but those of an
            array whose dtype is followed by "or inf" may be infinite; integers are counts.

    Raises:
        FileError: a field or an array is missing, unknown or of a wrong type.
    """
    parse(document, fields, str(path), do)
    tensors = load_tensors(path)
    if tensors.keys() != dtypes.keys():
        raise FileError(f"{path} has arrays {sorted(tensors)}. Expected {sorted(dtypes)}. {do}")
    return {name: _array(path, name, tensors[name], dtype, do) for name, dtype in dtypes.items()}


def _array(path: Path, name: str, tensor: Tensor, dtype: str, do: str) -> npt.NDArray[Any]:
    wanted, _, infinite = dtype.partition(" or ")
    if str(tensor.dtype) != f"torch.{wanted}":
        raise FileError(f"Array {name} of {path} is of {tensor.dtype}. Expected {wanted}. {do}")
    array = tensor.numpy()
    wrong = np.isnan(array) if infinite else ~np.isfinite(array)
    if array.dtype.kind == "i":
        wrong = array < 0
    if wrong.any():
        raise FileError(
            f"Array {name} of {path} holds {array[wrong][0]}. Expected finite numbers, and counts "
            f"from 0 up. {do}"
        )
    return array
