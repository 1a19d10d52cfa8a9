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

An MLP is no linear function of the stream, so what it added stays whole, unless a **transcoder** of its layer is given:

    MLP l [s] = (sum over m of t_m[s] d_m + b_dec + skip . x[s] + error[s]) / scale of a norm after it      x[s] = LN(stream)[s]
    t_m[s]    = w_m . x[s] + b_m                                                                             where it fires

which is a sum over the stream before that MLP, and the attention of its own layer is in it (not so where a block runs both side
by side). A skip is no node: it is linear, so whoever reads the MLP reads the stream before it through the skip as well. Row
starts have no MLP features either.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from sae_core.errors import NotFound, UsageError
from sae_core.norms import plain
from sae_core.saes import SAE, row_starts
from sae_core.transcoders import Sight, Transcoder, check_fits

if TYPE_CHECKING:
    from sae_core.lens import Lens, ValueMap, WholeRead

Kind = Literal["logit", "feature", "error", "attention", "MLP feature", "MLP error", "MLP", "embedding", "position", "bias"]
FEATURES: tuple[Kind, ...] = ("feature", "MLP feature")
"""Kinds that are followed."""
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
    heads: tuple[float, ...]
    """By head of the reader's layer, which sum to it; empty where no head carried it: into a logit or an MLP, and of biases."""


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
class Written:
    """A dictionary on the row: what fires, and what it writes to the stream."""

    token: Tensor
    """[n] of each firing."""
    feature: Tensor
    """[n]"""
    activation: Tensor
    """[n]"""
    direction: Tensor
    """[n]: the row of `directions` of each firing."""
    amount: Tensor
    """[n]: how much of it; the activation over all that divides it."""
    directions: Tensor
    """[n features that fire, d_model]: what each adds to the stream."""
    error: Tensor
    """[pos, d_model]: what its error adds."""
    biases: dict[str, Tensor]
    """[pos, d_model] each: what b_dec, b_O and a norm after it add."""

    def written(self, which: Tensor) -> Tensor:
        """[m, d_model]: what some firings add to the stream."""
        return self.directions[self.direction[which]] * self.amount[which, None]

    def activation_at(self, place: Place) -> float:
        """Of a feature at a position; 0 where it does not fire."""
        return float(self.activation[(self.token == place.position) & (self.feature == place.index)].sum())


@dataclass
class LayerRead(Written):
    """An SAE on the row."""

    sae: SAE
    values: "ValueMap"


@dataclass
class MLPLayer(Written):
    """A transcoder on the row."""

    transcoder: Transcoder
    sight: Sight
    n_parts: int
    """How many of the row's parts its MLP reads."""
    skip: Tensor | None
    """[d_model, d_model]: from a part of the stream to what the skip adds of it, but for `through`; None where there is none."""
    through: Tensor
    """[pos]: what that is multiplied by; 0 at row starts."""


def trace(
    lens: "Lens",
    tokens: Sequence[int],
    saes: Mapping[int, SAE],
    root: FeatureRoot | LogitRoot,
    *,
    transcoders: Mapping[int, Transcoder] | None = None,
    share: float = 0.02,
    most: int = 200,
    depth: int | None = None,
    widest: int = 60,
    check: Callable[[], None] = lambda: None,
) -> Circuit:
    """What made the root, followed back through the features of `saes` and `transcoders`, both by layer, on one row of tokens,
    row start first.

    A feature is followed where the size of its effect is at least `share` of the root's value (of a root that is itself less than
    that share of its parts' sizes: of as much). At most `most` nodes are taken apart, with `depth` none that is more than so many
    edges from the root; a node has at most `widest` edges from features and as many from other parts. `check` is called between
    steps, and may raise. Raises UsageError and NotFound for a root that is not there, SAEMismatch for a transcoder of another
    model, and UnsupportedModel where the stream cannot be seen part by part, or what enters an MLP that has a transcoder cannot.
    """
    _check(lens, tokens, saes, root)
    top = lens.info.n_layers if isinstance(root, LogitRoot) else root.layer + 1
    saes = {layer: sae for layer, sae in saes.items() if layer < top}
    below = lens.info.n_layers if isinstance(root, LogitRoot) else root.layer
    transcoders = {layer: one for layer, one in (transcoders or {}).items() if layer < below}
    for one in transcoders.values():
        check_fits(one, lens.info)
    whole = lens.read_whole(torch.tensor([list(tokens)], device=lens.device), sorted(saes), sorted(transcoders))
    layers, mlps = {}, {}
    for layer, sae in saes.items():
        check()
        layers[layer] = _read(lens, tokens, sae, whole, layer)
    for layer, one in transcoders.items():
        check()
        mlps[layer] = _read_mlp(lens, tokens, one, whole, layer)
    return _Tracing(lens, whole, layers, mlps, _fixed(whole, layers, mlps), share, most, depth, widest, check).from_(root)


