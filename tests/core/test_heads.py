"""Summaries of heads, on features made to be alike or not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sae_core.detectors import FAMILIES
from sae_core.feature_table import FeatureTable
from sae_core.heads import LEAST, diversity, participation, summaries
from sae_core.records import HarvestTotals, HeadRecord

D_HEAD, N_HEADS = 64, 3


def made(
    slices: np.ndarray,
    families: list[str | None],
    promoted: list[list[str]],
    *,
    dead: int = 0,
    dfa: np.ndarray | None = None,
    acts: np.ndarray | None = None,
) -> list[HeadRecord]:
    """Summaries of features whose decoder lies at head 0 (slices [n, D_HEAD]) but for a little at head 1; the last are dead."""
    n = len(slices)
    acts = np.ones(n) if acts is None else acts
    W_dec = np.zeros((n, N_HEADS, D_HEAD))
    W_dec[:, 0], W_dec[:, 1, 0] = slices, 0.1
    norms = np.linalg.norm(W_dec, axis=2)
    count = np.full(n, 10)
    count[n - dead :] = 0
    ids = {text: i for i, text in enumerate(sorted({text for texts in promoted for text in texts}))}
    arrays = {
        "count": count,
        "total": count * acts,
        "head_norm": norms / norms.sum(1, keepdims=True),
        "head_dfa": np.tile([2.0, -1.0, 0.0], (n, 1)) if dfa is None else dfa,
        "holds": np.array([[name == family for name in FAMILIES] for family in families]),
        "promoted": np.array([[ids[text] for text in (texts * 2)[:2]] for texts in promoted]),
    }
    none = np.zeros((0, 4), dtype=np.int32)
    texts = {i: text for text, i in ids.items()}
    table = FeatureTable(HarvestTotals(1, 1, n - dead, 8), arrays, texts, none[:, 0], np.zeros(1, dtype=np.int64), none)
    sae: Any = SimpleNamespace(W_dec=torch.from_numpy(W_dec.reshape(n, -1)), cfg=SimpleNamespace(n_heads=N_HEADS))
    return summaries(table, sae)


def random_slices(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, D_HEAD))


def words(n: int) -> list[list[str]]:
    return [[f"w{i}", f"v{i}"] for i in range(n)]


def test_random_directions_that_nothing_relates_are_diverse_and_polysemantic() -> None:
    head = made(random_slices(20), [None] * 20, words(20))[0]
    # n directions at random in d dimensions: about n d / (n + d + 1).
    assert head.diversity == pytest.approx(20 * 64 / 85, rel=0.1)
    assert head.polysemantic == 1
    assert head.detail["related_by"] == {"family": 0, "direction": 0, "tokens": 0}


def test_copies_of_one_direction_are_neither() -> None:
    head = made(np.tile(random_slices(1), (20, 1)), [None] * 20, words(20))[0]
    assert head.diversity == pytest.approx(1, abs=1e-4)
    assert head.polysemantic == 0
    opposite = random_slices(1) * np.array([[1], [-1]] * 10)
    assert made(opposite, [None] * 20, words(20))[0].polysemantic == 0  # a direction and its opposite are about one thing


def test_diversity_counts_features_by_how_much_they_are_there() -> None:
    """Four directions at right angles, of 20: as if equally, 20; with one of them thousands of times as strong, 1."""
    slices, dead = np.eye(D_HEAD)[:20], 5
    assert made(slices, [None] * 20, words(20))[0].diversity == pytest.approx(20)
    assert made(slices, [None] * 20, words(20), dead=dead)[0].diversity == pytest.approx(15), "a dead feature writes nothing"
    strong = np.where(np.arange(20) < 4, 1000.0, 1.0)
    assert made(slices, [None] * 20, words(20), acts=strong)[0].diversity == pytest.approx(4, rel=1e-3)
    assert made(slices * strong[:, None], [None] * 20, words(20))[0].diversity == pytest.approx(4, rel=1e-3)


def test_diversity_is_that_of_the_activations_spectrum() -> None:
    """By another way: features that never fire together, activations one by one, and the singular values of what they write."""
    draw = np.random.default_rng(2)
    slices, times = draw.normal(size=(6, 8)), draw.integers(1, 9, 6)
    acts = draw.uniform(0.5, 2, 6)
    written = np.repeat(slices * acts[:, None], times, axis=0)
    e = np.linalg.svd(written, compute_uv=False) ** 2
    assert diversity(slices, times * acts**2) == pytest.approx(e.sum() ** 2 / (e**2).sum())
    assert diversity(np.zeros((3, 8)), np.ones(3)) == 0


def test_ten_features_of_one_mechanism_are_diverse_and_not_polysemantic() -> None:
    head = made(random_slices(20), ["induction"] * 20, words(20))[0]
    assert head.diversity == pytest.approx(20 * 64 / 85, rel=0.1)
    assert head.polysemantic == 0
    mixed = made(random_slices(20), ["induction", "token by induction"] * 10, words(20))[0]
    assert mixed.polysemantic == 0  # one is a special case of the other
    assert made(random_slices(20), ["local"] * 20, words(20))[0].polysemantic == 1  # too broad to relate anything


def test_half_of_one_kind_relates_the_pairs_within_it() -> None:
    slices = random_slices(10)
    head = made(slices, ["induction"] * 5 + [None] * 5, words(10))[0]
    assert head.polysemantic == pytest.approx(1 - 10 / 45, abs=1e-4)
    shared = [["same", f"w{i}"] if i < 5 else [f"w{i}"] for i in range(10)]
    assert made(slices, [None] * 10, shared)[0].polysemantic == pytest.approx(1 - 10 / 45, abs=1e-4)


def test_what_holds_for_ten_need_not_hold_for_fifty() -> None:
    n = 50
    slices = random_slices(n) * np.where(np.arange(n) < 10, 3, 1)[:, None]  # the first ten have the largest share
    head = made(slices, ["induction"] * 10 + [None] * 40, words(n))[0]
    assert sorted(idx for idx, _ in head.detail["top"]) == list(range(10))
    assert head.polysemantic == 0
    assert head.detail["polysemantic_of_many"] == pytest.approx(1 - 45 / 1225, abs=1e-4)


def test_leading_counts_live_features_by_data_and_by_weights() -> None:
    dfa = np.tile([2.0, -1.0, 0.0], (8, 1))
    dfa[:3] = [0.5, -1.0, 0.0]  # by size, head 1 leads these
    heads = made(random_slices(8), ["induction", None, "induction", *["local"] * 5], words(8), dead=2, dfa=dfa)
    assert [head.head for head in heads] == [0, 1, 2]
    assert [head.n_led for head in heads] == [3, 3, 0]
    assert [head.n_led_norm for head in heads] == [6, 0, 0]
    assert heads[0].families == {"local": 3}
    assert heads[1].families == {"induction": 2, "unclear": 1}
    assert list(heads[1].families) == ["induction", "unclear"]
    assert {idx for idx, _ in heads[0].detail["top"]} == set(range(6))  # no dead one


def test_of_too_few_features_nothing_is_said() -> None:
    heads = made(random_slices(LEAST), [None] * LEAST, words(LEAST), dead=1)
    assert all(head.diversity is None and head.polysemantic is None for head in heads)
    none = made(random_slices(3), [None] * 3, words(3), dead=3)
    assert [(head.n_led, head.detail["top"], head.detail["participation"]) for head in none] == [(0, [], None)] * 3


def test_participation_is_the_number_of_heads_that_share_equally() -> None:
    found = participation(np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4]))
    assert found.tolist() == pytest.approx([1, 2, 4])
