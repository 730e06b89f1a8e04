"""Sees where the host would wait for a device: values that are read back, and copies of memory that is not pinned.

Works without a GPU. Operators that read values are seen where PyTorch dispatches them (`.item()`, `bool(tensor)`,
`nonzero`, an index of booleans ...), in forward, backward and hooks of the thread that enters. Methods that never reach
the dispatcher on a CPU (`.numpy()`, `.tolist()`, `.cpu()` ...) are seen where they are called, and so is
`torch.tensor(..., device=...)`, a copy of pageable memory, for which the host waits. A CPU's tensors look all the same:
what is meant for the host alone counts, too, so a step must read nothing at all.
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
    """One place at which the host waits."""

    what: str  # the operator or method
    place: str  # the innermost caller outside PyTorch: "folder/file.py:function"


class HostWaits(RuntimeError):
    """The host waits for the device where it must not."""


class ReadBacks:
    """Notes each read-back of this thread while it is entered.

    Args:
        refuse: raise HostWaits instead, but at the allowed places.
        allowed: ends of the places, such as "bf16_optimizer.py:step".
    """

    def __init__(self, *, refuse: bool = False, allowed: Sequence[str] = ()) -> None:
        self.found: list[ReadBack] = []
        self._refuse, self._allowed = refuse, tuple(allowed)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Begin."""
        self._stack.enter_context(_methods_watched(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stack.close()

    def note(self, what: str) -> None:
        """Take in a read-back that happens now.

        Raises:
            HostWaits: it is refused.
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
    """Note calls of this thread that no operator shows; autograd leaves out a TorchFunctionMode in backward passes."""
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
    """The innermost frame that is neither PyTorch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_NOT_CALLERS):
            path = Path(frame.filename)
            return f"{path.parent.name}/{path.name}:{frame.name}"
    return "nowhere"
