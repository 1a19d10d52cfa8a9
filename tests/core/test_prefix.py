"""Induction features and their prefixes: a feature that is a rule, and every number again, row by row, with hooks set by hand."""

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.config import PrefixStudy
from sae_core.errors import UsageError
from sae_core.lens import Lens
from sae_core.saes import SAE
from sae_core.studies import prefix as study
from sae_core.studies.induction import copied_prefixes
from sae_core.studies.passes import row_tokens
from sae_core.studies.prefix import Prefix, controls_of, prefix
from tests.core.test_interventions import by_hand
from tests.core.test_ioi import done, put
from tests.core.test_rdfa import random_sae

LAYER = 2


def small(**changed: object) -> PrefixStudy:
    fields = {"sae": "x", "samples": 8, "prefixes": 2, "length": 24, "random": 2, "pass_tokens": 100}
    return PrefixStudy.model_validate(fields | changed)


def telling(lens: Lens, cfg: PrefixStudy) -> SAE:
    """An SAE whose features 0 and 1 fire on what copies have and controls have not: along the mean difference of their z at d."""
    sae, copies = random_sae(lens, LAYER), copied_prefixes(cfg, lens)
    controls = controls_of(copies, row_tokens(cfg, lens, 1).tolist(), cfg.seed)
    at = torch.arange(len(copies.tokens)), copies.dest
    z, plain = (lens.read_z(tokens, [LAYER])[LAYER][at] for tokens in (copies.tokens, controls))
    towards = z.mean(0) - plain.mean(0)
    for index in (0, 1):
        sae.W_enc[:, index] = towards / towards.norm()
        sae.b_enc[index] = -float(((z + plain) / 2 @ towards).median() / towards.norm()) + (sae.b_dec @ sae.W_enc[:, index])
        sae.threshold[index] = 0.0
    return sae


def made(lens: Lens) -> tuple[SAE, PrefixStudy, Prefix]:
    cfg = small()
    sae = telling(lens, cfg)
    return sae, cfg, done(prefix(lens, sae, cfg))


def test_controls_repeat_nothing_and_differ_in_the_first_copy_alone(tiny_lens: Callable[[str], Lens]) -> None:
    lens, cfg = tiny_lens("llama"), small(prefixes=4)
    copies = copied_prefixes(cfg, lens)
    controls = controls_of(copies, row_tokens(cfg, lens, 1).tolist(), cfg.seed)
    for row, control, source, dest, p in zip(copies.tokens, controls, *copies[2:0:-1], copies.prefix, strict=True):
        assert len(set(control.tolist())) == len(control), "nothing repeats"
        assert len(set(row.tolist())) == len(row) - p
        assert (row != control).nonzero()[:, 0].tolist() == list(range(int(source - p), int(source)))
        assert row[dest] == row[source - 1] != control[source - 1]


