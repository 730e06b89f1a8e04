"""Files of tensors, as the safetensors library reads them."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from foreroute.engine.checkpoint.tensor_file import save_tensors

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "fp32": torch.randn(4, 5),
    "a view": torch.randn(6, 4)[1:3],
    "columns": torch.randn(6, 4)[:, 1:3],
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.empty(0, 7),
    "bf16": torch.randn(3, 3).bfloat16(),
    "flags": torch.tensor([True, False]),
    "int16": torch.arange(5, dtype=torch.int16),
    "int32": torch.arange(5, dtype=torch.int32),
    "int64": torch.arange(5),
    "fp16": torch.randn(3).half(),
    "int8": torch.arange(5, dtype=torch.int8),
}


def test_the_library_reads_what_is_written(tmp_path):
    file = tmp_path / "ours.safetensors"
    save_tensors(TENSORS, file)
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    with safe_open(file, "pt") as opened:
        assert opened.get_slice("columns").get_shape() == [6, 2]
    save_file({name: value.contiguous() for name, value in TENSORS.items()}, tmp_path / "theirs.safetensors")
    assert file.stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size


def test_a_file_whose_own_tensors_are_written_again(tmp_path):
    file = tmp_path / "ours.safetensors"
    save_tensors(TENSORS, file)
    found = load_file(file)  # mapped from the file
    save_tensors({"fp32": found["fp32"]}, file)
    assert torch.equal(load_file(file)["fp32"], TENSORS["fp32"])


def test_nothing_at_all(tmp_path):
    save_tensors({}, tmp_path / "none.safetensors")
    assert load_file(tmp_path / "none.safetensors") == {}


def test_a_type_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"z: a safetensors file holds no torch\.complex64"):
        save_tensors({"z": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
