"""Every error that moepress raises on purpose.

The command line maps `InputError` (something the user gave is wrong: fix it and run again) to exit
code 2 and every other `MoepressError` (the work itself failed) to exit code 1. A message says what
is wrong, what was found, what was expected, and what to do.
"""


class MoepressError(Exception):
    """Base of all errors raised by moepress."""


class InputError(MoepressError, ValueError):
    """A value, file or model given by the user cannot be used."""


class BudgetError(InputError):
    """No allocation meets the budget; the message names the smallest and largest possible."""


class CheckpointError(MoepressError):
    """A file on disk is missing, truncated, corrupt, or belongs to other work."""


class NumericalError(MoepressError):
    """A computation met NaN or infinity, or a matrix that stays singular."""
