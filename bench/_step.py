"""One side of `sae-step`, alive between rounds: `python _step.py '<json>'`, run in our environment or in the peer's.

The JSON object has side, inputs (a file with x, one batch after the other, and W_dec, the dictionary to start from), k, lr,
and dtype. Every line on stdin asks for one step on the next batch; each is answered by a line on stdout: its seconds.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], None]


class Dense(nn.Module):
    """The usual TopK SAE: the code is a dense matrix of zeros, and autograd goes back through dense products."""

    def __init__(self, W_dec: Tensor, b_dec: Tensor, k: int) -> None:
        super().__init__()
        self.k = k
        self.W_enc, self.b_enc = nn.Parameter(W_dec.T.contiguous()), nn.Parameter(torch.zeros(len(W_dec)))
        self.W_dec, self.b_dec = nn.Parameter(W_dec.clone()), nn.Parameter(b_dec.clone())

    def forward(self, x: Tensor) -> Tensor:
        preacts = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        values, features = preacts.topk(self.k, dim=-1, sorted=False)
        code = torch.zeros_like(preacts).scatter_(-1, features, values)
        return code @ self.W_dec + self.b_dec


def dense(x: Tensor, W_dec: Tensor, k: int, lr: float, dtype: str) -> Step:
    """As SAELens and dictionary_learning train: Adam with default flags, the decoder's rows kept on the unit sphere."""
    sae = Dense(W_dec, x.mean(0), k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = (sae(x) - x).square().sum(-1).mean()
        loss.backward()
        with torch.no_grad():
            rows, gradient = sae.W_dec, sae.W_dec.grad
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows
            optimizer.step()
            rows /= rows.norm(dim=1, keepdim=True)

    return step


def sparsify(x: Tensor, W_dec: Tensor, k: int, lr: float, dtype: str) -> Step:
    """EleutherAI's SparseCoder with torch's Adam, in the order of its trainer."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(W_dec.shape[1], SparseCoderConfig(num_latents=len(W_dec), k=k))
    with torch.no_grad():
        sae.encoder.weight.copy_(W_dec)
        sae.W_dec.copy_(W_dec)
        sae.b_dec.copy_(x.mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            fvu = sae(x).fvu
        fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()

    return step


def ours(arch: str) -> Callable[[Tensor, Tensor, int, float, str], Step]:
    """`Trainer.step`, which also counts firings and computes FVU and L0."""

    def build(x: Tensor, W_dec: Tensor, k: int, lr: float, dtype: str) -> Step:
        from sae_core.config import Site, TrainConfig
        from sae_core.trainer import Trainer

        d_sae, d_in = W_dec.shape
        cfg = TrainConfig(model="-", corpus="-", site=Site(layer=0), arch=arch, expansion=d_sae // d_in, k=k, batch=len(x))
        trainer, mean = Trainer(cfg, d_in, x.device, getattr(torch, dtype)), x.mean(0)
        for name, start in {"W_dec": W_dec, "W_enc_t": W_dec, "b_dec": mean}.items():
            trainer.parameters[name].copy_(start)

        def step(x: Tensor) -> None:
            float(trainer.step(x, mean, lr, k, dead_tokens=2**62).fvu)

        return step

    return build


SIDES = {"dense": dense, "sparsify": sparsify, "topk": ours("topk"), "batchtopk": ours("batchtopk")}


def main() -> None:
    """Serve steps until stdin ends."""
    given = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what peers print as they start is no answer
    torch.set_num_threads(given["threads"])
    inputs = torch.load(given["inputs"])
    batches = inputs["x"]
    step = SIDES[given["side"]](batches[0], inputs["W_dec"], given["k"], given["lr"], given["dtype"])
    answers.write("ready\n")
    for number, _ in enumerate(sys.stdin):
        begun = time.perf_counter()
        step(batches[number % len(batches)])
        answers.write(f"{time.perf_counter() - begun}\n")


if __name__ == "__main__":
    main()
