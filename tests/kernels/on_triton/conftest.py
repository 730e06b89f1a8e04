"""The Triton suite runs twice: in the interpreter without a GPU (TRITON_INTERPRET=1), and natively on a GPU.

Interpreted, every launch is watched: no access outside its arguments, no two writers of one address, and new memory is
poisoned, so that what a kernel forgets to write is seen. bf16 goes through a shim (kernels/testing/interpreter.py says
what it does not cover); on a GPU it is the real thing.
"""

import contextlib
import os

import pytest
import torch

from foreroute.kernels.testing.interpreter import bf16_semantics, guarded, poisoned_empty

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if INTERPRETED or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 or a GPU; make test runs it so")
    for item in items:
        if "on_triton" in item.path.parts:
            item.add_marker(skip)


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def watched(request):
    """Give the guard of an interpreted test (None on a GPU)."""
    with contextlib.ExitStack() as stack:
        guard = None
        if INTERPRETED and request.path.name != "test_interpreter.py":
            guard = stack.enter_context(guarded())
            stack.enter_context(poisoned_empty())
            if "bfloat16" in request.node.name:
                stack.enter_context(bf16_semantics())
        yield guard
