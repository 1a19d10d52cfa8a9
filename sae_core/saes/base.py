"""What every architecture shares: weights on raw z, the affine map that attribution sees, the folder on disk.

Equations (z [..., d_in] is the concatenated head outputs before W_O; nothing is scaled at inference, the training
scale s is folded in at save):

    preact = (z - b_dec) W_enc + b_enc          [..., d_sae]
    f      = preact where preact > threshold, else 0        (topk: where it is among the token's k largest as well)
    z_hat  = f W_dec + b_dec                    [..., d_in], rows of W_dec have unit norm (imported ones may have others)

Every architecture comes down to these five tensors: they differ in how they are trained and in what their thresholds are.
For one feature, preact_f = w_f . z + c_f with w_f = W_enc[:, f] and c_f = b_enc[f] - w_f . b_dec. That affine map is
all that attribution needs (Kissane et al. 2024, section 3).

Imported SAEs may norm each token first (`input_norm`): what stands for z above is then z[t] s[t] with s[t] = sqrt(d_in) / |z[t]|,
and the reconstruction is divided by s[t]. A number per token, so the map stays affine in z[t] once s[t] is held:
attribution multiplies w_f by the destination's s[t] and is as exact as without.
"""

import hashlib
import json
from pathlib import Path
from shutil import copymode
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae_core.config import SAEConfig
from sae_core.errors import SAEMismatch, UnreadableSAE
from sae_core.sparse import part_rows, true_at

if TYPE_CHECKING:
    from sae_core.lens import LensInfo

WEIGHTS = "sae.safetensors"
CONFIG = "cfg.json"


class SparseActs(NamedTuple):
    """The nonzero activations of some tokens, in token order, features ascending within a token."""

    token: Tensor
    """int64 [nnz], index into the tokens given."""
    feature: Tensor
    """int64 [nnz]."""
    value: Tensor
    """float32 [nnz], > 0."""


