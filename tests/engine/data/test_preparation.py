"""Corpora of many files, of any vocabulary and of ids, against what plain code makes of the same files in memory."""

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer

from foreroute.engine.config import Corpus, CorpusConfig, Split, Tokens
from foreroute.engine.data import preparation
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.sources import source as module
from foreroute.engine.errors import UserError

TEXTS = [f"Document {i}: \u00e9 {'word ' * (i % 7)}{i * i}.\nIt has {i} lines.\n" for i in range(300)]


def config(tmp_path, path, **options):
    return CorpusConfig(Corpus.file, path, cache_dir=str(tmp_path / "cache"), **options)


def write_shards(folder, shards=3):
    folder.mkdir()
    for i in range(shards):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[i * 100 : (i + 1) * 100])
        (folder / f"{i}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return str(folder)


def cut_in_documents(documents, train=90, valid=95):
    """Documents of each split: cuts move to the end of a document."""
    sizes = np.cumsum([len(document) for document in documents])
    at = [int(np.searchsorted(sizes, sizes[-1] * share // 100)) + 1 for share in (train, valid)]
    return documents[: at[0]], documents[at[0] : at[1]], documents[at[1] :]


def test_bytes_of_json_lines_are_cut_exactly_and_documents_end_at_lines(tmp_path):
    made = prepare(config(tmp_path, write_shards(tmp_path / "shards")))
    documents = [text.encode() for text in TEXTS]
    text = b"".join(documents)
    assert bytes(made.ids) == text and made.ids.dtype == np.uint8
    assert made.meta["cuts"] == [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    assert made.document_ends.tolist() == np.cumsum([len(document) for document in documents]).tolist()
    assert made.sha256 == hashlib.sha256(text).hexdigest()
    assert {made.bits_per_byte(split, 2.1) for split in Split} == {2.1}


@pytest.mark.parametrize("tokens", [Tokens.word, Tokens.bpe])
def test_other_symbols_are_cut_at_documents_and_learned_from_the_training_split(tmp_path, tokens):
    size = 300 if tokens is Tokens.bpe else None
    made = prepare(config(tmp_path, write_shards(tmp_path / "shards"), tokens=tokens, vocab_size=size))
    parts = cut_in_documents([text.encode() for text in TEXTS])
    known = set(b"".join(parts[0]).decode().split())
    if tokens is Tokens.word:
        assert set(made.vocab.words) == known | {"<eos>", "<unk>"}
        words = [[w for document in part for w in document.decode().replace("\n", " <eos> ").split()] for part in parts]
        known.add("<eos>")
        want = [[made.vocab.words.index(w if w in known else "<unk>") for w in part] for part in words]
    else:
        library = Tokenizer.from_str(made.vocab.files()["tokenizer.json"].decode())
        want = [[i for document in part for i in (*library.encode(document.decode()).ids, 0)] for part in parts]
        assert made.vocab.size == 300 and made.ids.dtype == np.uint16
        assert [made.vocab.decode(made.split(split)) for split in Split] == [b"".join(part) for part in parts]
    for split, ids, part in zip(Split, want, parts, strict=True):
        assert made.split(split).tolist() == ids
        unknown = [w for w in b" ".join(part).decode().split() if w not in known and tokens is Tokens.word]
        spelled = sum(len(word.encode()) + 1 for word in unknown)
        assert bool(spelled) == (tokens is Tokens.word and split is not Split.train)
        assert made.bits_per_byte(split, 3) == pytest.approx((3 * len(ids) + 8 * spelled) / sum(map(len, part)))
    assert len(made.document_ends) == len(TEXTS) and made.document_ends[-1] == len(made.ids)
    assert set(made.meta["cuts"][1:]) <= set(made.document_ends.tolist())
    again = prepare(config(tmp_path, str(tmp_path / "shards"), tokens=tokens, vocab_size=size))
    assert again.vocab.fingerprint == made.vocab.fingerprint


def test_the_same_text_in_other_files_is_the_same_corpus(tmp_path):
    text = "".join(TEXTS).encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "a.gz").write_bytes(gzip.compress(text))
    (tmp_path / "parts").mkdir()
    for i in range(2):
        (tmp_path / "parts" / f"{i}.txt").write_bytes(text[i * 5000 : (i + 1) * 5000 if i == 0 else None])
    lines = []
    plain = prepare(config(tmp_path, str(tmp_path / "a.txt")), lines.append)
    packed = prepare(config(tmp_path, str(tmp_path / "a.gz")), lines.append)
    assert len(lines) == 1 and packed.ids.filename == plain.ids.filename
    assert packed.notes == [*plain.notes, "corpus a.gz: compressed (gzip or zstd), and unpacked as it is read"]
    parts = prepare(config(tmp_path, str(tmp_path / "parts" / "*.txt")))
    listed = prepare(config(tmp_path, [str(tmp_path / "parts" / f"{i}.txt") for i in range(2)]))
    assert bytes(parts.ids) == bytes(listed.ids) == text and parts.sha256 == listed.sha256 == plain.sha256
    assert (parts.document_ends.tolist(), plain.document_ends.tolist()) == ([5000, len(text)], [len(text)])


def test_a_file_for_each_split_and_other_proportions(tmp_path):
    paths = {}
    for name, text in (("train", b"train " * 50), ("valid", b"valid " * 7), ("test", b"test " * 9)):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_bytes(text)
    train, valid, test = map(str, paths.values())
    made = prepare(config(tmp_path, train, valid_path=valid, test_path=[test, test]))
    assert [bytes(made.split(split)) for split in Split] == [b"train " * 50, b"valid " * 7, b"test " * 18]
    assert "each split" in made.notes[0]
    other = prepare(config(tmp_path, train, valid_path=test, test_path=valid))
    assert other.sha256 != made.sha256
    cut = prepare(config(tmp_path, train, proportions=[1, 1, 2]))
    assert [len(cut.split(split)) for split in Split] == [75, 75, 150]
    assert cut.sha256 != prepare(config(tmp_path, train)).sha256
    paths["valid"].write_bytes(b"")
    with pytest.raises(UserError, match=r"the valid split is empty"):
        prepare(config(tmp_path, train, valid_path=valid, test_path=test))


@pytest.mark.parametrize("tokens", [Tokens.bytes, Tokens.word])
def test_a_mixture_reads_each_corpus_as_often_as_its_weight_says(tmp_path, tokens):
    folder = write_shards(tmp_path / "shards")
    (tmp_path / "other.txt").write_text("another text, with other words\n" * 300)
    paths = [folder, str(tmp_path / "other.txt")]
    made = prepare(config(tmp_path, paths, weights=[2, 1], stretch=64, tokens=tokens))
    alone = [prepare(config(tmp_path, path)) for path in paths]
    ids = made.split(Split.train)
    if tokens is Tokens.bytes:
        own = [corpus.split(Split.train) for corpus in alone]
        for split in (Split.valid, Split.test):  # one after the other
            assert bytes(made.split(split)) == b"".join(bytes(corpus.split(split)) for corpus in alone)
    else:
        first, second = made.meta["corpora"]
        own = [made.ids[:first], made.ids[first:second]]
        assert {made.vocab.words[i] for i in own[1]} == {"<eos>", *["another", "text,", "with", "other", "words"]}
    cursor = [0, 0]
    for place in range(0, len(ids), 64):
        chosen = [0, 1, 0][place // 64 % 3]
        want = np.take(own[chosen], range(cursor[chosen], cursor[chosen] + 64), mode="wrap")
        assert ids[place : place + 64].tolist() == want.tolist()
        cursor[chosen] += 64
    assert min(seen / len(part) for seen, part in zip(cursor, own, strict=True)) >= 1
    listed = prepare(config(tmp_path, paths, tokens=tokens))
    assert listed.sha256 != made.sha256 and len(listed.split(Split.train)) != len(ids)
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(UserError, match=r"a corpus of the mixture has none to train on"):
        prepare(config(tmp_path, paths, weights=[2, 1], tokens=tokens))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"path": "x", "weights": [1]}, "needs as many entries in a list corpus.path"),
        ({"path": ["x", "y"], "weights": [1, 2, 3]}, "needs as many entries"),
        ({"path": ["x", "y"], "weights": [1, 0]}, "must be whole numbers of at least 1"),
        ({"path": []}, r"corpus.path is missing"),
        ({"path": 3}, "corpus.path=3: must be a path or a list of paths"),
        ({"path": "x", "valid_path": "y"}, "belong together"),
        ({"path": "x", "proportions": [90, 10]}, "must be three numbers"),
        ({"path": "x", "tokens": Tokens.ids, "field": "text"}, "corpus.field=text: needs"),
        ({"path": "x", "vocab_size": 300}, "corpus.vocab_size=300: needs corpus.tokens=bpe, word or ids, it is bytes"),
        ({"path": "x", "tokens": Tokens.bpe, "vocab_size": 256}, "must be from 257 to 2"),
        ({"path": "x", "tokens": Tokens.file}, "corpus.tokenizer is missing"),
        (
            {"path": "x", "tokens": Tokens.bpe, "tokenizer": "y"},
            "corpus.tokenizer=y: needs corpus.tokens=file, it is bpe",
        ),
        ({"path": "x", "tokens": Tokens.ids, "dtype": "float32"}, "corpus.dtype=float32: must be uint8"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, words):
    path = options.pop("path")
    with pytest.raises(UserError, match=words):
        config(tmp_path, path, **options)


@pytest.mark.parametrize("largest, dtype", [(255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32)])
def test_ids_of_any_width(tmp_path, largest, dtype):
    ids = np.random.default_rng(0).integers(0, largest + 1, 5000)
    ids[3] = largest
    np.save(tmp_path / "ids.npy", ids)
    (tmp_path / "ids.bin").write_bytes(ids.astype(np.uint32).tobytes())
    made = prepare(config(tmp_path, str(tmp_path / "ids.npy"), tokens=Tokens.ids))
    assert made.ids.dtype == dtype and made.ids.tolist() == ids.tolist() and made.vocab.size == largest + 1
    assert [len(made.split(split)) for split in Split] == [4500, 250, 250]
    assert made.bits_per_byte(Split.test, 3) is None and "5,000 ids" in made.notes[0]
    raw = prepare(config(tmp_path, str(tmp_path / "ids.bin"), tokens=Tokens.ids, dtype="uint32", vocab_size=70_000))
    assert raw.ids.dtype == np.uint32 and raw.ids.tolist() == ids.tolist() and raw.vocab.size == 70_000
    assert raw.sha256 == made.sha256
    with pytest.raises(UserError, match=f"corpus.vocab_size={largest}: id {largest} at place"):
        prepare(config(tmp_path, str(tmp_path / "ids.npy"), tokens=Tokens.ids, vocab_size=largest))


def test_a_tokenizer_json_reads_text_and_its_own_ids(tmp_path):
    (tmp_path / "text.txt").write_bytes("".join(TEXTS).encode())
    made = prepare(config(tmp_path, str(tmp_path / "text.txt"), tokens=Tokens.bpe, vocab_size=300))
    (tmp_path / "tokenizer.json").write_bytes(made.vocab.files()["tokenizer.json"])
    options = {"tokens": Tokens.file, "tokenizer": str(tmp_path / "tokenizer.json")}
    same = prepare(config(tmp_path, str(tmp_path / "text.txt"), **options))
    assert same.ids.tolist() == made.ids.tolist() and same.vocab.fingerprint == made.vocab.fingerprint
    np.save(tmp_path / "ids.npy", made.ids)
    ids = prepare(config(tmp_path, str(tmp_path / "ids.npy"), **options))
    assert ids.ids.tolist() == made.ids.tolist()
    assert ids.vocab.decode(ids.ids) == "".join(TEXTS).encode()


@pytest.mark.parametrize("place", ["first", "last"])
def test_broken_sources_leave_nothing_and_name_the_place(tmp_path, place):
    folder = write_shards(tmp_path / "shards")
    good = prepare(config(tmp_path, folder, tokens=Tokens.word))
    file = Path(folder) / ("0.jsonl.zst" if place == "first" else "2.jsonl.zst")
    lines = zstandard.decompress(file.read_bytes()).split(b"\n")
    lines[41] = lines[41].replace(b"text", b"body")
    file.write_bytes(zstandard.compress(b"\n".join(lines)))
    with pytest.raises(UserError, match=f"^corpus.path: .*{file.name}, line 42: has no field 'text'"):
        prepare(config(tmp_path, folder, tokens=Tokens.word))
    (kept,) = (tmp_path / "cache/corpora").iterdir()
    assert kept == Path(good.ids.filename).parent


def test_a_source_that_changes_after_it_was_scanned_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("".join(TEXTS))
    real = module.scan

    def scan(*arguments):
        found = real(*arguments)
        path.write_text("".join(TEXTS).swapcase())
        return found

    monkeypatch.setattr("foreroute.engine.data.corpus.scan", scan)
    with pytest.raises(UserError, match=r"text.txt: has changed while it was read; run again"):
        prepare(config(tmp_path, str(path)))
    assert not list((tmp_path / "cache/corpora").iterdir())


def test_an_unchanged_source_is_not_read_again(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "shards")
    first = prepare(config(tmp_path, folder))

    def refused(*arguments):
        raise AssertionError

    monkeypatch.setattr(module, "read_json_lines", refused)
    assert prepare(config(tmp_path, folder)).sha256 == first.sha256
    (Path(folder) / "0.jsonl.zst").touch()
    with pytest.raises(AssertionError):
        prepare(config(tmp_path, folder))


def _prepare(options):
    lines = []
    made = prepare(CorpusConfig(*options[:2], cache_dir=options[2], tokens=Tokens.bpe, vocab_size=400), lines.append)
    return lines, made.vocab.fingerprint


def test_processes_that_start_together_prepare_once(tmp_path):
    options = (Corpus.file, write_shards(tmp_path / "shards"), str(tmp_path / "cache"))
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_prepare, [options] * 3))
    assert len({fingerprint for _, fingerprint in found}) == 1
    assert sum("preparing" in line for lines, _ in found for line in lines) == 1


def test_what_a_killed_preparation_left_is_deleted_later(tmp_path):
    folder = write_shards(tmp_path / "shards")
    name = Path(prepare(config(tmp_path, folder)).ids.filename).parent
    old, new = (name.with_name(f".{name.name}.{mark}") for mark in ("old", "new"))
    for aside in (old, new):
        shutil.copytree(name, aside)
    shutil.rmtree(name)
    for path in (*old.iterdir(), old):
        os.utime(path, (time.time() - 7200,) * 2)
    prepare(config(tmp_path, folder))
    assert not old.exists() and new.exists() and name.exists()


def test_what_a_killed_preparation_left_is_deleted_by_the_next_one(tmp_path, monkeypatch):
    """The lock of a process that still writes is held, that of a killed one is free."""
    folder, locked = write_shards(tmp_path / "shards"), []
    write = preparation._write

    def watched(aside, *rest):
        with (aside / "ids.bin").open("r+b") as ids, pytest.raises(BlockingIOError):
            fcntl.flock(ids, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked.append(aside.name)
        write(aside, *rest)

    monkeypatch.setattr(preparation, "_write", watched)
    name = Path(prepare(config(tmp_path, folder)).ids.filename).parent
    (ours,) = locked
    killed, writing = (name.with_name(f"{ours[:-32]}{mark}") for mark in ("killed", "writing"))
    for aside in (killed, writing):
        shutil.copytree(name, aside)
    shutil.rmtree(name)
    with (writing / "ids.bin").open("rb") as ids:
        fcntl.flock(ids, fcntl.LOCK_EX)
        prepare(config(tmp_path, folder))
    assert not killed.exists() and writing.exists() and name.exists()


def test_progress_says_how_long_it_will_take(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = preparation.Meter(lines.append, "ids", lambda: 1000, lambda n: f"{n} bytes")
    for _ in range(10):
        now[0] += 4
        meter(50)
    assert lines == [
        "ids: 150 bytes of 1000 bytes, about 68 s left",
        "ids: 300 bytes of 1000 bytes, about 56 s left",
        "ids: 450 bytes of 1000 bytes, about 44 s left",
    ]
