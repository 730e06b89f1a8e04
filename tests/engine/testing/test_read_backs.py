"""The tool that sees read-backs: each kind of them, where it happens, and what is none."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from foreroute.engine.testing.read_backs import HostWaits, ReadBacks

VALUES = torch.arange(4.0)
READS = {
    "item": lambda: VALUES.sum().item(),
    "bool": lambda: bool(VALUES.sum() > 1),
    "float": lambda: float(VALUES[1]),
    "int": lambda: int(VALUES[1]),
    "format": lambda: f"{VALUES[1]:.2f}",
    "tolist": lambda: VALUES.tolist(),
    "numpy": lambda: VALUES.numpy(),
    "cpu": lambda: VALUES.cpu(),
    "nonzero": lambda: VALUES.nonzero(),
    "unique": lambda: VALUES.unique(),
    "masked_select": lambda: VALUES.masked_select(VALUES > 1),
    "index of booleans": lambda: VALUES[VALUES > 1],
    "write where true": lambda: VALUES.clone().__setitem__(VALUES > 1, VALUES[2:]),
    "equal": lambda: torch.equal(VALUES, VALUES),
    "allclose": lambda: torch.allclose(VALUES, VALUES),
    "repeat": lambda: VALUES.repeat_interleave(torch.tensor([1, 0, 2, 1])),
    "upload": lambda: torch.tensor([1.0, 2.0], device="cpu"),
    "upload beside another": lambda: VALUES.new_tensor([1.0, 2.0]),
}
QUIET = {
    "arithmetic": lambda: (VALUES * 2 + 1).softmax(0),
    "index": lambda: VALUES[torch.tensor([1, 0])],
    "where": lambda: torch.where(VALUES > 1, VALUES, 0.0),
    "masked_fill": lambda: VALUES.masked_fill(VALUES > 1, -1.0),
    "sizes": lambda: VALUES.new_zeros(VALUES.shape[0]),
    "repeat, sized": lambda: VALUES.repeat_interleave(torch.tensor([1, 0, 2, 1]), output_size=4),
    "nonzero, sized": lambda: torch.nonzero_static(VALUES, size=3),
    "a tensor of the host": lambda: torch.tensor([1.0, 2.0]),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_back_is_seen(name):
    with ReadBacks() as seen:
        READS[name]()
    assert seen.found and all(found.place.startswith("testing/test_read_backs.py:") for found in seen.found)
    with pytest.raises(HostWaits, match=r"test_read_backs\.py"), ReadBacks(refuse=True):
        READS[name]()


@pytest.mark.parametrize("name", QUIET)
def test_what_waits_for_nothing_is_not_seen(name):
    with ReadBacks(refuse=True) as seen:
        QUIET[name]()
    assert seen.found == []


class Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_T):
        return x_T * 1

    @staticmethod
    def backward(ctx, gradient_T):
        gradient_T.sum().item()
        return gradient_T


def by_hook(x_T: Tensor) -> Tensor:
    x_T.register_hook(lambda gradient_T: gradient_T.tolist() and None)
    return x_T * 1


@pytest.mark.parametrize("plant", [Reading.apply, by_hook])
def test_backward_passes_are_watched(plant):
    leaf_T = torch.ones(3, requires_grad=True)
    with ReadBacks() as seen:
        y_T = plant(leaf_T)
        assert seen.found == []
        y_T.sum().backward()
    assert len(seen.found) == 1


def test_allowed_places_and_the_end():
    def named():
        return VALUES.sum().item()

    with ReadBacks(refuse=True, allowed=["test_read_backs.py:named"]) as seen:
        named()
        with pytest.raises(HostWaits):
            VALUES.sum().item()
    assert len(seen.found) == 1
    assert VALUES.sum().item() == 6.0 and VALUES.tolist()  # nobody watches any more


def test_other_threads_are_not_watched():
    with ReadBacks(refuse=True), ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: [VALUES.tolist(), VALUES.sum().item()]).result() == [[0.0, 1.0, 2.0, 3.0], 6.0]
