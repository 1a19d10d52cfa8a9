"""Which features of an SAE do induction, and how long a repeated prefix they need (Kissane et al. 2024, "long-prefix induction").

`studies/induction.py` asks this of heads, by where they attend; here it is asked of the features that their output is made of,
and of what the model's prediction owes to these. Rows are those of that study: distinct random tokens, in which a prefix of p
tokens is copied, so that at the copy's last token, d, the token that followed the first copy is next by induction. Beside each
stands its control: the same row with other random tokens in the place of the first copy, so that nothing repeats.

(a) activation  Mean activation of every feature at d less that in the control, by p; a feature does induction where it fires at d
                in 0.3 of the rows, after one token or after more, and in the controls in less than half as many. Long-prefix:
                after one token it rises by less than half of what it rises by after more; else short-prefix. All p from two on
                are taken together, since the best of many noisy means is always better than the first.
(b) source      Of the features that do, the share of the positive DFA at d that comes from the token that followed the first
                copy, and through which head, on rows of the longest prefix.
(c) prediction  The loss of the right token after d when these features are ablated at d, error kept: the short-prefix ones,
                the long-prefix ones, both. Beside it z at d taken from the control row (resample ablation: all that the layer
                says of the repetition), and directions of other features that fire there, as long as what the features gave.

All that is read or replaced is at each row's own d.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_core import attribution
from sae_core.config import PrefixStudy
from sae_core.errors import UsageError
from sae_core.evaluate import Interval, interval
from sae_core.progress import Clock, Progress
from sae_core.saes import SAE
from sae_core.studies.induction import WEAK, Copies, copied_prefixes
from sae_core.studies.passes import DOES, codes_at, putting, row_tokens, rows_at_once
from sae_core.studies.shares import Record, short

if TYPE_CHECKING:
    from sae_core.lens import Lens, Replace

Role = Literal["short-prefix", "long-prefix"]
ROLES: tuple[Role, Role] = ("short-prefix", "long-prefix")
LISTED = 100
"""Features that are told of one by one; all that do induction are ablated."""
LARGEST = 4e9
"""Bytes that the rows of a study may need."""


class PrefixFeature(Record):
    """A feature that does induction; lists are by the length of the prefix, from 1."""

    index: int
    role: Role
    best: float
    """The larger of the first of `rise` and the mean of the others."""
    rise: list[float]
    """Mean activation at d, less that of the controls."""
    rise_error: list[float]
    """Its standard error, paired."""
    fires: list[float]
    """Share of rows in which it fires at d."""
    fires_control: list[float]
    """Share of the controls."""
    from_source: float | None
    """Share of its positive DFA that comes from the token that followed the first copy; None where it fires in no such row."""
    head: int | None
    """The head that most of that comes through."""
    head_share: float | None
    """Share of it."""


class Loss(Record):
    """Loss of the right token after d, or its change, by the length of the prefix; 95 % intervals over rows."""

    name: str
    says: str
    features: int
    """How many were ablated; 0 where something else was done."""
    values: list[Interval]


class Prefix(Record):
    """What the study found."""

    kind: Literal["prefix"] = "prefix"
    summary: str
    """In a line."""
    layer: int
    prefixes: list[int]
    samples: int
    """For each length of the prefix."""
    tokens: int
    """Read in all rows, controls not counted."""
    length: int
    features: list[PrefixFeature]
    """Largest rise first."""
    n_features: dict[str, int]
    """By role, those that are not listed included."""
    losses: list[Loss]
    """The model as it is, with a repetition and without."""
    changes: list[Loss]
    """What ablations change of the loss with it."""
    random: int
    notes: list[str]


class _Rows(NamedTuple):
    """What is at d of each row."""

    copies: Copies
    controls: Tensor
    """int64 [n, length]"""
    z: Tensor
    """[n, d_in]"""
    z_control: Tensor
    """[n, d_in]"""


def controls_of(copies: Copies, ids: Sequence[int], seed: int) -> Tensor:
    """The rows with the first copy of the prefix replaced by tokens that are nowhere in the row."""
    draw, rows = np.random.default_rng((seed % 2**63, 4)), copies.tokens.clone()
    every = np.asarray(ids)
    for row, source, p in zip(rows, copies.source.tolist(), copies.prefix.tolist(), strict=True):
        row[source - p : source] = torch.from_numpy(draw.choice(every[~np.isin(every, row.numpy())], p, replace=False))
    return rows


def prefix(lens: "Lens", sae: SAE, cfg: PrefixStudy) -> Generator[Progress, None, Prefix]:
    """All parts. Raises UsageError where the model takes no such rows, or where they are too many to hold."""
    layer = sae.cfg.site.layer
    _check_size(sae, cfg)
    copies = copied_prefixes(cfg, lens)
    # As many tokens again as a row has must be left for the control.
    controls = controls_of(copies, row_tokens(cfg, lens, cfg.length - 1 + cfg.prefixes).tolist(), cfg.seed)
    zs = []
    for name, tokens in (("rows", copies.tokens), ("controls", controls)):
        zs.append((yield from _z_at(lens, layer, tokens, copies.dest, cfg, name)))
    rows = _Rows(copies, controls, *zs)
    features, roles = yield from _features(lens, sae, rows, cfg)
    losses, changes = yield from _losses(lens, sae, rows, roles, cfg)
    return Prefix(
        summary=_summary(roles, changes),
        layer=layer,
        prefixes=list(range(1, cfg.prefixes + 1)),
        samples=cfg.samples,
        tokens=copies.tokens.numel(),
        length=cfg.length,
        features=features,
        n_features={role: sum(one == role for one in roles.values()) for role in ROLES},
        losses=losses,
        changes=changes,
        random=cfg.random,
        notes=[] if features else ["No feature of this SAE does induction on random tokens, so there was none to ablate."],
    )


def _check_size(sae: SAE, cfg: PrefixStudy) -> None:
    """UsageError where what is held of all rows at once is too large: tokens, z at d as it is and with each set taken off, and
    every feature there."""
    n = cfg.samples * cfg.prefixes
    size = n * (3 * 8 * cfg.length + 4 * ((cfg.random + 6) * sae.cfg.d_in + 2 * sae.cfg.d_sae))
    if size > LARGEST:
        raise UsageError(
            f"{n:,} rows of {cfg.length} tokens through {sae.cfg.d_sae:,} features need about {size / 1e9:.0f} GB, and at most "
            f"{LARGEST / 1e9:.0f} are taken; lower --samples, --prefixes or --random.",
            field="samples",
        )


def _z_at(
    lens: "Lens", layer: int, tokens: Tensor, dest: Tensor, cfg: PrefixStudy, name: str
) -> Generator[Progress, None, Tensor]:
    """[n, d_in]: z at each row's own position."""
    found, at_once, clock = [], rows_at_once(cfg, cfg.length), Clock(name, tokens.numel())
    for low in range(0, len(tokens), at_once):
        part = tokens[low : low + at_once]
        z = lens.read_z(part, [layer])[layer]
        found.append(z[torch.arange(len(part), device=z.device), dest[low : low + at_once].to(z.device)].cpu())
        yield clock.at((low + len(part)) * cfg.length)
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------------------- features


