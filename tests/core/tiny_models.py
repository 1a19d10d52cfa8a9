"""Tiny language models of real architectures with random weights: exact algebra in milliseconds.

transformers starts biases at 0 and gains at 1, where a forgotten bias or gain changes nothing; here every parameter is drawn.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

D_MODEL = 32
WINDOW = 6
SOFT_CAP = 1.0
END = "<|endoftext|>"
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("c", "a"), ("ca", "t"), ("Ċ", "Ċ")]
STORED_LESS_ONE = ("gemma2", "gemma3")  # kinds whose norms multiply by 1 + weight
D_VOCAB = 280  # a few more than the tokenizer has: real models pad theirs

_llama_like: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "vocab_size": D_VOCAB,
    "head_dim": 16,  # wider than hidden_size / heads, so that mixing the two up cannot pass
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=4, n_head=4, n_embd=D_MODEL, vocab_size=D_VOCAB, n_positions=64),
    "llama": lambda: transformers.LlamaConfig(**_llama_like, attention_bias=True, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(
        **_llama_like, sliding_window=WINDOW, attn_logit_softcapping=SOFT_CAP, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_llama_like,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in _llama_like.items() if k != "head_dim"}),
    "qwen3": lambda: transformers.Qwen3Config(**_llama_like, attention_bias=True),
    "pythia": lambda: transformers.GPTNeoXConfig(
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_size=D_MODEL,
        intermediate_size=48,
        vocab_size=D_VOCAB,
        max_position_embeddings=64,
    ),
    # One norm before attention and MLP, which run side by side.
    "gptj": lambda: transformers.GPTJConfig(
        n_layer=4, n_head=4, n_embd=D_MODEL, vocab_size=D_VOCAB, n_positions=64, rotary_dim=4, tie_word_embeddings=False
    ),
    "mistral": lambda: transformers.MistralConfig(**_llama_like, sliding_window=WINDOW),
    # A sink that is no token takes a part of every row of the pattern.
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_llama_like, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW
    ),
    # No norm before attention or MLP, but one after each.
    "olmo2": lambda: transformers.Olmo2Config(**{k: v for k, v in _llama_like.items() if k != "head_dim"}),
    # A norm stands between pattern x v and W_O, so z is not pattern x v: must be refused.
    "bitnet": lambda: transformers.BitNetConfig(**{k: v for k, v in _llama_like.items() if k != "head_dim"}),
}
KINDS = [kind for kind in CONFIGS if kind not in ("gptj", "gpt_oss", "olmo2", "bitnet")]


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A model of that kind, every parameter drawn at random."""
    config = CONFIGS[kind]()
    config.bos_token_id = config.eos_token_id = 0
    config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        is_gain = parameter.ndim == 1 and path.endswith("weight")
        parameter.data = noise + (1 if is_gain and kind not in STORED_LESS_ONE else 0)
    return model


def tiny_tokenizer() -> Any:
    """Byte-level BPE with a handful of merges; id 0 ends documents."""
    vocabulary = {END: 0}
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def save_tiny(kind: str, folder: Path, seed: int = 0) -> Path:
    """A tiny model and its tokenizer as a folder in Hugging Face format."""
    tiny_model(kind, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_gguf(path: Path, seed: int = 0) -> Path:
    """A tiny Llama as a GGUF file: 2 layers, 4 query heads, 2 key/value heads of width 8."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"token_embd": (len(tokens), D_MODEL), "output_norm": (D_MODEL,), "output": (len(tokens), D_MODEL)}
    for layer in range(2):
        sizes = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 48, "ffn_up": 48}
        shapes |= {f"blk.{layer}.{name}": (size, D_MODEL) for name, size in sizes.items()}
        shapes |= {f"blk.{layer}.{name}": (D_MODEL,) for name in ("attn_norm", "ffn_norm")}
        shapes[f"blk.{layer}.ffn_down"] = (D_MODEL, 48)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
