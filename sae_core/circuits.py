"""Recursive direct feature attribution: what made a feature, or a logit, from the features before it. Tensors in, a graph out.

Kissane et al. 2024, section 4, in full: with every attention pattern and every norm's scale frozen, a quantity is a sum over the
residual stream of its sources, and the stream is a sum of what was added to it. A feature i of layer l at destination t:

    preact = sum over s of  G[s] . x_l[s]  +  constants
    G[s]   = sum over h of  pattern[h, t, s] (M[kv(h)] . w_i[h]) / scale[s]        M = W_V with the norm's gain, `Lens.value_map`
    x_l[s] = embedding + position + sum over l' < l of (attention l' + MLP l')

and a logit likewise, with one source, its own position, and the unembedding in place of M . w. What an earlier attention layer
with an SAE added is taken apart once more, by z = (sum over j of f_j d_j + b_dec) / s + error:

    attention l' [s] = (z[s] W_O + b_O) / out_scale[s]  =  sum over j of f_j[s] (d_j W_O) / (s out_scale)  +  error  +  biases

Every feature j that fires has f_j = its own pre-activation, which is a sum of the same kind: so the way goes on, from the last
layer down to the first. A contribution's **effect** is its part of the root: the contribution times the reader's effect over the
reader's value. Features are followed while their effects, summed over the readers that list them, are a given share of the
root's; what is not followed stays a leaf or in its reader's remainder, so that each node's terms sum to its value, whatever the
threshold.

Frozen means: no number here says what would be missing without a feature. Patterns, scales and thresholds would change as well.

Positions that an SAE leaves out (row starts, attention sinks) have no features: what z is there is error as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from sae_core.errors import NotFound, UsageError
from sae_core.saes import SAE, row_starts

if TYPE_CHECKING:
    from sae_core.lens import Lens, ValueMap, WholeRead

Kind = Literal["logit", "feature", "error", "attention", "MLP", "embedding", "position", "bias"]
KINDS: Mapping[str, Kind] = {"attention": "attention", "MLP": "MLP", "embedding": "embedding", "position": "position"}
"""Of the stream's parts, by the first word of their names."""
LISTED = 0.1
"""A part that is no feature is listed from this share of the threshold on; what is smaller goes into the remainder."""


@dataclass(frozen=True)
class FeatureRoot:
    """Begin at a feature: its pre-activation at a destination."""

    layer: int
    index: int
    dest: int


@dataclass(frozen=True)
class LogitRoot:
    """Begin at the logit of a token at a position; less another token's, or less the mean over the vocabulary."""

    token: int
    dest: int
    against: int | None = None


@dataclass(frozen=True)
class Place:
    """What a node is: equal places are one node, whoever reads them."""

    kind: Kind
    layer: int
    """-1 where there is none."""
    position: int
    """-1 of biases, which are the same everywhere."""
    index: int
    """Of a feature; of a logit its token; else -1."""
    name: str = ""
    """Of a bias: `SAE bias`, `value bias`, `norm bias`, `decoder bias 3`, ..."""


class Edge(NamedTuple):
    """What one node gave to another."""

    source: Place
    value: float
    """In units of the reader's value; negative where it held it down."""


@dataclass(frozen=True)
class Node:
    """A quantity that is taken apart: its edges and the remainder sum to its value."""

    place: Place
    value: float
    """Computed on its own: a feature's pre-activation from the hooked z, a logit by the model's own modules."""
    effect: float
    """Its part of the root's value; the root's own is that value."""
    edges: tuple[Edge, ...]
    """Largest first."""
    rest: float
    """Sum of the parts that are too small to be listed."""
    n_rest: int
    """How many they are."""
    gap: float
    """|sum of all parts - value| / sum of |parts|, before anything is left out."""


