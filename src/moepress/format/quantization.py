"""`quantization_config` in the config.json of a compressed folder, as a type that checks itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from moepress.errors import FileError
from moepress.format.checkpoint import check_version, is_compressed, not_a_model
from moepress.format.codec import PackedSpec
from moepress.reading.config import config_fields
from moepress.reading.documents import Document, parse
from moepress.reading.json import kind_of

RESTORE = "The file is damaged or was edited: restore it."


class PackedFields(Document):
    """How one packed parameter is stored."""

    bits: Annotated[str, Field(pattern=r"^[0-9.,]+$")]  # one digit per matrix
    group_size: int
    family: str = "int"
    pre_quant_scale: bool = False


class Quantization(Document):
    """The fields of `quantization_config` (docs/format.md)."""

    quant_method: Literal["moepress"] = "moepress"
    format_version: int = Field(ge=1)
    modules: dict[str, PackedFields]
    provenance: dict[str, Any] = Field(default_factory=dict)  # its content is free
    pruning: dict[str, Any] | None = None  # fields of `Pruning`

    @classmethod
    def of(cls, fields: Any, where: str) -> Quantization:
        """The checked fields.

        Args:
            where: names the folder or the model in messages.

        Raises:
            FileError: a field is missing, unknown or of a wrong type, or a width does not exist.
            InputError: a format version that cannot be read.
        """
        what = f"quantization_config of {where}"
        if not isinstance(fields, Mapping):
            raise FileError(f"{what} is {kind_of(fields)}. Expected an object, {{...}}. {RESTORE}")
        modules, version = fields.get("modules"), fields.get("format_version")
        if type(version) is int:  # newer versions may have other fields
            named = modules if isinstance(modules, Mapping) else {}
            packed = {path: one for path, one in named.items() if isinstance(one, Mapping)}
            check_version(version, packed, where)
        checked = parse(cls, fields, what, RESTORE)
        for path, one in checked.modules.items():
            _spec(path, one, what)
        return checked

    def specs(self) -> dict[str, PackedSpec]:
        """How each packed parameter is stored, by parameter path."""
        return {path: _spec(path, fields) for path, fields in self.modules.items()}


def _spec(path: str, packed: PackedFields, what: str = "quantization_config") -> PackedSpec:
    try:
        return PackedSpec.from_json(packed.model_dump())
    except ValueError as error:  # InputError is a ValueError
        raise FileError(
            f"{what} has bits '{packed.bits[:60]}' for {path}. Expected one digit per matrix, or "
            f"1.5,2 and the like, each a width of the family. {error} {RESTORE}"
        ) from error


def quantization_of(folder: Path) -> Quantization:
    """The `quantization_config` of a compressed folder.

    Raises:
        InputError: it is not a compressed folder, or of a format version that cannot be read.
        FileError: config.json is damaged.
    """
    if not is_compressed(folder):
        raise not_a_model(folder, "is not a folder made by moepress. Expected one with a config.")
    return Quantization.of(config_fields(folder)["quantization_config"], str(folder))


def packed_specs(folder: Path) -> dict[str, PackedSpec]:
    """The packed tensors of a compressed folder, by parameter name. Errors: `quantization_of`."""
    return quantization_of(folder).specs()