class SAE(nn.Module):
    """A trained SAE, for inference on raw z."""

    W_enc: Tensor
    """[d_in, d_sae]"""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_in], unit-norm rows where it was trained here; an imported SAE keeps its own, so that activations stay its own"""
    b_dec: Tensor
    """[d_in]"""
    threshold: Tensor
    """[d_sae], in units of the pre-activation on raw z"""

    def __init__(self, cfg: SAEConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.cfg = cfg
        for name in shapes(cfg):
            self.register_buffer(name, tensors[name].to(torch.float32).contiguous())

    def least(self, z: Tensor, preacts: Tensor | None = None) -> Tensor | None:  # noqa: ARG002 - `topk` reads them
        """What a pre-activation must exceed besides its feature's threshold: [..., 1] for z [..., d_in] (and its
        pre-activations [..., d_sae], where they are known). None where a feature is on or off whatever the others do,
        which is everywhere but in `topk`."""
        return None

    def activate(self, preacts: Tensor, features: Tensor, least: Tensor | None = None) -> Tensor:
        """Activations [..., n] of chosen `features` [n] from their pre-activations [..., n] and their tokens' `least`."""
        floor = self.threshold[features]
        return preacts * (preacts > (floor if least is None else torch.maximum(floor, least)))

    def token_scale(self, z: Tensor) -> Tensor | None:
        """What each token's z [..., d_in] is multiplied by before all else: [..., 1]; None where that is nothing."""
        if self.cfg.input_norm == "none":
            return None
        scale: Tensor = self.cfg.d_in**0.5 / z.float().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return scale

    def scaled(self, z: Tensor) -> Tensor:
        """z [..., d_in] as the affine map sees it: itself, or times `token_scale`."""
        scale = self.token_scale(z)
        return z.float() if scale is None else z.float() * scale

    def preacts(self, z: Tensor) -> Tensor:
        """Pre-activations [..., d_sae] of z [..., d_in]."""
        return (self.scaled(z) - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, z: Tensor) -> Tensor:
        """Activations [..., d_sae] of z [..., d_in], dense."""
        preacts = self.preacts(z)
        return self.activate(preacts, torch.arange(self.cfg.d_sae, device=z.device), self.least(z, preacts))

    def encode_sparse(self, z: Tensor) -> SparseActs:
        """The nonzero activations of z [n, d_in]. Pre-activations are made some tokens at a time and looked at in the cache."""
        x, d_sae = self.scaled(z) - self.b_dec, self.cfg.d_sae
        rows = part_rows(d_sae, torch.float32, z.device)
        buffer = torch.empty(min(rows, len(x)), d_sae, device=z.device)
        indices, values = [torch.zeros(0, dtype=torch.int64, device=z.device)], [torch.zeros(0, device=z.device)]
        for begun in range(0, len(x), rows):
            part = slice(begun, begun + rows)
            preacts = torch.addmm(self.b_enc, x[part], self.W_enc, out=buffer[: len(x[part])])
            least = self.least(z[part], preacts)
            on = preacts > (self.threshold if least is None else torch.maximum(self.threshold, least))
            index = true_at(on.view(-1))
            values.append(preacts.view(-1)[index])
            indices.append(index + begun * d_sae)
        index = torch.cat(indices)
        return SparseActs(index // d_sae, index % d_sae, torch.cat(values))

    def decode(self, f: Tensor, scale: Tensor | None = None) -> Tensor:
        """Reconstruction [..., d_in] of activations [..., d_sae]; `scale` is `token_scale` of the z they came from."""
        if scale is None and self.cfg.input_norm != "none":
            raise ValueError("this SAE norms each token, so its reconstruction needs the tokens' scale")
        found = f @ self.W_dec + self.b_dec
        return found if scale is None else found / scale

    def forward(self, z: Tensor) -> Tensor:
        """Reconstruction of z [..., d_in]."""
        return self.decode(self.encode(z), self.token_scale(z))

    def affine(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(w [n, d_in], c [n]) with preact = w . z + c on raw z, for `features` [n]; w . z s + c with s = `token_scale`, where
        there is one."""
        w = self.W_enc[:, features].T
        return w, self.b_enc[features] - w @ self.b_dec

    def excluded(self, z: Tensor, starts: Tensor) -> Tensor:
        """bool [batch, pos]: positions of rows z [batch, pos, d_in] that are no destinations (they stay sources).

        Row starts, which `starts` marks (`row_starts` of the tokens), and positions whose |z| is beyond what training saw
        (attention sinks and their like), where training left them out.
        """
        mask = starts.to(z.device) if self.cfg.exclude_start else torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
        return mask if self.cfg.max_norm is None else mask | (z.float().norm(dim=-1) > self.cfg.max_norm)


def row_starts(tokens: Tensor | NDArray[np.integer[Any]], row_start: int) -> Tensor:
    """bool [batch, pos]: where rows of tokens begin, or begin anew: the first position, whatever stands there, and each
    row-start token between packed documents. Attention rests on all of them alike, and none is a word of the text."""
    starts = tokens == row_start if isinstance(tokens, Tensor) else torch.from_numpy(np.array(tokens == row_start))
    starts[:, 0] = True
    return starts


def shapes(cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a saved SAE."""
    return {
        "W_enc": (cfg.d_in, cfg.d_sae),
        "b_enc": (cfg.d_sae,),
        "W_dec": (cfg.d_sae, cfg.d_in),
        "b_dec": (cfg.d_in,),
        "threshold": (cfg.d_sae,),
    }


def save_sae(sae: SAE, folder: Path) -> str:
    """Write `sae` to `folder` (`sae.safetensors` and `cfg.json`, each aside and renamed); return the weights' sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / f"{WEIGHTS}.aside", folder / f"{CONFIG}.aside"
    save_file({name: getattr(sae, name).cpu().contiguous() for name in shapes(sae.cfg)}, weights)
    config.write_text(json.dumps(sae.cfg.model_dump(mode="json"), indent=1))
    copymode(config, weights)  # safetensors lets nobody else read what it writes
    weights.rename(folder / WEIGHTS)
    config.rename(folder / CONFIG)
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_sae(folder: Path, device: str | torch.device = "cpu") -> SAE:
    """The SAE in `folder`; UnreadableSAE says what is missing, misshapen or not a number."""
    from sae_core.saes import ARCHITECTURES

    try:
        cfg = SAEConfig.model_validate_json((folder / CONFIG).read_text())
        # cloned: `load_file` maps the file, and a mapped file that somebody cuts short takes the process down
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    except FileNotFoundError as error:
        raise UnreadableSAE(f"{error.filename} is missing; an SAE is a folder with {CONFIG} and {WEIGHTS}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UnreadableSAE(f"{folder / CONFIG} is not an SAE's config: {where}: {first['msg']}.") from error
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise UnreadableSAE(f"{folder / WEIGHTS} cannot be read ({error}); copy it again.") from error
    for name, shape in shapes(cfg).items():
        if name not in tensors:
            raise UnreadableSAE(f"{folder / WEIGHTS} lacks the tensor {name}.")
        if tuple(tensors[name].shape) != shape:
            raise UnreadableSAE(f"{name} in {folder / WEIGHTS} has shape {tuple(tensors[name].shape)}, the config says {shape}.")
        if not torch.isfinite(tensors[name]).all():
            raise UnreadableSAE(f"{name} in {folder / WEIGHTS} holds values that are not finite.")
    return ARCHITECTURES[cfg.arch](cfg, tensors).to(device)


def check_fits(cfg: SAEConfig, model: "LensInfo", name: str) -> None:
    """Raise SAEMismatch where an SAE must not be used with a model: what it says of other z than those it was trained on
    would be wrong without looking so."""

    def refuse(why: str, remedy: str) -> NoReturn:
        raise SAEMismatch(f"The SAE {name} does not fit {model.name}: {why}; {remedy}.", field="sae")

    if cfg.site.layer >= model.n_layers:
        refuse(f"it reads layer {cfg.site.layer}, and the last one is {model.n_layers - 1}", "use the model that it was made for")
    if cfg.d_in != model.d_in:
        refuse(f"it reads z of width {cfg.d_in}, and here z has {model.d_in}", "use the model that it was made for")
    if (cfg.n_heads, cfg.d_head) != (model.n_heads, model.d_head):
        heads = f"{cfg.n_heads} heads of {cfg.d_head}, and here there are {model.n_heads} of {model.d_head}"
        refuse(f"it was made for {heads}", "use the model that it was made for")
    for what, words in (("folded", "with the norms folded in"), ("centred", "centred")):
        there, here = bool(cfg.processing.get(what)), bool(model.processing.get(what))
        if there != here:
            refuse(
                f"it was trained on weights {'' if there else 'not '}{words}, and here they are {'' if here else 'not '}so",
                "convert it",
            )
    if cfg.model_fingerprint != model.fingerprint:
        refuse("it was trained on other weights than those of that name now", "put the old weights back, or train a new SAE")
