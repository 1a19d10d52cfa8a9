"""DFA is exact: its sum is the pre-activation, computed on its own; a pattern read the wrong way round is noticed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_core.attribution import (
    CHUNK_ELEMENTS,
    DISTANCES,
    SPREAD,
    SparseDFA,
    decoder_neighbours,
    dfa,
    head_norm_shares,
    identity_gap,
    logit_histogram,
    sparsify_dfa,
    split_value_bias,
    spread,
    spread_sample,
)
from sae_core.lens import Lens
from sae_core.records import head_agreement
from tests.core.tiny_models import KINDS

TinyLens = Callable[[str], Lens]
POS = 20
LAYER = 2
TOLERANCE = 1e-4  # of sum |DFA| + |bias|, in fp32


class Case(NamedTuple):
    """Features firing at some destinations of one row, as attribution gets them, and their pre-activations by another way."""

    v: Tensor
    pattern: Tensor  # [head, dest, src], the whole row
    dest: Tensor
    w: Tensor
    bias: Tensor
    preact: Tensor

    def gap(self, pattern: Tensor | None = None) -> Tensor:
        """The identity's gap, with the row's pattern or another in its place."""
        at_dest = (self.pattern if pattern is None else pattern)[:, self.dest].transpose(0, 1)
        return identity_gap(dfa(self.v, at_dest, self.w), self.bias, self.preact)


def case(lens: Lens, tokens: Tensor, layer: int, dest: Tensor) -> Case:
    """Random features with w . z + bias taken from the z that `read_z` gives: where there is a fast handle, this z has
    seen neither this v nor this pattern."""
    info, generator = lens.info, torch.Generator().manual_seed(5)
    w = torch.randn(len(dest), info.n_heads, info.d_head, generator=generator)
    bias = torch.randn(len(dest), generator=generator)
    z = lens.read_z(tokens[None], [layer])[layer][0]
    preact = (z[dest].double() * w.flatten(1).double()).sum(1) + bias.double()
    read = lens.read_attention(tokens[None], layer)
    return Case(read.v[0], read.pattern[0], dest, w, bias, preact.float())


@pytest.fixture
def tiny_case(tiny_lens: TinyLens) -> Callable[[str], Case]:
    def of(kind: str) -> Case:
        lens = tiny_lens(kind)
        tokens = torch.randint(0, lens.info.d_vocab, (POS,), generator=torch.Generator().manual_seed(4))
        return case(lens, tokens, LAYER, torch.arange(POS))

    return of


def real_case(lens: Lens) -> Case:
    (ids,) = lens.encode(["Fare thee well, said Hezekiah; and it was so. Fare thee well, said Hezekiah again, and it was so."])
    return case(lens, torch.tensor([lens.row_start, *ids]), 17, torch.arange(1, len(ids) + 1))


def by_hand(v: Tensor, pattern: Tensor, w: Tensor) -> Tensor:
    """DFA entry by entry, as its definition reads."""
    n, n_heads, n_src = pattern.shape
    group = n_heads // v.shape[1]
    found = torch.zeros(n, n_heads, n_src)
    for i in range(n):
        for head in range(n_heads):
            for src in range(n_src):
                found[i, head, src] = pattern[i, head, src] * torch.dot(v[src, head // group], w[i, head])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_dfa_and_bias_sum_to_the_preactivation(tiny_case: Callable[[str], Case], kind: str) -> None:
    assert (tiny_case(kind).gap() <= TOLERANCE).all()


@pytest.mark.parametrize("kind", KINDS)
def test_transposed_pattern_breaks_identity(tiny_case: Callable[[str], Case], kind: str) -> None:
    found = tiny_case(kind)
    gap = found.gap(found.pattern.transpose(1, 2))
    assert gap.median() > 100 * TOLERANCE
    assert gap.max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [1, 2])
def test_pattern_shifted_by_one_breaks_identity(tiny_case: Callable[[str], Case], kind: str, axis: int) -> None:
    found = tiny_case(kind)
    gap = found.gap(found.pattern.roll(1, axis))
    assert gap.median() > 100 * TOLERANCE
    assert gap.max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "qwen2", "qwen3", "mistral"])
def test_heads_paired_with_the_wrong_values_break_identity(tiny_case: Callable[[str], Case], kind: str) -> None:
    found = tiny_case(kind)
    swapped = found._replace(v=found.v.flip(1))
    assert found.v.shape[1] == 2
    assert swapped.gap().median() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "pythia"])
def test_value_bias_is_inside_the_sources(tiny_lens: TinyLens, kind: str) -> None:
    # A pattern row sums to 1, so the same vector added to every v moves z by exactly that vector: the bias cannot be lost.
    pattern = tiny_lens(kind).read_attention(torch.arange(POS)[None], LAYER).pattern
    assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "pythia"])
def test_value_bias_apart_is_what_every_source_held(tiny_lens: TinyLens, tiny_case: Callable[[str], Case], kind: str) -> None:
    found, v_bias = tiny_case(kind), tiny_lens(kind).v_bias(LAYER)
    assert v_bias is not None
    at_dest = found.pattern[:, found.dest].transpose(0, 1)
    apart = split_value_bias(found.v, at_dest, found.w, v_bias)
    whole = by_hand(found.v, at_dest, found.w)
    assert torch.allclose(apart.dfa.sum(2) + apart.constant, whole.sum(2), atol=1e-4)
    group = found.w.shape[1] // len(v_bias)
    spoken = torch.stack([(v_bias[head // group] * found.w[:, head]).sum(1) for head in range(found.w.shape[1])], 1)
    assert torch.allclose(apart.constant, spoken, atol=1e-4)  # rows of the pattern sum to 1
    assert torch.allclose(apart.dfa, by_hand(found.v - v_bias, at_dest, found.w), atol=1e-4)
    terms = torch.cat([apart.dfa, apart.constant[..., None]], dim=2)
    assert (identity_gap(terms, found.bias, found.preact) <= TOLERANCE).all()
    assert identity_gap(apart.dfa, found.bias, found.preact).median() > 100 * TOLERANCE


def test_value_bias_apart_is_exact_where_a_sink_takes_part_of_the_pattern() -> None:
    # As gpt-oss computes it: one more logit per head that no token answers to, so that rows sum to less than 1.
    generator = torch.Generator().manual_seed(0)
    v, w, v_bias = (torch.randn(shape, generator=generator) for shape in ((9, 2, 5), (3, 4, 5), (2, 5)))
    pattern = torch.randn(3, 4, 10, generator=generator).softmax(-1)[..., :9]
    assert (pattern.sum(-1) < 0.999).all()
    apart = split_value_bias(v, pattern, w, v_bias)
    assert torch.allclose(apart.dfa.sum(2) + apart.constant, by_hand(v, pattern, w).sum(2), atol=1e-5)
    wanted = by_hand(v_bias.expand(9, 2, 5), pattern, w).sum(2)
    assert torch.allclose(apart.constant, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dfa_is_the_definition_entry_by_entry(tiny_case: Callable[[str], Case], kind: str) -> None:
    found = tiny_case(kind)
    at_dest = found.pattern[:, found.dest].transpose(0, 1)
    assert torch.allclose(dfa(found.v, at_dest, found.w), by_hand(found.v, at_dest, found.w), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dfa_is_gradient_times_value_under_a_frozen_pattern(tiny_case: Callable[[str], Case], kind: str) -> None:
    found = tiny_case(kind)
    group = found.pattern.shape[0] // found.v.shape[1]
    at_dest = found.pattern[:, found.dest].transpose(0, 1)
    expected = []
    for i, dest in enumerate(found.dest):
        v = found.v.repeat_interleave(group, dim=1).requires_grad_()
        z = torch.einsum("hs,shd->hd", found.pattern[:, dest], v)
        (gradient,) = torch.autograd.grad((z * found.w[i]).sum(), v)
        expected.append((gradient * v.detach()).sum(-1).T)
    assert torch.allclose(dfa(found.v, at_dest, found.w), torch.stack(expected), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_given_by_later_sources(tiny_case: Callable[[str], Case], kind: str) -> None:
    found = tiny_case(kind)
    given = dfa(found.v, found.pattern[:, found.dest].transpose(0, 1), found.w)
    later = torch.arange(POS)[None] > found.dest[:, None]
    assert not given.transpose(1, 2)[later].any()


@pytest.mark.real
def test_smollm2_dfa_and_bias_sum_to_the_preactivation(smollm2_lens: Lens) -> None:
    found = real_case(smollm2_lens)
    assert (found.gap() <= TOLERANCE).all()
    assert found.gap(found.pattern.transpose(1, 2)).median() > 100 * TOLERANCE
    assert found.gap(found.pattern.roll(1, 2)).median() > 100 * TOLERANCE


def test_gap_is_the_miss_as_a_share_of_the_terms() -> None:
    terms = torch.tensor([[[3.0, -1.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    gap = identity_gap(terms, torch.tensor([-2.0, 0.0]), torch.tensor([2.8, 0.0]))
    assert torch.allclose(gap, torch.tensor([0.8 / 8, 0.0]))


# Sparse DFA

matrices = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31)).flatmap(
    lambda shape: st.sampled_from([1e-3, 1.0, 3.0, 10.0]).map(
        lambda spread: (
            torch.randn(shape[:2], generator=torch.Generator().manual_seed(shape[2])).mul(spread).exp()
            * torch.randint(-1, 2, shape[:2], generator=torch.Generator().manual_seed(shape[2] + 1))
        )
    )
)


def one(full: Tensor, *, share: float, max_entries: int, start: int) -> SparseDFA:
    """Of one example [n_heads, src], its ragged columns whole and its others without the axis of examples."""
    sparse = sparsify_dfa(full[None], share=share, max_entries=max_entries, start=np.array([start]))
    assert sparse.kept.tolist() == [len(sparse.value)] == [len(sparse.src)] == [len(sparse.head)]
    return sparse._replace(dropped=sparse.dropped[0], before=sparse.before[0], abs_dfa=sparse.abs_dfa[0])


def rebuilt(sparse: SparseDFA, n_heads: int) -> np.ndarray:
    """Sum per head of all that was kept or summed."""
    kept = np.zeros(n_heads, dtype=np.float64)
    np.add.at(kept, sparse.head, sparse.value)
    return kept + sparse.dropped + sparse.before


@settings(deadline=None, max_examples=150)
@given(matrices, st.floats(0.05, 1), st.integers(1, 64), st.integers(0, 39))
def test_kept_dropped_and_before_sum_to_the_whole_per_head(full: Tensor, share: float, entries: int, start: int) -> None:
    start = min(start, full.shape[1] - 1)
    sparse = one(full, share=share, max_entries=entries, start=start)
    total = full.double().sum(1).numpy()
    size = full.abs().double().sum(1).numpy()
    assert (np.abs(rebuilt(sparse, full.shape[0]) - total) <= 1e-5 * size).all()
    assert float(sparse.abs_dfa) == pytest.approx(float(size.sum()), rel=1e-6)


@settings(deadline=None, max_examples=150)
@given(matrices, st.floats(0.05, 1), st.integers(1, 64), st.integers(0, 39))
def test_kept_entries_are_the_largest_and_no_more_than_needed(full: Tensor, share: float, entries: int, start: int) -> None:
    start = min(start, full.shape[1] - 1)
    sparse = one(full, share=share, max_entries=entries, start=start)
    n = len(sparse.value)
    assert n <= entries
    assert (sparse.src >= start).all()
    assert (sparse.value != 0).all()
    assert (sparse.value == full.numpy()[sparse.head, sparse.src]).all()
    assert len({*zip(sparse.head.tolist(), sparse.src.tolist(), strict=True)}) == n
    sizes = full[:, start:].abs().double().flatten().sort(descending=True).values.numpy()
    assert (np.abs(sparse.value).astype(np.float64) == sizes[:n]).all()
    held, goal = sizes[:n].sum(), share * float(full.abs().double().sum())
    in_reach = (sizes > 0).sum()
    assert held >= goal * (1 - 1e-9) or n == min(entries, in_reach)
    assert n == 0 or sizes[: n - 1].sum() < goal  # without the last one the share was not reached


def test_examples_together_are_kept_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(7, 3, 30, generator=generator).exp() * torch.randint(-1, 2, (7, 3, 30), generator=generator)
    full[2] = 0
    start = np.array([0, 5, 0, 29, 12, 0, 1])
    whole, ends = sparsify_dfa(full, share=0.9, max_entries=8, start=start), 0
    for i in range(7):
        alone = one(full[i], share=0.9, max_entries=8, start=int(start[i]))
        begins, ends = ends, ends + int(whole.kept[i])
        for name in ("src", "head", "value"):
            assert getattr(whole, name)[begins:ends].tolist() == getattr(alone, name).tolist()
        for name in ("dropped", "before", "abs_dfa"):
            assert getattr(whole, name)[i].tolist() == getattr(alone, name).tolist()
    assert len(whole.value) == ends


def test_share_is_of_the_whole_row_not_of_the_window() -> None:
    full = torch.tensor([[8.0, 1.0, 0.5, 0.5]])
    sparse = one(full, share=0.95, max_entries=32, start=1)
    assert sparse.value.tolist() == [1.0, 0.5, 0.5]  # the window cannot reach 9.5, so all of it is kept
    assert sparse.before.tolist() == [8.0]
    assert sparse.dropped.tolist() == [0.0]


def test_entry_that_reaches_the_share_is_the_last_kept() -> None:
    sparse = one(torch.tensor([[6.0, -3.0], [0.9, 0.1]]), share=0.9, max_entries=32, start=0)
    assert list(zip(sparse.head.tolist(), sparse.src.tolist(), sparse.value.tolist(), strict=True)) == [
        (0, 0, 6.0),
        (0, 1, -3.0),
    ]
    assert sparse.dropped.tolist() == pytest.approx([0.0, 1.0])


def test_equal_sizes_keep_the_lower_head_then_the_earlier_source() -> None:
    sparse = one(torch.ones(2, 3), share=1, max_entries=4, start=0)
    assert (sparse.head.tolist(), sparse.src.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 0])


def test_small_rest_survives_beside_large_entries() -> None:
    # As a difference of fp32 sums, 1e8 - 1e8 + 1 would be 0.
    full = torch.tensor([[1e8, -1e8, 0.25, 0.5, 0.25]])
    assert one(full, share=0.9, max_entries=2, start=0).dropped.tolist() == [1.0]


def test_no_example_at_all_keeps_nothing() -> None:
    sparse = sparsify_dfa(torch.zeros(0, 3, 5), share=0.95, max_entries=8, start=np.zeros(0, np.int64))
    assert (len(sparse.kept), len(sparse.value), sparse.dropped.shape) == (0, 0, (0, 3))


def test_example_without_any_dfa_keeps_nothing() -> None:
    sparse = one(torch.zeros(3, 5), share=0.95, max_entries=8, start=2)
    assert len(sparse.value) == 0
    assert sparse.abs_dfa == 0
    assert not sparse.dropped.any()
    assert not sparse.before.any()


# Spread


def spread_by_hand(dfa: Tensor, dest: int, starts: Tensor) -> tuple[list[float], float, float, float]:
    """Shares by distance, share of row starts, entropies, entry by entry in fp64."""
    total = float(dfa.abs().double().sum())
    distance, start = [0.0] * len(DISTANCES), 0.0
    sources = [0.0] * dfa.shape[1]
    for head in range(dfa.shape[0]):
        for src in range(dest + 1):
            share = abs(float(dfa[head, src])) / total
            sources[src] += share
            if starts[src]:
                start += share
            else:
                distance[max(i for i, low in enumerate(DISTANCES) if low <= dest - src)] += share
    heads = [float(row.abs().double().sum()) / total for row in dfa]
    entropies = [-sum(p * np.log(p) for p in shares if p > 0) for shares in (heads, sources)]
    return distance, start, entropies[0], entropies[1]


def test_spread_is_the_definition_entry_by_entry() -> None:
    generator = torch.Generator().manual_seed(2)
    full = torch.randn(4, 3, 150, generator=generator).exp() * torch.randn(4, 3, 150, generator=generator).sign()
    dest, starts = torch.tensor([149, 80, 1, 0]), torch.zeros(150, dtype=torch.bool)
    starts[[0, 70]] = True
    full *= torch.arange(150) <= dest[:, None, None]
    found = spread(full, dest, starts)
    assert sum(part.shape[1] if part.ndim == 2 else 1 for part in found) == SPREAD
    for i in range(4):
        distance, start, heads, sources = spread_by_hand(full[i], int(dest[i]), starts)
        assert found.distance[i].tolist() == pytest.approx(distance, abs=1e-5)
        assert [float(part[i]) for part in found[1:]] == pytest.approx([start, heads, sources], abs=1e-4)
    assert torch.allclose(found.distance.sum(1) + found.start, torch.ones(4))


@pytest.mark.parametrize(("heads", "sources"), [(1, 1), (3, 1), (2, 5)])
def test_effective_numbers_count_what_shares_the_work_equally(heads: int, sources: int) -> None:
    full = torch.zeros(1, 4, 9)
    full[:, :heads, 1 : 1 + sources] = -2.0
    columns = torch.column_stack(spread(full, torch.tensor([8]), torch.arange(9) == 0)).numpy()[0]
    sample = spread_sample(columns, 7)
    assert (sample["n"], sample["heads"], sample["sources"]) == (7, pytest.approx(heads), pytest.approx(sources))
    assert sample["start_share"] == 0


def test_sample_lists_distances_up_to_the_last_that_has_a_part() -> None:
    full = torch.zeros(1, 1, 40)
    full[0, 0, [39, 36, 0]] = torch.tensor([1.0, -2.0, 1.0])
    columns = torch.column_stack(spread(full, torch.tensor([39]), torch.arange(40) == 0)).numpy()[0]
    sample = spread_sample(columns, 1)
    assert sample["distance"] == [[0, 1, 0.25], [1, 2, 0.0], [2, 4, 0.5]]
    assert sample["start_share"] == 0.25
    assert spread_sample(columns, 0) == {}


def test_example_without_any_dfa_has_no_spread() -> None:
    found = spread(torch.zeros(1, 2, 5), torch.tensor([3]), torch.arange(5) == 0)
    assert not any(part.any() for part in found)


# Weights


@pytest.mark.parametrize(
    ("norm", "dfa_means", "agreement"),
    [
        ([0.5, 0.5], [2.0, -2.0], 1.0),
        ([1.0, 0.0], [0.0, -3.0], 0.0),
        ([0.5, 0.25, 0.25], [0.0, 1.0, -3.0], 0.5),
        ([0.5, 0.5], [0.0, 0.0], None),
    ],
)
def test_heads_agree_by_the_overlap_of_their_shares(norm: list[float], dfa_means: list[float], agreement: float | None) -> None:
    assert head_agreement(norm, dfa_means) == agreement


def assert_histograms(logits: Tensor, bins: int) -> None:
    found = logit_histogram(logits, bins)
    for i, row in enumerate(logits.numpy().astype(np.float64)):
        edges = found.edges[i].double().numpy()
        assert (edges[0], edges[-1]) == (row.min(), row.max())
        assert edges == pytest.approx(np.linspace(row.min(), row.max(), bins + 1), abs=1e-5 * np.ptp(row))
        below = np.searchsorted(np.sort(row), edges[1:-1])
        assert int(found.counts[i].sum()) == len(row)
        # A value that lies on an edge to fp32's last digit may be counted on its other side.
        assert np.abs(np.cumsum(found.counts[i].numpy())[:-1] - below).max() <= 1


def test_logit_histogram_counts_every_token_once() -> None:
    assert_histograms(torch.randn(9, 700, generator=torch.Generator().manual_seed(1)) * 3 - 1, 40)


def test_equal_logits_are_all_in_one_bin_and_no_features_have_no_histogram() -> None:
    found = logit_histogram(torch.full((1, 5), 2.0), 3)
    assert found.counts.tolist() == [[0, 5, 0]]
    assert found.edges[0, 1] < 2 < found.edges[0, 2]
    assert logit_histogram(torch.zeros(0, 5)).counts.shape == (0, 40)


@pytest.mark.real
def test_smollm2_logit_weights_are_those_of_the_stored_weights(smollm2_lens: Lens) -> None:
    lens = smollm2_lens
    weights = dict(lens._fast.named_parameters())
    vectors = torch.randn(3, lens.info.d_in, generator=torch.Generator().manual_seed(0))
    written = vectors.double() @ weights["model.layers.17.self_attn.o_proj.weight"].double().T
    logits = (written * weights["model.norm.weight"].double()) @ weights["model.embed_tokens.weight"].double().T
    wanted = logits - logits.mean(1, keepdim=True)
    found = lens.logit_weights(vectors, 17)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    for largest in (True, False):
        assert found.topk(10, largest=largest).indices.tolist() == wanted.topk(10, largest=largest).indices.tolist()
    assert_histograms(found, 40)


@pytest.mark.real
def test_smollm2_logits_go_where_its_logit_weights_say_when_the_last_z_is_pushed(smollm2_lens: Lens) -> None:
    # Through the model itself: a push so hard that the stream before the final norm is the push, whose rms scales all alike.
    lens, last = smollm2_lens, smollm2_lens.info.n_layers - 1
    push = torch.randn(lens.info.d_in, generator=torch.Generator().manual_seed(1)) * 1e5
    block = lens._fast.model.layers[last]
    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] + push,)),
        block.mlp.register_forward_hook(lambda _, __, out: torch.zeros_like(out)),
    ]
    with torch.no_grad():
        logits = lens._fast(input_ids=torch.tensor([[0, 100, 200]])).logits[0, -1]
    for hook in hooks:
        hook.remove()
    expected = lens.logit_weights(push[None], last)[0]
    assert torch.nn.functional.cosine_similarity(logits - logits.mean(), expected, dim=0) > 0.9999


@pytest.mark.real
def test_smollm2_head_shares_are_norms_of_slices(smollm2_lens: Lens) -> None:
    rows = smollm2_lens.W_O(17).flatten(0, 1).T[:5]
    norms = rows.double().unflatten(1, (9, 64)).square().sum(2).sqrt()
    assert torch.allclose(head_norm_shares(rows, 9).double(), norms / norms.sum(1, keepdim=True), atol=1e-6)


def test_head_shares_are_norms_of_slices_over_their_sum() -> None:
    W_dec = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    shares = head_norm_shares(W_dec, 3)
    for f in range(9):
        norms = [float(W_dec[f, 4 * h : 4 * h + 4].norm()) for h in range(3)]
        assert shares[f].tolist() == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-5)
    assert torch.allclose(shares.sum(1), torch.ones(9))


def test_zero_row_shares_equally_among_heads() -> None:
    assert head_norm_shares(torch.zeros(1, 8), 4).tolist() == [[0.25] * 4]


@pytest.mark.parametrize("chunk", [CHUNK_ELEMENTS, 41])
def test_neighbours_are_the_nearest_by_cosine(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("sae_core.attribution.CHUNK_ELEMENTS", chunk)
    W_dec = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 21)[:, None]
    found = decoder_neighbours(W_dec, 4)
    for f in range(20):
        cosines = {g: float(torch.cosine_similarity(W_dec[f], W_dec[g], dim=0)) for g in range(20) if g != f}
        nearest = sorted(cosines, key=cosines.__getitem__, reverse=True)[:4]
        assert found.indices[f].tolist() == nearest
        assert found.cosines[f].tolist() == pytest.approx([cosines[g] for g in nearest], abs=1e-5)


def test_twin_is_the_nearest_neighbour_and_the_feature_itself_is_not() -> None:
    W_dec = torch.eye(5).repeat(2, 1)
    found = decoder_neighbours(W_dec, 1)
    assert found.indices[:, 0].tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert found.cosines.max() <= 1


def test_neighbours_are_at_most_all_others() -> None:
    assert decoder_neighbours(torch.eye(3), 10).indices.shape == (3, 2)
    assert decoder_neighbours(torch.eye(1), 10).indices.shape == (1, 0)
