"""Which heads and which source tokens made a feature fire: direct feature attribution (DFA). Tensors in, tensors out.

Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders", section 4 (DFA) and appendix
(head attribution by weights, logit weights).

A feature f of an SAE on z has the pre-activation w_f . z[t] + c_f at destination t, before its activation rule; every
architecture here gives (w_f, c_f) on raw z as `affine(f)`. With head h's slice of w written w[h], and kv(h) the key/value
head that query head h reads,

    z[t, h] = sum over src of pattern[h, t, src] v[src, kv(h)]

    w . z[t] = sum over h, src of  pattern[h, t, src] (v[src, kv(h)] . w[h])  =  sum over h, src of DFA[h, src]

so DFA plus c_f is the pre-activation: exactly, in real arithmetic, signs kept. Steps: contract d_head first (a number per
source and head), then weigh by the pattern, O(src x heads) per example instead of O(src^2 x d_model).

The assumption: the pattern is frozen. DFA says what moved through the heads, given where they looked; not why they looked
there (queries and keys), nor what the threshold did with the sum. v holds the value bias, so that is inside the terms of
the sources, and c_f is the only bias.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # 128 MiB of fp32: the largest intermediate of the chunked sweeps over features
LOGIT_BINS = 40  # of a feature's logit weights over the vocabulary


class SparseDFA(NamedTuple):
    """The largest entries of n examples' DFA, one example after the other, and what became of the rest: kept + dropped +
    before = the full sum per head."""

    kept: NDArray[np.int32]
    """[n] Entries kept of each example."""
    src: NDArray[np.uint16]
    """[sum of kept] Source positions of the kept entries, counted in the row."""
    head: NDArray[np.uint8]
    """Their heads."""
    value: NDArray[np.float32]
    """Their signed values, of each example largest size first."""
    dropped: NDArray[np.float32]
    """[n, n_heads] Sum of the entries inside the window that were not kept."""
    before: NDArray[np.float32]
    """[n, n_heads] Sum of the entries at sources before the window."""
    abs_dfa: NDArray[np.float32]
    """[n] Sum of |DFA| over the whole row."""


class LogitHistogram(NamedTuple):
    """How each feature's logit weights spread over the vocabulary, in bins of equal width from its least to its largest."""

    edges: Tensor
    """[n, bins + 1] fp32, rising."""
    counts: Tensor
    """[n, bins] int64: tokens whose weight lies from one edge up to the next, the last bin holding the largest too."""


class Neighbours(NamedTuple):
    """Features whose decoder directions are nearest."""

    indices: Tensor
    """[n, k] int64, nearest first, the feature itself left out."""
    cosines: Tensor
    """[n, k] fp32."""


def head_norm_shares(W_dec: Tensor, n_heads: int) -> Tensor:
    """Each head's share of a decoder row by norm, ||d_h|| / sum ||d_j||: [n, d_in] -> [n, n_heads], rows sum to 1.

    The paper's head attribution by weights. A zero row shares equally.
    """
    norms = W_dec.float().unflatten(-1, (n_heads, -1)).norm(dim=-1)
    total = norms.sum(-1, keepdim=True)
    return torch.where(total > 0, norms / total.clamp_min(torch.finfo(norms.dtype).tiny), torch.full_like(norms, 1 / n_heads))


