"""Which features fire together: against correlation coefficients of the dense 0/1 columns."""

import numpy as np
import pytest
import torch

from sae_core import partners as module
from sae_core.partners import PARTNERS, SUPPORT, coactive, partners
from sae_core.tally import Codes


def codes_of(on: np.ndarray) -> Codes:
    """The codes of dense indicators [T, F]."""
    token, feature = on.nonzero()
    return Codes(torch.arange(len(on)), torch.from_numpy(np.bincount(token, minlength=len(on))), torch.from_numpy(feature).int())


def drawn(seed: int, n_tokens: int = 700, n_features: int = 60) -> np.ndarray:
    """Indicators of features of many densities, some alike: 3 and 7 always fire together, 9 on every token, 11 never, 12 and 13
    together but too seldom to say so, 14 only where 15 does not."""
    rng = np.random.default_rng(seed)
    on = rng.random((n_tokens, n_features)) < rng.uniform(0.01, 0.4, n_features)
    on[:, 7], on[:, 9], on[:, 11] = on[:, 3], True, False
    on[:, 12] = on[:, 13] = np.arange(n_tokens) < SUPPORT - 1
    on[:, 14] = ~on[:, 15]
    on[::3, 20:25] |= on[::3, 30:31]
    return on


@pytest.mark.parametrize(("seed", "at_once"), [(0, (1 << 23, 1 << 22)), (1, (300, 1000)), (2, (60, 17)), (3, (120, 3))])
def test_partners_are_the_strongest_correlations_of_the_indicators(
    seed: int, at_once: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COUNTS_AT_ONCE", at_once[0])
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", at_once[1])
    on = drawn(seed)
    found = partners(codes_of(on), on.shape[1])
    together = on.astype(int).T @ on.astype(int)
    for i in range(on.shape[1]):
        expected = {}
        for j in range(on.shape[1]):
            if j != i and together[i, j] >= SUPPORT and on[:, i].std() > 0 and on[:, j].std() > 0:
                phi = round(np.corrcoef(on[:, i], on[:, j])[0, 1], 6)
                expected |= {j: phi} if phi > 0 else {}
        best = sorted(expected, key=lambda j: (-expected[j], j))[:PARTNERS]
        there = found.feature[i] >= 0
        mine = found.feature[i][there].tolist()
        np.testing.assert_allclose(found.phi[i][there], [expected[j] for j in best], atol=2e-6)
        assert all(expected[j] == pytest.approx(float(phi), abs=2e-6) for j, phi in zip(mine, found.phi[i][there], strict=True))
        assert len(set(mine)) == len(mine) == len(best)
        assert found.both[i][there].tolist() == together[i, mine].tolist()
    assert (found.n_tokens, found.feature[3][0], found.phi[3][0]) == (len(on), 7, 1)
    for nobody in (9, 11, 12):
        assert (found.feature[nobody] == -1).all()
    assert 15 not in found.feature[14]


def test_equal_partners_stand_in_order_of_their_numbers() -> None:
    on = np.zeros((40, 16), dtype=bool)
    on[:10] = True
    assert partners(codes_of(on), 16).feature[5].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_nothing_is_told_of_a_feature_without_partners_or_of_no_tokens() -> None:
    empty = partners(Codes.empty(), 4)
    assert (empty.feature == -1).all()
    assert coactive(empty.n_tokens, empty.feature[0], empty.both[0], empty.phi[0]) == {}
    on = drawn(0)
    found = partners(codes_of(on), on.shape[1])
    told = coactive(found.n_tokens, found.feature[3], found.both[3], found.phi[3])
    assert told["tokens"] == len(on)
    assert told["pairs"][0] == [7, int(on[:, 3].sum()), 1.0]
