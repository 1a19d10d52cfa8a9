"""Peers' transcoders, and ours that compute the same.

| format | files | says what it reads and writes |
|---|---|---|
| SAELens | `cfg.json` with a `*transcoder` architecture, `sae_weights.safetensors` | by its hooks |
| Gemma Scope | `params.npz` | no: the norm's gain was folded away, and what it writes comes after the norm after the MLP |
| Gemma Scope 2 | `params.safetensors`, `config.json` | by transformers' modules |
| sparsify | `cfg.json` with `transcode`, `sae.safetensors` | a module's input and output: that of the folder's name |
| circuit-tracer | `layer_<l>.safetensors`, `config.yaml` for all layers | by its hooks |
| Headscope | a file of another data folder | yes |

TransformerLens' hooks mean another thing where the norms were folded into the weights, and `ln2.hook_normalized` comes before the
gain of an RMSNorm, but after gain and bias of a LayerNorm.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from sae_core.config import Reads, TranscoderConfig, TranscoderFiles, Writes
from sae_core.errors import UnreadableSAE, UnsupportedSAE, UsageError
from sae_core.formats import saelens, sparsify
from sae_core.formats.gemma_scope import WEIGHTS as NPZ
from sae_core.formats.read import read_json, read_npz, read_safetensors, taken, whole
from sae_core.transcoders import Transcoder, check_fits, is_ours, load_transcoder

if TYPE_CHECKING:
    from sae_core.lens import Lens

PARAMS = "params.safetensors"
LAYER_FILE = re.compile(r"^layer_(\d+)\.safetensors$")
HOOK = re.compile(r"^blocks\.(\d+)\.(.+)$")
MODULE = re.compile(r"(?:^|[./])(?:layers|h|blocks)\.(\d+)\.(\w+)$")
READS: dict[str, Reads] = {"hook_resid_mid": "stream", "ln2.hook_in": "stream", "hook_mlp_in": "stream", "mlp.hook_in": "normed"}
WRITES: dict[str, Writes] = {"hook_mlp_out": "stream", "ln2_post.hook_out": "stream", "mlp.hook_out": "mlp"}
NORMED: Literal["ln2.hook_normalized"] = "ln2.hook_normalized"
T = TypeVar("T")


PASSAGE = (
    "The tide had turned before noon, and by the time that the three boats came round the point there was already a line of "
    "dark weed along the sand. Nobody spoke. The oldest of the men, who had been to sea since he was twelve, counted the houses "
    'on the hill as he always did: nineteen, and the chapel. In 1884 there had been forty. "They will want to know where the '
    'rest of the nets are," said his son, and he began to fold the sail. It was Tuesday; the market opened on Thursday at six '
    "in the morning, and the price of herring, which was 4.50 in the spring, would not be higher than 3.20 now."
)
"""What an imported transcoder is tried on."""


class Tried(NamedTuple):
    """How much of its MLP a transcoder makes on a short text, row start left out."""

    fvu: float
    """Fraction of the variance of what the MLP adds to the stream that is left."""
    l0: float
    """Features a token."""
    otherwise: dict[Reads, float]
    """The fraction if it read another thing: one that is far smaller says that `reads` is wrong."""


class PeerTranscoder(NamedTuple):
    """A transcoder as a peer's files say it."""

    format: str
    path: Path
    """The file of its weights, for messages."""
    tensors: dict[str, Tensor]
    """Those of `Transcoder`, by its names."""
    k: int | None = None
    layer: int | None = None
    """None where the files do not say."""
    reads: Reads | Literal["ln2.hook_normalized"] | None = None
    """None where the files do not say."""
    writes: Writes | None = None
    folded: bool = False
    """Whether it was trained on weights with the norms' gains folded in."""


