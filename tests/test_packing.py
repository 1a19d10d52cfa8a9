"""Packed columns: what comes back is what went in, within the error stated; sums stay; what was written before is still read."""

import math
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.records import ExampleRecord
from server.db import Database
from server.packing import (
    ERROR,
    FLOOR,
    ManyActs,
    ManyDfa,
    decode,
    deflate,
    encode,
    fold,
    inflate,
    pack_acts,
    pack_dfa,
    pack_many_acts,
    pack_many_dfa,
    read_acts,
    read_dfa,
    shorten,
    unfold,
)
from server.tables import Model


def example(seed: int, *, n_heads: int = 9, start: int = 0, dest: int = 40, n: int = 32, spread: float = 3.0) -> ExampleRecord:
    """An example whose numbers reach over some orders of magnitude, as DFA does."""
    rng = np.random.default_rng(seed)
    width = dest - start + 1
    places = np.sort(rng.choice(n_heads * width, min(n, n_heads * width), replace=False))
    value = (rng.choice([-1, 1], len(places)) * 10 ** rng.normal(-1, spread / 3, len(places))).astype(np.float32)
    order = np.argsort(-np.abs(value), kind="stable")
    others = rng.choice(np.setdiff1d(np.arange(start, start + 64), [dest]), rng.integers(0, 9), replace=False)
    pos = np.sort(np.append(others, dest)).astype(np.uint16)
    acts = (10 ** rng.normal(0, 0.5, len(pos))).astype(np.float32)
    return ExampleRecord(
        feature=0, band=0, rank=0, row=3, dest=dest, start=start, act=float(acts[pos == dest][0]), preact=1.0, bias=-0.1, gap=0.0,
        abs_dfa=float(np.abs(value).sum()), acts_pos=pos, acts_value=acts,
        dfa_src=(places % width + start)[order].astype(np.uint16), dfa_head=(places // width)[order].astype(np.uint8),
        dfa_value=value[order], dropped=rng.normal(0, 0.2, n_heads).astype(np.float32),
        before=rng.normal(0, 0.2, n_heads).astype(np.float32) * np.float32(start > 0),
    )  # fmt: skip


def stored(e: ExampleRecord, acts: bytes, dfa: bytes) -> SimpleNamespace:
    return SimpleNamespace(start=e.start, dest=e.dest, act=e.act, acts=acts, dfa=dfa)


def written(*examples: ExampleRecord) -> list[SimpleNamespace]:
    return [stored(e, a, d) for e, a, d in zip(examples, pack_acts(examples), pack_dfa(examples), strict=True)]


def check(e: ExampleRecord, row: SimpleNamespace) -> None:
    """`row` says what `e` does."""
    error = ERROR
    acts, dfa = read_acts(row), read_dfa(row)
    np.testing.assert_array_equal(acts.pos, e.acts_pos)
    np.testing.assert_allclose(acts.value, e.acts_value, rtol=error, atol=FLOOR * e.acts_value.max())
    assert dict(zip(acts.pos, acts.value, strict=True))[e.dest] == e.act

    largest = float(np.abs(np.concatenate([e.dfa_value, e.dropped, e.before])).max())
    found = dict(zip(zip(dfa.src.tolist(), dfa.head.tolist(), strict=True), dfa.value.tolist(), strict=True))
    put = dict(zip(zip(e.dfa_src.tolist(), e.dfa_head.tolist(), strict=True), e.dfa_value.tolist(), strict=True))
    assert found.keys() == put.keys()
    for place, value in put.items():
        assert found[place] == pytest.approx(value, rel=error, abs=1.1 * FLOOR * largest)
    assert (np.diff(np.abs(dfa.value)) <= 0).all()  # largest first

    parts = (e.dfa_value, e.dropped, e.before)
    assert dfa.total == pytest.approx(sum(p.astype(np.float64).sum() for p in parts), abs=1e-7 * (e.abs_dfa + largest))
    heads = np.bincount(e.dfa_head, e.dfa_value.astype(np.float64), len(e.dropped)) + e.dropped + e.before
    left = float(np.abs(e.dropped).sum() + np.abs(e.before).sum()) + error * e.abs_dfa
    slack = 2 * error * left + 3 * len(heads) * FLOOR * largest
    np.testing.assert_allclose(np.bincount(dfa.head, dfa.value, len(e.dropped)) + dfa.dropped + dfa.before, heads, atol=slack)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_heads=st.integers(1, 40),
    start=st.integers(0, 70),
    reach=st.integers(0, 63),
    n=st.integers(1, 300),
    spread=st.floats(0, 6),
)
def test_what_comes_back_is_what_went_in_within_the_error_stated(
    seed: int, n_heads: int, start: int, reach: int, n: int, spread: float
) -> None:
    shape = {"n_heads": n_heads, "start": start, "dest": start + reach, "n": n, "spread": spread}
    many = [example(seed + i, **shape) for i in range(3)]  # type: ignore[arg-type]
    for e, row in zip(many, written(*many), strict=True):
        check(e, row)


