"""One training step of a TopK SAE, optimizer included, against the usual dense step and against EleutherAI's sparsify.

At B = 4,096, d = 768, F = 24,576, k = 32 on the CPU, all cores. The sides, each in a process of its own that lives through
all rounds, take one step in turn; medians are compared, so that what else the machine does falls on all of them:

- ours: `Trainer.step` (fused Adam, decoder's gradient projected, rows normalised, dead counters, FVU), encoder product in
  bf16 and in fp32; per-row TopK, as the peers do, and BatchTopK for its figure of tokens per second;
- dense: encode, topk, scatter, dense decode, autograd, torch's Adam with default flags, projection, normalisation, as
  SAELens and dictionary_learning do it; fp32, and bf16 autocast for `speedup_vs_dense_autocast`;
- sparsify: eai-sparsify 1.3.3's SparseCoder with torch's Adam in its own environment; fp32, against ours in fp32
  (`speedup_vs_sparsify`), and under bf16 autocast on the CPU, against ours in bf16 (`speedup_vs_sparsify_bf16`).

Inputs are made: 8,192 hidden directions of Zipf popularity, 32 of them in each token, and noise. All sides start from the
same dictionary, each row one of these directions, disturbed: so features differ in how often they fire, and tokens in how
many pass the batch's cut, as in a run that has been going on for a while. No feature is dead, so AuxK costs nothing.

`gradient_error` is the largest difference between our gradients and those of autograd through a dense step in fp32, over
the largest entry of the same parameter's gradient: per-row TopK, BatchTopK, and the AuxK path of both.

About 4 minutes on two cores, the first time some more for sparsify's environment; `rounds=3` takes less.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from bench._peers import peer_python
from sae_core.config import Site, TrainConfig
from sae_core.saes import RECIPES
from sae_core.saes.recipe import Batch

Figure = dict[str, object]

PEER = ("torch==2.13.0", "eai-sparsify==1.3.3")
BATCH, D_IN, D_SAE, K = 4096, 768, 24_576, 32
HIDDEN, NOISE, BATCHES, LR = 8192, 0.3, 3, 1e-4


def run(rounds: int = 7) -> dict[str, Figure]:
    """Take `rounds` steps with every side in turn, after one to warm up."""
    peer = peer_python("sparsify", PEER)
    here = Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as place:
        inputs = Path(place) / "inputs.pt"
        torch.save(_inputs(), inputs)
        wanted = {
            ("ours", "float32"): (here, "topk"),
            ("batchtopk", "float32"): (here, "batchtopk"),
            ("dense", "float32"): (here, "dense"),
            ("sparsify", "float32"): (peer, "sparsify"),
        }
        wanted |= {(name, "bfloat16"): how for (name, _), how in wanted.items()}
        with ExitStack() as alive:
            sides = {
                (name, dtype): alive.enter_context(Side(python, side, dtype, inputs))
                for (name, dtype), (python, side) in wanted.items()
            }
            for number in range(rounds + 1):
                for side in sides.values():
                    side.step(keep=number > 0)
    seconds = {name: statistics.median(side.seconds) for name, side in sides.items()}
    for (name, dtype), median in seconds.items():
        print(f"  {name}, {dtype}: {median:.3f} s/step", file=sys.stderr, flush=True)

    def faster(side: str, dtype: str, ours: str) -> float:
        return round(seconds[side, dtype] / seconds["ours", ours], 2)

    def rate(side: str, dtype: str) -> Figure:
        return {"value": round(BATCH / seconds[side, dtype]), "unit": "tokens/s", "target": None}

    return {
        "speedup_vs_dense_bf16": {"value": faster("dense", "float32", "bfloat16"), "unit": "x", "target": ">= 6"},
        "speedup_vs_dense_fp32": {"value": faster("dense", "float32", "float32"), "unit": "x", "target": ">= 3.5"},
        "speedup_vs_sparsify": {"value": faster("sparsify", "float32", "float32"), "unit": "x", "target": "> 1"},
        "speedup_vs_sparsify_bf16": {"value": faster("sparsify", "bfloat16", "bfloat16"), "unit": "x", "target": "> 1"},
        "speedup_vs_dense_autocast": {"value": faster("dense", "bfloat16", "bfloat16"), "unit": "x", "target": None},
        "gradient_error": {"value": float(f"{gradient_error():.2g}"), "unit": "of the largest entry", "target": "<= 1e-5"},
        "tokens_per_second": rate("ours", "bfloat16"),
        "tokens_per_second_fp32": rate("ours", "float32"),
        "tokens_per_second_batchtopk": rate("batchtopk", "bfloat16"),
        "tokens_per_second_batchtopk_fp32": rate("batchtopk", "float32"),
        "tokens_per_second_dense": rate("dense", "float32"),
        "tokens_per_second_sparsify": rate("sparsify", "float32"),
    }


class Side:
    """A process that takes steps when asked to."""

    def __init__(self, python: Path, side: str, dtype: str, inputs: Path) -> None:
        given = {"side": side, "dtype": dtype, "inputs": str(inputs), "k": K, "lr": LR, "threads": torch.get_num_threads()}
        command = [python, "-P", Path(__file__).with_name("_step.py"), json.dumps(given)]
        # not what importing sae_core sets for this process: peers run as they are
        environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True, bufsize=1, env=environment)
        self.seconds: list[float] = []
        self._answer()

    def step(self, *, keep: bool) -> None:
        """One step, to the end."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        seconds = float(self._answer())
        if keep:
            self.seconds.append(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(60)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"The process of a side ended with status {self._end()}; what it said is above.")
        return line


