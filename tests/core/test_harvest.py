"""A harvest of a tiny model, each step against brute force on dense activations."""

import dataclasses
import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sae_core import choice
from sae_core import harvest as harvest_module
from sae_core import visit as visit_module
from sae_core.config import HarvestConfig, Site
from sae_core.corpus import Rows
from sae_core.errors import SAEMismatch
from sae_core.harvest import (
    FeatureTable,
    Files,
    HarvestResult,
    Selection,
    choose,
    examples,
    features,
    harvest,
    harvest_many,
    row_records,
    scan_shard,
    shards,
    swept_rows,
    visit,
    visit_parts,
)
from sae_core.lens import AttentionRead, Entry, Lens
from sae_core.progress import Progress
from sae_core.records import ExampleRecord
from sae_core.saes.base import SAE, check_fits
from sae_core.tally import CELL_EDGES, Tally
from sae_core.visit import window_start
from tests.core.tiny_harvest import LAYER, starts_of, tiny_rows, tiny_sae, z_of

CFG = HarvestConfig(
    tokens=10_000, top_k=4, bands=3, per_band=2, shard_rows=8, batch_rows=4, neighbours=3, logits=5, model_dtype="float32"
)


class Set(SimpleNamespace):
    """A tiny model, its SAE, its rows, and the dense activations [rows, pos, F] with excluded destinations at 0."""

    lens: Lens
    sae: SAE
    rows: Rows
    acts: np.ndarray[Any, Any]
    z: torch.Tensor


@pytest.fixture(scope="module")
def tiny(tiny_lens: Callable[[str], Lens]) -> Set:
    lens, rows = tiny_lens("llama"), tiny_rows()
    sae = tiny_sae(lens, rows)
    z = z_of(lens, rows)
    acts = sae.encode(z)
    acts[sae.excluded(z, starts_of(rows))] = 0
    return Set(lens=lens, sae=sae, rows=rows, acts=acts.numpy(), z=z)


def run(tiny: Set, folder: Path, cfg: HarvestConfig = CFG) -> HarvestResult:
    reports = harvest(tiny.lens, tiny.sae, tiny.rows, cfg, folder)
    while True:
        try:
            next(reports)
        except StopIteration as end:
            result: HarvestResult = end.value
            return result


@pytest.fixture(scope="module")
def whole(tiny: Set, tmp_path_factory: pytest.TempPathFactory) -> HarvestResult:
    return run(tiny, tmp_path_factory.mktemp("harvest"))


def scanned(tiny: Set, folder: Path, cfg: HarvestConfig = CFG) -> list[Path]:
    paths = []
    for shard in shards(swept_rows(tiny.rows, cfg), cfg):
        paths.append(Files(folder).shard(shard))
        list(scan_shard(tiny.lens, [tiny.sae], tiny.rows, shard, cfg, [paths[-1]]))
    return paths


def alike(rows: Rows, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """The rule for near-duplicates, with the exact Jaccard similarity."""

    def window(row: int, pos: int, before: int, after: int) -> list[int]:
        return rows.train[row, max(0, pos - before) : pos + after + 1].tolist()

    if window(*a, choice.SAME_TOKENS - 1, 0) == window(*b, choice.SAME_TOKENS - 1, 0):
        return True
    sets = [set(itertools.pairwise(window(*x, choice.WINDOW_BEFORE, choice.WINDOW_AFTER))) for x in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1]) >= choice.ALIKE


def brute_top(tiny: Set, feature: int, k: int) -> list[tuple[int, int]]:
    acts = tiny.acts[:, :, feature]
    best = sorted((-row.max(), i, int(row.argmax())) for i, row in enumerate(acts) if row.max() > 0)
    chosen: list[tuple[int, int]] = []
    for _, row, pos in best[: choice.OVERSAMPLE * k]:
        if len(chosen) < k and not any(alike(tiny.rows, (row, pos), other) for other in chosen):
            chosen.append((row, pos))
    return chosen


# ---- scan and choose ----


