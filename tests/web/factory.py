"""Fills a database with a small harvest whose numbers are consistent: every example's DFA and bias give its pre-activation.

Only tests use it. The texts and the numbers are made up; what is faithful is their form and how they hang together.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.records import ExampleRecord
from server.db import Database
from server.packing import F4, I4, pack, pack_acts, pack_dfa
from server.tables import (
    SAE,
    Context,
    Corpus,
    Example,
    Feature,
    FeatureDetail,
    FeatureHead,
    Harvest,
    HeadSummary,
    Job,
    JobLog,
    JobPoint,
    Model,
    Worker,
)

PROSE = (
    "The tide had gone out further than anyone remembered, and the boats lay on their sides in the mud. Old Maren said the "
    "tide would come back before dark; the tide always came back. Nobody asked her how she knew.\n\nBy four o'clock",
    "def read_rows(path: Path) -> list[Row]:\n    rows = []\n    for line in path.read_text().splitlines():\n"
    "        rows.append(parse_row(line))\n    return rows\n\nfor row in read_rows(path):\n    print(row)",
    "In 1846 the planet Neptune was found within a degree of where Le Verrier had said it would be. Le Verrier never looked "
    "for Neptune himself; he had found it, as Arago put it, with the point of his pen. Adams had made the same",
    "Beat the butter and sugar until pale, then add the eggs one at a time, beating well after each. Fold in the flour and "
    "the ground almonds. Spoon the mixture into the tin, level the top, and bake until a skewer comes out clean. Let the",
    "Q: What is the capital of Australia? A: Canberra. Q: What is the capital of Canada? A: Ottawa. Q: What is the capital "
    "of Kenya? A: Nairobi. Q: What is the largest city of Australia? A: Sydney. Q: What is the largest city of",
    "Dear Mr. Okafor, thank you for your letter of the third. We have looked into the matter of the missing parcel, and I am "
    "sorry to say that the parcel was delivered to the wrong address. Mr. Okafor, please accept our",
)
START = "<|endoftext|>"
SAMPLE = {"n": 12, "distance": [[0, 1, 0.25], [1, 2, 0.4], [2, 4, 0.05]], "start_share": 0.3, "heads": 2.5, "sources": 6.1}
FAMILIES = ("induction", "previous token", "local", "long-range", None)


@dataclass
class Shape:
    """How large, and how hostile, the harvest is."""

    n_features: int = 60
    n_dead: int = 5
    n_heads: int = 9
    n_layers: int = 30
    layer: int = 17
    context: int = 64
    n_top: int = 6
    n_bands: int = 3
    per_band: int = 2
    sae: str = "smollm2-l17"
    seed: int = 0
    texts: Sequence[str] = PROSE
    vocabulary: Sequence[str] | None = None
    """Token texts to use instead of prose: hostile ones, for example."""
    running_job: bool = True
    metrics: dict[str, Any] = field(default_factory=lambda: METRICS)


EVIDENCE = {
    "row_start": 0.04, "induction": 0.61, "induction_chance": 0.021, "previous": 0.07, "current": 0.02, "duplicate": 0.09,
    "duplicate_chance": 0.02, "near": 0.31, "far": 0.22, "distance": 18.3, "top_share": 0.55, "source_logit": 2.4, "examples": 20,
}  # fmt: skip


def told(idx: int, shape: Shape) -> dict[str, Any]:
    """The families, the verdict, and what else a harvest keeps of a live feature."""
    family = FAMILIES[idx % len(FAMILIES)]
    found = [] if family is None else [{"family": family, "score": 0.83, "examples": [[0, 0], [0, 2], [1, 1]]}]
    if family == "induction":
        found.append({"family": "duplicate token", "score": 0.55, "examples": [[0, 1]]})
    partners = [[(idx + 3) % shape.n_features, 40, 0.61], [(idx + 9) % shape.n_features, 12, 0.2]]
    heights = (1000 * np.exp(-(np.linspace(-3, 3, 40) ** 2))).astype(int).tolist()
    return {
        "families": found,
        "verdict": {"induction": "' board' is next by induction", "local": "reads the last few tokens"}.get(family or ""),
        "logits": {"edges": np.linspace(-4, 4, 41).tolist(), "counts": heights},
        "positions": [[1, 1, 3, 8192, 1.5], [2, 3, 9, 16384, 1.25], [4, 63, 200, 491520, 2.0]],
        "coactive": {"tokens": 65536, "pairs": partners},
        "sample": SAMPLE,
    }  # fmt: skip


def interval(value: float, half: float) -> dict[str, float]:
    """A value with its 95 % interval."""
    return {"mean": value, "low": value - half, "high": value + half}


METRICS: dict[str, Any] = {
    "reconstruction": {
        "tokens": 65024, "l0": 31.4, "fvu": 0.243, "dead": 0.0009, "dead_tokens": 100_000,
        "fvu_by_head": [0.2, 0.31, 0.27, 0.18, 0.24, 0.29, 0.22, 0.35, 0.26],
        "variance_by_head": [0.1, 0.12, 0.08, 0.14, 0.11, 0.09, 0.13, 0.12, 0.11],
    },
    "spectrum": {"singular": [[0.4, 0.3, 0.2, 0.1]] * 9, "effective": [3.1, 3.0, 2.9, 2.2, 1.9, 3.5, 3.6, 2.8, 3.3], "d_head": 4},
    "prose": {
        "rows": 512, "tokens": 65024, "clean": 3.012, "sae": 3.0142, "zero": 3.0312, "mean": 3.0265,
        "sae_minus_clean": interval(0.0022, 0.0008), "zero_minus_clean": interval(0.0192, 0.0019),
        "mean_minus_clean": interval(0.0145, 0.0147), "recovered_zero": 0.885, "recovered_mean": None,
        "note": "mean ablation moves the loss by 0.014 nats, within its own interval",
    },
    "repeated": {
        "rows": 64, "tokens": 4064, "clean": 0.412, "sae": 0.455, "zero": 1.93, "mean": 1.88,
        "sae_minus_clean": interval(0.043, 0.006), "zero_minus_clean": interval(1.518, 0.05),
        "mean_minus_clean": interval(1.468, 0.05), "recovered_zero": 0.972, "recovered_mean": 0.971, "note": None,
    },
}  # fmt: skip


def tokenise(text: str) -> list[str]:
    """Words with their leading space, punctuation and line ends, like a subword tokenizer would give for plain text."""
    return re.findall(r" ?[A-Za-z]+| ?\d+|\n| {2,}| ?[^\sA-Za-z\d]", text)


def fill(database: Database, shape: Shape | None = None) -> Shape:
    """Upgrade the database and put one published harvest in it."""
    shape = shape or Shape()
    database.upgrade()
    with database.write() as session:
        add_sae(session, shape)
    return shape


def add_sae(session: Session, shape: Shape) -> None:
    """A model, a corpus, a finished training job, an SAE, its published harvest, and a running job."""
    rng = np.random.default_rng(shape.seed)
    at = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
    model = session.scalar(sa.select(Model)) or Model(
        name="smollm2-135m", source={"location": "x.gguf"}, n_layers=shape.n_layers, n_heads=shape.n_heads,
        n_kv_heads=3, d_head=64, d_model=576, d_vocab=49152,
    )  # fmt: skip
    corpus = session.scalar(sa.select(Corpus)) or Corpus(name="demo", source={"location": "demo"})
    job = Job(
        id=f"train-{shape.sae}-1", kind="train", title=f"Train {shape.sae}", config={"model": "smollm2-135m", "k": 32},
        status="done", attempt=1, worker="worker-0", phase="evaluate", done=100, total=100, created_at=at,
        started_at=at, finished_at=at + timedelta(minutes=6),
    )  # fmt: skip
    session.add_all([model, corpus, job])
    session.flush()
    for step in range(0, 500, 5):
        decay = float(np.exp(-step / 80))
        values = {
            "loss": 0.25 + 0.9 * decay + 0.01 * rng.random(),
            "fvu": 0.24 + 0.7 * decay,
            "l0": 32 + 96 * decay,
            "dead": 0.01,
        }
        session.add(JobPoint(job_id=job.id, step=step, values=values))
    session.add_all(JobLog(job_id=job.id, text=text) for text in ("Reading rows.", "Trained 500 steps.", "Published."))
    sae = SAE(
        name=shape.sae, model_id=model.id, layer=shape.layer, hook=f"blocks.{shape.layer}.attn.hook_z", arch="batchtopk",
        d_in=shape.n_heads * 64, d_sae=shape.n_features, k=32, n_heads=shape.n_heads, config={"k": 32, "arch": "batchtopk"},
        metrics=shape.metrics, folder=f"saes/{shape.sae}", sha256=f"{shape.seed:02d}" * 32, job_id=job.id,
    )  # fmt: skip
    session.add(sae)
    session.flush()
    harvest = Harvest(
        sae_id=sae.id, corpus_id=corpus.id, job_id=f"harvest-{shape.sae}", config={"window": 256, "top_k": shape.n_top},
        status="published", n_tokens=1_040_384, n_rows=8192, n_live=shape.n_features - shape.n_dead, context=shape.context,
        worst_gap=3.1e-6, published_at=at + timedelta(minutes=9),
    )  # fmt: skip
    session.add(harvest)
    session.flush()
    sae.harvest_id = harvest.id
    contexts = add_contexts(session, harvest.id, shape, rng)
    for idx in range(shape.n_features):
        add_feature(session, harvest, contexts, idx, shape, rng)
    add_heads(session, harvest.id, shape)
    if shape.running_job:
        add_running_job(session, at)


def add_running_job(session: Session, at: datetime) -> None:
    """A training run half way through, and its worker."""
    config = {"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 18}, "k": 32}
    session.add(
        Job(
            id="train-running-1",
            kind="train",
            title="Train layer 18 of smollm2-135m",
            config=config,
            status="running",
            attempt=1,
            worker="worker-0",
            phase="train",
            done=524_288,
            total=1_048_576,
            rate=9120.0,
            seconds_left=171.0,
            created_at=at + timedelta(hours=1),
            started_at=at + timedelta(hours=1),
        )
    )
    session.flush()
    session.add(Worker(id="worker-0", device="cpu, 2 cores", pid=1, last_seen=datetime.now(UTC)))
    session.add_all(
        JobPoint(job_id="train-running-1", step=step, values={"loss": 0.3 + 0.8 * float(np.exp(-step / 40)), "l0": 60.0})
        for step in range(0, 120, 2)
    )
    session.add(JobLog(job_id="train-running-1", text="Collected 1 048 576 tokens in 88 s."))


def add_heads(session: Session, harvest_id: int, shape: Shape) -> None:
    """What each head's features do, with as many led by weights as the features say."""
    led = sa.select(Feature.top_head).where(Feature.harvest_id == harvest_id, Feature.n_fired > 0)
    n_led_norm = Counter(session.scalars(led))
    session.add_all(
        HeadSummary(
            harvest_id=harvest_id, head=head, n_led=3 * head, n_led_norm=n_led_norm[head],
            families={"induction": 2 * head, "unclear": head} if head else {}, diversity=0.9 if head else None,
            polysemantic=head / 10 if head else None,
            detail={
                "top": [[head, 0.9], [head + 1, 0.8]], "top_dfa": [[head, 0.7]], "in_both": 1, "participation": 2.5,
                "polysemantic_of_many": 0.75, "related_by": {"family": 0.4, "direction": 0.1, "tokens": 0.2},
            },
        )
        for head in range(shape.n_heads)
    )  # fmt: skip