@dataclass(frozen=True)
class Circuit:
    """A root and all that was followed from it."""

    root: Place
    nodes: dict[Place, Node]
    """Those that were taken apart, the root first, then from the last layer down."""
    effects: dict[Place, float]
    """Of every node and leaf: its part of the root's value, summed over all ways that lead there."""
    activations: dict[Place, float]
    """Of features."""

    @property
    def gap(self) -> float:
        """The largest of its nodes'."""
        return max(node.gap for node in self.nodes.values())


@dataclass
class _Layer:
    """An SAE on the row: what fires, and what it writes to the stream."""

    sae: SAE
    values: "ValueMap"
    token: Tensor
    """[n] of each firing."""
    feature: Tensor
    """[n]"""
    activation: Tensor
    """[n]"""
    written: Tensor
    """[n, d_model]: what each firing adds to the stream."""
    error: Tensor
    """[pos, d_model]: what the SAE's error adds."""
    biases: dict[str, Tensor]
    """[pos, d_model] each: what b_dec, b_O and a norm after it add."""


def trace(
    lens: "Lens",
    tokens: Sequence[int],
    saes: Mapping[int, SAE],
    root: FeatureRoot | LogitRoot,
    *,
    share: float = 0.02,
    most: int = 200,
) -> Circuit:
    """What made the root, followed back through the features of `saes` (by layer) on one row of tokens, row start first.

    A feature is followed where the size of its effect is at least `share` of the root's value (of a root that is itself less than
    that share of its parts' sizes: of as much); at most `most` nodes are taken apart. Raises UsageError and NotFound for a root
    that is not there, and UnsupportedModel where the model's stream cannot be seen part by part.
    """
    _check(lens, tokens, saes, root)
    row = torch.tensor([list(tokens)], device=lens.device)
    whole = lens.read_whole(row, sorted(saes))
    excluded = {}
    starts = row_starts(row.cpu(), lens.row_start)
    for layer, sae in saes.items():
        excluded[layer] = sae.excluded(whole.attention[layer].z, starts)[0]
    top = lens.info.n_layers if isinstance(root, LogitRoot) else root.layer
    layers = {
        layer: _read(lens, sae, whole, layer, excluded[layer])
        for layer, sae in saes.items()
        if layer < top or (isinstance(root, FeatureRoot) and layer == top)
    }
    return _Tracing(lens, whole, layers, share, most).from_(root)


def _check(lens: "Lens", tokens: Sequence[int], saes: Mapping[int, SAE], root: FeatureRoot | LogitRoot) -> None:
    if not 0 <= root.dest < len(tokens):
        raise UsageError(f"The text has the positions 0 to {len(tokens) - 1}; there is no {root.dest}.", field="dest")
    if isinstance(root, FeatureRoot):
        if root.layer not in saes:
            raise NotFound(f"No SAE of layer {root.layer} was given; there are some of {sorted(saes)}.", field="layer")
        d_sae = saes[root.layer].cfg.d_sae
        if not 0 <= root.index < d_sae:
            raise NotFound(f"The SAE has the features 0 to {d_sae - 1}; there is no {root.index}.", field="index")
        return
    for token in (root.token, root.against):
        if token is not None and not 0 <= token < lens.info.d_vocab:
            raise UsageError(f"{lens.info.name} has the tokens 0 to {lens.info.d_vocab - 1} only.", field="token")


