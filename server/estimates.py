"""How long a job will take: from sizes and the machine's speed before it runs, from what was measured while it runs.

A phase's cost is counted in floating-point operations of its matrix products, which is what fills the time; EFFICIENCY is
the share of a large product's speed that they reach, set from measured rates of models of about 130M weights. It is an
estimate: within a factor of two or so before the start, better with every batch. No torch.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sae_core.config import (
    EvaluateJob,
    HarvestConfig,
    HeadsStudy,
    InductionStudy,
    IoiStudy,
    PrefixStudy,
    RowsConfig,
    TrainConfig,
)
from sae_core.progress import Progress


class Sized(Protocol):
    """Whatever tells a model's sizes."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def d_head(self) -> int: ...
    @property
    def d_vocab(self) -> int: ...


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    d_model: int
    n_layers: int
    n_heads: int
    d_head: int
    d_vocab: int

    @classmethod
    def of(cls, known: Sized) -> "Shape":
        """The part of what is known that an estimate needs."""
        return cls(known.d_model, known.n_layers, known.n_heads, known.d_head, known.d_vocab)

    @property
    def d_in(self) -> int:
        """Width of z."""
        return self.n_heads * self.d_head

    def pass_flops(self, layers: int) -> float:
        """Operations per token of a forward pass through `layers` blocks: two per weight, about 12 d_model^2 weights each."""
        return 2.0 * 12 * self.d_model**2 * layers

    @property
    def full_flops(self) -> float:
        """Operations per token of a whole pass with its logits."""
        return self.pass_flops(self.n_layers) + 2.0 * self.d_model * self.d_vocab


@dataclass(frozen=True)
class Speed:
    """What a machine's matrix product reaches, in operations per second."""

    float32: float
    bfloat16: float

    @property
    def best(self) -> float:
        """Of the precision that `auto` takes."""
        return max(self.float32, self.bfloat16)


UNKNOWN = Speed(1e11, 1e11)  # two ordinary cores, until somebody measures
EFFICIENCY = {"pass": 0.5, "step": 0.4, "encode": 0.4, "visit": 0.8}
ROWS_PER_SECOND = 10_000.0  # examples written to the database


def train_seconds(cfg: TrainConfig, shape: Shape, speed: Speed) -> dict[str, float]:
    """Seconds of each phase of a training job, harvests included as one phase `harvests`."""
    tokens, d_sae = cfg.rows.tokens, cfg.expansion * shape.d_in
    swept = Swept(cfg.site.layer, d_sae, cfg.k)
    forward = shape.pass_flops(cfg.site.layer + 1) / (speed.best * EFFICIENCY["pass"])
    step = 3 * 2.0 * shape.d_in * d_sae / (speed.best * EFFICIENCY["step"])
    evaluated = cfg.rows.heldout_tokens * shape.pass_flops(cfg.site.layer + 1) + 4 * 128 * cfg.rows.context * shape.full_flops
    return {
        "prepare": 2.0 + tokens / 400_000,
        "collect": tokens * forward,
        "train": tokens * cfg.passes * step,
        "evaluate": 2.0 + evaluated / (speed.float32 * EFFICIENCY["visit"]),
        "harvests": sum(sum(harvest_seconds(h, [swept], cfg.rows, shape, speed, cached=True).values()) for h in cfg.harvests),
    }


def sweep_seconds(runs: Sequence[TrainConfig], shape: Shape, speed: Speed) -> dict[str, float]:
    """Seconds of each phase of many runs on one stream: one model pass, as deep as the deepest layer, and every run's steps."""
    each = [train_seconds(run, shape, speed) for run in runs]
    total = {name: sum(one[name] for one in each) for name in each[0]}
    return total | {name: max(one[name] for one in each) for name in ("prepare", "collect")}


def evaluate_seconds(cfg: EvaluateJob, layer: int, shape: Shape, speed: Speed) -> float:
    """Seconds of a measurement: z of held-out and training rows, and five losses of which one is of a whole pass."""
    how, context = cfg.evaluate, cfg.rows.context
    read = cfg.rows.heldout_tokens + min(how.dead_tokens, cfg.rows.tokens)
    after = shape.full_flops - shape.pass_flops(layer)
    scored = (how.prose_rows + how.repeated_rows) * context * (shape.full_flops + 4 * after)
    return 2.0 + (read * shape.pass_flops(layer + 1) + scored) / (speed.float32 * EFFICIENCY["visit"])


