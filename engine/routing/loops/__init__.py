"""Loops over tokens and rows that numba compiles: no operation of numpy does them in one pass.

Each is called at one place, and tests hold it against plain loops of Python. `compiled` is how they are compiled.
"""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any], *, error_model: str = "python") -> Callable[..., Any]:
    """Compile a function at its first call; it runs without the interpreter's lock.

    The machine code is kept beside the source, or in numba's cache folder of the user. Where neither can be written,
    each process compiles anew.

    Args:
        error_model: numba's; with "numpy" a division by zero is inf or nan, so loops that divide become vectors.
    """
    try:
        return njit(nogil=True, cache=True, error_model=error_model)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # numba found no folder
        return njit(nogil=True, error_model=error_model)(function)  # type: ignore[no-any-return]
