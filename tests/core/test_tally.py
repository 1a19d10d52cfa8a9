"""What a scan keeps: exact, mergeable, fair. Against brute force on small random firings."""

import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core import tally as tally_module
from sae_core.tally import (
    EDGES,
    N_BINS,
    SUMS,
    Bars,
    Batch,
    Firings,
    Tallier,
    Tally,
    bins,
    by_head,
    cells,
    coded_share,
    head_parts,
    is_coded,
    keys,
    ranks,
    token_ids,
)

F, H, TOP, SAMPLE, SEED, CONTEXT = 4, 2, 3, 2, 7, 9


def random_firings(n: int, seed: int, *, n_rows: int = 12, context: int = CONTEXT) -> Firings:
    """Distinct (feature, row, pos), values with many ties."""
    rng = np.random.default_rng(seed)
    flat = rng.choice(F * n_rows * context, size=min(n, F * n_rows * context), replace=False)
    feature, row, pos = np.unravel_index(flat, (F, n_rows, context))
    value = np.exp2(rng.integers(-6, 6, len(flat)) / 4).astype(np.float32)
    return Firings(*(torch.from_numpy(x) for x in (feature, row, pos, value)))


def parts_of(firings: Firings) -> torch.Tensor:
    """What two heads gave, made up from the firing alone so that every order agrees."""
    return torch.stack([firings.value * 0.75, firings.value * 0.25 - firings.pos], 1).float()


