"""Transcoders: sparse dictionaries that make an MLP's output of its input (Dunefsky et al. 2024), for circuits to go through.

    t   = preact where preact > threshold, and among the token's k largest where there is a k       preact = x W_enc + b_enc
    out = t W_dec + b_dec + x skip

x is one of three things, which `reads` says, and out one of two, which `writes` says:

    normed      what enters the MLP: the norm before it with its gain and bias
    ungained    the same without gain and bias, as on weights that these are folded into: Gemma Scope's
    stream      the residual stream before that norm

    mlp         the MLP's output as it is, before a norm after it, where a model has one
    stream      what is added to the stream, after such a norm

On disk: one safetensors file, with what is no tensor in its header.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from shutil import copymode
from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_core.config import TranscoderConfig
from sae_core.errors import LayerOutOfRange, SAEMismatch, UnreadableSAE
from sae_core.norms import Norm, plain
from sae_core.saes.base import SparseActs
from sae_core.sparse import part_rows, true_at

if TYPE_CHECKING:
    from sae_core.lens import LensInfo, MLPRead

HEADER = "headscope.transcoder"


class Sight(NamedTuple):
    """x = norm.map(stream) / scale + norm.bias, as it was seen."""

    x: Tensor
    """[pos, d_model]"""
    norm: Norm
    scale: Tensor
    """[pos]"""


@dataclass(frozen=True, eq=False)
class Transcoder:
    """A transcoder of one MLP, fp32; see the module's equations."""

    cfg: TranscoderConfig
    W_enc: Tensor
    """[d_model, n_features]"""
    b_enc: Tensor
    """[n_features]"""
    W_dec: Tensor
    """[n_features, d_model]"""
    b_dec: Tensor
    """[d_model]"""
    threshold: Tensor
    """[n_features], at least 0"""
    skip: Tensor | None = None
    """[d_model, d_model]"""

    def __post_init__(self) -> None:
        """Raise UnreadableSAE where the tensors do not fit one another."""
        if self.W_enc.ndim != 2:
            raise UnreadableSAE(f"W_enc has the shape {tuple(self.W_enc.shape)}, which is no matrix.")
        d, n = self.W_enc.shape
        wanted = {"b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,), "skip": (d, d)}
        for name, tensor in self.tensors.items():
            if name in wanted and tuple(tensor.shape) != wanted[name]:
                raise UnreadableSAE(
                    f"{name} has the shape {tuple(tensor.shape)}, and {wanted[name]} is what goes with an encoder of {(d, n)}."
                )
        if self.cfg.k is not None and self.cfg.k > n:
            raise UnreadableSAE(f"It should keep {self.cfg.k} features of each token, and has {n}.")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that there are, by name."""
        return {one.name: tensor for one in fields(self) if isinstance(tensor := getattr(self, one.name), Tensor)}

    @property
    def n_features(self) -> int:
        """How many features it has."""
        return len(self.b_enc)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> "Transcoder":
        """The same on a device."""
        return Transcoder(self.cfg, **{name: tensor.to(device) for name, tensor in self.tensors.items()})

    def sight(self, read: "MLPRead", norm: Norm) -> Sight:
        """What it reads of its MLP, of whose input `norm` makes what enters it."""
        if self.cfg.reads == "normed":
            return Sight(read.given, norm, read.scale)
        seen = plain(len(self.b_dec), read.stream.device, centres=norm.centres and self.cfg.reads == "ungained")
        scale = read.scale if self.cfg.reads == "ungained" else torch.ones_like(read.scale)
        return Sight(seen.map(read.stream) / scale[:, None], seen, scale)

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """What fires on x [n, d_model]. Pre-activations are made some tokens at a time."""
        found = []
        rows = part_rows(self.n_features, torch.float32, x.device)
        for begun in range(0, len(x), rows):
            preacts = torch.addmm(self.b_enc, x[begun : begun + rows], self.W_enc)
            on = preacts > self.threshold
            if self.cfg.k is not None and self.cfg.k < self.n_features:
                # Half-way between the last that is kept and the next, so that rounding moves none across.
                on &= preacts > preacts.topk(self.cfg.k + 1).values[:, self.cfg.k - 1 :].mean(-1, keepdim=True)
            index = true_at(on.view(-1))
            found.append((index // self.n_features + begun, index % self.n_features, preacts.view(-1)[index]))
        token, feature, value = (torch.cat(parts) for parts in zip(*found, strict=True))
        return SparseActs(token, feature, value)


def check_fits(transcoder: Transcoder, model: "LensInfo") -> None:
    """Raise LayerOutOfRange or SAEMismatch where a model has no MLP for it."""
    layer, width = transcoder.cfg.layer, len(transcoder.b_dec)
    if layer >= model.n_layers:
        raise LayerOutOfRange(
            f"The transcoder is one of layer {layer}, and {model.name} has layers 0 to {model.n_layers - 1}; name its own model.",
            field="model",
        )
    if width != model.d_model:
        raise SAEMismatch(
            f"The transcoder reads {width} numbers a token, and the stream of {model.name} has {model.d_model}; name the model "
            "that it was made for. (An SAE on z is imported with `headscope import sae`.)",
            field="model",
        )
    if transcoder.cfg.model_fingerprint not in ("", model.fingerprint):
        raise SAEMismatch(
            f"The transcoder of layer {layer} was given to other weights than {model.name} has now; put these back, or import "
            "one that was trained on the new ones.",
            field="model",
        )


def save_transcoder(transcoder: Transcoder, path: Path) -> str:
    """Write it to a file, aside and renamed; its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, like = path.with_name(f"{path.name}.aside"), path.with_name(f"{path.name}.mode")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in transcoder.tensors.items()}
    save_file(tensors, aside, metadata={HEADER: transcoder.cfg.model_dump_json()})
    like.touch()
    copymode(like, aside)  # safetensors lets nobody else read what it writes
    like.unlink()
    aside.rename(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_ours(path: Path) -> bool:
    """Whether it is a file that `save_transcoder` wrote."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_transcoder(path: Path, device: str | torch.device = "cpu") -> Transcoder:
    """The transcoder that `save_transcoder` wrote; UnreadableSAE where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header: Mapping[str, str] = file.metadata() or {}
            # Cloned: what is mapped takes the process down when somebody cuts the file short.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
        cfg = TranscoderConfig.model_validate_json(header[HEADER])
        return Transcoder(cfg, **tensors).to(device)
    except FileNotFoundError as error:
        raise UnreadableSAE(f"{path} is missing; import the transcoder again.") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValidationError) as error:
        raise UnreadableSAE(f"{path} is no transcoder of Headscope, or damaged; import it again.") from error
