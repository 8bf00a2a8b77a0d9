"""Damaged inputs: each is refused in one line, or harmless.

Thousands of variants, and a table of their outcomes: python -m tests.damage
More variants of one test: MOEPRESS_VARIANTS=1000 pytest -n 0 tests/damage; a seed: MOEPRESS_SEED=7.
"""

import os

SEED = int(os.environ.get("MOEPRESS_SEED", "20"))


def variants_or(default: int) -> int:
    """How many variants to try."""
    return int(os.environ.get("MOEPRESS_VARIANTS", default))