class Swept(NamedTuple):
    """An SAE, as far as the cost of sweeping it goes."""

    layer: int
    d_sae: int
    k: int


def scan_seconds(tokens: int, layer: int, model: Sized, speed: Speed) -> float:
    """Seconds of reading z of one layer in fp32."""
    return 1.0 + tokens * Shape.of(model).pass_flops(layer + 1) / (speed.float32 * EFFICIENCY["visit"])


def induction_seconds(cfg: InductionStudy, model: Sized, speed: Speed) -> dict[str, float]:
    """Seconds of each phase of a study of induction heads. How many heads there are to cut prefixes for is not known before;
    one in twelve is a guess."""
    shape = Shape.of(model)
    depth = model.n_layers if cfg.layers == "all" else max(cfg.layers) + 1
    per_token = shape.pass_flops(depth) / (speed.float32 * EFFICIENCY["pass"])
    to_end = shape.pass_flops(model.n_layers) / (speed.float32 * EFFICIENCY["pass"])
    layers = model.n_layers if cfg.layers == "all" else len(cfg.layers)
    found = {"synthetic": 1.0 + cfg.samples * cfg.prefixes * cfg.length * to_end}
    if cfg.corpus:
        cut = 2 * cfg.cuts * layers * model.n_heads / 12
        found |= {"text": cfg.text_rows * cfg.rows.context * per_token, "cut": cut * cfg.rows.context * per_token}
    return found


def heads_seconds(cfg: HeadsStudy, model: Sized, speed: Speed) -> dict[str, float]:
    """Seconds of each phase of a study of what heads do. Of its weights, the product that counts is each head's with the
    unembedding of the whole vocabulary."""
    shape = Shape.of(model)
    depth = model.n_layers if cfg.layers == "all" else max(cfg.layers) + 1
    per_token = shape.pass_flops(depth) / (speed.float32 * EFFICIENCY["pass"])
    n_heads = model.n_heads * (model.n_layers if cfg.layers == "all" else len(cfg.layers))
    circuit = 2 * model.d_head * (model.d_model * model.d_vocab + 4 * cfg.vocabulary * model.d_head)
    found = {"random": 1.0 + cfg.samples * cfg.length * per_token}
    if cfg.corpus:
        found |= {"text": cfg.text_rows * cfg.rows.context * per_token}
    return found | {"weights": n_heads * circuit / (speed.float32 * EFFICIENCY["pass"])}


IOI_TOKENS = 22
"""Tokens of a prompt, about."""


def ioi_seconds(cfg: IoiStudy, layer: int, model: Sized, speed: Speed) -> dict[str, float]:
    """Seconds of the indirect-object study: passes that take up at the SAE's layer, and whole ones of changed prompts."""
    shape = Shape.of(model)
    whole = shape.pass_flops(model.n_layers)
    taken_up = cfg.features + 3 * cfg.random + 3
    passes = 3 * (len(cfg.words) + 5) * whole + taken_up * (whole - shape.pass_flops(layer))
    return {"prompts": 1.0 + cfg.samples * IOI_TOKENS * passes / (speed.float32 * EFFICIENCY["pass"])}


def prefix_seconds(cfg: PrefixStudy, layer: int, model: Sized, speed: Speed) -> dict[str, float]:
    """Seconds of each phase of a study of induction features."""
    shape = Shape.of(model)
    rows = cfg.samples * cfg.prefixes * cfg.length / (speed.float32 * EFFICIENCY["pass"])
    whole, before = shape.pass_flops(model.n_layers), shape.pass_flops(layer + 1)
    return {
        "rows": 1.0 + rows * before,
        "controls": rows * before,
        "sources": rows * before / cfg.prefixes,
        "ablations": rows * (whole + (cfg.random + 4) * (whole - before)),
        "controls' losses": rows * whole,
    }


