"""Every setting, documented once. CLI flags, forms, the API and the docs are made from these models. No torch.

A config is frozen and complete: stored with its job, it says all that is needed to run the job again.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from sae_core.errors import Unfitting, UsageError

PassDtype = Literal["auto", "float32", "bfloat16"]
Arch = Literal["relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"]
TOP_K: tuple[Arch, ...] = ("topk", "batchtopk", "matryoshka")
BELONGS: dict[str, tuple[Arch, ...]] = {
    "k_anneal": TOP_K,
    "aux_k": TOP_K,
    "aux_coef": TOP_K,
    "l1": ("relu", "gated"),
    "l1_warmup": ("relu", "gated"),
    "l0_coef": ("jumprelu",),
    "bandwidth": ("jumprelu",),
    "groups": ("matryoshka",),
    "resample_steps": ("relu",),
    "resample_times": ("relu",),
    "dead_frequency": ("relu",),
}  # fields that only some architectures read


class Config(BaseModel):
    """Base of all configs: frozen, no unknown fields, each field's docstring is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def hash(self) -> str:
        """Twelve hex digits that change when any field does; names folders and deterministic job ids."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class ModelSource(Config):
    """Where a model's weights are."""

    location: str
    """Hub name (`gpt2`), local folder in Hugging Face format, or a `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None takes the default branch. Ignored for local models."""


class CorpusSource(Config):
    """Where text is."""

    location: str
    """A text, jsonl or parquet file, a folder of them, or `hf:<dataset name>`."""
    field: str = "text"
    """Field of a jsonl or parquet record, or column of a dataset, that holds the text."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; None takes the default branch."""


class Site(Config):
    """Where in a model an SAE reads: one layer's attention output before W_O, heads concatenated."""

    layer: Annotated[int, Field(ge=0)]
    """Layer, counted from 0."""

    @property
    def hook(self) -> str:
        """TransformerLens' name of the site."""
        return f"blocks.{self.layer}.attn.hook_z"


class RowsConfig(Config):
    """How text is cut into rows of tokens."""

    context: Annotated[int, Field(ge=8, le=8192)] = 128
    """Tokens in a row, the row-start token included."""
    tokens: Annotated[int, Field(ge=1)] = 1_048_576
    """Tokens to take for training and harvest (row starts included)."""
    heldout_tokens: Annotated[int, Field(ge=0)] = 65_536
    """Tokens set aside, from other documents, for evaluation."""
    seed: int = 0
    """Order of documents and rows, and which documents are held out."""


class HarvestConfig(Config):
    """One sweep of a corpus through a model and an SAE."""

    tokens: Annotated[int, Field(ge=1)] = 1_048_576
    """Tokens to sweep; at most what the rows hold."""
    top_k: Annotated[int, Field(ge=1, le=200)] = 20
    """Strongest examples kept per feature, from distinct rows, near-duplicates dropped."""
    bands: Annotated[int, Field(ge=1, le=16)] = 4
    """Bands of activation, equal in log value from the feature's maximum down to the weakest firing."""
    per_band: Annotated[int, Field(ge=0, le=100)] = 3
    """Examples drawn uniformly from each band."""
    dfa_share: Annotated[float, Field(gt=0, le=1)] = 0.95
    """DFA entries are stored by size until they hold this share of the example's absolute DFA ..."""
    dfa_entries: Annotated[int, Field(ge=1, le=1024)] = 32
    """... or until there are this many."""
    window: Annotated[int, Field(ge=8)] = 256
    """Tokens shown around a destination; rows no longer than this are shown whole."""
    neighbours: Annotated[int, Field(ge=0, le=100)] = 10
    """Nearest features by decoder cosine."""
    logits: Annotated[int, Field(ge=0, le=100)] = 10
    """Promoted and suppressed tokens, each."""
    shard_rows: Annotated[int, Field(ge=1)] = 512
    """Rows in one durable step."""
    batch_rows: Annotated[int, Field(ge=1)] = 16
    """Rows in one model pass; part of the identity of the result, since sums in another order round differently."""
    model_dtype: PassDtype = "auto"
    """Precision of the pass that chooses rows, where nothing is kept of it for the visit. Stored numbers are always fp32."""
    kept_gb: Annotated[float, Field(ge=0)] = 4.0
    """Gigabytes of disk for what the pass brings to the layers, in fp32, so that the visit need not run the blocks before them
    again. Where that does not suffice, or few rows will be visited, nothing is kept."""
    seed: int = 0
    """Seed of the hashed keys that draw band examples."""

    @property
    def per_feature(self) -> int:
        """Most examples of a feature."""
        return self.top_k + self.bands * self.per_band

    @staticmethod
    def expected_visits(rows: int, examples: int) -> float:
        """How many of so many rows so many examples are expected in: they fall on rows as balls into boxes."""
        return rows * (1 - math.exp(-examples / rows))

    def keeps_streams(self, rows: int, context: int, width: int, features: int) -> bool:
        """Whether keeping what enters the layers, `width` numbers a token in all, pays: two passes, of which the first may take
        half the time in bfloat16, cost more than one in fp32 as soon as the second visits more than half of the rows."""
        fits = 4 * rows * context * width <= self.kept_gb * 1e9
        return fits and self.expected_visits(rows, features * self.per_feature) > rows / 2


