"""Small TopK transcoders of SmolLM2's MLPs, trained on the demo's text and kept as sparsify folders."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sae_core.corpus import Rows

ROWS = 16  # in a step
DEAD = 40  # steps without firing
LR = 1.5e-3


class Trained(NamedTuple):
    """How a training went."""

    folder: Path
    fvu: float
    """Of what the MLP gives on held-out rows."""
    seconds: float


class Coder(nn.Module):
    """relu(x W_enc + b_enc), the k largest of it, W_dec, and x skip if there is one."""

    def __init__(self, x: Tensor, y: Tensor, n: int, k: int, *, skip: bool) -> None:
        super().__init__()
        d = x.shape[1]
        W_enc = nn.functional.normalize(torch.randn(d, n, generator=torch.Generator().manual_seed(0)), dim=0) / x.std()
        self.k = k
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(-(x.mean(0) @ W_enc))
        self.W_dec, self.b_dec = nn.Parameter(torch.zeros(n, d)), nn.Parameter(y.mean(0).clone())
        self.skip = nn.Parameter(torch.zeros(d, d)) if skip else None
        self.silent = torch.zeros(n, dtype=torch.int64)

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """What is minimised, and the fraction of the variance that is left."""
        preacts = x @ self.W_enc + self.b_enc
        top = preacts.relu().topk(self.k)
        made = self._decoded(top.values, top.indices) + self.b_dec
        made = made if self.skip is None else made + x @ self.skip
        power, left = (y - y.mean(0)).square().sum(), y - made
        fvu = left.square().sum() / power
        self.silent += 1
        self.silent[top.indices[top.values > 0].unique()] = 0
        dead = (self.silent > DEAD).nonzero()[:, 0]
        if len(dead) < 2 * self.k:
            return fvu, float(fvu.detach())
        # Gao et al. 2024: what has not fired for long makes what is left.
        some = preacts[:, dead].topk(2 * self.k)
        again = left.detach() - self._decoded(some.values, dead[some.indices])
        return fvu + again.square().sum() / power / 32, float(fvu.detach())

    def _decoded(self, values: Tensor, indices: Tensor) -> Tensor:
        return nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")


def train(
    model: Path,
    rows: Rows,
    layers: dict[int, bool],
    place: Path,
    *,
    n: int = 2304,
    k: int = 32,
    batches: int = 24,
    steps: int = 200,
) -> dict[int, Trained]:
    """A transcoder of each of some layers, with a skip where `layers` says so. The model reads `batches` of rows once, for all of
    them; steps go over these again and again, in another order each time."""
    began = time.perf_counter()
    tokens = [
        torch.from_numpy(part[: size * ROWS].astype("int64")).split(ROWS)
        for part, size in ((rows.train, batches), (rows.heldout, 2))
    ]
    seen, unseen = (_around_mlps(model, some, list(layers)) for some in tokens)
    found = {}
    for layer, skip in layers.items():
        coder = Coder(*seen[layer][0], n, k, skip=skip)
        optimizer = torch.optim.Adam(coder.parameters(), lr=LR, betas=(0.9, 0.99))
        order = torch.Generator().manual_seed(layer)
        for step in range(steps):
            if step % batches == 0:
                turn = torch.randperm(batches, generator=order).tolist()
            optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 10, 1.2 * (1 - step / steps))
            loss, _ = coder.loss(*seen[layer][turn[step % batches]])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        fvu = sum(coder.loss(x, y)[1] for x, y in unseen[layer]) / len(unseen[layer])
        found[layer] = Trained(_write(coder, layer, place), fvu, time.perf_counter() - began)
    return found


def _around_mlps(model: Path, batches: Sequence[Tensor], layers: Sequence[int]) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """By layer, what enters its MLP and what that makes of it, batch by batch; row starts left out, which are no text."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False).model
    lm.layers = lm.layers[: max(layers) + 1]
    found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Any:
        return lambda _, given, out: found[layer].append((given[0][:, 1:].flatten(0, 1), out[:, 1:].flatten(0, 1)))

    for layer in layers:
        lm.layers[layer].mlp.register_forward_hook(keep(layer))
    for batch in batches:
        lm(input_ids=batch, use_cache=False)
    return found


def _write(coder: Coder, layer: int, place: Path) -> Path:
    """As sparsify does."""
    folder = place / f"layers.{layer}.mlp"
    folder.mkdir(parents=True, exist_ok=True)
    d, n = coder.W_enc.shape
    tensors = {"encoder.weight": coder.W_enc.T, "encoder.bias": coder.b_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    tensors |= {} if coder.skip is None else {"W_skip": coder.skip.T}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "sae.safetensors")
    config = {
        "activation": "topk",
        "d_in": d,
        "num_latents": n,
        "k": coder.k,
        "transcode": True,
        "skip_connection": coder.skip is not None,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder
