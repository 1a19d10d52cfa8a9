"""How fast a harvest's parts are on this machine, from doing a little of each: what a plan of a long one is made of.

A made SAE stands for the one that is planned: features are directions of the layer's own z, and one threshold makes as many of
them fire on a token as asked for. What a part costs does not depend on what its features mean.
"""

import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sae_core.config import HarvestConfig, SAEConfig, Site
from sae_core.corpus import Rows
from sae_core.harvest import Files, Scanner, choose, features, scan_shard, swept_rows, visit, visit_parts
from sae_core.lens import Lens
from sae_core.machine import resolve_dtype
from sae_core.saes.base import SAE, row_starts
from sae_core.saes.batchtopk import BatchTopKSAE
from sae_core.tally import PENDING, Bars

ROWS = 32
"""Rows of the small harvests."""
FEATURES = (512, 4096)
"""Features of the small harvests. The difference of the two is what examples and features cost, without what any harvest does."""
REPEATS = 3


@dataclass(frozen=True)
class HarvestRates:
    """Seconds of each unit of a harvest's work."""

    read: float
    """A token of the model pass to z of the layer."""
    scan: float
    """A token of encoder, sums and candidates, of one SAE."""
    visit_row: float
    """A row in the fp32 visit."""
    example: float
    """An example there."""
    feature: float
    """What is said of a live feature: logits, neighbours, evidence."""


def harvest_rates(lens: Lens, layer: int, d_sae: int, k: int, context: int, cfg: HarvestConfig) -> HarvestRates:
    """Measure for an SAE of `d_sae` features, `k` of them active on a token, at `layer`; half a minute or so on two cores."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lens.info.d_vocab, (ROWS, context), generator=generator).to(lens.device)
    tokens[:, 0] = lens.row_start
    batch = tokens[: cfg.batch_rows]
    dtype = resolve_dtype(cfg.model_dtype, lens.device)
    z = lens.read_z(batch, [layer], dtype)[layer]
    read = _seconds(lambda: lens.read_z(batch, [layer], dtype)) / batch.numel()

    sae = made_sae(lens, layer, z, d_sae, k)
    starts = row_starts(batch, lens.row_start)
    scanner = Scanner(sae, range(0), cfg, context, 0.0, PENDING, Bars.none(d_sae, lens.device))

    def take_in() -> None:
        scanner.take_in(z, 0, starts)
        scanner.tallier.digest()

    scan = _seconds(take_in) / batch.numel()

    rows = Rows(
        Path("none"), context, lens.row_start, tokens.cpu().numpy().astype(np.int32), np.zeros((0, context), np.int32), ""
    )
    small = HarvestConfig(
        tokens=tokens.numel(), top_k=2, bands=1, per_band=0, batch_rows=cfg.batch_rows, model_dtype=cfg.model_dtype
    )
    few, many = (_small_harvest(lens, made_sae(lens, layer, z, n, max(1, k * n // d_sae)), rows, small) for n in FEATURES)
    example = max((many.visit / many.rows - few.visit / few.rows), 0.0) / max(
        many.examples / many.rows - few.examples / few.rows, 1e-9
    )
    visit_row = max(few.visit - few.examples * example, 0.0) / few.rows
    feature = (many.features - few.features) / max(many.live - few.live, 1)
    if feature <= 0:  # a neighbour of this process was busy meanwhile
        feature = many.features / max(many.live, 1)
    return HarvestRates(read, scan, visit_row, example, feature)


def made_sae(lens: Lens, layer: int, z: torch.Tensor, d_sae: int, k: int) -> SAE:
    """An SAE whose features are z of some tokens [b, pos, d_in] less their mean, and mixtures of two where those are too few."""
    generator, info = torch.Generator().manual_seed(d_sae), lens.info
    flat = z[:, 1:].flatten(0, 1).float()
    mean = flat.mean(0)
    draw = torch.randint(len(flat), (2, d_sae), generator=generator).to(z.device)
    mix = torch.rand(d_sae, 1, generator=generator).to(z.device)
    directions = torch.nn.functional.normalize(mix * flat[draw[0]] + (1 - mix) * flat[draw[1]] - mean, dim=1)
    some = ((flat[:256] - mean) @ directions.T).flatten()
    threshold = some.topk(max(1, min(len(some), round(k * len(flat[:256]))))).values.min().clamp_min(1e-6)
    cfg = SAEConfig(
        arch="batchtopk",
        d_in=info.d_in,
        d_sae=d_sae,
        k=k,
        n_heads=info.n_heads,
        d_head=info.d_head,
        site=Site(layer=layer),
        model=info.name,
        model_fingerprint=info.fingerprint,
        processing=info.processing,
        scale=1.0,
        max_norm=None,
        context=z.shape[1],
    )
    tensors = {
        "W_enc": directions.T.contiguous(),
        "b_enc": torch.zeros(d_sae),
        "W_dec": directions,
        "b_dec": mean,
        "threshold": threshold.expand(d_sae).clone(),
    }
    return BatchTopKSAE(cfg, tensors).to(z.device)


def _seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call: the median of some, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


@dataclass(frozen=True)
class _Small:
    rows: int
    examples: int
    live: int
    visit: float
    features: float


def _small_harvest(lens: Lens, sae: SAE, rows: Rows, cfg: HarvestConfig) -> _Small:
    """A whole harvest of few rows, its last two phases timed."""
    with tempfile.TemporaryDirectory(prefix="headscope-") as name:
        files = Files(Path(name))
        n_rows = swept_rows(rows, cfg)
        whole = range(n_rows)
        deque(scan_shard(lens, [sae], rows, whole, cfg, [files.shard(whole)]), maxlen=0)
        chosen = choose([files.shard(whole)], sae, rows, cfg, files.selection)
        begun = time.perf_counter()
        parts = []
        for number, part in enumerate(visit_parts([chosen], cfg)):
            parts.append(files.part(number))
            deque(visit(lens, [sae], rows, [chosen], part, cfg, [parts[-1]]), maxlen=0)
        visited = time.perf_counter()
        table = features(lens, sae, chosen, parts, cfg, files.features)
        described = time.perf_counter()
    return _Small(len(chosen.rows), len(chosen.feature), table.totals.n_live, visited - begun, described - visited)
