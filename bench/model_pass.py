"""What a model pass to z costs against a lean forward written by hand, by CPU time; SmolLM2-135M from its gguf file.

The lean forward is what an engineer writes for this one model: merged projections, fused norm and attention, products in
place, no modules, no hooks. It must give `read_z`'s z before anything is timed. Ours and its passes take turns; each figure is
the median of the rounds' ratios of processor time. `cost_vs_lean` is the worse of z of layer 17 and of the last layer.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from bench import _smollm2
from sae_core.config import RowsConfig
from sae_core.lens import Lens
from server.settings import Settings

LAYER = 17
CONTEXT = 128
CHECKED = 2  # rows
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Largest gap between the two z, as a share of z's norm: products are summed in another order, and bfloat16 keeps 8 bits, so
after 30 layers either pass is about 3% off the one in float32."""


class Lean:
    """Llama's forward as far as z, for one dtype."""

    def __init__(self, weights: dict[str, Tensor], lens: Lens, dtype: torch.dtype) -> None:
        info = lens.info
        self.dtype, self.n_heads, self.n_kv_heads, self.d_head = dtype, info.n_heads, info.n_kv_heads, info.d_head
        config = json.loads((_smollm2.folder() / "config.json").read_text())
        self.eps = config["rms_norm_eps"]
        w = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.embedding = w["model.embed_tokens.weight"]
        frequencies = config["rope_parameters"]["rope_theta"] ** -(torch.arange(0, self.d_head, 2) / self.d_head)
        angles = torch.arange(CONTEXT)[:, None] * frequencies.repeat(2)
        self.cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]  # [pos, 1, d_head], as heads lie
        self.sin = torch.cat([-sin[..., : self.d_head // 2], sin[..., self.d_head // 2 :]], -1)
        self.blocks = []
        for layer in range(info.n_layers):
            at = f"model.layers.{layer}."
            qkv = torch.cat([w[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"])
            gate_up = torch.cat([w[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up")])
            norms = w[f"{at}input_layernorm.weight"], w[f"{at}post_attention_layernorm.weight"]
            self.blocks.append((norms, qkv, w[f"{at}self_attn.o_proj.weight"], gate_up, w[f"{at}mlp.down_proj.weight"]))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions on [b, pos, head, d_head]."""
        return torch.addcmul(x * self.cos, x.roll(self.d_head // 2, -1), self.sin)

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm."""
        return functional.rms_norm(x, gain.shape, gain, self.eps)

    @torch.no_grad()
    def z(self, tokens: Tensor, layer: int) -> Tensor:
        """[b, pos] -> [b, pos, n_heads * d_head]."""
        x = functional.embedding(tokens, self.embedding)
        q_and_k = self.n_heads + self.n_kv_heads
        for index, ((before, after), qkv, output, gate_up, down) in enumerate(self.blocks):
            heads = functional.linear(self.norm(x, before), qkv).unflatten(-1, (-1, self.d_head))
            turned = self.rotate(heads[:, :, :q_and_k]).transpose(1, 2)
            q, k, v = turned[:, : self.n_heads], turned[:, self.n_heads :], heads[:, :, q_and_k:].transpose(1, 2)
            z = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
            if index == layer:
                return z
            x += functional.linear(z, output)
            gate, up = functional.linear(self.norm(x, after), gate_up).chunk(2, -1)
            x += functional.linear(functional.silu(gate).mul_(up), down)
        raise ValueError(layer)


def run(rows: int = 16, rounds: int = 5, threads: int = 1) -> dict[str, dict[str, object]]:
    """Ratios of processor time. One thread by default: waiting threads spin, which is not work of either."""
    torch.set_num_threads(threads)
    lens = _smollm2.lens()
    weights = load_file(_smollm2.folder() / "model.safetensors")
    cfg = RowsConfig(context=CONTEXT, tokens=rows * CONTEXT, heldout_tokens=CONTEXT)
    text = _smollm2.rows(lens, cfg, Settings().cache / "bench" / "model-pass-rows")
    tokens = torch.from_numpy(text.train[:rows].astype("int64"))
    figures: dict[str, dict[str, object]] = {}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "_bf16")):
        found = _compared(lens, Lean(weights, lens, dtype), tokens, rounds)
        figures |= {f"{name}{suffix}": figure for name, figure in found.items()}
    return figures


def _compared(lens: Lens, lean: Lean, tokens: Tensor, rounds: int) -> dict[str, dict[str, object]]:
    last, dtype = lens.info.n_layers - 1, lean.dtype
    every = range(lens.info.n_layers)
    for layer, z in lens.read_z(tokens[:CHECKED], every, dtype).items():
        gap = float((lean.z(tokens[:CHECKED], layer).float() - z.float()).norm() / z.float().norm())
        if not gap <= CLOSE[dtype]:
            raise SystemExit(f"The lean forward's z of layer {layer} is {gap:.1%} off ours in {dtype}; nothing was timed.")
    passes: dict[str, Callable[[], object]] = {
        "lean_middle": functools.partial(lean.z, tokens, LAYER),
        "lean_last": functools.partial(lean.z, tokens, last),
        "ours_middle": functools.partial(lens.read_z, tokens, [LAYER], dtype),
        "ours_last": functools.partial(lens.read_z, tokens, [last], dtype),
        "ours_all": functools.partial(lens.read_z, tokens, every, dtype),
    }
    if dtype == torch.float32:
        passes["bridge"] = functools.partial(lens.read_attention, tokens, last)
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(rounds + 1):
        for name, once in passes.items():
            begun = time.process_time()
            once()
            if turn:  # the first round warms up
                times[name].append(time.process_time() - begun)

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[above], times[below], strict=True)), 3)

    time_per_token = round(1e6 * statistics.median(times["ours_last"]) / tokens.numel())
    figures: dict[str, dict[str, object]] = {
        "cost_vs_lean": {
            "value": max(ratio("ours_middle", "lean_middle"), ratio("ours_last", "lean_last")),
            "unit": "x",
            "target": "<= 1.2",
        },
        "all_layers_vs_last": {"value": ratio("ours_all", "ours_last"), "unit": "x", "target": "<= 1.1"},
        "time": {"value": time_per_token, "unit": "us/token", "target": None},
    }
    if "bridge" in passes:
        figures["bridge_vs_lean"] = {"value": ratio("bridge", "lean_last"), "unit": "x", "target": None}
    return figures
