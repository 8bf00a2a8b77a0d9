"""The errors that moepress raises on purpose.

The command line turns `InputError` (the user's input is wrong: correct it and run again) into exit
code 2, and every other `MoepressError` (the work itself failed) into exit code 1. A message says
what is wrong, what was got, what was expected, and what to do.
"""


class MoepressError(Exception):
    """Base of all errors raised by moepress."""


class InputError(MoepressError, ValueError):
    """A value, file or model given by the user cannot be used."""


class BudgetError(InputError):
    """No allocation meets the budget; the message gives the smallest and largest possible one."""


class CheckpointError(MoepressError):
    """A file is missing, damaged or contradictory, or cannot be written (disk full)."""


class NumericalError(MoepressError):
    """A computation gave NaN or infinity, or a matrix stays singular despite damping."""