def _read(lens: "Lens", sae: SAE, whole: "WholeRead", layer: int, excluded: Tensor) -> _Layer:
    """What the SAE makes of its layer's z, in units of the stream."""
    z, to = whole.attention[layer].z[0], lens.out_map(layer)
    found = sae.encode_sparse(z)
    fires = ~excluded[found.token]
    token, feature, activation = (part[fires] for part in found)
    token_scale, out_scale = sae.token_scale(z), whole.out_scale[layer][:, None]
    per_token = (torch.ones_like(out_scale) if token_scale is None else token_scale) * out_scale  # [pos, 1]
    # d_j W_O once for each feature that fires anywhere.
    used, which = torch.unique(feature, return_inverse=True)
    written = (sae.W_dec[used] @ to.matrix)[which] * (activation / per_token[token, 0])[:, None]
    decoder_bias = torch.where(excluded[:, None], 0.0, sae.b_dec @ to.matrix / per_token)
    error = z @ to.matrix / out_scale - decoder_bias
    error = error.index_add(0, token, written, alpha=-1.0)
    biases = {f"decoder bias {layer}": decoder_bias}
    if to.bias.any():
        biases[f"output bias {layer}"] = to.bias / out_scale
    if to.norm_bias.any():
        biases[f"bias of the norm after attention {layer}"] = to.norm_bias.expand_as(error)
    return _Layer(sae, lens.value_map(layer), token, feature, activation, written, error, biases)


class _Parts(NamedTuple):
    """All parts of one node, side by side."""

    places: list[Place]
    values: Tensor
    """[n] fp64"""


