"""Calls of an attached model that say where texts begin and end: each answers as every text alone, or is refused.

Nothing but routing depends on what is left of an id, so an n-gram with a foreign id in it shows.
"""

import pytest
import torch
from torch import nn

from foreroute.engine.config import Builder, MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.plug_in import replace_feed_forwards

SYMBOLS, WIDTH, N = 13, 8, 3
MOE = MoEConfig(experts=8, expert_width=16, ngram=N, rows=SYMBOLS**N, builder=Builder.random)


class Host(nn.Module):
    """Takes what models take, and looks at the ids only."""

    transposed = False

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH))

    def forward(
        self,
        ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        documents=None,
        before=None,
        decoder_input_ids=None,
        inputs_embeds=None,
    ):
        x = self.embed(ids)
        return self.mlp(x.transpose(0, 1)).transpose(0, 1) if self.transposed else self.mlp(x)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    host = Host()
    experts = replace_feed_forwards(host, "mlp", width=WIDTH, vocab_size=SYMBOLS, moe=MOE, k=2, init_std=0.5)
    return host.eval(), experts


@pytest.fixture
def attached(made):
    """Attach the model by these arguments for one test."""
    host, experts = made
    hooks = []

    def attach(*args, **kwargs):
        hooks.append(experts.attach(host, *args, **kwargs))
        return host

    yield attach
    for hook in hooks:
        hook.remove()
    host.transposed = False


@pytest.fixture
def alone(made):
    """The answer for one text by itself, [Q, D]."""
    host, experts = made

    def answer(text):
        with experts.planned(text[None]), torch.no_grad():
            return host(text[None])[0]

    return answer


def texts(*lengths):
    torch.manual_seed(sum(lengths))
    return [torch.randint(1, SYMBOLS, (length,)) for length in lengths]


def padded(parts, left, value=7):
    """Rows and mask; the padding is an id that counts."""
    length = max(map(len, parts))
    ids, mask = torch.full((len(parts), length), value), torch.zeros(len(parts), length)
    for row, part in enumerate(parts):
        place = slice(length - len(part), None) if left else slice(len(part))
        ids[row, place], mask[row, place] = part, 1
    return ids, mask


def near(got, want):
    return torch.allclose(got, want, atol=1e-6)


def refused(fault):
    return pytest.raises(UserError, match=fault)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bool])
def test_padding_is_in_no_ngram(attached, alone, left, kind):
    parts = texts(7, 4, 1)
    ids, mask = padded(parts, left)
    host = attached(mask="attention_mask")
    got = host(ids, attention_mask=mask.to(kind))
    for row, part in enumerate(parts):
        assert near(got[row][mask[row] > 0], alone(part))
    if left:  # negative control: without the mask padding gets in
        assert not near(host(ids, attention_mask=torch.ones_like(mask))[1, -4:], alone(parts[1]))


def test_padding_in_between_is_refused(attached):
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    with refused("mask: has padding between the ids"):
        attached(mask="attention_mask")(torch.ones(1, 5, dtype=torch.int64), attention_mask=mask)


@pytest.mark.parametrize("told", [{"documents": "documents"}, {"positions": "position_ids"}])
def test_documents_are_as_each_alone(attached, alone, told):
    parts = texts(4, 1, 2, 5)
    ids = torch.cat(parts).view(2, 6)[:1].repeat(2, 1)
    row = [*parts[:2], torch.cat(parts)[5:6]]  # what of them is in the first 6
    numbers = torch.tensor([0, 0, 0, 0, 8, 0]).expand(2, 6)  # a number that comes again is another text
    positions = torch.tensor([0, 1, 2, 3, 0, 0])
    host = attached(**told)
    got = host(ids, documents=numbers, position_ids=positions)
    want = torch.cat([alone(part) for part in row])
    assert near(got[0], want) and near(got[1], want)
    whole = host(ids, documents=numbers * 0, position_ids=torch.arange(6))
    assert not near(whole[0], want)  # negative control