class TrainConfig(Config):
    """A training run, from text to a published SAE."""

    model: str
    """A registered model's name."""
    corpus: str
    """A registered corpus' name."""
    site: Site
    """Where the SAE reads."""
    rows: RowsConfig = RowsConfig()
    """How the corpus is cut into rows."""
    arch: Arch = "batchtopk"
    """Architecture of the SAE; each has its equations in `sae_core/saes/`."""
    expansion: Annotated[int, Field(ge=1, le=256)] = 8
    """Features per input dimension: d_sae = expansion x d_in."""
    k: Annotated[int, Field(ge=1)] = 32
    """Mean number of active features per token (L0): held exactly by the top-k family, aimed at by the others."""
    passes: Annotated[int, Field(ge=1, le=100)] = 1
    """How often each token is trained on."""
    batch: Annotated[int, Field(ge=64)] = 2048
    """Tokens in one step."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of Adam; right for about 1M tokens (LOG.md), runs of 100M and more want 3e-4."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's decay of the mean gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay of the mean squared gradient."""
    schedule: Literal["linear", "restarts"] = "linear"
    """`linear`: rise over `warmup`, fall over `decay`. `restarts`, as published: a cosine rise from a tenth of the rate over
    1,000 steps, at the start and after each resampling, then flat."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from 0."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the steps, at the end, over which the rate falls to 0."""
    scaling: bool = True
    """Train on s z, where s makes the mean norm sqrt(d_in); folded into the weights at save. Off: raw z, as published."""
    b_dec_init: Literal["mean", "geometric_median", "zeros"] = "mean"
    """Where b_dec starts."""
    tied_init: bool = True
    """Start W_enc as W_dec transposed; off: both drawn on their own (Kaiming uniform), as published."""
    active_subspace: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Draw the first decoder in the span of the leading principal directions of z, this share of d_in (arXiv 2508.16929);
    0 uses all of it."""
    k_anneal: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which k falls from 4k to k (top-k family)."""
    aux_k: Annotated[int | None, Field(ge=0)] = None
    """Dead features that reconstruct the error (AuxK, top-k family); None takes d_in / 2, 0 turns it off."""
    aux_coef: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of the AuxK loss (top-k family)."""
    l1: Annotated[float | None, Field(ge=0)] = None
    """Weight of the L1 loss (relu, gated); None lets it find the weight at which k features are active."""
    l1_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which that weight rises from 0 (relu, gated)."""
    l0_coef: Annotated[float, Field(ge=0)] = 1.0
    """Weight of (L0 / k - 1)^2 (jumprelu)."""
    bandwidth: Annotated[float, Field(gt=0)] = 0.5
    """Width of the window around a threshold through which its gradient passes, in units of scaled z (jumprelu)."""
    groups: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
    """Shares of the features in the inner groups, the rest is the last; each prefix of groups reconstructs z by itself
    (matryoshka)."""
    resample_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between resamplings of dead features, as Kissane et al. did (relu); 0 for none."""
    resample_times: Annotated[int, Field(ge=0)] = 4
    """How many resamplings at most (relu)."""
    dead_frequency: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    """A feature that fires on no more than this share of tokens is resampled (relu)."""
    dead_tokens: Annotated[int | None, Field(ge=1)] = None
    """A feature that has not fired for this many tokens is dead; None takes 5 % of the run, at most 10M."""
    exclude_start: bool = True
    """Leave row starts, at position 0 and between packed documents, out of training and statistics."""
    sink_norm: Annotated[float | None, Field(gt=1)] = 10.0
    """Positions whose |z| exceeds this multiple of the median are left out of training and statistics; None leaves none out."""
    cache: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = None
    """Name of an activation cache: made by the first run that names it, read by those after it; None keeps activations for
    the run only."""
    pool_tokens: Annotated[int, Field(ge=1024)] = 1_048_576
    """Tokens collected to disk and shuffled together before they are trained on."""
    collect_rows: Annotated[int, Field(ge=1)] = 16
    """Rows in one model pass while activations are collected."""
    model_dtype: PassDtype = "auto"
    """Precision of the model pass; `auto` takes bfloat16 where a probe finds it clearly faster (AMX, AVX-512 BF16, GPU)."""
    step_dtype: PassDtype = "auto"
    """Precision of the SAE's encoder product; masters and sums stay float32."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of initialisation and shuffling."""
    harvests: tuple[HarvestConfig, ...] = (HarvestConfig(),)
    """Harvests to run when the SAE is trained, in order; each replaces the one before when it is published."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schedule == "linear" and self.warmup + self.decay > 1:
            raise Unfitting("warmup and decay together cover more than the whole run; lower one of them", field="decay")
        if self.rows.tokens < self.batch:
            raise Unfitting(
                f"{self.rows.tokens} tokens are fewer than one batch of {self.batch}; take more tokens or a smaller batch",
                field="batch",
            )
        if sum(self.groups) >= 1:
            raise Unfitting("groups cover all features or more, and the last group is the rest; lower them", field="groups")
        for name, archs in BELONGS.items():
            if self.arch not in archs and getattr(self, name) != type(self).model_fields[name].default:
                raise Unfitting(
                    f"{name} is read by {' and '.join(archs)} only, and arch is {self.arch}; leave it out", field=name
                )
        return self

    def check_width(self, d_in: int) -> None:
        """Raise UsageError where the SAE would have fewer features than may be active at once."""
        if self.k > self.expansion * d_in:
            raise UsageError(
                f"k = {self.k} active features of {self.expansion * d_in:,} (expansion {self.expansion} x {d_in}) "
                "are more than there are; lower k or raise the expansion.",
                field="k",
            )


STREAM = ("model", "corpus", "rows", "pool_tokens", "collect_rows", "model_dtype", "cache")
"""Fields of `TrainConfig` that say what activations are read: runs that agree in them can share one stream."""


class SweepConfig(Config):
    """Many training runs on one stream of activations: every combination of what is listed, the rest from `base`."""

    base: TrainConfig
    """What the runs have in common."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["all"] = ()
    """Layers, or `all` of the model's; none: the base's."""
    archs: tuple[Arch, ...] = ()
    """Architectures; none: the base's."""
    ks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Values of k; none: the base's."""
    expansions: tuple[Annotated[int, Field(ge=1, le=256)], ...] = ()
    """Values of the expansion; none: the base's."""
    seeds: tuple[int, ...] = ()
    """Seeds; none: the base's."""
    each: dict[Arch, dict[str, Any]] = {}
    """Settings of single architectures, over the base's: what only one of them reads, or a learning rate of its own."""

    @model_validator(mode="after")
    def _runs_are_possible(self) -> Self:
        for name in ("layers", "archs", "ks", "expansions", "seeds"):
            listed = getattr(self, name)
            if listed != "all" and len(set(listed)) < len(listed):
                raise Unfitting(f"{name} lists a value twice; each run must differ from the others", field=name)
        self.runs(1)  # a setting that only some of the architectures read is dropped for the others, the rest is checked
        return self

    def runs(self, n_layers: int) -> tuple[TrainConfig, ...]:
        """One config per run; layers vary slowest, then architecture, expansion, k, seed."""
        base, fields = self.base.model_dump(), type(self.base).model_fields
        layers = range(n_layers) if self.layers == "all" else self.layers or (self.base.site.layer,)
        found = []
        for layer, arch, expansion, k, seed in itertools.product(
            layers,
            self.archs or (self.base.arch,),
            self.expansions or (self.base.expansion,),
            self.ks or (self.base.k,),
            self.seeds or (self.base.seed,),
        ):
            foreign = {name: fields[name].default for name, archs in BELONGS.items() if arch not in archs}
            changed = {"site": {"layer": layer}, "arch": arch, "expansion": expansion, "k": k, "seed": seed}
            found.append(TrainConfig.model_validate(base | foreign | self.each.get(arch, {}) | changed))
        return tuple(found)

    def label(self, run: TrainConfig) -> str:
        """What tells a run from its siblings: `l05-topk-x8-k32`, of the parts that vary; empty where none does."""
        parts: list[tuple[Any, str]] = [
            (self.layers, f"l{run.site.layer:02d}"),
            (self.archs, run.arch),
            (self.expansions, f"x{run.expansion}"),
            (self.ks, f"k{run.k}"),
            (self.seeds, f"s{run.seed}"),
        ]
        return "-".join(text for listed, text in parts if listed)


