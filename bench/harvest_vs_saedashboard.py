"""Features per minute into the database, with DFA, against SAEDashboard 0.8.0 with DFA on; peak memory, and who says what.

Same model (SmolLM2-135M-Instruct, the same fp32 weights), same SAE (the demo's, layer 17; its five tensors mean the same in
SAELens' file), same rows of tokens, each side in a fresh process. Ours harvests all features of the SAE and writes them into
SQLite, published: 20 strongest and 25 from bands each, as SAEDashboard keeps 20 and 25. Theirs makes `theirs` features, as
its NeuronpediaRunner lays them out, 128 at a time, with its cache of the model's activations, and hands back objects in
memory; the JSON that it makes of them is untimed. Loading the model is outside both. Two faults of its release are put
right so that its DFA runs at all (`_saedashboard.py`).

`speedup` compares features per minute. Since their model pass serves all batches of 128, `speedup_all_features` grants them
that pass once for as many features as ours has, and the rest of their time in proportion.

Agreement, on their own output. Activations: every sequence they keep, at every position that ours does not exclude, as a
share of the feature's largest; they round to 4 decimals. A pre-activation within 1e-3 of its threshold may fire on one side
only; such positions are counted apart (`activation_flips`). DFA: theirs at the destination they chose, heads summed, against
ours there, as a share of ours' absolute sum, wherever the feature fires there and the position is not excluded.

What differs by design, reported to stderr: theirs takes the argmax over all positions, the row's start among them, so some
of its destinations are attention sinks that ours excludes; where a feature is silent in a row the argmax is position 0, and
DFA is made for it all the same; it drops source 0 and all biases when it writes JSON, so its sums are no pre-activation.

`rows=1024`, `features=4608` (ours, the SAE's first ones) and `theirs=256` take other sizes. About ten minutes on two cores.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from bench import _smollm2
from bench._peers import peer_python
from bench._processes import measured
from sae_core import attribution
from sae_core.config import HarvestConfig
from sae_core.lens import Lens
from sae_core.saes.base import SAE, row_starts, save_sae

Figure = dict[str, object]

# What it asks for itself pulls in other builds of torch, by way of decode-clt, which it needs for cross-layer transcoders only.
PEER = (
    "torch==2.13.0",
    "sae-lens==6.54.12",
    "transformer-lens==2.17.0",
    "transformers==4.56.2",
    "datasets==3.6.0",
    "numpy==1.26.4",
    "safetensors==0.4.5",
    "pyarrow==21.0.0",
    "dataclasses-json<0.7",
    "eindex-callum<0.2",
    "einops",
    "jaxtyping<0.3",
    "matplotlib<4",
    "rich<14",
    "typer<0.13",
)
ALONE = ("sae-dashboard==0.8.0",)
CHECKED = 64
"""Rows whose DFA is compared."""
NEAR = 1e-3


def run(rows: int = 1024, features: int = 4608, theirs: int = 256) -> dict[str, Figure]:
    """Harvest with both, then compare."""
    python = peer_python("sae-dashboard", PEER, ALONE)
    lens = _smollm2.lens()
    sae, text = first_features(_smollm2.demo_sae(lens), features), _smollm2.demo_rows(lens)
    tokens, theirs = text.train[:rows], min(theirs, features)
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
        place = Path(folder)
        save_sae(sae, place / "ours")
        save_for_saelens(sae, place / "theirs")
        np.save(place / "rows.npy", tokens)
        config = HarvestConfig(tokens=tokens.size, top_k=20, bands=5, per_band=5)
        ours = measured(
            [sys.executable, "-m", "bench._harvested"],
            sae=str(place / "ours"),
            config=config.model_dump(mode="json"),
            folder=str(place),
            database=str(place / "headscope.db"),
        )
        _say("ours", ours)
        peer = measured(
            [python, "-P", Path(__file__).with_name("_saedashboard.py")],
            model=str(_smollm2.folder()),
            sae=str(place / "theirs"),
            rows=str(place / "rows.npy"),
            features=theirs,
            layer=sae.cfg.site.layer,
            checked=min(CHECKED, rows),
            ignore=[text.row_start],
            found=str(place / "found.npz"),
        )
        _say("SAEDashboard", peer)
        with np.load(place / "found.npz") as file:
            found = {name: file[name] for name in file.files}
        agreed = _agreement(lens, sae, tokens, found)
    rate = {name: 60 * done["features"] / done["seconds"] for name, done in (("ours", ours), ("theirs", peer))}
    batches = peer["seconds"] - peer["model_seconds"]
    at_best = 60 * features / (peer["model_seconds"] + batches * features / theirs)
    return {
        "speedup": _figure(rate["ours"] / rate["theirs"], "x", ">= 30"),
        "memory_ratio": _figure(ours["peak"] / peer["peak"], "x", "<= 1"),
        "speedup_all_features": _figure(rate["ours"] / at_best, "x"),
        "rate_ours": _figure(rate["ours"], "features/min"),
        "rate_theirs": _figure(rate["theirs"], "features/min"),
        "seconds_ours": _figure(ours["seconds"], "s"),
        "seconds_theirs": _figure(peer["seconds"], "s"),
        "peak_ours": _figure(ours["peak"] / 1e6, "MB"),
        "peak_theirs": _figure(peer["peak"] / 1e6, "MB"),
        **agreed,
    }


def _figure(value: float, unit: str, target: str | None = None) -> Figure:
    return {"value": float(f"{value:.4g}"), "unit": unit, "target": target}


def _say(who: str, done: dict[str, Any]) -> None:
    parts = done.get("phases") or {"model": done["model_seconds"]}
    print(
        f"  {who}: {done['features']} features in {done['seconds']:.1f} s "
        f"({', '.join(f'{name} {seconds:.1f}' for name, seconds in parts.items())}), "
        f"processors {done['cpu']:.1f} s, peak {done['peak'] / 1e6:,.0f} MB ({done['before'] / 1e6:,.0f} MB before)",
        file=sys.stderr,
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------ one SAE for both


def first_features(sae: SAE, n: int) -> SAE:
    """The SAE of the first n features."""
    if n >= sae.cfg.d_sae:
        return sae
    tensors = {
        "W_enc": sae.W_enc[:, :n],
        "b_enc": sae.b_enc[:n],
        "W_dec": sae.W_dec[:n],
        "b_dec": sae.b_dec,
        "threshold": sae.threshold[:n],
    }
    return type(sae)(sae.cfg.model_copy(update={"d_sae": n}), tensors)


def save_for_saelens(sae: SAE, folder: Path) -> None:
    """`sae` as SAELens 6 writes a JumpReLU SAE: f = preact where preact = (z - b_dec) W_enc + b_enc exceeds its threshold."""
    folder.mkdir(parents=True)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    save_file({name: getattr(sae, name).contiguous() for name in names}, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": "jumprelu",
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{sae.cfg.site.layer}.attn.hook_z", "hook_head_index": None, "prepend_bos": False},
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))


# ------------------------------------------------------------------------------------------------------------ agreement


@dataclasses.dataclass
class Row:
    """What we make of one row, from an fp32 pass."""

    acts: NDArray[np.float32]
    """[pos, F]"""
    margin: NDArray[np.float32]
    """[pos, F]: pre-activation less threshold."""
    excluded: NDArray[np.bool_]
    v: torch.Tensor
    pattern: torch.Tensor


def _rows(lens: Lens, sae: SAE, tokens: NDArray[Any], which: NDArray[Any], n: int) -> dict[int, Row]:
    """Rows `which` as we see them, their first n features."""
    found = {}
    for part in np.array_split(which, -(-len(which) // 16)):
        read = lens.read_attention(torch.from_numpy(tokens[part].astype(np.int64)), sae.cfg.site.layer)
        excluded = sae.excluded(read.z, row_starts(tokens[part], lens.row_start)).numpy()
        preacts = sae.preacts(read.z)[..., :n]
        acts = sae.activate(preacts, torch.arange(n))
        margin = preacts - sae.threshold[:n]
        for i, row in enumerate(part.tolist()):
            found[row] = Row(acts[i].numpy(), margin[i].numpy(), excluded[i], read.v[i], read.pattern[i])
    return found


def _agreement(lens: Lens, sae: SAE, tokens: NDArray[Any], found: dict[str, NDArray[Any]]) -> dict[str, Figure]:
    """Theirs against ours on the checked rows: sequences that lie in them, and their DFA."""
    n, checked = found["dest"].shape
    ours = _rows(lens, sae, tokens, np.arange(checked), n)
    largest = np.max([row.acts[~row.excluded].max(0, initial=0) for row in ours.values()], axis=0)
    gaps, flips, compared = [0.0], 0, 0
    for feature, row, acts in zip(found["feature"], found["row"], found["acts"], strict=True):
        if row >= checked or not largest[feature]:
            continue
        mine = ours[int(row)]
        at = slice(len(mine.acts) - len(acts), None)  # they leave position 0 out
        shown, values = ~mine.excluded[at], mine.acts[at, feature]
        both = shown & (np.abs(mine.margin[at, feature]) > NEAR)
        flips += int((((acts > 0) != (values > 0)) & shown).sum())
        compared += int(both.sum())
        gaps.append(float(np.abs(acts - values)[both].max(initial=0)) / float(largest[feature]))
    dfa_gaps, silent, excluded = [0.0], 0, 0
    for row in range(checked):
        mine = ours[row]
        dest = found["dest"][:, row]
        fires = mine.acts[dest, np.arange(n)] > 0
        silent += int((~fires).sum())
        excluded += int((fires & mine.excluded[dest]).sum())
        which = np.flatnonzero(fires & ~mine.excluded[dest])
        dfa_gaps += dfa_gap(sae, which, dest[which], mine, found["dfa"][which, row]).tolist()
    print(
        f"  Of {n * checked:,} DFA that SAEDashboard made on the rows checked, {silent:,} are of features silent there, "
        f"{excluded:,} have a destination that ours excludes, {len(dfa_gaps) - 1:,} are compared.",
        file=sys.stderr,
    )
    return {
        "activation_gap": _figure(max(gaps), "of the feature's largest", "<= 1e-3"),
        "activation_flips": _figure(flips, f"of {compared} positions"),
        "dfa_gap": _figure(max(dfa_gaps), "of the absolute DFA", "<= 1e-3"),
        "dfa_compared": _figure(len(dfa_gaps) - 1, "examples"),
        "dfa_of_silent_share": _figure(silent / (n * checked), ""),
        "dfa_at_excluded_share": _figure(excluded / max(n * checked - silent, 1), "of the others"),
    }


def dfa_gap(sae: SAE, features: NDArray[Any], dest: NDArray[Any], mine: Row, theirs: NDArray[Any]) -> NDArray[Any]:
    """Largest difference to `theirs` [n, src] of the head-summed DFA of features [n] at dest [n], over its absolute sum."""
    if not len(features):
        return np.zeros(0)
    w, _ = sae.affine(torch.from_numpy(features))
    pattern = mine.pattern[:, torch.from_numpy(dest)].transpose(0, 1)
    dfa = attribution.dfa(mine.v, pattern, w.reshape(len(w), sae.cfg.n_heads, sae.cfg.d_head))
    summed = dfa.sum(1).numpy()
    return np.asarray(np.abs(summed - theirs).max(1) / np.abs(dfa.numpy()).sum((1, 2)))
