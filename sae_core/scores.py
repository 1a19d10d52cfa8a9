"""Why a head attended there: one attention score, taken apart by what the query and the key are made of. Tensors in, pairs out.

DFA says what moved along an attention pattern; this says why the pattern looked where it did. With the scales of all norms
frozen (before attention, and on queries and keys where a model has them), head h's query at the destination t and its key at
the source s are sums over the residual stream's parts there, and a score is a sum over pairs of them:

    score[h, t, s] = sum over parts i at t, j at s of  (q_i R_t) . (k_j R_s) * scaling        R = the rotation by position

before a soft cap and the softmax (pairs of features: QK attributions, Kamath et al. 2025). Where an SAE stands on an earlier
attention layer, its parts are features, an error and biases, as in `circuits`. Biases are parts too, so pairs sum to the score.

A pattern says which source won, and what is the same for every source wins nothing: so `against_mean` takes the score's lead over
its mean over all sources that the mask lets through, part by part on the key's side. A part that is everywhere drops out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_core.circuits import KINDS, LayerRead, Place, read_layers
from sae_core.errors import UsageError
from sae_core.saes import SAE

if TYPE_CHECKING:
    from sae_core.lens import Lens, ScoreRead, Side


@dataclass(frozen=True)
class Part:
    """What one part of the query, or of the key, gave with all of the other side."""

    place: Place
    value: float


@dataclass(frozen=True)
class Pair:
    """What a part of the query gave with a part of the key."""

    query: Place
    key: Place
    value: float


@dataclass(frozen=True)
class Why:
    """A score in pairs: `value` = sum of `pairs` + `rest` = sum of `queries` = sum of `keys`."""

    layer: int
    head: int
    dest: int
    src: int
    value: float
    """Computed on its own, from the model's own queries and keys: the score, or its lead over the mean."""
    scores: tuple[float, ...]
    """By head, from `dest` to `src`; before a soft cap."""
    means: tuple[float, ...]
    """By head: the mean score over all sources that the mask lets through."""
    patterns: tuple[float, ...]
    """By head: what the softmax made of it."""
    cap: float | None
    """The soft cap of the model's scores."""
    queries: tuple[Part, ...]
    """Every part of the query, by size."""
    keys: tuple[Part, ...]
    """Every part of the key, by size."""
    pairs: tuple[Pair, ...]
    """The largest, by size."""
    rest: float
    """Sum of all other pairs."""
    n_rest: int
    gap: float
    """|sum of all pairs - value| / sum of |pairs|."""


def explain(
    lens: "Lens",
    tokens: Sequence[int],
    saes: Mapping[int, SAE],
    *,
    layer: int,
    head: int | None,
    dest: int,
    src: int,
    against_mean: bool = False,
    most: int = 40,
    check: Callable[[], None] = lambda: None,
) -> Why:
    """Why head `head` of the layer (None: the one that did so most) looked from `dest` to `src`; `saes` by layer. `check` is
    called between steps, with `against_mean` before each source too, and may raise.

    Raises UsageError for a place that is not there or that the mask hides, LayerOutOfRange, and UnsupportedModel where the scores
    cannot be made from the stream's parts.
    """
    lens.check_layer(layer)
    if head is not None and not 0 <= head < lens.info.n_heads:
        raise UsageError(f"{lens.info.name} has the heads 0 to {lens.info.n_heads - 1}; there is no {head}.", field="head")
    for name, position in (("dest", dest), ("src", src)):
        if not 0 <= position < len(tokens):
            raise UsageError(f"The text has the positions 0 to {len(tokens) - 1}; there is no {position}.", field=name)
    row = torch.tensor([list(tokens)], device=lens.device)
    read = lens.read_scores(row, layer)
    if not read.allowed[dest, src]:
        raise UsageError(f"Layer {layer} does not let position {dest} look at {src}.", field="src")
    patterns = read.attention.pattern[0, :, dest, src]
    head = int(patterns.argmax()) if head is None else head
    check()
    layers = read_layers(lens, tokens, saes, layer, check)
    allowed = read.allowed[dest].nonzero()[:, 0].tolist()
    kv = head * lens.info.n_kv_heads // lens.info.n_heads
    queries, q = _side(read, read.queries, head, layers, dest)
    keys, k = _side(read, read.keys, kv, layers, src)
    scores, means = read.scores[:, dest, src], read.scores[:, dest, allowed].mean(1)
    value = float(scores[head])
    if against_mean:
        value -= float(means[head])
        keys, k = _less_the_mean(read, kv, layers, allowed, keys, k, check)
    pairs = (q @ k.T).double().cpu() * read.scaling
    order = pairs.flatten().abs().argsort(descending=True)[:most].tolist()
    chosen = [divmod(at, len(keys)) for at in order]
    kept = tuple(Pair(queries[i], keys[j], float(pairs[i, j])) for i, j in chosen)
    total = float(pairs.sum())
    return Why(
        layer=layer,
        head=head,
        dest=dest,
        src=src,
        value=value,
        scores=tuple(scores.tolist()),
        means=tuple(means.tolist()),
        patterns=tuple(patterns.tolist()),
        cap=read.cap,
        queries=_by_size(queries, pairs.sum(1)),
        keys=_by_size(keys, pairs.sum(0)),
        pairs=kept,
        rest=total - sum(pair.value for pair in kept),
        n_rest=pairs.numel() - len(kept),
        gap=abs(total - value) / max(float(pairs.abs().sum()), 1e-30),
    )


