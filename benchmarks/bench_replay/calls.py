"""Every call of a step as text: PyTorch's operators with the shapes of their tensors, and the collectives.

Numbers of a replayed rank are not those of the run, so floats are left out. Indices are the plan itself: of tensors of
whole numbers a digest of the values is part of the call. What runs inside a collective is the group's own and no part.
A digest of each text is kept, 8 bytes, so that hundreds of steps fit into memory.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from threading import get_ident
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "barrier",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "reduce_scatter",
    "all_to_all_single",
)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)


@contextmanager
def numbered_parameters() -> Iterator[None]:
    """Make sets of parameters iterate by numbers, in the block, instead of by address: DeepSpeed releases the
    parameters of a module in the order of such a set, which is another one in every process."""
    numbers = count()

    def number(parameter: nn.Parameter) -> int:
        own = vars(parameter)
        if "number" not in own:
            own["number"] = next(numbers)
        return int(own["number"])

    with mock.patch.object(nn.Parameter, "__hash__", number):
        yield


class Calls(TorchDispatchMode):
    """Lists the calls of this thread while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._digests = array("Q")
        self._thread: int | None = None  # that entered
        self._inside = False

    def __enter__(self) -> "Calls":
        self._digests, self._thread = array("Q"), get_ident()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def found(self) -> NDArray[np.uint64]:
        """A digest of each call, in order."""
        return np.array(self._digests, np.uint64)

    def _add(self, text: str) -> None:
        self._digests.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            name, at_birth = str(func), "empty" in str(func)  # whose values are whatever was there
            self._add(f"{name}({_text(args)}{_text(kwargs)}) {_text(result, values=not at_birth)}")
        return result

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """List collectives too, in the block; enter it before DeepSpeed starts."""
        with ExitStack() as stack:
            for name in filter(partial(hasattr, dist), _COLLECTIVES):  # older versions lack some
                stack.enter_context(mock.patch.object(dist, name, self._listed(getattr(dist, name))))
            yield

    def _listed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def listed(*args: Any, **kwargs: Any) -> Any:
            if self._thread != get_ident() or self._inside:
                return call(*args, **kwargs)
            group = kwargs.get("group")
            ranks = "" if isinstance(group, str) else f" of {dist.get_world_size(group)}"
            self._add(f"{call.__name__}({_text(args, values=False)}{_text(kwargs, values=False)}){ranks}")
            self._inside = True
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False

        return listed


def _text(value: Any, *, values: bool = True) -> str:
    if isinstance(value, Tensor):
        shape = f"{value.dtype}{list(value.shape)}{list(value.stride())}"
        if not values or value.dtype not in _WHOLE or value.device.type != "cpu":
            return shape
        raw = value.detach().contiguous().numpy().tobytes()
        return f"{shape}:{hashlib.blake2b(raw, digest_size=6).hexdigest()}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_text(item, values=values) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}={_text(item, values=values)}" for name, item in value.items()) + "}"
    return str(value) if isinstance(value, int | str | torch.dtype) else ""


def differing(found: Sequence[Any] | NDArray[Any], expected: Sequence[Any] | NDArray[Any]) -> int:
    """Count the places at which two lists of calls differ, and those that only one of them has."""
    both = zip(found, expected, strict=False)
    return sum(bool(a != b) for a, b in both) + abs(len(found) - len(expected))
