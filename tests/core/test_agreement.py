"""Agreement against values worked out by hand, and against published examples."""

import pytest

from sae_core.agreement import cohen_kappa, krippendorff_alpha


def pairs(**counts: int) -> list[tuple[str, str]]:
    return [(key[0], key[1]) for key, n in counts.items() for _ in range(n)]


def test_kappa_of_the_textbook_table() -> None:
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 35/50 = 0.7; p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5; 0.2/0.5 = 0.4."""
    assert cohen_kappa(pairs(yy=20, yn=5, ny=10, nn=15)) == pytest.approx(0.4)


def test_kappa_of_three_answers_by_hand() -> None:
    """10 pairs; equal 6. First: y 5, m 2, n 3; second: y 4, m 3, n 3. p_e = (20 + 6 + 9)/100 = 0.35; 0.25/0.65."""
    answers = pairs(yy=3, ym=1, yn=1, mm=1, mn=1, nn=1) + pairs(nm=1, ny=1)
    assert sum(a == b for a, b in answers) == 5
    # p_o = 0.5; first: y 5, m 2, n 3; second: y 4, m 3, n 3
    assert cohen_kappa(answers) == pytest.approx((0.5 - 0.35) / (1 - 0.35))


def test_kappa_is_one_for_twins_negative_for_opposites_and_unknown_where_nothing_varies() -> None:
    assert cohen_kappa(pairs(yy=3, nn=2)) == 1
    assert cohen_kappa(pairs(yn=2, ny=2)) == -1
    assert cohen_kappa(pairs(yy=5)) is None
    assert cohen_kappa([]) is None


def test_alpha_of_two_things_by_hand() -> None:
    """yy and yn: n = 4, y 3, n 1. D_o = (0/1 + 2/1)/4 = 1/2; D_e = (3*1 + 1*3)/(4*3) = 1/2; alpha 0."""
    assert krippendorff_alpha(["yy", "yn"]) == pytest.approx(0)


def test_alpha_of_three_people_by_hand() -> None:
    """yyy, yyn, nn, and one answer alone that says nothing. n = 8, y 5, n 3.

    D_o n = 0 + (2*1 + 1*2)/2 + 0 = 2; D_e n (n-1) = 5*3 + 3*5 = 30. alpha = 1 - 2 * 7 / 30 = 16/30."""
    assert krippendorff_alpha(["yyy", "yyn", "nn", "y"]) == pytest.approx(16 / 30)


def test_alpha_of_the_published_example_with_gaps() -> None:
    """Three coders, fifteen units, many gaps; nominal alpha 0.691 as Krippendorff's example is worked out in print."""
    coders = ("*****34121133*3", "1*213343*******", "**21344*2113 3*4".replace(" ", ""))
    units = ["".join(answer for answer in unit if answer != "*") for unit in zip(*coders, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.691, abs=5e-4)


def test_alpha_is_unknown_where_nothing_is_compared_or_varies() -> None:
    assert krippendorff_alpha(["y", "n"]) is None
    assert krippendorff_alpha(["yy", "yyy"]) is None
    assert krippendorff_alpha(["yy", "nn"]) == 1
