"""Induction features and their prefixes: a feature that is a rule, and every number again, row by row, with hooks set by hand."""

from collections.abc import Callable

import pytest
import torch

from sae_core.config import PrefixStudy
from sae_core.lens import Lens
from sae_core.saes import SAE
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


def test_rises_losses_and_sources_are_those_of_single_rows(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    sae, cfg, found = made(lens)
    copies = copied_prefixes(cfg, lens)
    controls = controls_of(copies, row_tokens(cfg, lens, 1).tolist(), cfg.seed)
    doing = [one.index for one in found.features]
    assert {0, 1} & set(doing)
    both = {name: [one.index for one in found.features if one.role == name] for name in ("short-prefix", "long-prefix")}
    assert found.n_features == {name: len(indices) for name, indices in both.items()}
    rises: dict[int, list[float]] = {}
    losses: dict[tuple[str, int], list[float]] = {}
    for row, control, source, dest, p in zip(
        copies.tokens, controls, copies.source.tolist(), copies.dest.tolist(), copies.prefix.tolist(), strict=True
    ):
        z, plain = (lens.read_z(one[None], [LAYER])[LAYER][0, dest] for one in (row, control))
        f, without = sae.encode(z[None])[0], sae.encode(plain[None])[0]
        rises.setdefault(p, []).append(float(f[doing[0]] - without[doing[0]]))
        ways = {"with": z, "resampled": plain, "all": z - f[doing] @ sae.W_dec[doing]}
        for name, vector in ways.items():
            logits = by_hand(lens, row[None], {LAYER: put(dest, vector)})[0, dest]
            losses.setdefault((name, p), []).append(-float(logits.log_softmax(-1)[row[source]]))
        logits = by_hand(lens, control[None], {})[0, dest]
        losses.setdefault(("without", p), []).append(-float(logits.log_softmax(-1)[row[source]]))
    mean = {key: sum(values) / len(values) for key, values in losses.items()}
    changes = {one.name: one for one in found.changes}
    whole = changes.get("both") or changes[next(name for name in changes if "features" in name and name != "other features")]
    assert whole.features == len(doing)
    for p in (1, 2):
        assert found.features[0].rise[p - 1] == pytest.approx(sum(rises[p]) / len(rises[p]), rel=1e-3, abs=1e-4)
        assert found.losses[0].values[p - 1].mean == pytest.approx(mean["with", p], rel=1e-4)
        assert found.losses[1].values[p - 1].mean == pytest.approx(mean["without", p], rel=1e-4)
        assert changes["resampled"].values[p - 1].mean == pytest.approx(mean["resampled", p] - mean["with", p], abs=1e-4)
        assert whole.values[p - 1].mean == pytest.approx(mean["all", p] - mean["with", p], abs=1e-4)

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