def read_layers(
    lens: "Lens", tokens: Sequence[int], saes: Mapping[int, SAE], before: int, check: Callable[[], None] = lambda: None
) -> dict[int, LayerRead]:
    """What the SAEs of the layers before a layer make of one row of tokens. `check` is called before each, and may raise."""
    saes = {layer: sae for layer, sae in saes.items() if layer < before}
    whole = lens.read_whole(torch.tensor([list(tokens)], device=lens.device), sorted(saes))
    found = {}
    for layer, sae in saes.items():
        check()
        found[layer] = _read(lens, tokens, sae, whole, layer)
    return found


def left_by(lens: "Lens", tokens: Sequence[int], transcoder: Transcoder) -> tuple[float, float]:
    """Of a row, its start left out: the fraction of the variance of what the MLP adds to the stream that the transcoder leaves as
    error, and how many features fire a token."""
    layer = transcoder.cfg.layer
    whole = lens.read_whole(torch.tensor([list(tokens)], device=lens.device), [], [layer])
    here, added = _read_mlp(lens, tokens, transcoder, whole, layer), whole.parts[whole.names.index(f"MLP {layer}"), 1:]
    fvu = here.error[1:].square().sum() / (added - added.mean(0)).square().sum()
    return float(fvu), len(here.token) / (len(tokens) - 1)


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


def _read(lens: "Lens", tokens: Sequence[int], sae: SAE, whole: "WholeRead", layer: int) -> LayerRead:
    """What the SAE makes of its layer's z, in units of the stream."""
    z, to = whole.attention[layer].z[0], lens.out_map(layer)
    excluded = sae.excluded(z[None], row_starts(torch.tensor([list(tokens)]), lens.row_start))[0]
    found = sae.encode_sparse(z)
    fires = ~excluded[found.token]
    token, feature, activation = (part[fires] for part in found)
    token_scale, out_scale = sae.token_scale(z), whole.out_scale[layer][:, None]
    per_token = (torch.ones_like(out_scale) if token_scale is None else token_scale) * out_scale  # [pos, 1]
    # d_j W_O once for each feature that fires anywhere.
    used, which = torch.unique(feature, return_inverse=True)
    directions, amount = sae.W_dec[used] @ to.matrix, activation / per_token[token, 0]
    decoder_bias = torch.where(excluded[:, None], 0.0, sae.b_dec @ to.matrix / per_token)
    error = z @ to.matrix / out_scale - decoder_bias
    codes = torch.zeros(len(z), len(used), device=z.device).index_put((token, which), amount)
    error = error - codes @ directions
    biases = {f"decoder bias {layer}": decoder_bias}
    if to.bias.any():
        biases[f"output bias {layer}"] = to.bias / out_scale
    if to.norm_bias.any():
        biases[f"bias of the norm after attention {layer}"] = to.norm_bias.expand_as(error)
    return LayerRead(token, feature, activation, which, amount, directions, error, biases, sae, lens.value_map(layer))


def _read_mlp(lens: "Lens", tokens: Sequence[int], transcoder: Transcoder, whole: "WholeRead", layer: int) -> MLPLayer:
    """What the transcoder makes of its MLP, in units of the stream."""
    read, (before, after) = whole.mlps[layer], lens.mlp_norms(layer)
    sight, out_scale = transcoder.sight(read, before), read.out_scale[:, None]
    d_model, device = sight.x.shape[1], sight.x.device
    if transcoder.cfg.writes == "stream":
        after, out_scale = plain(d_model, device), torch.ones_like(out_scale)
    inside = ~row_starts(torch.tensor([list(tokens)]), lens.row_start)[0].to(device)
    found = transcoder.encode_sparse(sight.x)
    token, feature, activation = (part[inside[found.token]] for part in found)
    used, which = torch.unique(feature, return_inverse=True)
    directions, amount = after.map(transcoder.W_dec[used]), activation / out_scale[token, 0]
    per_token = inside[:, None] / out_scale
    biases = {f"transcoder bias {layer}": after.map(transcoder.b_dec) * per_token}
    if after.bias.any():
        biases[f"bias of the norm after MLP {layer}"] = after.bias.expand_as(sight.x)
    codes = torch.zeros(len(sight.x), len(used), device=device).index_put((token, which), amount)
    error = whole.parts[whole.names.index(f"MLP {layer}")] - codes @ directions
    skip, through = None, per_token[:, 0] / sight.scale
    if transcoder.skip is not None:
        linear = after.map(transcoder.skip)
        skip = sight.norm.map(torch.eye(d_model, device=device)) @ linear
        error = error - read.stream @ skip * through[:, None]
        if sight.norm.bias.any():
            biases[f"skip bias {layer}"] = sight.norm.bias @ linear * per_token
    error = error - torch.stack(list(biases.values())).sum(0)
    return MLPLayer(
        token, feature, activation, which, amount, directions, error, biases, transcoder, sight, read.n_parts, skip, through
    )


