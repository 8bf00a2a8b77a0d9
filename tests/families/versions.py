"""Families that an older transformers than the tests' own lacks, or has with a fault."""

from __future__ import annotations

from collections.abc import Mapping

import transformers
from packaging.version import Version

TESTED = Version("5.24")  # has all families: there none is skipped
# Before: Aria's experts have a form that moepress refuses, and Doge fails on every call.
WORKS_FROM: Mapping[str, Version] = dict.fromkeys(("aria", "aria_text", "doge"), Version("5.18"))


def installed() -> Version:
    return Version(transformers.__version__)


def why_not(family: str) -> str | None:
    """Why a family cannot be tested with this transformers; None: it can."""
    from transformers import CONFIG_MAPPING

    if installed() >= TESTED:
        return None
    if family not in CONFIG_MAPPING:
        return f"transformers {installed()} has no {family}"
    if installed() < WORKS_FROM.get(family, installed()):
        return f"{family} needs transformers {WORKS_FROM[family]}"
    return None
