"""A safetensors file that is written one tensor at a time, so that it may be larger than the memory that is left.

The format: the length of the header as 8 bytes, little-endian; the header as JSON, with type, shape and place of each
tensor; then the tensors' bytes one after the other (the specification of safetensors).
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # of the first tensor in the file


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors, of any device; each is brought to the host, written and released before the next.

    Those of wide types come first, so that each lies at a multiple of its type's size.

    Raises:
        ValueError: the format has no such type.
    """
    for name, value in tensors.items():
        if value.dtype not in _TYPES:
            raise ValueError(f"{name}: a safetensors file holds no {value.dtype}")
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header, end = {}, 0
    for name in ordered:
        value = tensors[name]
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.unlink(missing_ok=True)  # tensors may be mapped from a file of this name
    with file.open("xb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in ordered:
            out.write(_bytes(tensors[name]))


def _bytes(value: Tensor) -> memoryview:
    assert sys.byteorder == "little"
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
