"""What every head does: on heads whose patterns are rules, by brute force on tiny models, and on SmolLM2."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.config import HeadsStudy, ModelSource
from sae_core.corpus import Rows
from sae_core.errors import UnsupportedModel, UsageError
from sae_core.lens import AttentionRead, Lens, load_lens
from sae_core.studies.circuits import classes
from sae_core.studies.heads import KINDS, Heads, heads, in_text, on_random, on_weights, reaches, said_twice
from sae_core.studies.proxy import ordinary_tokens
from sae_core.token_texts import plain
from tests.core.test_induction import done, text_rows
from tests.core.tiny_models import tiny_model, tiny_tokenizer

TinyLens = Callable[[str], Lens]
RULES = ("previous", "duplicate", "induction", "start")


class Rules:
    """One layer, a head for each rule: it spreads 0.8 of its attention on what the rule names, or on the row start where there
    is none; the rest lies on the destination itself."""

    row_start = 0
    device = torch.device("cpu")
    info: Any = SimpleNamespace(d_vocab=200, name="rules", n_layers=1, n_heads=len(RULES), max_context=128)

    def check_layer(self, layer: int) -> None:
        assert layer == 0

    def value_map(self, layer: int) -> None:
        assert layer == 0
        raise UnsupportedModel("The values of rules cannot be taken apart: they come from no one projection.")

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [f"t{i}" for i in ids]

    def follow_attention(self, tokens: Tensor, layers: Sequence[int], look: Callable[[int, AttentionRead], None]) -> None:
        assert layers == [0]
        b, n = tokens.shape
        pattern = torch.zeros(b, len(RULES), n, n)
        for row, ids in enumerate(tokens.tolist()):
            for dest in range(n):
                for head, rule in enumerate(RULES):
                    where = named(rule, ids, dest) or [0]
                    pattern[row, head, dest, where] += 0.8 / len(where)
                    pattern[row, head, dest, dest] += 0.2
        look(0, AttentionRead(tokens[..., None].float(), tokens[..., None, None].float(), pattern))


def named(rule: str, ids: Sequence[Any], dest: int) -> list[int]:
    """The sources of a destination that a rule names, by looking at each."""
    text = range(1, dest + 1)
    return {
        "previous": [s for s in text if s == dest - 1],
        "duplicate": [s for s in text if s < dest and ids[s] == ids[dest]],
        "induction": [s for s in text if 1 < s < dest and ids[s - 1] == ids[dest]],
        "start": [0],
        "current": [dest],
    }[rule]


def study(**changed: object) -> HeadsStudy:
    fields: dict[str, object] = {"model": "m", "samples": 3, "length": 31, "pass_tokens": 64, "text_rows": 8}
    return HeadsStudy.model_validate(fields | changed)


def test_random_rows_say_distinct_tokens_twice(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    rows = said_twice(study(length=32), lens)
    assert rows.shape == (3, 31), "an even length leaves one out"
    for row in rows.tolist():
        assert row[0] == lens.row_start
        assert row[1:16] == row[16:]
        assert len(set(row)) == 16
        assert set(row[1:]) <= set(ordinary_tokens(lens))
    assert torch.equal(rows, said_twice(study(length=32), lens))
    assert not torch.equal(rows, said_twice(study(length=32, seed=1), lens))
    with pytest.raises(UsageError, match="takes at most 64 tokens at once, not 65; lower --length"):
        said_twice(study(length=65), lens)


def test_heads_whose_patterns_are_rules_score_as_their_rule_says() -> None:
    found = done(on_random(Rules(), study()))  # type: ignore[arg-type]
    assert found.destinations == [3 * 15] * len(KINDS)
    for one, rule in zip(found.heads, RULES, strict=True):
        expected = {kind: 0.8 if kind == rule else 0.0 for kind in KINDS} | {"current": 0.2}
        assert one.attention.model_dump() == pytest.approx(expected, abs=1e-6)


def test_roles_follow_from_scores_and_a_model_without_a_value_map_has_none_by_weights() -> None:
    rules, cfg = Rules(), study(corpus="text")
    weights = done(on_weights(rules, cfg))  # type: ignore[arg-type]
    random, seen = done(on_random(rules, cfg)), done(in_text(rules, text_rows(), cfg))  # type: ignore[arg-type]
    found = heads(rules, cfg, random, seen, weights)  # type: ignore[arg-type]
    assert [one.roles for one in found.heads] == [["previous token"], ["duplicate token"], ["induction"], []]
    assert found.summary == "1 induction (0.2); 1 duplicate token (0.1); 1 previous token (0.0); of 4 heads"
    assert found.notes == ["The values of rules cannot be taken apart: they come from no one projection."]
    assert found.heads[0].copying is None
    assert Heads.model_validate(found.model_dump(mode="json")) == found
    alone = heads(rules, study(), random, None, weights)  # type: ignore[arg-type]
    assert "No text was given" in alone.notes[0]
    assert (alone.corpus, alone.heads[0].text) == (None, None)


def test_a_threshold_below_0_is_reached_from_above() -> None:
    assert [reaches(0.6, 0.5), reaches(0.4, 0.5), reaches(-0.6, -0.5), reaches(0.6, -0.5), reaches(None, 0.5)] == [
        True, False, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_text_means_are_those_of_loops_over_every_pair(tiny_lens: TinyLens, kind: str) -> None:
    lens, draw = tiny_lens(kind), np.random.default_rng(3)
    tokens = draw.choice([lens.row_start, *range(60, 72)], (4, 20)).astype(np.int32)  # a few tokens: they come again
    tokens[:, 0] = lens.row_start
    rows = Rows(Path("none"), 20, lens.row_start, tokens, tokens[:0], "drawn")
    found = done(in_text(lens, rows, study(layers=(2,), pass_tokens=64)))
    sums = {kind: np.zeros(lens.info.n_heads) for kind in KINDS}
    times = dict.fromkeys(KINDS, 0)
    pattern = lens.read_attention(torch.from_numpy(tokens.astype(np.int64)), 2).pattern.numpy()
    for row, ids in enumerate(tokens.tolist()):
        words = [object() if i == lens.row_start else plain(text) for i, text in zip(ids, lens.token_texts(ids), strict=True)]
        starts = [i == lens.row_start for i in ids]
        for dest in range(1, 20):
            if starts[dest]:
                continue
            for rule in KINDS:
                where = [s for s in named(rule, words, dest) if not starts[s]]
                if rule == "start":
                    where = [s for s in range(dest + 1) if starts[s]]
                if where:
                    times[rule] += 1
                    sums[rule] += pattern[row, :, dest, where].sum(0) if len(where) > 1 else pattern[row, :, dest, where[0]]
    assert found.destinations == list(times.values())
    for one in found.heads:
        expected = {rule: sums[rule][one.head] / times[rule] for rule in KINDS}
        assert one.attention.model_dump() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_scores_of_weights_are_those_of_the_whole_circuit(tiny_lens: TinyLens, kind: str, layer: int) -> None:
    """C by brute force: v as a row of one token has it, put into z at one head, through to all logits."""
    lens = tiny_lens(kind)
    found = done(on_weights(lens, study(layers=(layer,), vocabulary=10_000)))
    ids = ordinary_tokens(lens)
    texts = dict(zip(ids, lens.token_texts(ids), strict=True))
    v = lens.read_attention(torch.tensor(ids)[:, None], layer).v[:, 0]
    info, at = lens.info, {token: place for place, token in enumerate(ids)}
    assert found.tokens == len(ids)
    for one in found.heads:
        z = torch.zeros(len(ids), info.n_heads, info.d_head)
        z[:, one.head] = v[:, one.head // (info.n_heads // info.n_kv_heads)]
        c = lens.logit_weights(z.flatten(1), layer)[:, ids].double()
        c = c - c.mean(0)
        by: dict[str, list[float]] = {}
        for group in classes(texts):
            places = [at[token] for token in group.ids]
            best = [max(range(len(places)), key=lambda j, i=i: float(c[places[i], places[j]])) for i in range(len(places))]
            by.setdefault(group.sequence, []).append(np.mean([best[i] == after for i, after in group.after]))
        expected = {name: np.mean(shares) for name, shares in by.items()}
        assert one.by_sequence == pytest.approx(expected, abs=1e-6)
        assert one.successor == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
        centred = (c - c.mean(1, keepdim=True)).numpy()
        values = np.linalg.eigvals(centred)
        assert one.copying == pytest.approx(values.real.sum() / np.abs(values).sum(), abs=1e-3)
        assert one.own == pytest.approx((centred.diagonal() / centred.std(1)).mean(), rel=1e-3, abs=1e-4)


def test_a_model_whose_head_is_made_to_copy_is_found_out(tmp_path: Path) -> None:
    """Embeddings of one length, no gain, W_O = W_V^T at head 0, its negative at head 1 (of the same values)."""
    model = tiny_model("llama")
    embedding = model.model.embed_tokens.weight.data
    embedding *= embedding.shape[1] ** 0.5 / embedding.norm(dim=1, keepdim=True)
    model.model.norm.weight.data.fill_(1)
    block = model.model.layers[0]
    block.input_layernorm.weight.data.fill_(1)
    values, d_head = block.self_attn.v_proj.weight.data, model.config.head_dim
    block.self_attn.o_proj.weight.data[:, :d_head] = values[:d_head].T
    block.self_attn.o_proj.weight.data[:, d_head : 2 * d_head] = -values[:d_head].T
    model.save_pretrained(tmp_path / "copier")
    tiny_tokenizer().save_pretrained(tmp_path / "copier")
    lens = load_lens(ModelSource(location=str(tmp_path / "copier")), name="copier", cache=tmp_path)
    cfg = study(layers=(0,))
    weights = done(on_weights(lens, cfg))
    assert [one.copying for one in weights.heads[:2]] == pytest.approx([1, -1], abs=1e-3)
    assert all(abs(one.copying) < 0.5 for one in weights.heads[2:])
    found = heads(lens, cfg, done(on_random(lens, cfg)), None, weights)
    assert "copying" in found.heads[0].roles
    assert "copy suppression" in found.heads[1].roles
    assert not {"copying", "copy suppression"} & {role for one in found.heads[2:] for role in one.roles}


@pytest.mark.real
def test_smollm2s_known_heads_are_found(smollm2_lens: Lens) -> None:
    cfg = study(layers=(11, 16, 17, 18), samples=4, length=65, vocabulary=512, pass_tokens=512)
    found = heads(smollm2_lens, cfg, done(on_random(smollm2_lens, cfg)), None, done(on_weights(smollm2_lens, cfg)))
    known = {f"{one.layer}.{one.head}": one for one in found.heads}
    for name in ("17.3", "17.4", "17.5", "18.6"):
        assert "induction" in known[name].roles
    for name in ("11.1", "16.0"):
        assert known[name].random.previous > 0.7
    assert all(-1 <= one.copying <= 1 and 0 <= one.successor <= 1 for one in found.heads)
