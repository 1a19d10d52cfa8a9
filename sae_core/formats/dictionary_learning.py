"""Marks, Karvonen and Mueller's dictionary_learning: `ae.pt` beside a `config.json` that names the class.

    AutoEncoder             ReLU; loaded there with decoder rows brought to norm 1, activations times the norms
    AutoEncoderNew          ReLU, without b_dec on the encoder's side
    GatedAutoEncoder        see `saes/gated.py`
    JumpReluAutoEncoder     without b_dec on the encoder's side
    AutoEncoderTopK         each token's k largest
    BatchTopKSAE, MatryoshkaBatchTopKSAE    one threshold for all features

Its configs name a layer and a submodule of the model, never z: a person who trained one on z says the layer.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_core.config import Arch
from sae_core.errors import UnreadableSAE, UnsupportedSAE
from sae_core.formats.peer import PeerSAE, by_norm, check_shapes, gated, said_k, thresholded
from sae_core.formats.read import Tensors, read_json, read_pt, taken, whole

NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc"}  # of nn.Linear, so transposed
KINDS: dict[str, tuple[Arch, dict[str, str]]] = {
    "AutoEncoder": ("relu", LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("relu", LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        {
            "encoder.weight": "W_enc",
            "decoder.weight": "W_dec",
            "decoder_bias": "b_dec",
            "mag_bias": "b_mag",
            "gate_bias": "b_gate",
        }
        | {"r_mag": "r_mag"},
    ),
    "JumpReluAutoEncoder": ("jumprelu", {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}),
    "AutoEncoderTopK": ("topk", LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}),
}
"""By class: our architecture, and its tensors' names as ours."""
WITHOUT_B_DEC = ("AutoEncoderNew", "JumpReluAutoEncoder")


def matches(path: Path) -> bool:
    """Whether it is the folder of an `ae.pt`, or that file."""
    return path.name == WEIGHTS if path.is_file() else (path / WEIGHTS).is_file()


def read(path: Path) -> PeerSAE:
    """The SAE in a folder."""
    folder = path.parent if path.is_file() else path
    config_path, file = folder / CONFIG, folder / WEIGHTS
    trainer = read_json(config_path).get("trainer")
    if not isinstance(trainer, dict):
        raise UnreadableSAE(f"{config_path} lacks the part `trainer`, which names the SAE's class; copy the whole folder.")
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnsupportedSAE(f"{config_path} says dict_class {kind}; read are {', '.join(KINDS)}.", field="location")
    tensors = _tensors(kind, read_pt(file), file)
    layer = trainer.get("layer")
    return PeerSAE(
        format=NAME,
        path=file,
        arch=KINDS[kind][0],
        tensors=tensors,
        k=whole(trainer, "k", config_path) if kind == "AutoEncoderTopK" else said_k(trainer, "k", "target_l0"),
        subtracts=kind not in WITHOUT_B_DEC,
        layer=layer if _on_z(trainer) and isinstance(layer, int) else None,
        model=trainer.get("lm_name"),
        notes=_notes(kind, tensors),
    )


def _tensors(kind: str, stored: Tensors, file: Path) -> dict[str, Tensor]:
    names = KINDS[kind][1]
    found = {ours: tensor for (_, ours), tensor in zip(names.items(), taken(stored, names, file).values(), strict=True)}
    if "encoder.weight" in names:
        found |= {name: found[name].T.contiguous() for name in ("W_enc", "W_dec")}
    if kind == "GatedAutoEncoder":
        found = gated(found, file)
    else:
        found = thresholded(found, found.get("threshold") if "threshold" in names else None)
    check_shapes(found, file)
    norms = found["W_dec"].norm(dim=1)
    if kind == "AutoEncoder" and not torch.allclose(norms, torch.ones_like(norms)):
        found = by_norm(found)
    return found


def _on_z(trainer: dict[str, Any]) -> bool:
    return str(trainer.get("submodule_name") or "").endswith("hook_z")


def _notes(kind: str, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and not tensors["threshold"].any():
        return ("Its threshold was never measured, so every positive feature is active.",)
    return ()