def test_sums_equal_those_of_dense_activations(tiny: Set, whole: HarvestResult) -> None:
    fired = tiny.acts > 0
    assert fired.sum() > 500
    np.testing.assert_array_equal(whole.selection.count, fired.sum((0, 1)))
    np.testing.assert_allclose(whole.selection.total, tiny.acts.sum((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(whole.selection.highest, tiny.acts.max((0, 1)), rtol=1e-4)
    excluded = tiny.sae.excluded(tiny.z, starts_of(tiny.rows))
    assert int(excluded.sum()) > len(tiny.rows.train)  # row starts, and a few of large norm
    assert whole.selection.n_tokens == int((~excluded).sum())
    np.testing.assert_array_equal(whole.selection.histogram.sum(1), whole.selection.count)


def test_head_means_over_every_firing_are_what_the_heads_gave(tiny: Set, whole: HarvestResult) -> None:
    n_heads = tiny.sae.cfg.n_heads
    w = tiny.sae.W_enc.T.unflatten(1, (n_heads, -1))
    given = torch.einsum("npkd,fkd->npfk", tiny.z.unflatten(2, (n_heads, -1)), w).numpy()
    for feature, record in enumerate(whole.features):
        mine = given[tiny.acts[:, :, feature] > 0][:, feature]
        if len(mine):
            np.testing.assert_allclose(record.head_dfa, mine.mean(0), atol=1e-4)
            np.testing.assert_allclose(record.head_dfa_std, mine.std(0), atol=1e-3)
            assert record.top_head_dfa == np.abs(mine.mean(0)).argmax()


def test_the_strongest_equal_brute_force_and_near_duplicates_are_dropped(tiny: Set, whole: HarvestResult) -> None:
    chosen = whole.selection
    twins = {0, len(tiny.rows.train) - 2}, {1, len(tiny.rows.train) - 1}
    met = 0
    for feature in range(tiny.sae.cfg.d_sae):
        mine = (chosen.feature == feature) & (chosen.band == 0)
        found = set(zip(chosen.row[mine].tolist(), chosen.pos[mine].tolist(), strict=True))
        expected = set(brute_top(tiny, feature, CFG.top_k))
        assert found == expected, feature
        rows = {row for row, _ in found}
        assert len(rows) == len(found)
        assert not any(pair <= rows for pair in twins)
        met += any(pair & rows for pair in twins)
    assert met > 3  # the repeated rows were in play


def test_bands_cover_every_firing_and_hold_their_examples(tiny: Set, whole: HarvestResult) -> None:
    chosen, drawn = whole.selection, 0
    for feature, record in enumerate(whole.features):
        values = tiny.acts[:, :, feature][tiny.acts[:, :, feature] > 0]
        assert sum(band["count"] for band in record.bands) == len(values)
        if len(values):
            assert record.bands[0]["high"] == pytest.approx(values.max(), rel=1e-4)
            assert record.bands[-1]["low"] == pytest.approx(values.min(), rel=1e-4)
        top = {(r, p) for f, r, p, b in columns(chosen) if f == feature and b == 0}
        for band in range(1, CFG.bands + 1):
            mine = [(r, p) for f, r, p, b in columns(chosen) if f == feature and b == band]
            assert len(mine) <= CFG.per_band
            assert not top & set(mine)
            high, low = (CELL_EDGES[c] for c in chosen.band_cells[feature, band - 1 : band + 1])
            assert all(low * 0.9999 <= tiny.acts[r, p, feature] <= high * 1.0001 for r, p in mine)
            drawn += len(mine)
    assert drawn > 50


def columns(chosen: Selection) -> list[tuple[int, int, int, int]]:
    return list(zip(*(c.tolist() for c in (chosen.feature, chosen.row, chosen.pos, chosen.band)), strict=True))


def test_a_band_that_has_more_than_it_shows_shows_its_full_number(whole: HarvestResult) -> None:
    chosen, checked = whole.selection, 0
    rows = columns(chosen)
    for feature, record in enumerate(whole.features):
        tops = sum(f == feature and b == 0 for f, _, _, b in rows)
        for band, facts in enumerate(record.bands, 1):
            if facts["count"] > tops + CFG.per_band + 6:
                checked += 1
                assert sum(f == feature and b == band for f, _, _, b in rows) == CFG.per_band
    assert checked > 10


def test_the_choice_does_not_depend_on_the_order_or_size_of_shards(tiny: Set, whole: HarvestResult, tmp_path: Path) -> None:
    paths = scanned(tiny, tmp_path / "a")
    shuffled = choose([paths[2], paths[0], paths[1]], tiny.sae, tiny.rows, CFG, tmp_path / "a.npz")
    other = CFG.model_copy(update={"shard_rows": 12})
    resized = choose(scanned(tiny, tmp_path / "b", other), tiny.sae, tiny.rows, other, tmp_path / "b.npz")
    for f in dataclasses.fields(Selection):
        expected = getattr(whole.selection, f.name)
        np.testing.assert_array_equal(getattr(shuffled, f.name), expected, err_msg=f.name)
        if f.name in ("total", "heads", "heads_squares"):
            np.testing.assert_allclose(getattr(resized, f.name), expected, rtol=1e-9)
        else:
            np.testing.assert_array_equal(getattr(resized, f.name), expected, err_msg=f.name)


def test_missing_and_repeated_shards_are_refused(tiny: Set, tmp_path: Path) -> None:
    paths = scanned(tiny, tmp_path)
    for wrong in ([paths[0], paths[2]], paths[:2], [*paths, paths[1]], []):
        with pytest.raises(ValueError, match=r"rows|shards"):
            choose(wrong, tiny.sae, tiny.rows, CFG, tmp_path / "selection.npz")
    assert not (tmp_path / "selection.npz").exists()


def test_a_killed_scan_leaves_nothing_and_a_finished_one_is_not_repeated(tiny: Set, tmp_path: Path) -> None:
    path = tmp_path / "shard.npz"
    half = scan_shard(tiny.lens, [tiny.sae], tiny.rows, range(8), CFG, [path])
    next(half)
    half.close()
    assert list(tmp_path.iterdir()) == []
    reports = list(scan_shard(tiny.lens, [tiny.sae], tiny.rows, range(8), CFG, [path]))
    assert [(r.done, r.total) for r in reports] == [(80, 160), (160, 160)]
    assert [p.name for p in tmp_path.iterdir()] == ["shard.npz"]
    no_lens: Any = None
    assert list(scan_shard(no_lens, [tiny.sae], tiny.rows, range(8), CFG, [path])) == []


def test_cached_activations_give_the_scan_of_the_model(tiny: Set, tmp_path: Path) -> None:
    cached: Any = SimpleNamespace(n_rows=24, read_z=lambda low, high: tiny.z[low:high])
    no_lens: Any = None
    list(scan_shard(no_lens, [tiny.sae], tiny.rows, range(8), CFG, [tmp_path / "a.npz"], {LAYER: cached}))
    list(scan_shard(tiny.lens, [tiny.sae], tiny.rows, range(8), CFG, [tmp_path / "b.npz"]))
    a, b = Tally.load(tmp_path / "a.npz"), Tally.load(tmp_path / "b.npz")
    assert torch.equal(a.count, b.count)
    torch.testing.assert_close(a.total, b.total)
    short: Any = SimpleNamespace(n_rows=7)  # does not hold the shard, so it is not read
    list(scan_shard(tiny.lens, [tiny.sae], tiny.rows, range(8), CFG, [tmp_path / "c.npz"], {LAYER: short}))
    assert torch.equal(Tally.load(tmp_path / "c.npz").total, b.total)


def test_a_sweep_takes_the_tokens_asked_for_and_at_most_what_there_is(tiny: Set) -> None:
    assert swept_rows(tiny.rows, CFG) == 24
    assert swept_rows(tiny.rows, CFG.model_copy(update={"tokens": 100})) == 5
    assert swept_rows(tiny.rows, CFG.model_copy(update={"tokens": 1})) == 1
    assert shards(20, CFG) == [range(8), range(8, 16), range(16, 20)]


# ---- visit ----


def total(example: ExampleRecord) -> float:
    return float(example.dfa_value.sum() + example.dropped.sum() + example.before.sum()) + example.bias


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "qwen3", "pythia"])
@pytest.mark.parametrize("window", [8, 256])
def test_dfa_and_bias_give_the_preactivation_of_every_example(
    kind: str, window: int, tiny_lens: Callable[[str], Lens], tmp_path: Path
) -> None:
    lens, rows = tiny_lens(kind), tiny_rows()
    tiny = Set(lens=lens, rows=rows, sae=tiny_sae(lens, rows))
    result = run(tiny, tmp_path, CFG.model_copy(update={"window": window, "dfa_entries": 10}))
    found = list(result.examples)
    assert len(found) > 100
    z = z_of(lens, rows)
    for e in found:
        w, c = tiny.sae.affine(torch.tensor([e.feature]))
        preact = float(z[e.row, e.dest] @ w[0] + c[0])
        size = e.abs_dfa + abs(e.bias)
        assert e.gap <= 1e-4
        assert abs(e.preact - preact) <= 1e-4 * size
        assert abs(total(e) - e.preact) <= 1e-4 * size
        assert e.start <= e.dest < e.start + window
        assert (e.dfa_src >= e.start).all()
        assert (e.dfa_src <= e.dest).all()
        assert len(e.dfa_value) <= 10
    hidden = any(np.abs(e.before).sum() > 0 for e in found)
    assert hidden == (window == 8 and kind != "gemma2")  # Gemma-2's own window here is narrower than what is shown


@pytest.mark.parametrize(
    "broken",
    [
        lambda read: AttentionRead(read.z, read.v, read.pattern.transpose(2, 3)),
        lambda read: AttentionRead(read.z, read.v, read.pattern.roll(1, 3)),
        lambda read: AttentionRead(read.z, read.v.flip(2), read.pattern),
    ],
    ids=["transposed pattern", "shifted pattern", "swapped value heads"],
)
def test_a_wrong_read_breaks_the_identity(broken: Callable[[AttentionRead], AttentionRead], tiny: Set, tmp_path: Path) -> None:
    selection = choose(scanned(tiny, tmp_path), tiny.sae, tiny.rows, CFG, tmp_path / "selection.npz")
    lens: Any = SimpleNamespace(
        device=tiny.lens.device,
        read_attentions=lambda tokens, layers, _: {layer: broken(tiny.lens.read_attention(tokens, layer)) for layer in layers},
        token_texts=tiny.lens.token_texts,
    )
    part = visit_parts([selection], CFG)[0]
    list(visit(lens, [tiny.sae], tiny.rows, [selection], part, CFG, [tmp_path / "part.npz"]))
    with np.load(tmp_path / "part.npz") as file:
        assert (file["gap"] > 1e-2).mean() > 0.9


def test_an_example_shows_its_feature_along_the_row_and_never_fires_where_excluded(tiny: Set, whole: HarvestResult) -> None:
    at_start = 0.0
    for e in whole.examples:
        dense = np.zeros(tiny.rows.context, dtype=np.float32)
        dense[e.acts_pos] = e.acts_value
        np.testing.assert_allclose(dense, tiny.acts[e.row, :, e.feature], atol=1e-4)
        assert e.act == pytest.approx(dense[e.dest], abs=1e-5)
        assert e.act > 0
        at_start += float(np.abs(e.dfa_value[e.dfa_src == 0]).sum())
    assert at_start > 0  # the row start is no destination, but it stays a source


def test_ranks_follow_the_fp32_activation_within_feature_and_band(whole: HarvestResult) -> None:
    groups: dict[tuple[int, int], list[ExampleRecord]] = {}
    for e in whole.examples:
        groups.setdefault((e.feature, e.band), []).append(e)
    for group in groups.values():
        group.sort(key=lambda e: e.rank)
        assert [e.rank for e in group] == list(range(len(group)))
        assert [e.act for e in group] == sorted((e.act for e in group), reverse=True)


def test_an_example_that_does_not_fire_in_fp32_is_dropped(tiny: Set, tmp_path: Path) -> None:
    """As when a bf16 scan rounds a pre-activation over the threshold: here positions that never fired are slipped in."""
    selection = choose(scanned(tiny, tmp_path), tiny.sae, tiny.rows, CFG, tmp_path / "selection.npz")
    silent = [i for i, (f, r, _, _) in enumerate(columns(selection)) if tiny.acts[r, 3, f] == 0][:5]
    selection.pos[silent] = 3
    paths = [tmp_path / f"{part.start}.npz" for part in visit_parts([selection], CFG)]
    for part, path in zip(visit_parts([selection], CFG), paths, strict=True):
        list(visit(tiny.lens, [tiny.sae], tiny.rows, [selection], part, CFG, [path]))
    table = features(tiny.lens, tiny.sae, selection, paths, CFG, tmp_path / "features.npz")
    assert len(list(examples(table, paths))) == len(selection.feature) - len(silent)


def test_a_row_none_of_whose_examples_fires_in_fp32_keeps_nothing(tiny: Set, tmp_path: Path) -> None:
    selection = choose(scanned(tiny, tmp_path), tiny.sae, tiny.rows, CFG, tmp_path / "selection.npz")
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    tensors = {name: getattr(tiny.sae, name) for name in names}
    silent = type(tiny.sae)(tiny.sae.cfg, tensors | {"threshold": torch.full_like(tiny.sae.threshold, torch.inf)})
    paths = [tmp_path / f"{part.start}.npz" for part in visit_parts([selection], CFG)]
    for part, path in zip(visit_parts([selection], CFG), paths, strict=True):
        list(visit(tiny.lens, [silent], tiny.rows, [selection], part, CFG, [path]))
    table = features(tiny.lens, tiny.sae, selection, paths, CFG, tmp_path / "features.npz")
    assert list(examples(table, paths)) == []


def test_rows_carry_their_tokens_and_texts(tiny: Set, whole: HarvestResult) -> None:
    seen = []
    for part in range(len(whole.parts)):
        for record in row_records(whole.features, whole.parts, part):
            seen.append(record.row)
            np.testing.assert_array_equal(record.tokens, tiny.rows.train[record.row])
            assert record.texts == tiny.lens.token_texts(record.tokens.tolist())
            assert {e.row for e in record.examples} == {record.row}
    assert seen == sorted(set(seen))


@pytest.mark.parametrize(("dest", "start"), [(0, 0), (90, 0), (150, 54), (511, 384)])
def test_a_window_holds_its_destination_with_more_before_than_after(dest: int, start: int) -> None:
    assert window_start(dest, 512, 128) == start
    assert window_start(dest, 128, 128) == 0


# ---- features ----


def test_features_say_what_the_decoder_writes_and_who_is_near(tiny: Set, whole: HarvestResult) -> None:
    logits = tiny.lens.logit_weights(tiny.sae.W_dec, LAYER)
    cosines = (tiny.sae.W_dec @ tiny.sae.W_dec.T).fill_diagonal_(-1)
    cosines[:, -3:] = -1  # dead features are no neighbours
    for record in whole.features:
        assert record.density == record.n_fired / whole.selection.n_tokens
        assert record.head_norm.sum() == pytest.approx(1, abs=1e-5)
        assert record.top_head == record.head_norm.argmax()
        if record.n_fired == 0:
            continue
        assert [t[0] for t in record.promoted] == logits[record.idx].topk(5).indices.tolist()
        assert [t[0] for t in record.suppressed] == (-logits[record.idx]).topk(5).indices.tolist()
        assert [t[1] for t in record.promoted] == tiny.lens.token_texts([t[0] for t in record.promoted])
        assert [n[0] for n in record.neighbours] == cosines[record.idx].topk(3).indices.tolist()
        assert record.evidence["examples"] == sum(e.feature == record.idx and e.band == 0 for e in whole.examples)
        assert 0 <= record.evidence["top_share"] <= 1


def test_dead_features_have_records_that_claim_nothing(whole: HarvestResult) -> None:
    dead = [record for record in whole.features if record.n_fired == 0]
    assert [record.idx for record in dead] == [37, 38, 39]
    for record in dead:
        assert (record.family, record.distance, record.top_head_dfa, record.top_head_dfa_share) == (None, None, None, None)
        assert record.bands == record.promoted == record.neighbours == record.positions == []
        assert record.coactive == {}
        assert record.evidence == {}
        assert record.density == record.max_act == record.mean_act == 0
    assert whole.features.totals.n_live == 37


# ---- the whole ----


def test_an_sae_that_never_fires_gives_an_empty_harvest(tiny: Set, tmp_path: Path) -> None:
    silent = Set(lens=tiny.lens, rows=tiny.rows, sae=tiny_sae(tiny.lens, tiny.rows, dead=40))
    result = run(silent, tmp_path)
    assert (result.parts, result.features.totals.n_live, list(result.examples)) == ((), 0, [])
    assert {record.n_fired for record in result.features} == {0}


def test_a_config_that_asks_for_little_gets_little(tiny: Set, tmp_path: Path) -> None:
    least = CFG.model_copy(update={"top_k": 1, "bands": 1, "per_band": 0, "neighbours": 0, "logits": 0, "tokens": 60})
    result = run(tiny, tmp_path, least)
    assert result.features.totals.n_rows == 3
    assert len(list(result.examples)) == result.features.totals.n_live
    assert all(r.neighbours == r.promoted == [] and len(r.bands) <= 1 for r in result.features)


def test_a_harvest_stopped_anywhere_ends_as_an_undisturbed_one(tiny: Set, whole: HarvestResult, tmp_path: Path) -> None:
    for reports in itertools.count(1, 4):  # each time a little further, over what earlier tries left
        attempt = harvest(tiny.lens, tiny.sae, tiny.rows, CFG, tmp_path)
        if len(list(itertools.islice(attempt, reports))) < reports:
            break
        attempt.close()
    result = run(tiny, tmp_path)
    assert same(result, whole)


def test_a_finished_harvest_is_only_read(tiny: Set, whole: HarvestResult) -> None:
    times = {path: path.stat().st_mtime_ns for path in whole.parts[0].parent.iterdir()}
    cannot_read: Any = SimpleNamespace(info=tiny.lens.info, keeps_streams=lambda _: True)
    assert same(run(Set(lens=cannot_read, sae=tiny.sae, rows=tiny.rows), whole.parts[0].parent), whole)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert not [path for path in times if path.suffix == ".aside"]


def same(a: HarvestResult, b: HarvestResult) -> bool:
    def plain(record: Any) -> Any:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(record).items()}

    assert [plain(x) for x in a.features] == [plain(x) for x in b.features]
    assert [plain(x) for x in a.examples] == [plain(x) for x in b.examples]
    return True


