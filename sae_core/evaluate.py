"""What an SAE costs and keeps, each number by one formula that a test holds in closed form.

Reconstruction, on held-out tokens (`sae_core/measures.py` has the sums):

    L0, L1   mean number of active features per token, mean sum of their activations
    FVU      sum |z - z_hat|^2 / sum |z - z_mean|^2, z_mean the global mean of the same tokens (not zero, not per row);
             explained variance is 1 - FVU, MSE is sum |z - z_hat|^2 / tokens: per token, not per coordinate
    gamma    sum |z_hat|^2 / sum z_hat . z, below 1 where the SAE shrinks
    density  share of tokens on which a feature fires, counted on held-out and training tokens; dead: never fired there

What the model loses:

    CE       mean next-token cross-entropy in nats: the model as it is (clean), with z at the site replaced by the SAE's
             reconstruction (sae), by zero (zero), by its mean over the evaluated tokens (mean)
    KL       mean of sum_t p_clean(t) log(p_clean(t) / p(t)) over the vocabulary: unlike CE it cannot be lowered by luck
    recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean), the published ratio; KL's is 1 - KL_sae / KL_ablated

Excluded positions (row start, sinks) keep their z in every variant and count in no statistic of z. One layer moves prose
so little that `recovered` can be noise: differences come with 95 % intervals over rows (paired: the same rows in every
variant), and `recovered` is withheld, with the reason, where its denominator is not clearly above zero. Repeated random
tokens have the power: the second copy can only be predicted by induction.

Patching z and patching the attention output is one thing, as the output is z W_O + b_O: `output_gap` says how far the two
are apart in fact (rounding). Only for ablation they differ: z = 0 leaves b_O, output = 0 takes it away (`zero_output`).

A record holds no nan and no infinity, which JSON has no word for and PostgreSQL refuses: such a number is None, and
`notes` says which it was.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import Tensor

from sae_core.activations import Activations
from sae_core.corpus import Rows
from sae_core.lens import Out
from sae_core.measures import AT_ONCE, Firing, Sums, alignment, bucket, neighbour_cosine
from sae_core.probes import Probe, ProbeTexts, probe
from sae_core.progress import Progress, relayed
from sae_core.saes import SAE, row_starts
from sae_core.stability import Stability, stability

if TYPE_CHECKING:
    from sae_core.lens import Lens, Replace

Z95 = 1.959964  # two-sided 95 % of the normal distribution
CLEAR = 3.0  # a denominator counts as known when it exceeds this many of its standard errors
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
DENSE = (0.01, 0.1)
LOSSES = 4  # about so many passes go into the losses of a row


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A number, or None where it could not be had: what would be nan or infinite becomes None."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Interval(_Record):
    """A mean with its 95 % interval over rows; without bounds where there is but one row."""

    mean: Number
    low: Number
    high: Number


class PositionFit(_Record):
    """How well z is rebuilt at some positions of a row."""

    low: int
    """First position."""
    high: int
    """Last position."""
    tokens: int
    """Tokens counted there."""
    fvu: Number
    """Error there over the variance there, around the mean of all positions."""
    l0: Number
    """Active features per token."""


class PositionLoss(_Record):
    """What the reconstruction costs at some positions of a row."""

    low: int
    high: int
    sae_minus_clean: Interval


class Quantile(_Record):
    """A share of all features, and the density that so many do not exceed."""

    share: float
    density: Number


class Reconstruction(_Record):
    """How well z is rebuilt, on held-out tokens. Fields after `dead_tokens` came later: older SAEs lack them."""

    tokens: int
    """Held-out tokens counted."""
    l0: Number
    """Active features per token."""
    fvu: Number
    """Fraction of variance unexplained."""
    fvu_by_head: list[Number]
    """The same for each head's part of z."""
    variance_by_head: list[Number]
    """Each head's share of the variance of z."""
    dead: Number
    """Share of features that never fired on `dead_tokens` tokens."""
    dead_tokens: int
    """Tokens that `dead` and the densities were counted on: held-out and training."""
    l1: Number = None
    """Sum of activations per token."""
    explained_variance: Number = None
    """1 - FVU."""
    mse: Number = None
    """|z - z_hat|^2 per token."""
    cosine: Number = None
    """Mean cosine of z and its reconstruction."""
    norm_in: Number = None
    """Mean |z|."""
    norm_out: Number = None
    """Mean |z_hat|."""
    norm_ratio: Number = None
    """Mean of |z_hat| / |z|."""
    gamma: Number = None
    """Relative reconstruction bias; below 1 the SAE shrinks."""
    gamma_centred: Number = None
    """The same without the mean of z, which b_dec gives for nothing."""
    gamma_by_head: list[Number] = []
    """`gamma` of each head's part of z."""
    by_position: list[PositionFit] = []
    """By position in the row; positions in powers of two."""
    dense_1: Number = None
    """Share of features that fire on more than 1 % of tokens."""
    dense_10: Number = None
    """Share of features that fire on more than 10 % of tokens."""
    density_quantiles: list[Quantile] = []
    """Quantiles of the density, dead features included."""
    decoder_cosine: Number = None
    """Mean over live features of the cosine with the nearest other live decoder direction."""
    encoder_cosine: Number = None
    """The same of encoder directions."""
    encoder_decoder_cosine: Number = None
    """Mean over live features of the cosine of a feature's encoder and decoder direction."""


