"""Features of two SAEs matched, where the answer is known in closed form."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_core.config import Site
from sae_core.errors import SAEMismatch
from sae_core.stability import check_same_site, stability


def rotation(angle: float, d: int) -> Tensor:
    """Turns each pair of coordinates (0, 1), (2, 3) ... by `angle`."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.block_diag(*[torch.tensor([[c, s], [-s, c]])] * (d // 2))


def test_a_permuted_and_rescaled_copy_is_found_again_whole() -> None:
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    found = stability(features, 3 * features[torch.randperm(40, generator=torch.Generator().manual_seed(1))], "copy")
    assert (found.mean, found.median, found.mutual_mean) == pytest.approx((1.0, 1.0, 1.0))
    assert (found.above_07, found.above_09, found.mutual) == (1.0, 1.0, 1.0)
    assert (found.features, found.others, found.against) == (40, 40, "copy")


@pytest.mark.parametrize(("degrees", "above_07", "above_09"), [(20, 1.0, 1.0), (30, 1.0, 0.0), (44, 1.0, 0.0)])
def test_a_rotated_basis_has_the_cosine_of_the_angle(degrees: float, above_07: float, above_09: float) -> None:
    angle = math.radians(degrees)
    found = stability(torch.eye(6), torch.eye(6) @ rotation(angle, 6), "turned")
    assert (found.mean, found.median) == pytest.approx((math.cos(angle),) * 2, rel=1e-6)
    assert (found.above_07, found.above_09) == (above_07, above_09)
    assert found.mutual == 1.0


def test_features_that_the_other_lacks_count_against_it() -> None:
    found = stability(torch.eye(4), torch.eye(4)[:1], "poor")
    assert (found.mean, found.median) == pytest.approx((0.25, 0.0))
    assert (found.above_07, found.mutual, found.mutual_mean) == (0.25, 0.25, 1.0)


def test_only_one_of_two_twins_is_mutual() -> None:
    ours = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    found = stability(ours, torch.eye(2), "split")
    assert found.mutual == pytest.approx(2 / 3)
    assert found.above_09 == 1.0


def test_opposite_directions_are_no_match() -> None:
    found = stability(torch.eye(2), -torch.eye(2), "mirror")
    assert (found.mean, found.above_07) == (0.0, 0.0)


def test_random_directions_give_what_chance_gives() -> None:
    """The largest of n cosines in d dimensions is about sqrt(2 ln n / d): far from 0, so a mean alone would flatter."""
    draw = torch.Generator().manual_seed(3)
    found = stability(torch.randn(500, 256, generator=draw), torch.randn(500, 256, generator=draw), "chance")
    assert found.mean == pytest.approx(math.sqrt(2 * math.log(500) / 256), rel=0.15)
    assert found.above_07 == 0.0


def test_an_sae_without_live_features_has_no_number() -> None:
    found = stability(torch.zeros(0, 3), torch.eye(3), "dead")
    assert found.model_dump() == dict.fromkeys(found.model_dump()) | {"against": "dead", "features": 0, "others": 3}


def test_another_site_is_refused_in_words() -> None:
    def sae(**changed: Any) -> Any:
        return SimpleNamespace(
            cfg=SimpleNamespace(**{"model": "m", "model_fingerprint": "f", "site": Site(layer=1), "d_in": 4} | changed)
        )

    check_same_site(sae(), sae(), "other")
    for changed in ({"site": Site(layer=2)}, {"model_fingerprint": "g"}, {"d_in": 8}):
        with pytest.raises(SAEMismatch, match="other reads layer"):
            check_same_site(sae(), sae(**changed), "other")
