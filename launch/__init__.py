"""How processes start: the programs a person runs. The only place that knows Hydra."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

# PyTorch's OpenMP runtime reads this once, as it is loaded. Otherwise its threads spin at their barriers for milliseconds, and beside
# a busy process that takes the core from the thread they wait for. To sleep and wake costs, too: docs/measured.md has both.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "5000"


def _leave(number: int, _frame: object) -> None:
    """End a program that Ctrl-C meets while it is loaded; launch.cli.run_program takes over."""
    os.write(2, b"foreroute: stopped before it began\n")
    os._exit(128 + number)


if sys.argv[:1] == ["-m"]:  # a program's start, not an import
    if (
        signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    ):  # as a shell has it for a job in the background
        signal.signal(signal.SIGINT, _leave)
    _absent = [name for name in ("torch", "hydra", "deepspeed", "numpy") if find_spec(name) is None]
    if _absent:
        sys.stderr.write(
            f"foreroute: {sys.executable} has no {', '.join(_absent)}: start with .venv/bin/python, which `make .venv` or `make train` sets up\n"
        )
        sys.exit(2)

_ROOT = Path(__file__).resolve().parents[1]
_found = find_spec("kernels")
if _found is None or _found.origin is None or Path(_found.origin).resolve().parents[1] != _ROOT:
    # Hugging Face publishes a package of the same name.
    sys.exit(
        f"foreroute: `import kernels` finds {_found and _found.origin}, not {_ROOT / 'kernels'}: "
        "start from the checkout with `python -m`, and uninstall the package `kernels`"
    )
