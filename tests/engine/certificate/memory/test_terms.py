"""A term's formula in words."""

from foreroute.engine.certificate.memory.terms import Term, term


def test_a_noun_after_one_is_in_the_singular():
    found = term("rows", "1 micro-batches x 1 copies x 21 queries x 1001 bytes")
    assert found == Term("rows", 21_021, "1 micro-batch x 1 copy x 21 queries x 1,001 bytes")