def codes(lens: Lens, sae: SAE, cfg: PrefixStudy) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Activations [d_sae] at d of each row and of its control, one row at a time; by the length of the prefix."""
    copies = copied_prefixes(cfg, lens)
    controls = controls_of(copies, row_tokens(cfg, lens, 1).tolist(), cfg.seed)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for row, control, dest, p in zip(copies.tokens, controls, copies.dest.tolist(), copies.prefix.tolist(), strict=True):
        f, without = (sae.encode(lens.read_z(one[None], [LAYER])[LAYER][0, dest][None])[0] for one in (row, control))
        found.setdefault(p, []).append((f, without))
    return found


def test_a_features_numbers_are_those_of_single_rows(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    sae, cfg, found = made(lens)
    at = codes(lens, sae, cfg)
    roles: dict[int, str] = {}
    for index in range(sae.cfg.d_sae):
        pairs = {p: [(float(f[index]), float(without[index])) for f, without in those] for p, those in at.items()}
        rises = {p: [f - without for f, without in those] for p, those in pairs.items()}
        fires = {p: statistics.mean(f > 0 for f, _ in those) for p, those in pairs.items()}
        seldom = {p: statistics.mean(without > 0 for _, without in those) for p, those in pairs.items()}
        one, more = (statistics.mean(rises[p]) for p in (1, 2))
        best = 1 if one >= more else 2
        if fires[best] >= 0.3 and seldom[best] < fires[best] / 2 and max(one, more) > 0:
            roles[index] = "long-prefix" if one < 0.5 * more else "short-prefix"
        told = next((feature for feature in found.features if feature.index == index), None)
        assert (told is not None) == (index in roles)
        if told:
            assert told.role == roles[index]
            assert told.best == pytest.approx(max(one, more), rel=1e-3, abs=1e-4)
            for p in (1, 2):
                spread = statistics.stdev(rises[p]) / len(rises[p]) ** 0.5
                assert told.rise[p - 1] == pytest.approx(statistics.mean(rises[p]), rel=1e-3, abs=1e-4)
                assert told.rise_error[p - 1] == pytest.approx(spread, rel=1e-3, abs=1e-4)
                assert told.fires[p - 1] == pytest.approx(fires[p])
                assert told.fires_control[p - 1] == pytest.approx(seldom[p], abs=1e-6)
    assert {0, 1} & set(roles)
    assert found.n_features == {role: sum(one == role for one in roles.values()) for role in ("short-prefix", "long-prefix")}
    assert [one.best for one in found.features] == sorted((one.best for one in found.features), reverse=True)


def test_losses_and_sources_are_those_of_single_rows(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    sae, cfg, found = made(lens)
    copies = copied_prefixes(cfg, lens)
    controls = controls_of(copies, row_tokens(cfg, lens, 1).tolist(), cfg.seed)
    doing = [one.index for one in found.features]
    seen = torch.stack([f for those in codes(lens, sae, cfg).values() for f, _ in those])
    others = [index for index in range(sae.cfg.d_sae) if seen[:, index].any() and index not in doing]
    draw = np.random.default_rng((cfg.seed, 5))
    drawn = [draw.choice(others, len(doing), replace=False).tolist() for _ in range(cfg.random)]
    losses: dict[tuple[str, int], list[float]] = {}
    for row, control, source, dest, p in zip(
        copies.tokens, controls, copies.source.tolist(), copies.dest.tolist(), copies.prefix.tolist(), strict=True
    ):
        z, plain = (lens.read_z(one[None], [LAYER])[LAYER][0, dest] for one in (row, control))
        f = sae.encode(z[None])[0]
        whole = f[doing] @ sae.W_dec[doing]
        ways = {"with": z, "resampled": plain, "all": z - whole}
        for i, indices in enumerate(drawn):
            part = f[indices] @ sae.W_dec[indices] if f[indices].any() else sae.W_dec[indices].sum(0)
            ways[f"others {i}"] = z - part * float(whole.norm()) / float(part.norm())
        for name, vector in ways.items():
            logits = by_hand(lens, row[None], {LAYER: put(dest, vector)})[0, dest]
            losses.setdefault((name, p), []).append(-float(logits.log_softmax(-1)[row[source]]))
        logits = by_hand(lens, control[None], {})[0, dest]
        losses.setdefault(("without", p), []).append(-float(logits.log_softmax(-1)[row[source]]))
    mean = {key: sum(values) / len(values) for key, values in losses.items()}
    changes = {one.name: one for one in found.changes}
    whole_set = changes.get("both") or changes[next(name for name in changes if "features" in name and name != "other features")]
    assert whole_set.features == changes["other features"].features == len(doing)
    for p in (1, 2):
        assert found.losses[0].values[p - 1].mean == pytest.approx(mean["with", p], rel=1e-4)
        assert found.losses[1].values[p - 1].mean == pytest.approx(mean["without", p], rel=1e-4)
        other = (mean["others 0", p] + mean["others 1", p]) / 2
        for name, value in (("resampled", mean["resampled", p]), (whole_set.name, mean["all", p]), ("other features", other)):
            assert changes[name].values[p - 1].mean == pytest.approx(value - mean["with", p], abs=1e-4)
        assert abs(other - mean["with", p]) > 1e-3

    # The share of the positive DFA that comes from the right source, by values and pattern of one row at a time.
    right = torch.zeros(lens.info.n_heads)
    total = 0.0
    group = lens.info.n_heads // lens.info.n_kv_heads
    for row, source, dest, p in zip(
        copies.tokens, copies.source.tolist(), copies.dest.tolist(), copies.prefix.tolist(), strict=True
    ):
        read = lens.read_attention(row[None], LAYER)
        if p != cfg.prefixes or not sae.encode(read.z[0, dest][None])[0, doing[0]] > 0:
            continue
        for head in range(lens.info.n_heads):
            w = sae.affine(torch.tensor([doing[0]]))[0][0].view(lens.info.n_heads, -1)[head]
            dfa = (read.pattern[0, head, dest] * (read.v[0, :, head // group] @ w)).clamp_min(0)
            right[head] += dfa[source]
            total += float(dfa.sum())
    assert found.features[0].from_source == pytest.approx(float(right.sum()) / total, rel=1e-3)
    assert found.features[0].head == int(right.argmax())
    assert found.features[0].head_share == pytest.approx(float(right.max() / right.sum()), rel=1e-3)


def test_of_more_features_than_are_listed_all_are_ablated(
    tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = tiny_lens("llama")
    sae, cfg, found = made(lens)
    n = sum(found.n_features.values())
    assert n > 1
    monkeypatch.setattr(study, "LISTED", 1)
    short = done(prefix(lens, sae, cfg))
    assert short.features == found.features[:1]
    assert (short.n_features, short.changes, short.summary) == (found.n_features, found.changes, found.summary)
    assert f"({found.features[0].index}" in found.summary


def test_draws_are_of_other_features_and_as_long_as_what_was_ablated(tiny_lens: Callable[[str], Lens]) -> None:
    lens, cfg = tiny_lens("llama"), small(random=5)
    sae = random_sae(lens, LAYER)
    f = torch.rand(6, 96, generator=torch.Generator().manual_seed(0)) * (torch.arange(96) % 3 == 0)
    f[0] = 0
    taken = list(range(0, 60, 3))
    scale = torch.linspace(0.5, 2, 6)[:, None]
    whole = f[:, taken] @ sae.W_dec[taken] / scale + 0.1
    draws = study._random(sae, f, whole, taken, scale, cfg)
    assert len(draws) == 5
    for draw in draws:
        assert len(set(draw.indices)) == len(draw.indices) == 12, "fewer others fire than were ablated"
        assert not set(draw.indices) & set(taken)
        assert all(index % 3 == 0 for index in draw.indices), "others that fire"
        assert torch.allclose(draw.given.norm(dim=1), whole.norm(dim=1), rtol=1e-5)
    # None fires in the second row, and their directions cancel: nothing is taken off, and nothing is divided by 0.
    f, sae.W_dec[93] = torch.zeros(2, 96), -sae.W_dec[90]
    f[0, 90], f[:, taken] = 1.0, 1.0
    f[0, 93] = 0.5
    draws = study._random(sae, f, whole[:2], taken, torch.ones(()), cfg)
    assert all(sorted(draw.indices) == [90, 93] and not draw.given[1].any() for draw in draws)
    assert all(torch.isfinite(draw.given).all() and draw.given[0].any() for draw in draws)
    f[:, 90:] = 0
    assert study._random(sae, f, whole[:2], taken, torch.ones(()), cfg) == []


def test_where_no_other_feature_fires_there_is_nothing_to_compare_with(tiny_lens: Callable[[str], Lens]) -> None:
    lens, cfg = tiny_lens("llama"), small()
    sae = telling(lens, cfg)
    sae.threshold[2:] = 1e6
    found = done(prefix(lens, sae, cfg))
    assert sum(found.n_features.values()) > 0
    assert "other features" not in [one.name for one in found.changes]
    assert all(value.mean is not None and math.isfinite(value.mean) for one in found.changes for value in one.values)


def test_more_rows_than_can_be_held_are_refused_before_any_is_read(
    tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = tiny_lens("llama")
    sae = random_sae(lens, LAYER)
    monkeypatch.setattr(study, "copied_prefixes", lambda *_: pytest.fail("rows were made"))
    says = r"100,000 rows of 24 tokens through 96 features need about \d+ GB, and at most 4 are taken; lower --samples"
    with pytest.raises(UsageError, match=says):
        done(prefix(lens, sae, small(samples=10_000, prefixes=10, random=500)))


def test_an_sae_without_induction_features_says_so(tiny_lens: Callable[[str], Lens]) -> None:
    lens, cfg = tiny_lens("llama"), small()
    sae = random_sae(lens, LAYER)
    sae.threshold[:] = 1e6
    found = done(prefix(lens, sae, cfg))
    assert found.features == []
    assert [one.name for one in found.changes] == ["resampled"]
    assert "No feature" in found.notes[0]
    with pytest.raises(ValueError, match="no room for a prefix"):
        small(length=16, prefixes=9)