def open_transcoder(path: Path, name: str | None = None) -> PeerTranscoder:
    """The transcoder at `path`, in the format `name`, or in the one that what is there shows.

    Raises UnreadableSAE where it is none that is known, damaged or unsafe; UnsupportedSAE where it is an SAE, or computes what
    our form cannot carry.
    """
    if not path.exists():
        raise UnreadableSAE(f"There is no file or folder {path}; check the path.", field="location")
    if name is not None and name not in FORMATS:
        raise UsageError(f"There is no format {name}; there are {', '.join(FORMATS)}.", field="format")
    for found, (matches, read) in FORMATS.items():
        if name in (None, found) and matches(path):
            return read(path)
    listed = ", ".join(sorted(p.name for p in path.iterdir())[:6]) if path.is_dir() else path.name
    raise UnreadableSAE(
        f"{path} is no transcoder in {f'the format {name}' if name else 'a format that is known'} (it has {listed or 'nothing'})"
        f"; known are {', '.join(FORMATS)}.",
        field="location",
    )


def fitted(peer: PeerTranscoder, lens: "Lens", said: TranscoderFiles) -> Transcoder:
    """Our transcoder for a model. What a person says of `reads` and `writes` wins; their layer must agree with the files.

    Raises UnsupportedSAE for what neither the files nor the person says, SAEMismatch and LayerOutOfRange where the model has no
    such MLP.
    """
    if said.layer is not None and peer.layer not in (None, said.layer):
        raise UsageError(
            f"{peer.path} is one of layer {peer.layer}, and layer {said.layer} was asked for; leave it out.", field="layer"
        )
    layer = _told(peer, "layer", "which layer it is of", peer.layer if said.layer is None else said.layer)
    reads = _told(peer, "reads", "what it reads", said.reads or _meant(peer, lens, layer))
    writes = _told(peer, "writes", "what it writes", said.writes or peer.writes)
    cfg = TranscoderConfig(
        layer=layer, reads=reads, writes=writes, k=peer.k, format=peer.format, source=said.location,
        model_fingerprint=lens.info.fingerprint,
    )  # fmt: skip
    found = Transcoder(cfg, **peer.tensors)
    check_fits(found, lens.info)
    return found.to(lens.device)


def _told(peer: PeerTranscoder, option: str, words: str, value: T | None) -> T:
    if value is None:
        raise UnsupportedSAE(f"{peer.path} does not say {words}; say it with --{option}.", field=option)
    return value


def tried(lens: "Lens", transcoder: Transcoder) -> Tried:
    """Try it on a short text. Raises UnsupportedModel where what enters the model's MLPs cannot be seen."""
    from sae_core.circuits import left_by

    tokens = [lens.row_start, *lens.encode([PASSAGE])[0]][: lens.info.max_context]
    each = {
        reads: left_by(lens, tokens, replace(transcoder, cfg=transcoder.cfg.model_copy(update={"reads": reads})))
        for reads in get_args(Reads)
    }
    fvu, l0 = each.pop(transcoder.cfg.reads)
    return Tried(fvu, l0, {reads: other for reads, (other, _) in each.items()})


def _meant(peer: PeerTranscoder, lens: "Lens", layer: int) -> Reads | None:
    """What its files mean, of this model."""
    if peer.reads == NORMED:
        return "normed" if lens.mlp_norms(layer)[0].centres and not peer.folded else "ungained"
    return "ungained" if peer.reads == "normed" and peer.folded else peer.reads


# ---- formats ----