def batch_of(firings: Firings, tokens: torch.Tensor) -> Batch:
    """The firings on `tokens` [T] (row * CONTEXT + pos, in any order), on some of which nothing fires."""
    at = (firings.row * CONTEXT + firings.pos)[:, None] == tokens
    token, which = at.T.nonzero(as_tuple=True)
    which = which[torch.argsort(token * F + firings.feature[which])]
    some = firings.take(which)
    return Batch(tokens // CONTEXT, tokens % CONTEXT, token, some.feature, some.value, parts_of(some))


def empty(first_row: int = 0, share: float = 1.0) -> Tally:
    return Tally.empty(F, H, first_row=first_row, top=TOP, sample=SAMPLE, seed=SEED, context=CONTEXT, share=share)


def tallied(firings: Firings, tokens: torch.Tensor, batch: int, share: float = 1.0, pending: int = 100) -> Tally:
    """The tally of the firings on `tokens`, so many of which come at a time."""
    tallier = Tallier(empty(share=share), pending)
    for some in tokens.split(batch):
        tallier.add(batch_of(firings, some))
    return tallier.finish(n_rows=len((tokens // CONTEXT).unique()))


def as_rows(firings: Firings) -> Iterator[tuple[int, int, int, float]]:
    columns = (firings.feature, firings.row, firings.pos, firings.value)
    return zip(*(column.tolist() for column in columns), strict=True)


def brute_tops(firings: Firings) -> list[tuple[int, int, int, float]]:
    best: dict[tuple[int, int], tuple[int, int, int, float]] = {}
    for one in sorted(as_rows(firings), key=lambda e: (-e[3], e[2])):
        best.setdefault(one[:2], one)
    by_feature = defaultdict(list)
    for one in sorted(best.values(), key=lambda e: (e[0], -e[3], e[1], e[2])):
        by_feature[one[0]].append(one)
    return [one for feature in sorted(by_feature) for one in by_feature[feature][:TOP]]


def brute_samples(firings: Firings) -> set[tuple[int, int, int, float]]:
    by_cell = defaultdict(list)
    for cell, key, one in zip(cells(firings).tolist(), keys(firings, SEED).tolist(), as_rows(firings), strict=True):
        by_cell[cell].append((key, one))
    return {one for members in by_cell.values() for _, one in sorted(members)[:SAMPLE]}


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 300),
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 40),
    pending=st.integers(1, 200),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    data=st.data(),
)
def test_any_cut_merged_in_any_order_equals_brute_force(
    n: int, seed: int, batch: int, pending: int, share: float, data: st.DataObject
) -> None:
    firings = random_firings(n, seed)
    swept = torch.from_numpy(np.random.default_rng(seed + 1).permutation(12 * CONTEXT))  # in any order, all of them
    n_shards = data.draw(st.integers(1, 5))
    owner = torch.from_numpy(np.random.default_rng(seed).integers(0, n_shards, 12))  # shards hold whole rows
    shards = [tallied(firings, swept[owner[swept // CONTEXT] == i], batch, share, pending) for i in range(n_shards)]
    whole = empty(share=share)
    for i in data.draw(st.permutations(range(n_shards))):
        whole.merge(shards[i])

    assert list(as_rows(whole.tops)) == brute_tops(firings)
    assert len(whole.samples.row) == len(set(as_rows(whole.samples)))
    assert set(as_rows(whole.samples)) == brute_samples(firings)
    assert (whole.n_tokens, whole.n_rows) == (12 * CONTEXT, 12)
    assert whole.position_tokens.tolist() == [12, 12, 24, 48, 12]  # positions 0, 1, 2 to 3, 4 to 7, 8 of 12 rows
    values, bucket = firings.value.double(), torch.tensor([p.bit_length() for p in range(CONTEXT)])[firings.pos]
    for f in range(F):
        mine = firings.feature == f
        assert whole.count[f] == mine.sum()
        assert whole.total[f] == pytest.approx(float(values[mine].sum()))
        assert whole.squares[f] == pytest.approx(float(values[mine].square().sum()))
        assert whole.highest[f] == values[mine].max() if mine.any() else whole.highest[f] == 0
        assert whole.lowest[f] == values[mine].min() if mine.any() else torch.isinf(whole.lowest[f])
        assert whole.histogram[f].tolist() == np.histogram(firings.value[mine].numpy(), EDGES)[0].tolist()
        given_ = parts_of(firings)[mine].double()
        torch.testing.assert_close(whole.heads[f], given_.sum(0))
        torch.testing.assert_close(whole.heads_squares[f], given_.square().sum(0))
        for b in range(5):
            there = mine & (bucket == b)
            assert whole.position_count[f, b] == there.sum()
            assert whole.position_total[f, b] == pytest.approx(float(values[there].sum()))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 300), seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 11), unique=True), data=st.data())
def test_bars_of_whatever_was_swept_before_change_nothing_in_the_whole(
    n: int, seed: int, cuts: list[int], data: st.DataObject
) -> None:
    """Shards swept in any order by up to three processes, each of which knows the bars of those it swept itself."""
    firings = random_firings(n, seed)
    edges = [0, *sorted(cuts), 12]
    shards = [range(low, high) for low, high in itertools.pairwise(edges)]
    bars, made = [Bars.none(F) for _ in range(3)], []
    for shard in data.draw(st.permutations(shards)):
        who = data.draw(st.integers(0, 2))
        tallier = Tallier(empty(shard.start), 50, bars[who])
        for row in shard:
            tallier.add(batch_of(firings, torch.arange(row * CONTEXT, (row + 1) * CONTEXT)))
        made.append(tallier.finish(len(shard)))
        bars[who] = tallier.bars
        assert all(set(kept.row.tolist()) <= set(shard) for kept in (made[-1].tops, made[-1].samples))
    whole = empty()
    for tally in made:
        whole.merge(tally)
    assert list(as_rows(whole.tops)) == brute_tops(firings)
    assert set(as_rows(whole.samples)) == brute_samples(firings)
    assert whole.count.sum() == len(firings.row)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(0, 300), seed=st.integers(0, 10_000), cut=st.integers(0, 12), share=st.sampled_from([0.2, 1.0]))
