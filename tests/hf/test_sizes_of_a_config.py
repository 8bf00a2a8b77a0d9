"""Which numbers of a config are refused before modules are built."""

from __future__ import annotations

import pytest

from moepress.errors import FileError
from moepress.hf.agreement import check_sizes
from tests.families.models import tiny_config


def test_a_vocabulary_is_no_number_of_layers() -> None:
    config = tiny_config("gemma4_text")
    assert config.vocab_size_per_layer_input == 262144
    check_sizes(config)


def test_too_many_layers_are_refused() -> None:
    config = tiny_config("mixtral")
    config.num_hidden_layers = 10**6
    with pytest.raises(FileError, match="num_hidden_layers = 1000000"):
        check_sizes(config)
