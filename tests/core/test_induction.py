"""Studies of induction heads: on heads whose patterns are rules, on tiny models of every kind, and on SmolLM2."""

import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.config import InductionStudy
from sae_core.corpus import Rows
from sae_core.errors import LayerOutOfRange, UsageError
from sae_core.lens import AttentionRead, Lens
from sae_core.studies.induction import (
    LONGEST,
    Copies,
    Induction,
    InText,
    Synthetic,
    copied_prefixes,
    doing_induction,
    in_text,
    induction,
    role,
    synthetic,
)
from sae_core.studies.proxy import prefix_lengths
from tests.core.tiny_models import KINDS, tiny_model

TinyLens = Callable[[str], Lens]
VOCABULARY = 200


class Rules:
    """A model of one layer whose heads are rules: each puts 0.8 of its attention on the last source whose prefix is at least
    so long, or on the row start where there is none; the rest lies on the destination itself. Logits are known too."""

    row_start = 0
    device = torch.device("cpu")
    info: Any = SimpleNamespace(d_vocab=VOCABULARY, name="rules", n_layers=2, n_heads=3, max_context=128)
    needs = ((1, 3, 99), (99, 2, 99))
    """By layer and head: the prefix that it needs; 99 is never there."""
    gives = 0.8

    def __init__(self) -> None:
        self.passes = 0

    def check_layer(self, layer: int) -> None:
        if layer >= 2:
            raise LayerOutOfRange("no such layer")

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [f"t{i}" for i in ids]

    def pattern(self, tokens: Tensor, layer: int) -> Tensor:
        b, n = tokens.shape
        classes = tokens.clone()
        classes[:, 0] = -1
        lengths = prefix_lengths(classes, LONGEST)
        found = torch.zeros(b, 3, n, n)
        for head, need in enumerate(self.needs[layer]):
            for row in range(b):
                for d in range(n):
                    sources = (lengths[row, d] >= need).nonzero().flatten().tolist()
                    found[row, head, d, sources[-1] if sources else 0] += self.gives
                    found[row, head, d, d] += 1 - self.gives
        return found

    def follow_attention(
        self, tokens: Tensor, layers: Sequence[int], look: Callable[[int, AttentionRead], None], *, to_end: bool = False
    ) -> Tensor | None:
        self.passes += 1
        for layer in layers:
            pattern = self.pattern(tokens, layer)
            z = pattern.diagonal(0, 2, 3).transpose(1, 2)  # [b, pos, head]: what each head gives its destination
            look(layer, AttentionRead(z, z[..., None], pattern))
        return tokens[..., None].float() if to_end else None

    def head_logits(self, z: Tensor, layer: int, final: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002 - as a lens
        return z * (layer + 1) + 0 * final


def study(**changed: object) -> InductionStudy:
    fields: dict[str, object] = {"model": "m", "prefixes": 4, "samples": 6, "length": 40, "pass_tokens": 128}
    return InductionStudy.model_validate(fields | changed)


def done(reports: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(reports)
        except StopIteration as end:
            return end.value


def text_rows(n: int = 12, context: int = 30, seed: int = 0) -> Rows:
    """Few kinds of tokens, so that prefixes repeat."""
    tokens = np.random.default_rng(seed).integers(1, 12, (n, context)).astype(np.int32)
    tokens[:, 0] = 0
    return Rows(Path("none"), context, 0, tokens, tokens[:0], "rules")


# ---- the synthetic rows ----


def test_a_prefix_is_copied_within_distinct_tokens(tiny_lens: TinyLens) -> None:
    lens, cfg = tiny_lens("llama"), study(samples=50, length=64, prefixes=9)
    copies = copied_prefixes(cfg, lens)
    assert copies.tokens.shape == (9 * 50, 64)
    firsts = set()
    for row, dest, source, p in zip(*(column.tolist() for column in copies), strict=True):
        a1, a2 = source - p, dest - p + 1
        firsts.add(a1)
        assert 1 <= a1 <= 64 - 20 - 10
        assert a1 + p + 1 <= a2 <= 64 - 1 - p
        assert row[a1:source] == row[a2 : dest + 1]
        assert row[source] != row[dest + 1], "what follows the copy is another token"
        assert row[0] == lens.row_start
        assert lens.row_start not in row[1:]
        assert len(set(row)) == 64 - p
        assert set(row) <= {lens.row_start, *(i for i in range(280) if lens.token_texts([i])[0] != f"<id {i}>")}
    assert min(firsts) == 1
    assert max(firsts) == 34, "the whole range is drawn from"
    assert copies.prefix.bincount().tolist() == [0, *[50] * 9]


def test_the_paper_s_ranges_follow_for_its_128_tokens() -> None:
    copies = copied_prefixes(study(samples=300, length=128, prefixes=9), Rules())  # type: ignore[arg-type]
    a1 = copies.source - copies.prefix
    assert int(a1.min()) <= 3
    assert 96 <= int(a1.max()) <= 98


def test_draws_follow_from_the_seed() -> None:
    one, same, other = (copied_prefixes(study(seed=seed), Rules()) for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"length": 200}, "at most 128 tokens at once, not 200"), ({"length": 128, "prefixes": 9}, None)],
)
def test_rows_that_the_model_cannot_take_are_refused(changed: dict[str, int], words: str | None) -> None:
    lens: Any = Rules()
    if words:
        with pytest.raises(UsageError, match=words):
            copied_prefixes(study(**changed), lens)
        return
    lens.info = SimpleNamespace(**{**vars(lens.info), "d_vocab": 100})
    with pytest.raises(UsageError, match="has 99 tokens, fewer than the 127 distinct ones of a row"):
        copied_prefixes(study(**changed), lens)


