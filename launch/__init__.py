"""The programs that a person runs, and how their processes start. Only this folder uses Hydra."""

import os
import signal
import sys
from importlib.util import find_spec
from types import TracebackType

# PyTorch's OpenMP runtime reads this once, as it is loaded. Otherwise its threads spin at their barriers for
# milliseconds, and beside a busy process that takes the core from the thread they wait for. To sleep and wake costs,
# too: docs/measured.md has both.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "5000"


def _leave(number: int, _frame: object) -> None:
    """End a program on Ctrl-C while it is loaded; launch.start.cli.run_program takes over."""
    os.write(2, b"foreroute: stopped before it began\n")
    os._exit(128 + number)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a program that cannot be loaded with what is installed; launch.start.cli.run_program takes over."""
    from foreroute.engine.errors import UserError

    if not isinstance(error, UserError):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(f"foreroute: {error}\n")
    sys.exit(2)


if sys.argv[:1] == ["-m"]:  # a program's start, not an import
    sys.excepthook = _end
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell has it for a job in the background
        signal.signal(signal.SIGINT, _leave)
    _absent = [name for name in ("torch", "hydra", "deepspeed", "numpy") if find_spec(name) is None]
    if _absent:
        sys.stderr.write(
            f"foreroute: {sys.executable} has no {', '.join(_absent)}: start with .venv/bin/python, which `make .venv`"
            " or `make train` sets up\n"
        )
        sys.exit(2)

# The checkout goes behind all else on the path: its folders must not stand for other packages of the same names, such
# as Hugging Face's `kernels` or a user's own `engine`. Ours are foreroute.kernels, foreroute.engine.
_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_roots = [path for path in sys.path if os.path.realpath(path) == _ROOT]
sys.path[:] = [path for path in sys.path if path not in _roots] + _roots
