"""What becomes of a text when features are changed: the causal answer beside the frozen ones of DFA. Tensors in, numbers out.

An edit names a feature of a layer's SAE and positions. In the pass, on the z that arrives at the layer (which edits of earlier
layers have changed already), f_j becomes f'_j:

    ablate  0        set  value        scale  value f_j        steer  f_j + value, whether it fires or not

    z'  =  z + sum over edited j of (f'_j - f_j) d_j / s            the SAE's error stays: only the features move
    z'  =  (sum over all j of f'_j d_j + b_dec) / s                 without it, at the edited positions

with s = `SAE.token_scale`, 1 for most. What is not a feature can be taken out too: z of a layer, or of some of its heads,
replaced by zeros, by a mean (`mean_z`), or by z of another text (`Lens.read_z`). On one layer that comes first, and the
features are read after it.

Patterns, norms and everything later are recomputed: this is what the model does, where `circuits.py` says what it would with
all of that frozen. `try_edges` puts the two side by side.

Positions that an SAE leaves out (row starts, attention sinks) have no features: they stay as they are, and naming one is an
error.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sae_core.circuits import Circuit, FeatureRoot, Place
from sae_core.errors import NotFound, UsageError
from sae_core.saes import SAE, row_starts

if TYPE_CHECKING:
    from sae_core.lens import Changed, Lens, Replace

How = Literal["ablate", "set", "scale", "steer"]
ROWS = 16  # in a pass that a mean is taken from


@dataclass(frozen=True)
class FeatureEdit:
    """What is done to one feature."""

    layer: int
    index: int
    how: How
    value: float | tuple[float, ...] = 0.0
    """`set`: the activation; `scale`: the factor; `steer`: what is added to the activation; nothing to `ablate`. One for each
    position of the text, as of another text: tokens that the model writes after it then stay as they are."""
    at: tuple[int, ...] | None = None
    """Positions; None is all that the SAE has features at, those of generated tokens too."""


@dataclass(frozen=True, eq=False)
class Ablation:
    """What is put in the place of a layer's z."""

    layer: int
    given: Tensor | None = None
    """None: zeros. [d_in]: one vector everywhere, as a mean. [pos, d_in]: each position its own, as z of another text; tokens
    that the model writes after the text then stay as they are."""
    at: tuple[int, ...] | None = None
    """Positions; None is every one but row starts."""
    heads: tuple[int, ...] | None = None
    """None is all."""


Edit = FeatureEdit | Ablation


@dataclass(frozen=True)
class FeatureChange:
    """A feature that edits on earlier layers changed."""

    layer: int
    position: int
    index: int
    before: float
    """Activation in the plain pass."""
    after: float
    """In the changed one."""


@dataclass(frozen=True)
class Effects:
    """The plain pass of a text beside the changed one; fp32, on the lens's device."""

    losses: Tensor
    """[pos - 1]: cross-entropy of each next token in nats, plain."""
    changed_losses: Tensor
    """The same, changed."""
    kl: Tensor
    """[pos]: KL divergence in nats of the changed prediction from the plain one."""
    logits: Tensor
    """[n, d_vocab] at the positions asked for, plain."""
    changed_logits: Tensor
    """The same, changed."""
    features: tuple[FeatureChange, ...]
    """Those of SAEs after the first edited layer, as they arrive there, largest change first."""
    n_changed: int
    """How many there are, those that are not listed included."""
    preacts: tuple[tuple[float, float], ...]
    """Pre-activations of the features watched, plain and changed."""


class Text(NamedTuple):
    """Tokens that the model wrote."""

    plain: list[int]
    changed: list[int]


class Tried(NamedTuple):
    """An edge into a circuit's root, and what taking its source away does; in units of the root's value."""

    source: Place
    direct: float
    """Less the edge: predicted from it alone, all else frozen."""
    followed: float
    """Less the source's effect along all ways that the circuit followed."""
    real: float
    """The root with the feature ablated (error kept) less the root without."""