@dataclass
class _Tracing:
    lens: "Lens"
    whole: "WholeRead"
    layers: dict[int, _Layer]
    share: float
    most: int
    nodes: dict[Place, Node] = field(default_factory=dict)
    effects: dict[Place, float] = field(default_factory=dict)
    waiting: set[Place] = field(default_factory=set)
    """Features that were read and not yet followed."""
    least: float = 0.0

    def from_(self, root: FeatureRoot | LogitRoot) -> Circuit:
        place, value, towards, constants = self._root(root)
        parts = self._parts(root.layer if isinstance(root, FeatureRoot) else -1, towards, constants)
        # Where parts nearly cancel, the root's value alone would make everything large.
        self.least = self.share * max(abs(value), self.share * float(parts.values.abs().sum()))
        self.effects[place] = value
        self._keep(place, value, value, parts)
        while self.waiting and len(self.nodes) < self.most:
            # All who read a layer stand above it, so the last layer's effects are whole.
            last = max(one.layer for one in self.waiting)
            here = {one for one in self.waiting if one.layer == last}
            self.waiting -= here
            followed = sorted(
                (one for one in here if abs(self.effects[one]) >= self.least), key=lambda one: -abs(self.effects[one])
            )
            for one in followed[: self.most - len(self.nodes)]:
                self._follow(one, self.effects[one])
        return Circuit(place, self.nodes, self.effects, self._activations())

    def _follow(self, place: Place, effect: float) -> None:
        value, towards, constants = self._feature(place.layer, place.index, place.position)
        self._keep(place, value, effect, self._parts(place.layer, towards, constants))

    def _root(self, root: FeatureRoot | LogitRoot) -> tuple[Place, float, Tensor, dict[str, float]]:
        if isinstance(root, FeatureRoot):
            return Place("feature", root.layer, root.dest, root.index), *self._feature(root.layer, root.index, root.dest)
        place = Place("logit", self.lens.info.n_layers, root.dest, root.token, "" if root.against is None else str(root.against))
        logits = self.lens.logits_of(self.whole.final[root.dest])
        # The second row is that of the other token, or of the mean over the vocabulary.
        to = self.lens.logit_map([root.token] if root.against is None else [root.token, root.against])
        row, constant = to.rows[0] - to.rows[1], to.constants[0] - to.constants[1]
        value = logits[root.token] - (logits.mean() if root.against is None else logits[root.against])
        towards = torch.zeros_like(self.whole.final)
        towards[root.dest] = row / self.whole.final_scale[root.dest]
        return place, float(value), towards, {"final bias": float(constant)}

    def _feature(self, layer: int, index: int, dest: int) -> tuple[float, Tensor, dict[str, float]]:
        """A feature's pre-activation, from z alone; the directions G [pos, d_model] that it reads; and its constants."""
        here, read = self.layers[layer], self.whole.attention[layer]
        sae, values = here.sae, here.values
        w, c = sae.affine(torch.tensor([index], device=read.z.device))
        scale = sae.token_scale(read.z[0])
        preact = float(sae.scaled(read.z[0])[dest] @ w[0] + c[0])
        by_head = (w[0] if scale is None else w[0] * scale[dest]).view(sae.cfg.n_heads, sae.cfg.d_head)
        group = len(by_head) // len(values.matrix)
        grouped = by_head.view(len(values.matrix), group, -1)
        seen = torch.einsum("kde,kge->kgd", values.matrix, grouped).flatten(0, 1)  # [n_heads, d_model]
        pattern = read.pattern[0, :, dest]  # [n_heads, src]
        towards = (pattern / self.whole.scale[layer]).T @ seen
        constants = {"SAE bias": float(c[0])}
        for name, bias in (("norm bias", values.norm_bias), ("value bias", values.v_bias)):
            if bias.any():
                given = torch.einsum("ke,kge->kg", bias, grouped).flatten()  # [n_heads]
                constants[name] = float((pattern.sum(1) * given).sum())
        return preact, towards, constants

    def _parts(self, layer: int, towards: Tensor, constants: dict[str, float]) -> _Parts:
        """Every part of what is read in the directions `towards` [pos, d_model] before the layer (-1: at the end)."""
        whole = self.whole
        positions = towards.any(1).nonzero()[:, 0].tolist()
        places = [Place("bias", -1, -1, -1, name) for name in constants]
        values = [torch.tensor(list(constants.values()), dtype=torch.float64)]
        for at in range(whole.before(layer)):
            name = whole.names[at]
            kind, _, number = name.partition(" ")
            here = self.layers.get(int(number)) if kind == "attention" else None
            if here is None:
                given = (whole.parts[at] * towards).sum(1)
                places += [Place(KINDS[kind], int(number) if number else -1, s, -1) for s in positions]
                values.append(given[positions].double().cpu())
                continue
            read = (here.written * towards[here.token]).sum(1)
            found = read.nonzero()[:, 0]
            firings = zip(here.token[found].tolist(), here.feature[found].tolist(), strict=True)
            places += [Place("feature", int(number), s, index) for s, index in firings]
            values.append(read[found].double().cpu())
            places += [Place("error", int(number), s, -1) for s in positions]
            values.append((here.error * towards).sum(1)[positions].double().cpu())
            places += [Place("bias", -1, -1, -1, bias) for bias in here.biases]
            values.append(torch.stack([(added * towards).sum() for added in here.biases.values()]).double().cpu())
        return _Parts(places, torch.cat(values))

    def _keep(self, place: Place, value: float, effect: float, parts: _Parts) -> None:
        """The node, with the parts that matter as edges; features among them wait to be followed."""
        total, size = float(parts.values.sum()), float(parts.values.abs().sum())
        through = effect / value if value else 0.0
        effects = parts.values * through
        listed = effects.abs() >= LISTED * self.least
        edges = []
        for at in listed.nonzero()[:, 0].tolist():
            source, given = parts.places[at], float(parts.values[at])
            edges.append(Edge(source, given))
            self.effects[source] = self.effects.get(source, 0.0) + float(effects[at])
            if source.kind == "feature":
                self.waiting.add(source)
        self.nodes[place] = Node(
            place=place,
            value=value,
            effect=effect,
            edges=tuple(sorted(edges, key=lambda edge: -abs(edge.value))),
            rest=float(parts.values[~listed].sum()),
            n_rest=int((~listed).sum()),
            gap=abs(total - value) / max(size, 1e-30),
        )

    def _activations(self) -> dict[Place, float]:
        found: dict[Place, float] = {}
        for layer, here in self.layers.items():
            firings = zip(here.token.tolist(), here.feature.tolist(), here.activation.tolist(), strict=True)
            found |= {Place("feature", layer, s, index): value for s, index, value in firings}
        return {place: found[place] for place in self.effects if place in found}
