"""What a harvest says of features, beside what the scan counted: families, verdicts, logits, on a harvest of a tiny model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core import attribution, heads
from sae_core.config import HarvestConfig
from sae_core.detectors import FAMILIES, family_of
from sae_core.feature_table import REFERENCES, FeatureTable
from sae_core.harvest import Files, HarvestResult, harvest
from sae_core.lens import Lens
from sae_core.saes.base import SAE
from tests.core.tiny_harvest import LAYER, tiny_rows, tiny_sae

CFG = HarvestConfig(
    tokens=10_000, top_k=6, bands=2, per_band=3, shard_rows=8, batch_rows=4, neighbours=3, logits=5, model_dtype="float32"
)


@pytest.fixture(scope="module")
def made(tiny_lens: Callable[[str], Lens], tmp_path_factory: pytest.TempPathFactory) -> tuple[Lens, SAE, HarvestResult, Path]:
    lens, rows, folder = tiny_lens("llama"), tiny_rows(vocabulary=12), tmp_path_factory.mktemp("harvest")
    sae = tiny_sae(lens, rows)
    reports = harvest(lens, sae, rows, CFG, folder)
    while True:
        try:
            next(reports)
        except StopIteration as end:
            return lens, sae, end.value, folder


def test_logit_histograms_count_the_whole_vocabulary_between_its_extremes(
    made: tuple[Lens, SAE, HarvestResult, Path],
) -> None:
    lens, sae, result, _ = made
    logits = lens.logit_weights(sae.W_dec, LAYER).numpy()
    for record in result.features:
        if record.n_fired == 0:
            assert record.logits == {}
            continue
        mine, edges, counts = logits[record.idx], record.logits["edges"], record.logits["counts"]
        assert sum(counts) == len(mine)
        assert (edges[0], edges[-1]) == (pytest.approx(mine.min(), rel=1e-3), pytest.approx(mine.max(), rel=1e-3))
        middle = sum(counts[: len(counts) // 2])
        assert abs(middle - (mine < edges[len(counts) // 2]).sum()) <= 2  # rounded edges may pass by a token or two


def test_families_are_clearest_first_and_name_examples_that_are_kept(made: tuple[Lens, SAE, HarvestResult, Path]) -> None:
    _, _, result, _ = made
    kept = {(e.feature, e.band, e.rank) for e in result.examples}
    named = 0
    for record in result.features:
        scores = [found["score"] for found in record.families]
        assert scores == sorted(scores, reverse=True)
        assert record.family in {found["family"] for found in record.families} | {None}
        assert (record.family is None) == (record.families == []) == (record.verdict is None) == (record.family_score is None)
        for found in record.families:
            top = [place for place in found["examples"] if place[0] == 0]
            assert len(top) <= REFERENCES[0]
            assert len(found["examples"]) - len(top) <= REFERENCES[1]
            assert found["examples"] == sorted(found["examples"])
            assert {(record.idx, *place) for place in found["examples"]} <= kept
            named += len(found["examples"])
    assert named >= 5, "the tiny harvest gives too few families to test anything"


def test_the_family_is_the_most_specific_that_holds_and_its_score_the_mean_over_the_strongest(
    made: tuple[Lens, SAE, HarvestResult, Path],
) -> None:
    _, _, result, _ = made
    for record in result.features:
        held = {found["family"]: found["score"] for found in record.families}
        assert record.family == family_of([name in held for name in FAMILIES])
        if record.family == "previous token":
            assert record.family_score == pytest.approx(record.evidence["previous"], abs=1e-3)
        if record.family == "row start":
            assert record.family_score == pytest.approx(record.evidence["row_start"], abs=1e-3)


def test_a_table_with_families_reads_back_the_same(made: tuple[Lens, SAE, HarvestResult, Path]) -> None:
    _, sae, result, folder = made
    again = FeatureTable.load(Files(folder).features)
    for a, b in zip(result.features, again, strict=True):
        assert (a.families, a.verdict, a.family_score, a.logits, a.evidence) == (
            b.families, b.verdict, b.family_score, b.logits, b.evidence,
        )  # fmt: skip
    assert [vars(head) for head in heads.summaries(again, sae)] == [vars(head) for head in heads.summaries(result.features, sae)]


def test_every_live_feature_is_led_by_one_head_in_each_way(made: tuple[Lens, SAE, HarvestResult, Path]) -> None:
    _, sae, result, _ = made
    found = heads.summaries(result.features, sae)
    records = [record for record in result.features if record.n_fired]
    assert sum(head.n_led for head in found) == sum(head.n_led_norm for head in found) == len(records)
    for head in found:
        assert head.n_led == sum(record.top_head_dfa == head.head for record in records)
        assert head.n_led_norm == sum(record.top_head == head.head for record in records)
        assert sum(head.families.values()) == head.n_led
        slices = sae.W_dec.unflatten(1, (sae.cfg.n_heads, -1))[:, head.head].numpy()
        top = [idx for idx, _ in head.detail["top"]]
        assert top == sorted(top, key=lambda idx, at=head.head: -result.features.record(idx).head_norm[at])
        written = np.concatenate([np.sqrt(r.n_fired) * r.mean_act * slices[r.idx][None] for r in records])
        e = np.linalg.svd(written, compute_uv=False) ** 2
        assert head.diversity == pytest.approx(e.sum() ** 2 / (e**2).sum(), rel=1e-3)


def test_what_lowers_the_token_that_it_read_is_found_by_looking_at_all(made: tuple[Lens, SAE, HarvestResult, Path]) -> None:
    """`attribution.lowered_in_row` on the harvest's rows, against a loop over the tokens of each."""
    lens, sae, _, _ = made
    rows, logits = tiny_rows(vocabulary=12).train.astype(np.int64), lens.logit_weights(sae.W_dec, LAYER)
    draw = np.random.default_rng(0)
    n = 200
    which, feature, dest = draw.integers(0, len(rows), n), draw.integers(0, len(logits), n), draw.integers(2, 20, n)
    token = np.array([rows[r, draw.integers(1, d)] for r, d in zip(which, dest, strict=True)])
    lower = logits.clone()
    # A third of them are made to be the lowest of all, else hardly one in thirty would be.
    for i in range(0, n, 3):
        lower[feature[i], token[i]] = -100 - i
    found = attribution.lowered_in_row(lower, *(torch.from_numpy(part) for part in (feature, token, rows[which], dest)))
    for i in range(n):
        mine = lower[feature[i]].tolist()
        among = sum(value < mine[token[i]] for value in mine) < 10
        near = [t for t in rows[which[i], : dest[i] + 1].tolist() if t != 0]
        assert bool(found[i]) == (among and min(mine[t] for t in near) >= mine[token[i]])
    assert 20 < int(found.sum()) < n / 2
