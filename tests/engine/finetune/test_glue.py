"""Reading GLUE's files, and holding examples out that share nothing with the rest."""

import os
import random
from pathlib import Path

import pytest

from foreroute.engine.errors import UserError
from foreroute.engine.finetune.glue import Example, hold_out, read_examples

HEADER = b"sentence\tlabel\n"
SST2 = Path(os.environ.get("FOREROUTE_DATA", "")) / "sst2"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_reads_every_line(tmp_path, end):
    path = tmp_path / "dev.tsv"
    lines = [b"sentence\tlabel", b'it \'s "a" charming \xc3\xa9 journey . \t1', b" bleak\t0"]
    path.write_bytes(end.join(lines) + end)
    want = [Example(b'it \'s "a" charming \xc3\xa9 journey .', 1), Example(b"bleak", 0)]
    assert read_examples(path) == want


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "cannot be read (No such file"),
        (b"", "the first line is '', it must be 'sentence\\tlabel'"),
        (b"label\tsentence\n1\tgood\n", "the first line is 'label\\tsentence'"),
        (HEADER, "holds no examples"),
        (HEADER + b"good\t1\nbad\n", "line 3: has 1 columns"),
        (HEADER + b"good\t1\n\nbad\t0\n", "line 3: has 1 columns"),
        (HEADER + b"good\tbad\t0\n", "line 2: has 3 columns"),
        (HEADER + b"good\t\n", "line 2: the label is ''"),
        (HEADER + b"good\t2\n", "line 2: the label is '2', it must be 0 or 1"),
        (HEADER + b"good\tpositive\xff\n", "line 2: the label is 'positive"),
        (HEADER + b"good\t" + b"0123456789" * 5 + b"\n", f"the label is '{'0123456789' * 4}', it"),
        (HEADER + b" \t1\n", "line 2: the sentence is empty"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, content, word):
    path = tmp_path / "train.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_examples(path)
    line = str(error.value)
    assert line.startswith(str(path)) and word in line and "\n" not in line, line


def share_words(one: bytes, other: bytes, count: int) -> bool:
    """Whether two texts have `count` words in a row in common; by trying all places."""
    a, b = one.split(), other.split()
    return any(
        a[i : i + count] == b[j : j + count] for i in range(len(a) - count + 1) for j in range(len(b) - count + 1)
    )


def phrases(sentences: int) -> list[Example]:
    """Sentences of 12 words with halves of them, as SST-2's train has phrases."""
    rng, words = random.Random(0), [b"w%d" % i for i in range(30)]
    found = []
    for _ in range(sentences):
        text = rng.choices(words, k=12)
        found += [Example(b" ".join(part), rng.randrange(2)) for part in (text, text[:6], text[6:9], text[9:])]
    return found


def test_held_out_examples_share_nothing_with_the_rest():
    examples = phrases(40)
    rest, held_out = hold_out(examples, 8, seed=3)
    assert len(held_out) == 8 and len({e.text for e in held_out}) == 8
    assert all(len(e.text.split()) == 12 for e in held_out)  # from the longest quarter
    for example in examples:
        shares = any(example.text == other.text or share_words(example.text, other.text, 5) for other in held_out)
        assert shares != (example in rest), example
    # negative control: a split by chance leaves halves of held-out sentences in the training part
    mixed = random.Random(3).sample(examples, len(examples))
    assert any(share_words(e.text, other.text, 5) for e in mixed[8:] for other in mixed[:8])


def test_held_out_examples_depend_on_the_seed_alone():
    examples = phrases(40)
    assert hold_out(examples, 8, seed=3) == hold_out(examples, 8, seed=3)
    assert hold_out(examples, 8, seed=3)[1] != hold_out(examples, 8, seed=4)[1]


def test_too_much_held_out_is_refused():
    examples = phrases(10)
    with pytest.raises(UserError, match="held_out=11: must be at most 10"):
        hold_out(examples, 11, seed=0)
    with pytest.raises(UserError, match="held_out=1: leaves nothing"):
        hold_out([Example(b"a b", 1)] * 4, 1, seed=0)
    assert hold_out([Example(b"a b", 1)] * 3 + [Example(b"c", 0)], 1, seed=0)[0] == [Example(b"c", 0)]


@pytest.mark.skipif(not SST2.is_dir(), reason="FOREROUTE_DATA has no sst2")
def test_sst2_is_whole():
    train, dev = (read_examples(SST2 / name) for name in ("train.tsv", "dev.tsv"))
    assert len(train) == 67_349 and len(dev) == 872
    assert sum(e.label for e in dev) == 444 and sum(e.label for e in train) == 37_569
    rest, held_out = hold_out(train, 1000, seed=1)
    assert len(held_out) == 1000 and 50_000 < len(rest) < 66_349
