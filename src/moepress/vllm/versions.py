"""The versions of vLLM that the plugin is tested with."""

from __future__ import annotations

import re

from moepress.errors import InputError

TESTED = ("0.32", "0.33")  # vLLM's interface changes: from the first version, below the second


def check_version(version: str) -> None:
    """Raise InputError if vLLM is outside the tested range."""
    found, first, end = (_release(text) for text in (version, *TESTED))
    if not first <= found < end:
        raise InputError(
            f"vLLM is {version}. moepress was tested with {TESTED[0]} up to, not including, "
            f"{TESTED[1]}, and vLLM's interface changes between versions. Install one of these, or "
            "use `moepress serve`."
        )


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; 0, 0 where there are none: vLLM may call itself "dev"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
