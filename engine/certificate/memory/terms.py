"""A term of memory: bytes with the formula that they come from, in words and numbers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Term:
    """One kind of memory of a rank."""

    name: str
    bytes: int
    formula: str  # such as "4 layers x 512 tokens x 256 width x 4 bytes"
    host: bool = False  # lies in the host's memory (train.offload)


def term(name: str, formula: str, *, host: bool = False) -> Term:
    """Make a term from its formula: factors with " x " between them, each a number and its noun.

    Numbers get commas, and a noun after 1 is in the singular.

    Example: term("logits", "8 tokens x 64 symbols x 4 bytes") has 2048 bytes.
    """
    factors = [factor.split(" ", 1) for factor in formula.split(" x ")]
    text = " x ".join(f"{int(number):,} {noun}" for number, noun in factors)
    text = re.sub(r"(?<![\w,])1 ([a-z-]+?)(ies|(?<=ch)es|s)\b", _singular, text)
    return Term(name, prod(int(number) for number, _ in factors), text, host)


def _singular(found: re.Match[str]) -> str:
    noun, ending = found.groups()
    return f"1 {noun}{'y' if ending == 'ies' else ''}"


def total(terms: Iterable[Term], *, host: bool | None = None) -> int:
    """Add up terms; of the host's memory, of the device's, or all."""
    return sum(each.bytes for each in terms if host is None or each.host == host)


def largest(*alternatives: list[Term]) -> list[Term]:
    """Take the terms that need the most."""
    return max(alternatives, key=total)


def merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Put terms of the same name together and leave out those of 0 bytes."""
    found: dict[str, Term] = {}
    for each in terms:
        if each.bytes == 0:
            continue
        before = found.get(each.name)
        if before is not None:
            each = Term(each.name, before.bytes + each.bytes, f"{before.formula} + {each.formula}", each.host)
        found[each.name] = each
    return tuple(found.values())
