"""The file of `moepress evaluate --out`, as types that check themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moepress.errors import InputError
from moepress.reading.documents import Array, Document, OpenDocument, parse
from moepress.reading.json import read_json

KIND = "evaluation"
AGAIN = "Evaluate again, or delete the file."

Count = Annotated[int, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[float, Field(ge=0)]


class TextFields(Document):
    """Results on one text."""

    text: str
    tokens: Count
    perplexity: Positive
    original_perplexity: Positive | None = None
    kl: Positive | None = None
    kl_p99: Positive | None = None
    changed_top: Positive | None = None


class PartFields(Document):
    """Bytes of a part of the model."""

    original: Bytes
    stored: Bytes


class RepetitionFields(Document):
    """Generations that end in a loop."""

    generations: Annotated[int, Field(ge=1)]
    looping: Count
    prompt_tokens: Count
    new_tokens: Count


class PerformanceFields(Document):
    """Speed and memory."""

    prefill_tokens: Count
    prefill_tokens_per_second: float
    decode_tokens: Count
    decode_prompt_tokens: Count
    decode_tokens_per_second: float
    peak_bytes: Bytes | None
    device: str
    threads: Count


class PruningFields(OpenDocument):
    """What online pruning dropped."""

    share: Annotated[float, Field(ge=0, le=1)]


class EvaluationFields(Document):
    """The whole file."""

    kind: Literal["evaluation"]
    model: str
    original: str | None
    length: Count
    folder_bytes: Bytes
    texts: Array[TextFields]
    seconds: float
    provenance: dict[str, str]
    parts: dict[str, PartFields]
    repetition: RepetitionFields | None = None
    original_repetition: RepetitionFields | None = None
    performance: PerformanceFields | None = None
    tasks: dict[str, dict[str, float]] | None = None
    pruning: PruningFields | None = None
    kl: Positive | None
    ratio: Positive | None

    @model_validator(mode="after")
    def _compared(self) -> Self:
        """With an original there is something to compare, without one there is not."""
        compared = [self.kl, self.ratio, *(text.kl for text in self.texts)]
        if any((value is None) != (self.original is None) for value in compared):
            raise ValueError("an original and the comparison with it, or neither")
        return self


def load_evaluation(path: Path) -> dict[str, Any]:
    """The fields of an evaluation.

    Raises:
        InputError: the file is JSON, but no evaluation.
        FileError: it is missing or damaged.
    """
    fields = read_json(path, "The evaluation")
    if not isinstance(fields, dict) or fields.get("kind") != KIND:
        raise InputError(
            f"{path} is not an evaluation. Expected a file of `moepress evaluate --out`."
        )
    parse(EvaluationFields, fields, f"The evaluation {path}", AGAIN)
    return {name: fields.get(name) for name in EvaluationFields.model_fields}