class HarvestJob(Config):
    """A harvest of SAEs that exist, all of one model, in one pass over the text."""

    saes: Annotated[tuple[str, ...], Field(min_length=1)]
    """The SAEs' names, each once and in order."""
    corpus: str
    """A registered corpus' name."""
    rows: RowsConfig = RowsConfig()
    """How the corpus is cut into rows; keep the training's to sweep the rows that are on disk already."""
    harvest: HarvestConfig = HarvestConfig()
    """The sweep."""

    @model_validator(mode="before")
    @classmethod
    def _of_one(cls, values: Any) -> Any:
        """Jobs were of one SAE once."""
        if isinstance(values, dict) and "sae" in values:
            return {name: value for name, value in values.items() if name != "sae"} | {"saes": (values["sae"],)}
        return values

    @field_validator("saes")
    @classmethod
    def _each_once(cls, saes: tuple[str, ...]) -> tuple[str, ...]:
        """However they are listed, the job is the same."""
        return tuple(sorted(set(saes)))


class EvaluateConfig(Config):
    """How an SAE is measured."""

    prose_rows: Annotated[int, Field(ge=1)] = 96
    """Held-out rows whose losses are measured, with and without the SAE."""
    repeated_rows: Annotated[int, Field(ge=1)] = 32
    """Rows of random tokens said twice whose losses are measured."""
    dead_tokens: Annotated[int, Field(ge=0)] = 262_144
    """Training tokens on which densities and dead features are counted, beside the held-out ones."""
    batch_rows: Annotated[int, Field(ge=1)] = 16
    """Rows in one model pass."""
    probe_texts: Annotated[int, Field(ge=10)] = 200
    """Texts of each label that sparse probing takes at most."""
    probe_field: str = "text"
    """Field of a probing file that holds the text."""
    probe_label: str = "label"
    """Field of a probing file that holds the label."""


