"""The allocator against brute force: every allocation of a small model, tried one by one."""

from __future__ import annotations

import moepress.allocate as _  # noqa: F401  # the package binds the name to the function
