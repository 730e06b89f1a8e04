"""A map of a vocabulary onto the texts that its ids have in common: " The", "the" and "THE" become one id.

Engram's n-grams (arXiv 2601.07372, engram_demo_v1.py) are of such ids, so that tables see spellings as one.
"""

import torch
from tokenizers import Regex
from tokenizers.normalizers import NFD, NFKC, Lowercase, Replace, Sequence, Strip, StripAccents
from torch import Tensor

from foreroute.engine.data.tokens.subwords import SubwordVocab

_ONE_SPACE = "\ue000"  # stands for a text that is white space alone while white space at the ends is stripped
_UNDECODABLE = "\ufffd"


def normalised_ids(vocab: SubwordVocab) -> Tensor:
    """Return the new id of each id, int64 [V], numbered in the order in which their texts first appear.

    A text is normalised by NFKC, then NFD without accents, in small letters, with each run of white space one space,
    and without white space at its ends. Ids whose texts are then equal become one. An id that is no text by itself,
    such as a part of a character, is known by its name in the tokenizer.json; a text of which nothing is left stays as
    it is.
    """
    normaliser = Sequence(
        [
            NFKC(),
            NFD(),
            StripAccents(),
            Lowercase(),
            Replace(Regex(r"[ \t\r\n]+"), " "),
            Replace(Regex(r"^ $"), _ONE_SPACE),
            Strip(),
            Replace(_ONE_SPACE, " "),
        ]
    )
    number: dict[str, int] = {}
    new_ids = []
    for old in range(vocab.size):
        text = vocab.tokenizer.decode([old], skip_special_tokens=False)
        if _UNDECODABLE in text:
            key = vocab.tokenizer.id_to_token(old) or text
        else:
            key = normaliser.normalize_str(text) or text
        new_ids.append(number.setdefault(key, len(number)))
    return torch.tensor(new_ids)