def test_examples_packed_together_are_packed_as_each_alone() -> None:
    many = [example(i, start=5 * (i % 2), n=3 + 7 * i) for i in range(8)]
    assert written(*many) == [row for e in many for row in written(e)]
    assert pack_acts([]) == []


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 120), min_size=1, max_size=12))
def test_arrays_of_many_examples_are_packed_to_the_bytes_of_each_alone(seed: int, sizes: list[int]) -> None:
    several = [example(seed + i, n_heads=1, start=3 * (i % 2), n=n, dest=20 + n) for i, n in enumerate(sizes)]
    start, dest = (np.array([getattr(e, name) for e in several]) for name in ("start", "dest"))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(e, name) for e in several])

    acts = ManyActs(
        start,
        dest,
        np.array([len(e.acts_pos) for e in several]),
        joined("acts_pos").astype(int),
        joined("acts_value").astype(float),
    )
    sums = (np.array([getattr(e, name) for e in several], float) for name in ("preact", "bias", "abs_dfa"))
    dfa = ManyDfa(
        start, dest, np.array([len(e.dfa_src) for e in several]), joined("dfa_src").astype(int), joined("dfa_head").astype(int),
        joined("dfa_value").astype(float), np.stack([e.dropped for e in several]).astype(float),
        np.stack([e.before for e in several]).astype(float), *sums,
    )  # fmt: skip
    assert pack_many_acts(acts) == [pack_acts([e])[0] for e in several]
    assert pack_many_dfa(dfa) == [pack_dfa([e])[0] for e in several]


def test_a_number_takes_ten_bits_and_a_place_about_its_entropy() -> None:
    many = [example(i, n=64, dest=63) for i in range(100)]
    places = math.log2(math.comb(9 * 64, 64))
    bits = 8 * np.mean([len(row.dfa) - 25 for row in written(*many)]) - 10 * (64 + 9)
    assert places < bits < 1.06 * places + 8


def test_what_is_not_there_takes_no_room() -> None:
    e = example(2, dest=10)
    alone = replace(e, acts_pos=np.array([10], np.uint16), acts_value=np.array([e.act], np.float32))
    assert pack_acts([alone]) == [b""]
    assert read_acts(stored(alone, b"", b"")).value.tolist() == [e.act]
    shown_whole, cut = replace(e, before=0 * e.before), replace(e, before=e.before + 1)
    sizes = [len(blob) for blob in pack_dfa([shown_whole, cut])]
    assert sizes[1] - sizes[0] in (11, 12)  # nine heads more, in 10 bits each
    assert not read_dfa(stored(shown_whole, b"", pack_dfa([shown_whole])[0])).before.any()


def test_an_example_of_zeros_has_no_entries_and_sums_to_nothing() -> None:
    e, none = example(3), np.zeros(0)
    e = replace(e, dfa_src=none, dfa_head=none, dfa_value=none, dropped=0 * e.dropped, before=0 * e.before)
    found = read_dfa(written(e)[0])
    assert (len(found.src), found.total, found.dropped.tolist()) == (0, 0.0, [0.0] * 9)


def test_a_histogram_of_equal_bins_is_kept_by_its_ends() -> None:
    whole = {"edges": [float(f"{2 ** (k / 8):.6g}") for k in range(-30, 12)], "counts": list(range(41))}
    assert len(fold(whole)["edges"]) == 2
    assert unfold(whole, log=True) == (tuple(whole["edges"]), tuple(whole["counts"]))
    edges, counts = unfold(fold(whole), log=True)
    assert (edges, counts) == (pytest.approx(whole["edges"], rel=1e-5), tuple(whole["counts"]))
    even = {"edges": [-1.5, -0.5, 0.5, 1.5], "counts": [4, 5, 6]}
    assert unfold(fold(even), log=False) == unfold(even, log=False) == ((-1.5, -0.5, 0.5, 1.5), (4, 5, 6))
    below = {"edges": [-1.0, 1.0], "counts": [4, 5]}  # of which there is no log
    assert unfold(below, log=True) == unfold(below, log=False) == ((-1.0, 0.0, 1.0), (4, 5))
    assert unfold(below | {"edges": [0.0, 1.0]}, log=True) == ((0.0, 0.5, 1.0), (4, 5))
    for none in ({}, {"edges": [], "counts": []}, {"edges": [1.0, 2.0], "counts": [3]}):
        assert unfold(fold(none), log=True) == (tuple(none.get("edges", ())), tuple(none.get("counts", ())))


def test_shortened_json_keeps_what_float32_has() -> None:
    value = float(np.float32(np.pi))
    assert shorten({"a": [value, 3, None, "b", True]}) == {"a": [3.141593, 3, None, "b", True]}
    assert np.float32(shorten(value)) == pytest.approx(np.float32(value), rel=1e-6)


def test_a_code_has_a_sign_and_keeps_zero_and_the_largest() -> None:
    value, top = np.array([2.0, -2.0, 0.0, 1e-9, 1.1e-3, -1.0]), np.full(6, 2.0)
    codes = encode(value, top)
    assert codes.max() < 1024
    assert decode(codes, 2.0).tolist() == [2.0, -2.0, 0.0, 0.0, 2 * 2 ** (-510 / 48), -1.0]


def test_text_deflated_with_or_without_the_known_words_is_read() -> None:
    text = '{"examples":16,"row_start":0.1888,"induction":0.1553}'
    without = zlib.compressobj(9, zlib.DEFLATED, -15)
    before = without.compress(text.encode()) + without.flush()
    assert inflate(before) == inflate(deflate(text)) == text
    assert len(deflate(text)) < 0.6 * len(before)


def test_json_is_read_back_as_it_was_infinities_too_and_halves_of_characters_as_they_are_shown(
    tmp_path: Path,
) -> None:
    database = Database(sa.URL.create("sqlite", database=str(tmp_path / "headscope.db")))
    database.upgrade()
    said = {"a": ["\ud83d|", "é\u2028", math.inf, 1e300, -0.5, 2**70, None], "": {"b": [True, {}]}}
    with database.write() as session:
        session.add(Model(name="m", source=said))
    with database.read() as session:
        read = session.scalars(sa.select(Model.source)).one()
    assert read == said | {"a": ["⟨D83D⟩|", *said["a"][1:]]}
    database.close()