def test_a_feature_table_reads_back_the_same(whole: HarvestResult) -> None:
    again = FeatureTable.load(Files(whole.parts[0].parent).features)
    assert again.totals == whole.features.totals
    assert again.texts == whole.features.texts
    assert [r.promoted for r in again] == [r.promoted for r in whole.features]


# ---- many SAEs in one pass ----


def done(reports: Generator[Progress, None, Any]) -> Any:
    while True:
        try:
            next(reports)
        except StopIteration as end:
            return end.value


class Counting:
    """A lens that counts what it is asked."""

    def __init__(self, lens: Lens) -> None:
        self.lens, self.device, self.info = lens, lens.device, lens.info
        self.token_texts, self.logit_weights, self.keeps_streams = lens.token_texts, lens.logit_weights, lens.keeps_streams
        self.scanned: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.visited: list[tuple[int, ...]] = []
        self.kept: list[bool] = []
        """Of each visit, whether it goes on from what was kept."""

    def read_z(self, tokens: torch.Tensor, layers: list[int], dtype: torch.dtype) -> dict[int, torch.Tensor]:
        self.scanned.append((tuple(tokens.shape), tuple(layers)))
        return self.lens.read_z(tokens, layers, dtype)

    def read_streams(self, tokens: torch.Tensor, layers: list[int]) -> dict[int, Entry]:
        self.scanned.append((tuple(tokens.shape), tuple(layers)))
        return self.lens.read_streams(tokens, layers)

    def read_attentions(
        self, tokens: torch.Tensor, layers: list[int], streams: dict[int, torch.Tensor] | None
    ) -> dict[int, AttentionRead]:
        self.visited.append(tuple(layers))
        self.kept.append(streams is not None)
        return self.lens.read_attentions(tokens, layers, streams)