class _Block(NamedTuple):
    """Some parts of a node, side by side: of one kind and layer, or biases."""

    kind: Kind
    layer: int
    values: Tensor
    """[n] fp64"""
    positions: Tensor
    """[n]; -1 of biases."""
    indices: Tensor | None = None
    """[n] of features."""
    names: tuple[str, ...] = ()
    """[n] of biases."""
    rows: Tensor | None = None
    """[n]: of features the firing; of others the row of `_Fixed`, the same for all."""

    def place(self, at: int) -> Place:
        index = -1 if self.indices is None else int(self.indices[at])
        return Place(self.kind, self.layer, int(self.positions[at]), index, self.names[at] if self.names else "")


class _Fixed(NamedTuple):
    """Everything in the stream that is no feature, in the order of the stream."""

    what: list[tuple[Kind, int, str]]
    """Kind, layer, and the name of a bias."""
    vectors: Tensor
    """[n, pos, d_model]"""
    starts: tuple[int, ...]
    """By part of the stream: how many stand before it; of all at the end."""


def _fixed(whole: "WholeRead", layers: Mapping[int, LayerRead], mlps: Mapping[int, MLPLayer]) -> _Fixed:
    what: list[tuple[Kind, int, str]] = []
    vectors: list[Tensor] = []
    starts = []
    for name, part in zip(whole.names, whole.parts, strict=True):
        kind, _, number = name.partition(" ")
        of = int(number) if number else -1
        starts.append(len(what))
        here: Written | None = {"attention": layers, "MLP": mlps}.get(kind, {}).get(of)
        if here is None:
            what.append((KINDS[kind], of, ""))
            vectors.append(part)
            continue
        what += [("error" if kind == "attention" else "MLP error", of, ""), *(("bias", of, bias) for bias in here.biases)]
        vectors += [here.error, *here.biases.values()]
    return _Fixed(what, torch.stack(vectors), (*starts, len(what)))


def _biases(names: Sequence[str], values: Tensor) -> _Block:
    return _Block("bias", -1, values, torch.full((len(names),), -1), names=tuple(names))


class _Read(NamedTuple):
    """What a node reads, and how."""

    value: float
    towards: Tensor
    """[pos, d_model]: the directions that it reads the stream in."""
    constants: dict[str, float]
    heads: Tensor | None = None
    """[n_heads, d_model]: of a feature, what each head of its layer reads in a source, but for pattern and scale."""


