"""The training step's sparse arithmetic: exact top-k over a batch, sparse decode, and its backward by hand.

A dense step costs 10 d F multiply-adds per token, this one 2 d F + 8 k d: only the encoder product touches every feature
(reference: 2.2 and 2.4 of the trainer survey cited in LOG.md). Everything here works on sparse codes in *token order*:

    token   int64 [nnz], non-decreasing     feature int64 [nnz]     value float32 [nnz]
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 64  # features whose maximum is taken first when the largest entries are sought


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


def batch_top_k(preacts: Tensor, count: int, guess: float = 0.0) -> tuple[Code, float]:
    """The `count` largest positive entries of preacts [n, d_sae], exactly, and the smallest value kept.

    `guess` (the last batch's cut) makes it fast: if at least `count` entries exceed a little less than it, no other entry
    can be among the largest, so only those few are sorted; otherwise all positive entries are.
    """
    n, d_sae = preacts.shape
    flat = preacts.reshape(-1)
    for low in (0.8 * guess, 0.0):
        index = (flat > low).nonzero().squeeze(1)
        if len(index) >= count or low == 0.0:
            break
    value = flat[index].float()
    if len(index) > count:
        # sorted=False leaves the order to the implementation; sorting the positions restores token order.
        kept = value.topk(count, sorted=False).indices.sort().values
        index, value = index[kept], value[kept]
    cut = float(value.min()) if len(value) else 0.0
    return Code(index // d_sae, index % d_sae, value, n), cut


def top_k(preacts: Tensor, k: int) -> Code:
    """The `k` largest positive entries of each row of preacts [n, d_sae], exactly; fewer where fewer are positive.

    In two stages: a row's k largest entries lie in the k groups of neighbouring features with the largest maxima (any
    other group's maximum, so all of it, is at most the smallest of these k maxima), and only these are searched.
    """
    n, d_sae = preacts.shape
    k = min(k, d_sae)
    group = math.gcd(d_sae, GROUP)
    if d_sae // group <= 2 * k or group == 1:  # nothing to gain
        value, feature = preacts.topk(k, dim=1, sorted=False)
    else:
        groups = preacts.reshape(-1, group)
        best = groups.amax(1).view(n, -1).topk(k, dim=1, sorted=False).indices
        row = torch.arange(n, device=preacts.device).unsqueeze(1) * (d_sae // group)
        near = groups.index_select(0, (best + row).flatten()).view(n, -1)
        value, inside = near.topk(k, dim=1, sorted=False)
        feature = best.gather(1, inside // group) * group + inside % group
    token, column = (value > 0).nonzero(as_tuple=True)
    return Code(token, feature[token, column], value[token, column].float(), n)


def decode(code: Code, W_dec: Tensor) -> Tensor:
    """Sum of value x W_dec[feature] per token: [n, d_in], without b_dec."""
    offsets = torch.searchsorted(code.token, torch.arange(code.n, device=W_dec.device))
    return functional.embedding_bag(code.feature, W_dec, offsets, mode="sum", per_sample_weights=code.value)


def _value_gradients(code: Code, grad_out: Tensor, W_dec: Tensor) -> Tensor:
    """u [nnz] = grad_out[token] . W_dec[feature].

    `embedding_bag`'s own backward for its weights is just that product, without the two gathered [nnz, d_in] matrices
    that writing it out would make (25 times slower on a CPU, LOG.md).
    """
    with torch.enable_grad():
        value = code.value.detach().requires_grad_()
        (u,) = torch.autograd.grad(decode(code._replace(value=value), W_dec), value, grad_out)
    return u


def backward(code: Code, grad_out: Tensor, x: Tensor, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor) -> Gradients:
    """Gradients of a loss whose gradient at the reconstruction is `grad_out` [n, d_in].

    With f the code, g = grad_out, and u the gradient at each kept value (ReLU and the cut pass it on unchanged):
        u_j = g[token_j] . W_dec[feature_j]
        dW_dec = f^T g,  dW_enc^T = u^T (x - b_dec),  db_enc = sum u,  db_dec = sum g - db_enc W_enc^T
    f^T and u^T are the code sorted by feature: bags of tokens, one bag per feature.
    """
    u = _value_gradients(code, grad_out, W_dec)
    order = code.feature.argsort(stable=True)
    tokens = code.token[order]
    starts = torch.searchsorted(code.feature[order], torch.arange(len(W_dec), device=u.device))

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
    preacts: Tensor, dead: Tensor, k: int, error: Tensor, x: Tensor, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor
) -> tuple[Tensor, Gradients]:
    """AuxK (Gao et al. 2024, 2406.04093): the k most active `dead` features [m] of each token reconstruct its error.

    error [n, d_in] is x - x_hat, held fixed. Returns the loss, sum |error - e_hat|^2 / sum |error|^2, and its gradients
    (zero outside the dead features). There is no b_dec in e_hat: the error has none.
    """
    values, which = preacts[:, dead].float().topk(min(k, len(dead)), dim=1)
    values = values.relu()
    code = torch.zeros(len(preacts), len(dead), device=x.device).scatter_(1, which, values)
    decoder = W_dec[dead]
    residual = code @ decoder - error
    power = error.square().sum().clamp_min(1e-12)
    g = residual * (2.0 / power)
    u = (g @ decoder.T) * (code > 0)
    grads = Gradients(*(torch.zeros_like(p) for p in (W_enc_t, preacts.new_zeros(len(W_dec), dtype=torch.float32), W_dec, b_dec)))
    grads.W_dec[dead] = code.T @ g
    grads.W_enc_t[dead] = u.T @ (x - b_dec)
    grads.b_enc[dead] = u.sum(0)
    grads.b_dec.copy_(-(u.sum(0) @ W_enc_t[dead]))
    return residual.square().sum() / power, grads
