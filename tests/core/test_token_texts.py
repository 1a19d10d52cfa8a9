"""Token texts: which are one word, and what comes after what."""

import pytest

from sae_core.token_texts import plain, promoted_successor, sequence_places


def test_a_leading_space_and_capitals_do_not_make_another_word() -> None:
    assert len({plain(text) for text in ("board", " board", "Board", " BOARD")}) == 1
    assert plain("  board") != plain(" board")
    assert plain(" ") != plain("")
    assert plain("\n") == "\n"
    assert plain("  ") != plain(" ")


@pytest.mark.parametrize(
    ("source", "promoted", "rank"),
    [
        (" Monday", ["x", " Tuesday"], 1),
        (" sunday", ["Monday"], 0),
        (" Dec", [" Jan"], 0),
        ("7", ["8", "9"], 0),
        ("19", ["20"], 0),
        ("3rd", ["4th"], 0),
        (" one", [" Two"], 0),
        (" first", [" second"], 0),
        ("b", [" C"], 0),
        (" IV", [" V"], 0),
        ("I", [" ii"], 0),
        (" May", [" june", " May"], 0),
        (" Monday", [" Monday", " Tuesday"], None),  # the source itself comes first: about weekdays
        (" Monday", [" Wednesday", " Tuesday"], None),
        (" Monday", [" Tues"], None),
        ("7", ["9"], None),
        (" board", [" boards"], None),
        ("z", ["a"], None),
        (" Monday", [], None),
    ],
)
def test_a_successor_is_the_first_of_its_sequence_among_what_is_promoted(
    source: str, promoted: list[str], rank: int | None
) -> None:
    assert promoted_successor(source, promoted) == rank


def test_a_token_may_be_in_several_sequences() -> None:
    assert sequence_places(" May") == {"month": 4, "short month": 4}
    assert sequence_places("i") == {"letter": 8, "roman numeral": 0}
    assert sequence_places("12") == {"number": 12}
    assert sequence_places("12345") == sequence_places(" word") == {}