class EvaluateJob(Config):
    """A measurement of an SAE that exists."""

    sae: str
    """The SAE's name."""
    corpus: str
    """A registered corpus' name; its held-out rows are measured."""
    rows: RowsConfig = RowsConfig()
    """How the corpus is cut into rows; keep the training's, so that what is held out was held out then."""
    against: tuple[str, ...] = ()
    """SAEs of the same site to match features with."""
    probes: tuple[str, ...] = ()
    """Files or folders of labelled texts, for sparse probing."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How it is measured."""


class CompareJob(Config):
    """Two SAEs of one site, their features matched by decoder cosine."""

    sae: str
    """The SAE's name."""
    against: str
    """Name of the SAE to match it with."""

    @model_validator(mode="after")
    def _are_two(self) -> Self:
        if self.sae == self.against:
            raise Unfitting(f"{self.sae} is the same on both sides; choose two SAEs", field="against")
        return self


VERBATIM = Field(min_length=1, json_schema_extra={"verbatim": True})
"""Of texts whose spaces count, also where they are typed."""


class TokensProxy(Config):
    """True where the token itself is one of a set."""

    kind: Literal["tokens"] = "tokens"
    """Which proxy this is."""
    texts: Annotated[tuple[str, ...], VERBATIM]
    """Texts of single tokens, spaces and all: ` board` and `board` are two tokens."""
    negated: bool = False
    """True where it would be false."""


