"""One run of SAEDashboard 0.8.0, timed, in its own environment: `python -P bench/_saedashboard.py '<json>'` (see `main`).

Two things must be put right before its DFA runs with what it installs beside itself: pyarrow 21, since newer ones want a
NumPy that it forbids, and `hook_name` on the SAE's config, where it looks for what SAELens 6 keeps in the metadata. The
model is put together by hand, since neither TransformerLens 2.17 nor its Transformers knows SmolLM2's folder.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.feature_data_generator import FeatureDataGenerator
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig


def hooked(folder: Path, context: int) -> Any:
    """The Llama model in `folder` as a HookedSAETransformer; masks are made for rows of `context` only."""
    c = json.loads((folder / "config.json").read_text())
    heads, groups, width, d_head = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"], c["head_dim"]
    cfg = HookedTransformerConfig(
        n_layers=c["num_hidden_layers"],
        d_model=width,
        n_heads=heads,
        n_key_value_heads=groups,
        d_head=d_head,
        d_mlp=c["intermediate_size"],
        d_vocab=c["vocab_size"],
        n_ctx=context,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=c["rms_norm_eps"],
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=int(c["rope_parameters"]["rope_theta"]),
        rotary_adjacent_pairs=False,
        model_name="SmolLM2-135M-Instruct",
        original_architecture="LlamaForCausalLM",
        device="cpu",
        dtype=torch.float32,
    )
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    state = {
        "embed.W_E": embedding,
        "unembed.W_U": weights.get("lm_head.weight", embedding).T.contiguous(),
        "ln_final.w": weights["model.norm.weight"],
    }
    for layer in range(cfg.n_layers):
        mine, theirs = f"model.layers.{layer}.", f"blocks.{layer}."
        state[f"{theirs}ln1.w"] = weights[f"{mine}input_layernorm.weight"]
        state[f"{theirs}ln2.w"] = weights[f"{mine}post_attention_layernorm.weight"]
        for name, n, to in (("q", heads, "W_Q"), ("k", groups, "_W_K"), ("v", groups, "_W_V")):
            state[f"{theirs}attn.{to}"] = weights[f"{mine}self_attn.{name}_proj.weight"].view(n, d_head, width).transpose(1, 2)
        state[f"{theirs}attn.W_O"] = weights[f"{mine}self_attn.o_proj.weight"].T.reshape(heads, d_head, width)
        for name, to in (("gate", "W_gate"), ("up", "W_in"), ("down", "W_out")):
            state[f"{theirs}mlp.{to}"] = weights[f"{mine}mlp.{name}_proj.weight"].T.contiguous()
    made = HookedSAETransformer(cfg)
    missing, unexpected = made.load_state_dict(state, strict=False)
    # What it makes itself: masks, rotations, and biases, which are 0 as made and which Llama has not.
    known = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U")
    unknown = [name for name in missing if not name.endswith(known)]
    if unknown or unexpected:
        sys.exit(f"The model's weights do not fit: {unknown} missing, {unexpected} not known.")
    return made


def peak_memory() -> int:
    """Bytes held at most since this process began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Given model, sae, rows, features, layer, checked (rows whose DFA is handed over), ignore (token ids) and found (a
    file to write); prints a JSON object.

    `seconds` is the wall of the runner's `run()`, `model_seconds` what of it went into model passes and their cache. The
    model is loaded, and the rows are tokens, before it. Turning what it returns into JSON comes after it, untimed.
    """
    given = json.loads(sys.argv[1])
    rows, hook = np.load(given["rows"]), f"blocks.{given['layer']}.attn.hook_z"
    tokens = torch.from_numpy(rows.astype("int64"))
    model, features = hooked(Path(given["model"]), rows.shape[1]), list(range(given["features"]))
    sae = SAE.load_from_disk(given["sae"], device="cpu")
    sae.cfg.hook_name = hook
    # As its NeuronpediaRunner lays a feature out: 20 strongest and five from each of five intervals, whole rows.
    sequences = SequencesConfig(
        stack_mode="stack-all",
        buffer=None,
        compute_buffer=True,
        n_quantiles=5,
        top_acts_group_size=20,
        quantile_group_size=5,
    )
    parts = (sequences, ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), FeatureTablesConfig(n_rows=3))
    model_seconds, get_model_acts = 0.0, FeatureDataGenerator.get_model_acts

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal model_seconds
        begun = time.perf_counter()
        found = get_model_acts(self, *args, **kwargs)
        model_seconds += time.perf_counter() - begun
        return found

    FeatureDataGenerator.get_model_acts = timed
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
        cfg = SaeVisConfig(
            hook_point=hook,
            features=features,
            minibatch_size_features=128,
            minibatch_size_tokens=32,
            use_dfa=True,
            cache_dir=Path(folder),
            ignore_tokens=set(given["ignore"]),
            feature_centric_layout=SaeVisLayoutConfig(columns=[Column(*parts)]),
        )
        before = peak_memory()
        begun, used = time.perf_counter(), time.process_time()
        found = SaeVisRunner(cfg).run(encoder=sae, model=model, tokens=tokens)
        seconds, used = time.perf_counter() - begun, time.process_time() - used
    peak = peak_memory()
    _hand_over(found.feature_data_dict, features, given["checked"], Path(given["found"]))
    said = {"seconds": seconds, "model_seconds": model_seconds, "cpu": used, "peak": peak, "before": before}
    print(json.dumps(said | {"features": len(features), "threads": torch.get_num_threads()}))


def _hand_over(data: dict[int, Any], features: list[int], checked: int, path: Path) -> None:
    """The activations of every sequence, as rounded there, and the DFA of every feature on the first `checked` rows."""
    sequences = [
        (feature, sequence.original_index, sequence.qualifying_token_index, sequence.feat_acts)
        for feature in features
        for group in data[feature].sequence_data.seq_group_data
        for sequence in group.seq_data
    ]
    dfa = [[data[feature].dfa_data[row] for row in range(checked)] for feature in features]
    np.savez(
        path,
        feature=np.array([s[0] for s in sequences]),
        row=np.array([s[1] for s in sequences]),
        pos=np.array([s[2] for s in sequences]),
        acts=np.array([s[3] for s in sequences], dtype=np.float32),
        dfa=np.array([[row["dfaValues"] for row in of] for of in dfa], dtype=np.float32),  # [features, checked, src]
        dest=np.array([[row["dfaTargetIndex"] for row in of] for of in dfa]),  # [features, checked]
    )


if __name__ == "__main__":
    main()
