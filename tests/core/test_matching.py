"""Features of two SAEs, matched pair by pair, against a case that is known."""

import torch

from sae_core.matching import BINS, match

EYE = torch.eye(8)


def test_features_are_matched_with_their_copies_and_the_rest_is_alone() -> None:
    a = torch.stack([EYE[0], EYE[1], EYE[2] + 0.1 * EYE[7], EYE[3]])
    b = torch.stack([3 * EYE[2], EYE[0], EYE[5], -EYE[3], EYE[1] + 0.5 * EYE[6]])
    found = match(a, b, torch.arange(4), torch.arange(5), ("a", "b"), [])
    assert [(pair.a, pair.b) for pair in found.best] == [(0, 1), (2, 0), (1, 4)]
    assert [pair.cosine for pair in found.best] == [1.0, round(1 / 1.01**0.5, 4), round(1 / 1.25**0.5, 4)]
    assert found.mutual == 3
    assert [one.a for one in found.ours.alone] == [3], "an opposite direction is no counterpart"
    assert {one.a for one in found.theirs.alone} == {2, 3}
    assert (found.ours.apart, found.theirs.apart) == (1, 2)
    assert sum(found.ours.counts) == 4
    assert found.ours.counts[0] == 1
    assert found.ours.counts[-1] == 2
    assert len(found.ours.counts) == BINS
    assert "3 mutual pairs" in found.summary


def test_dead_features_take_no_part_and_indices_stay_those_of_the_sae() -> None:
    found = match(EYE, EYE, torch.tensor([2, 5]), torch.tensor([1, 5, 7]), ("a", "b"), [])
    assert [(pair.a, pair.b) for pair in found.best if pair.cosine == 1] == [(5, 5)]
    assert found.ours.summary.features == 2
    assert found.theirs.summary.features == 3


def test_the_spread_goes_from_the_best_to_the_worst() -> None:
    torch.manual_seed(0)
    a = torch.randn(400, 32)
    found = match(a, a + torch.linspace(0, 2, 400)[:, None] * torch.randn(400, 32), *[torch.arange(400)] * 2, ("a", "b"), [])
    cosines = [pair.cosine for pair in found.spread]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] == found.best[0].cosine
    assert cosines[-1] < found.best[-1].cosine


def test_an_sae_without_a_live_feature_matches_nothing() -> None:
    found = match(EYE, EYE, torch.arange(0), torch.arange(8), ("a", "b"), ["why"])
    assert (found.mutual, found.best, found.ours.counts, found.notes) == (0, [], [], ["why"])