class RegexProxy(Config):
    """True where a regular expression (Python's) matches."""

    kind: Literal["regex"] = "regex"
    """Which proxy this is."""
    pattern: Annotated[str, VERBATIM]
    """The expression."""
    on: Literal["text", "token"] = "text"
    """`text`: a match ends where the row's text up to and including the token ends; `token`: the token's own text matches."""
    negated: bool = False
    """True where it would be false."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.pattern)
        except re.error as error:
            where = "" if error.pos is None else f" at character {error.pos + 1}"
            raise Unfitting(f"{self.pattern!r} is no regular expression{where}: {error.msg}", field="pattern") from error
        return self


class InductionProxy(Config):
    """True where one of a set of tokens is next by induction: the token, fuzzily, stood earlier in the row, followed by it."""

    kind: Literal["induction"] = "induction"
    """Which proxy this is."""
    texts: Annotated[tuple[str, ...], VERBATIM]
    """Texts of single tokens, spaces and all, any of which may be what is next."""
    negated: bool = False
    """True where it would be false."""


Proxy = Annotated[TokensProxy | RegexProxy | InductionProxy, Field(discriminator="kind")]


def said(proxies: Sequence[TokensProxy | RegexProxy | InductionProxy]) -> str:
    """Proxies in words."""

    def one(proxy: TokensProxy | RegexProxy | InductionProxy) -> str:
        if isinstance(proxy, RegexProxy):
            return f"{'the text so far ends with' if proxy.on == 'text' else 'the token matches'} /{proxy.pattern}/"
        texts = " or ".join(map(repr, proxy.texts))
        return f"{texts} is next by induction" if isinstance(proxy, InductionProxy) else f"the token is {texts}"

    return " and ".join(f"not ({one(proxy)})" if proxy.negated else one(proxy) for proxy in proxies)


class SpecificityStudy(Config):
    """How well a feature agrees with a proxy: what it fires on beside it, and what of it is missed."""

    kind: Literal["specificity"] = "specificity"
    """Which study this is."""
    sae: str
    """The SAE's name."""
    feature: Annotated[int, Field(ge=0)]
    """Index of the feature."""
    corpus: str
    """A registered corpus' name."""
    rows: RowsConfig = RowsConfig()
    """How the corpus is cut into rows; keep the training's to read the rows that are on disk already."""
    proxies: Annotated[tuple[Proxy, ...], Field(min_length=1)]
    """What the feature is thought to stand for; of several, all must hold."""
    tokens_swept: Annotated[int, Field(ge=1)] = 1_048_576
    """Tokens to read; at most what the rows hold."""
    bins: Annotated[int, Field(ge=4, le=500)] = 100
    """Bars of the histogram, equal in width from 0 to the strongest activation."""
    ranges: Annotated[int, Field(ge=1, le=10)] = 4
    """Parts of that axis from which false positives are drawn, so that weak ones do not crowd out the strong."""
    per_range: Annotated[int, Field(ge=0, le=50)] = 6
    """False positives and true ones drawn uniformly from each part, and false negatives as many as from all parts."""
    window: Annotated[int, Field(ge=8, le=256)] = 40
    """Tokens of text shown of an example, three quarters of them before the token it is about."""
    batch_rows: Annotated[int, Field(ge=1)] = 16
    """Rows in one model pass."""
    seed: int = 0
    """Seed of the draws."""


class _OfHeads(Config):
    """What every study of a model's heads is asked."""

    model: str
    """A registered model's name."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["all"] = "all"
    """Layers whose heads are looked at."""
    length: Annotated[int, Field(ge=16, le=8192)] = 128
    """Tokens in a sequence of random tokens, the row-start token included."""
    corpus: str | None = None
    """A registered corpus' name, to see what the heads do in real text; None leaves that part out."""
    rows: RowsConfig = RowsConfig()
    """How the corpus is cut into rows."""
    text_rows: Annotated[int, Field(ge=1)] = 256
    """Rows of real text that are read."""
    pass_tokens: Annotated[int, Field(ge=64)] = 2048
    """Tokens in one model pass."""
    seed: int = 0
    """Seed of the draws."""

    @model_validator(mode="after")
    def _names_layers(self) -> Self:
        if self.layers != "all" and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise Unfitting("layers must name one layer or more, and none twice", field="layers")
        return self