class CrossEntropy(_Record):
    """Next-token cross-entropy in nats, clean and with z at the site replaced. Fields after `note` came later."""

    rows: int
    """Rows evaluated; intervals are over rows."""
    tokens: int
    """Predictions scored."""
    clean: Number
    """The model as it is."""
    sae: Number
    """z replaced by the SAE's reconstruction."""
    zero: Number
    """z replaced by zero."""
    mean: Number
    """z replaced by its mean over these rows."""
    sae_minus_clean: Interval
    zero_minus_clean: Interval
    mean_minus_clean: Interval
    recovered_zero: Number
    """(zero - sae) / (zero - clean); None where the denominator is too small to divide by."""
    recovered_mean: Number
    """(mean - sae) / (mean - clean); None where the denominator is too small to divide by."""
    note: str | None
    """Why a recovered share is withheld."""
    sae_kl: Interval | None = None
    """KL divergence from the clean prediction, z replaced by the reconstruction."""
    zero_kl: Interval | None = None
    mean_kl: Interval | None = None
    kl_recovered_zero: Number = None
    """1 - KL of the reconstruction over KL of z = 0."""
    kl_recovered_mean: Number = None
    """1 - KL of the reconstruction over KL of z = its mean."""
    zero_output: Number = None
    """Attention output replaced by zero, its bias included."""
    output_gap: Number = None
    """Largest change of a loss when the output is patched with z_hat W_O + b_O instead of z with z_hat: rounding."""
    by_position: list[PositionLoss] = []
    """By position in the row."""


class Spectrum(_Record):
    """How many directions the live features' decoder slices at each head use."""

    singular: list[list[Number]]
    """By head: singular values of the slices [live features, d_head], over their sum, largest first."""
    effective: list[Number]
    """By head: the effective rank, exp of the entropy of the squares over their sum: from 1 to d_head."""
    d_head: int


class Evaluation(_Record):
    """All that is measured of a trained SAE."""

    reconstruction: Reconstruction
    prose: CrossEntropy | None
    """On held-out rows; None without any."""
    repeated: CrossEntropy
    """On random tokens said twice, scored on the second copy."""
    probes: list[Probe] = []
    """Sparse probing on labelled texts."""
    stability: list[Stability] = []
    """Against other SAEs of the same site."""
    spectrum: Spectrum | None = None
    """Of the decoder, by head; None in evaluations before it was taken, and where no feature is alive."""
    notes: list[str] = []
    """What could not be measured, and why."""


# -------------------------------------------------------------------------------------------------------------- spectrum


def spectrum(W_dec: Tensor, n_heads: int) -> Spectrum | None:
    """Of decoder rows [n, n_heads d_head]. The Gram matrix of a head is d_head wide however many features there are, and its
    eigenvalues are the squares of the singular values; None without a row."""
    if not len(W_dec):
        return None
    slices = W_dec.detach().double().cpu().reshape(len(W_dec), n_heads, -1).transpose(0, 1)
    squares = torch.linalg.eigvalsh(slices.mT @ slices).clamp_min(0).flip(-1)  # [head, d_head]
    singular = squares.sqrt()
    singular /= singular.sum(-1, keepdim=True).clamp_min(1e-30)
    p = squares / squares.sum(-1, keepdim=True).clamp_min(1e-30)
    effective = torch.exp(torch.special.entr(p).sum(-1))
    return Spectrum(
        singular=[[round(value, 6) for value in head] for head in singular.tolist()],
        effective=effective.tolist(),
        d_head=slices.shape[-1],
    )


