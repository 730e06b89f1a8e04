"""Rows of multiply-XOR-prime tables by plain loops over ids, in Python's own integers.

Formulas of arXiv 2601.07372 with its engram_demo_v1.py, and of transformers' model type qwen4_exp.
"""

import unicodedata

import numpy as np

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def primes(least, count, taken):
    """The first primes from `least` on that are not taken, by trial division; they are taken then."""
    found = []
    while len(found) < count:
        if least not in taken and least > 1 and all(least % d for d in range(2, int(least**0.5) + 1)):
            found.append(least)
            taken.add(least)
        least += 1
    return found


def engram_multipliers(vocab_size, count, seed, layer):
    """Drawn from the raw words of PCG64 by Lemire's method (arXiv 1805.10941): the upper half of word x bound, drawn
    again where the lower half is below 2**64 mod bound. numpy does so for bounds above 2**32."""
    bound = max(1, (2**63 - 1) // vocab_size // 2)
    words = np.random.PCG64(seed + 10007 * layer)
    found = []
    while len(found) < count:
        product = int(words.random_raw()) * bound
        if product & MASK >= 2**64 % bound:
            found.append(2 * (product >> 64) + 1)
    return found


def splitmix64(value):
    z = (value + GAMMA) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def qwen_multipliers(vocab_size, count, seed, number):
    bound = max(1, (2**63 - 1) // vocab_size // 2)
    return [2 * (splitmix64((seed + 10007 * number + GAMMA * (i + 1)) & MASK) % bound) + 1 for i in range(count)]


def rows(ids, orders, primes_of, multipliers, missing, begins=()):
    """The rows [id][head] of a text; its heads' ranges follow each other.

    Args:
        primes_of: for each order the rows of each head.
        missing: in place of an id before the text or before the last of `begins` up to an id.
    """
    found = []
    for place in range(len(ids)):
        start = max((begin for begin in begins if begin <= place), default=0)
        heads, offset = [], 0
        for order, sizes in zip(orders, primes_of, strict=True):
            mix = 0
            for back in range(order):
                mix ^= (ids[place - back] if place - back >= start else missing) * multipliers[back]
            for size in sizes:
                heads.append(offset + mix % size)
                offset += size
        found.append(heads)
    return found


def normalised(text):
    """A text in small letters without accents, with single spaces, stripped; white space alone is one space."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c.lower() for c in text if unicodedata.category(c) != "Mn")
    words, run = [], False
    for c in text:
        if c not in " \t\r\n":
            words.append(c)
        elif not run:
            words.append(" ")
        run = c in " \t\r\n"
    text = "".join(words)
    return text if text == " " else text.strip()
