"""What programs ask of a model, answered for packed ones: saving, counting, resizing, generating.

transformers computes the first three, and the length of a tied head's bias, from the shapes of
parameters, which are bytes here, and has no hook for any. So methods of `PreTrainedModel` and
`generate` are wrapped; other models never notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from moepress.errors import InputError
from moepress.format.checkpoint import QUANT_METHOD
from moepress.hf.captured_generate import with_captured_steps
from moepress.hf.saving import save_with_ours
from moepress.kernels.modules import PackedEmbedding, PackedExperts, PackedLinear

WRAPPED = "_moepress_wraps"  # marks a wrapped method
COUNT = "unpacked_parameters"  # attribute of a packed module: parameters of the one it stands for

Method = Callable[..., Any]


def answer_for_packed() -> None:
    """Wrap the methods. Safe to repeat."""
    from transformers import GenerationMixin, PreTrainedModel

    answers: Sequence[tuple[type, str, Callable[[Method], Method]]] = (
        (PreTrainedModel, "save_pretrained", save_with_ours),
        (PreTrainedModel, "num_parameters", _counted),
        (PreTrainedModel, "resize_token_embeddings", _resized),
        (PreTrainedModel, "_adjust_bias", _of_its_rows),
        (GenerationMixin, "generate", with_captured_steps),
    )
    for owner, name, answer in answers:
        method = getattr(owner, name, None)  # one that is private may go
        if method is not None and not hasattr(method, WRAPPED):
            wrapped = _for_packed(method, answer(method))
            setattr(wrapped, WRAPPED, True)
            setattr(owner, name, wrapped)


def _for_packed(method: Method, answer: Method) -> Method:
    """`answer` for models that are packed, `method` for all others."""

    @wraps(method)
    def chosen(self: Any, *args: Any, **options: Any) -> Any:
        packed = getattr(self, "quantization_method", None) == QUANT_METHOD
        return (answer if packed else method)(self, *args, **options)

    return chosen


def _counted(count: Method) -> Method:
    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        total: int = count(self, only_trainable, exclude_embeddings)
        if only_trainable:  # packed ones are not
            return total
        seen: set[int] = set()
        for module in self.modules():
            own = {id(one): one for one in module.parameters(recurse=False)}
            if isinstance(module, PackedLinear | PackedEmbedding | PackedExperts):
                tied = bool(own.keys() & seen)
                embedding = isinstance(module, PackedEmbedding) and exclude_embeddings
                stands_for = 0 if tied or embedding else getattr(module, COUNT)
                total += stands_for - sum(v.numel() for k, v in own.items() if k not in seen)
            seen |= own.keys()
        return total

    return num_parameters


def _resized(resize: Method) -> Method:
    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        table, head = self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(table, PackedEmbedding) and not isinstance(head, PackedLinear):
            return resize(self, new_num_tokens, pad_to_multiple_of, *args, **options)
        size = table.num_embeddings
        wanted = size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != size:
            raise InputError(
                f"The embedding and the head are packed: {size} tokens cannot become {wanted}. "
                "Resize the original and compress it again, or compress it with embedding_bits=16 "
                "and head_bits=16."
            )
        return table

    return resize_token_embeddings


def _of_its_rows(adjust: Method) -> Method:
    def _adjust_bias(self: Any, output: Any, embedding: Any) -> None:
        """Pad the bias of a head that is tied to an embedding with more rows; not by its bytes."""
        if not isinstance(output, PackedLinear):
            adjust(self, output, embedding)

    return _adjust_bias
