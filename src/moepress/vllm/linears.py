"""Linears, embeddings and heads of vLLM with packed weights.

One layer of vLLM may hold several matrices of a folder, each with its own codec: query, key and
value, or gate and up. It then has a piece for each, and joins their outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from moepress import kernels
from moepress.errors import InputError
from moepress.kernels.modules import PackedLinear
from moepress.kernels.shards import cut_columns, cut_rows
from moepress.vllm.windows import Copied, Placed, Stored, Window


class Piece(nn.Module):
    """Some rows of a layer's weight: those of one matrix of the folder.

    Args:
        window: of the stored matrix.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        stored = window.base
        assert isinstance(stored, Stored)
        size = stored.rows, stored.cols
        rows = cut_rows(stored.packed, *size, stored.codec, window.rows)
        cols = cut_columns(rows.packed, rows.size, stored.cols, stored.codec, window.cols)
        self.first, self.count = rows.before, len(window.rows)
        self.padding = cols.before, cols.size - cols.before - len(window.cols)
        self.linear = PackedLinear(cols.size, rows.size, stored.codec)
        self.linear.weight = nn.Parameter(cols.packed, requires_grad=False)
        self.all_rows = rows.size == self.count

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias: [..., K] to [..., N]."""
        if any(self.padding):
            x = F.pad(x, self.padding)
        layer = self.linear
        codec = layer.codec
        y: Tensor = kernels.linear(
            x,
            layer.weight,
            bias if self.all_rows else None,
            layer.out_features,
            codec.number,
            codec.group_size,
            layer.activation_bits,
            codec.family,
        )
        if self.all_rows:
            return y
        y = y[..., self.first : self.first + self.count]
        return y if bias is None else y + bias

    def embedding(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` of the weight, of `dtype`."""
        layer = self.linear
        codec = layer.codec
        y: Tensor = kernels.embedding(
            ids + self.first,
            layer.weight,
            layer.out_features,
            layer.in_features,
            codec.number,
            codec.group_size,
            dtype,
        )
        return y


class PlainPiece(nn.Module):
    """Some rows of a layer's weight that the folder does not pack.

    Args:
        weight: [N, K].
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.count = len(weight)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


class LinearMethod(QuantizeMethodBase):  # type: ignore[misc]  # vLLM is not seen by mypy
    """How a linear, an embedding or a head is loaded and computed."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Give a layer the weight that vLLM's loaders copy to. It takes no memory yet."""
        rows, device = sum(output_partition_sizes), default_device()
        placed = Placed(layer.prefix, rows, input_size_per_partition, params_dtype, device)
        weight = nn.Parameter(Window(placed), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, attributes)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Use the embedding as the head."""
        layer.__dict__["tied_to"] = embed_tokens  # not as a submodule: the model holds it already
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cut the bytes that the layer needs, and bring them to its device."""
        tied = layer.__dict__.get("tied_to")
        if tied is not None:
            self._follow(layer, tied)
            return
        if not isinstance(layer.weight, Window):
            return  # shared with a layer that was processed before
        placed = layer.weight.base
        assert isinstance(placed, Placed)
        copied = sorted(placed.copied, key=lambda one: one.rows.start)
        _check_complete(placed, copied)
        if not any(isinstance(one.value, Window) for one in copied):
            _make_plain(layer, torch.cat([one.value.to(placed.device) for one in copied]))
            return
        pieces = nn.ModuleList(
            Piece(one.value) if isinstance(one.value, Window) else PlainPiece(one.value)
            for one in copied
        )
        layer.pieces = pieces.to(placed.device)
        # Some code of vLLM asks whether there is a weight before it calls `apply`.
        nothing = torch.empty(0, dtype=torch.uint8, device=placed.device)
        layer.weight = nn.Parameter(nothing, requires_grad=False)

    def _follow(self, layer: Any, tied: Any) -> None:
        if tied.quant_method is not self and isinstance(tied.quant_method, LinearMethod):
            tied.quant_method.process_weights_after_loading(tied)
        if hasattr(tied, "pieces"):
            layer.__dict__["pieces"] = tied.pieces
            layer.weight = tied.weight
            return
        _make_plain(layer, tied.weight.data)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: [..., K] to [..., N]."""
        pieces = layer.pieces
        if len(pieces) == 1:
            whole: Tensor = pieces[0](x, bias)
            return whole
        outputs, start = [], 0
        for piece in pieces:
            part = None if bias is None else bias[start : start + piece.count]
            outputs.append(piece(x, part))
            start += piece.count
        return torch.cat(outputs, dim=-1)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Rows of an embedding: [...] to [..., K]. Rows added as padding have no ids."""
        y: Tensor = layer.pieces[0].embedding(ids, layer.params_dtype)
        return y


def default_device() -> torch.device:
    """Where new tensors are made: while vLLM makes a model, the device that it will run on.

    The CPU where only shapes are made: what stays there can still be moved.
    """
    device = torch.empty(0).device
    return torch.device("cpu") if device.type == "meta" else device


def _check_complete(placed: Placed, copied: list[Copied]) -> None:
    """Raise InputError unless each row was copied once."""
    stop = 0
    for one in copied:
        if one.rows.start != stop:
            break
        stop = one.rows.stop
    if stop != placed.rows:
        raise InputError(
            f"{placed.name}: of the {placed.rows} rows of its weight, those from {stop} on were "
            "not loaded, or twice. The folder is incomplete, or vLLM's class of this model wants "
            "other tensors."
        )


def _make_plain(layer: Any, weight: Tensor) -> None:
    """Give a layer that the folder does not pack vLLM's own method."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    layer.weight = nn.Parameter(weight, requires_grad=False)
    linear = isinstance(layer, LinearBase)
    layer.quant_method = UnquantizedLinearMethod() if linear else UnquantizedEmbeddingMethod()
    layer.quant_method.process_weights_after_loading(layer)