@dataclass
class _Tracing:
    lens: "Lens"
    whole: "WholeRead"
    layers: dict[int, LayerRead]
    mlps: dict[int, MLPLayer]
    fixed: _Fixed
    share: float
    most: int
    depth: int | None
    widest: int
    check: Callable[[], None]
    nodes: dict[Place, Node] = field(default_factory=dict)
    effects: dict[Place, float] = field(default_factory=dict)
    steps: dict[Place, int] = field(default_factory=dict)
    """How many edges from the root, at least."""
    waiting: set[Place] = field(default_factory=set)
    """Features that were read and not yet followed."""
    least: float = 0.0

    def from_(self, root: FeatureRoot | LogitRoot) -> Circuit:
        if isinstance(root, FeatureRoot):
            place = Place("feature", root.layer, root.dest, root.index)
            read = self._feature(place)
        else:
            place, read = self._logit(root)
        blocks = self._blocks(place, read)
        # Where parts nearly cancel, the root's value alone would make everything large.
        size = sum(float(block.values.abs().sum()) for block in blocks)
        self.least = self.share * max(abs(read.value), self.share * size)
        self.effects[place], self.steps[place] = read.value, 0
        self._keep(place, read, blocks)
        while self.waiting and len(self.nodes) < self.most:
            # All who read a part of the stream stand above it, so the last one's effects are whole.
            last = max(self._order(one) for one in self.waiting)
            here = {one for one in self.waiting if self._order(one) == last}
            self.waiting -= here
            followed = sorted((one for one in here if self._follows(one)), key=lambda one: -abs(self.effects[one]))
            for one in followed[: self.most - len(self.nodes)]:
                self.check()
                read = self._feature(one) if one.kind == "feature" else self._mlp_feature(one)
                self._keep(one, read, self._blocks(one, read))
        return Circuit(place, self.nodes, self.effects, self._activations())

    def _follows(self, one: Place) -> bool:
        return abs(self.effects[one]) >= self.least and (self.depth is None or self.steps[one] <= self.depth)

    def _logit(self, root: LogitRoot) -> tuple[Place, _Read]:
        place = Place("logit", self.lens.info.n_layers, root.dest, root.token, "" if root.against is None else str(root.against))
        logits = self.lens.logits_of(self.whole.final[root.dest])
        # The second row is that of the other token, or of the mean over the vocabulary.
        to = self.lens.logit_map([root.token] if root.against is None else [root.token, root.against])
        row, constant = to.rows[0] - to.rows[1], to.constants[0] - to.constants[1]
        value = logits[root.token] - (logits.mean() if root.against is None else logits[root.against])
        towards = torch.zeros_like(self.whole.final)
        towards[root.dest] = row / self.whole.final_scale[root.dest]
        return place, _Read(float(value), towards, {"final bias": float(constant)})

    def _order(self, one: Place) -> int:
        """Where in the stream's order a feature's layer adds to it: how many fixed parts stand before."""
        return self.fixed.starts[self.whole.names.index(f"{'attention' if one.kind == 'feature' else 'MLP'} {one.layer}")]

    def _sight(self, one: Place) -> int:
        """How many fixed parts a node reads."""
        if one.kind == "MLP feature":
            return self.fixed.starts[self.mlps[one.layer].n_parts]
        return self._order(one) if one.kind == "feature" else self.fixed.starts[-1]

    def _mlp_feature(self, one: Place) -> _Read:
        """The same of a transcoder's feature, from what enters its MLP, and how it reads the stream before that."""
        transcoder, sight = self.mlps[one.layer].transcoder, self.mlps[one.layer].sight
        w, b = transcoder.W_enc[:, one.index], float(transcoder.b_enc[one.index])
        towards = torch.zeros_like(sight.x)
        towards[one.position] = sight.norm.read(w) / sight.scale[one.position]
        constants = {"encoder bias": b}
        if sight.norm.bias.any():
            constants["norm bias"] = float(sight.norm.bias @ w)
        return _Read(float(sight.x[one.position] @ w) + b, towards, constants)

    def _feature(self, one: Place) -> _Read:
        """A feature's pre-activation, from z alone, and how it reads the stream before its layer."""
        layer, dest = one.layer, one.position
        here, read = self.layers[layer], self.whole.attention[layer]
        sae, values = here.sae, here.values
        w, c = sae.affine(torch.tensor([one.index], device=read.z.device))
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
        return _Read(preact, towards, constants, seen)

    def _blocks(self, reader: Place, read: _Read) -> list[_Block]:
        """Every part of what a node reads."""
        positions = read.towards.any(1).nonzero()[:, 0]
        at, before = positions.cpu(), self._sight(reader)
        blocks = [_biases(list(read.constants), torch.tensor(list(read.constants.values()), dtype=torch.float64))]
        column = torch.full((len(read.towards),), -1, device=positions.device)
        column[positions] = torch.arange(len(positions), device=positions.device)
        for first, end, towards in self._through(read.towards[positions], positions, before):
            seen = self.fixed.vectors[first:end] if len(positions) == len(column) else self.fixed.vectors[first:end, positions]
            given = torch.einsum("npd,pd->np", seen, towards).double().cpu()
            for row, (kind, of, name) in enumerate(self.fixed.what[first:end]):
                if kind == "bias":
                    blocks.append(_biases([name], given[row].sum()[None]))
                else:
                    blocks.append(_Block(kind, of, given[row], at, rows=torch.full_like(at, first + row)))
            for source, here in self._written():
                if not first <= self._order(source) < end:
                    continue
                found = (column[here.token] >= 0).nonzero()[:, 0]
                by_position = here.directions @ towards.T
                values = by_position[here.direction[found], column[here.token[found]]] * here.amount[found]
                fires = here.token[found].cpu(), here.feature[found].cpu(), found.cpu()
                blocks.append(_Block(source.kind, source.layer, values.double().cpu(), fires[0], fires[1], rows=fires[2]))
        return blocks

    def _written(self) -> list[tuple[Place, Written]]:
        """All layers with features."""
        return [
            *((Place("feature", of, -1, -1), here) for of, here in self.layers.items()),
            *((Place("MLP feature", of, -1, -1), here) for of, here in self.mlps.items()),
        ]

    def _through(self, towards: Tensor, positions: Tensor, before: int) -> Iterator[tuple[int, int, Tensor]]:
        """Runs of fixed parts (first, end) below `before`, and how they are read [n, d_model] at positions [n]: through the
        skips of all MLPs between them and the reader as well."""
        end = before
        for of, here in sorted(self.mlps.items(), reverse=True):
            if here.skip is None or self._order(Place("MLP feature", of, -1, -1)) >= before:
                continue
            first = self.fixed.starts[here.n_parts]
            yield first, end, towards
            towards, end = towards + towards @ here.skip.T * here.through[positions, None], first
        yield 0, end, towards

    def _keep(self, place: Place, read: _Read, blocks: Sequence[_Block]) -> None:
        """The node, with the parts that matter as edges; features among them wait to be followed."""
        values = torch.cat([block.values for block in blocks])
        total, size = float(values.sum()), float(values.abs().sum())
        effect = self.effects[place]
        through = effect / read.value if read.value else 0.0
        fires = torch.cat([torch.full((len(block.values),), block.kind in FEATURES) for block in blocks])
        listed = ((values * through).abs() >= LISTED * self.least).nonzero()[:, 0]
        order = listed[values[listed].abs().argsort(descending=True)]
        # Features have a limit of their own: what can be followed is not crowded out by what cannot.
        chosen = [at for kind in (fires, ~fires) for at in order[kind[order]][: self.widest].tolist()]
        chosen.sort(key=lambda at: -abs(float(values[at])))
        ends = torch.tensor([len(block.values) for block in blocks]).cumsum(0)
        edges = []
        for at in chosen:
            which = int(torch.searchsorted(ends, at, right=True))
            block = blocks[which]
            row = at - int(ends[which]) + len(block.values)
            source, given = block.place(row), float(values[at])
            edges.append(Edge(source, given, self._heads(place, read, block, row)))
            self.effects[source] = self.effects.get(source, 0.0) + given * through
            self.steps[source] = min(self.steps.get(source, self.steps[place] + 1), self.steps[place] + 1)
            if source.kind in FEATURES:
                self.waiting.add(source)
        self.nodes[place] = Node(
            place=place,
            value=read.value,
            effect=effect,
            edges=tuple(edges),
            rest=total - sum(edge.value for edge in edges),
            n_rest=len(values) - len(edges),
            gap=abs(total - read.value) / max(size, 1e-30),
        )

    def _heads(self, place: Place, read: _Read, block: _Block, row: int) -> tuple[float, ...]:
        """A part by the heads that carried it."""
        if read.heads is None or block.rows is None:
            return ()
        source, which = int(block.positions[row]), int(block.rows[row])
        if block.kind in FEATURES:
            here: Written = self.layers[block.layer] if block.kind == "feature" else self.mlps[block.layer]
            vector, order = here.written(block.rows[row : row + 1])[0], self._order(block.place(row))
        else:
            vector, order = self.fixed.vectors[which, source], which
        for of, mlp in sorted(self.mlps.items()):
            if mlp.skip is not None and of < place.layer and order < self.fixed.starts[mlp.n_parts]:
                vector = vector + vector @ mlp.skip * mlp.through[source]
        carried = self.whole.attention[place.layer].pattern[0, :, place.position, source] / self.whole.scale[place.layer][source]
        return tuple((carried * (read.heads @ vector)).tolist())

    def _activations(self) -> dict[Place, float]:
        return {
            place: (self.layers if place.kind == "feature" else self.mlps)[place.layer].activation_at(place)  # 0 of a silent root
            for place in self.effects
            if place.kind in FEATURES
        }