def _by_size(places: Sequence[Place], values: Tensor) -> tuple[Part, ...]:
    parts = (Part(place, value) for place, value in zip(places, values.tolist(), strict=True))
    return tuple(sorted(parts, key=lambda part: -abs(part.value)))


def _side(read: "ScoreRead", side: "Side", n: int, layers: Mapping[int, LayerRead], at: int) -> tuple[list[Place], Tensor]:
    """The parts of a query or key, of the head n of that side, at a position: what they are, and [n_parts, d_head]."""
    places, vectors = _stream_parts(read, layers, at)
    made = (vectors / read.scale[at]) @ side.matrix[n] / side.own_scale[at, n]
    constants = [bias[n] / side.own_scale[at, n] for bias in side.biases.values()]
    names = list(side.biases)
    if side.own_bias.any():
        constants.append(side.own_bias[n])
        names.append("bias of the norm on queries and keys")
    places += [Place("bias", -1, -1, -1, name) for name in names]
    return places, torch.cat([made, *(one[None] for one in constants)]) @ read.turn[at]


def _stream_parts(read: "ScoreRead", layers: Mapping[int, LayerRead], at: int) -> tuple[list[Place], Tensor]:
    """What the stream before the layer is made of at a position: [n_parts, d_model]."""
    places: list[Place] = []
    vectors: list[Tensor] = []
    for name, part in zip(read.names, read.parts, strict=True):
        kind, _, number = name.partition(" ")
        here = layers.get(int(number)) if kind == "attention" else None
        if here is None:
            places.append(Place(KINDS[kind], int(number) if number else -1, at, -1))
            vectors.append(part[at][None])
            continue
        fires = here.token == at
        places += [Place("feature", int(number), at, index) for index in here.feature[fires].tolist()]
        places.append(Place("error", int(number), at, -1))
        places += [Place("bias", -1, -1, -1, bias) for bias in here.biases]
        vectors += [
            here.written(fires.nonzero()[:, 0]),
            here.error[at][None],
            *(added[at][None] for added in here.biases.values()),
        ]
    return places, torch.cat(vectors)


def _less_the_mean(
    read: "ScoreRead",
    kv: int,
    layers: Mapping[int, LayerRead],
    allowed: Sequence[int],
    keys: Sequence[Place],
    k: Tensor,
    check: Callable[[], None],
) -> tuple[list[Place], Tensor]:
    """The key's parts less what the same parts are in the mean over the sources. Features that fire at other sources only are one
    part for each layer."""
    known = {_anywhere(place): at for at, place in enumerate(keys)}
    places, less = list(keys), list(k)
    for position in allowed:
        check()
        for place, vector in zip(*_side(read, read.keys, kv, layers, position), strict=True):
            at = known.get(_anywhere(place))
            if at is None:
                elsewhere = Place("feature", place.layer, -1, -1, "features that fire elsewhere")
                if elsewhere not in known:
                    known[elsewhere] = len(places)
                    places.append(elsewhere)
                    less.append(torch.zeros_like(vector))
                at = known[elsewhere]
            less[at] = less[at] - vector / len(allowed)
    return places, torch.stack(less)


def _anywhere(place: Place) -> Place:
    return Place(place.kind, place.layer, -1, place.index, place.name)
