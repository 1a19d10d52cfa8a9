"""The training step's sparse arithmetic: exact top-k over a batch, sparse decode, and its backward by hand.

A dense step costs 10 d F multiply-adds per token, this one 2 d F + 8 k d: only the encoder product touches every feature
(reference: 2.2 and 2.4 of the trainer survey cited in LOG.md). Even that product is never there as a whole: `Preacts`
makes it a few rows at a time, which the selection reads while they are in the cache. Everything after it works on sparse
codes in *token order*:

    token   int64 [nnz], non-decreasing     feature int64 [nnz]     value float32 [nnz]

Where the product is made in bfloat16, bfloat16 only chooses: the values that were chosen are computed again in float32, a
dot product each, so that loss and gradients are those of float32 with this choice.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae_core.ranks import ALONE, Ranks

GROUP = 64  # features whose maximum is taken first when the largest entries are sought
SUBGROUP = 8  # the same again within the groups that were found
PART_BYTES = {"cpu": 2**25, "cuda": 2**30}  # of pre-activations at a time; on a CPU, what its last cache can hold
MARGIN = 0.9  # of the last batch's cut: entries below it are not looked at
POOL = 3  # times the entries sought: when so many were found, all but the largest are dropped
DENSE_AUX = 8  # AuxK over fewer than this many dead features for each one kept is cheaper dense
ROWS = 2048  # rows of a parameter at a time, so that several passes over them stay in the cache
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class Code(NamedTuple):
    """A batch's sparse code in token order."""

    token: Tensor
    feature: Tensor
    value: Tensor
    n: int
    """Number of tokens."""


