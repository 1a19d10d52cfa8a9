"""How large a language model is, told by its config alone.

The model is built on torch's meta device, where tensors have shapes and no storage, so a count is exact for every
architecture that transformers knows, takes no memory, and needs no weights.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from sae_core.errors import UnreadableModel

hf: Any = transformers  # its annotations do not describe what its Auto classes return

EXAMPLE = "gemma-2-2b"
EXAMPLE_CONFIG: dict[str, Any] = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "vocab_size": 256_000,
}
"""A model of about 2B parameters, for plans without a model: Gemma 2 2B's published config."""


class ModelSizes(NamedTuple):
    """What a memory plan is computed from."""

    parameters: int
    """All of them; tied ones count once."""
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    """Width of the hidden layer of an MLP."""
    d_vocab: int


def read_sizes(location: str, *, revision: str | None = None) -> ModelSizes:
    """Sizes of a folder that holds a config.json, or of a hub model whose config is in the hub's cache; never fetches.

    Raises UnreadableModel where there is no config, or none that transformers can build a language model from.
    """
    try:
        config = hf.AutoConfig.from_pretrained(location, revision=revision, local_files_only=True, trust_remote_code=False)
        return sizes(config)
    except Exception as error:
        where = "its config.json" if Path(location).is_dir() else "a config in the hub's cache"
        raise UnreadableModel(f"The sizes of {location} cannot be told from {where}; is it there?", field="model") from error


def example_sizes() -> ModelSizes:
    """Sizes of the example."""
    kind = EXAMPLE_CONFIG["model_type"]
    return sizes(hf.AutoConfig.for_model(kind, **{name: value for name, value in EXAMPLE_CONFIG.items() if name != "model_type"}))


def sizes(config: Any) -> ModelSizes:
    """Sizes of the model that a transformers config describes."""
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    n_heads = int(text.num_attention_heads)
    d_model = int(text.hidden_size)
    return ModelSizes(
        parameters=sum(p.numel() for p in model.parameters()),
        n_layers=int(text.num_hidden_layers),
        n_heads=n_heads,
        n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
        d_head=int(getattr(text, "head_dim", None) or d_model // n_heads),
        d_model=d_model,
        # GPT-2 calls it n_inner, and leaves it out where it is four times the stream's width.
        d_mlp=int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * d_model),
        d_vocab=int(model.get_output_embeddings().weight.shape[0]),
    )
