"""One training run of SAELens 6, timed, in SAELens' own environment: `python -P bench/_saelens.py '<json>'` (see `main`).

SAELens reaches hook_z only through a HookedTransformer, which TransformerLens 3.9 does not know how to make for SmolLM2
by its name; it is put together by hand here, out of TransformerLens' own converter for Llama's weights.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM


def hooked(folder: str, context: int) -> Any:
    """The model in `folder` as a HookedTransformer; masks are made for rows of `context` only, which spares it 2 GB."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c = model.config
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_head=c.head_dim,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        n_ctx=context,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        model_name="SmolLM2-135M-Instruct",
        original_architecture="LlamaForCausalLM",
        device="cpu",
        dtype=torch.float32,
    )
    made = HookedTransformer(cfg)
    made.load_state_dict(convert_llama_weights(model, cfg), strict=False)
    return made


def peak_memory() -> int:
    """Bytes held at most since this process began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Given model, rows, layer, d_sae, k, steps, batch, lr and folder; prints a JSON object.

    `seconds` is the wall of the runner's `run()`: model passes, steps, saving. The model is loaded, and the rows are
    tokens, before it. Beside the weights it leaves z of a few rows and what its saved SAE makes of them, so that the
    other side can see that it reads both as they are meant.
    """
    given = json.loads(sys.argv[1])
    folder = Path(given["folder"])
    rows = np.load(given["rows"])
    context, tokens = rows.shape[1], given["steps"] * given["batch"]
    model = hooked(given["model"], context)
    hook = f"blocks.{given['layer']}.attn.hook_z"
    cfg = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=model.cfg.n_heads * model.cfg.d_head, d_sae=given["d_sae"], k=given["k"], normalize_activations="none"
        ),
        model_name="SmolLM2-135M-Instruct",
        hook_name=hook,
        dataset_path="local",
        streaming=False,
        is_dataset_tokenized=True,
        context_size=context,
        training_tokens=tokens,
        train_batch_size_tokens=given["batch"],
        store_batch_size_prompts=32,
        n_batches_in_buffer=128,  # at its default of 20 the buffer is smaller than a batch, and it refuses
        device="cpu",
        dtype="float32",
        prepend_bos=True,
        lr=given["lr"],
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(folder),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=Dataset.from_dict({"tokens": rows.tolist()}), override_model=model
    )
    before = peak_memory()
    begun, used = time.perf_counter(), time.process_time()
    runner.run()
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    peak = peak_memory()

    with torch.no_grad():
        sample = torch.from_numpy(rows[:4].astype("int64"))
        _, cache = model.run_with_cache(sample, names_filter=hook, stop_at_layer=given["layer"] + 1)
        z = cache[hook].flatten(2)
        sae = SAE.load_from_disk(str(folder), device="cpu")
        np.savez(folder / "sample.npz", z=z.numpy(), rebuilt=sae.decode(sae.encode(z)).numpy())
    said = {
        "seconds": seconds,
        "cpu": used,
        "tokens": tokens,
        "peak": peak,
        "before": before,
        "weights": str(folder / "sae_weights.safetensors"),
    }
    print(json.dumps(said | {"threads": torch.get_num_threads(), "lr": given["lr"]}))


if __name__ == "__main__":
    main()