def test_documents_behind_padding(attached, alone):
    parts = texts(3, 4)
    ids, mask = padded([torch.cat(parts)], left=False)
    ids, mask = (nn.functional.pad(x, (2, 0), value=v) for x, v in ((ids, 7), (mask, 0)))
    positions = torch.tensor([[1, 1, 0, 1, 2, 0, 1, 2, 3]])  # as transformers fills padding
    host = attached(mask="attention_mask", positions="position_ids")
    got = host(ids, attention_mask=mask, position_ids=positions)[0, 2:]
    assert near(got, torch.cat([alone(part) for part in parts]))


def pieces(ids):
    """Places of a prefill and of single ids behind it."""
    length = ids.shape[1]
    return [slice(0, 5), *(slice(start, start + 1) for start in range(5, length))]


@pytest.mark.parametrize("how", ["all", "some", "function"])
def test_pieces_with_left_context_are_the_whole(attached, how, alone):
    ids = torch.stack(texts(9, 9))
    place = None
    told = (lambda *_, **kwargs: kwargs["before"]) if how == "function" else "before"
    host = attached(left=told)
    got = []
    for place in pieces(ids):
        left = ids[:, : place.start][:, -(N - 1) :] if how == "some" else ids[:, : place.start]
        got.append(host(ids[:, place], before=left, past_key_values=[0] * place.start))
    want = torch.stack([alone(text) for text in ids])
    assert near(torch.cat(got, dim=1), want)
    wrong = host(ids[:, 5:6], before=None)  # negative control: the start of a text
    assert not near(wrong, want[:, 5:6])


def test_pieces_of_padded_texts(attached, alone):
    """Generation in a batch: the mask covers the cache, too."""
    parts = texts(9, 6)
    ids, mask = padded(parts, left=True)
    host = attached(left="before", mask="attention_mask", positions="position_ids")
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    got = []
    for place in pieces(ids):
        call = {"attention_mask": mask[:, : place.stop], "position_ids": positions[:, place]}
        got.append(host(ids[:, place], before=ids[:, : place.start], **call))
    got = torch.cat(got, dim=1)
    for row, part in enumerate(parts):
        assert near(got[row][mask[row] > 0], alone(part))


def test_positions_may_be_left_out_where_the_mask_says_it(attached, alone):
    parts = texts(7, 4)
    ids, mask = padded(parts, left=True)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 1, 1, 0, 1, 2, 3]])
    got = attached(mask="attention_mask")(ids, attention_mask=mask, position_ids=positions)
    assert near(got[1, 3:], alone(parts[1]))


@pytest.mark.parametrize("layout", ["QB", "BQ->QB"])
def test_sequence_first(attached, alone, layout):
    parts = texts(4, 4, 4, 4)
    ids, want = torch.stack(parts), torch.stack([alone(part) for part in parts])
    if layout == "QB":
        assert near(attached(layout=layout)(ids.T).transpose(0, 1), want)
    else:
        host = attached(layout=layout)
        host.transposed = True
        assert near(host(ids), want)


def test_sequence_first_with_all_the_rest(attached, alone):
    parts = texts(3, 3)
    ids = torch.stack([torch.cat(parts), torch.cat(parts[::-1])])
    host = attached(documents="documents", left="before", layout="QB")
    numbers = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, 6)
    got = host(ids.T, documents=numbers.T, before=None).transpose(0, 1)
    want = [alone(part) for part in parts]
    assert near(got[0], torch.cat(want)) and near(got[1], torch.cat(want[::-1]))


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


