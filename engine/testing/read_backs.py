"""Detects where the host would wait for a device: values that are read back, and copies of memory that is not pinned.

Works without a GPU. Operators that read values (`.item()`, `bool(tensor)`, `nonzero`, an index of booleans ...) are
detected in PyTorch's dispatcher, in forward, backward and hooks of the thread that enters. Methods that do not reach
the dispatcher on a CPU (`.numpy()`, `.tolist()`, `.cpu()` ...) are detected at their call. So is
`torch.tensor(..., device=...)`, a copy of pageable memory, for which the host waits. On a CPU, tensors meant for the
host cannot be distinguished and count as well, so a step must read no value at all.
"""

import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "allclose", "bincount")
_INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_")
_METHODS = ("tolist", "numpy", "cpu", "new_tensor", "__array__")
_MAKERS = (torch.tensor, torch.as_tensor)
_NOT_CALLERS = (str(Path(torch.__file__).parent), __file__)


class ReadBack(NamedTuple):
    """One place where the host waits."""

    what: str  # the operator or method
    place: str  # the innermost caller outside PyTorch: "folder/file.py:function"


class HostWaits(RuntimeError):
    """The host waits for the device at a place that is not allowed."""


class ReadBacks:
    """Records each read-back of this thread while it is entered.

    Args:
        refuse: raise HostWaits at a read-back, except at allowed places.
        allowed: suffixes of allowed places, such as "bf16_optimizer.py:step".
    """

    def __init__(self, *, refuse: bool = False, allowed: Sequence[str] = ()) -> None:
        self.found: list[ReadBack] = []
        self._refuse, self._allowed = refuse, tuple(allowed)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start to record."""
        self._stack.enter_context(_methods_watched(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stack.close()

    def note(self, what: str) -> None:
        """Record a read-back.

        Raises:
            HostWaits: read-backs are refused at this place.
        """
        found = ReadBack(what, _place())
        if self._allowed and found.place.endswith(self._allowed):
            return
        self.found.append(found)
        if self._refuse:
            raise HostWaits(f"{found.what} at {found.place}")


class _Operators(TorchDispatchMode):
    def __init__(self, into: ReadBacks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        sized = (kwargs or {}).get("output_size") is not None
        if (
            (any(read in name for read in _READS) and name != "nonzero_static")
            or (name in _INDEXES and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]))
            or (name == "repeat_interleave" and not sized)
        ):
            self._into.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _methods_watched(into: ReadBacks) -> Iterator[None]:
    """Record calls of this thread that dispatch no operator; in backward autograd ignores a TorchFunctionMode."""
    thread = threading.get_ident()

    def watched(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            made = call in _MAKERS
            if threading.get_ident() == thread and (not made or kwargs.get("device") is not None):
                into.note(f"{name}(device=...)" if made else name)
            return call(*args, **kwargs)

        return noted

    names = [*((Tensor, name) for name in _METHODS), *((torch, call.__name__) for call in _MAKERS)]
    with ExitStack() as stack:
        for owner, name in names:
            stack.enter_context(patch.object(owner, name, watched(getattr(owner, name), name)))
        yield


def _place() -> str:
    """Return the innermost frame outside PyTorch and this file."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_NOT_CALLERS):
            path = Path(frame.filename)
            return f"{path.parent.name}/{path.name}:{frame.name}"
    return "nowhere"
