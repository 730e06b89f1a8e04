"""The feed-forwards of an encoder as experts, for fine-tuning with growing k (SMoE-Dropout, arXiv 2303.01610).

    split   slices of each feed-forward (engine/convert/split.py): as many parameters as before. All slices together
            are the feed-forward, so at k = E fine-tuning begins with the pre-trained function.
    copy    whole copies (engine/convert/copies.py), with E times the parameters and k times the work. At every k
            fine-tuning begins with the pre-trained function.

Hashed tables are balanced on the ids of the training examples. Word pieces stand for words, so by default a key is the
id alone (Hash Layers, arXiv 2106.04426).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.convert import Copies, Slices
from foreroute.engine.hugging_face.dense_models import convert_model
from foreroute.engine.hugging_face.encoders.texts import TokenSequence
from foreroute.engine.plug_in.planned_experts import PlannedExperts

FROZEN = "frozen"


def as_experts(
    model: Any, router: str, experts: int, text_ids: NDArray[np.int64], *, split: bool = True, seed: int = 0
) -> PlannedExperts:
    """Turn the feed-forwards of a BERT into experts, k = experts at first.

    Args:
        model: a BertModel of transformers.
        router: frozen, or a planned router such as hashed.
        text_ids: of the training examples, as one stream.
        split: slices, not copies.
        seed: of routers and clusters.

    Raises:
        UserError: the number of experts does not divide the hidden width, or the router has other weights.
    """
    frozen = router == FROZEN
    rows: int = model.get_input_embeddings().weight.shape[0]
    moe = MoEConfig(
        router=router,
        experts=experts,
        ngram=1,
        rows=rows,
        options={"sum": split} if frozen else {},
        weights=RouteWeights.sum if split else RouteWeights.uniform,
    )
    start = Slices() if split else Copies()
    return convert_model(model, start, moe=moe, k=experts, text_ids=None if frozen else text_ids, seed=seed)


def stream_of(sequences: Iterable[TokenSequence]) -> NDArray[np.int64]:
    """Return the ids of sequences one after the other."""
    return np.concatenate([sequence.ids for sequence in sequences])