# ---- heads that are rules ----


def test_scores_of_heads_whose_patterns_are_rules_are_what_the_rules_say() -> None:
    found: Synthetic = done(synthetic(Rules(), study()))  # type: ignore[arg-type]
    scores = {(head.layer, head.head): head.score for head in found.heads}
    assert scores == {
        (0, 0): pytest.approx([0.8, 0.8, 0.8, 0.8]),
        (0, 1): pytest.approx([0, 0, 0.8, 0.8]),
        (0, 2): [0, 0, 0, 0],
        (1, 0): [0, 0, 0, 0],
        (1, 1): pytest.approx([0, 0.8, 0.8, 0.8]),
        (1, 2): [0, 0, 0, 0],
    }
    logits = {(head.layer, head.head): head.logit for head in found.heads}
    assert logits[1, 0] == pytest.approx([0.4] * 4), "0.2 on the destination itself, doubled in layer 1"
    assert all(error == pytest.approx(0, abs=1e-6) for head in found.heads for error in head.score_error)
    assert doing_induction(found) == [(0, 0), (0, 1), (1, 1)]
    rests = {(head.layer, head.head): head.start for head in found.heads}
    assert rests == {
        (0, 0): 0,
        (0, 1): pytest.approx(0.8 / 3, rel=1e-5),  # at one of the prefixes 2, 3, 4
        (0, 2): pytest.approx(0.8),
        (1, 0): pytest.approx(0.8),
        (1, 1): 0,
        (1, 2): pytest.approx(0.8),
    }
    assert all(head.previous == head.duplicate == 0 for head in found.heads)


def test_heads_that_look_at_the_token_before_or_at_its_copy_are_told() -> None:
    class Elsewhere(Rules):
        def pattern(self, tokens: Tensor, layer: int) -> Tensor:  # noqa: ARG002 - as Rules
            found = torch.zeros(*tokens.shape[:1], 3, tokens.shape[1], tokens.shape[1])
            found[:, 0] = 0.9 * torch.eye(tokens.shape[1]).roll(-1, 1)  # [d, d - 1]
            same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
            found[:, 1] = 0.6 * same
            return found

    found: Synthetic = done(synthetic(Elsewhere(), study()))  # type: ignore[arg-type]
    measures = [(head.previous, head.duplicate, head.start, max(head.score)) for head in found.heads[:3]]
    assert measures == [(pytest.approx(0.9), 0, 0, pytest.approx(0, abs=0.6)), (0, pytest.approx(0.6), 0, 0), (0, 0, 0, 0)]