IDS = torch.ones(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "ids, given, fault",
    [
        (
            IDS[:1, :2],
            {},
            r"argument 0 .* has 2 ids per sequence, fewer than an n-gram of 3: .* attach\(model, left=\.\.\)",
        ),
        (
            IDS,
            {"past_key_values": Cache(3)},
            r"argument 'past_key_values' .* so ids continue a text: attach\(model, left=",
        ),
        (
            IDS,
            {"past_key_values": ((IDS,),)},
            "argument 'past_key_values' of the model's call holds a cache of earlier ids",
        ),
        (
            IDS,
            {"position_ids": torch.arange(3, 8)},
            r"argument 'position_ids' .* does not begin with 0, .*attach\(model, left=",
        ),
        (
            IDS,
            {"position_ids": torch.tensor([0, 1, 0, 1, 2])},
            r"'position_ids' .* restarts .* use attach\(model, positions='position_ids'\)",
        ),
        (
            IDS,
            {"attention_mask": torch.tensor([[1] * 5, [0] + [1] * 4])},
            r"'attention_mask' .* masks some ids: use attach\(model, mask=",
        ),
        (
            IDS,
            {"documents": torch.tensor([[0, 0, 1, 1, 1]] * 2)},
            r"'documents' .* attach\(model, documents='documents'\)",
        ),
        (IDS[:, :2], {"attention_mask": IDS[:, :2]}, "equal sizes do not show which .*layout='BQ'"),
        (
            None,
            {"inputs_embeds": IDS},
            r"argument 0 of the model's call is None: must be a tensor of ids .* attach\(model, ids=\.\.\)",
        ),
        (
            {"input_ids": IDS, "labels": IDS},
            {},
            "argument 0 of the model's call is a dict with input_ids, labels: must be a tensor",
        ),
        ([[1, 2, 3]], {}, "argument 0 of the model's call is a list: must be a tensor"),
        (IDS[0], {}, r"argument 0 .* of shape \[5\]: must be \[sequences, length\]"),
    ],
)
def test_calls_that_say_too_little_are_refused(attached, ids, given, fault):
    with refused(fault):
        attached()(ids, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"past_key_values": Cache(0)},
        {"past_key_values": ()},
        {"attention_mask": torch.ones(2, 5)},
        {"position_ids": torch.arange(5)},
        {"documents": torch.tensor([[0] * 5, [1] * 5])},
    ],
)
def test_calls_of_whole_texts_are_not_refused(attached, given, alone):
    ids = torch.stack(texts(5, 5))
    got = attached()(
        ids,
        *(given.get(name) for name in ("attention_mask",)),
        **{k: v for k, v in given.items() if k != "attention_mask"},
    )
    assert near(got, torch.stack([alone(text) for text in ids]))


def test_a_short_text_with_positions_is_whole(attached, alone):
    (text,) = texts(2)
    got = attached()(text[None], position_ids=torch.arange(2))
    assert near(got[0], alone(text))


@pytest.mark.parametrize(
    "told, given, fault",
    [
        (
            {"positions": "position_ids"},
            {"position_ids": torch.arange(3, 8)},
            r"'position_ids' .* begins with 3, .*left=",
        ),
        (
            {"positions": "position_ids"},
            {"position_ids": torch.arange(4)},
            r"'position_ids' .* of shape \[2, 4\]: must be \[2, 5\]",
        ),
        (
            {"mask": "attention_mask"},
            {"attention_mask": torch.ones(2, 9)},
            r"'attention_mask' .* longer than ids, .*left=",
        ),
        (
            {"mask": "attention_mask"},
            {"attention_mask": torch.ones(2, 5), "position_ids": torch.arange(3, 8)},
            "'position_ids' .* does not begin",
        ),
        (
            {"mask": "attention_mask"},
            {"attention_mask": torch.ones(2, 1, 5, 5)},
            r"'attention_mask' .* of shape \[2, 1, 5, 5\]",
        ),
        (
            {"documents": "documents"},
            {"documents": None},
            "'documents' of the model's call is None: must be a tensor of documents",
        ),
        (
            {"left": "before"},
            {"before": torch.ones(3, 2)},
            r"'before' of the model's call is of shape \[3, 2\]: must be the ids \[2, any",
        ),
        ({"left": lambda *_, **__: [1]}, {}, r"the result of left\(\.\.\) is a list: must be the ids"),
        (
            {"left": "before", "mask": "attention_mask"},
            {"before": IDS, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)},
            "between left context and",
        ),
    ],
)
def test_wrong_arguments_are_named(attached, told, given, fault):
    with refused(fault):
        attached(**told)(IDS, **given)


