"""Edits on the way: closed forms, hooks set by hand in plain TransformerLens, and broken variants that must be seen."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_core import interventions
from sae_core.circuits import FeatureRoot, LogitRoot, trace
from sae_core.errors import Cancelled, HeadscopeError, NotFound, UsageError
from sae_core.interventions import Ablation, Edit, FeatureEdit, How, agreement, mean_z, measure, replacements, try_edges, write
from sae_core.lens import Lens
from sae_core.saes import ARCHITECTURES, SAE
from tests.core.test_rdfa import TOKENS, every_sae, firing, random_sae

ROW = torch.tensor([TOKENS])
KINDS = ["llama", "gpt2", "gemma2", "pythia", "gpt_oss", "olmo2"]  # gemma2 and gpt_oss have no fast handle


def by_hand(lens: Lens, tokens: Tensor, layers: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """Logits with z [b, pos, d_in] of some layers changed by hooks, with nothing of ours between."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda value, hook: change(value.flatten(2)).view_as(value)  # noqa: ARG005 - TransformerLens passes it

    hooks = [(f"blocks.{layer}.attn.hook_z", hook(change)) for layer, change in layers.items()]
    with torch.no_grad(), lens._bridge.hooks(fwd_hooks=hooks):
        logits: Tensor = lens._model(input_ids=tokens, use_cache=False).logits
    return logits.detach()


