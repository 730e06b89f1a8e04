"""A term's formula in words."""

from foreroute.engine.certificate.memory.terms import Term, term


def test_a_noun_after_one_is_in_the_singular():
    found = term("rows", "{} micro-batches x {} copies x {} queries x {} bytes", 1, 1, 21, 1_001)
    assert found == Term("rows", 21_021, "1 micro-batch x 1 copy x 21 queries x 1,001 bytes")
