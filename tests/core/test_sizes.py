"""A model's sizes by its config are those of the model itself."""

from pathlib import Path

import pytest
import transformers

from sae_core.errors import UnreadableModel
from sae_core.lens import Lens
from sae_core.sizes import example_sizes, read_sizes, sizes
from tests.core.test_lens import TinyLens
from tests.core.tiny_models import CONFIGS, KINDS, save_tiny, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_by_config_are_those_of_the_loaded_model(tiny_lens: TinyLens, kind: str) -> None:
    lens: Lens = tiny_lens(kind)
    found = sizes(CONFIGS[kind]())
    assert found.parameters == sum(p.numel() for p in tiny_model(kind).parameters())
    for name in ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_model", "d_vocab"):
        assert getattr(found, name) == getattr(lens.info, name), name


def test_a_llama_is_counted_as_by_hand() -> None:
    # SmolLM2-135M: tied embedding; a layer has q and o of 576 x 576, k and v of 576 x 192, three 576 x 1536, two norms.
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert sizes(config).parameters == 49152 * 576 + 30 * layer + 576
    assert sizes(config)[1:] == (30, 9, 3, 64, 576, 1536, 49152)


def test_gpt2_has_an_mlp_of_four_widths() -> None:
    assert sizes(transformers.GPT2Config()).d_mlp == 4 * 768


def test_the_example_has_about_two_billion_parameters() -> None:
    assert 2e9 < example_sizes().parameters < 3e9


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    folder = save_tiny("gemma3", tmp_path / "model")
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert read_sizes(str(folder)) == sizes(CONFIGS["gemma3"]())


def test_a_config_that_says_nothing_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-kind"}')
    with pytest.raises(UnreadableModel, match=r"The sizes of .* cannot be told from its config\.json"):
        read_sizes(str(tmp_path))
    with pytest.raises(UnreadableModel, match="a config in the hub's cache"):
        read_sizes("nobody/no-such-model")