def test_missing_arguments_and_wrong_layouts_are_named(attached):
    with pytest.raises(RuntimeError, match="without argument 'documents', which must hold the documents"):
        attached(documents="documents")(IDS)
    with refused("layout='BQD': must be one of BQ, QB, BQ->QB"):
        attached(layout="BQD")


def test_a_wrapped_model_is_looked_into(made):
    """DeepSpeed's engine and DistributedDataParallel take *inputs; names are those of the model inside."""
    host, experts = made

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = host

        def forward(self, *inputs, **kwargs):
            return self.module(*inputs, **kwargs)

    wrapped = Wrapped()
    experts.attach(wrapped)
    with refused("argument 'attention_mask' of the model's call masks some ids"):
        wrapped(IDS, torch.tensor([[1] * 5, [0] + [1] * 4]))


def test_plans_by_hand_take_masks_and_documents(made, alone):
    host, experts = made
    parts = texts(3, 4)
    ids, mask = padded([torch.cat(parts)], left=True)
    documents = torch.tensor([[0] * 3 + [1] * 4])
    with experts.planned(ids, mask=mask, documents=documents):
        got = host(ids)[0]
    assert near(got, torch.cat([alone(part) for part in parts]))
    with experts.planned(experts.plan(ids[None], mask=mask[None], documents=documents[None])):
        assert torch.equal(host(ids)[0], got)
    with refused(r"documents of shape \[1, 6\]: must be \[1, 7\] as ids"):
        experts.plan(ids, documents=documents[:, 1:])
    for wrong, fault in (({"ids": ids}, "ids is a dict with ids"), (None, "ids is None"), ([[1]], "ids is a list")):
        with refused(f"{fault}: must be a tensor of ids"):
            experts.plan(wrong)


def test_batches_that_are_mappings_are_planned_ahead(made):
    _, experts = made
    batches = [{"input_ids": IDS, "labels": IDS}] * 3
    shapes = [plans.shape for plans, _ in experts.ahead(batches, ids="input_ids")]
    assert shapes == [(2, 5)] * 3
    with refused(r"a batch is a dict with input_ids, labels, without ids=0: ahead\(batches, ids=\.\.\)"):
        next(experts.ahead(batches))


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.encoder, self.decoder = (
            nn.Sequential(nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH))) for _ in range(2)
        )

    def forward(self, input_ids, decoder_input_ids=None):
        memory = self.encoder(self.embed(input_ids)).mean(1, keepdim=True)
        return self.decoder(self.embed(decoder_input_ids) + memory)


def test_an_encoder_and_a_decoder_have_plans_of_their_own():
    options = {"width": WIDTH, "vocab_size": SYMBOLS, "moe": MOE, "k": 2, "init_std": 0.5}
    torch.manual_seed(0)
    model = EncoderDecoder()
    with refused(r"encoder and a decoder \(encoder.0, decoder.0\), which run for different ids: call replace"):
        replace_feed_forwards(model, r"\w+\.0", **options)
    first = replace_feed_forwards(model, r"encoder\.0", **options)
    second = replace_feed_forwards(model, r"decoder\.0", seed=1, **options)
    inputs, others = (torch.stack(texts(6, 6)), torch.stack(texts(6, 6)).flip(1))
    with first.planned(inputs), second.planned(others):
        want = model(inputs, others)
    with first.planned(inputs), second.planned(inputs):
        assert not near(model(inputs, others), want)  # negative control: equal lengths, other ids
    hook = second.attach(model)
    first.attach(model)
    with refused("argument 0 .* holds the ids of the encoder, but the layers are in the decoder"):
        model(inputs, others)
    hook.remove()
    second.attach(model, "decoder_input_ids")
    assert near(model(inputs, decoder_input_ids=others), want)
