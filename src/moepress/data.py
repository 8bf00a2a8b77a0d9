"""Token sequences of calibration and evaluation text, for programs: an older name, kept for them.

The package `moepress.text` defines them.
"""

from moepress.text.windows import evaluation_tokens as evaluation_tokens
from moepress.text.windows import load_tokens as load_tokens