# ---------------------------------------------------------------------------------------------------------- cross-entropy


def interval(differences: Tensor) -> Interval:
    """Mean and normal 95 % interval of per-row differences [rows]."""
    mean = float(differences.mean())
    half = Z95 * float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return Interval(mean=mean, low=mean - half, high=mean + half)


def cross_entropy(
    clean: Tensor,
    sae: Tensor,
    zero: Tensor,
    mean: Tensor,
    *,
    kl: Mapping[str, Tensor] | None = None,
    zero_output: Tensor | None = None,
    output_gap: float | None = None,
    first: int = 0,
) -> CrossEntropy:
    """The record from per-token losses and KL divergences, each [rows, scored positions]; `first` is the first of these."""
    per_row = {name: losses.double().mean(1) for name, losses in (("clean", clean), ("sae", sae), ("zero", zero), ("mean", mean))}
    effect = {name: interval(per_row[name] - per_row["clean"]) for name in ("sae", "zero", "mean")}
    divergence = {name: interval(values.double().mean(1)) for name, values in (kl or {}).items()}
    notes: list[str] = []
    ratios: dict[str, Number] = {}
    for name in ("zero", "mean"):
        ratios[f"recovered_{name}"] = _recovered(effect["sae"], effect[name], f"{name}-ablation changes the cross-entropy", notes)
        if divergence:
            said = f"{name}-ablation changes the prediction"
            ratios[f"kl_recovered_{name}"] = _recovered(divergence["sae"], divergence[name], said, notes)
    return CrossEntropy(
        rows=len(clean),
        tokens=clean.numel(),
        **{name: float(losses.mean()) for name, losses in per_row.items()},
        **{f"{name}_minus_clean": value for name, value in effect.items()},
        **{f"{name}_kl": value for name, value in divergence.items()},
        **ratios,
        zero_output=None if zero_output is None else float(zero_output.double().mean()),
        output_gap=output_gap,
        by_position=_losses_by_position((sae - clean).double(), first),
        note="; ".join(notes) or None,
    )


def _recovered(sae: Interval, ablated: Interval, said: str, notes: list[str]) -> Number:
    """1 - sae / ablated, or None and a note where what is divided by is not clearly above zero."""
    if sae.mean is None or ablated.mean is None or ablated.low is None or ablated.high is None:
        notes.append(f"{said} by an amount whose error is not known")
        return None
    error = (ablated.high - ablated.low) / 2 / Z95
    if ablated.mean > CLEAR * error:
        return 1.0 - sae.mean / ablated.mean
    notes.append(f"{said} by only {ablated.mean:+.4f} ± {Z95 * error:.4f} nats here, too little to divide by")
    return None


def _losses_by_position(change: Tensor, first: int) -> list[PositionLoss]:
    found = []
    positions = [bucket(first + column) for column in range(change.shape[1])]
    for low, high in dict.fromkeys(positions):
        columns = [column for column, where in enumerate(positions) if where == (low, high)]
        inside = (first + columns[0], first + columns[-1])
        found.append(PositionLoss(low=inside[0], high=inside[1], sae_minus_clean=interval(change[:, columns].mean(1))))
    return found


def repeated_random(lens: "Lens", rows: int, context: int, seed: int = 0) -> Tensor:
    """int64 [rows, context]: row start, then random tokens, then the same again (Elhage et al. 2021's induction probe)."""
    half = (context - 1) // 2
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(lens.info.d_vocab, (rows, half), generator=generator)
    start = torch.full((rows, 1), lens.row_start)
    return torch.cat([start, tokens, tokens], dim=1)