def _inputs() -> dict[str, Tensor]:
    """x [batches, B, d], of mean norm sqrt(d), and the dictionary W_dec [F, d]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.nn.functional.normalize(torch.randn(HIDDEN, D_IN, generator=generator))
    popularity = torch.arange(1, HIDDEN + 1) ** -0.7
    n = BATCHES * BATCH
    which = torch.multinomial(popularity.expand(n, -1), K, generator=generator)
    strength = torch.rand(n, K, generator=generator) + 0.5
    x = torch.nn.functional.embedding_bag(which, hidden, mode="sum", per_sample_weights=strength)
    x += NOISE * torch.randn(n, D_IN, generator=generator) * (x.norm() / x.numel() ** 0.5)
    rows = torch.arange(D_SAE) % HIDDEN
    W_dec = hidden[rows] + NOISE * torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator))
    x = (x * (D_IN**0.5 / x.norm(dim=1).mean())).view(BATCHES, BATCH, D_IN)
    return {"x": x, "W_dec": torch.nn.functional.normalize(W_dec)}


# ---- are they the gradients? ----


def gradient_error(n: int = 512, d_in: int = 128, expansion: int = 16, k: int = 16) -> float:
    """See the module's docstring."""
    return max(_errors(arch, aux, n, d_in, expansion, k) for arch in ("topk", "batchtopk") for aux in (False, True))


def _errors(arch: str, aux: bool, n: int, d_in: int, expansion: int, k: int) -> float:
    cfg = TrainConfig(model="-", corpus="-", site=Site(layer=0), arch=arch, expansion=expansion, k=k, aux_k=8, aux_coef=0.5)
    recipe = RECIPES[arch](cfg, d_in, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d_in, generator=generator)
    recipe.b_enc.copy_(0.1 * torch.randn(len(recipe.b_enc), generator=generator))
    recipe.b_dec.copy_(0.1 * torch.randn(d_in, generator=generator))
    mean, dead = x.mean(0), torch.arange(0, len(recipe.b_enc), 7) if aux else torch.zeros(0, dtype=torch.int64)
    got = recipe.gradients(Batch(x, mean, k, 1.0, dead)).gradients

    leaves = {name: parameter.clone().requires_grad_() for name, parameter in recipe.parameters.items()}
    preacts = (x - leaves["b_dec"]) @ leaves["W_enc_t"].T + leaves["b_enc"]
    every = preacts.detach()
    cut = every.topk(k, dim=1).values[:, -1:] if arch == "topk" else every.flatten().topk(n * k).values[-1]
    residual = (preacts * (every >= cut) * (every > 0)) @ leaves["W_dec"] + leaves["b_dec"] - x
    loss = residual.square().sum() / (x - mean).square().sum()
    if aux:
        values, which = preacts[:, dead].topk(8, dim=1)
        code = torch.zeros_like(preacts[:, dead]).scatter(1, which, values.relu())
        error = -residual.detach()
        loss = loss + 0.5 * (code @ leaves["W_dec"][dead] - error).square().sum() / error.square().sum()
    loss.backward()
    return max(_relative(got[name], leaf.grad) for name, leaf in leaves.items())


def _relative(got: Tensor, wanted: Tensor | None) -> float:
    assert wanted is not None
    return float((got - wanted).abs().max() / wanted.abs().max())
