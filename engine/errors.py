"""The exceptions that a program turns into one line: what the user can mend (exit code 2), and a run that cannot go on
(1); and the checks of options that raise the first.
"""

from typing import TypeVar


class UserError(ValueError):
    """Bad input from a person; the message names the value and what is allowed, in one line.

    `everywhere`: every rank of the run raises the same, so one of them may speak for all.
    """

    everywhere = False


class RunFailed(RuntimeError):
    """A run cannot go on (a loss that is not finite, a disk that is full); one line says why and what was kept."""

    everywhere = False


E = TypeVar("E", bound=UserError | RunFailed)


def everywhere(error: E) -> E:
    """Mark an error that every rank of the run raises."""
    error.everywhere = True
    return error


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)
