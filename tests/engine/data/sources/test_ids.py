"""Files of ids; the Megatron pair is written here by the format's description, field by field."""

import struct

import numpy as np
import pytest

from foreroute.engine.data.sources import ids as module
from foreroute.engine.data.sources.files import SourceFile
from foreroute.engine.data.sources.ids import read_ids
from foreroute.engine.errors import UserError

CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


def documents(path, dtype=None):
    found, part = [], []
    for data, ends in read_ids(SourceFile(path, "corpus.path=x"), dtype):
        part += data.tolist()
        if ends:
            found.append(part)
            part = []
    assert not part
    return found


def write_pair(path, dtype, sequences, marks):
    size = np.dtype(dtype).itemsize
    lengths = [len(sequence) for sequence in sequences]
    places = [size * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<QQ", len(sequences), len(marks))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(places)}q", *places)
    index += struct.pack(f"<{len(marks)}q", *marks)
    path.with_suffix(".idx").write_bytes(index)
    path.with_suffix(".bin").write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))
    return path.with_suffix(".bin")


@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_npy_and_raw_files(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    numbers = [5, 70_000, 0, 2**31 - 1, 7]
    np.save(tmp_path / "x.npy", np.array(numbers))
    assert documents(tmp_path / "x.npy") == [numbers]
    for dtype in ("uint32", "int64"):
        (tmp_path / "x.bin").write_bytes(np.array(numbers, dtype).tobytes())
        assert documents(tmp_path / "x.bin", dtype) == [numbers]


@pytest.mark.parametrize("dtype", list(CODES))
def test_a_megatron_pair_has_documents_of_sequences(tmp_path, dtype):
    sequences = [[1, 2, 3], [4], [], [5, 6], [7]]
    path = write_pair(tmp_path / "x", dtype, sequences, [0, 2, 4, 5])
    assert documents(path) == [[1, 2, 3, 4], [5, 6], [7]]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda index: b"X" + index[1:], "no Megatron index of ids"),
        (lambda index: index[:20], "is no Megatron index"),
        (lambda index: index[:-1], "has 65 bytes, needs 66"),
        (lambda index: index[:42] + struct.pack("<q", 1) + index[50:], "one after the other"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, damage, words):
    path = write_pair(tmp_path / "x", "uint16", [[1, 2], [3]], [0])
    assert documents(path) == [[1, 2, 3]]
    index = path.with_suffix(".idx")
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(UserError, match=f"^corpus.path=x: .*x.idx .*{words}"):
        documents(path)


def test_what_is_no_id_is_named(tmp_path):
    for numbers, words in (([3, -1], "id -1 at place 1:"), ([1, 2, 2**31], "id 2147483648 at place 2:")):
        np.save(tmp_path / "x.npy", np.array(numbers))
        with pytest.raises(UserError, match=f"^corpus.path=x: {words} must be from 0 to"):
            documents(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.zeros((2, 2), np.int64))
    with pytest.raises(UserError, match=r"holds int64 of shape \(2, 2\), must be whole numbers in one row"):
        documents(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"not a .npy file of numbers"):
        documents(tmp_path / "x.npy")
    (tmp_path / "x.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"3 bytes are no whole number of uint16"):
        documents(tmp_path / "x.bin", "uint16")
    with pytest.raises(UserError, match=r"raw ids need corpus.dtype="):
        documents(tmp_path / "x.bin")