def test_errors_are_those_of_a_mean_over_samples() -> None:
    class Noisy(Rules):
        def pattern(self, tokens: Tensor, layer: int) -> Tensor:
            return super().pattern(tokens, layer) * (tokens[:, 5] % 7 / 7)[:, None, None, None]

    cfg = study(samples=9)
    copies = copied_prefixes(cfg, Noisy())  # type: ignore[arg-type]
    found: Synthetic = done(synthetic(Noisy(), cfg))  # type: ignore[arg-type]
    for p in range(1, 5):
        values = 0.8 * (copies.tokens[copies.prefix == p][:, 5] % 7).double() / 7
        head = found.heads[0]
        assert head.score[p - 1] == pytest.approx(float(values.mean()), rel=1e-5)
        assert head.score_error[p - 1] == pytest.approx(float(values.std() / 3), rel=1e-4)


def test_roles_go_by_the_share_of_the_best_that_one_token_gives() -> None:
    assert role([0.7, 0.75, 0.8]) == "short-prefix"
    assert role([0.4, 0.7, 0.8]) == "short-prefix"
    assert role([0.39, 0.7, 0.8]) == "long-prefix"
    assert role([0.25, 0.72, 0.7]) == "long-prefix", "the paper's 5.1"
    assert role([0.1, 0.29, 0.2]) == "not induction"
    assert role([0.0, 0.3]) == "long-prefix"


def test_in_text_a_cut_prefix_stops_the_heads_that_need_it_and_no_others() -> None:
    rules, cfg, rows = Rules(), study(corpus="c", text_rows=12, cuts=8), text_rows()
    found: InText = done(in_text(rules, rows, cfg, [(0, 0), (0, 1), (1, 1)]))  # type: ignore[arg-type]
    heads = {(head.layer, head.head): head for head in found.heads}
    one, three, two = heads[0, 0].cut, heads[0, 1].cut, heads[1, 1].cut
    assert one is not None
    assert two is not None
    assert three is not None
    for cut in (one, two, three):
        assert cut.before.mean == pytest.approx(0.8)
        assert 0 < cut.places <= 8
        assert cut.control is not None
        assert cut.control.mean is not None
        assert cut.control.mean > 0.6, "a token elsewhere hardly matters"
    assert one.after.mean is not None
    assert one.after.mean >= 0.7, "one token is enough, and nearly always still the last such source"
    assert (two.after.mean, three.after.mean) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert two.change.mean == pytest.approx(-0.8)
    assert three.prefix >= 3 > 2 <= two.prefix
    assert heads[0, 2].cut is None


def test_in_text_prefixes_are_counted_as_loops_over_every_pair_count_them() -> None:
    rules, rows = Rules(), text_rows(n=5, seed=4)
    rows.train[2, 10] = 0  # a row start within, where two documents are packed
    cfg = study(corpus="c", text_rows=5, attends=0.3)
    found: InText = done(in_text(rules, rows, cfg, []))  # type: ignore[arg-type]
    assert (found.rows, found.tokens, found.corpus) == (5, 150, "c")
    tokens = torch.from_numpy(rows.train.astype("int64"))
    classes = torch.where(tokens == 0, -1, tokens)
    lengths = prefix_lengths(classes, LONGEST)
    for head in found.heads:
        pattern = rules.pattern(tokens, head.layer)[:, head.head]
        attended = [0] * (LONGEST + 1)
        sums, times = [0.0] * (LONGEST + 1), [0] * (LONGEST + 1)
        for b in range(5):
            for d in range(1, 30):
                longest = int(lengths[b, d].max())
                times[longest] += 1
                for s in range(30):
                    if longest and lengths[b, d, s] == longest:
                        sums[longest] += float(pattern[b, d, s])
                    if pattern[b, d, s] > 0.3 and classes[b, s] >= 0 and classes[b, d] >= 0:
                        attended[int(lengths[b, d, s])] += 1
        assert head.attended == attended
        assert found.destinations == times
        expected = [sums[p] / times[p] if times[p] else None for p in range(1, LONGEST + 1)]
        assert [value is None for value in head.target] == [value is None for value in expected]
        assert [v for v in head.target if v is not None] == pytest.approx([v for v in expected if v is not None], rel=1e-4)
    assert max(found.destinations[1:]) > 0