def dfa(v: Tensor, pattern: Tensor, w: Tensor) -> Tensor:
    """DFA of n examples in one row: what each (head, source) gave to a feature at the example's destination.

    v [src, n_kv_heads, d_head]; pattern [n, n_heads, src], already picked at each example's destination; w [n, n_heads,
    d_head], each example's feature. Returns [n, n_heads, src], signed, in units of the pre-activation; 0 after the
    destination, as the pattern is.
    """
    n, n_heads, d_head = w.shape
    n_kv = v.shape[1]
    # Query head h reads v of head h // group: groups lie side by side, so a view pairs them without copying v per query head.
    grouped = w.reshape(n, n_kv, n_heads // n_kv, d_head)
    given = torch.einsum("skd,nkgd->nkgs", v, grouped).reshape(n, n_heads, v.shape[0])
    return pattern * given


class BiasSplit(NamedTuple):
    """DFA with what the value bias gave taken out of the sources: dfa summed over sources + constant = the head's whole DFA."""

    dfa: Tensor
    """[n, n_heads, src] of v less its bias."""
    constant: Tensor
    """[n, n_heads]: what the bias gave through each head."""


def split_value_bias(v: Tensor, pattern: Tensor, w: Tensor, v_bias: Tensor) -> BiasSplit:
    """`dfa` with the value bias apart; v_bias [n_kv_heads, d_head], the rest as `dfa` takes it.

    Each source's v holds the bias, so a head gives sum over src of pattern[h, src] (b_V[kv(h)] . w[h]) whatever the tokens
    are. Where a row of the pattern sums to 1 that is b_V . w, the same at every destination; where a sink that is no token
    takes a part of it (gpt-oss), it is that much less, and the sum is still exact.
    """
    return BiasSplit(dfa(v - v_bias, pattern, w), dfa(v_bias[None], pattern.sum(-1, keepdim=True), w)[..., 0])


def identity_gap(dfa: Tensor, bias: Tensor, preact: Tensor) -> Tensor:
    """How far DFA and bias are from the pre-activation, as a share of their sizes: [n].

    |sum DFA + bias - preact| / (sum |DFA| + |bias|), from dfa [n, n_heads, src], bias [n] (c_f) and preact [n], which must
    be computed on its own, from the hooked z. Sums are taken in fp64, so that the gap is that of the terms.
    """
    terms = dfa.double().flatten(1)
    size = terms.abs().sum(1) + bias.double().abs()
    gap = (terms.sum(1) + bias.double() - preact.double()).abs()
    return (gap / size.clamp_min(torch.finfo(torch.float64).tiny)).to(dfa.dtype)


DISTANCES = (0, *(2**i for i in range(14)))
"""First distance of each bucket of `spread`: 0, 1, 2 to 3, 4 to 7, ..., 4096 to 8191, and all beyond."""


SPREAD = len(DISTANCES) + 3
"""Columns of `Spread`, side by side."""


class Spread(NamedTuple):
    """Where the |DFA| of n examples comes from, as shares of the whole |DFA| of each."""

    distance: Tensor
    """[n, len(DISTANCES)]: by distance, dest - src, row starts left out; with `start` these sum to 1."""
    start: Tensor
    """[n]: from row starts."""
    heads: Tensor
    """[n]: entropy over heads, in nats; its exp is how many heads share the work as if equally."""
    sources: Tensor
    """[n]: entropy over sources (heads summed, row starts among them), in nats."""


def spread(dfa: Tensor, dest: Tensor, starts: Tensor) -> Spread:
    """Distances and entropies of dfa [n, n_heads, src] at dest [n]; starts bool [src] marks row starts, sinks of attention.

    By size, not by sign: shares of a signed sum are no shares. An example without any DFA has entropies and shares of 0.
    """
    size = dfa.abs()
    total = size.sum((1, 2)).clamp_min(torch.finfo(size.dtype).tiny)
    by_head, by_source = size.sum(2) / total[:, None], size.sum(1) / total[:, None]
    gap = dest[:, None] - torch.arange(dfa.shape[2], device=dfa.device)  # below 0 after the destination, where DFA is 0
    edges = torch.tensor(DISTANCES, device=dfa.device)
    bucket = torch.bucketize(gap.clamp_min(0), edges, right=True) - 1
    distance = torch.zeros(len(dfa), len(DISTANCES), device=dfa.device, dtype=size.dtype)
    distance.scatter_add_(1, bucket, by_source * ~starts)
    return Spread(distance, (by_source * starts).sum(1), _entropy(by_head), _entropy(by_source))


def spread_sample(mean: NDArray[np.floating[Any]], n: int) -> dict[str, Any]:
    """What is stored of a feature's spread: from the mean over its n kept examples of `Spread`'s columns, side by side.

    {"n", "distance": [[low, high, share], ...] with low <= distance < high up to the last that has a part, "start_share", and
    "heads" and "sources", effective numbers: exp of the mean entropy. {} without examples.
    """
    if not n:
        return {}
    shares, (start, heads, sources) = mean[: len(DISTANCES)], mean[len(DISTANCES) :].tolist()
    used = int(np.flatnonzero(shares > 0).max(initial=-1)) + 1
    ends = [*DISTANCES[1:], 2 * DISTANCES[-1]]
    return {
        "n": n,
        "distance": [[DISTANCES[i], ends[i], round(float(shares[i]), 4)] for i in range(used)],
        "start_share": round(start, 4),
        "heads": round(math.exp(heads), 3),
        "sources": round(math.exp(sources), 3),
    }


def _entropy(shares: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy


def sparsify_dfa(dfa: Tensor, *, share: float, max_entries: int, start: NDArray[np.integer[Any]]) -> SparseDFA:
    """Keep the entries of dfa [n, n_heads, src] by size until they hold `share` of their example's whole |DFA|, or are
    `max_entries`.

    Sources before `start` [n] (the shown window) are not kept one by one: each head has one sum for them. Entries that are
    exactly 0 are never kept. Equal sizes keep the lower head, then the earlier source. What is dropped is summed from its
    own entries in fp32, never taken as a difference of large sums.
    """
    full = dfa.detach().cpu().numpy().astype(np.float32)
    n, n_heads, n_src = full.shape
    inside = (np.arange(n_src) >= start[:, None])[:, None]  # [n, 1, src]
    abs_dfa = np.abs(full).sum((1, 2), dtype=np.float64)
    size = np.where(inside, np.abs(full), np.float32(0)).reshape(n, n_heads * n_src)  # -1 would not do for no example at all
    # One whole number orders entries by size, ties by place: the bits of a positive fp32 rise with it. So no two are equal, and
    # the largest are the same whoever seeks them.
    last = 2**32 - 1
    place = torch.arange(last, last - size.shape[1], -1)
    keys = (torch.from_numpy(size.view(np.int32)).long() << 32) | place
    k = min(max_entries, size.shape[1])
    at = last - (torch.topk(keys, k, dim=1).values & last).numpy()
    held = np.take_along_axis(size, at, axis=1).astype(np.float64)
    # The entry that crosses the share is kept too; a window that holds less than the share keeps all it may.
    short = (held.cumsum(1) < (share * abs_dfa * (1 - 1e-12))[:, None]).sum(1)
    count = np.minimum(short + 1, (held > 0).sum(1))
    chosen = np.arange(k) < count[:, None]
    which, at = np.nonzero(chosen)[0], at[chosen]
    head, src = np.divmod(at, n_src)
    value = full.reshape(n, n_heads * n_src)[which, at]
    before = np.where(inside, np.float32(0), full).sum(2)
    rest = np.where(inside, full, np.float32(0))
    rest[which, head, src] = 0
    return SparseDFA(
        kept=count.astype(np.int32),
        src=src.astype(np.uint16),
        head=head.astype(np.uint8),
        value=value,
        dropped=rest.sum(2),
        before=before,
        abs_dfa=abs_dfa.astype(np.float32),
    )


MOST_LOWERED = 10
"""Tokens of the vocabulary that count as the ones a direction lowers most, as McDougall et al. 2023 count them."""


def lowered_in_row(logits: Tensor, direction: Tensor, token: Tensor, rows: Tensor, dest: Tensor) -> Tensor:
    """bool [n]: whether a direction lowers the very `token` [n] it has read, and more than other text near it.

    logits [m, d_vocab] of m directions; direction [n] says which is each example's; rows [n, pos] the tokens of its row, whose
    first is the row start; dest [n].
    Two things must hold. The token is among the MOST_LOWERED of the whole vocabulary: a direction that has nothing to do with the
    token does that to 1 token in 5,000. And nothing else in the row, up to the destination, is lowered more: a direction that
    lowers common words lowers whatever was read, since most of what is read is common words.
    """
    own = logits[direction, token]
    most = logits.topk(min(MOST_LOWERED, logits.shape[1]), largest=False).values[direction, -1]
    near = (torch.arange(rows.shape[1], device=rows.device) <= dest[:, None]) & (rows != rows[:, :1])
    more = ((logits[direction[:, None], rows] < own[:, None]) & near).any(1)
    return (own <= most) & ~more


def logit_histogram(logits: Tensor, bins: int = LOGIT_BINS) -> LogitHistogram:
    """Histograms of the rows of logits [n, d_vocab], one per feature, on the CPU.

    Row by row, since one row stays in the processor's cache through all that is done to it: three times as fast as the same
    over whole tensors.
    """
    found = [np.histogram(row, bins) for row in logits.float().cpu().numpy()]
    edges = np.array([edges for _, edges in found], dtype=np.float32).reshape(-1, bins + 1)
    counts = np.array([counts for counts, _ in found], dtype=np.int64).reshape(-1, bins)
    return LogitHistogram(torch.from_numpy(edges), torch.from_numpy(counts))


def decoder_neighbours(W_dec: Tensor, k: int) -> Neighbours:
    """Each feature's k nearest others by cosine of their decoder rows; W_dec [n, d_in].

    k is cut to n - 1. A zero row has cosine 0 with everything.
    """
    n = W_dec.shape[0]
    k = min(k, n - 1)
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    indices, cosines = [], []
    for rows in torch.split(torch.arange(n, device=W_dec.device), _rows_at_once(n)):
        similar = unit[rows] @ unit.T
        similar[torch.arange(len(rows), device=W_dec.device), rows] = -math.inf  # a feature is not its own neighbour
        values, places = similar.topk(k)
        indices.append(places)
        cosines.append(values)
    return Neighbours(torch.cat(indices), torch.cat(cosines).clamp(-1, 1))


def _rows_at_once(width: int) -> int:
    return max(1, CHUNK_ELEMENTS // width)