def near(a: HarvestResult, b: HarvestResult, tolerance: float) -> None:
    """The same examples, with the same numbers but for rounding."""
    assert [(r.n_fired, r.positions, r.coactive, r.histogram) for r in a.features] == [
        (r.n_fired, r.positions, r.coactive, r.histogram) for r in b.features
    ]
    examples = [sorted(x.examples, key=lambda e: (e.feature, e.row, e.dest)) for x in (a, b)]
    assert [(e.feature, e.band, e.row, e.dest) for e in examples[0]] == [(e.feature, e.band, e.row, e.dest) for e in examples[1]]
    for one, other in zip(*examples, strict=True):
        assert abs(one.act - other.act) <= tolerance * (one.abs_dfa + abs(one.bias))
        np.testing.assert_allclose(one.acts_value, other.acts_value, atol=tolerance * (one.abs_dfa + abs(one.bias)))


def test_many_saes_share_every_pass_and_each_gets_what_it_gets_alone(tiny: Set, tmp_path: Path) -> None:
    saes = [tiny_sae(tiny.lens, tiny.rows, layer=layer, seed=seed) for layer, seed in ((2, 1), (0, 2), (2, 3))]
    counting: Any = Counting(tiny.lens)
    results = done(harvest_many(counting, saes, tiny.rows, CFG, tmp_path / "many"))
    assert counting.scanned == [((4, 20), (0, 2))] * 6  # 24 rows, 4 at a time, once
    assert len(counting.visited) == 6
    assert set(counting.visited) == {(0, 2)}
    for i, (sae, result) in enumerate(zip(saes, results, strict=True)):
        alone = run(Set(lens=tiny.lens, rows=tiny.rows, sae=sae), tmp_path / f"alone-{i}")
        near(result, alone, 1e-5)
        np.testing.assert_array_equal(result.selection.total, alone.selection.total)  # the scan is the same to the bit
        np.testing.assert_array_equal(result.selection.pos, alone.selection.pos)