class InductionStudy(_OfHeads):
    """Which heads do induction, and how long a repeated prefix they need for it."""

    kind: Literal["induction"] = "induction"
    """Which study this is."""
    prefixes: Annotated[int, Field(ge=2, le=32)] = 9
    """Longest prefix that is copied."""
    samples: Annotated[int, Field(ge=2, le=10_000)] = 100
    """Sequences of random tokens for each length of the prefix; the paper took 400."""
    cuts: Annotated[int, Field(ge=1, le=10_000)] = 48
    """Places in real text, for each head, where the prefix is cut down to one token; at most one in a row."""
    attends: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """A head attends to a token when it gives it more than this share of its attention."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length < 2 * self.prefixes + 3:
            raise Unfitting(
                f"length {self.length} has no room for a prefix of {self.prefixes} tokens twice; "
                f"take {2 * self.prefixes + 3} or more, or fewer prefixes",
                field="length",
            )
        return self


class HeadsStudy(_OfHeads):
    """What every head of a model does: where it attends, and what it writes of what it reads."""

    kind: Literal["heads"] = "heads"
    """Which study this is."""
    samples: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Sequences of random tokens said twice."""
    vocabulary: Annotated[int, Field(ge=16)] = 16_384
    """Tokens, drawn from the vocabulary, that the copying score is about; all of them where it has fewer."""


class SaeStudy(Config):
    """What every study of a whole SAE is asked."""

    sae: str
    """The SAE's name."""
    pass_tokens: Annotated[int, Field(ge=64)] = 2048
    """Tokens in one model pass."""
    seed: int = 0
    """Seed of the draws."""


class IoiStudy(SaeStudy):
    """What an SAE's features at the second subject do for the indirect object, and what of the prompt its layer says there."""

    kind: Literal["ioi"] = "ioi"
    """Which study this is."""
    samples: Annotated[int, Field(ge=8, le=2000)] = 100
    """Prompts, half of them ABBA and half BABA."""
    features: Annotated[int, Field(ge=1, le=500)] = 24
    """Features that are ablated: those that fire most at the second subject."""
    random: Annotated[int, Field(ge=1, le=500)] = 16
    """Random directions that each of the strongest features is held against."""
    words: tuple[Annotated[str, Field(pattern=r"^[^\W\d_]{2,20}$")], ...] = ("alongside", "or", "but", "with")
    """What " and" between the names is replaced by."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Further layers whose output is replaced together with the SAE's; the paper took two."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.samples % 2:
            raise Unfitting("samples must be even: half of the prompts are ABBA and half BABA", field="samples")
        taken = ("and", "names", "moved", "exchanged", "third", "shuffled", "mean", "zero")
        if len(set(self.words)) < len(self.words) or set(self.words) & set(taken):
            raise Unfitting(f"words must differ from each other and from {', '.join(taken)}", field="words")
        return self


class PrefixStudy(SaeStudy):
    """Which features of an SAE do induction, how long a repeated prefix they need, and what the prediction owes to them."""

    kind: Literal["prefix"] = "prefix"
    """Which study this is."""
    prefixes: Annotated[int, Field(ge=2, le=32)] = 9
    """Longest prefix that is copied."""
    samples: Annotated[int, Field(ge=8, le=10_000)] = 32
    """Sequences of random tokens for each length of the prefix."""
    length: Annotated[int, Field(ge=16, le=8192)] = 64
    """Tokens in a sequence, the row-start token included."""
    random: Annotated[int, Field(ge=1, le=500)] = 4
    """Sets of other features, drawn at random, that are ablated as a control."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length < 2 * self.prefixes + 3:
            raise Unfitting(
                f"length {self.length} has no room for a prefix of {self.prefixes} tokens twice; "
                f"take {2 * self.prefixes + 3} or more, or fewer prefixes",
                field="length",
            )
        return self


AnyStudy = SpecificityStudy | InductionStudy | HeadsStudy | IoiStudy | PrefixStudy
StudyJob = Annotated[AnyStudy, Field(discriminator="kind")]
"""A question put to a feature, or to the heads of a model; `kind` says which."""

_study_job: TypeAdapter[AnyStudy] = TypeAdapter(StudyJob)


def study_job(stored: dict[str, Any]) -> AnyStudy:
    """The config of a stored study."""
    return _study_job.validate_python(stored)


class Imported(Config):
    """Where an SAE that was not trained here came from."""

    format: str
    """The format of its files; names the module in `sae_core/formats/`."""
    source: str
    """The path or hub name that it was read from."""
    model: str | None = None
    """The model's name, as its files say it."""
    notes: tuple[str, ...] = ()
    """What is worth knowing about how it was converted."""


