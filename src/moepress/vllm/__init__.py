"""Serve compressed folders with vLLM: `vllm serve FOLDER`, `vllm.LLM(FOLDER)` (docs/vllm.md).

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`.

versions.py    the versions of vLLM that this is tested with
limits.py      what vLLM itself cannot run, said at load
config.py      the quantization config: which method each layer gets
loader.py      the model loader: from the folder's tensors to vLLM's modules
stored.py      the tensors of a folder, by the names that vLLM's model classes read
windows.py     matrices that vLLM's own weight loaders cut, without a copy and without unpacking
linears.py     linears, embeddings and heads
experts.py     routed experts, and pruning
placement.py   which rank computes which experts
routers.py     what vLLM leaves out of some routers
heads.py       what vLLM leaves out of some heads
rotary.py      what vLLM's kernel for CPUs rotates wrongly

Importing `moepress` does not import vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM how to open folders with `quant_method: moepress`. Safe to repeat.

    A vLLM outside the tested range serves all other models as before: only a folder of ours is
    refused (versions.py).
    """
    from moepress.vllm import config

    config.register()
