"""A folder of ours, from another data folder: taken as it is, if it fits the model."""

from pathlib import Path

from sae_core.formats.peer import NAMES, PeerSAE
from sae_core.formats.read import read_json
from sae_core.saes import load_sae
from sae_core.saes.base import CONFIG, WEIGHTS

NAME = "headscope"


def matches(path: Path) -> bool:
    """Whether it is a folder that `save_sae` wrote."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file() and "site" in read_json(path / CONFIG)


def read(path: Path) -> PeerSAE:
    """The SAE in a folder, with what was folded into it already."""
    sae = load_sae(path)
    cfg = sae.cfg
    return PeerSAE(
        format=NAME,
        path=path / WEIGHTS,
        arch=cfg.arch,
        tensors={name: getattr(sae, name) for name in NAMES},
        k=cfg.k,
        input_norm=cfg.input_norm,
        layer=cfg.site.layer,
        folded=bool(cfg.processing.get("folded")),
        max_norm=cfg.max_norm,
        context=cfg.context,
        model=cfg.model,
    )
