"""Convert the tensors of a checkpoint to the parameters of transformers' model class.

Checkpoints name and divide their tensors in many ways. Mixtral's have separate w1, w2 and w3 for
each expert, while transformers 5 computes with the experts of a layer fused in one tensor.
transformers' own conversion mapping describes how to convert one to the other. It is applied here
to one parameter at a time, or to one expert of a parameter.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from moepress.errors import FileError
from moepress.original.architectures import Experts

# A tensor of one expert of Llama 4, in files whose experts are separate linears.
SEPARATE = re.compile(r"feed_forward\.experts\.\d+\.gate_proj\.weight$")


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint that goes into a parameter of the model."""

    key: str
    pattern: str | None  # pattern of the checkpoint's names in its converter; None: only renamed


class _OneExpert:
    """A model as converters see it that get only one expert of a parameter.

    Some transpose a tensor unless it has the parameter's shape.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        row: Tensor = self._model.get_parameter(name)[:1]
        return row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass(frozen=True)
class Conversion:
    """Which tensors of a checkpoint each parameter of a model is made of, and how."""

    model: Any  # the skeleton
    folder: Path  # of the checkpoint, for error messages
    pieces: Mapping[str, list[Piece]]  # by parameter name
    converters: Mapping[str, Any]  # by pattern of the checkpoint's names
    unused: tuple[str, ...]  # tensors of the checkpoint that the model's class has no place for

    @classmethod
    def of(cls, model: Any, folder: Path, keys: Collection[str]) -> Conversion:
        """Plan the conversion with transformers' mapping for the class of `model`.

        Args:
            keys: names of all tensors of the checkpoint.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(model) or []
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        listed = [m for m in mapping if isinstance(m, WeightConverter)]
        listed += _of_separate_experts(model, keys)
        state = model.state_dict()
        pieces: dict[str, list[Piece]] = defaultdict(list)
        unused = []
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(
                key, renamings, listed, model.base_model_prefix, state
            )
            if name not in state and key in state:
                name, pattern = key, None
            if name in state:
                pieces[name].append(Piece(key, pattern))
            elif not key.endswith("rotary_emb.inv_freq"):  # computed, but old files have it
                unused.append(key)
        converters = {p: c for c in listed for p in c.source_patterns}
        return cls(model, folder, pieces, converters, tuple(unused))

    def check(self, needed: Collection[str], experts: Collection[Experts]) -> None:
        """Check that the checkpoint provides everything.

        Args:
            needed: names of all parameters and buffers that it must provide.
            experts: the routed experts of each layer.

        Raises:
            FileError: no tensor goes into a parameter, several contradict each other, or an
                expert is missing.
        """
        self._check_complete(needed)
        self._check_single()
        for one in experts:
            self._check_experts(one)

    @cached_property
    def made(self) -> frozenset[str]:
        """Names of all parameters that some tensor of the checkpoint goes into."""
        made = set(self.pieces)
        for name, pieces in self.pieces.items():  # one converter may make several parameters
            if pieces[0].pattern is not None:
                targets = self.converters[pieces[0].pattern].target_patterns
                made |= {name.replace(targets[0], target) for target in targets}
        return frozenset(made)

    def convert(
        self, name: str, expert: int | None, read: Callable[[str, int | None], Tensor]
    ) -> dict[str, Tensor]:
        """The parameter `name`, and the other parameters that its converter makes with it.

        Args:
            expert: make only this expert's row, [1, ...]; None: the whole parameter.
            read: returns a tensor of the checkpoint by its key, or only row `expert` of it.

        Returns:
            Tensors by parameter name.
        """
        name = self._made_with(name)
        pattern = self.pieces[name][0].pattern
        values = [(piece, read(piece.key, row)) for piece, row in self.reads(name, expert)]
        if pattern is None:
            return {name: values[0][1]}
        converter = deepcopy(self.converters[pattern])
        for piece, value in values:
            converter.add_tensor(name, piece.key, piece.pattern, lambda value=value: value)
        model = self.model if expert is None else _OneExpert(self.model)
        made = converter.convert(name, model=model, config=self.model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def reads(self, name: str, expert: int | None) -> list[tuple[Piece, int | None]]:
        """The tensors of the checkpoint that `convert` reads, each with its row or None for all."""
        found: list[tuple[Piece, int | None]] = []
        for pattern, alike in self._by_pattern[self._made_with(name)].items():
            if expert is not None and "*" in str(pattern):
                # The checkpoint has one tensor for each expert: those of the first target, then
                # those of the next one.
                targets = len(self.converters[str(pattern)].target_patterns)
                found += ((piece, None) for piece in alike[expert :: len(alike) // targets])
            else:
                found += ((piece, expert) for piece in alike[: None if pattern else 1])
        return found

    @cached_property
    def _by_pattern(self) -> dict[str, dict[str | None, list[Piece]]]:
        """The tensors that go into each parameter, by their pattern."""
        found: dict[str, dict[str | None, list[Piece]]] = {}
        for name, pieces in self.pieces.items():
            by_pattern = found.setdefault(name, defaultdict(list))
            for piece in pieces:
                by_pattern[piece.pattern].append(piece)
        return found

    def taken(self, layers: tuple[str, ...]) -> tuple[set[str], set[str]]:
        """Names of all tensors of the checkpoint that go into parameters, and of those in layers.

        Args:
            layers: paths of the decoder layers.
        """
        inside = tuple(path + "." for path in layers)
        of_layers = {p.key for n, ps in self.pieces.items() if n.startswith(inside) for p in ps}
        return {piece.key for pieces in self.pieces.values() for piece in pieces}, of_layers

    def sources(self, name: str) -> list[str]:
        """Names of the checkpoint's tensors that the parameter `name` is made of."""
        return [piece.key for piece in self.pieces[self._made_with(name)]]

    def _check_complete(self, needed: Collection[str]) -> None:
        """Raise FileError if no tensor of the checkpoint goes into a needed parameter."""
        missing = [n for n in needed if n not in self.made]
        head = self.model.get_output_embeddings()
        if missing and any(self.model.get_submodule(n.rpartition(".")[0]) is head for n in missing):
            raise FileError(
                f"{self.folder} has no head ({missing[0]}), and its config.json does not say that "
                "the head is the embedding: transformers would fill it with random numbers. If "
                'they are one tensor, set "tie_word_embeddings": true there; else a shard is '
                "missing: fetch the model again."
            )
        if missing:
            raise FileError(
                f"{self.folder} has no tensor for {len(missing)} parameters of "
                f"{type(self.model).__name__}, the first {missing[0]}. A shard is missing or the "
                "config is another model's: fetch the model again."
            )

    def _check_single(self) -> None:
        """Raise FileError if two tensors are one parameter by two names or forms."""
        for name, pieces in self.pieces.items():
            if len(pieces) > 1 and any(piece.pattern is None for piece in pieces):
                raise FileError(
                    f"{self.folder} has {len(pieces)} tensors for {name}: {pieces[0].key} and "
                    f"{pieces[1].key}. Expected one: the files are of two models; fetch it again."
                )

    def _check_experts(self, experts: Experts) -> None:
        """Raise FileError if experts have separate tensors, and fewer than there are."""
        for name in experts.matrix_names:
            patterns = [str(p.pattern) for p in self.pieces.get(name, ()) if "*" in str(p.pattern)]
            for pattern in set(patterns):
                expected = experts.experts * len(self.converters[pattern].target_patterns)
                if patterns.count(pattern) < expected:  # too many are of another shape
                    raise FileError(
                        f"{self.folder} has {patterns.count(pattern)} of {expected} experts' "
                        f"{pattern} for {name}. A shard is missing or the config is another "
                        "model's: fetch the model again."
                    )

    def _made_with(self, name: str) -> str:
        """The parameter that `pieces` names: `name`, or the first target of its converter.

        Raises:
            FileError: no converter makes it.
        """
        if name in self.pieces:
            return name
        for first, pieces in self.pieces.items():
            if pieces[0].pattern is not None:
                targets = self.converters[pieces[0].pattern].target_patterns
                if name in {first.replace(targets[0], target) for target in targets[1:]}:
                    return first
        raise FileError(f"{self.folder} has no tensor for {name}. Fetch the model again.")


def _of_separate_experts(model: Any, keys: Collection[str]) -> list[Any]:
    """Converters for Llama 4 with an expert's matrices as linears of their own.

    llm-compressor stores quantized models like that (Meta's FP8 Maverick); transformers' class has
    them fused and transposed, and no conversion.
    """
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        Transpose,
        WeightConverter,
    )

    kinds = {type(module).__name__ for module in model.modules()}
    if "Llama4TextExperts" not in kinds or not any(SEPARATE.search(key) for key in keys):
        return []
    path, merged, transposed = "feed_forward.experts", MergeModulelist(dim=0), Transpose(1, 2)
    return [
        WeightConverter(
            [f"{path}.*.gate_proj.weight", f"{path}.*.up_proj.weight"],
            f"{path}.gate_up_proj",
            operations=[merged, Concatenate(dim=1), transposed],
        ),
        WeightConverter(
            f"{path}.*.down_proj.weight", f"{path}.down_proj", operations=[merged, transposed]
        ),
    ]
