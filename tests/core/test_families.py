"""Shares of positive DFA by kind of source, by hand."""

import numpy as np
import pytest
import torch

from sae_core.families import MEASURES, average, measure

START = 0
#            0      1  2  3  4  5  6  7  8
ROW = [START, 5, 6, 7, 5, 8, 9, 5, 6]


def shares(entries: dict[int, float], dest: int, row: list[int] = ROW) -> dict[str, float]:
    """Measures of one example whose head-0 DFA is `entries` by source; head 1 gives -1 everywhere, which must not count."""
    dfa = torch.zeros(1, 2, len(row))
    for source, value in entries.items():
        dfa[0, 0, source] = value
    dfa[0, 1, : dest + 1] = -1
    found, _ = measure(dfa, torch.tensor(row), torch.tensor([dest]), START)
    return dict(zip(MEASURES, found[0].tolist(), strict=True))


def test_induction_is_the_share_on_tokens_that_followed_the_destination_token_before() -> None:
    found = shares({2: 3.0, 5: 1.0, 6: 4.0}, dest=7)  # the destination is 5; it was followed by 6 (at 2) and by 8 (at 5)
    assert found["induction"] == pytest.approx(0.5)
    assert found["induction_chance"] == pytest.approx(2 / 7)


def test_duplicates_are_earlier_copies_and_never_the_destination_itself() -> None:
    found = shares({1: 1.0, 4: 1.0, 7: 2.0}, dest=7)
    assert found["duplicate"] == pytest.approx(0.5)
    assert found["duplicate_chance"] == pytest.approx(2 / 7)
    assert found["current"] == pytest.approx(0.5)


def test_a_repeated_token_is_not_its_own_induction() -> None:
    assert shares({3: 1.0}, dest=3, row=[START, 5, 6, 6])["induction"] == 0


def test_in_a_run_of_one_word_chance_gives_most() -> None:
    found = shares({2: 1.0, 3: 1.0}, dest=6, row=[START, 6, 6, 6, 6, 6, 6])
    assert found["induction"] == found["duplicate"] == 1
    assert found["induction_chance"] == pytest.approx(4 / 6)  # all but the first copy and the destination
    assert found["duplicate_chance"] == pytest.approx(5 / 6)


def test_the_row_start_counts_for_itself_only() -> None:
    found = shares({0: 3.0, 6: 1.0}, dest=7)
    assert found["row_start"] == pytest.approx(0.75)
    assert found["previous"] == pytest.approx(1.0)
    assert found["distance"] == pytest.approx(1.0)
    packed = shares({0: 1.0, 3: 2.0, 5: 1.0}, dest=5, row=[START, 5, 6, START, 5, 8])  # a start between packed documents
    assert packed["row_start"] == pytest.approx(0.75)
    assert packed["current"] == pytest.approx(1.0)


def test_what_followed_a_row_start_is_no_induction_of_it() -> None:
    assert shares({1: 1.0}, dest=3, row=[START, 5, 6, 7])["induction"] == 0


def test_near_and_far_are_unknown_where_the_destination_is_too_early_for_them() -> None:
    row = [START, *range(1, 100)]
    early, late = shares({10: 1.0}, 15, row), shares({10: 1.0, 85: 3.0}, 90, row)
    assert np.isnan(early["near"])
    assert np.isnan(early["far"])
    assert late["near"] == pytest.approx(0.75)
    assert late["far"] == pytest.approx(0.25)
    assert late["distance"] == pytest.approx((80 + 3 * 5) / 4)
    assert np.isnan(shares({10: 1.0}, 50, row)["far"])
    assert shares({10: 1.0}, 50, row)["near"] == 0


def test_the_strongest_source_leaves_row_starts_out() -> None:
    dfa = torch.zeros(2, 1, 9)
    dfa[:, 0, 0] = 9
    dfa[0, 0, 3], dfa[1, 0, 5], dfa[1, 0, 2] = 2, 3, 1
    found, source = measure(dfa, torch.tensor(ROW), torch.tensor([7, 7]), START)
    assert source.tolist() == [3, 5]
    assert found[:, MEASURES.index("top_share")].tolist() == pytest.approx([1, 0.75])
    assert found[:, MEASURES.index("source_gap")].tolist() == [4, 2]


def test_no_positive_dfa_gives_zeros_and_no_nan() -> None:
    found = shares({}, dest=7)
    assert found["induction"] == found["row_start"] == found["distance"] == 0


def test_means_leave_unknown_values_out() -> None:
    measures = np.array([[1, np.nan], [3, 4], [5, np.nan]], dtype=np.float32)
    found = average(measures, np.array([1, 1, 2]), 4)
    np.testing.assert_array_equal(found, np.array([[np.nan] * 2, [2, 4], [5, np.nan], [np.nan] * 2], dtype=np.float32))
