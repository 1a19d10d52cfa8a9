"""Every setting, documented once. CLI flags, forms, the API and the docs are made from these models. No torch.

A config is frozen and complete: stored with its job, it says all that is needed to run the job again.
"""

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PassDtype = Literal["auto", "float32", "bfloat16"]


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
    """Precision of the pass that chooses rows. Stored numbers always come from a second fp32 visit of these rows."""
    seed: int = 0
    """Seed of the hashed keys that draw band examples."""


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
    arch: Literal["batchtopk"] = "batchtopk"
    """Architecture of the SAE."""
    expansion: Annotated[int, Field(ge=1, le=256)] = 8
    """Features per input dimension: d_sae = expansion x d_in."""
    k: Annotated[int, Field(ge=1)] = 32
    """Mean number of active features per token (the L0 that training holds)."""
    passes: Annotated[int, Field(ge=1, le=100)] = 1
    """How often each token is trained on."""
    batch: Annotated[int, Field(ge=64)] = 2048
    """Tokens in one step."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of Adam; right for about 1M tokens (LOG.md), runs of 100M and more want 3e-4."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from 0."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the steps, at the end, over which the rate falls to 0."""
    k_anneal: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which k falls from 4k to k."""
    aux_k: Annotated[int | None, Field(ge=0)] = None
    """Dead features that reconstruct the error (AuxK); None takes d_in / 2, 0 turns it off."""
    aux_coef: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of the AuxK loss."""
    dead_tokens: Annotated[int | None, Field(ge=1)] = None
    """A feature that has not fired for this many tokens is dead; None takes 5 % of the run, at most 10M."""
    sink_norm: Annotated[float, Field(gt=1)] = 10.0
    """Positions whose |z| exceeds this multiple of the median are left out of training and statistics, as is each row's start."""
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
        if self.warmup + self.decay > 1:
            raise ValueError("warmup and decay together cover more than the whole run; lower one of them")
        if self.rows.tokens < self.batch:
            raise ValueError(
                f"{self.rows.tokens} tokens are fewer than one batch of {self.batch}; take more tokens or a smaller batch"
            )
        return self


class HarvestJob(Config):
    """A harvest of an SAE that exists."""

    sae: str
    """The SAE's name."""
    corpus: str
    """A registered corpus' name."""
    rows: RowsConfig = RowsConfig()
    """How the corpus is cut into rows; keep the training's to sweep the rows that are on disk already."""
    harvest: HarvestConfig = HarvestConfig()
    """The sweep."""


class SAEConfig(Config):
    """What is saved beside an SAE's weights: all that is needed to use it rightly. The map is on raw z."""

    arch: Literal["batchtopk"]
    """Architecture; names the file in `sae_core/saes/`."""
    d_in: int
    """n_heads x d_head."""
    d_sae: int
    """Number of features."""
    k: int
    """Mean number of active features that training held."""
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
    """Positions with |z| above this are excluded, as in training; None excludes none but row starts."""
    context: int
    """Tokens in a training row."""
    train: TrainConfig | None = None
    """The run that made it; None for an imported SAE."""
