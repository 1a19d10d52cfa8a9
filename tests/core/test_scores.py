"""Why a head attended there: pairs of parts sum to the score that the model itself has, on every architecture and on SmolLM2."""

from collections.abc import Callable

import pytest
import torch
import transformers

from sae_core.circuits import Place
from sae_core.errors import UnsupportedModel, UsageError
from sae_core.lens import Lens, Side
from sae_core.scores import Why, explain
from tests.core.test_rdfa import TOKENS, every_sae

KINDS = ["llama", "gpt2", "gemma2", "gemma3", "qwen2", "qwen3", "pythia", "mistral", "gpt_oss", "olmo2"]


def hooked(lens: Lens, layer: int, tokens: list[int] = TOKENS) -> torch.Tensor:
    """[n_heads, dest, src]: what the bridge hands to the softmax, by its own hook."""
    found: list[torch.Tensor] = []
    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", lambda value, **_: found.append(value.detach()[0]))]
    with torch.no_grad(), lens._bridge.hooks(fwd_hooks=hooks):
        lens._model(torch.tensor([tokens]))
    return found[0]


def adds_up(why: Why, within: float = 1e-5) -> None:
    """With every pair listed."""
    assert why.gap <= within
    assert why.n_rest == 0
    size = sum(abs(pair.value) for pair in why.pairs)
    for parts in (why.pairs, why.queries, why.keys):
        assert sum(part.value for part in parts) == pytest.approx(why.value, abs=within * size)
    for part in why.queries:
        own = sum(pair.value for pair in why.pairs if pair.query == part.place)
        assert part.value == pytest.approx(own, abs=within * size)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_sum_to_the_score_that_goes_into_the_softmax(tiny_lens: Callable[[str], Lens], kind: str) -> None:
    lens = tiny_lens(kind)
    saes = every_sae(lens, range(lens.info.n_layers))
    for layer, head, dest, src in ((0, 1, 8, 5), (2, 0, 8, 4), (3, 3, 9, 9)):
        seen = hooked(lens, layer)[:, dest, src]
        why = explain(lens, TOKENS, saes, layer=layer, head=head, dest=dest, src=src, most=10**6)
        capped = [score if why.cap is None else why.cap * float(torch.tensor(score / why.cap).tanh()) for score in why.scores]
        assert capped == pytest.approx(seen.tolist(), rel=1e-4, abs=1e-4)
        assert why.value == why.scores[head]
        adds_up(why)
        kinds = {part.place.kind for part in why.queries}
        assert {"embedding"} <= kinds
        assert layer == 0 or {"feature", "error", "MLP"} <= kinds
        few = explain(lens, TOKENS, saes, layer=layer, head=head, dest=dest, src=src, most=3)
        assert few.pairs == why.pairs[:3]
        assert few.n_rest == max(0, len(why.pairs) - 3)
        assert sum(pair.value for pair in few.pairs) + few.rest == pytest.approx(why.value, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3", "pythia", "olmo2"])
def test_the_lead_over_the_mean_is_split_too(tiny_lens: Callable[[str], Lens], kind: str) -> None:
    lens, layer, head, dest, src = tiny_lens(kind), 2, 1, 8, 5
    saes = every_sae(lens, range(lens.info.n_layers))
    plain = explain(lens, TOKENS, saes, layer=layer, head=head, dest=dest, src=src)
    why = explain(lens, TOKENS, saes, layer=layer, head=head, dest=dest, src=src, against_mean=True, most=10**6)
    if why.cap is None:
        seen = hooked(lens, layer)[head, dest, : dest + 1]
        assert why.value == pytest.approx(float(seen[src] - seen.mean()), rel=1e-3, abs=1e-4)
    assert why.value == pytest.approx(plain.value - plain.means[head], rel=1e-4, abs=1e-5)
    adds_up(why)
    if kind == "gpt2":  # no rotation: what is the same for every key wins nothing
        assert max(abs(part.value) for part in why.keys if part.place.name == "key bias") < 1e-5


def test_a_pair_is_what_the_layers_own_modules_make_of_its_two_parts(tiny_lens: Callable[[str], Lens]) -> None:
    """With no use of the folded maps or of the turn: a feature at the destination and one at the source through the norm with one
    scale, the projections themselves and transformers' own rotation."""
    lens, layer, dest, src = tiny_lens("llama"), 3, 8, 5
    saes = every_sae(lens, [0, 1, 2])
    block, rotary = lens._bridge.blocks[layer], lens._model.model.rotary_emb
    norm, stream = block.ln1.original_component, lens.read_streams(torch.tensor([TOKENS]), [layer])[layer].stream[0]
    scale = (stream.square().mean(-1) + norm.variance_epsilon).sqrt()
    cos, sin = rotary(stream[None], torch.arange(len(TOKENS))[None])
    checked = 0
    for head in range(lens.info.n_heads):
        why = explain(lens, TOKENS, saes, layer=layer, head=head, dest=dest, src=src, most=10**6)
        pairs = [pair for pair in why.pairs if pair.query.kind == pair.key.kind == "feature"][:5]
        for pair in pairs:

            def through(place: Place, projection: torch.nn.Module, n: int) -> torch.Tensor:
                z = lens.read_z(torch.tensor([TOKENS]), [place.layer])[place.layer][0, place.position]
                act = float(saes[place.layer].encode(z[None])[0, place.index])
                written = act * saes[place.layer].W_dec[place.index] @ lens.W_O(place.layer).flatten(0, 1)
                normed = (written / scale[place.position] * norm.weight)[None, None]
                with torch.no_grad():
                    given = projection(normed) - projection(torch.zeros_like(normed))
                vector = given.view(1, 1, -1, lens.info.d_head).transpose(1, 2)[:, n : n + 1]
                at = slice(place.position, place.position + 1)
                turned, _ = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(vector, vector, cos[:, at], sin[:, at])
                return turned.flatten()

            q = through(pair.query, block.attn.q.original_component, head)
            k = through(pair.key, block.attn.k.original_component, head // 2)
            assert pair.value == pytest.approx(float(q @ k) / lens.info.d_head**0.5, rel=1e-3, abs=1e-6)
            checked += 1
    assert checked >= 10


def test_what_the_mask_hides_and_what_is_not_there_get_a_sentence(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("mistral")  # a window of 6
    for dest, src, head, says in ((8, 9, 0, "does not let position 8 look at 9"), (9, 0, 0, "look at 0"),
                                  (10, 0, 0, "positions 0 to 9"), (8, 7, 4, "heads 0 to 3")):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            explain(lens, TOKENS, {}, layer=1, head=head, dest=dest, src=src)


@pytest.mark.parametrize("broken", ["no rotation", "no norm on queries", "key bias left out"])
def test_broken_variants_are_refused(tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    lens = tiny_lens("qwen3")
    explain(lens, TOKENS, {}, layer=1, head=0, dest=8, src=3)
    real_side = Lens._side

    def side(self: Lens, layer: int, name: str, word: str, projected: torch.Tensor) -> Side:
        made = real_side(self, layer, name, word, projected)
        if broken == "no norm on queries" and name == "q":
            return made._replace(own_scale=torch.ones_like(made.own_scale))
        return made._replace(biases={}) if broken == "key bias left out" and name == "k" else made

    monkeypatch.setattr(Lens, "_side", side)
    if broken == "no rotation":
        monkeypatch.setattr(Lens, "_turn", lambda _self, _layer, pos, _seen: torch.eye(16).expand(pos, -1, -1))
    with pytest.raises(UnsupportedModel, match="do not give its scores"):
        explain(lens, TOKENS, {}, layer=1, head=0, dest=8, src=3)


@pytest.mark.real
def test_on_smollm2_pairs_sum_to_the_hooked_score(smollm2_lens: Lens) -> None:
    lens = smollm2_lens
    tokens = [lens.row_start, *lens.encode(["When Mary and John went to the store, John gave a bottle of milk to"])[0]]
    saes = every_sae(lens, (3, 9))
    seen = hooked(lens, 12, tokens)
    for head, dest, src in ((0, 10, 4), (8, len(tokens) - 1, 2)):
        why = explain(lens, tokens, saes, layer=12, head=head, dest=dest, src=src, most=10**6)
        assert why.value == pytest.approx(float(seen[head, dest, src]), rel=1e-3, abs=1e-3)
        assert sum(pair.value for pair in why.pairs) == pytest.approx(float(seen[head, dest, src]), abs=1e-3)
        assert why.gap < 1e-4
        lead = explain(lens, tokens, saes, layer=12, head=head, dest=dest, src=src, against_mean=True)
        assert lead.value == pytest.approx(float(seen[head, dest, src] - seen[head, dest, : dest + 1].mean()), abs=1e-3)
        assert lead.gap < 1e-4