def _features(
    lens: "Lens", sae: SAE, rows: _Rows, cfg: PrefixStudy
) -> Generator[Progress, None, tuple[list[PrefixFeature], dict[int, Role]]]:
    """Parts (a) and (b): the features that are listed, and of all that do induction the role, largest rise first."""
    n = cfg.prefixes
    rise, error, fires, without = (torch.zeros(n, sae.cfg.d_sae, dtype=torch.float64) for _ in range(4))
    for p in range(1, n + 1):
        of = rows.copies.prefix == p
        f, control = (codes_at(sae, z[of]) for z in (rows.z, rows.z_control))
        change = (f - control).double()
        rise[p - 1], error[p - 1] = change.mean(0), change.std(0) / len(change) ** 0.5
        fires[p - 1], without[p - 1] = (f > 0).double().mean(0), (control > 0).double().mean(0)
    # After one token, and after more: [2, d_sae] each.
    rises, often, seldom = (torch.stack([part[0], part[1:].mean(0)]) for part in (rise, fires, without))
    best, at = rises.max(0)
    often, seldom = often.gather(0, at[None])[0], seldom.gather(0, at[None])[0]
    reach = ((often >= DOES) & (seldom < often / 2) & (best > 0)).nonzero()[:, 0]
    does: list[int] = reach[best[reach].argsort(descending=True)].tolist()
    roles: dict[int, Role] = {i: "long-prefix" if rises[0, i] < WEAK * rises[1, i] else "short-prefix" for i in does}
    sources = yield from _sources(lens, sae, rows, does[:LISTED], cfg)
    found = [
        PrefixFeature(
            index=i,
            role=roles[i],
            best=short(float(best[i])),
            rise=_list(rise[:, i]),
            rise_error=_list(error[:, i]),
            fires=_list(fires[:, i]),
            fires_control=_list(without[:, i]),
            from_source=source,
            head=head,
            head_share=share,
        )
        for i, (source, head, share) in zip(does[:LISTED], sources, strict=True)
    ]
    return found, roles


