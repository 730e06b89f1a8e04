"""Transformer-XL's relative attention (arXiv 1901.02860, section 3.3) in tiles of queries, with a manual backward pass.

    score[q, s] = ((query_q + u) . key_s + (query_q + v) . r_d) * scale,   d = M + q - s >= 0 the distance of s from q

A tile is one head, a few streams and a block of queries with the keys visible to them. It fits into the cache, and no
score of a key after the block is computed. The distance term is aligned with the keys without a copy, in both
directions (see _shifted). Keys before all documents of a tile are left out; a mask hides others before a query's
document. The unnormalised weights are saved for backward, at most B*H*Q*S numbers; activation checkpointing avoids
this.

Letters: B streams, Q query length, M memory length, S = M+Q key length, H heads, W head width, X = S+1; of a tile:
b streams, q queries, s keys. Keys are in order of position, r in order of distance: r_SHW[0] is for the query itself.
"""

from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _TileLimits(NamedTuple):
    """Limits on a tile's scores."""

    column_bytes: int  # scores of all queries, for one key
    tile_bytes: int  # scores of all streams; a tile of a single stream may have more


# Fastest of 64..512 queries x 1..22 streams with Q = M = 512, H = 8, W = 64 in fp32 and bf16, on 2 cores with 2 MiB of
# second-level cache each: 128 queries in fp32, 256 in bf16; 4 streams with 1,024 keys, more with fewer keys.
_ON_CPU = _TileLimits(512, 2 << 20)
# Not measured. Tiles as small as on a CPU would leave a GPU waiting for launches. At the published size a head is one
# tile here, and the keys that no query sees add a third to the products.
_ON_GPU = _TileLimits(2048, 64 << 20)
_ALIGN = 16  # numbers; rows of keys that start on vector boundaries make fp32 8 % faster