class ImportJob(Config):
    """An SAE of a peer to be made one of ours."""

    location: str
    """A file, a folder, or <owner>/<repository>/<folder> on the hub."""
    model: str
    """A registered model's name."""
    format: str | None = None
    """The format of its files; None looks at what is there."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Layer whose z it reads, where its files do not say."""
    folded: bool | None = None
    """Whether it was trained on weights with the value biases folded away; None takes what its format says."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Factor that z is multiplied by first, where its files say that there is one but not which."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None takes the default branch."""


Reads = Literal["normed", "ungained", "stream"]
Writes = Literal["mlp", "stream"]


class TranscoderConfig(Config):
    """What of a transcoder is no tensor."""

    layer: Annotated[int, Field(ge=0)]
    """Layer of its MLP."""
    reads: Reads
    """See `transcoders.py`."""
    writes: Writes
    """The same."""
    k: Annotated[int, Field(ge=1)] | None = None
    """At most so many features fire at a token; None where thresholds alone say which."""
    format: str = ""
    """Of the files that it was made from."""
    source: str = ""
    """Where these were."""
    model_fingerprint: str = ""
    """Of the model that it was given to; empty where it was given to none."""


class TranscoderFiles(Config):
    """A transcoder of a peer to be given to a model."""

    location: str
    """A file, a folder, or <owner>/<repository>/<file or folder> on the hub."""
    format: str | None = None
    """The format of its files; None looks at what is there."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Layer of its MLP, where its files do not say."""
    reads: Reads | None = None
    """What it reads: what enters the MLP (normed), the same before the norm's gain and bias (ungained), or the stream before the
    norm; None takes what its format says."""
    writes: Writes | None = None
    """What it writes: the MLP's output (mlp), or what is added to the stream, after a norm after the MLP; None takes what its
    format says."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None takes the default branch."""


class DashboardsJob(Config):
    """Dashboards of another tool to be made a harvest of an SAE that is here."""

    location: str
    """The folder of SAEDashboard's `batch-*.json`, or of one source of Neuronpedia's bulk files."""
    sae: str
    """The name of the SAE whose features they show."""
    corpus: str | None = None
    """What their text is called here; None takes the name that the files say."""
    partial: bool = False
    """Take what there is, though features are in no file."""


class SAEConfig(Config):
    """What is saved beside an SAE's weights: all that is needed to use it rightly. The map is on raw z."""

    arch: Arch
    """Architecture; names the file in `sae_core/saes/`."""
    d_in: int
    """n_heads x d_head."""
    d_sae: int
    """Number of features."""
    k: int
    """Active features per token that training held or aimed at; `topk` keeps just so many at inference too. 0 where the files of
    an imported SAE do not say."""
    n_heads: int
    """Query heads concatenated in z, head-major."""
    d_head: int
    """Width of a head."""
    site: Site
    """Where it reads."""
    model: str
    """Name of the model it was trained on."""
    model_fingerprint: str
    """Fingerprint of that model's weights."""
    processing: dict[str, str | bool]
    """`folded`, `centred`, `dtype`, `tl_version`: how the model was prepared when z was read."""
    scale: float
    """Factor that training applied to z; already folded into the weights, kept as provenance."""
    max_norm: float | None
    """Positions with |z| above this are excluded, as in training; None excludes none for their size."""
    exclude_start: bool = True
    """Whether row starts are excluded as destinations, as in training: at position 0 and between packed documents."""
    input_norm: Literal["none", "token"] = "none"
    """`token`: each token's z is brought to the norm sqrt(d_in) before the map, and its reconstruction back again, as some
    imported SAEs want it."""
    context: int
    """Tokens in a training row."""
    train: TrainConfig | None = None
    """The run that made it; None for an imported SAE."""
    imported: Imported | None = None
    """Where it came from, if it was not trained here."""


DeviceKind = Literal["cpu", "cuda", "mps"]


class Wishes(Config):
    """How a job is done, beside what it does."""

    priority: int | None = Field(None, ge=1, le=9)
    """Which of the jobs that wait starts first: 1 before all others, 9 after all others. Unset takes the kind's: 3 for what
    somebody waits for, 5 for a training, 7 for a sweep."""
    only_on: DeviceKind | None = None
    """Only workers on this kind of device do it; unset lets every worker."""
    time_limit: float | None = Field(None, ge=0)
    """Seconds that it may work, all attempts together; 0 for as long as it takes, unset what HEADSCOPE_JOB_TIME_LIMIT says."""


AS_USUAL = Wishes()
