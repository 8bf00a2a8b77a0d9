"""The errors that moepress raises on purpose.

The command line turns `InputError` (the user's input is wrong: correct it and run again) into exit
code 2, and every other `MoepressError` (the work itself failed) into exit code 1. A message says
what is wrong, what was got, what was expected, and what to do.
"""


def printable(text: str) -> str:
    """Text that is safe in a terminal: control characters, and others that are not shown, escaped.

    Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def install_extra(name: str) -> str:
    """How to install an extra. moepress is on no package index: only its clone has them."""
    return f"pip install '.[{name}]' in the clone of moepress"


MOST = 1400  # characters of a message; its end says what to do


def _message(text: str) -> str:
    text = printable(text)
    return text if len(text) <= MOST else f"{text[: MOST - 400]} ... {text[-395:]}"


class MoepressError(Exception):
    """Base of all errors raised by moepress.

    Messages may quote what files hold, so they are made `printable`, and very long ones are cut.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_message(a) if isinstance(a, str) else a for a in args))


class InputError(MoepressError, ValueError):
    """A value, file or model given by the user cannot be used."""


class BudgetError(InputError):
    """No allocation meets the budget; the message gives the smallest and largest possible one."""


class CheckpointError(MoepressError):
    """A file of the work is missing or contradictory, or cannot be written (disk full)."""


class FileError(InputError, CheckpointError):
    """A file that was given is missing, of another kind, unreadable, damaged or contradictory."""


class NumericalError(MoepressError):
    """A computation gave NaN or infinity, or a matrix stays singular despite damping."""


class WeightsError(FileError, NumericalError):
    """The weights of a file are not finite, or do not fit the dtype of the model."""
