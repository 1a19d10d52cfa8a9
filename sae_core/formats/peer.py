"""What every peer's SAE comes down to, and how it becomes one of ours.

All of them compute, on what their hook gave them,

    x      = s z                                    s: a number, or one per token (`input_norm`)
    preact = (x - b_dec) W_enc + b_enc              some leave b_dec out here: folded into b_enc
    f      = preact where preact > threshold        topk: and among the token's k largest
    z_hat  = (f W_dec + b_dec) / s

An SAE of ours is the same with s = 1 on raw z, all heads side by side, of the model as its weights are stored. So:

    a constant s    W_enc s, W_dec / s, b_dec / s; f keeps its size
    one head        zeros in W_enc and W_dec everywhere else, so what it says of the others is 0
    folded values   a model whose value biases were moved past W_O gives z less a constant a, the same at every position,
                    since a row of the pattern sums to 1: b_dec + a, and both the map and the reconstruction are right

Each of these is exact in real arithmetic; they are worked out in fp64 and stored in fp32.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae_core.config import Arch, Imported, SAEConfig, Site
from sae_core.errors import LayerOutOfRange, SAEMismatch, UnreadableSAE, UnsupportedSAE
from sae_core.saes import ARCHITECTURES, SAE

if TYPE_CHECKING:
    from sae_core.lens import Lens

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
HOOK_Z = re.compile(r"^blocks\.(\d+)\.attn\.hook_z$")


class PeerSAE(NamedTuple):
    """An SAE as a peer's files say it."""

    format: str
    path: Path
    """The file of its weights, for messages."""
    arch: Arch
    tensors: dict[str, Tensor]
    """`W_enc` [d, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, d], `b_dec` [d], `threshold` [d_sae], on x; d is d_in or d_head."""
    k: int = 0
    """0 where the files do not say."""
    subtracts: bool = True
    """Whether b_dec is subtracted from x before the encoder."""
    scale: float = 1.0
    input_norm: Literal["none", "token"] = "none"
    layer: int | None = None
    """None where the files do not say."""
    head: int | None = None
    """The only head that it reads; None for all of them."""
    folded: bool = False
    """Whether it was trained on weights with the value biases folded away."""
    max_norm: float | None = None
    """Positions with a larger |z| were left out of training."""
    context: int | None = None
    model: str | None = None
    """The model's name, as the files say it."""
    notes: tuple[str, ...] = ()


def layer_of(hook: str, path: Path) -> int:
    """The layer of a TransformerLens hook; UnsupportedSAE where it is not on z."""
    found = HOOK_Z.match(hook)
    if found is None:
        raise UnsupportedSAE(
            f"The SAE in {path} reads {hook or 'no hook that it names'}; Headscope takes SAEs on blocks.<layer>.attn.hook_z, the "
            "heads' outputs before W_O.",
            field="location",
        )
    return int(found[1])


def check_shapes(tensors: dict[str, Tensor], path: Path, d: int | None = None, d_sae: int | None = None) -> None:
    """Raise UnreadableSAE unless the five tensors fit one another, and what a config says."""
    if tensors["W_enc"].ndim != 2:
        raise UnreadableSAE(f"W_enc in {path} has shape {tuple(tensors['W_enc'].shape)}, which is no matrix.")
    rows, columns = tensors["W_enc"].shape
    d, d_sae = rows if d is None else d, columns if d_sae is None else d_sae
    wanted = {"W_enc": (d, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d), "b_dec": (d,), "threshold": (d_sae,)}
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UnreadableSAE(
                f"{name} in {path} has shape {tuple(tensors[name].shape)}, and {shape} is what the rest of it says; "
                "see that config and weights belong together."
            )


def convert(peer: PeerSAE, lens: "Lens", source: str, *, layer: int | None = None, folded: bool | None = None) -> SAE:
    """Our SAE that computes what the peer's does, on z of `lens`. `layer` and `folded` are what a person says: the first must
    agree with the files, the second wins.

    Raises SAEMismatch where it does not fit the model, UnsupportedSAE where our form cannot carry it exactly.
    """
    info = lens.info
    tensors = {name: peer.tensors[name].double() for name in NAMES}
    width, d_sae = tensors["W_enc"].shape
    at = _layer(peer, layer)
    if at >= info.n_layers:
        raise LayerOutOfRange(
            f"The SAE in {peer.path} reads layer {at}, and {info.name} has layers 0 to {info.n_layers - 1}; name its own model.",
            field="model",
        )
    _check_width(peer, width, lens)
    if not peer.subtracts:
        tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
    tensors["W_enc"] *= peer.scale
    tensors["W_dec"] = tensors["W_dec"] / peer.scale
    tensors["b_dec"] = tensors["b_dec"] / peer.scale
    if peer.head is not None:
        tensors = _widened(tensors, peer.head, info.n_heads)
    shift = _value_bias(lens, at) if (peer.folded if folded is None else folded) else None
    if shift is not None:
        tensors["b_dec"] = tensors["b_dec"] + _of_head(shift, peer.head, info.n_heads)
    if peer.input_norm == "token":
        _check_norm(peer, shift)
    notes = [*peer.notes]
    if shift is not None:
        notes.append("Trained on weights with the value biases folded away; they were put into b_dec, so it reads z as it is.")
    if peer.head is not None:
        notes.append(f"Reads head {peer.head} alone: what it reconstructs of the others is 0.")
    cfg = SAEConfig(
        arch=peer.arch, d_in=info.d_in, d_sae=d_sae, k=peer.k, n_heads=info.n_heads, d_head=info.d_head, site=Site(layer=at),
        model=info.name, model_fingerprint=info.fingerprint, processing=info.processing, scale=peer.scale,
        max_norm=peer.max_norm,
        input_norm=peer.input_norm, context=peer.context or 128,
        imported=Imported(format=peer.format, source=source, model=peer.model, notes=tuple(notes)),
    )  # fmt: skip
    return ARCHITECTURES[peer.arch](cfg, {name: tensor.float() for name, tensor in tensors.items()})


