"""SAELens folders, as its versions 3 to 6 write them: `cfg.json` beside `sae_weights.safetensors`.

Read: standard, gated, topk, jumprelu, and batchtopk and its matryoshka (a finished one is saved as jumprelu, a checkpoint as what
it is). What its fields mean at inference:

    apply_b_dec_to_input            whether b_dec is subtracted before the encoder
    normalize_activations           none; constant_norm_rescale: each token to the norm sqrt(d); expected_average_only_in:
                                    times a number: folded in by a finished run, in activation_scaler.json beside a checkpoint
    rescale_acts_by_decoder_norm    pre-activations times the decoder rows' norms before the k are chosen, and back after
    finetuning_scaling_factor       the decoder times a number per feature
    hook_head_index                 one head alone; else all of them, side by side

Versions before 6 have all of it at the top level of the config, some of it under other names.
"""

import json
from pathlib import Path
from shutil import copymode
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_core.config import Arch
from sae_core.errors import UnreadableSAE, UnsupportedSAE
from sae_core.formats.peer import PeerSAE, by_norm, check_shapes, gated, layer_of, said_k, thresholded
from sae_core.formats.read import read_json, read_safetensors, taken, whole
from sae_core.saes import SAE

NAME = "saelens"
CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
VERSION = "6.54.12"
"""Whose layout `write` follows."""
OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
ARCHS: dict[str, Arch] = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "matryoshka",
}
CUTS = ("batchtopk", "matryoshka_batchtopk")  # in training; their cut is one number


def matches(path: Path) -> bool:
    """Whether it is a folder of SAELens."""
    return (path / WEIGHTS).is_file()