def same(found: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    assert float((found - expected).abs().max()) <= within * float(expected.abs().max())


def as_topk(sae: SAE) -> SAE:
    tensors = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    return ARCHITECTURES["topk"](sae.cfg.model_copy(update={"arch": "topk", "k": 4}), tensors)


def sae_of(lens: Lens, layer: int, which: str) -> SAE:
    sae = random_sae(lens, layer, norm="token" if which == "norms tokens" else "none")
    return as_topk(sae) if which == "topk" else sae


def z_of(lens: Lens, layer: int, tokens: Sequence[int] = TOKENS) -> Tensor:
    return lens.read_z(torch.tensor([list(tokens)]), [layer])[layer]


def adding(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """A change that adds a vector to z."""
    return lambda z: z + vector


def kept(zs: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
    """A change that changes nothing, and keeps the layer's z."""
    return lambda z: zs.setdefault(layer, z)


# ---- closed forms ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["jumprelu", "norms tokens", "topk"])
def test_setting_every_feature_to_its_own_activation_changes_nothing(
    tiny_lens: Callable[[str], Lens], kind: str, which: str
) -> None:
    lens = tiny_lens(kind)
    saes = {layer: sae_of(lens, layer, which) for layer in (1, 2)}
    edits = []
    for layer, sae in saes.items():
        f = sae.encode(z_of(lens, layer)[0])
        edits += [
            FeatureEdit(layer, index, "set", float(f[position, index]), (position,))
            for position, index in f[1:].nonzero().add(torch.tensor([1, 0])).tolist()
        ]
    assert len(edits) > 20
    plain = lens.run_with(ROW, {}).logits
    same(lens.run_with(ROW, replacements(lens, ROW, saes, edits)).logits, plain)
    other = [FeatureEdit(one.layer, one.index, "set", one.value + 0.5, one.at) for one in edits]
    with pytest.raises(AssertionError):
        same(lens.run_with(ROW, replacements(lens, ROW, saes, other)).logits, plain, 1e-2)


@pytest.mark.parametrize("which", ["jumprelu", "norms tokens", "topk"])
def test_each_way_to_edit_is_its_formula(tiny_lens: Callable[[str], Lens], which: str) -> None:
    lens, layer = tiny_lens("llama"), 1
    sae = sae_of(lens, layer, which)
    z = z_of(lens, layer)
    acts = sae.encode(z[0])[1:]
    at, index = divmod(int(acts.argmax()), acts.shape[1])
    at, f = at + 1, float(acts.max())
    s = lens.info.d_in**0.5 / float(z[0, at].norm()) if which == "norms tokens" else 1.0
    ways: list[tuple[How, float, float]] = [
        ("ablate", 0.0, 0.0), ("set", 0.7, 0.7), ("scale", 3.0, 3 * f), ("steer", -5.0, f - 5),
    ]  # fmt: skip
    for how, value, now in ways:
        edit = FeatureEdit(layer, index, how, value, (at,))
        expected = z.clone()
        expected[0, at] += (now - f) * sae.W_dec[index] / s
        same(replacements(lens, ROW, {layer: sae}, [edit])[layer](z), expected)
        codes = sae.encode(z[0, at])
        codes[index] = now
        expected[0, at] = (codes @ sae.W_dec + sae.b_dec) / s
        found = replacements(lens, ROW, {layer: sae}, [edit], keep_error=False)[layer](z)
        same(found, expected)
        others = [position for position in range(len(TOKENS)) if position != at]
        assert torch.equal(found[0, others], z[0, others]), "elsewhere nothing changes, without the error either"


def test_ablating_all_leaves_the_decoder_bias_and_the_error(tiny_lens: Callable[[str], Lens]) -> None:
    lens, layer = tiny_lens("llama"), 2
    sae = random_sae(lens, layer)
    z = z_of(lens, layer)
    every = [FeatureEdit(layer, index, "ablate") for index in range(sae.cfg.d_sae)]
    held = replacements(lens, ROW, {layer: sae}, every)[layer](z)
    same(held[0, 1:], sae.b_dec + (z - sae(z))[0, 1:])
    dropped = replacements(lens, ROW, {layer: sae}, every, keep_error=False)[layer](z)
    same(dropped[0, 1:], sae.b_dec.expand(len(TOKENS) - 1, -1))
    assert torch.equal(held[0, 0], z[0, 0]), "a row start has no features"


def test_edits_of_one_feature_act_in_order(tiny_lens: Callable[[str], Lens]) -> None:
    lens, layer = tiny_lens("llama"), 1
    saes = {layer: random_sae(lens, layer)}
    z = z_of(lens, layer)
    both = [FeatureEdit(layer, 5, "set", 2.0), FeatureEdit(layer, 5, "scale", 3.0, (4,))]
    once = [FeatureEdit(layer, 5, "set", 2.0), FeatureEdit(layer, 5, "set", 6.0, (4,))]
    same(replacements(lens, ROW, saes, both)[layer](z), replacements(lens, ROW, saes, once)[layer](z))


@pytest.mark.parametrize("how", ["set", "scale", "steer"])
@pytest.mark.parametrize("at", [None, (2, 5)])
def test_a_value_for_each_position_is_an_edit_of_each(
    tiny_lens: Callable[[str], Lens], how: How, at: tuple[int, ...] | None
) -> None:
    lens, layer = tiny_lens("llama"), 1
    saes, z = {layer: random_sae(lens, layer)}, z_of(lens, layer)
    values = tuple(8.0 * (-1) ** i * i + 3 for i in range(len(TOKENS)))
    index = int(saes[layer].encode(z[0, 5]).argmax())
    one = [FeatureEdit(layer, index, how, values, at)]
    each = [FeatureEdit(layer, index, how, values[i], (i,)) for i in at or range(1, len(TOKENS))]
    for keep_error in (True, False):
        found, expected = (replacements(lens, ROW, saes, some, keep_error=keep_error)[layer](z) for some in (one, each))
        assert torch.equal(found, expected)
        assert not torch.equal(found, z)
        for past in (True, False):
            texts = [write(lens, TOKENS, saes, some, 6, keep_error=keep_error, seed=5, keep_past=past) for some in (one, each)]
            assert texts[0] == texts[1], "new tokens stay as they are"
    with pytest.raises(UsageError, match="has 10 positions, so a value for each are 10, not 3"):
        measure(lens, TOKENS, saes, [FeatureEdit(layer, index, how, values[:3], at)])


# ---- against hooks in plain TransformerLens ----


@pytest.mark.parametrize("kind", KINDS)
def test_steering_on_two_layers_is_adding_two_vectors(tiny_lens: Callable[[str], Lens], kind: str) -> None:
    lens = tiny_lens(kind)
    saes = every_sae(lens, [1, 3])
    edits = [FeatureEdit(1, 7, "steer", 4.0), FeatureEdit(3, 9, "steer", -3.0, (2, 6))]
    first, second = torch.zeros(2, 1, len(TOKENS), lens.info.d_in)
    first[0, 1:] = 4 * saes[1].W_dec[7]  # row starts are left out
    second[0, [2, 6]] = -3 * saes[3].W_dec[9]
    expected = by_hand(lens, ROW, {1: adding(first), 3: adding(second)})
    same(lens.run_with(ROW, replacements(lens, ROW, saes, edits)).logits, expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["zero", "mean", "resample", "heads"])
def test_ablations_of_z_are_those_of_hooks(tiny_lens: Callable[[str], Lens], kind: str, how: str) -> None:
    lens, layer = tiny_lens(kind), 2
    rows = torch.randint(1, 200, (18, 7), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 0
    rows[3, 4] = lens.row_start  # a second document in the row
    zs = [lens.read_attention(row[None], layer).z[0] for row in rows]
    words = [z[at] for row, z in zip(rows, zs, strict=True) for at in range(1, 7) if row[at] != lens.row_start]
    mean, other = torch.stack(words).mean(0), z_of(lens, layer, [0, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    width = lens.info.d_head

    def change(z: Tensor) -> Tensor:
        z = z.clone()
        if how == "heads":
            z[0, [3, 5], width : 2 * width] = mean[width : 2 * width]
        else:
            z[0, 1:] = {"zero": torch.zeros(()), "mean": mean, "resample": other[0, 1:]}[how]
        return z

    found_mean = mean_z(lens, rows, [layer])[layer]
    same(found_mean, mean)
    given = {"zero": None, "mean": found_mean, "resample": other[0], "heads": found_mean}[how]
    edit = Ablation(layer, given, (3, 5), (1,)) if how == "heads" else Ablation(layer, given)
    same(lens.run_with(ROW, replacements(lens, ROW, {}, [edit])).logits, by_hand(lens, ROW, {layer: change}), 1e-4)


def test_z_is_ablated_before_features_are_read(tiny_lens: Callable[[str], Lens]) -> None:
    lens, layer = tiny_lens("llama"), 1
    saes, mean = {layer: random_sae(lens, layer)}, torch.full((lens.info.d_in,), 0.1)
    edits = [FeatureEdit(layer, 3, "steer", 2.0, (4,)), Ablation(layer, mean)]
    found = replacements(lens, ROW, saes, edits)[layer](z_of(lens, layer))
    same(found[0, 4], mean + 2 * saes[layer].W_dec[3])
    same(found[0, 5], mean)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_effects_are_those_of_separate_passes(tiny_lens: Callable[[str], Lens], kind: str) -> None:
    lens = tiny_lens(kind)
    saes = every_sae(lens, [1, 2, 3])
    root = firing(lens, saes[3], TOKENS)
    edit = FeatureEdit(1, 7, "steer", 4.0, (3, 4))
    found = measure(lens, TOKENS, saes, [edit], at=[5, 9], watch=[root], least=1e-3, most=10_000)
    plus = torch.zeros(len(TOKENS), lens.info.d_in)
    plus[[3, 4]] = 4 * saes[1].W_dec[7]
    clean, steered = by_hand(lens, ROW, {}), by_hand(lens, ROW, {1: adding(plus)})
    same(found.logits, clean[0, [5, 9]], 1e-4)
    same(found.changed_logits, steered[0, [5, 9]], 1e-4)
    same(found.losses, lens.token_losses(ROW)[0])
    same(found.changed_losses, lens.token_losses(ROW, 1, adding(plus))[0])
    kl = lens.effects_with(ROW, 1, [adding(plus)])[1].kl[0]
    assert found.kl[:-1] == pytest.approx(kl, abs=1e-4)
    assert found.kl[:3] == pytest.approx(0, abs=1e-5), "nothing before the edit changes"

    zs: dict[int, Tensor] = {}
    by_hand(lens, ROW, {1: adding(plus), 2: kept(zs, 2), 3: kept(zs, 3)})
    expected = {}
    for layer in (2, 3):
        before, after = saes[layer].encode(z_of(lens, layer)[0]), saes[layer].encode(zs[layer][0])
        for position, index in ((before - after).abs() > 1e-3).nonzero().tolist():
            expected[layer, position, index] = (float(before[position, index]), float(after[position, index]))
    near = {(one.layer, one.position, one.index): (one.before, one.after) for one in found.features}
    assert len(expected) > 10
    assert {place for place in near if abs(near[place][0] - near[place][1]) > 2e-3} <= set(expected)
    for place, (was, now) in expected.items():
        if abs(was - now) > 2e-3:
            assert near[place] == pytest.approx((was, now), abs=1e-4)
    sizes = [abs(one.after - one.before) for one in found.features]
    assert sizes == sorted(sizes, reverse=True)
    assert found.n_changed == len(found.features)
    w, c = saes[3].affine(torch.tensor([root.index]))
    assert found.preacts[0][1] == pytest.approx(float(zs[3][0, root.dest] @ w[0] + c[0]), abs=1e-4)
    assert len(measure(lens, TOKENS, saes, [edit], most=3).features) == 3


def test_an_edges_real_effect_is_that_of_a_hook(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    saes = every_sae(lens, [0, 1, 2, 3])
    for root in (firing(lens, saes[3], TOKENS), LogitRoot(17, 8), LogitRoot(17, 8, against=44)):
        circuit = trace(lens, TOKENS, saes, root, share=0.001)
        tried = try_edges(lens, TOKENS, saes, circuit, 5)
        assert len(tried) == 5
        edges = {edge.source: edge.value for edge in circuit.nodes[circuit.root].edges}
        for one in tried:
            act, place = circuit.activations[one.source], one.source
            minus = torch.zeros(len(TOKENS), lens.info.d_in)
            minus[place.position] = act * saes[place.layer].W_dec[place.index]
            zs: dict[int, Tensor] = {}
            hooks = {place.layer: adding(-minus)}
            if isinstance(root, FeatureRoot):
                hooks[3] = kept(zs, 3)
            logits = by_hand(lens, ROW, hooks)[0]
            if isinstance(root, FeatureRoot):
                w, c = saes[3].affine(torch.tensor([root.index]))
                now = float(zs[3][0, root.dest] @ w[0] + c[0])
            else:
                now = float(logits[8, 17] - (logits[8].mean() if root.against is None else logits[8, root.against]))
            assert one.real == pytest.approx(now - circuit.nodes[circuit.root].value, abs=1e-4)
            assert one.direct == -edges[place]


def test_agreement_counts_what_it_says() -> None:
    found = agreement([1.0, 2.0, 3.0, -1.0], [2.0, 4.0, 6.0, -2.0])
    assert found == (4, pytest.approx(1), 1.0)
    found = agreement([1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 1.0, -1.0])
    assert found.sign == 0.5
    assert found.correlation == pytest.approx(-1 / math.sqrt(5))
    assert math.isnan(agreement([1.0], [2.0]).correlation)


# ---- text ----


def test_the_same_seed_writes_the_same_text_and_another_another(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    saes = every_sae(lens, [2])
    steer = [FeatureEdit(2, 7, "steer", 4.0)]
    found = write(lens, TOKENS, saes, steer, 8, seed=3)
    assert found == write(lens, TOKENS, saes, steer, 8, seed=3)
    other = write(lens, TOKENS, saes, steer, 8, seed=4)
    assert found.plain != other.plain
    assert found.changed != other.changed
    assert found.plain != found.changed
    nothing = write(lens, TOKENS, saes, [FeatureEdit(2, 7, "scale", 1.0)], 8, seed=3)
    assert nothing.plain == nothing.changed == found.plain, "an edit that changes nothing changes no draw"


def test_at_temperature_0_the_most_likely_token_is_taken_and_edits_hold_on_new_tokens(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    saes = every_sae(lens, [2])
    tokens = list(TOKENS)
    for _ in range(5):
        plus = torch.zeros(len(tokens), lens.info.d_in)
        plus[1:] = 30 * saes[2].W_dec[7]
        tokens.append(int(by_hand(lens, torch.tensor([tokens]), {2: adding(plus)})[0, -1].argmax()))
    found = write(lens, TOKENS, saes, [FeatureEdit(2, 7, "steer", 30.0)], 5, temperature=0)
    assert found.changed == tokens[len(TOKENS) :]


CACHED = [*KINDS, "gemma3", "mistral", "qwen2"]


@pytest.mark.parametrize("kind", CACHED)
@pytest.mark.parametrize(("temperature", "keep_error"), [(0.0, True), (1.0, False)])
def test_text_with_keys_and_values_kept_is_that_of_whole_passes(
    tiny_lens: Callable[[str], Lens], kind: str, temperature: float, keep_error: bool
) -> None:
    lens = tiny_lens(kind)
    assert lens.keeps_past
    saes = every_sae(lens, [1, 3])
    other = z_of(lens, 2, [0, 9, 8, 7, 6, 5, 4, 3, 2, 1])[0]
    edits: list[Edit] = [
        FeatureEdit(1, 7, "steer", 40.0), FeatureEdit(3, 9, "set", 3.0, (2, 6)), Ablation(2, other), Ablation(0, heads=(1,)),
        Ablation(3, torch.full((lens.info.d_in,), 0.1), (1, 4), (0, 2)),
    ]  # fmt: skip
    kept, whole = (
        write(lens, TOKENS, saes, edits, 9, keep_error=keep_error, temperature=temperature, seed=5, keep_past=keep)
        for keep in (True, False)
    )
    assert kept == whole
    assert len(kept.plain) > 5
    assert kept.plain != kept.changed


def test_edits_at_places_of_the_text_are_not_made_again_on_new_tokens(tiny_lens: Callable[[str], Lens]) -> None:
    """By hand: one pass over all that was written, with what was edited at those places and nothing after."""
    lens = tiny_lens("llama")
    saes, n = every_sae(lens, [1]), len(TOKENS)
    other = z_of(lens, 2, [0, 9, 8, 7, 6, 5, 4, 3, 2, 1])[0]
    found = write(lens, TOKENS, saes, [FeatureEdit(1, 7, "steer", 9.0, (n - 1,)), Ablation(2, other)], 6, temperature=0).changed
    row = torch.tensor([[*TOKENS, *found]])
    plus = torch.zeros(row.shape[1], lens.info.d_in)
    plus[n - 1] = 9 * saes[1].W_dec[7]

    def put(z: Tensor) -> Tensor:
        z = z.clone()
        z[0, 1:n] = other[1:]
        return z

    assert by_hand(lens, row, {1: adding(plus), 2: put})[0, n - 1 : -1].argmax(-1).tolist() == found


def test_a_lens_that_keeps_no_past_writes_with_whole_passes(
    tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = tiny_lens("llama")
    kept = write(lens, TOKENS, {}, [], 4, seed=1)
    monkeypatch.setitem(lens.__dict__, "keeps_past", False)
    assert write(lens, TOKENS, {}, [], 4, seed=1) == kept
    with pytest.raises(ValueError, match="no keys and values"):
        lens.go_on(ROW, {}, None, 12)


@pytest.mark.parametrize("why", ["it raises", "it is off", "out of memory"])
def test_why_no_past_is_kept_is_in_the_log_and_a_full_device_says_nothing_of_the_model(
    tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    lens = tiny_lens("llama")
    monkeypatch.delitem(lens.__dict__, "keeps_past", raising=False)
    forward = lens._model.forward

    def broken(*given: Any, **options: Any) -> Any:
        if options.get("past_key_values") is None:
            return forward(*given, **options)
        if why == "it is off":
            found = forward(*given, **options)
            found.logits = found.logits * 1.01
            return found
        raise torch.OutOfMemoryError("full") if why == "out of memory" else TypeError("no such thing")

    with monkeypatch.context() as patched, caplog.at_level("WARNING", "headscope"):
        patched.setattr(lens._model, "forward", broken)
        if why == "out of memory":
            with pytest.raises(torch.OutOfMemoryError):
                _ = lens.keeps_past
        else:
            assert not lens.keeps_past
            lens.__dict__.pop("keeps_past")
    said = {"it raises": ["slower: TypeError: no such thing"], "it is off": ["slower: its logits are off by 1.0e-02"]}
    assert [record.getMessage().partition("passes, ")[2] for record in caplog.records] == said.get(why, [])
    assert lens.keeps_past, "asked again, it is tried again"


def test_writing_stops_where_it_is_told_to(tiny_lens: Callable[[str], Lens]) -> None:
    seen: list[int] = []

    def check() -> None:
        seen.append(1)
        if len(seen) == 7:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        write(tiny_lens("llama"), TOKENS, {}, [], 5, seed=3, check=check)
    assert len(seen) == 7, "in the second text, after five tokens of the first"


def test_tokens_are_drawn_as_often_as_they_are_likely(tiny_lens: Callable[[str], Lens]) -> None:
    lens, n = tiny_lens("llama"), 400
    likely = (by_hand(lens, ROW, {})[0, -1] / 0.7).softmax(-1)
    drawn = torch.tensor([write(lens, TOKENS, {}, [], 1, temperature=0.7, seed=seed).plain[0] for seed in range(n)])
    top = likely.topk(3).indices
    share, expected = float(torch.isin(drawn, top).double().mean()), float(likely[top].sum())
    assert 0.05 < expected < 0.95
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_a_text_ends_where_the_model_ends_it(tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch) -> None:
    lens = tiny_lens("llama")
    whole = write(lens, TOKENS, {}, [], 6, seed=3).plain
    assert lens.text_end == 0
    monkeypatch.setattr(Lens, "text_end", whole[2])
    assert write(lens, TOKENS, {}, [], 6, seed=3).plain == whole[: whole.index(whole[2]) + 1]


def test_text_and_tokens_are_each_others(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    for text in ("the cat\n\n  sat", "caf\u00e9 <|endoftext|>", ""):
        assert lens.decode(lens.encode([text])[0]) == text


# ---- refusals, and broken variants ----


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (FeatureEdit(2, 0, "ablate"), NotFound, "No SAE of layer 2"),
        (FeatureEdit(9, 0, "ablate"), HeadscopeError, "no layer 9"),
        (FeatureEdit(1, 96, "ablate"), NotFound, "features 0 to 95"),
        (FeatureEdit(1, 0, "ablate", at=(10,)), UsageError, "positions 0 to 9"),
        (FeatureEdit(1, 0, "ablate", at=(0,)), UsageError, "row start or an attention sink"),
        (Ablation(1, torch.zeros(3)), UsageError, "must be"),
        (Ablation(1, heads=(4,)), NotFound, "heads 0 to 3"),
    ],
)
def test_what_is_not_there_gets_a_sentence(
    tiny_lens: Callable[[str], Lens], edit: Any, error: type[Exception], says: str
) -> None:
    lens = tiny_lens("llama")
    with pytest.raises(error, match=says):
        measure(lens, TOKENS, every_sae(lens, [1]), [edit])


def test_a_text_that_would_grow_too_long_gets_a_sentence(tiny_lens: Callable[[str], Lens]) -> None:
    with pytest.raises(UsageError, match="beyond the 64"):
        write(tiny_lens("llama"), TOKENS, {}, [], 55)


@pytest.mark.parametrize("broken", ["position", "direction", "error", "scale", "order of heads"])
def test_broken_variants_are_seen(tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Each must fail the formula that `test_each_way_to_edit_is_its_formula` holds."""
    lens, layer = tiny_lens("llama"), 1
    sae = random_sae(lens, layer, norm="token")
    z = z_of(lens, layer)
    acts = sae.encode(z[0])[1:-1]
    at, index = divmod(int(acts.argmax()), acts.shape[1])
    expected = z.clone()
    expected[0, at + 1] += (2.0 - float(acts.max())) * sae.W_dec[index] * float(z[0, at + 1].norm()) / lens.info.d_in**0.5

    def gap() -> float:
        edit = FeatureEdit(layer, index, "set", 2.0, (at + 1,))
        return float((replacements(lens, ROW, {layer: sae}, [edit])[layer](z) - expected).abs().max())

    assert gap() < 1e-5
    places, edited, token_scale = interventions._places, interventions._edited, SAE.token_scale
    if broken == "position":
        monkeypatch.setattr(interventions, "_places", lambda *given: places(*given).roll(1, 1))
    elif broken == "direction":
        sae.W_dec = sae.W_dec.roll(1, 0)
    elif broken == "order of heads":
        sae.W_dec = sae.W_dec.view(96, lens.info.n_heads, -1).flip(1).flatten(1)
    elif broken == "error":
        monkeypatch.setattr(interventions, "_edited", lambda sae, starts, edits, _, z: edited(sae, starts, edits, False, z))
    else:
        monkeypatch.setattr(SAE, "token_scale", lambda self, z: 2 * token_scale(self, z))
    assert gap() > 1e-2


@pytest.mark.real
def test_on_smollm2(smollm2_lens: Lens) -> None:
    lens = smollm2_lens
    tokens = [lens.row_start, *lens.encode(["When Mary and John went to the store, John gave a bottle of milk to"])[0]]
    row = torch.tensor([tokens])
    saes = {layer: random_sae(lens, layer, 1152, rate=0.02) for layer in (9, 17)}
    plain = lens.run_with(row, {}).logits
    same(plain, by_hand(lens, row, {}), 1e-4)
    own = []
    for layer, sae in saes.items():
        f = sae.encode(lens.read_z(row, [layer])[layer][0])
        own += [FeatureEdit(layer, i, "set", float(f[p, i]), (p,)) for p, i in f.nonzero().tolist() if p]
    same(lens.run_with(row, replacements(lens, row, saes, own)).logits, plain)
    plus = torch.zeros(2, len(tokens), lens.info.d_in)
    plus[:, 1:] = 3 * torch.stack([saes[9].W_dec[4], saes[17].W_dec[4]])[:, None]
    steer = [FeatureEdit(layer, 4, "steer", 3.0) for layer in saes]
    steered = by_hand(lens, row, {9: adding(plus[0]), 17: adding(plus[1])})
    found = measure(lens, tokens, saes, steer, at=[len(tokens) - 1])
    same(found.changed_logits[0], steered[0, -1], 1e-4)
    assert found.n_changed > 0
    assert float((found.changed_losses - found.losses).abs().max()) > 1e-3
    one, again, other = (write(lens, tokens, saes, steer, 6, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.plain != other.plain
    assert one == write(lens, tokens, saes, steer, 6, seed=1, keep_past=False)
