"""What a scan keeps: exact, mergeable, fair. Against brute force on small random firings."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core import tally as tally_module
from sae_core.tally import EDGES, N_BINS, Firings, Tallier, Tally, bins, by_head, cells, head_parts, keys, ranks

F, H, TOP, SAMPLE, SEED = 4, 2, 3, 2, 7


def random_firings(n: int, seed: int, *, n_rows: int = 12, context: int = 9) -> Firings:
    """Distinct (feature, row, pos), values with many ties."""
    rng = np.random.default_rng(seed)
    flat = rng.choice(F * n_rows * context, size=min(n, F * n_rows * context), replace=False)
    feature, row, pos = np.unravel_index(flat, (F, n_rows, context))
    value = np.exp2(rng.integers(-6, 6, len(flat)) / 4).astype(np.float32)
    return Firings(*(torch.from_numpy(x) for x in (feature, row, pos, value)))


def parts_of(firings: Firings) -> torch.Tensor:
    """What two heads gave, made up from the firing alone so that every order agrees."""
    return torch.stack([firings.value * 0.75, firings.value * 0.25 - firings.pos], 1).float()


def tallied(firings: Firings, batch: int, first_row: int = 0) -> Tally:
    tallier = Tallier(Tally.empty(F, H, first_row=first_row, top=TOP, sample=SAMPLE, seed=SEED))
    for low in range(0, len(firings.row), batch):
        some = firings.take(torch.arange(low, min(low + batch, len(firings.row))))
        tallier.add(some, parts_of(some))
    return tallier.finish(n_tokens=0, n_rows=0)


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
@given(n=st.integers(0, 300), seed=st.integers(0, 10_000), batch=st.integers(1, 80), pending=st.integers(1, 200), data=st.data())
def test_any_split_merged_in_any_order_equals_brute_force(
    n: int, seed: int, batch: int, pending: int, data: st.DataObject
) -> None:
    firings = random_firings(n, seed)
    owner = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, 12))[firings.row]  # shards hold whole rows
    shuffled = torch.from_numpy(np.random.default_rng(seed + 1).permutation(len(firings.row)))
    firings, owner = firings.take(shuffled), owner[shuffled]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally_module, "PENDING", pending)
        shards = [tallied(firings.take(owner == i), batch) for i in range(3)]
    whole = Tally.empty(F, H, first_row=0, top=TOP, sample=SAMPLE, seed=SEED)
    for i in data.draw(st.permutations(range(3))):
        whole.merge(shards[i])

    assert list(as_rows(whole.tops)) == brute_tops(firings)
    assert len(whole.samples.row) == len(set(as_rows(whole.samples)))
    assert set(as_rows(whole.samples)) == brute_samples(firings)
    values = firings.value.double()
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


def test_what_is_kept_does_not_grow_with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally_module, "PENDING", 100)
    tallier = Tallier(Tally.empty(F, H, first_row=0, top=TOP, sample=SAMPLE, seed=SEED))
    for i in range(40):
        new = random_firings(90, i, n_rows=1000)
        tallier.add(new, parts_of(new))
        assert tallier._n_pending < 100
        assert sum(len(part.row) for part in tallier._pending) == tallier._n_pending
        assert len(tallier.tally.tops.row) <= F * TOP
        assert len(tallier.tally.samples.row) <= F * SAMPLE * 12  # values come from 12 cells
    assert int(tallier.finish(0, 0).count.sum()) == 40 * 90


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
    tally = tallied(random_firings(200, 3), 50, first_row=64)
    tally.save(tmp_path / "a.npz")
    again = Tally.load(tmp_path / "a.npz")
    assert Tally.first_row_of(tmp_path / "a.npz") == again.first_row == 64
    assert list(as_rows(again.tops)) == list(as_rows(tally.tops))
    assert list(as_rows(again.samples)) == list(as_rows(tally.samples))
    for name in ("count", "total", "squares", "highest", "lowest", "histogram", "heads", "heads_squares"):
        assert torch.equal(getattr(again, name), getattr(tally, name)), name
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
