"""A tokenizer that transformers opens, and could not use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moepress.errors import InputError
from moepress.original.remote_code import tokenizer_of


@pytest.mark.parametrize("longest", ["\u001b" * 200, True, [1], {"a": 1}])
def test_a_length_that_is_no_number(
    longest: object, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(fields | {"model_max_length": 32}), encoding="utf-8")
    assert tokenizer_of(folder).model_max_length == 32
    config.write_text(json.dumps(fields | {"model_max_length": longest}), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        tokenizer_of(folder)
    assert str(config) in str(caught.value)
    assert str(caught.value).isprintable()
