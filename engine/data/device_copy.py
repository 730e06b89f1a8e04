"""Copies to the device and back without waiting for it. On a CPU nothing is copied: the same tensors are handed on.

To a GPU the loader's thread copies planned batches through pinned memory on a stream of its own and records an event.
The step's stream waits for that event; the host does not. A HostCopy brings a step's numbers back the same way.
"""

from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.nested import map_tensors, tensors_in
from foreroute.kernels.launching import to_device

T = TypeVar("T")


class Delivery:
    """Copies to one device, in the loader's thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, value: T) -> tuple[T, torch.cuda.Event | None]:
        """Start the copy of every tensor in nested dataclasses and tuples; pass the result to `receive`."""
        if self._stream is None:
            return value, None
        # Threads start on GPU 0: without the first of these, leaving the second would make a context there on every
        # rank.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            copy = map_tensors(lambda tensor: to_device(tensor, self.device), value)
            return copy, self._stream.record_event()


class HostCopy:
    """A copy of a tensor to the host, begun by construction. On a CPU nothing is copied: the tensor must not change."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream().record_event()

    def wait(self) -> None:
        """Block the host until the device has finished the copy, and so everything before it."""
        if self._copied is not None:
            self._copied.synchronize()

    def read(self) -> NDArray[Any]:
        """Return the values, after `wait`."""
        found: NDArray[Any] = self._values.numpy()
        return found


def receive(value: T, copied: torch.cuda.Event | None) -> T:
    """Make the current stream wait until the copy is done, and keep its memory until this stream is done with it."""
    if copied is not None:
        stream = torch.cuda.current_stream()
        stream.wait_event(copied)
        for tensor in tensors_in(value):
            tensor.record_stream(stream)
    return value
