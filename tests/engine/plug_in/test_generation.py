"""Generation with a cache is generation without: each step plans from all ids so far, padding left of them too."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foreroute.engine.config import Builder, MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.plug_in import replace_feed_forwards

SYMBOLS, WIDTH, N, NEW = 29, 16, 3, 12
MOE = MoEConfig(experts=8, expert_width=16, ngram=N, rows=SYMBOLS**N, builder=Builder.random)


def prompts(left):
    """Three prompts, one of a single id, padded on the left or alike in length."""
    torch.manual_seed(1)
    ids, mask = torch.randint(1, SYMBOLS, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    if left:
        mask[1, :3], mask[2, :6] = 0, 0
    return ids.where(mask > 0, 0), mask


# A model of our own.


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask, cache):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if cache is not None:
            cache.append((k, v))
            k, v = (torch.cat(parts, dim=1) for parts in zip(*cache, strict=True))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        seen = (seen & (mask[:, None] > 0)) | (
            torch.arange(k.shape[1]) == torch.arange(k.shape[1])[-q.shape[1] :, None]
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


class Ours(nn.Module):
    """No positions: attention sees real ids only."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH)) for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids, mask, cache=None, before=None):
        x = self.embed(ids)
        for number, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(x, mask, None if cache is None else cache[number])
            x = x + 3 * mlp(x)
        return self.head(x[:, -1])


def generate(model, ids, mask, cached):
    """Greedy; with a cache each call has the ids that are not in it."""
    cache = [[], []] if cached else None
    with torch.no_grad():
        done = 0
        for _ in range(NEW):
            context = {"cache": cache, "before": ids[:, :done]} if cached else {"before": None}
            logits = model(ids[:, done:], mask, **context)
            done = ids.shape[1] if cached else 0
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
            mask = F.pad(mask, (0, 1), value=1)
    return ids


@pytest.mark.parametrize("left", [False, True])
def test_a_model_of_ours(left):
    torch.manual_seed(0)
    model = Ours()
    experts = replace_feed_forwards(model, r"mlp\.\d", width=WIDTH, vocab_size=SYMBOLS, moe=MOE, k=2, init_std=0.5)
    ids, mask = prompts(left)
    attached = experts.attach(model, 0, mask=1)
    with pytest.raises(UserError, match=r"holds a cache of earlier ids|is longer than ids"):
        generate(model, ids, mask, cached=True)
    want = generate(model, ids, mask, cached=False)
    for told, equal in (("before", True), (lambda *_, **__: None, False)):  # the latter: each call begins a text
        attached.remove()
        attached = experts.attach(model, 0, mask=1, left=told)
        assert torch.equal(generate(model, ids, mask, cached=True), want) == equal


# A model of transformers.


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SYMBOLS,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    experts = replace_feed_forwards(
        model, r"model\.layers\.\d+\.mlp", width=WIDTH, vocab_size=SYMBOLS, moe=MOE, k=2, init_std=1.0
    )
    return model, experts


@pytest.mark.transformers
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}])
@pytest.mark.parametrize("left", [False, True])
def test_a_model_of_transformers(llama, left, how):
    model, experts = llama
    ids, mask = prompts(left)
    attached = experts.attach(model, "input_ids", mask="attention_mask", layout="BQ")

    def run(model, **options):
        torch.manual_seed(5)
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **how, **options}
        return model.generate(ids, attention_mask=mask, pad_token_id=0, **options)

    want = run(model, use_cache=False)
    got = run(model)
    copied = run(copy.deepcopy(model))
    stored = run(pickle.loads(pickle.dumps(model)))
    assert torch.equal(got, want) and torch.equal(copied, want) and torch.equal(stored, want)
    assert want.shape == (3, 7 + NEW) and len(want[:, 7:].unique()) > 5
    attached.remove()
    assert "prepare_inputs_for_generation" not in vars(model)
    starts = experts.attach(model, "input_ids", mask="attention_mask", layout="BQ", left=lambda *_, **__: None)
    assert not torch.equal(run(model), want)  # negative control: each call begins a text
    starts.remove()


@pytest.mark.transformers
def test_a_call_by_hand_with_a_cache_is_refused(llama):
    """After generation nothing is left of its ids. Chunks of a prompt come without the ids before them."""
    model, experts = llama
    ids, mask = prompts(False)
    attached = experts.attach(model, "input_ids", mask="attention_mask")
    model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
    first = model(input_ids=ids, attention_mask=mask, use_cache=True)
    cache = {name: value for name, value in first.items() if hasattr(value, "get_seq_length")}
    assert len(cache) == 1
    with pytest.raises(UserError, match="so ids continue a text: attach"):
        model(input_ids=ids[:, :1], **cache)
    with pytest.raises(UserError, match="so ids continue a text: attach"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=5, pad_token_id=0)
    attached.remove()
