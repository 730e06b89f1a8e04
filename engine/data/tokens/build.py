"""The vocabulary of a corpus: made from its training split, or opened from a prepared corpus."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from foreroute.engine.config import CorpusConfig, Tokens
from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.byte_values import ByteVocab, byte_vocab
from foreroute.engine.data.tokens.numbers import NumberVocab
from foreroute.engine.data.tokens.vocab import Vocab
from foreroute.engine.errors import UserError, require

BPE_SIZE = 8192
BYTES = (Tokens.bytes, Tokens.txl)
OF_TEXT = (Tokens.word, Tokens.bpe)


def make_vocab(
    config: CorpusConfig, *, values: bytes, largest_id: int, training: Callable[[], Iterable[Piece]]
) -> Vocab:
    """Make the vocabulary of a corpus.

    Args:
        values: the byte values that occur in the corpus, where it is text.
        largest_id: of a corpus of ids.
        training: reads the training split, for words and byte-pair encoding.

    Raises:
        UserError: the tokenizer.json is none, or the vocabulary has no room for what it must have.
    """
    if config.tokens in BYTES:
        return byte_vocab(config.tokens, values)
    if config.tokens is Tokens.ids:
        size = largest_id + 1 if config.vocab_size is None else config.vocab_size
        return NumberVocab(size)
    if config.tokens is Tokens.word:
        from foreroute.engine.data.tokens.words import count_words

        return count_words(training(), config.vocab_size)
    from foreroute.engine.data.tokens.subwords import open_tokenizer, train_bpe

    if config.tokens is Tokens.bpe:
        return train_bpe(training(), config.vocab_size or BPE_SIZE)
    return open_tokenizer(tokenizer_file(config), f"corpus.tokenizer={config.tokenizer}")


def tokenizer_file(config: CorpusConfig) -> bytes:
    """Return the content of corpus.tokenizer.

    Raises:
        UserError: it cannot be read.
    """
    assert config.tokenizer is not None
    try:
        return Path(config.tokenizer).read_bytes()
    except OSError as error:
        raise UserError(f"corpus.tokenizer={config.tokenizer}: cannot be read ({error.strerror})") from error


def open_vocab(meta: dict[str, Any], folder: Path) -> Vocab:
    """Open the vocabulary of a prepared corpus.

    Raises:
        UserError, OSError, KeyError: the folder is damaged.
    """
    tokens = Tokens[meta["tokens"]]
    vocab: Vocab
    if tokens in BYTES:
        vocab = ByteVocab(tokens, bytes(meta["symbols"]))
    elif tokens is Tokens.ids:
        vocab = NumberVocab(meta["vocab_size"])
    elif tokens is Tokens.word:
        from foreroute.engine.data.tokens.words import WORDS, open_words

        vocab = open_words((folder / WORDS).read_bytes())
    else:
        from foreroute.engine.data.tokens.subwords import TOKENIZER, open_tokenizer

        vocab = open_tokenizer((folder / TOKENIZER).read_bytes(), str(folder / TOKENIZER))
    require(vocab.fingerprint == meta["vocab_sha256"], "its vocabulary is not the one in meta.json")
    return vocab


def stated(vocab: Vocab) -> dict[str, Any]:
    """Return what a prepared corpus says of its vocabulary."""
    symbols = list(vocab.symbols) if isinstance(vocab, ByteVocab) else None
    return {"symbols": symbols, "vocab_size": vocab.size, "vocab_sha256": vocab.fingerprint}


def same_vocab(recorded: str, vocab: Vocab) -> bool:
    """Whether a checkpoint's `symbols` are this vocabulary: its sha256, in older ones the byte values themselves."""
    return recorded == vocab.fingerprint or (isinstance(vocab, ByteVocab) and recorded == vocab.symbols.hex())