def _layer(peer: PeerSAE, said: int | None) -> int:
    if said is not None and peer.layer is not None and said != peer.layer:
        raise SAEMismatch(
            f"{peer.path} is an SAE of layer {peer.layer}, and layer {said} was asked for; leave it out.", field="layer"
        )
    found = said if peer.layer is None else peer.layer
    if found is None:
        raise UnsupportedSAE(
            f"{peer.path} does not say what it reads; if that is z of one layer (blocks.<layer>.attn.hook_z), name the layer.",
            field="layer",
        )
    return found


def _check_width(peer: PeerSAE, width: int, lens: "Lens") -> None:
    info = lens.info
    if peer.head is not None and not 0 <= peer.head < info.n_heads:
        raise SAEMismatch(
            f"{peer.path} reads head {peer.head}, and {info.name} has heads 0 to {info.n_heads - 1}.", field="model"
        )
    expected = info.d_in if peer.head is None else info.d_head
    if width != expected:
        what = f"{info.n_heads} heads of {info.d_head}, together {expected}" if peer.head is None else f"heads of {expected}"
        raise SAEMismatch(
            f"The SAE in {peer.path} reads {width} numbers a token, and z of {info.name} has {what}; "
            "name the model that it was made for.",
            field="model",
        )


def _check_norm(peer: PeerSAE, shift: Tensor | None) -> None:
    """A token's norm is taken of the whole z as it is; of anything else our form knows nothing."""
    why = "of one head" if peer.head is not None else "of z less the value biases" if shift is not None and shift.any() else None
    if why:
        raise UnsupportedSAE(
            f"The SAE in {peer.path} norms each token by the norm {why}, which Headscope's form cannot carry; it was left out.",
            field="location",
        )


def _value_bias(lens: "Lens", layer: int) -> Tensor:
    """[n_heads, d_head]: what every z holds whatever the tokens are, through the norm's bias and the values' own."""
    values, info = lens.value_map(layer), lens.info
    constant = (values.norm_bias + values.v_bias).double().cpu()
    return constant.repeat_interleave(info.n_heads // info.n_kv_heads, dim=0)


def _of_head(shift: Tensor, head: int | None, n_heads: int) -> Tensor:
    if head is None:
        return shift.flatten()
    kept = torch.zeros_like(shift)
    kept[head] = shift[head]
    return kept.view(n_heads, -1).flatten()


def _widened(tensors: dict[str, Tensor], head: int, n_heads: int) -> dict[str, Tensor]:
    """An SAE of one head as one of all of them."""
    d_head, d_sae = tensors["W_enc"].shape
    part = slice(head * d_head, (head + 1) * d_head)
    W_enc = torch.zeros(n_heads * d_head, d_sae, dtype=torch.float64)
    W_dec, b_dec = torch.zeros_like(W_enc.T), torch.zeros(n_heads * d_head, dtype=torch.float64)
    W_enc[part], W_dec[:, part], b_dec[part] = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
    return tensors | {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}


def by_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same SAE with decoder rows of norm 1: pre-activations, and so activations, times the norms."""
    norms = tensors["W_dec"].norm(dim=1)
    found = {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms, "W_dec": tensors["W_dec"] / norms[:, None]}
    return tensors | found


def gated(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A gated SAE (`b_gate`, `b_mag`, `r_mag`) as the thresholded one that it is equal to; see `saes/gated.py`."""
    for name in ("r_mag", "b_mag", "b_gate"):
        if tensors[name].shape != tensors["W_enc"].shape[1:]:
            raise UnreadableSAE(f"{name} in {path} has shape {tuple(tensors[name].shape)}, which W_enc's does not fit.")
    gain = tensors["r_mag"].double().exp()
    b_mag = tensors["b_mag"].double()
    return {
        "W_enc": tensors["W_enc"].double() * gain,
        "b_enc": b_mag,
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
        "threshold": (b_mag - gain * tensors["b_gate"].double()).clamp_min(0.0),
    }


def thresholded(tensors: dict[str, Tensor], threshold: Tensor | None = None) -> dict[str, Tensor]:
    """With thresholds: those given, [d_sae] or one for all, below 0 as 0, since what is kept is positive anyway; else zeros."""
    found = torch.zeros_like(tensors["b_enc"]) if threshold is None else threshold.float().clamp_min(0.0)
    return tensors | {"threshold": found.expand(tensors["b_enc"].shape).contiguous() if found.numel() == 1 else found}


def said_k(config: dict[str, Any], *names: str) -> int:
    """The first of these fields that is a number of active features; 0 where none is."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return max(1, round(value))
    return 0