def harvest_seconds(
    cfg: HarvestConfig, saes: Sequence[Swept], rows: RowsConfig, shape: Shape, speed: Speed, *, cached: bool
) -> dict[str, float]:
    """Seconds of each phase of a harvest of some SAEs in one pass; `cached` when their activations are on disk."""
    tokens, context = min(cfg.tokens, rows.tokens), rows.context
    d_sae, n_examples = sum(sae.d_sae for sae in saes), sum(sae.d_sae for sae in saes) * cfg.per_feature
    n_rows = max(tokens // context, 1)
    forward, in_fp32 = shape.pass_flops(max(sae.layer for sae in saes) + 1), speed.float32 * EFFICIENCY["visit"]
    kept = not cached and cfg.keeps_streams(n_rows, context, shape.d_model * len({sae.layer for sae in saes}), d_sae)
    read = 0.0 if cached else forward / (in_fp32 if kept else speed.best * EFFICIENCY["pass"])
    visited = 0.0 if kept else cfg.expected_visits(n_rows, n_examples)
    return {
        "scan": tokens * (read + 2.0 * shape.d_in * d_sae / (speed.float32 * EFFICIENCY["encode"])),
        "choose": len(saes) + n_examples / 50_000,
        "visit": visited * context * forward / in_fp32 + n_examples / 20_000,
        "features": len(saes) + d_sae * 2.0 * shape.d_model * shape.d_vocab / (speed.float32 * EFFICIENCY["pass"]),
        "write": n_examples / ROWS_PER_SECOND,
    }


@dataclass
class _Phase:
    expected: float
    """Seconds for the whole phase, as thought before it began."""
    share: float = 0.0
    """How much of it is done, 0 to 1."""
    first_share: float | None = None
    """Share at the first report of this attempt: what was done before says nothing about our speed."""
    spent: float = 0.0
    """Seconds this attempt has spent in it since that report."""

    @property
    def measured(self) -> float | None:
        """Seconds for the whole phase at the speed seen; None before two percent of it were seen."""
        seen = self.share - (self.first_share or 0.0)
        return self.spent / seen if seen >= 0.02 else None

    @property
    def left(self) -> float:
        return (1.0 - self.share) * (self.measured if self.measured is not None else self.expected)


@dataclass
class Clock:
    """Seconds left of a whole job: what was measured for phases that have begun, the expectation, corrected, for the others."""

    expected: Mapping[str, float]
    """Seconds of each phase, in order."""
    _phases: dict[str, _Phase] = field(init=False)
    _last: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        self._phases = {name: _Phase(seconds) for name, seconds in self.expected.items()}

    def at(self, progress: Progress) -> float:
        """Take in a report and give the seconds left."""
        return self.at_time(progress, time.monotonic())

    def at_time(self, progress: Progress, when: float) -> float:
        """`at`, at a given time."""
        if progress.phase not in self._phases:  # one that nobody expected, such as rows that must be cut again first
            self._phases = {progress.phase: _Phase(0.0)} | self._phases
        phase = self._phases[progress.phase]
        if self._last:
            before, then = self._last
            # Collecting and training take turns, so what passed between two reports belongs to the phase of the second,
            # but for the very first report of a phase, which ends the phase before.
            if phase.first_share is not None or before == progress.phase:
                phase.spent += when - then
        phase.share = min(progress.done / progress.total, 1.0) if progress.total else 1.0
        if phase.first_share is None:
            phase.first_share = phase.share
        self._last = (progress.phase, when)
        return self.seconds_left(progress.phase)

    def seconds_left(self, now_in: str) -> float:
        """Seconds left, being in phase `now_in`."""
        names = list(self._phases)
        if now_in in ("train", "collect"):  # the two take turns
            now_in = min((n for n in ("collect", "train") if n in names), key=names.index)
        begun = names.index(now_in)
        factor = self._correction()
        left = 0.0
        for index, name in enumerate(names):
            phase = self._phases[name]
            if phase.measured is not None or phase.first_share is not None:
                left += phase.left if index >= begun else 0.0
            elif index > begun:
                left += phase.expected * factor
        return left

    def _correction(self) -> float:
        """How much slower than expected the phases seen so far are, all together; 1 before any was seen."""
        seen = [phase for phase in self._phases.values() if phase.measured is not None and phase.expected > 0]
        expected = sum(phase.expected for phase in seen)
        measured = sum(phase.measured or 0.0 for phase in seen)
        return min(max(measured / expected, 0.1), 20.0) if expected > 0 else 1.0
