"""Kissane et al. 2024's own: `<name>.pt` beside `<name>_cfg.json`; the paper's ReLU SAE, see `saes/relu.py`.

They were trained on TransformerLens' folded weights, where z holds no value bias (method: hook_z of `from_pretrained` with its
defaults), so on raw z the biases must be put back: `peer.convert`.
"""

from pathlib import Path

from sae_core.errors import UnreadableSAE, UnsupportedSAE
from sae_core.formats.peer import PeerSAE, check_shapes, layer_of, thresholded
from sae_core.formats.read import read_json, read_pt, taken, whole

NAME = "kissane"
TAIL = "_cfg.json"


def _pairs(path: Path) -> list[Path]:
    """Weights with a config of their name beside them."""
    files = [path] if path.is_file() else sorted(path.glob("*.pt"))
    return [file for file in files if file.suffix == ".pt" and file.with_name(f"{file.stem}{TAIL}").is_file()]


def matches(path: Path) -> bool:
    """Whether it is such a `.pt` file, or a folder of them."""
    return bool(_pairs(path))


def read(path: Path) -> PeerSAE:
    """The SAE in a file, or the only one in a folder."""
    files = _pairs(path)
    if len(files) > 1:
        raise UnreadableSAE(
            f"{path} holds {len(files)} SAEs; name one of them: {', '.join(f.name for f in files[:4])}.", field="location"
        )
    file = files[0]
    config_path = file.with_name(f"{file.stem}{TAIL}")
    config = read_json(config_path)
    if config.get("site", "z") != "z":
        raise UnsupportedSAE(f"{config_path} says the site {config['site']}; Headscope takes SAEs on z.", field="location")
    tensors = thresholded(taken(read_pt(file), ("W_enc", "b_enc", "W_dec", "b_dec"), file))
    check_shapes(tensors, file, whole(config, "act_size", config_path), whole(config, "dict_size", config_path))
    head = config.get("head")
    return PeerSAE(
        format=NAME,
        path=file,
        arch="relu",
        tensors=tensors,
        layer=layer_of(str(config.get("act_name") or ""), config_path),
        head=head if isinstance(head, int) and not isinstance(head, bool) else None,
        folded=True,
        context=config["seq_len"] if isinstance(config.get("seq_len"), int) else None,
        model=config.get("model_name"),
    )