def test_a_place_is_the_first_of_its_row_and_loses_all_of_its_prefix_but_one_token() -> None:
    seen: list[Tensor] = []

    class Watched(Rules):
        def follow_attention(self, tokens: Tensor, *args: Any, **more: Any) -> Tensor | None:
            seen.append(tokens.clone())
            return super().follow_attention(tokens, *args, **more)

    rules, rows = Watched(), text_rows(n=3, seed=7)
    cfg = study(corpus="c", text_rows=3, pass_tokens=10_000)
    done(in_text(rules, rows, cfg, [(1, 1)]))  # type: ignore[arg-type]
    whole, changed = seen
    lengths = prefix_lengths(torch.where(whole == 0, -1, whole), LONGEST)
    cuts, controls = changed[0::2], changed[1::2]
    for row, cut, control in zip(whole, cuts, controls, strict=True):
        b = int((whole == row).all(1).nonzero())
        first = next(d for d in range(30) if (lengths[b, d] >= 2).any())
        source = int((lengths[b, first] >= 2).nonzero()[-1])
        assert (cut != row).nonzero().flatten().tolist() == [source - 2]
        after = prefix_lengths(torch.where(cut == 0, -1, cut)[None], LONGEST)
        assert int(after[0, first, source]) == 1
        elsewhere = (control != row).nonzero().flatten().tolist()
        assert len(elsewhere) <= 1  # none where the drawn token stood there before
        assert all(0 < position < first for position in elsewhere)
        still = prefix_lengths(torch.where(control == 0, -1, control)[None], LONGEST)
        assert int(still[0, first, source]) == int(lengths[b, first, source])


def test_the_whole_keeps_details_of_heads_that_score_and_sorts_them() -> None:
    rules, cfg = Rules(), study(corpus="c", text_rows=6)
    scores: Synthetic = done(synthetic(rules, cfg))  # type: ignore[arg-type]
    text: InText = done(in_text(rules, text_rows(), cfg, doing_induction(scores)))  # type: ignore[arg-type]
    whole = induction(rules, cfg, scores, text)  # type: ignore[arg-type]
    assert [(head.layer, head.head) for head in whole.heads[:3]] == [(0, 0), (0, 1), (1, 1)]
    assert [head.role for head in whole.heads[:3]] == ["short-prefix", "long-prefix", "long-prefix"]
    assert whole.summary == "1 short-prefix head (0.0); 2 long-prefix heads (0.1, 1.1); of 6 heads"
    assert whole.heads[0].attended
    assert whole.heads[3].attended == []
    assert whole.heads[3].score == [0, 0, 0, 0]
    assert Induction.model_validate_json(whole.model_dump_json()) == whole
    alone = induction(rules, cfg, scores, None)  # type: ignore[arg-type]
    assert (alone.corpus, alone.heads[0].cut) == (None, None)
    assert "No text was given" in alone.notes[0]


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(LayerOutOfRange):
        done(synthetic(Rules(), study(layers=(0, 5))))  # type: ignore[arg-type]


# ---- tiny models of every kind ----


