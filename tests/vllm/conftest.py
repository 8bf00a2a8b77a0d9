"""vLLM runs in this process, and is skipped where it is not installed."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would replace the engine's own, smaller one
os.environ.setdefault("VLLM_MLA_DISABLE", "1")  # vLLM's CPU kernel has sizes that are not tiny
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is not None:
        return
    reason = "vLLM is not installed: python -m tests.vllm.run --venv FOLDER installs it"
    for item in items:
        if item.get_closest_marker("vllm") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