class Agreement(NamedTuple):
    """How well predictions hold."""

    n: int
    correlation: float
    """Pearson's; nan of fewer than two, or where either does not vary."""
    sign: float
    """Share of equal signs."""


def mean_z(lens: "Lens", rows: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """[d_in] by layer: the mean of z over the rows [n, pos], row starts left out; for `Ablation.given`."""
    sums = {layer: torch.zeros(lens.info.d_in, dtype=torch.float64, device=lens.device) for layer in layers}
    keep = ~row_starts(rows.cpu(), lens.row_start)
    if not keep.any():
        raise UsageError("These rows hold row starts only, so z has no mean; give more text.")
    for part, kept in zip(torch.split(rows, ROWS), torch.split(keep, ROWS), strict=True):
        for layer, z in lens.read_z(part, layers).items():
            sums[layer] += z[kept.to(z.device)].double().sum(0)
    return {layer: (total / int(keep.sum())).float() for layer, total in sums.items()}


def replacements(
    lens: "Lens",
    tokens: Tensor,
    saes: Mapping[int, SAE],
    edits: Sequence[Edit],
    *,
    keep_error: bool = True,
    begin: int = 0,
    text: int | None = None,
) -> dict[int, "Replace"]:
    """By layer, what `Lens.run_with` replaces its z by in a pass of the rows `tokens` [b, pos]; with `begin` what `Lens.go_on`
    does where so many tokens went before. `text` is how many positions the edits may name, if not all.

    Raises UsageError and NotFound for a layer, feature, head or position that is not there.
    """
    by_layer: dict[int, list[Edit]] = defaultdict(list)
    for edit in edits:
        _check(lens, text or tokens.shape[1], saes, edit)
        by_layer[edit.layer].append(edit)
    starts = row_starts(tokens.cpu(), lens.row_start)
    if begin:
        starts[:, 0] = tokens[:, 0].cpu() == lens.row_start
    here = _Here(starts.to(lens.device), begin)
    return {
        layer: partial(_replaced, saes.get(layer), here, tuple(those), lens.info.d_head, keep_error)
        for layer, those in by_layer.items()
    }


def measure(
    lens: "Lens",
    tokens: Sequence[int],
    saes: Mapping[int, SAE],
    edits: Sequence[Edit],
    *,
    keep_error: bool = True,
    at: Sequence[int] = (),
    watch: Sequence[FeatureRoot] = (),
    least: float = 1e-4,
    most: int = 100,
) -> Effects:
    """What the edits do to one row of tokens, row start first: to the loss of each next token, to the logits `at` some
    positions (none: the last), and to the features of `saes` (by layer) after the first edited layer, which are listed where
    their activation changes by more than `least`, at most `most` of them. Two passes. Raises as `replacements`.
    """
    at = list(at) or [len(tokens) - 1]
    _check_positions(at, len(tokens))
    for one in watch:
        _check(lens, len(tokens), saes, FeatureEdit(one.layer, one.index, "ablate", at=(one.dest,)))
    row = torch.tensor([list(tokens)], device=lens.device)
    first = min((edit.layer for edit in edits), default=lens.info.n_layers)
    later = [layer for layer in sorted(saes) if layer > first]
    read = sorted({*later, *(one.layer for one in watch)})
    made = replacements(lens, row, saes, edits, keep_error=keep_error)
    plain, changed = (lens.run_with(row, with_, read) for with_ in ({}, made))
    starts = row_starts(row.cpu(), lens.row_start).to(lens.device)
    features = [change for layer in later for change in _changes(saes[layer], layer, plain, changed, starts, least)]
    features.sort(key=lambda one: -abs(one.after - one.before))
    before, after = _losses(plain.logits[0], row[0]), _losses(changed.logits[0], row[0])
    return Effects(
        losses=before,
        changed_losses=after,
        kl=torch.stack([_kl(p, q) for p, q in zip(plain.logits[0], changed.logits[0], strict=True)]),
        logits=plain.logits[0, at],
        changed_logits=changed.logits[0, at],
        features=tuple(features[:most]),
        n_changed=len(features),
        preacts=tuple((_preact(saes[one.layer], plain, one), _preact(saes[one.layer], changed, one)) for one in watch),
    )


def write(
    lens: "Lens",
    tokens: Sequence[int],
    saes: Mapping[int, SAE],
    edits: Sequence[Edit],
    new_tokens: int,
    *,
    keep_error: bool = True,
    temperature: float = 1.0,
    seed: int = 0,
    keep_past: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Text:
    """Let the model go on from `tokens` by at most `new_tokens`, plain and with the edits, which hold in every pass; those
    without positions on new tokens too.

    Both draw with the same noise (Gumbel's, from `seed`), so that the texts are the same until the edits change a draw;
    `temperature` 0 takes the most likely token. A text stops after the tokenizer's end of text. Keys and values are kept from
    one token to the next unless `keep_past` is false, or the model gives no such passes (`Lens.keeps_past`); the text is the
    same. `check` is called before each token, and may raise. Raises as `replacements`, and UsageError where the text grows too
    long.
    """
    if len(tokens) + new_tokens > lens.info.max_context:
        raise UsageError(
            f"{len(tokens)} tokens and {new_tokens} more are beyond the {lens.info.max_context} that {lens.info.name} takes; "
            "ask for fewer.",
            field="new_tokens",
        )
    if temperature < 0:
        raise UsageError("The temperature is 0 or above.", field="temperature")
    length, texts = len(tokens) + new_tokens, list[list[int]]()
    for some in ([], list(edits)):
        after = _kept if keep_past and lens.keeps_past else _anew
        steps = after(lens, list(tokens), saes, some, keep_error, length)
        texts.append(_written(lens, steps, new_tokens, temperature, seed, check))
    return Text(*texts)


def try_edges(lens: "Lens", tokens: Sequence[int], saes: Mapping[int, SAE], circuit: Circuit, most: int = 20) -> list[Tried]:
    """The largest edges from features into the circuit's root, each against the real ablation of that feature at that token."""
    root, row = circuit.root, torch.tensor([list(tokens)], device=lens.device)
    watched = FeatureRoot(root.layer, root.index, root.position) if root.kind == "feature" else None

    def value(edits: Sequence[Edit]) -> float:
        found = lens.run_with(row, replacements(lens, row, saes, edits), [watched.layer] if watched else [])
        return _preact(saes[watched.layer], found, watched) if watched else _logit(found.logits[0, root.position], root)

    plain, tried = value([]), []
    for edge in [edge for edge in circuit.nodes[root].edges if edge.source.kind == "feature"][:most]:
        source = edge.source
        real = value([FeatureEdit(source.layer, source.index, "ablate", at=(source.position,))]) - plain
        tried.append(Tried(source, -edge.value, -circuit.effects[source], real))
    return tried


def agreement(predicted: Sequence[float], real: Sequence[float]) -> Agreement:
    """Of predictions with what came of them."""
    both = torch.tensor([list(predicted), list(real)], dtype=torch.float64)
    varies = both.shape[1] > 1 and bool((both.std(1) > 0).all())
    correlation = float(torch.corrcoef(both)[0, 1]) if varies else float("nan")
    return Agreement(both.shape[1], correlation, float((both[0].sign() == both[1].sign()).double().mean()))


# Within


def _check(lens: "Lens", n: int, saes: Mapping[int, SAE], edit: Edit) -> None:
    lens.check_layer(edit.layer)
    _check_positions(edit.at or (), n)
    if isinstance(edit, Ablation):
        shapes = [(lens.info.d_in,), (n, lens.info.d_in)]
        if edit.given is not None and tuple(edit.given.shape) not in shapes:
            raise UsageError(
                f"What replaces z must be [{lens.info.d_in}] or [{n}, {lens.info.d_in}], not {list(edit.given.shape)}; "
                "z of another text must be of as many tokens.",
                field="given",
            )
        if missing := [head for head in edit.heads or () if not 0 <= head < lens.info.n_heads]:
            raise NotFound(f"A layer has the heads 0 to {lens.info.n_heads - 1}; there is no {missing[0]}.", field="heads")
        return
    if edit.layer not in saes:
        raise NotFound(f"No SAE of layer {edit.layer} was given; there are some of {sorted(saes)}.", field="layer")
    d_sae = saes[edit.layer].cfg.d_sae
    if not 0 <= edit.index < d_sae:
        raise NotFound(f"The SAE has the features 0 to {d_sae - 1}; there is no {edit.index}.", field="index")
    if isinstance(edit.value, tuple) and len(edit.value) != n:
        raise UsageError(f"The text has {n} positions, so a value for each are {n}, not {len(edit.value)}.", field="value")


def _check_positions(at: Sequence[int], n: int) -> None:
    if missing := [one for one in at if not 0 <= one < n]:
        raise UsageError(f"The text has the positions 0 to {n - 1}; there is no {missing[0]}.", field="at")


class _Here(NamedTuple):
    """The rows of a pass."""

    starts: Tensor
    """bool [b, pos]: row starts."""
    begin: int
    """How many tokens came before, in earlier passes."""


def _places(at: tuple[int, ...] | None, among: Tensor, begin: int) -> Tensor:
    """bool [b, pos]: the positions, all for None, out of those that may be."""
    if at is None:
        return among
    chosen = torch.zeros_like(among)
    chosen[:, [one - begin for one in at if 0 <= one - begin < among.shape[1]]] = True
    return chosen


def _given(edit: Ablation, z: Tensor, begin: int) -> Tensor:
    """What stands in the place of z [b, pos, d_in]."""
    if edit.given is None:
        return torch.zeros((), device=z.device)
    if edit.given.ndim == 1:
        return edit.given.to(z)
    given, n = z.clone(), max(0, min(len(edit.given) - begin, z.shape[1]))
    given[:, :n] = edit.given[begin : begin + n].to(z)
    return given


def _replaced(sae: SAE | None, here: _Here, edits: tuple[Edit, ...], d_head: int, keep_error: bool, z: Tensor) -> Tensor:
    z = z.float()
    for edit in edits:
        if isinstance(edit, Ablation):
            where = _places(edit.at, ~here.starts, here.begin)[..., None]
            if edit.heads is not None:
                of_heads = torch.zeros(z.shape[-1] // d_head, dtype=torch.bool, device=z.device)
                of_heads[list(edit.heads)] = True
                where = where & of_heads.repeat_interleave(d_head)
            z = torch.where(where, _given(edit, z, here.begin), z)
    of_features = [edit for edit in edits if isinstance(edit, FeatureEdit)]
    return z if sae is None or not of_features else _edited(sae, here, of_features, keep_error, z)


def _edited(sae: SAE, here: _Here, edits: Sequence[FeatureEdit], keep_error: bool, z: Tensor) -> Tensor:
    has_features = ~sae.excluded(z, here.starts)
    column = {index: n for n, index in enumerate(dict.fromkeys(edit.index for edit in edits))}
    features = torch.tensor(list(column), device=z.device)
    w, c = sae.affine(features)
    f = sae.activate(sae.scaled(z) @ w.T + c, features, sae.least(z))
    new, touched = f.clone(), torch.zeros_like(has_features)
    for edit in edits:
        where = _places(edit.at, has_features, here.begin)
        if (where & ~has_features).any():
            position = here.begin + int((where & ~has_features).nonzero()[0, 1])
            raise UsageError(
                f"Position {position} is a row start or an attention sink, where the SAE of layer {edit.layer} has no "
                "features; choose another.",
                field="at",
            )
        f_j = new[..., column[edit.index]]
        value, where = _along(edit.value, where, here.begin)
        new[..., column[edit.index]] = torch.where(where, _put(edit.how, value, f_j), f_j)
        touched |= where
    moved, scale = (new - f) @ sae.W_dec[features], sae.token_scale(z)
    moved = moved if scale is None else moved / scale
    return torch.where(touched[..., None], (z if keep_error else sae(z)) + moved, z)


def _along(values: float | tuple[float, ...], where: Tensor, begin: int) -> tuple[float | Tensor, Tensor]:
    """[pos]: the values of the positions of a pass, or the one of all; and bool [b, pos]: those of the places that have one."""
    if not isinstance(values, tuple):
        return values, where
    here = torch.tensor(values[begin : begin + where.shape[1]], dtype=torch.float32, device=where.device)
    has = torch.arange(where.shape[1], device=where.device) < len(here)
    return nn.functional.pad(here, (0, where.shape[1] - len(here))), where & has


def _put(how: How, value: float | Tensor, f: Tensor) -> Tensor:
    """f' of f [b, pos], wherever the edit is; a value or one for each position."""
    if how == "ablate":
        return torch.zeros_like(f)
    if how == "set":
        return torch.zeros_like(f) + value
    return f * value if how == "scale" else f + value


def _changes(sae: SAE, layer: int, plain: "Changed", changed: "Changed", starts: Tensor, least: float) -> list[FeatureChange]:
    before, after = (
        sae.encode(one.z[layer][0]).masked_fill(sae.excluded(one.z[layer], starts)[0][:, None], 0.0) for one in (plain, changed)
    )
    places = ((after - before).abs() > least).nonzero()
    pairs = zip(places.tolist(), before[tuple(places.T)].tolist(), after[tuple(places.T)].tolist(), strict=True)
    return [FeatureChange(layer, position, index, was, now) for (position, index), was, now in pairs]


def _preact(sae: SAE, found: "Changed", one: FeatureRoot) -> float:
    w, c = sae.affine(torch.tensor([one.index], device=sae.W_enc.device))
    return float(sae.scaled(found.z[one.layer][0, one.dest]) @ w[0] + c[0])


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")


def _kl(plain: Tensor, changed: Tensor) -> Tensor:
    log_p = plain.log_softmax(-1)
    return (log_p.exp() * (log_p - changed.log_softmax(-1))).sum()


def _logit(logits: Tensor, root: Place) -> float:
    """A circuit's root, of the model's own logits: less the other token's where it names one, else less their mean."""
    return float(logits[root.index] - (logits[int(root.name)] if root.name else logits.mean()))


Steps = Generator[Tensor, int, None]
"""Gives the logits [d_vocab] of the next token, takes the token, and so on."""


def _anew(lens: "Lens", tokens: list[int], saes: Mapping[int, SAE], edits: list[Edit], keep_error: bool, length: int) -> Steps:
    """A whole pass for each token."""
    del length
    text = len(tokens)
    while True:
        row = torch.tensor([tokens], device=lens.device)
        made = replacements(lens, row, saes, edits, keep_error=keep_error, text=text)
        tokens = [*tokens, (yield lens.run_with(row, made).logits[0, -1])]


def _kept(lens: "Lens", tokens: list[int], saes: Mapping[int, SAE], edits: list[Edit], keep_error: bool, length: int) -> Steps:
    """Each token once: keys and values of those before it are kept, which the edits have changed already."""
    text, begin, past = len(tokens), 0, None
    while True:
        row = torch.tensor([tokens], device=lens.device)
        made = replacements(lens, row, saes, edits, keep_error=keep_error, begin=begin, text=text)
        logits, past = lens.go_on(row, made, past, length)
        begin += len(tokens)
        tokens = [(yield logits[0])]


def _written(lens: "Lens", steps: Steps, n: int, temperature: float, seed: int, check: Callable[[], None]) -> list[int]:
    noise, new = torch.Generator().manual_seed(seed), list[int]()
    while len(new) < n and (not new or new[-1] != lens.text_end):
        check()
        logits = (steps.send(new[-1]) if new else next(steps)).cpu()
        if temperature:
            # argmax of logits / T + Gumbel noise draws from the softmax.
            uniform = torch.rand(len(logits), generator=noise, dtype=torch.float64).clamp_min(1e-300)
            logits = logits / temperature - (-uniform.log()).log()
        new.append(int(logits.argmax()))
    return new