# ------------------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    lens: "Lens",
    sae: SAE,
    rows: Rows,
    activations: Activations | None = None,
    *,
    prose_rows: int = 96,
    repeated_rows: int = 32,
    dead_tokens: int = 262_144,
    batch_rows: int = 16,
    others: Mapping[str, SAE] | None = None,
    texts: Sequence[ProbeTexts] = (),
) -> Generator[Progress, None, Evaluation]:
    """Measure `sae`. `activations`, the training's z on disk, spares the model pass that counts dead features.

    `others`, by name, are SAEs of the same site to match features with; `texts` are labelled, for sparse probing.
    """
    layer, context = sae.cfg.site.layer, rows.context
    heldout = torch.from_numpy(rows.heldout[:].astype("int64"))
    dead_rows = min(dead_tokens // context, len(rows.train) if activations is None else activations.n_rows)
    scored = [len(heldout[:prose_rows]), repeated_rows]
    total = (len(heldout) + dead_rows + sum(scored)) * context + sum(one.tokens(context) for one in texts)
    done, begun = 0, time.monotonic()

    def progress(tokens: int) -> Progress:
        nonlocal done
        done += tokens
        return Progress("evaluate", done, total, rate=done / max(time.monotonic() - begun, 1e-9))

    # ---- reconstruction, on held-out rows ----
    fit, firing = _Fit(sae, context), Firing(sae.cfg.d_sae)
    siblings = {name: Firing(other.cfg.d_sae) for name, other in (others or {}).items()}

    def count(z: Tensor) -> None:
        for name, other in (others or {}).items():
            for part in _parts(z, other):
                siblings[name].add(other.encode(part))

    for tokens in torch.split(heldout, batch_rows):
        z = lens.read_z(tokens.to(lens.device), [layer])[layer]
        kept = ~sae.excluded(z, row_starts(tokens, lens.row_start))
        fit.add(z[kept], kept.nonzero()[:, 1].cpu(), firing)
        count(z[kept])
        yield progress(tokens.numel())

    # ---- densities and dead features, on training rows as well ----
    for low in range(0, dead_rows, batch_rows):
        high = min(low + batch_rows, dead_rows)
        if activations is not None:
            z = activations.read_z(low, high).to(lens.device).float()
        else:
            z = lens.read_z(torch.from_numpy(rows.train[low:high].astype("int64")).to(lens.device), [layer])[layer]
        kept = ~sae.excluded(z, row_starts(rows.train[low:high], lens.row_start))
        for part in _parts(z[kept], sae):
            firing.add(sae.encode(part))
        count(z[kept])
        yield progress((high - low) * context)

    # ---- what the model loses, on held-out prose and on repeated random tokens ----
    records: list[CrossEntropy | None] = []
    half = (context - 1) // 2
    for tokens, first in ((heldout[:prose_rows], 0), (repeated_random(lens, repeated_rows, context), half)):
        records.append((yield from _losses(lens, sae, tokens, first, batch_rows, progress)) if len(tokens) else None)

    # ---- what its features know ----
    probes = []
    for one in texts:
        found = yield from relayed(probe(lens, sae, one, context=context, batch_rows=batch_rows), progress)
        probes.append(found)
    result = Evaluation(
        reconstruction=_reconstruction(sae, fit, firing),
        prose=records[0],
        repeated=records[1],
        probes=probes,
        stability=[
            stability(sae.W_dec[firing.live.to(sae.W_dec.device)], other.W_dec[live.to(other.W_dec.device)], name)
            for name, other in (others or {}).items()
            for live in [siblings[name].live]
        ],
        spectrum=spectrum(sae.W_dec[firing.live.to(sae.W_dec.device)], sae.cfg.n_heads),
    )
    return result.model_copy(update={"notes": _notes(result, len(heldout))})


class _Fit:
    """Reconstruction by position, of which the whole is the sum."""

    def __init__(self, sae: SAE, context: int) -> None:
        self._sae = sae
        self._context = context
        self.buckets: dict[tuple[int, int], Sums] = {}
        self.active: dict[tuple[int, int], int] = {}
        self.strength = 0.0

    def add(self, z: Tensor, position: Tensor, firing: Firing) -> None:
        """Count z [n, d_in] of tokens that stand at `position` [n] of their rows; `firing` counts features along the way."""
        sae = self._sae
        for part, at in zip(_parts(z, sae), _parts(position, sae), strict=True):
            acts = sae.encode(part)
            z_hat, active = sae.decode(acts, sae.token_scale(part)), firing.add(acts)
            self.strength += float(acts.double().sum())
            for low, high in dict.fromkeys(map(bucket, at.tolist())):
                here = (at >= low) & (at <= high)
                sums = self.buckets.setdefault((low, high), Sums(sae.cfg.d_in))
                on_device = here.to(z.device)
                sums.add(part[on_device], z_hat[on_device])
                self.active[low, high] = self.active.get((low, high), 0) + int(active[here].sum())

    def whole(self) -> Sums:
        """All positions together."""
        whole = Sums(self._sae.cfg.d_in)
        for sums in self.buckets.values():
            whole.merge(sums)
        return whole

    def by_position(self, mean: Tensor) -> list[PositionFit]:
        """Every bucket that holds a token, its variance around the mean of all."""
        return [
            PositionFit(
                low=low,
                high=min(high, self._context - 1),
                tokens=sums.n,
                fvu=sums.fvu(mean),
                l0=self.active[low, high] / sums.n,
            )
            for (low, high), sums in sorted(self.buckets.items())
        ]


def _parts(z: Tensor, sae: SAE) -> tuple[Tensor, ...]:
    """Tokens in parts whose dense activations are not too large; nothing for no tokens."""
    return torch.split(z, max(1, AT_ONCE // sae.cfg.d_sae)) if len(z) else ()


def _reconstruction(sae: SAE, fit: _Fit, firing: Firing) -> Reconstruction:
    whole, heads = fit.whole(), sae.cfg.n_heads
    live = firing.live.to(sae.W_dec.device)
    measured: dict[str, Any] = {"l0": None, "fvu": None, "fvu_by_head": [], "variance_by_head": []}
    if whole.n:
        fvu, total = whole.fvu(), max(1, whole.n)
        measured = {
            "l0": sum(fit.active.values()) / total,
            "l1": fit.strength / total,
            "fvu": fvu,
            "fvu_by_head": whole.fvu_by_head(heads),
            "variance_by_head": whole.share_by_head(heads),
            "explained_variance": 1.0 - fvu,
            "mse": float(whole.error.sum()) / total,
            "cosine": whole.cosine / total,
            "norm_in": whole.norm_in / total,
            "norm_out": whole.norm_out / total,
            "norm_ratio": whole.ratio / total,
            "gamma": whole.gamma(),
            "gamma_centred": whole.gamma_centred(),
            "gamma_by_head": whole.gamma_by_head(heads),
            "by_position": fit.by_position(whole.mean),
        }
    if firing.n:
        measured |= {
            "dense_1": firing.above(DENSE[0]),
            "dense_10": firing.above(DENSE[1]),
            "density_quantiles": [
                Quantile(share=share, density=density)
                for share, density in zip(QUANTILES, firing.quantiles(QUANTILES), strict=True)
            ],
        }
    return Reconstruction(
        tokens=whole.n,
        dead=float((~firing.live).double().mean()),
        dead_tokens=firing.n,
        decoder_cosine=neighbour_cosine(sae.W_dec[live]),
        encoder_cosine=neighbour_cosine(sae.W_enc.T[live]),
        encoder_decoder_cosine=alignment(sae.W_enc.T[live], sae.W_dec[live]),
        **measured,
    )


def _losses(
    lens: "Lens", sae: SAE, tokens: Tensor, first: int, batch_rows: int, progress: Callable[[int], Progress]
) -> Generator[Progress, None, CrossEntropy]:
    """Losses of `tokens` in every variant, from position `first` on."""
    layer, mean = sae.cfg.site.layer, _mean_z(lens, sae, tokens, batch_rows)
    bias = lens.b_O(layer)
    losses: dict[str, list[Tensor]] = defaultdict(list)
    kl: dict[str, list[Tensor]] = defaultdict(list)
    gap = None
    # A batch costs several passes with their logits, so it is made smaller: who waits or cancels is not kept long. Nor is it
    # larger than one pass, since replacements must know which rows they are given.
    for index, part in enumerate(torch.split(tokens, max(1, min(batch_rows // LOSSES, lens.logit_rows(tokens.shape[1]))))):
        starts = row_starts(part, lens.row_start)
        rebuilt = _Rebuilt(lens, sae, starts)
        wanted: dict[str, Replace | Out] = {
            "sae": rebuilt.z,
            "zero": _outside_excluded(sae, starts, torch.zeros_like),
            "mean": _outside_excluded(sae, starts, lambda z: mean.to(z.dtype).expand_as(z)),
        }
        if index == 0:  # one batch tells whether patching z and patching the output are one thing
            wanted["output"] = Out(rebuilt.output)
        if bias is not None:  # else what is said of z = 0 holds
            wanted["zero_output"] = Out(rebuilt.nothing)
        effects = dict(
            zip(["clean", *wanted], lens.effects_with(part.to(lens.device), layer, list(wanted.values())), strict=True)
        )
        for name, effect in effects.items():
            losses[name].append(effect.losses[:, first:].cpu())
            kl[name].append(effect.kl[:, first:].cpu())
        if index == 0:
            gap = float((losses["output"][0] - losses["sae"][0]).abs().max())
        yield progress(part.numel())
    whole = {name: torch.cat(batches) for name, batches in losses.items()}
    return cross_entropy(
        whole["clean"],
        whole["sae"],
        whole["zero"],
        whole["mean"],
        kl={name: torch.cat(kl[name]) for name in ("sae", "zero", "mean")},
        zero_output=whole.get("zero_output", whole["zero"]),
        output_gap=gap,
        first=first,
    )


class _Rebuilt:
    """The SAE's reconstruction put in z's place, and what of it the attention output takes.

    A patched output does not show z, so `output` and `nothing` go by what `z` saw last: of the same rows, since replacements
    are made in the order given.
    """

    def __init__(self, lens: "Lens", sae: SAE, starts: Tensor) -> None:
        self._lens, self._sae, self._starts = lens, sae, starts

    def z(self, z: Tensor) -> Tensor:
        """Every position but the excluded ones rebuilt."""
        self._excluded = self._sae.excluded(z, self._starts)[..., None]
        self._z = torch.where(self._excluded, z, self._sae(z).to(z.dtype))
        return self._z

    def output(self, out: Tensor) -> Tensor:
        """z_hat W_O + b_O, computed here rather than by the model."""
        layer = self._sae.cfg.site.layer
        written, bias = self._z @ self._lens.W_O(layer).flatten(0, 1), self._lens.b_O(layer)
        return torch.where(self._excluded, out, written if bias is None else written + bias)

    def nothing(self, out: Tensor) -> Tensor:
        """Nothing, not even b_O."""
        return torch.where(self._excluded, out, torch.zeros_like(out))


def _mean_z(lens: "Lens", sae: SAE, tokens: Tensor, batch_rows: int) -> Tensor:
    total, n = torch.zeros(sae.cfg.d_in, dtype=torch.float64), 0
    for part in torch.split(tokens, batch_rows):
        z = lens.read_z(part.to(lens.device), [sae.cfg.site.layer])[sae.cfg.site.layer]
        kept = z[~sae.excluded(z, row_starts(part, lens.row_start))]
        total, n = total + kept.double().sum(0).cpu(), n + len(kept)
    return (total / max(1, n)).float().to(lens.device)


def _outside_excluded(sae: SAE, starts: Tensor, rebuild: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """z of rows with these `starts`, every position but the excluded ones rebuilt."""

    def replace(z: Tensor) -> Tensor:
        return torch.where(sae.excluded(z, starts)[..., None], z, rebuild(z).to(z.dtype))

    return replace


def _notes(result: Evaluation, heldout_rows: int) -> list[str]:
    """What could not be measured."""
    notes = []
    if not heldout_rows:
        notes.append("No rows were held out, so nothing was measured on text that training has not seen.")
    elif missing := sorted(name for name in ("fvu", "gamma", "mse", "cosine") if getattr(result.reconstruction, name) is None):
        notes.append(
            f"No finite value came out for {', '.join(missing)}: z or its reconstruction is not finite, or never varies."
        )
    for name, record in (("held-out text", result.prose), ("repeated tokens", result.repeated)):
        if record is not None and (record.clean is None or record.sae is None):
            notes.append(f"The loss on {name} is not finite.")
    return notes
