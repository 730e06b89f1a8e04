"""Document starts against plain loops over ids, and how they reach batches and keys."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foreroute.engine.config import Corpus, CorpusConfig, DataConfig, Split, Tokens
from foreroute.engine.data import documents
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.documents import NO_STARTS, cached_ends, document_positions, ends_at, new_documents
from foreroute.engine.data.streams import EvalShares, Streams, eval_batches
from foreroute.engine.errors import UserError
from foreroute.engine.routing.ngram_rows import KeyRows

END = 3
IDS = np.random.default_rng(1).integers(0, 12, 900).astype(np.uint8)


def loop(ids, end=END):
    """Starts of documents, and the position of each id in its own, id by id."""
    starts, positions = [0], []
    for place, _ in enumerate(ids):
        if place and ids[place - 1] == end:
            starts.append(place)
        positions.append(place - starts[-1])
    return starts, positions


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("ids", [IDS, IDS[:1], np.array([END]), np.array([END, END, 1, END])], ids=len)
def test_ends_equal_a_loop(ids, chunk, monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    found = ends_at(ids, END)
    assert found.dtype == np.int64
    assert found.tolist() == [place + 1 for place, value in enumerate(ids.tolist()) if value == END]
    assert [0, *found[found < len(ids)].tolist()] == loop(ids)[0]


def test_ends_example():
    assert ends_at(np.array([5, 0, 6, 7, 0, 0, 8]), 0).tolist() == [2, 5, 6]


@pytest.mark.parametrize("segment", [1, 2, 5, 64, 900])
def test_positions_equal_a_loop(segment):
    starts, positions = loop(IDS)
    first_B = np.arange(901 - segment)
    found = document_positions(np.array(starts), first_B, segment)
    assert found.dtype == torch.int32
    assert found.tolist() == [positions[first : first + segment] for first in first_B]
    # without the start of the text nothing changes; control: without another start something does
    assert torch.equal(document_positions(np.array(starts[1:]), first_B, segment), found)
    assert not torch.equal(document_positions(np.array(starts[:1] + starts[2:]), first_B, segment), found)


def test_positions_examples():
    starts = np.array([0, 3, 4])
    assert document_positions(starts, np.array([1, 3]), 4).tolist() == [[1, 2, 0, 0], [0, 0, 1, 2]]
    assert document_positions(starts, np.array([-1]), 3, text_start=-1).tolist() == [[0, 0, 1]]
    assert document_positions(starts[1:], np.array([-1]), 5, text_start=-1).tolist() == [[0, 1, 2, 3, 0]]


@pytest.mark.parametrize("context", [0, 1, 3, 20])
def test_marks_are_those_that_keys_need(context):
    """Keys of the marks are keys of all starts, marked by a loop."""
    starts, _ = loop(IDS)
    layout = Streams(IDS, 4, 6, context, document_starts=np.array(starts))
    everywhere = np.isin(np.arange(-context, len(IDS)), starts)  # 0 is a start of the text
    for index in range(layout.segments_per_epoch):
        batch = layout.batch(index, [0, 3])
        first = [stream * layout.stream_length + index * 6 for stream in (0, 3)]
        whole = torch.from_numpy(np.stack([everywhere[f : f + context + 6] for f in first]))
        assert batch.new_document_BX.shape == (2, context + 6)
        for ngram in range(1, min(context, 3) + 2):
            keys = KeyRows(ngram, 12, 12**ngram, seed=1, index=0)
            found, want = (keys.of(batch.ids_BQ, batch.left_BC, marks) for marks in (batch.new_document_BX, whole))
            assert torch.equal(found, want)
    assert Streams(IDS, 4, 6, context).batch(0, [0]).new_document_BX is None


def test_marks_example():
    found = new_documents(torch.tensor([[2, 0, 1]], dtype=torch.int32), 3)
    assert found.dtype == torch.bool and found.int().tolist() == [[0, 1, 0, 0, 1, 0]]


def test_a_position_beyond_int32_is_the_largest():
    found = document_positions(np.array([5]), np.array([2**31 + 3, 2**40]), 2)
    assert found.tolist() == [[2**31 - 2, 2**31 - 1], [2**31 - 1] * 2]


def test_streams_know_where_their_ids_lie_in_documents():
    starts, positions = loop(IDS)
    layout = Streams(IDS, 4, 6, 2, document_starts=np.array(starts))
    for index in (0, 3, layout.segments_per_epoch - 1, layout.segments_per_epoch):
        batch = layout.batch(index, [1, 3])
        first = [stream * layout.stream_length + index % layout.segments_per_epoch * 6 for stream in (1, 3)]
        assert batch.position_BQ.tolist() == [positions[f : f + 6] for f in first]
        plain = Streams(IDS, 4, 6, 2).batch(index, [1, 3])
        assert plain.position_BQ is None and torch.equal(plain.ids_BQ, batch.ids_BQ)


@pytest.mark.parametrize("first_is_start", [True, False])
def test_evaluation_knows_documents_across_the_start_of_the_split(first_is_start):
    """The first input is the id before the split: of the document that goes on in it, or of another one."""
    before = END if first_is_start else 5
    starts, positions = loop(np.concatenate([[before], IDS]))
    split_starts = np.array([start - 1 for start in starts[1:]])
    assert bool(split_starts[0] == 0) == first_is_start
    seen = {}
    for batch, counted_BQ in eval_batches(IDS, before, EvalShares(len(IDS), 3, 4, 8), 2, split_starts):
        for stream, place in counted_BQ.nonzero().tolist():
            symbol = stream * EvalShares(len(IDS), 3, 4, 8).stride + batch.index * 4 + place
            seen[symbol] = int(batch.position_BQ[stream, place])
    assert seen == dict(enumerate(positions[:-1]))


def corpus_config(tmp_path, text, end, tokens=Tokens.bytes):
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    return CorpusConfig(Corpus.file, str(path), tokens, cache_dir=str(tmp_path / "cache"), document_end=end)


TEXT = b"".join(b"line %d of the text\n" % i for i in range(50))


@pytest.mark.parametrize("end", [10, ord("e")])
def test_a_prepared_corpus_knows_its_documents(tmp_path, end):
    config = corpus_config(tmp_path, TEXT, end)
    for made in (prepare(config), prepare(config)):  # the second reads what the first wrote
        starts, first = loop(list(TEXT), end)[0], 0
        for split in Split:
            last = first + len(made.split(split))
            want = [start - first for start in starts[1:] if first <= start < last]
            assert made.document_starts(split).tolist() == want and len(want) > 1
            first = last
    assert isinstance(made.document_ends, np.memmap)
    plain = prepare(replace(config, document_end=None))
    assert all(len(plain.document_starts(split)) == 0 for split in Split)
    assert plain.sha256 == made.sha256 and np.array_equal(plain.ids, made.ids)


@pytest.mark.parametrize(
    ("end", "tokens", "message"),
    [
        (7, Tokens.bytes, "corpus.document_end=7: no document ends before the last id of the corpus"),
        (256, Tokens.bytes, "corpus.document_end=256: must be an id of the corpus, 0 to 255"),
        (30, Tokens.txl, r"corpus.document_end=30: must be an id of the corpus, 0 to \d\d"),
    ],
)
def test_an_end_that_ends_nothing_is_refused(tmp_path, end, tokens, message):
    with pytest.raises(UserError, match=message):
        prepare(corpus_config(tmp_path, TEXT, end, tokens))
    with pytest.raises(UserError, match="=-1: must be at least 0"):
        CorpusConfig(document_end=-1)


@pytest.mark.parametrize("spoilt", [b"", b"nothing", "short", "long", "wrong type"])
def test_a_damaged_cache_of_starts_is_made_again(tmp_path, spoilt):
    want = cached_ends(tmp_path, IDS, END)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if isinstance(spoilt, bytes):
        path.write_bytes(spoilt)
    elif spoilt == "short":
        path.write_bytes(whole[:-3])
    else:
        np.save(path, np.array([5, len(IDS) + 1]) if spoilt == "long" else np.array([1.0, 4.0]))
    assert np.array_equal(cached_ends(tmp_path, IDS, END), want)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert cached_ends(tmp_path, IDS, END).tolist() == loop(IDS)[0][1:]
    assert list(tmp_path.iterdir()) == []


def test_files_are_documents_and_an_end_makes_more(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number:02}.txt").write_bytes(b"%d a\nb" % number * 9)
    whole = b"".join(path.read_bytes() for path in sorted((tmp_path / "texts").iterdir()))
    config = CorpusConfig(Corpus.file, str(tmp_path / "texts"), cache_dir=str(tmp_path / "cache"))
    files = np.cumsum([len(path.read_bytes()) for path in sorted((tmp_path / "texts").iterdir())])
    lines = [place + 1 for place, value in enumerate(whole) if value == 10]
    assert prepare(config).document_ends.tolist() == files.tolist()
    both = prepare(replace(config, document_end=10))
    assert both.document_ends.tolist() == sorted({*files.tolist(), *lines})
    assert bytes(both.ids) == whole


def test_documents_of_a_mixture_are_where_it_reads_them(tmp_path):
    paths = [tmp_path / f"{name}.txt" for name in "ab"]
    for path, line in zip(paths, (b"one line\n", b"another, longer line\n"), strict=True):
        path.write_bytes(line * 60)
    config = CorpusConfig(Corpus.file, [str(path) for path in paths], cache_dir=str(tmp_path / "cache"))
    made = prepare(replace(config, weights=[2, 1], stretch=16, document_end=10))
    text, starts = made.split(Split.train)[:], made.document_starts(Split.train)
    after_ends = np.flatnonzero(text[:-1] == 10) + 1
    assert np.isin(after_ends, starts).all() and len(starts) > len(after_ends)
    others = starts[~np.isin(starts, after_ends)]
    assert (others % 16 == 0).sum() > 0  # another corpus goes on


def test_no_starts_are_known_by_default():
    assert NO_STARTS.dtype == np.int64 and len(NO_STARTS) == 0
    assert not DataConfig().reset_memory
