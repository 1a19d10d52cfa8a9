"""A feature against a proxy: every number against a calculation of its own, on a model where all is known."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.config import SAEConfig, Site, SpecificityStudy, TokensProxy
from sae_core.corpus import Rows
from sae_core.errors import UsageError
from sae_core.lens import Lens
from sae_core.saes.base import SAE
from sae_core.saes.batchtopk import BatchTopKSAE
from sae_core.saes.topk import TopKSAE
from sae_core.studies.shares import share, wilson
from sae_core.studies.specificity import Specificity, specificity
from tests.core.tiny_harvest import LAYER, starts_of, tiny_rows, tiny_sae, z_of

TinyLens = Callable[[str], Lens]
LETTERS = ["<start>", *"abcdefgh"]
VALUES = [0.0, 0.5, 1.0, 2.0, 0.0, 3.0, 0.25, 4.0, 0.0]
"""What the feature of `Known` gives each letter: a 0.5, b 1.0, ..."""


class Known:
    """A model whose z at a token says which token it is: all that a study asks of a lens."""

    row_start = 0
    device = torch.device("cpu")
    info: Any = SimpleNamespace(d_vocab=len(LETTERS), name="known")

    def read_z(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        return {layer: torch.nn.functional.one_hot(tokens, len(LETTERS)).float() for layer in layers}

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [LETTERS[i] for i in ids]

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[LETTERS.index(letter) for letter in text] for text in texts]


def known_sae() -> SAE:
    """Feature 0 gives each letter its value of VALUES; it fires above 0.3, so not on f (0.25)."""
    n = len(LETTERS)
    cfg = SAEConfig(
        arch="batchtopk", d_in=n, d_sae=2, k=1, n_heads=1, d_head=n, site=Site(layer=0), model="known", model_fingerprint="x",
        processing={}, scale=1.0, max_norm=None, context=12,
    )  # fmt: skip
    W_enc = torch.zeros(n, 2)
    W_enc[:, 0] = torch.tensor(VALUES)
    tensors = {"W_enc": W_enc, "b_enc": torch.zeros(2), "W_dec": W_enc.T.clone(), "b_dec": torch.zeros(n)}
    return BatchTopKSAE(cfg, tensors | {"threshold": torch.full((2,), 0.3)})


def rows_of(n: int = 50, context: int = 12, seed: int = 0) -> Rows:
    tokens = np.random.default_rng(seed).integers(1, len(LETTERS), (n, context)).astype(np.int32)
    tokens[:, 0] = 0
    return Rows(Path("none"), context, 0, tokens, tokens[:0], "known")


def study(**changed: object) -> SpecificityStudy:
    fields: dict[str, object] = {"sae": "x", "feature": 0, "corpus": "c", "proxies": (TokensProxy(texts=("b", "d", "g")),)}
    return SpecificityStudy.model_validate(fields | changed)


def done(reports: Generator[Any, None, Specificity]) -> Specificity:
    while True:
        try:
            next(reports)
        except StopIteration as end:
            found: Specificity = end.value
            return found


def known(rows: Rows | None = None, **changed: object) -> Specificity:
    return done(specificity(Known(), known_sae(), rows or rows_of(), study(**changed)))  # type: ignore[arg-type]


# ---- the numbers ----


def test_wilsons_bounds_are_where_the_share_is_two_of_their_own_errors_away() -> None:
    for hits, n in ((0, 10), (1, 7), (50, 100), (999, 1000), (3, 3)):
        low, high = wilson(hits, n)
        assert 0 <= low <= hits / n <= high <= 1
        for bound in (low, high):
            if 0 < bound < 1:
                assert abs(hits / n - bound) / (bound * (1 - bound) / n) ** 0.5 == pytest.approx(1.959964, rel=1e-6)
    assert wilson(0, 10).high == pytest.approx(0.277533, abs=1e-6)  # tabulated, Brown et al. 2001
    nothing = share(0, 0)
    assert (nothing.value, nothing.low, nothing.high) == (None, None, None)


def test_the_four_cells_and_their_shares_are_counted_by_letters() -> None:
    rows = rows_of()
    found = known(rows)
    counts = Counter(LETTERS[i] for i in rows.train[:, 1:].flatten().tolist())
    # It fires on a b c e g (values above 0.3); the proxy holds on b d g.
    both, alone = counts["b"] + counts["g"], counts["a"] + counts["c"] + counts["e"]
    missed, neither = counts["d"], counts["f"] + counts["h"]
    assert (found.both, found.feature_alone, found.proxy_alone, found.neither) == (both, alone, missed, neither)
    assert (found.rows, found.tokens, found.excluded) == (50, 50 * 11, 50)
    assert found.precision.value == pytest.approx(both / (both + alone), rel=1e-5)
    assert found.recall.value == pytest.approx(both / (both + missed), rel=1e-5)
    assert found.specificity.value == pytest.approx(neither / (neither + alone), rel=1e-5)
    assert found.base.value == pytest.approx((both + missed) / found.tokens, rel=1e-5)
    assert found.density.value == pytest.approx((both + alone) / found.tokens, rel=1e-5)
    total = sum(counts[letter] * value for letter, value in zip(LETTERS, VALUES, strict=True) if value > 0.3)
    assert found.mean == pytest.approx(total / (both + alone), rel=1e-5)
    assert found.mass == pytest.approx((counts["b"] * 1.0 + counts["g"] * 4.0) / total, rel=1e-5)
    assert found.strongest == 4.0
    assert found.proxy == "the token is 'b' or 'd' or 'g'"


def test_the_histogram_splits_firings_by_the_proxy_and_the_largest_is_in_the_last_bar() -> None:
    rows = rows_of()
    found = known(rows, bins=8)  # bars of 0.5, so every value but the largest is a lower edge
    counts = Counter(LETTERS[i] for i in rows.train[:, 1:].flatten().tolist())
    assert found.edges == pytest.approx([0.5 * i for i in range(9)])
    assert found.counts_with == [0, 0, counts["b"], 0, 0, 0, 0, counts["g"]]
    assert found.counts_without == [0, counts["a"], 0, 0, counts["c"], 0, counts["e"], 0]
    n = found.both + found.feature_alone
    assert found.expected_with == pytest.approx([0, 0, 1.25 * counts["b"] / n, 0, 0, 0, 0, 3.75 * counts["g"] / n], rel=1e-5)


def test_expected_values_of_both_classes_add_up_to_the_mean_activation() -> None:
    found = known(bins=100)
    assert found.mean is not None
    total = sum(found.expected_with) + sum(found.expected_without)
    assert abs(total - found.mean) < 4.0 / 100 / 2 + 1e-6, "to half a bar"
    assert len(found.edges) == 101


def test_precision_and_recall_by_threshold_are_what_counting_above_each_gives() -> None:
    rows = rows_of()
    found = known(rows, bins=16)
    by = found.by_threshold
    letters = [LETTERS[i] for i in rows.train[:, 1:].flatten().tolist()]
    value = dict(zip(LETTERS, VALUES, strict=True))
    for i, threshold in enumerate(by.activation):
        above = [letter for letter in letters if value[letter] > 0.3 and value[letter] >= threshold]
        right = sum(letter in "bdg" for letter in above)
        assert by.precision[i] == pytest.approx(right / len(above), rel=1e-5)
        assert by.recall[i] == pytest.approx(right / sum(letter in "bdg" for letter in letters), rel=1e-5)
        low, high = wilson(right, len(above))
        assert (by.precision_low[i], by.precision_high[i]) == pytest.approx((low, high), rel=1e-5)
    assert by.precision[-1] == 1.0, "only g is that strong"


@pytest.mark.parametrize("arch", ["batchtopk", "topk"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_activations_are_those_of_the_whole_dictionary_on_a_real_pass(tiny_lens: TinyLens, kind: str, arch: str) -> None:
    lens, rows = tiny_lens(kind), tiny_rows()
    sae = tiny_sae(lens, rows)
    if arch == "topk":
        sae = TopKSAE(sae.cfg.model_copy(update={"arch": "topk", "k": 5}), {k: v.clone() for k, v in sae.named_buffers()})
        sae.threshold.zero_()
    z = z_of(lens, rows)
    kept, acts = ~sae.excluded(z, starts_of(rows)), sae.encode(z)
    for feature in (0, 7):
        wanted = lens.token_texts([int(rows.train[0, 3]), int(rows.train[1, 5])])
        cfg = study(feature=feature, proxies=(TokensProxy(texts=tuple(wanted)),), batch_rows=7)
        found = done(specificity(lens, sae, rows, cfg))
        fires = (acts[..., feature] > 0) & kept
        holds = torch.isin(
            torch.from_numpy(rows.train.astype("int64")), torch.tensor([rows.train[0, 3], rows.train[1, 5]]).long()
        )
        assert found.both == int((fires & holds).sum())
        assert found.feature_alone == int((fires & ~holds).sum()) > 0
        assert found.proxy_alone == int((~fires & holds & kept).sum())
        assert found.excluded == int((~kept).sum())
        assert found.strongest == pytest.approx(float(acts[..., feature][kept].max()), rel=1e-4)
        assert found.mean == pytest.approx(float(acts[..., feature][fires].mean()), rel=1e-4)
    assert sae.cfg.site.layer == LAYER


# ---- the examples ----


def test_examples_are_what_and_where_they_say(tiny_lens: TinyLens) -> None:
    lens, rows = tiny_lens("llama"), tiny_rows()
    sae = tiny_sae(lens, rows)
    acts, preacts = sae.encode(z_of(lens, rows)), sae.preacts(z_of(lens, rows))
    text = lens.token_texts([int(rows.train[0, 3])])[0]
    found = done(specificity(lens, sae, rows, study(feature=3, proxies=(TokensProxy(texts=(text,)),), window=9, per_range=3)))
    shown = 0
    for part in found.ranges:
        for one, holds in [(e, False) for e in part.false_positives] + [(e, True) for e in part.true_positives]:
            assert part.low <= one.activation <= part.high + 1e-5
            assert (one.texts[one.at] == text) == holds
            shown += 1
    for one in [e for part in found.ranges for e in part.false_positives + part.true_positives] + found.false_negatives:
        assert one.activation == pytest.approx(float(acts[one.row, one.position, 3]), abs=1e-4)
        assert one.preactivation == pytest.approx(float(preacts[one.row, one.position, 3]), abs=1e-3)
        start = one.position - one.at
        assert one.texts == lens.token_texts(rows.train[one.row, start : start + 9].tolist())
    assert shown == sum(min(3, part.precision.n - part.precision.hits) + min(3, part.precision.hits) for part in found.ranges)
    assert len(found.false_negatives) == min(found.proxy_alone, 12)
    assert all(one.activation == 0 for one in found.false_negatives)


def test_ranges_part_the_axis_and_hold_every_firing_once() -> None:
    found = known(ranges=4)
    assert [(part.low, part.high) for part in found.ranges] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert sum(part.precision.n for part in found.ranges) == found.both + found.feature_alone
    assert [bool(part.precision.hits) for part in found.ranges] == [False, True, False, True]
    assert {one.texts[one.at] for one in found.ranges[3].false_positives} == {"e"}, "3.0 is in the range that begins there"


def test_draws_are_uniform_and_know_nothing_of_batches() -> None:
    rows = rows_of(n=10)
    misses = {(int(r), int(p)) for r, p in np.argwhere(rows.train == LETTERS.index("d"))}
    wrong = {(int(r), int(p)) for r, p in np.argwhere(rows.train == LETTERS.index("a"))}
    drawn: Counter[tuple[int, int]] = Counter()
    weak: Counter[tuple[int, int]] = Counter()
    n = 400
    for seed in range(n):
        found = known(rows, seed=seed, per_range=2, ranges=2, batch_rows=3)
        drawn.update((one.row, one.position) for one in found.false_negatives)
        weak.update((one.row, one.position) for one in found.ranges[0].false_positives if one.texts[one.at] == "a")
    assert set(drawn) == misses
    assert set(weak) == wrong
    share_of = 4 / len(misses)
    spread = (n * share_of * (1 - share_of)) ** 0.5
    assert all(abs(count - n * share_of) < 4.5 * spread for count in drawn.values())
    assert known(rows, seed=1, batch_rows=3) == known(rows, seed=1, batch_rows=10)


def test_a_record_is_json_of_bounded_size() -> None:
    found = known(per_range=50, ranges=10, bins=500)
    text = found.model_dump_json()
    assert len(text) < 200_000
    assert Specificity.model_validate_json(text) == found


# ---- what there may not be ----


def test_a_feature_that_never_fires_and_a_proxy_that_never_holds_are_said() -> None:
    dead = known(feature=1)
    assert (dead.precision.value, dead.mean, dead.edges, dead.ranges) == (None, None, [], [])
    assert "never fired" in dead.notes[0]
    assert dead.summary.startswith("it never fired; proxy: ")
    silent = known(proxies=(TokensProxy(texts=("<start>",)),))
    assert (silent.recall.value, silent.precision.value) == (None, 0.0)
    assert "held on none of these tokens" in silent.notes[0]
    everything = known(proxies=(TokensProxy(texts=("a",)), TokensProxy(texts=("a",), negated=True)))
    assert everything.base.value == 0.0
    always = known(proxies=(TokensProxy(texts=("<start>",), negated=True),))
    assert "held on every token" in always.notes[0]


def test_only_as_many_tokens_are_read_as_are_asked_for() -> None:
    assert known(tokens_swept=24).rows == 2
    assert known(tokens_swept=1).rows == 1
    assert known(tokens_swept=10**9).rows == 50


def test_a_text_that_is_no_token_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="'ab' is no single token of known: it is split into 'a', 'b'"):
        known(proxies=(TokensProxy(texts=("ab",)),))
