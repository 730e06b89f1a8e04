"""What is sent to a device arrives whole; the GPU's part of the way needs a GPU."""

from dataclasses import dataclass

import pytest
import torch

from foreroute.engine.data.device_copy import Delivery, receive
from foreroute.engine.nested import map_tensors, tensors_in


@dataclass(frozen=True)
class Inner:
    row_N: torch.Tensor
    count: int
    nothing: None = None


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    ids: torch.Tensor
    splits: tuple[int, ...]


def whole():
    return Outer((Inner(torch.arange(3), 5), Inner(torch.arange(2), 6)), torch.ones(2, 2), (1, 2))


def test_every_tensor_is_changed_and_nothing_else():
    moved = map_tensors(lambda tensor: tensor.to("meta"), whole())
    assert [t.device.type for t in tensors_in(moved)] == ["meta"] * 3
    assert [t.shape for t in tensors_in(moved)] == [t.shape for t in tensors_in(whole())]
    assert moved.splits == (1, 2) and moved.parts[1].count == 6 and moved.parts[1].nothing is None


def test_on_a_cpu_nothing_is_copied():
    value = whole()
    sent, event = Delivery(torch.device("cpu")).send(value)
    assert sent is value and event is None and receive(sent, event) is value


@pytest.mark.gpu
def test_to_a_gpu_and_back():
    device = torch.device("cuda", 0)
    sent, event = Delivery(device).send(whole())
    arrived = receive(sent, event)
    for got, want in zip(tensors_in(arrived), tensors_in(whole()), strict=True):
        assert got.device == device and torch.equal(got.cpu(), want)