def test_a_row_is_visited_at_the_layers_that_chose_it_only(tiny: Set, tmp_path: Path) -> None:
    """The second SAE never fires, so nothing is read for it."""
    saes = [tiny_sae(tiny.lens, tiny.rows, layer=1), tiny_sae(tiny.lens, tiny.rows, layer=3, dead=40)]
    counting: Any = Counting(tiny.lens)
    results = done(harvest_many(counting, saes, tiny.rows, CFG, tmp_path))
    assert set(counting.visited) == {(1,)}
    assert [r.features.totals.n_live for r in results] == [37, 0]
    assert list(results[1].examples) == []


def test_what_is_held_at_once_is_bounded_by_bytes_not_by_rows(tiny: Set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many layers or long rows: passes take fewer rows, and the examples stay the same."""
    saes = [tiny_sae(tiny.lens, tiny.rows, layer=layer) for layer in (0, 2)]
    usual = done(harvest_many(tiny.lens, saes, tiny.rows, CFG, tmp_path / "usual"))
    monkeypatch.setattr(harvest_module, "Z_BYTES", 3 * 2 * 20 * 64 * 4)  # 3 rows of 2 layers of 20 tokens
    monkeypatch.setattr(visit_module, "PATTERN_BYTES", 1)
    counting: Any = Counting(tiny.lens)
    small = done(harvest_many(counting, saes, tiny.rows, CFG, tmp_path / "small"))
    assert {shape for shape, _ in counting.scanned} == {(3, 20)}
    assert len(counting.visited) == len(np.union1d(*(r.selection.rows for r in usual)))
    for one, other in zip(usual, small, strict=True):
        near(one, other, 1e-5)


def test_activations_on_disk_serve_only_where_they_cover_every_layer(tiny: Set, tmp_path: Path) -> None:
    saes = [tiny_sae(tiny.lens, tiny.rows, layer=layer) for layer in (0, 2)]
    held: dict[int, Any] = {
        layer: SimpleNamespace(n_rows=24, read_z=lambda low, high, layer=layer: z_of(tiny.lens, tiny.rows, layer)[low:high])
        for layer in (0, 2)
    }
    counting: Any = Counting(tiny.lens)
    list(scan_shard(counting, saes, tiny.rows, range(8), CFG, [tmp_path / "a", tmp_path / "b"], held))
    assert counting.scanned == []
    list(scan_shard(counting, saes, tiny.rows, range(8), CFG, [tmp_path / "c", tmp_path / "d"], {0: held[0]}))
    assert len(counting.scanned) == 2
    for one, other in (("a", "c"), ("b", "d")):
        assert torch.equal(Tally.load(tmp_path / one).count, Tally.load(tmp_path / other).count)


def test_a_resumed_pass_only_makes_the_files_that_are_missing(tiny: Set, tmp_path: Path) -> None:
    saes = [tiny_sae(tiny.lens, tiny.rows, layer=layer) for layer in (0, 2)]
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    list(scan_shard(tiny.lens, saes, tiny.rows, range(8), CFG, paths))
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    list(scan_shard(tiny.lens, saes, tiny.rows, range(8), CFG, paths))
    assert [path.read_bytes() for path in paths] == before


# ---- what the sweep keeps for the visit ----


def visits(tiny: Set, folder: Path, **changed: Any) -> tuple[HarvestResult, list[bool]]:
    """A harvest of SAEs at two layers, the first of them; and whether each visit went on from what was kept."""
    counting: Any = Counting(tiny.lens)
    saes = [tiny_sae(tiny.lens, tiny.rows, layer=layer) for layer in (1, 3)]
    return done(harvest_many(counting, saes, tiny.rows, CFG.model_copy(update=changed), folder))[0], counting.kept


def test_a_visit_from_what_the_sweep_kept_is_that_of_a_second_pass(tiny: Set, tmp_path: Path) -> None:
    kept, from_kept = visits(tiny, tmp_path / "kept")
    twice, from_tokens = visits(tiny, tmp_path / "twice", kept_gb=0)
    assert (set(from_kept), set(from_tokens)) == ({True}, {False})
    near(kept, twice, 1e-5)
    files = sorted(path.name for path in (tmp_path / "kept" / "streams").iterdir())
    assert files == [f"stream-{layer:03d}-{row:08d}.f32" for layer in (1, 3) for row in (0, 8, 16)]
    assert not (tmp_path / "twice" / "streams").exists()


def test_what_was_kept_is_what_enters_the_layer(tiny: Set, tmp_path: Path) -> None:
    visits(tiny, tmp_path)
    rows = np.array([2, 7, 8, 20], dtype=np.int32)  # of all three shards
    streams = harvest_module.streams_of(tmp_path, tiny.lens, [tiny.sae], tiny.rows, CFG)
    assert streams is not None
    found = streams.read([1, 3], rows)
    assert found is not None
    tokens = torch.from_numpy(tiny.rows.train[rows].astype(np.int64))
    for layer in (1, 3):
        torch.testing.assert_close(found[layer], tiny.lens.read_stream(tokens, layer).parts.sum(0), rtol=1e-4, atol=1e-4)


def test_what_is_lost_of_the_kept_is_passed_again(tiny: Set, whole: HarvestResult, tmp_path: Path) -> None:
    run(tiny, tmp_path)
    (tmp_path / "streams" / f"stream-{LAYER:03d}-00000008.f32").unlink()
    for path in (*tmp_path.glob("visit-*"), tmp_path / "features.npz"):
        path.unlink()
    near(run(tiny, tmp_path), whole, 1e-5)


def test_a_sweep_that_ends_early_leaves_no_half_of_the_kept(tiny: Set, tmp_path: Path) -> None:
    streams = harvest_module.streams_of(tmp_path, tiny.lens, [tiny.sae], tiny.rows, CFG)
    paths = [tmp_path / "shard.npz"]
    half = scan_shard(tiny.lens, [tiny.sae], tiny.rows, range(8), CFG, paths, streams=streams)
    next(half)
    half.close()
    assert list((tmp_path / "streams").iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "features", "keeps"),
    [
        ({}, 40, True),
        ({"kept_gb": 123e-6}, 40, True),  # 122,880 bytes
        ({"kept_gb": 122e-6}, 40, False),
        ({"kept_gb": 0}, 40, False),
        ({}, 1, False),  # ten examples lie in a third of 24 rows
    ],
)
def test_streams_are_kept_where_they_fit_and_most_rows_are_visited(changed: dict[str, Any], features: int, keeps: bool) -> None:
    cfg = CFG.model_copy(update=changed)
    assert cfg.keeps_streams(24, 20, 64, features) == keeps


def test_a_sweep_that_reads_z_from_disk_keeps_nothing(tiny: Set, tmp_path: Path) -> None:
    held: Any = {LAYER: SimpleNamespace(n_rows=24)}
    assert harvest_module.streams_of(tmp_path, tiny.lens, [tiny.sae], tiny.rows, CFG, held) is None
    held[LAYER].n_rows = 23
    assert harvest_module.streams_of(tmp_path, tiny.lens, [tiny.sae], tiny.rows, CFG, held) is not None


# ---- the same, however it is cut ----


@pytest.mark.parametrize(("shard_rows", "tokens"), [(4, 10_000), (12, 10_000), (24, 10_000), (10, 10_000), (7, 10_000)])
def test_any_cut_into_shards_gives_the_same_to_the_bit(
    tiny: Set, whole: HarvestResult, shard_rows: int, tokens: int, tmp_path: Path
) -> None:
    result = run(tiny, tmp_path, CFG.model_copy(update={"shard_rows": shard_rows, "tokens": tokens}))
    for name in (
        "count",
        "histogram",
        "highest",
        "lowest",
        "position_count",
        "partner",
        "partner_both",
        "feature",
        "row",
        "pos",
        "band",
    ):
        np.testing.assert_array_equal(getattr(result.selection, name), getattr(whole.selection, name), err_msg=name)
    for name in ("total", "heads", "heads_squares", "position_total"):  # sums of float64, added in another order
        np.testing.assert_allclose(getattr(result.selection, name), getattr(whole.selection, name), rtol=1e-12, atol=1e-12)


def test_what_a_row_gives_does_not_depend_on_where_the_sweep_ends(tiny: Set, tmp_path: Path) -> None:
    """Rows 8 and 9 are the last ones, or are followed by others: a pass has as many rows either way."""
    short = CFG.model_copy(update={"tokens": 10 * 20, "top_k": 60})
    list(scan_shard(tiny.lens, [tiny.sae], tiny.rows, range(8, 10), short, [tmp_path / "a.npz"]))
    list(scan_shard(tiny.lens, [tiny.sae], tiny.rows, range(8, 16), short, [tmp_path / "b.npz"]))

    def firings(name: str) -> set[tuple[float, ...]]:
        tops = Tally.load(tmp_path / name).tops
        return {
            one
            for one in zip(*(getattr(tops, c).tolist() for c in ("feature", "row", "pos", "value")), strict=True)
            if one[1] < 10
        }

    assert firings("a.npz") == firings("b.npz")
    assert len(firings("a.npz")) > 30


@pytest.mark.parametrize("batch_rows", [1, 3, 24, 100])
def test_other_batch_sizes_agree_but_for_rounding(tiny: Set, whole: HarvestResult, batch_rows: int, tmp_path: Path) -> None:
    """Stated: examples the same, activations within 1e-5 of (sum |DFA| + |bias|) in float32."""
    near(run(tiny, tmp_path, CFG.model_copy(update={"batch_rows": batch_rows})), whole, 1e-5)


# ---- what else a pass counts ----


def test_positions_count_firings_and_tokens_by_powers_of_two(tiny: Set, whole: HarvestResult) -> None:
    swept = (~tiny.sae.excluded(tiny.z, starts_of(tiny.rows))).numpy()
    for record in whole.features:
        acts = tiny.acts[:, :, record.idx]
        assert bool(record.positions) == bool(record.n_fired)
        for low, high, n_fired, n_tokens, mean in record.positions:
            inside = acts[:, low : high + 1]
            assert (n_fired, n_tokens) == ((inside > 0).sum(), swept[:, low : high + 1].sum())
            assert mean == pytest.approx(inside[inside > 0].mean() if n_fired else 0, abs=1e-4)
        assert [(p[0], p[1]) for p in record.positions] in ([], [(1, 1), (2, 3), (4, 7), (8, 15), (16, 19)])


def test_partners_are_the_strongest_correlations_of_firing(tiny: Set, whole: HarvestResult) -> None:
    swept = (~tiny.sae.excluded(tiny.z, starts_of(tiny.rows))).numpy()
    on = tiny.acts[swept] > 0
    told = 0
    for record in whole.features:
        if not record.coactive:
            continue
        assert record.coactive["tokens"] == len(on)
        for idx, both, phi in record.coactive["pairs"]:
            assert both == (on[:, record.idx] & on[:, idx]).sum() >= 5
            assert phi == pytest.approx(np.corrcoef(on[:, record.idx], on[:, idx])[0, 1], abs=1e-4)
            told += 1
    assert told > 50


def test_counts_can_be_watched_over_shards_that_are_done_already(tiny: Set, whole: HarvestResult, tmp_path: Path) -> None:
    list(itertools.islice(harvest(tiny.lens, tiny.sae, tiny.rows, CFG, tmp_path), 4))  # one shard, and a bit
    watched = [r.values for r in harvest(tiny.lens, tiny.sae, tiny.rows, CFG, tmp_path) if r.values]
    assert watched[-1] == {"firings": float(whole.selection.count.sum()), "live": 37.0}
    firings = [values["firings"] for values in watched]
    assert firings == sorted(firings)
    assert len(firings) == 4  # two shards of two passes were left


def test_rows_of_excluded_tokens_alone_give_an_empty_harvest(tiny: Set, tmp_path: Path) -> None:
    """As where every token is a special one, whose z is beyond what training saw."""
    sae = tiny_sae(tiny.lens, tiny.rows)
    sae.cfg = sae.cfg.model_copy(update={"max_norm": 1e-9})
    result = run(Set(lens=tiny.lens, rows=tiny.rows, sae=sae), tmp_path)
    assert (result.features.totals.n_tokens, result.features.totals.n_rows, list(result.examples)) == (0, 24, [])
    for record in result.features:
        assert (record.density, record.n_fired, record.positions, record.coactive, record.bands) == (0, 0, [], {}, [])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"site": Site(layer=4)}, "it reads layer 4, and the last one is 3"),
        ({"d_in": 128}, "it reads z of width 128, and here z has 64"),
        ({"n_heads": 8, "d_head": 8}, "it was made for 8 heads of 8, and here there are 4 of 16"),
        ({"processing": {"folded": True, "centred": False}}, "weights with the norms folded in, and here they are not so"),
        ({"processing": {"folded": False, "centred": True}}, "weights centred, and here they are not so"),
        ({"model_fingerprint": "weights:other"}, "it was trained on other weights"),
    ],
)
def test_an_sae_that_does_not_fit_the_model_is_refused_in_a_sentence(tiny: Set, changed: dict[str, Any], said: str) -> None:
    check_fits(tiny.sae.cfg, tiny.lens.info, "mine")
    with pytest.raises(SAEMismatch, match=f"The SAE mine does not fit .*{said}"):
        check_fits(tiny.sae.cfg.model_copy(update=changed), tiny.lens.info, "mine")


def test_another_version_of_the_library_is_no_other_processing(tiny: Set) -> None:
    older = tiny.sae.cfg.processing | {"tl_version": "3.0"}
    check_fits(tiny.sae.cfg.model_copy(update={"processing": older}), tiny.lens.info, "mine")


@pytest.mark.real
def test_the_identity_holds_on_smollm2(smollm2_lens: Lens, tmp_path: Path) -> None:
    rows = tiny_rows(n=10, context=48, vocabulary=20_000)
    found = list(run(Set(lens=smollm2_lens, rows=rows, sae=tiny_sae(smollm2_lens, rows)), tmp_path).examples)
    assert len(found) > 100
    assert max(e.gap for e in found) <= 1e-4
    assert max(abs(total(e) - e.preact) / (e.abs_dfa + abs(e.bias)) for e in found) <= 1e-4