def _saelens(path: Path) -> PeerTranscoder:
    config, weights = saelens.flat(read_json(path / saelens.CONFIG)), path / saelens.WEIGHTS
    kind = str(config.get("architecture"))
    if not kind.endswith("transcoder"):
        raise _is_sae(path, f"its architecture is {kind}")
    if kind.removeprefix("jumprelu_").removeprefix("skip_") != "transcoder":
        raise UnsupportedSAE(f"{path} is a {kind}, which Headscope does not know.", field="location")
    for field, plain in (("normalize_activations", "none"), ("activation_fn", "relu"), ("hook_head_index", None)):
        if config.get(field) not in (None, plain):
            raise UnsupportedSAE(
                f"{path / saelens.CONFIG} says {field} = {config[field]}; only {plain} is read.", field="location"
            )
    layer, hook = _hook(config.get("hook_name"), path)
    _, out = _hook(config.get("hook_name_out") or f"blocks.{layer}.hook_mlp_out", path)
    # SAELens calls it so for Gemma 3, where its weights read what the norm made: transformers' name of the place tells.
    if str(config.get("hf_hook_name", "")).endswith("layernorm.output"):
        hook = "mlp.hook_in"
    return PeerTranscoder(
        "saelens",
        weights,
        _tensors(read_safetensors(weights), weights, threshold="threshold" if "jumprelu" in kind else None, skip="skip" in kind),
        layer=layer,
        reads=_known(hook, path),
        writes=WRITES.get(out),
        folded=bool((config.get("model_from_pretrained_kwargs") or {}).get("fold_ln")),
    )


def _gemma_scope(path: Path) -> PeerTranscoder:
    file = path if path.is_file() else path / NPZ
    where = file.resolve().as_posix()
    if other := re.search(r"gemma-scope-\w+-\w+-(res|mlp|att)\b", where):
        raise _is_sae(path, f"its repository is one of Gemma Scope's -{other[1]}")
    named = {name.replace("w_", "W_", 1): array for name, array in read_npz(file).items()}
    layer = re.search(r"layer_(\d+)/", where)
    tensors = _tensors(named, file, threshold="threshold")
    return PeerTranscoder("gemma-scope", file, tensors, None, int(layer[1]) if layer else None, "ungained", "stream")


def _gemma_scope_2(path: Path) -> PeerTranscoder:
    file = path if path.is_file() else path / PARAMS
    beside = file.with_name("config.json")
    config = read_json(beside) if beside.is_file() else {}
    read_from, to = (str(config.get(f"hf_hook_point_{end}", "")) for end in ("in", "out"))
    if config and not to:
        raise _is_sae(path, f"it reads {read_from} and says of nothing that it writes it")
    stored = {name.replace("w_", "W_", 1): tensor for name, tensor in read_safetensors(file).items()}
    if stored.get("W_dec") is not None and stored["W_dec"].ndim == 3:
        raise _is_cross_layer(path)
    skip = "affine_skip_connection" in stored
    tensors = _tensors(
        stored | ({"W_skip": stored["affine_skip_connection"].T} if skip else {}), file, threshold="threshold", skip=skip
    )
    layer = re.search(r"layers?[._](\d+)", f"{read_from} {file.resolve().as_posix()}")
    reads: Reads = "stream" if read_from.endswith("layernorm.input") else "normed"
    return PeerTranscoder("gemma-scope-2", file, tensors, None, int(layer[1]) if layer else None, reads, "stream")


def _sparsify(path: Path) -> PeerTranscoder:
    config, weights = read_json(path / sparsify.CONFIG), path / sparsify.WEIGHTS
    if not config.get("transcode"):
        raise _is_sae(path, "its cfg.json does not say transcode")
    for field in ("signed", "embed_skip", "gram_lookup"):
        if config.get(field):
            raise UnsupportedSAE(f"{path / sparsify.CONFIG} says {field}, which Headscope's form cannot carry.", field="location")
    if config.get("activation", "topk") != "topk":
        raise UnsupportedSAE(
            f"{path / sparsify.CONFIG} says the activation {config['activation']}; topk is read.", field="location"
        )
    stored = read_safetensors(weights)
    named = {"W_enc": stored["encoder.weight"].T, "b_enc": stored["encoder.bias"]} if "encoder.weight" in stored else {}
    module = MODULE.search(path.resolve().name)
    is_mlp = module is not None and module[2] in ("mlp", "feed_forward", "ffn")
    return PeerTranscoder(
        "sparsify",
        weights,
        _tensors(stored | named, weights, skip=bool(config.get("skip_connection"))),
        whole(config, "k", path / sparsify.CONFIG),
        int(module[1]) if module else None,
        "normed" if is_mlp else None,
        "mlp" if is_mlp else None,
    )