def relative_attention(
    query_BQHW: Tensor,
    key_BSHW: Tensor,
    value_BSHW: Tensor,
    r_SHW: Tensor,
    u_HW: Tensor,
    v_HW: Tensor,
    *,
    scale: float,
    first_BQ: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from each query to its own position and the keys before it; return [B, Q, H, W].

    The last Q of the S keys have the positions of the queries, the others are memory.

    Args:
        r_SHW: encodings of the distances 0..S-1.
        first_BQ: int32, the first key visible to each query, such as the first of its document; at most the query's own
            key, M + q, which is not checked, as it would be a read-back. A masked key has a weight of exactly 0, so no
            bit of the result depends on it while it is finite. None masks no keys.
        window: keys at a distance of `window` or more are masked; None for no limit.
        dropout: rate on the attention weights, drawn from PyTorch's generator; 0 in evaluation.

    Raises:
        ValueError: the shapes are inconsistent, first_BQ is not int32, or window < 1.

    Example: one stream, two keys of memory and queries at keys 2, 3 and 4, where a document starts at key 3. With
    first_BQ = [[0, 3, 3]] the queries attend to keys 0 to 2, 3 alone, and 3 to 4. If all scores are equal and the
    values are 1, 2, 4, 8 and 16, the results are 7/3, 8 and 12.
    """
    streams, queries, heads, width = query_BQHW.shape
    keys = r_SHW.shape[0]
    shapes = [tuple(x.shape) for x in (query_BQHW, key_BSHW, value_BSHW, r_SHW)]
    if keys < queries or shapes[1:] != [(streams, keys, heads, width)] * 2 + [(keys, heads, width)]:
        raise ValueError(f"query, key, value and r of shapes {shapes} do not fit each other")
    if first_BQ is not None and (first_BQ.shape != (streams, queries) or first_BQ.dtype != torch.int32):
        found = f"{tuple(first_BQ.shape)} of {first_BQ.dtype}"
        raise ValueError(f"first_BQ has the shape {found}: must be {(streams, queries)} of torch.int32")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1")
    query_HBQW, key_HBSW, value_HBSW = (
        x.permute(2, 0, 1, 3).contiguous() for x in (query_BQHW * scale, key_BSHW, value_BSHW)
    )
    operands = _Operands(
        query_HBQW + (u_HW * scale)[:, None, None],
        query_HBQW + (v_HW * scale)[:, None, None],
        key_HBSW,
        value_HBSW,
        F.pad(r_SHW.flip(0).transpose(0, 1), (0, 0, 0, 1)),
    )
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    if torch.compiler.is_compiling():  # the views into one buffer cannot be traced
        results = _operator(*operands, first_BQ, window, dropout, keep)
    else:
        results = _RelativeAttention.apply(*operands, first_BQ, window, dropout, keep, _forward, _backward)  # type: ignore[no-untyped-call]
    out_HBQW: Tensor = results[0]
    return out_HBQW.permute(1, 2, 0, 3)


def relative_attention_reference(
    query_BQHW: Tensor,
    key_BSHW: Tensor,
    value_BSHW: Tensor,
    r_SHW: Tensor,
    u_HW: Tensor,
    v_HW: Tensor,
    *,
    scale: float,
    first_BQ: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute relative_attention one query at a time in fp64, differentiated by autograd: the reference for tests."""
    inputs = (query_BQHW, key_BSHW, value_BSHW, r_SHW, u_HW, v_HW)
    query, key, value, r, u, v = (x.double() for x in inputs)
    streams, queries, heads, _ = query.shape
    out = []
    for b, q, h in product(range(streams), range(queries), range(heads)):
        own = key.shape[1] - queries + q  # the query's position among the keys
        first = 0 if first_BQ is None else int(first_BQ[b, q])
        seen = [s for s in range(first, own + 1) if window is None or own - s < window]
        content = key[b, seen, h] @ (query[b, q, h] + u[h])
        position = r[[own - s for s in seen], h] @ (query[b, q, h] + v[h])
        out.append(torch.softmax((content + position) * scale, dim=0) @ value[b, seen, h])
    return torch.stack(out).view(query.shape).to(query_BQHW.dtype)


class _Operands(NamedTuple):
    """The inputs of the tiles, or their gradients, with the head as first dim."""

    qu_HBQW: Tensor  # (query + u) * scale
    qv_HBQW: Tensor  # (query + v) * scale
    key_HBSW: Tensor
    value_HBSW: Tensor
    r_HXW: Tensor  # distances S-1 down to 0, then zeros


class _Tile(NamedTuple):
    """One head, a few streams, a block of queries, and the keys visible to any of them."""

    head: int
    streams: slice
    queries: slice
    keys: slice
    shape: tuple[int, int, int]  # b, q, s
    start: int  # offset of the tile's numbers when all tiles are concatenated

    def of_queries(self, x_HBQW: Tensor) -> Tensor:
        """Slice a tensor that is indexed by query."""
        return x_HBQW[self.head, self.streams, self.queries]

    def of_keys(self, x_HBSW: Tensor) -> Tensor:
        """Slice a tensor that is indexed by key."""
        return x_HBSW[self.head, self.streams, self.keys]

    def of_distances(self, x_HXW: Tensor) -> Tensor:
        """Slice a tensor that is indexed by distance: s-1 down to 0, and the last row."""
        return x_HXW[self.head, -self.shape[2] - 1 :]

    def of_all(self, x: Tensor) -> Tensor:
        """Return this tile's view, [b, q, s], of a flat tensor that holds all tiles."""
        return x[self.start : self.start + prod(self.shape)].view(self.shape)

    def of_scratch(self, x: Tensor) -> Tensor:
        """Return a view, [b, q, s], of the start of a buffer."""
        return x[: prod(self.shape)].view(self.shape)


def tile_shape(streams: int, queries: int, keys: int, *, item_bytes: int, gpu: bool) -> tuple[int, int]:
    """Return the largest number of streams and of queries in a tile; the last tiles of a head may have fewer."""
    limits = _ON_GPU if gpu else _ON_CPU
    block = max(1, min(queries, limits.column_bytes // item_bytes))
    group = limits.tile_bytes // (block * max(1, keys) * item_bytes)
    return max(1, min(streams, group)), block


def _tiles(operands: _Operands, window: int | None) -> list[_Tile]:
    like = operands.qu_HBQW
    heads, streams, queries, _ = like.shape
    keys = operands.key_HBSW.shape[2]
    memory = keys - queries
    group, block = tile_shape(streams, queries, keys, item_bytes=like.element_size(), gpu=like.is_cuda)
    tiles, start = [], 0
    for head, b, q in product(range(heads), range(0, streams, group), range(0, queries, block)):
        b_end, q_end = min(b + group, streams), min(q + block, queries)
        s_end = memory + q_end
        s = 0 if window is None else max(0, memory + q - window + 1)
        shape = b_end - b, q_end - q, s_end - s
        tiles.append(_Tile(head, slice(b, b_end), slice(q, q_end), slice(s, s_end), shape, start))
        start += prod(shape)
    return tiles


def _narrowed(tiles: list[_Tile], first_BQ: Tensor | None) -> list[_Tile]:
    """Drop from each tile the keys before the first that any of its queries sees; its numbers start where they did.

    A GPU keeps them: the host would have to read first_BQ back.
    """
    if first_BQ is None or first_BQ.is_cuda:
        return tiles
    found = []
    for tile in tiles:
        b, q, _ = tile.shape
        keys = slice(max(tile.keys.start, int(first_BQ[tile.streams, tile.queries].min())), tile.keys.stop)
        found.append(tile._replace(keys=keys, shape=(b, q, keys.stop - keys.start)))
    return found


def _buffer(tiles: list[_Tile], like: Tensor) -> Tensor:
    """Allocate the buffer that _shifted needs for the largest tile."""
    return like.new_empty(_ALIGN + max(b * q * (s + 1) for b, q, s in (t.shape for t in tiles)))


def _shifted(buffer: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
    """Return two views of one buffer, by distance, [b, q, s+1], and by key, [b, q, s].

    Query i of the tile has its key j at distance d = s-q+i-j. By distance, the columns are d = s-1 down to 0 and one
    more, so d is in column s-1-d = q-1-i+j. Its offset in memory is i*(s+1) + q-1-i+j = (q-1) + i*s + j: the view by
    key is contiguous and starts q-1 numbers later.

    Example, q=2, s=3, the distances at their places in memory ("-": the additional column):

        by distance:  2 1 0 -     by key:  1 0 -
                      2 1 0 -              2 1 0

    Read by key, the future of a query (d < 0) holds arbitrary numbers. A buffer written by key, with zeros for the
    future, is correct by distance once each stream's first q-1 numbers and its last one are set to zero.
    """
    b, q, s = tile.shape
    start = (1 - q) % _ALIGN
    by_distance = buffer[start : start + b * q * (s + 1)].view(b, q, s + 1)
    return by_distance, buffer.as_strided(tile.shape, (q * (s + 1), s, 1), start + q - 1)


def _scores(
    operands: _Operands, tile: _Tile, buffer: Tensor, future: Tensor, *, window: int | None, out: Tensor
) -> None:
    """Compute a tile's scores [b, q, s] into out; masked keys get -inf; `future` is -inf above its diagonal."""
    b, q, s = tile.shape
    by_distance, by_key = _shifted(buffer, tile)
    r_bxW = tile.of_distances(operands.r_HXW).expand(b, -1, -1)
    torch.bmm(tile.of_queries(operands.qv_HBQW), r_bxW.mT, out=by_distance)
    torch.bmm(tile.of_queries(operands.qu_HBQW), tile.of_keys(operands.key_HBSW).mT, out=out)
    out.add_(by_key)
    out[..., s - q :].add_(future[:q, :q])
    if window is not None:  # d = s-q+i-j >= window: only in the first q columns
        far = torch.full_like(future[:q, :q], float("-inf")).tril(s - q - window)
        out[..., :q].add_(far)


def _hidden(tile: _Tile, first_BQ: Tensor | None) -> Tensor | None:
    """Return the keys before each query's first one, bool [b, q, s]; None where a CPU knows that there are none."""
    if first_BQ is None:
        return None
    first_bq = first_BQ[tile.streams, tile.queries]
    if not first_bq.is_cuda and int(first_bq.max()) <= tile.keys.start:
        return None
    key_s = torch.arange(tile.keys.start, tile.keys.stop, dtype=first_bq.dtype, device=first_bq.device)
    return key_s < first_bq[..., None]


def _scores_backward(
    operands: _Operands, grads: _Operands, tile: _Tile, buffer: Tensor, factors: tuple[Tensor, Tensor]
) -> None:
    """Store or add a tile's contribution to all gradients but the values'; d_scores is the product of the factors."""
    b, q, _ = tile.shape
    by_distance, by_key = _shifted(buffer, tile)
    by_distance.view(b, -1)[:, : q - 1] = 0
    by_distance.view(b, -1)[:, -1] = 0
    torch.mul(*factors, out=by_key)
    qu, qv = tile.of_queries(operands.qu_HBQW), tile.of_queries(operands.qv_HBQW)
    r_bxW = tile.of_distances(operands.r_HXW).expand(b, -1, -1)
    tile.of_queries(grads.qv_HBQW).copy_(torch.bmm(by_distance, r_bxW))
    tile.of_queries(grads.qu_HBQW).copy_(torch.bmm(by_key, tile.of_keys(operands.key_HBSW)))
    tile.of_keys(grads.key_HBSW).add_(torch.bmm(by_key.mT, qu))
    tile.of_distances(grads.r_HXW).add_(torch.bmm(by_distance.mT, qv).sum(0, dtype=grads.r_HXW.dtype))


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the output [H, B, Q, W] and the tensors saved for backward.

    The inputs are the operands, the first keys, window, dropout rate, and whether backward follows.
    """
    operands, (first_BQ, window, dropout, keep) = _Operands(*inputs[:5]), inputs[5:]
    like = operands.qu_HBQW
    out_HBQW, total_HBQ1 = _results(like)
    tiles = _tiles(operands, window)
    block, count = max(tile.shape[1] for tile in tiles), _count(tiles)
    future = like.new_full((block, block), float("-inf")).triu_(1)
    tiles = _narrowed(tiles, first_BQ)
    buffer = _buffer(tiles, like)
    # exp(score - row maximum), for all tiles or for one at a time
    weights = like.new_empty(count) if keep else _buffer(tiles, like)
    masks = like.new_empty(count if dropout else 0, dtype=torch.bool).bernoulli_(1.0 - dropout)
    for tile in tiles:
        weight = tile.of_all(weights) if keep else tile.of_scratch(weights)
        _scores(operands, tile, buffer, future, window=window, out=weight)
        hidden = _hidden(tile, first_BQ)
        if hidden is None:
            weight.sub_(weight.amax(-1, keepdim=True)).exp_()
        else:  # a query's own score in the place of -inf, whose exponential takes a CPU six times as long
            own_bq = weight[..., -tile.shape[1] :].diagonal(dim1=1, dim2=2).clone()
            torch.where(hidden, own_bq[..., None], weight, out=weight)
            weight.sub_(weight.amax(-1, keepdim=True)).exp_().masked_fill_(hidden, 0.0)
        tile.of_queries(total_HBQ1).copy_(weight.sum(-1, keepdim=True, dtype=total_HBQ1.dtype))
        weight = weight * tile.of_all(masks) if dropout else weight
        tile.of_queries(out_HBQW).copy_(torch.bmm(weight, tile.of_keys(operands.value_HBSW)))
    out_HBQW.div_(total_HBQ1 * (1.0 - dropout))
    return out_HBQW, total_HBQ1, weights if keep else like.new_empty(0), masks


def _backward(d_out_HBQW: Tensor, *inputs: Any) -> list[Tensor]:
    """Compute the operands' gradients.

    The inputs are the output's gradient, the operands, the results of _forward, the first keys, window and dropout
    rate. Masked keys need no mask here: their weights are 0.
    """
    operands, saved = _Operands(*inputs[:5]), inputs[5:]
    out_HBQW, total_HBQ1, weights, masks, first_BQ, window, dropout = saved
    dtype, wide = out_HBQW.dtype, total_HBQ1.dtype
    # softmax = exp(score - maximum) / total: dividing the small tensors replaces a division of the weights.
    mean_HBQ1 = (d_out_HBQW * out_HBQW).sum(-1, keepdim=True, dtype=wide)
    mean_HBQ1 = (mean_HBQ1 / total_HBQ1).to(dtype)
    d_out_HBQW = (d_out_HBQW / (total_HBQ1 * (1.0 - dropout))).to(dtype).contiguous()
    grads = _Operands(
        torch.empty_like(operands.qu_HBQW),
        torch.empty_like(operands.qv_HBQW),
        torch.zeros_like(operands.key_HBSW),
        torch.zeros_like(operands.value_HBSW),
        torch.zeros_like(operands.r_HXW, dtype=wide),
    )
    tiles = _narrowed(_tiles(operands, window), first_BQ)
    buffer, scratch = _buffer(tiles, d_out_HBQW), _buffer(tiles, d_out_HBQW)
    for tile in tiles:
        weight, d_weight = tile.of_all(weights), tile.of_scratch(scratch)
        d_out = tile.of_queries(d_out_HBQW)
        torch.bmm(d_out, tile.of_keys(operands.value_HBSW).mT, out=d_weight)
        kept = weight
        if dropout:
            kept = weight * tile.of_all(masks)
            d_weight.mul_(tile.of_all(masks))
        tile.of_keys(grads.value_HBSW).add_(torch.bmm(kept.mT, d_out))
        d_weight.sub_(tile.of_queries(mean_HBQ1))
        _scores_backward(operands, grads, tile, buffer, (d_weight, weight))
    return [*grads[:4], grads.r_HXW.to(dtype)]


def _results(like: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the output and the totals of the weights."""
    heads, streams, queries, width = like.shape
    out_HBQW = like.new_empty(streams, queries, heads, width).permute(2, 0, 1, 3)
    wide = torch.promote_types(like.dtype, torch.float32)
    return out_HBQW, like.new_empty(heads, streams, queries, 1, dtype=wide)


def _count(tiles: list[_Tile]) -> int:
    return sum(prod(tile.shape) for tile in tiles)


def _fake_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands, (_, window, dropout, keep) = _Operands(*inputs[:5]), inputs[5:]
    like, count = operands.qu_HBQW, _count(_tiles(operands, window))
    kept, masks = like.new_empty(count if keep else 0), like.new_empty(count if dropout else 0, dtype=torch.bool)
    return *_results(like), kept, masks


class _RelativeAttention(torch.autograd.Function):
    """Takes the operands, first keys, window, dropout rate, whether backward follows, and the functions for both
    passes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *arguments, run, ctx.run_backward = inputs
        *operands, first_BQ, ctx.window, ctx.dropout, keep = arguments
        results: tuple[Tensor, ...] = run(*arguments)
        if keep:
            ctx.save_for_backward(*operands, *results, first_BQ)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_HBQW: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if d_out_HBQW is None:
            return (None,) * 11
        grads = ctx.run_backward(d_out_HBQW, *ctx.saved_tensors, ctx.window, ctx.dropout)
        return *grads, None, None, None, None, None, None


def _below_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(*arguments)  # type: ignore[no-any-return]


def _differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    if not arguments[-1]:
        return _below_autograd(*arguments)
    return _RelativeAttention.apply(*arguments, _below_autograd, _operator_backward)  # type: ignore[no-any-return, no-untyped-call]


_OPERANDS = "Tensor qu, Tensor qv, Tensor key, Tensor value, Tensor r"
_library = torch.library.Library("foreroute", "FRAGMENT")
_library.define(
    f"relative_attention({_OPERANDS}, Tensor? first, int? window, float dropout, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
_library.define(
    f"relative_attention_backward(Tensor d_out, {_OPERANDS}, Tensor out, Tensor total, Tensor weights, Tensor masks,"
    " Tensor? first, int? window, float dropout) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("relative_attention", _forward, "CompositeExplicitAutograd")
_library.impl("relative_attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("relative_attention", _differentiable, "Autograd")
torch.library.register_fake("foreroute::relative_attention", _fake_forward, lib=_library)
torch.library.register_fake(
    "foreroute::relative_attention_backward",
    lambda d_out, *inputs: [torch.empty_like(x) for x in inputs[:5]],
    lib=_library,
)
_operator = torch.ops.foreroute.relative_attention.default
_operator_backward = torch.ops.foreroute.relative_attention_backward.default
