"""Which earlier parts of the model put into a source what a head then moved: DFA by component. Tensors in, tensors out.

Kissane et al. 2024, section 4 (recursive DFA), with the norm frozen. The residual stream of a source is a sum of components:
embedding, position embedding, and what each earlier attention and MLP added to it,

    x[src] = sum over c of x_c[src]

A norm divides it by a number per token, s[src]; with this scale frozen the way from the stream to v is linear (centring and
gain are folded into the matrix M), and so is all that follows once the pattern is frozen too:

    v[src, kv] = sum over c of  x_c[src] M[kv] / s[src]   +   norm bias . W_V   +   b_V

    DFA[h, src] = sum over c of  pattern[h, t, src] (x_c[src] M[kv(h)] . w[h]) / s[src]   +   the two biases' parts

so components and biases sum to the DFA: exactly, in real arithmetic. The matrix goes on w first, d_model numbers per head,
which every component of every source is then a dot product with.

The assumptions: pattern and scale are frozen. A component's number says what it carried through, not what would be missing
without it: the scale and the pattern would change too, and large components that cancel each other show as such.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_core import attribution
from sae_core.lens import StreamRead, ValueMap

NORM_BIAS, VALUE_BIAS = "norm bias", "value bias"


class Components(NamedTuple):
    """One feature's DFA at one destination, by component."""

    names: tuple[str, ...]
    """Those of the stream's parts, then `norm bias` and `value bias`, each only where the model has one."""
    given: Tensor
    """[n_names, n_heads, src]: signed; summed over the names it is the DFA."""
    dfa: Tensor
    """[n_heads, src]: from v and pattern alone."""

    @property
    def gap(self) -> float:
        """How far the components miss the DFA: the largest |sum of components - DFA| of any (head, source), as a share of
        the largest sum of |components|."""
        missed = (self.given.double().sum(0) - self.dfa.double()).abs().max()
        return float(missed / self.given.double().abs().sum(0).max().clamp_min(torch.finfo(torch.float64).tiny))


def by_component(stream: StreamRead, values: ValueMap, w: Tensor, dest: int, row: int = 0) -> Components:
    """DFA of one feature at `dest` of a row of `stream`, by component; w [n_heads, d_head], its encoder direction."""
    v, pattern = stream.attention.v[row], stream.attention.pattern[row, :, dest]  # [src, n_kv, d_head], [n_heads, src]
    group = len(w) // len(values.matrix)
    seen = torch.einsum("kde,kge->kgd", values.matrix, w.view(-1, group, w.shape[1])).flatten(0, 1)  # [n_heads, d_model]
    weighed = pattern / stream.scale[row]
    given = [torch.einsum("csd,hd->chs", stream.parts[:, row], seen) * weighed]
    names = list(stream.names)
    for name, bias in ((NORM_BIAS, values.norm_bias), (VALUE_BIAS, values.v_bias)):
        if bias.any():
            names.append(name)
            given.append(attribution.dfa(bias.expand_as(v), pattern[None], w[None]))
    return Components(tuple(names), torch.cat(given), attribution.dfa(v, pattern[None], w[None])[0])