def _list(values: Tensor) -> list[float]:
    return [short(value) for value in values.tolist()]


Source = tuple[float | None, int | None, float | None]


def _sources(
    lens: "Lens", sae: SAE, rows: _Rows, features: Sequence[int], cfg: PrefixStudy
) -> Generator[Progress, None, list[Source]]:
    """Of each feature, the share of its positive DFA that comes from the right source, the head that most of this comes
    through, and that head's share; over the rows of the longest prefix in which it fires."""
    longest = (rows.copies.prefix == cfg.prefixes).nonzero()[:, 0]
    layer, n_heads = sae.cfg.site.layer, sae.cfg.n_heads
    w, _ = sae.affine(torch.tensor(features, dtype=torch.int64, device=sae.W_enc.device))
    fires = codes_at(sae, rows.z[longest])[:, features] > 0
    right, every = torch.zeros(len(features), n_heads), torch.zeros(len(features))
    clock, at_once = Clock("sources", len(longest) * cfg.length), rows_at_once(cfg, cfg.length)
    for low in range(0, len(longest) if features else 0, at_once):
        chosen = longest[low : low + at_once]
        read = lens.read_attention(rows.copies.tokens[chosen].to(lens.device), layer)
        for b, row in enumerate(chosen.tolist()):
            here = fires[low + b].nonzero()[:, 0]
            if not len(here):
                continue
            dest, source = int(rows.copies.dest[row]), int(rows.copies.source[row])
            pattern = read.pattern[b][:, dest].expand(len(here), -1, -1)
            dfa = attribution.dfa(read.v[b], pattern, w[here].view(len(here), n_heads, -1)).clamp_min(0).cpu()
            right[here] += dfa[:, :, source]
            every[here] += dfa.sum((1, 2))
        yield clock.at((low + len(chosen)) * cfg.length)
    found: list[Source] = []
    for by_head, total in zip(right, every.tolist(), strict=True):
        came = float(by_head.sum())
        head = int(by_head.argmax()) if came else None
        share = None if head is None else short(float(by_head[head]) / came)
        found.append((short(came / total) if total else None, head, share))
    return found


# ----------------------------------------------------------------------------------------------------------- prediction


def _losses(
    lens: "Lens", sae: SAE, rows: _Rows, roles: Mapping[int, Role], cfg: PrefixStudy
) -> Generator[Progress, None, tuple[list[Loss], list[Loss]]]:
    """Part (c)."""
    f = codes_at(sae, rows.z)
    scale = sae.token_scale(rows.z)
    scale = torch.ones(()) if scale is None else scale.cpu()
    sets = {f"{role} features": [index for index, one in roles.items() if one == role] for role in ROLES}
    sets = {name: indices for name, indices in sets.items() if indices}
    if len(sets) == 2:
        sets["both"] = list(roles)
    given = {name: f[:, indices] @ sae.W_dec[indices].cpu() / scale for name, indices in sets.items()}
    swaps = {name: rows.z - part for name, part in given.items()}
    whole = given.get("both", next(iter(given.values()), None))
    draws = [] if whole is None else _random(sae, f, whole, list(roles), scale, cfg)
    swaps |= {f"random {i}": rows.z - draw.given for i, draw in enumerate(draws)}
    swaps["resampled"] = rows.z_control
    found = yield from _right_losses(lens, sae.cfg.site.layer, rows, list(swaps.values()), cfg)
    clean, changed = found[0], dict(zip(swaps, found[1:], strict=True))
    without = yield from _control_losses(lens, rows, cfg)
    losses = [
        _loss("with the repetition", "the model as it is", 0, clean, rows, cfg),
        _loss("without", "the controls, in which nothing repeats", 0, without, rows, cfg),
    ]
    changes = [
        _loss(name, "ablated at d, error kept", len(indices), changed[name] - clean, rows, cfg) for name, indices in sets.items()
    ]
    if draws:
        drawn = torch.stack([changed[f"random {i}"] for i in range(len(draws))]).mean(0)
        says = f"mean of {len(draws)} draws, as long in sum"
        changes.append(_loss("other features", says, len(draws[0].indices), drawn - clean, rows, cfg))
    changes.append(_loss("resampled", "z at d taken from the control", 0, changed["resampled"] - clean, rows, cfg))
    return losses, changes


class _Draw(NamedTuple):
    """Features that do no induction, ablated as a control."""

    indices: list[int]
    given: Tensor
    """[n, d_in]: what is taken off z."""