def small(**changed: object) -> InductionStudy:
    return study(samples=2, prefixes=3, length=24, pass_tokens=64, **changed)


@pytest.mark.parametrize("kind", KINDS)
def test_following_gives_what_reading_each_layer_gives(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    tokens = torch.randint(1, 250, (3, 17), generator=torch.Generator().manual_seed(0))
    found: dict[int, AttentionRead] = {}
    assert lens.follow_attention(tokens, [1, 3], found.__setitem__) is None
    assert sorted(found) == [1, 3]
    for layer, read in found.items():
        for ours, theirs in zip(read, lens.read_attention(tokens, layer), strict=True):
            assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max()  # two ways through the blocks before, in fp32
    with pytest.raises(LayerOutOfRange):
        lens.follow_attention(tokens, [9], found.__setitem__)
    assert lens.follow_attention(tokens, [], found.__setitem__) is None


@pytest.mark.parametrize("kind", KINDS)
def test_heads_together_write_what_attention_gives_through_the_frozen_norms(tiny_lens: TinyLens, kind: str) -> None:
    """Against what transformers' own attention adds to the stream, and the final norm's gain and scale, read off its output."""
    lens, model = tiny_lens(kind), tiny_model(kind)
    tokens = torch.randint(1, 250, (2, 13), generator=torch.Generator().manual_seed(1))
    z: dict[int, Tensor] = {}
    final = lens.follow_attention(tokens, range(4), lambda layer, read: z.__setitem__(layer, read.z), to_end=True)
    assert final is not None
    norm = next(m for n, m in model.named_modules() if n.split(".")[-1] in ("norm", "ln_f", "final_layer_norm"))
    entered: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    attention: dict[int, Tensor] = {}  # what layers' attention adds to the stream
    names = ("post_attention_layernorm",) if kind.startswith("gemma") else ("self_attn", "attn", "attention")
    inner = [m for n, m in model.named_modules() if n.split(".")[-1] in names and n.count(".") >= 2]

    def keep(_: Any, __: Any, out: Any, *, layer: int) -> None:
        attention.setdefault(layer, out[0] if isinstance(out, tuple) else out)

    for layer, module in enumerate(inner[:4]):
        module.register_forward_hook(functools.partial(keep, layer=layer))
    with torch.no_grad():
        model(input_ids=tokens)
    assert torch.allclose(final, entered[0], atol=1e-4)
    unembed = model.get_output_embeddings().weight.detach()
    bias = norm(torch.zeros_like(entered[0])).detach()
    for b, d, token in ((0, 12, 7), (1, 6, 200)):
        x = entered[0][b, d]
        direction = unembed[token] - unembed.mean(0)
        # The frozen norm is linear; its matrix by asking the norm itself at x, scale and all.
        centred = x - x.mean() if isinstance(norm, torch.nn.LayerNorm) else x
        normed = (norm(x[None, None])[0, 0] - bias[b, d]).detach()
        gain = normed / centred

        def through(part: Tensor, gain: Tensor = gain, layered: bool = isinstance(norm, torch.nn.LayerNorm)) -> Tensor:
            return (part - part.mean() if layered else part) * gain

        for layer in range(4):
            found = lens.head_logits(z[layer][b, d][None], layer, final[b, d][None], torch.tensor([token]))[0]
            assert found.shape == (4,)
            written = attention[layer][b, d]
            if (b_O := lens.b_O(layer)) is not None:
                written = written - b_O  # biases belong to no head; none of the kinds with one has a norm after it
            if kind.startswith("gemma"):
                zero = inner[layer](torch.zeros(1, 1, 32))[0, 0].detach()
                written = written - zero
            expected = float(direction @ through(written))
            assert float(found.sum()) == pytest.approx(expected, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "pythia"])
