"""The one exception that means: the user can mend this. Programs print its line and exit with code 2."""


class UserError(ValueError):
    """Bad input from a person; the message names the value and what is allowed, in one line."""


class RunFailed(RuntimeError):
    """A run cannot go on (a loss that is not finite, a disk that is full); one line says why and what was kept."""
