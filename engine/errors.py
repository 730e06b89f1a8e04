"""The exceptions that a program reports in one line: bad input (exit code 2) and a run that cannot continue (1)."""

from typing import TypeVar


class UserError(ValueError):
    """Bad input from the user; the message is one line that names the value and the allowed values.

    `everywhere`: every rank of the run raises the same error, so one rank reports it.
    """

    everywhere = False


class RunFailed(RuntimeError):
    """A run cannot continue (a loss that is not finite, a full disk); one line names the cause and the saved state."""

    everywhere = False


E = TypeVar("E", bound=UserError | RunFailed)


def everywhere(error: E) -> E:
    """Mark an error as one that every rank of the run raises."""
    error.everywhere = True
    return error


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)
