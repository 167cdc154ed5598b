"""The errors that Filterfold raises on purpose.

Every message is one line that says what was wrong, where, and what to do. The command line prints
exactly that line and exits with code 2; anything that is not a `FilterfoldError` is a bug.
"""

from __future__ import annotations

import re


class FilterfoldError(Exception):
    """Base class: catch this to catch every refusal of the library."""

    def __str__(self) -> str:
        """The message, which may quote another library's, without colours."""
        return plain(super().__str__())


class ModelError(FilterfoldError):
    """A model name, factory, or weight file that can't be used."""


class DataError(FilterfoldError):
    """A data set that is missing, unreadable, or of the wrong shape."""


class TraceError(FilterfoldError):
    """A model whose structure can't be followed."""


class PlanError(FilterfoldError):
    """A plan that is malformed, or does not fit the model that it is applied to."""


class SelectionError(FilterfoldError):
    """A budget or constraint that can't be met."""


class SurgeryError(FilterfoldError):
    """A cut that failed; the model is as it was before."""


class VerificationError(FilterfoldError):
    """A cut that changed the function more than it should have; the model is as it was before."""


class CheckpointError(FilterfoldError):
    """A checkpoint that is truncated, unsafe, or does not fit the model."""


class ConfigError(FilterfoldError):
    """An option or configuration value that makes no sense."""


class OutputError(FilterfoldError, OSError):
    """A file or folder that can't be written."""


class RecordError(FilterfoldError):
    """A results folder or record that is damaged or already taken."""


class TrainingError(FilterfoldError):
    """A training run that can't go on."""


class ExportError(FilterfoldError):
    """A model that can't be written in another format, or computes something else there."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device: that is no fault of a network or a cut.

    >>> out_of_memory(RuntimeError("CUDA error: out of memory")), out_of_memory(ValueError("no such layer"))
    (True, False)
    """
    kinds, text = [kind.__name__ for kind in type(error).__mro__], str(error)
    return bool({"MemoryError", "OutOfMemoryError"} & set(kinds)) or any(words in text for words in _EXHAUSTED)


_EXHAUSTED = ("out of memory", "can't allocate memory", "not enough memory")


def pass_on_exhaustion(error: BaseException) -> None:
    """Raise an exception again if it says that memory ran out."""
    if out_of_memory(error):
        raise error


def one_line(error: BaseException) -> str:
    r"""The type of an error and the first line of its message, for a message of our own.

    >>> one_line(ValueError("no such layer\nTraceback: ..."))
    'ValueError: no such layer'
    """
    text = next((line.strip() for line in plain(str(error)).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {text}"


def plain(text: str) -> str:
    r"""Text without the escape sequences and control characters of a terminal.

    >>> plain("\x1b[31mred\x1b[0m\a and \x1b]8;;https://there\x07a link")
    'red and a link'
    """
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text)