def _random(sae: SAE, f: Tensor, whole: Tensor, taken: Sequence[int], scale: Tensor, cfg: PrefixStudy) -> list[_Draw]:
    """Draws of as many other features that fire at d, with what they give made as long in each row as `whole` [n, d_in]; none
    where no other fires."""
    draw, known = np.random.default_rng((cfg.seed % 2**63, 5)), set(taken)
    others = [i for i in f.any(0).nonzero()[:, 0].tolist() if i not in known]
    found = []
    for _ in range(cfg.random if others else 0):
        chosen = draw.choice(others, min(len(known), len(others)), replace=False).tolist()
        part = f[:, chosen] @ sae.W_dec[chosen].cpu() / scale
        # Where none of them fires, the mean direction of what they are serves.
        part = torch.where(part.norm(dim=1, keepdim=True) > 0, part, sae.W_dec[chosen].cpu().sum(0))
        length = whole.norm(dim=1, keepdim=True) / part.norm(dim=1, keepdim=True).clamp_min(1e-12)
        found.append(_Draw(chosen, part * length))
    return found


def _right_losses(
    lens: "Lens", layer: int, rows: _Rows, z_at: Sequence[Tensor], cfg: PrefixStudy
) -> Generator[Progress, None, list[Tensor]]:
    """[n] for the model as it is and for each z [n, d_in] put at d: loss of the right token after d."""
    copies = rows.copies
    tokens, at = copies.tokens.clone(), torch.arange(len(copies.tokens))
    tokens[at, copies.dest + 1] = copies.tokens[at, copies.source]  # what comes after d has no say at d
    parts: list[list[Tensor]] = [[] for _ in range(len(z_at) + 1)]
    clock, at_once = Clock("ablations", tokens.numel()), min(rows_at_once(cfg, cfg.length), lens.logit_rows(cfg.length))
    for low in range(0, len(tokens), at_once):
        some = slice(low, low + at_once)
        swaps: list[Replace | None] = [None, *(putting(z[some], copies.dest[some]) for z in z_at)]
        for part, losses in zip(parts, lens.losses_with(tokens[some], layer, swaps), strict=True):
            part.append(_at(losses, copies.dest[some]))
        yield clock.at(min(low + at_once, len(tokens)) * cfg.length)
    return [torch.cat(part) for part in parts]


def _control_losses(lens: "Lens", rows: _Rows, cfg: PrefixStudy) -> Generator[Progress, None, Tensor]:
    """[n]: loss of the same token after d where nothing repeats."""
    copies, tokens = rows.copies, rows.controls.clone()
    at = torch.arange(len(tokens))
    tokens[at, copies.dest + 1] = copies.tokens[at, copies.source]
    found, clock, at_once = [], Clock("controls' losses", tokens.numel()), rows_at_once(cfg, cfg.length)
    for low in range(0, len(tokens), at_once):
        some = slice(low, low + at_once)
        found.append(_at(lens.token_losses(tokens[some]), copies.dest[some]))
        yield clock.at(min(low + at_once, len(tokens)) * cfg.length)
    return torch.cat(found)


def _at(losses: Tensor, dest: Tensor) -> Tensor:
    return losses[torch.arange(len(losses), device=losses.device), dest.to(losses.device)].double().cpu()


def _loss(name: str, says: str, features: int, values: Tensor, rows: _Rows, cfg: PrefixStudy) -> Loss:
    def one(p: int) -> Interval:
        found = interval(values[rows.copies.prefix == p])
        return Interval(**{key: None if value is None else short(value) for key, value in found.model_dump().items()})

    return Loss(name=name, says=says, features=features, values=[one(p) for p in range(1, cfg.prefixes + 1)])


def _summary(roles: Mapping[int, Role], changes: Sequence[Loss]) -> str:
    parts = []
    for role in ROLES:
        mine = [index for index, one in roles.items() if one == role]
        named = ", ".join([*map(str, mine[:5]), *(["..."] if len(mine) > 5 else ())])
        parts.append(f"{len(mine)} {role} feature{'' if len(mine) == 1 else 's'}{f' ({named})' if mine else ''}")
    last = {one.name: one.values[-1].mean or 0.0 for one in changes}
    whole = [last[name] for name in ("both", "short-prefix features", "long-prefix features") if name in last][:1]
    said = [f"without them the loss after the longest prefix changes by {one:+.3f}" for one in whole]
    return "; ".join([*parts, *said, f"with z resampled by {last['resampled']:+.3f}"])