def test_scores_and_logits_are_those_of_each_sample_read_alone(tiny_lens: TinyLens, kind: str) -> None:
    lens, cfg = tiny_lens(kind), small()
    found: Synthetic = done(synthetic(lens, cfg))
    copies: Copies = copied_prefixes(cfg, lens)
    heads = {(head.layer, head.head): head for head in found.heads}
    assert len(heads) == 16
    for layer in (0, 3):
        for p in (1, 3):
            of_p = (copies.prefix == p).nonzero().flatten().tolist()
            scores = [
                lens.read_attention(copies.tokens[i][None], layer).pattern[0, :, copies.dest[i], copies.source[i]] for i in of_p
            ]
            mean = torch.stack(scores).mean(0)
            for head in range(4):
                assert heads[layer, head].score[p - 1] == pytest.approx(float(mean[head]), rel=1e-3, abs=1e-5)


def test_heads_alone_move_a_logit_as_much_as_they_are_said_to(tiny_lens: TinyLens) -> None:
    """Zeroing one head's part of z in the last layer of an RMSNorm model with its scale held changes the logit by it."""
    lens, model = tiny_lens("qwen2"), tiny_model("qwen2")
    tokens = torch.randint(1, 250, (1, 9), generator=torch.Generator().manual_seed(2))
    z: list[Tensor] = []
    final = lens.follow_attention(tokens, [3], lambda _, read: z.append(read.z), to_end=True)
    assert final is not None
    found = lens.head_logits(z[0][0, 8][None], 3, final[0, 8][None], torch.tensor([42]))[0]
    unembed, gain = model.get_output_embeddings().weight.detach(), model.model.norm.weight.detach()
    scale = (final[0, 8].pow(2).mean() + model.config.rms_norm_eps).sqrt()
    W_O = model.model.layers[3].self_attn.o_proj.weight.detach()  # [d_model, d_in]
    for head in range(4):
        part = z[0][0, 8].clone()
        part[: head * 8], part[(head + 1) * 8 :] = 0, 0
        logits = unembed @ (gain * (W_O @ part) / scale)
        assert float(found[head]) == pytest.approx(float(logits[42] - logits.mean()), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3"])
def test_the_study_runs_on_windows_and_grouped_heads(tiny_lens: TinyLens, kind: str) -> None:
    lens, cfg = tiny_lens(kind), small(corpus="c", text_rows=4, cuts=3, layers=(1, 2))
    rows = Rows(Path("none"), 30, lens.row_start, text_rows(4).train, text_rows(4).train[:0], "x")
    scores: Synthetic = done(synthetic(lens, cfg))
    text: InText = done(in_text(lens, rows, cfg, [(1, 0), (2, 3)]))
    whole = induction(lens, cfg, scores, text)
    assert {(head.layer, head.head) for head in whole.heads} == {(layer, head) for layer in (1, 2) for head in range(4)}


# ---- the real model ----


@pytest.mark.real
def test_smollm2s_known_induction_heads_come_out_as_such(smollm2_lens: Lens) -> None:
    """reference figures on repeated random tokens: 18.6 0.85, 17.3 0.66, 17.4 0.58, 17.5 0.53; 16.0 attends to the previous
    token, and is none."""
    cfg = InductionStudy(model="smollm2", layers=(16, 17, 18, 23), samples=6, prefixes=4, length=64)
    found: Synthetic = done(synthetic(smollm2_lens, cfg))
    best = {(head.layer, head.head): max(head.score) for head in found.heads}
    doing = set(doing_induction(found))
    assert {(18, 6), (17, 3), (17, 4), (17, 5)} <= doing
    assert best[18, 6] == max(best.values()) > 0.7
    assert (16, 0) not in doing
    assert max(found.heads, key=lambda head: head.previous).head == 0
    assert next(head for head in found.heads if (head.layer, head.head) == (16, 0)).previous > 0.7
    logits = {(head.layer, head.head): head.logit[-1] for head in found.heads}
    assert logits[23, 2] > 0.2, "it writes the token that follows"
    assert all(abs(logits[17, head]) < 0.15 for head in (3, 4, 5)), "these leave that to later layers"