def read(path: Path, scale: float | None = None) -> PeerSAE:
    """The SAE in a folder; `scale` is the factor of `expected_average_only_in` where the folder does not have it."""
    config_path, weights_path = path / CONFIG, path / WEIGHTS
    config = flat(read_json(config_path))
    kind = _kind(config, config_path)
    d_in, d_sae = whole(config, "d_in", config_path), whole(config, "d_sae", config_path)
    stored = read_safetensors(weights_path)
    names = ["W_enc", "W_dec", "b_dec", *(("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",))]
    names += ["threshold"] if kind == "jumprelu" else ["topk_threshold"] if kind in CUTS else []
    tensors = taken(stored, names, weights_path)
    rescaled = kind in ("topk", *CUTS) and bool(config.get("rescale_acts_by_decoder_norm"))
    if kind == "gated":
        tensors = gated(tensors, weights_path)
    else:
        if kind in CUTS and tensors["topk_threshold"].numel() != 1:
            raise UnreadableSAE(f"topk_threshold in {weights_path} should be one number.")
        tensors = thresholded(tensors, tensors.get("threshold", tensors.get("topk_threshold")))
    check_shapes(tensors, weights_path, d_in, d_sae)
    tensors = by_norm(tensors) if rescaled else tensors
    _finetuned(tensors, stored, config, weights_path)
    factor, input_norm = _norm(config, path, scale)
    head = config.get("hook_head_index")
    return PeerSAE(
        format=NAME,
        path=weights_path,
        arch=ARCHS[kind],
        tensors=tensors,
        k=whole(config, "k", config_path) if kind == "topk" else said_k(config, "k", "l0"),
        subtracts=bool(config.get("apply_b_dec_to_input", True)),
        scale=factor,
        input_norm="token" if input_norm else "none",
        layer=layer_of(str(config.get("hook_name") or ""), config_path),
        head=None if head is None else whole(config, "hook_head_index", config_path),
        folded=bool((config.get("model_from_pretrained_kwargs") or {}).get("fold_value_biases", False)),
        context=config["context_size"] if isinstance(config.get("context_size"), int) else None,
        model=config.get("model_name"),
        notes=_notes(config),
    )


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of all versions by the names that version 6 gives them, those of its metadata among the others."""
    found = {OLD_NAMES.get(key, key): value for key, value in config.items() if key != "metadata"}
    if isinstance(metadata := config.get("metadata"), dict):
        found = metadata | found
    kwargs = found.get("activation_fn_kwargs")
    if found.get("activation_fn") == "topk" and isinstance(kwargs, dict) and kwargs.get("k") is not None:
        found |= {"architecture": "topk", "k": kwargs["k"]}
    return found


def _kind(config: dict[str, Any], path: Path) -> str:
    kind = config.get("architecture", "standard")
    if not isinstance(kind, str) or kind not in ARCHS:
        raise UnsupportedSAE(
            f"{path} says the architecture {kind}, which is none that Headscope can carry; it reads {', '.join(ARCHS)}.",
            field="location",
        )
    if config.get("activation_fn") not in (None, "relu", "topk"):
        raise UnsupportedSAE(
            f"{path} says the activation function {config['activation_fn']}; Headscope's form knows relu and topk.",
            field="location",
        )
    return kind


def _finetuned(tensors: dict[str, Tensor], stored: dict[str, Tensor], config: dict[str, Any], path: Path) -> None:
    """Put the factors that some SAEs were given after training into the decoder, which is all that they act on."""
    name = next((name for name in ("scaling_factor", "finetuning_scaling_factor") if name in stored), None)
    if name is None:
        return
    factor = taken(stored, (name,), path)[name]
    if not torch.allclose(factor, torch.ones_like(factor)):
        if not config.get("finetuning_scaling_factor") and name == "scaling_factor":
            raise UnreadableSAE(
                f"{path} holds a scaling_factor that is not 1, but its config says finetuning_scaling_factor is off."
            )
        tensors["W_dec"] = tensors["W_dec"] * factor[:, None]


def _norm(config: dict[str, Any], folder: Path, given: float | None) -> tuple[float, bool]:
    """The constant factor, and whether each token is normed."""
    said = config.get("normalize_activations")
    if said is None or isinstance(said, bool):
        said = "expected_average_only_in" if said else "none"
    if said == "none":
        return 1.0, False
    if said == "constant_norm_rescale":
        return 1.0, True
    if said == "expected_average_only_in":
        file = folder / SCALER
        factor = given if given is not None else read_json(file).get("scaling_factor") if file.exists() else None
        if not isinstance(factor, int | float) or not factor > 0:
            raise UnsupportedSAE(
                f"{folder / CONFIG} says normalize_activations = expected_average_only_in, but its factor is not in "
                f"{SCALER}; give it with --scale (its release's norm_scaling_factor).",
                field="scale",
            )
        return float(factor), False
    why = {
        "layer_norm": "the reconstruction adds each token's mean back, which Headscope's form has no place for",
        "covariance_whitening": "the whitening is not folded into the weights; fold it with SAELens' fold_activation_whitening",
    }.get(str(said), "Headscope does not know what that is")
    raise UnsupportedSAE(f"{folder / CONFIG} says normalize_activations = {said}: {why}.", field="location")


def _notes(config: dict[str, Any]) -> tuple[str, ...]:
    dtype = str(config.get("dtype", "float32")).removeprefix("torch.")
    if dtype == "float32":
        return ()
    return (f"Stored as {dtype}; here it computes in float32, where its maker's {dtype} rounds each product.",)


# ---- writing ----


def write(sae: SAE, folder: Path) -> None:
    """Write `sae` as a folder that SAELens 6 loads and that gives the same activations there.

    Thresholded SAEs of all kinds become its jumprelu. Raises UnsupportedSAE for a topk SAE with thresholds of its own.
    """
    cfg = sae.cfg
    kind = {"relu": "standard", "topk": "topk"}.get(cfg.arch, "jumprelu")
    if kind != "jumprelu" and bool((sae.threshold != 0).any()):
        raise UnsupportedSAE(
            f"SAELens' {kind} SAE has no thresholds, and this one has some, so it would not compute the same there.", field="sae"
        )
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if kind == "jumprelu" else [])]
    config: dict[str, Any] = {
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none" if cfg.input_norm == "none" else "constant_norm_rescale",
        "reshape_activations": "hook_z",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": cfg.model,
            "hook_name": cfg.site.hook,
            "hook_head_index": None,
            "model_class_name": "HookedTransformer",
            "context_size": cfg.context,
            "prepend_bos": True,
            "dataset_path": cfg.train.corpus if cfg.train else None,
        },
        "architecture": kind,
    }
    if kind == "topk":
        config |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{WEIGHTS}.aside"
    save_file({name: getattr(sae, name).detach().cpu().contiguous() for name in names}, aside)
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    copymode(folder / CONFIG, aside)  # safetensors lets nobody else read what it writes
    aside.rename(folder / WEIGHTS)
