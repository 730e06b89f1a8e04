"""Texts as ids: special ids, cutting and padding, by hand."""

import json

import pytest

from foreroute.engine.errors import UserError
from foreroute.engine.hugging_face.encoders.texts import WordPieces
from foreroute.engine.testing.tiny_words import write_tokenizer


def words(folder, longest=16):
    write_tokenizer(folder, ["a", "good", "film", "##s", "bad"])
    return WordPieces(folder, longest)


def test_special_ids_are_around_a_text(tmp_path):
    of = words(tmp_path)
    assert [one.ids.tolist() for one in of.encode(["a good films", "x"])] == [[2, 5, 6, 7, 8, 3], [2, 1, 3]]
    assert (of.padding, of.vocabulary.mask, of.vocabulary.size) == (0, 4, 10)
    assert sorted(of.vocabulary.special) == [0, 1, 2, 3, 4]


def test_pads_at_the_right(tmp_path):
    of = words(tmp_path)
    batch = of.pad(of.encode(["bad", "a good film"]))
    assert batch.ids_BQ.tolist() == [[2, 9, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert batch.mask_BQ.tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_long_texts_are_cut(tmp_path):
    of = words(tmp_path, longest=5)
    assert of.encode(["a " * 9])[0].ids.tolist() == [2, 5, 5, 5, 3]


def test_padding_and_cutting_of_the_file_do_not_count(tmp_path):
    """Sentence encoders save theirs with a fixed length."""
    words(tmp_path)
    path = tmp_path / "tokenizer.json"
    found = json.loads(path.read_text())
    found["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    path.write_text(json.dumps(found))
    assert WordPieces(tmp_path, 16).encode(["bad"])[0].ids.tolist() == [2, 9, 3]


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json: is no tokenizer"):
        WordPieces(tmp_path, 16)
    words(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[HIDE]"))
    with pytest.raises(UserError, match=r"has no \[MASK\]"):
        WordPieces(tmp_path, 16)