class Gradients(NamedTuple):
    """Gradients of one loss with respect to the four parameters."""

    W_enc_t: Tensor
    """[d_sae, d_in]: the encoder is kept transposed in training, one contiguous row per feature."""
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class Preacts:
    """x W_enc + b_enc [n, d_sae] of x [n, d_in] with b_dec already subtracted; made in parts, each time it is asked for."""

    def __init__(self, x: Tensor, W_enc_t: Tensor, b_enc: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.x, self.W_enc_t, self.b_enc, self.dtype = x, W_enc_t, b_enc, dtype
        self.shape, self.device = (len(x), len(W_enc_t)), x.device

    def __len__(self) -> int:
        return len(self.x)

    def parts(self) -> Iterator[Tensor]:
        """The pre-activations of consecutive tokens, in `dtype`; a part is overwritten when the next is asked for."""
        x, weights, bias = self.x.to(self.dtype), self.W_enc_t.to(self.dtype).T, self.b_enc.to(self.dtype)
        rows = part_rows(self.shape[1], self.dtype, self.device)
        buffer = torch.empty(min(rows, len(x)), self.shape[1], dtype=self.dtype, device=self.device)
        for part in torch.split(x, rows):
            yield torch.addmm(bias, part, weights, out=buffer[: len(part)])

    def of(self, features: Tensor) -> Tensor:
        """float32 [n, m]: those of some features [m], the product in `dtype`."""
        weights = self.W_enc_t[features].to(self.dtype).T
        return torch.addmm(self.b_enc[features].to(self.dtype), self.x.to(self.dtype), weights).float()

    def exactly(self, code: Code) -> Code:
        """The code with float32 values; entries that are not positive in float32 are dropped."""
        if self.dtype == torch.float32:
            return code
        value = _dots(code, self.x, self.W_enc_t) + self.b_enc[code.feature]
        kept = value > 0
        if not kept.all():
            return Code(code.token[kept], code.feature[kept], value[kept], code.n)
        return code._replace(value=value)


def part_rows(d_sae: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens' pre-activations are looked at together."""
    fit = PART_BYTES.get(device.type, PART_BYTES["cuda"]) // (d_sae * dtype.itemsize)
    return max(64, fit // 64 * 64)


def true_at(mask: Tensor) -> Tensor:
    """int64: where a mask [n] is true, ascending. Most of a code is not: eight entries are looked at together first."""
    if len(mask) % 8:
        return mask.nonzero().squeeze(1)
    eights = mask.view(torch.int64).nonzero().squeeze(1)
    inside = mask.view(-1, 8)[eights].view(-1).nonzero().squeeze(1)
    return eights[inside // 8] * 8 + inside % 8


def _parts(preacts: Tensor | Preacts) -> Iterator[Tensor]:
    if isinstance(preacts, Preacts):
        return preacts.parts()
    return iter(torch.split(preacts, part_rows(preacts.shape[1], preacts.dtype, preacts.device)))


# ---- selection ----
#
# It works on the floats' bits read as integers of the same width: among positive floats the order is the same, negative
# ones are negative integers, and a CPU finds the maxima of integers two to six times faster (bfloat16: it has no other
# instructions for them).


def _above(part: Tensor, low: float) -> tuple[Tensor, Tensor]:
    """Flat indices, ascending, and float32 values of the entries of part [rows, d_sae] that are greater than `low` >= 0.

    Only groups whose maximum is greater can hold one; their maxima cost one fast pass over the part.
    """
    bits = part.reshape(-1).view(BITS[part.dtype])
    bound = int(torch.tensor(low, dtype=part.dtype).view(bits.dtype))
    group = math.gcd(part.shape[1], GROUP)
    groups = bits.view(-1, group)
    hit = (groups.amax(1) > bound).nonzero().squeeze(1)
    inside = (groups.index_select(0, hit) > bound).view(-1).nonzero().squeeze(1)
    index = hit[inside // group] * group + inside % group
    return index, part.reshape(-1)[index].float()


def _largest(index: Tensor, value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values and their indices, in the order they came in."""
    if len(index) <= count:
        return index, value
    kept = value.topk(count, sorted=False).indices.sort().values
    return index[kept], value[kept]


def _largest_of_all(index: Tensor, value: Tensor, count: int, ranks: Ranks) -> tuple[Tensor, Tensor, float]:
    """As `_largest`, but of all ranks' values together: this rank's among them, and the smallest that any rank keeps.

    Every rank looks at the same values in the same order, so that equal ones are not kept twice nor by none.
    """
    parts = ranks.gather(value)
    every = torch.cat(parts)
    kept = every.topk(min(count, len(every)), sorted=False).indices
    before = sum(len(part) for part in parts[: ranks.rank])
    mine = kept[(kept >= before) & (kept < before + len(value))].sort().values - before
    return index[mine], value[mine], float(every[kept].min()) if len(kept) else 0.0


def batch_top_k(preacts: Tensor | Preacts, count: int, guess: float = 0.0, ranks: Ranks = ALONE) -> tuple[Code, float]:
    """The `count` largest positive entries of preacts [n, d_sae], exactly, and the smallest value kept. Of a batch that is
    divided over `ranks`: this rank's entries among the whole batch's `count` largest.

    One pass keeps a pool of the entries above a bound. The bound begins a little below `guess` (the last batch's cut) and
    rises to the smallest of the `count` largest found so far whenever the pool grows: nothing below that can be among the
    `count` largest of all. Should fewer than `count` exceed the first bound, it was too high: again from 0.
    """
    n, d_sae = preacts.shape
    for first in (MARGIN * guess, 0.0):
        low, begun = first, 0
        index = torch.zeros(0, dtype=torch.int64, device=preacts.device)
        value = torch.zeros(0, device=preacts.device)
        indices, values, found = [index], [value], 0
        for part in _parts(preacts):
            more, their = _above(part, low)
            indices.append(more.add_(begun * d_sae))
            values.append(their)
            begun, found = begun + len(part), found + len(more)
            if found > POOL * count > 0:
                index, value = _largest(torch.cat(indices), torch.cat(values), count)
                indices, values, found, low = [index], [value], count, float(value.min())
        if ranks.count(found) >= count or first == 0.0:
            break
    index, value = _largest(torch.cat(indices), torch.cat(values), count)
    if ranks.size > 1:
        index, value, cut = _largest_of_all(index, value, count, ranks)
    else:
        cut = float(value.min()) if len(value) else 0.0
    code = Code(index // d_sae, index % d_sae, value, n)
    return preacts.exactly(code) if isinstance(preacts, Preacts) else code, cut


def top_k(preacts: Tensor | Preacts, k: int) -> Code:
    """The `k` largest positive entries of each row of preacts [n, d_sae], exactly; fewer where fewer are positive."""
    n, d_sae = preacts.shape
    tokens, features, values, begun = [], [], [], 0
    for part in _parts(preacts):
        bits, feature = _row_top_k(part.contiguous().view(BITS[part.dtype]), min(k, d_sae))
        token, column = (bits > 0).nonzero(as_tuple=True)
        tokens.append(token.add_(begun))
        features.append(feature[token - begun, column])
        values.append(bits.view(part.dtype)[token - begun, column].float())
        begun += len(part)
    code = Code(torch.cat(tokens), torch.cat(features), torch.cat(values), n)
    return preacts.exactly(code) if isinstance(preacts, Preacts) else code


def _row_top_k(bits: Tensor, k: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """The k largest of each row of bits [rows, width], in no order, and their columns.

    They lie in the k groups of neighbours with the largest maxima: every other group's maximum, so all of it, is at most
    the smallest of these k maxima. Those groups are searched in the same way by smaller groups.
    """
    rows, width = bits.shape
    group = math.gcd(width, group)
    if group == 1 or width // group <= 2 * k:  # too few groups to leave many out
        return bits.topk(k, dim=1, sorted=False)
    groups = bits.view(-1, group)
    best = groups.amax(1).view(rows, -1).topk(k, dim=1, sorted=False).indices
    first = torch.arange(rows, device=bits.device).unsqueeze(1) * (width // group)
    near = groups.index_select(0, (best + first).flatten()).view(rows, -1)
    value, column = _row_top_k(near, k, SUBGROUP) if group > SUBGROUP else near.topk(k, dim=1, sorted=False)
    return value, best.gather(1, column // group) * group + column % group


# ---- decode, and backward ----


def _offsets(code: Code) -> Tensor:
    """Where each token's entries begin."""
    return torch.searchsorted(code.token, torch.arange(code.n, device=code.token.device))


def decode(code: Code, W_dec: Tensor) -> Tensor:
    """Sum of value x W_dec[feature] per token: [n, d_in], without b_dec."""
    return functional.embedding_bag(code.feature, W_dec, _offsets(code), mode="sum", per_sample_weights=code.value)


def _dots(code: Code, rows: Tensor, weights: Tensor) -> Tensor:
    """rows[token] . weights[feature] for each entry: [nnz].

    It is what `embedding_bag` computes as the gradient of its values, without the two gathered [nnz, d_in] matrices that
    writing it out would make (25 times slower on a CPU, LOG.md); called directly, it saves autograd's forward.
    """
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    found: Tensor = backward(rows.contiguous(), weights, code.feature, _offsets(code), code.token, 0)
    return found


def backward(code: Code, grad_out: Tensor, x: Tensor, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor) -> Gradients:
    """Gradients of a loss whose gradient at the reconstruction is `grad_out` [n, d_in].

    With f the code, g = grad_out, and u the gradient at each kept value (ReLU and the cut pass it on unchanged):
        u_j = g[token_j] . W_dec[feature_j]
        dW_dec = f^T g,  dW_enc^T = u^T (x - b_dec),  db_enc = sum u,  db_dec = sum g - db_enc W_enc^T
    f^T and u^T are the code sorted by feature: bags of tokens, one bag per feature.
    """
    u = _dots(code, grad_out, W_dec)
    ordered, order = code.feature.sort(stable=True)
    tokens = code.token[order]
    starts = torch.searchsorted(ordered, torch.arange(len(W_dec), device=u.device))

    def transposed_times(values: Tensor, dense: Tensor) -> Tensor:
        return functional.embedding_bag(tokens, dense, starts, mode="sum", per_sample_weights=values[order])

    db_enc = torch.zeros(len(W_dec), device=u.device).index_add_(0, code.feature, u)
    return Gradients(
        W_enc_t=transposed_times(u, x - b_dec),
        b_enc=db_enc,
        W_dec=transposed_times(code.value, grad_out),
        b_dec=grad_out.sum(0) - db_enc @ W_enc_t,
    )


def auxiliary(
    preacts: Tensor | Preacts,
    dead: Tensor,
    k: int,
    error: Tensor,
    x: Tensor,
    W_enc_t: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    into: Gradients | None = None,
    weight: float | Tensor = 1.0,
) -> tuple[Tensor, Gradients]:
    """AuxK (Gao et al. 2024, 2406.04093): the k most active `dead` features [m] of each token reconstruct its error.

    error [n, d_in] is x - x_hat, held fixed. Returns the loss, sum |error - e_hat|^2 / sum |error|^2, and `weight` times
    its gradients, added to `into` in place where that is given (they are zero outside the dead features). There is no
    b_dec in e_hat: the error has none.
    """
    W_enc_dead, decoder = W_enc_t[dead], W_dec[dead]
    code = top_k(preacts.of(dead) if isinstance(preacts, Preacts) else preacts[:, dead].float(), k)
    few = len(dead) <= DENSE_AUX * k
    dense = torch.zeros(code.n, len(dead), device=x.device) if few else None
    if dense is not None:
        dense[code.token, code.feature] = code.value
    residual = (decode(code, decoder) if dense is None else dense @ decoder) - error
    power = error.square().sum().clamp_min(1e-12)
    g = residual * (2.0 * weight / power)
    if dense is None:
        found = backward(code, g, x, W_enc_dead, decoder, b_dec)
        found = found._replace(b_dec=found.b_dec - g.sum(0))
    else:
        u = (g @ decoder.T) * (dense > 0)
        found = Gradients(u.T @ (x - b_dec), u.sum(0), dense.T @ g, -(u.sum(0) @ W_enc_dead))
    if into is None:
        into = Gradients(
            torch.zeros_like(W_enc_t), W_enc_t.new_zeros(len(W_enc_t)), torch.zeros_like(W_dec), torch.zeros_like(b_dec)
        )
    for total, part in zip(into[:3], found[:3], strict=True):
        total.index_add_(0, dead, part)
    into.b_dec.add_(found.b_dec)
    return residual.square().sum() / power, into


# ---- around the optimizer ----


def on_the_sphere(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """The decoder's gradient [d_sae, d_in] without its part along each unit row (Bricken et al. 2023), in place."""
    for part, rows in zip(torch.split(gradient, ROWS), torch.split(W_dec, ROWS), strict=True):
        part.addcmul_((part * rows).sum(1, keepdim=True), rows, value=-1)
    return gradient


def normalise(W_dec: Tensor) -> Tensor:
    """Make the rows of W_dec [d_sae, d_in] unit, in place."""
    for rows in torch.split(W_dec, ROWS):
        rows.div_(rows.norm(dim=1, keepdim=True))
    return W_dec
