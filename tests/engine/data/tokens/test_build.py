"""Vocabularies made, kept and opened again; and what a checkpoint says of one."""

import pytest

from foreroute.engine.config import Corpus, CorpusConfig, Tokens
from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.build import make_vocab, open_vocab, same_vocab, stated, tokenizer_file
from foreroute.engine.data.tokens.byte_values import ByteVocab
from foreroute.engine.errors import UserError

TEXT = b"one two two three three three\n" * 20


def made(tokens, **options):
    config = CorpusConfig(Corpus.file, "x", tokens, **options)
    values = bytes(sorted(set(TEXT)))
    return make_vocab(config, values=values, largest_id=70, training=lambda: [Piece(TEXT, True)])


def kept(vocab, tokens, folder):
    for name, content in vocab.files().items():
        (folder / name).write_bytes(content)
    return {"tokens": tokens.name, **stated(vocab)}


@pytest.mark.parametrize("tokens", list(Tokens))
def test_a_vocabulary_opens_as_it_was_made(tmp_path, tokens):
    options = {}
    if tokens is Tokens.file:
        (tmp_path / "given.json").write_bytes(made(Tokens.bpe, vocab_size=270).files()["tokenizer.json"])
        options = {"tokenizer": str(tmp_path / "given.json")}
    vocab = made(tokens, **options)
    meta = kept(vocab, tokens, tmp_path)
    again = open_vocab(meta, tmp_path)
    assert (again.size, again.fingerprint) == (vocab.size, vocab.fingerprint)
    text = b"1 2 70" if tokens is Tokens.ids else b"two three"
    assert again.encode(text).tolist() == vocab.encode(text).tolist()
    meta["vocab_sha256"] = "0" * 64
    with pytest.raises(UserError, match=r"its vocabulary is not the one in meta.json"):
        open_vocab(meta, tmp_path)


def test_sizes():
    assert made(Tokens.bytes).size == 256 and made(Tokens.txl).size == len(set(TEXT)) - 1
    assert (made(Tokens.ids).size, made(Tokens.ids, vocab_size=100).size) == (71, 100)
    assert made(Tokens.word).size == 5 and made(Tokens.word, vocab_size=3).size == 3
    assert made(Tokens.bpe, vocab_size=260).size == 260


def test_all_vocabularies_differ():
    vocabs = [made(tokens) for tokens in Tokens if tokens is not Tokens.file]
    vocabs += [made(Tokens.ids, vocab_size=100), made(Tokens.word, vocab_size=3), made(Tokens.bpe, vocab_size=260)]
    assert len({vocab.fingerprint for vocab in vocabs}) == len(vocabs)


def test_a_checkpoint_names_its_vocabulary_by_a_hash_and_an_older_one_by_its_bytes():
    vocab, other = ByteVocab(Tokens.txl, b"abc"), ByteVocab(Tokens.txl, b"abx")
    for recorded in (vocab.fingerprint, vocab.symbols.hex()):
        assert same_vocab(recorded, vocab) and not same_vocab(recorded, other)
    assert not same_vocab(vocab.symbols.hex(), made(Tokens.word))


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    config = CorpusConfig(Corpus.file, "x", Tokens.file, tokenizer=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"corpus.tokenizer=.*none.json: cannot be read \(No such file"):
        tokenizer_file(config)