def test_whole_codes_are_those_of_the_tokens_below_the_bar_in_any_cut(n: int, seed: int, cut: int, share: float) -> None:
    firings, tokens = random_firings(n, seed), torch.arange(12 * CONTEXT)
    parts = [
        tallied(firings, tokens[:0], 7, share),
        *(tallied(firings, t, 7, share) for t in tokens.split([cut * 9, 108 - cut * 9])),
    ]
    whole = empty(share=share)
    for part in reversed(parts):
        whole.merge(part)
    chosen = is_coded(tokens // CONTEXT, tokens % CONTEXT, SEED, share)
    by_token = {int(t): [] for t in tokens[chosen]}
    for feature, row, pos, _ in sorted(as_rows(firings)):
        if row * CONTEXT + pos in by_token:
            by_token[row * CONTEXT + pos].append(feature)
    assert whole.codes.token.tolist() == token_ids(tokens[chosen] // CONTEXT, tokens[chosen] % CONTEXT).tolist()
    assert [part.tolist() for part in whole.codes.feature.split(whole.codes.n.tolist())] == list(by_token.values())
    assert (len(by_token) == len(tokens)) == (share == 1)


def test_tokens_with_whole_codes_are_a_uniform_draw_of_the_share_asked_for() -> None:
    row, pos = torch.arange(200_000) // 100, torch.arange(200_000) % 100
    chosen = is_coded(row, pos, SEED, coded_share(4 * tally_module.CODED_TOKENS))
    assert abs(float(chosen.double().mean()) - 0.25) < 0.004  # 4 standard errors
    assert torch.bincount(pos[chosen]).double().std() < 30  # about sqrt(2000 / 4 * 3 / 4) = 19
    assert coded_share(CONTEXT) == 1
    assert not torch.equal(chosen, is_coded(row, pos, SEED + 1, 0.25))


def test_what_is_kept_does_not_grow_with_tokens() -> None:
    tallier = Tallier(empty(share=0.0), pending=100)
    for i in range(40):
        new = random_firings(90, i)
        tallier.add(batch_of(new, torch.arange(12 * CONTEXT)))
        assert tallier._n_pending < 100
        assert sum(len(part.row) for part in tallier._pending) == tallier._n_pending
        assert len(tallier.bars.tops.row) <= F * TOP
        assert len(tallier.bars.samples.row) <= F * SAMPLE * 12  # values come from 12 cells
    whole = tallier.finish(0)
    assert int(whole.count.sum()) == 40 * 90
    assert len(whole.codes.token) == 0


def test_smallest_keys_of_a_union_of_cells_are_a_uniform_draw() -> None:
    """Three cells of 2, 30 and 8 firings, a draw of 2 from all: each firing must come with the same chance 2/40."""
    sizes, draws = (2, 30, 8), 6000
    value = torch.cat([torch.full((n,), 2.0 ** (i / 4 + 0.1)) for i, n in enumerate(sizes)])
    n = len(value)
    feature = torch.arange(draws).repeat_interleave(n)  # each feature is a repetition with other keys
    row = torch.arange(n).repeat(draws)
    firings = Firings(feature, row, row % 5, value.repeat(draws))
    kept, cell = tally_module.smallest_keys(firings, SAMPLE, SEED, draws)
    assert ranks(cell).max() < SAMPLE
    order = (keys(kept, SEED).double() / 2**63 + kept.feature).argsort()  # by feature, then key
    drawn = kept.row[order][ranks(kept.feature[order]) < 2]
    counts = torch.bincount(drawn, minlength=n).double()
    expected = 2 * draws / n
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 73  # chi-square, 39 degrees of freedom: passed by chance in all but 1 of 1000 runs


def test_over_many_seeds_every_firing_of_a_cell_is_kept_equally_often() -> None:
    """The draw of a whole pass, merged from two shards: 40 firings of one cell, 2 kept, 600 seeds; chi-square."""
    n, seeds, counts = 40, 600, np.zeros(40)
    row, pos = torch.arange(n) // 4, torch.arange(n) % 4
    for seed in range(seeds):
        whole = Tally.empty(1, 1, first_row=0, top=1, sample=SAMPLE, seed=seed, context=4)
        for part in (slice(0, 25), slice(25, n)):
            tallier = Tallier(Tally.empty(1, 1, first_row=0, top=1, sample=SAMPLE, seed=seed, context=4))
            size = len(row[part])
            tallier.add(
                Batch(row[part], pos[part], torch.arange(size), torch.zeros(size).long(), torch.ones(size), torch.ones(size, 1))
            )
            whole.merge(tallier.finish(1))
        counts[(whole.samples.row * 4 + whole.samples.pos).numpy()] += 1
    expected = SAMPLE * seeds / n
    # One firing's count is binomial with p = SAMPLE / n; kept without replacement, the sum is chi-square scaled by 1 - p.
    assert counts.sum() == SAMPLE * seeds
    assert ((counts - expected) ** 2 / expected).sum() / (1 - SAMPLE / n) < 73  # 39 degrees of freedom, 1 in 1000


def test_keys_depend_on_every_part_of_a_firing_and_on_the_seed() -> None:
    one = Firings(*(torch.tensor([x]) for x in (5, 6, 7)), torch.ones(1))
    others = [
        Firings(*(torch.tensor([x]) for x in triple), torch.ones(1))
        for triple in ((6, 6, 7), (5, 7, 7), (5, 6, 8), (6, 5, 7), (5, 7, 6))
    ]
    found = {int(keys(f, 0)) for f in (one, *others)} | {int(keys(one, 1))}
    assert len(found) == 7
    many = Firings(
        torch.zeros(20000, dtype=torch.int32), torch.arange(20000), torch.zeros(20000, dtype=torch.int32), torch.ones(20000)
    )
    share = keys(many, 0).double() / 2**63
    assert abs(float(share.mean()) - 0.5) < 0.01
    assert np.histogram(share.numpy(), 20, (0, 1))[0].min() > 850


def test_bins_hold_their_lower_edge_and_the_ends_hold_the_rest() -> None:
    edges = torch.from_numpy(EDGES)
    assert bins(edges[:-1]).tolist() == list(range(N_BINS))
    assert bins(torch.nextafter(edges[1:], torch.zeros(N_BINS))).tolist() == list(range(N_BINS))
    assert bins(torch.tensor([1e-30, 1e30])).tolist() == [0, N_BINS - 1]


def test_head_parts_are_the_dot_products_of_each_head() -> None:
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(11, 24, generator=generator), torch.randn(7, 24, generator=generator)
    token, feature = (torch.rand(11, 7, generator=generator) < 0.4).nonzero(as_tuple=True)
    found = head_parts(z, by_head(w, 3), token, feature)
    expected = torch.einsum("nhd,nhd->nh", z[token].view(-1, 3, 8), w[feature].view(-1, 3, 8))
    torch.testing.assert_close(found, expected)


def test_a_saved_tally_reads_back_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tally = tallied(random_firings(200, 3), torch.arange(12 * CONTEXT), 50, share=0.5)
    tally.first_row = 64
    tally.save(tmp_path / "a.npz")
    again = Tally.load(tmp_path / "a.npz")
    assert Tally.first_row_of(tmp_path / "a.npz") == again.first_row == 64
    assert list(as_rows(again.tops)) == list(as_rows(tally.tops))
    assert list(as_rows(again.samples)) == list(as_rows(tally.samples))
    for name in (*SUMS, "highest", "lowest"):
        assert torch.equal(getattr(again, name), getattr(tally, name)), name
    for name in ("token", "n", "feature"):
        assert torch.equal(getattr(again.codes, name), getattr(tally.codes, name)), name
    assert (again.context, again.share, again.n_tokens) == (CONTEXT, 0.5, 108)
    assert Tally.count_of(tmp_path / "a.npz").tolist() == tally.count.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