def add_contexts(session: Session, harvest_id: int, shape: Shape, rng: np.random.Generator) -> list[Context]:
    """Rows of text, each beginning with the row start."""
    contexts = []
    for row in range(40):
        if shape.vocabulary:
            words = [str(rng.choice(shape.vocabulary)) for _ in range(shape.context - 1)]
        else:
            words = tokenise(shape.texts[row % len(shape.texts)])
            words = (words[row // len(shape.texts) :] + words)[: shape.context - 1]
            words += [" and"] * (shape.context - 1 - len(words))
        ids = pack(rng.integers(0, 49152, shape.context), I4)
        contexts.append(Context(harvest_id=harvest_id, row=row * 7, tokens=ids, texts=[START, *words]))
    session.add_all(contexts)
    session.flush()
    return contexts


def add_feature(
    session: Session, harvest: Harvest, contexts: Sequence[Context], idx: int, shape: Shape, rng: np.random.Generator
) -> None:
    """A feature with its detail, its shares by head and its examples."""
    dead = idx % (shape.n_features // shape.n_dead) == 7 if shape.n_dead else False
    norm = rng.dirichlet(np.full(shape.n_heads, 0.4)).astype(np.float32)
    n_fired = 0 if dead else int(10 ** rng.uniform(1.5, 4.6))
    made = [] if dead else make_examples(contexts, norm, shape, rng)
    by_head = np.mean([m.dfa.sum(1) for m in made], 0) if made else np.zeros(shape.n_heads)
    spread = np.std([m.dfa.sum(1) for m in made], 0) if made else np.zeros(shape.n_heads)
    shares = np.abs(by_head) / np.abs(by_head).sum() if made else np.zeros(shape.n_heads)
    top = max((m.preact for m in made), default=0.0)
    low = min((m.preact for m in made), default=0.0)
    feature = Feature(
        harvest_id=harvest.id, idx=idx, n_fired=n_fired, density=n_fired / harvest.n_tokens, max_act=top,
        mean_act=float(np.mean([m.preact for m in made])) if made else 0.0, top_head=int(norm.argmax()),
        top_head_share=float(norm.max()), top_head_dfa=None if dead else int(shares.argmax()),
        top_head_dfa_share=None if dead else float(shares.max()),
        distance=None if dead or idx % 11 == 3 else float(rng.uniform(1, 30)),
        family=None if dead else FAMILIES[idx % len(FAMILIES)],
        family_score=None if dead or FAMILIES[idx % len(FAMILIES)] is None else 0.83, shuffle_key=int(rng.integers(0, 2**31)),
    )  # fmt: skip
    session.add(feature)
    session.flush()
    edges = np.geomspace(max(low, 0.1) * 0.8, max(top, 0.2), 25)
    counts = (n_fired * np.exp(-np.arange(24) / 5) / 5.5).astype(int)
    bands = np.geomspace(max(low, 0.1), max(top, 0.2), shape.n_bands + 1)[::-1]
    words = [[int(rng.integers(49152)), str(rng.choice(contexts[int(rng.integers(40))].texts[1:])), 0.0] for _ in range(20)]
    logits = np.sort(rng.gamma(2, 0.6, 10))[::-1]
    session.add(
        FeatureDetail(
            feature_id=feature.id,
            histogram={"edges": edges.tolist(), "counts": counts.tolist()} if not dead else {"edges": [], "counts": []},
            bands=[]
            if dead
            else [
                {"low": float(low_), "high": float(high), "count": n_fired // (shape.n_bands + 1 - i)}
                for i, (high, low_) in enumerate(pairwise(bands))
            ],
            head_norm=pack(norm, F4),
            head_dfa=pack(by_head, F4),
            head_dfa_std=pack(spread, F4),
            promoted=[[w[0], w[1], float(v)] for w, v in zip(words[:10], logits, strict=True)],
            suppressed=[[w[0], w[1], -float(v)] for w, v in zip(words[10:], logits * 0.8, strict=True)],
            neighbours=[[(idx + step) % shape.n_features, round(0.9 - 0.07 * step, 3)] for step in range(1, 8)],
            evidence={} if dead else EVIDENCE,
            **({} if dead else told(idx, shape)),
        )
    )
    session.add_all(
        FeatureHead(
            harvest_id=harvest.id,
            head=head,
            idx=idx,
            norm_share=float(norm[head]),
            dfa=None if dead else float(by_head[head]),
            dfa_share=None if dead else float(shares[head]),
        )
        for head in range(shape.n_heads)
    )
    made.sort(key=lambda m: -m.preact)
    places = [(0, rank) for rank in range(shape.n_top)]
    places += [(band, rank) for band in range(1, shape.n_bands + 1) for rank in range(shape.per_band)]
    session.add_all(m.row(feature.id, band, rank) for (band, rank), m in zip(places, made, strict=False))


DFA = np.dtype([("src", int), ("head", int), ("value", float)])


@dataclass
class Made:
    """An example before it is packed."""

    context: Context
    dest: int
    dfa: np.ndarray[Any, np.dtype[np.float64]]  # [head, source]
    bias: float
    acts: list[tuple[int, float]]

    @property
    def preact(self) -> float:
        """By the identity that the pages show."""
        return float(self.dfa.sum() + self.bias)

    def row(self, feature_id: int, band: int, rank: int, keep: int = 24) -> Example:
        """As the database holds it: the largest entries, the rest as a sum per head."""
        order = np.argsort(-np.abs(self.dfa), axis=None)[:keep]
        heads, sources = np.unravel_index(order, self.dfa.shape)
        entries = np.array(
            [(src, head, self.dfa[head, src]) for head, src in zip(heads, sources, strict=True) if self.dfa[head, src] != 0], DFA
        )
        kept = np.zeros(len(self.dfa))
        np.add.at(kept, entries["head"], entries["value"])
        pos, value = zip(*self.acts, strict=True)
        found = ExampleRecord(
            feature=0, band=band, rank=rank, row=0, dest=self.dest, start=0, act=self.preact, preact=self.preact, bias=self.bias,
            gap=0.0, abs_dfa=float(np.abs(self.dfa).sum()), acts_pos=np.array(pos), acts_value=np.array(value),
            dfa_src=entries["src"], dfa_head=entries["head"], dfa_value=entries["value"],
            dropped=self.dfa.sum(1) - kept, before=np.zeros(len(self.dfa)),
        )  # fmt: skip
        return Example(
            feature_id=feature_id, context_id=self.context.id, band=band, rank=rank, dest=self.dest, start=0, act=self.preact,
            acts=pack_acts([found])[0], dfa=pack_dfa([found])[0],
        )  # fmt: skip


def make_examples(contexts: Sequence[Context], norm: np.ndarray[Any, Any], shape: Shape, rng: np.random.Generator) -> list[Made]:
    """Examples in distinct rows: one strong source, some weaker ones, a few negative, and a little everywhere."""
    made = []
    wanted = shape.n_top + shape.n_bands * shape.per_band
    strength = float(rng.uniform(3, 14))
    for place, row in enumerate(rng.permutation(len(contexts))[:wanted]):
        context = contexts[int(row)]
        dest = int(rng.integers(12, shape.context - 6))
        size = strength * (1 - 0.85 * place / wanted)
        dfa = rng.normal(0, 0.01, (shape.n_heads, dest + 1))
        weights = norm / norm.sum()
        for part, sign in ((0.7, 1), (0.25, 1), (0.15, 1), (0.18, -1)):
            source = int(rng.integers(1, dest + 1))
            dfa[:, source] += sign * part * size * weights * rng.uniform(0.6, 1.4, shape.n_heads)
        dfa[:, 0] += 0.05 * size * weights
        bias = -float(rng.uniform(0.1, 0.4))
        preact = float(dfa.sum() + bias)
        if preact <= 0.1:
            continue
        near = [(position, preact * float(rng.uniform(0.1, 0.6))) for position in (dest - 7, dest + 2) if rng.random() < 0.4]
        made.append(Made(context, dest, dfa, bias, sorted([*near, (dest, preact)])))
    return made