def _circuit_tracer(path: Path) -> PeerTranscoder:
    beside = path.with_name("config.yaml")
    lines = beside.read_text(errors="replace") if beside.is_file() else ""
    said = dict(re.findall(r"^(model_kind|feature_input_hook|feature_output_hook):\s*[\"']?([\w.]+)", lines, re.M))
    if said.get("model_kind") == "cross_layer_transcoder":
        raise _is_cross_layer(path)
    stored = read_safetensors(path)
    named = {"W_enc": stored["W_enc"].T} if "W_enc" in stored else {}
    threshold = "activation_function.threshold" if "activation_function.threshold" in stored else None
    tensors = _tensors(stored | named, path, threshold=threshold, skip="W_skip" in stored)
    layer = LAYER_FILE.match(path.name)
    hook = said.get("feature_input_hook")
    reads = None if hook is None else _known(hook, path)
    return PeerTranscoder(
        "circuit-tracer",
        path,
        tensors,
        None,
        int(layer[1]) if layer else None,
        reads,
        WRITES.get(said.get("feature_output_hook", "")),
    )


def _own(path: Path) -> PeerTranscoder:
    made = load_transcoder(path)
    return PeerTranscoder("headscope", path, made.tensors, made.cfg.k, made.cfg.layer, made.cfg.reads, made.cfg.writes)


FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], PeerTranscoder]]] = {
    "saelens": (saelens.matches, _saelens),
    "sparsify": (sparsify.matches, _sparsify),
    "gemma-scope": (lambda path: path.suffix == ".npz" if path.is_file() else (path / NPZ).is_file(), _gemma_scope),
    "gemma-scope-2": (lambda path: path.name == PARAMS if path.is_file() else (path / PARAMS).is_file(), _gemma_scope_2),
    "headscope": (is_ours, _own),
    "circuit-tracer": (lambda path: path.is_file() and path.suffix == ".safetensors", _circuit_tracer),
}


def _tensors(stored: dict[str, Tensor], path: Path, *, threshold: str | None = None, skip: bool = False) -> dict[str, Tensor]:
    """Those of `Transcoder`; peers keep the skip as [d_out, d_in]."""
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *([threshold] if threshold else []), *(["W_skip"] if skip else [])]
    found = taken(stored, names, path)
    made = {name: found[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    given = torch.zeros_like(found["b_enc"]) if threshold is None else found[threshold].clamp_min(0.0)
    made["threshold"] = given.expand_as(found["b_enc"]).contiguous() if given.numel() == 1 else given
    return made | ({"skip": found["W_skip"].T.contiguous()} if skip else {})


def _hook(name: Any, path: Path) -> tuple[int, str]:
    found = HOOK.match(str(name))
    if found is None:
        raise UnsupportedSAE(f"{path} names the hook {name}, which is none of one layer.", field="location")
    return int(found[1]), found[2]


def _known(hook: str, path: Path) -> Reads | Literal["ln2.hook_normalized"]:
    if hook != NORMED and hook not in READS:
        raise UnsupportedSAE(
            f"{path} reads {hook}; a transcoder of one MLP reads {', '.join((NORMED, *READS))}.",
            field="location",
        )
    return READS.get(hook, NORMED)


def _is_sae(path: Path, why: str) -> UnsupportedSAE:
    return UnsupportedSAE(
        f"{path} is an SAE and no transcoder: {why}. One on z is imported with `headscope import sae`.", field="location"
    )


def _is_cross_layer(path: Path) -> UnsupportedSAE:
    return UnsupportedSAE(
        f"{path} is a cross-layer transcoder, which writes to many layers; Headscope reads those of one MLP.", field="location"
    )
