"""EleutherAI's sparsify: `cfg.json` beside `sae.safetensors`.

    preact = (z - b_dec) W_enc + b_enc,  f = the k largest of ReLU(preact),  z_hat = f W_dec + b_dec

Its own trainer hooks the outputs of modules, so no folder says that it is on z: a person who trained one on z says the layer.
"""

from pathlib import Path

from sae_core.errors import UnsupportedSAE
from sae_core.formats.peer import PeerSAE, check_shapes, thresholded
from sae_core.formats.read import read_json, read_safetensors, taken, whole

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def matches(path: Path) -> bool:
    """Whether it is a folder of sparsify; one of ours has the same file names."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file() and "site" not in read_json(path / CONFIG)


def read(path: Path) -> PeerSAE:
    """The SAE in a folder."""
    config, weights = read_json(path / CONFIG), path / WEIGHTS
    for field, why in (
        ("transcode", "it predicts a module's output from its input"),
        ("skip_connection", "it has a linear path beside its features"),
        ("signed", "its features may be negative"),
    ):
        if config.get(field):
            raise UnsupportedSAE(f"{path / CONFIG} says {field}: {why}, which Headscope's form cannot carry.", field="location")
    if config.get("activation", "topk") != "topk":
        raise UnsupportedSAE(
            f"{path / CONFIG} says the activation {config['activation']}; Headscope's form knows topk.", field="location"
        )
    stored = taken(read_safetensors(weights), ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), weights)
    tensors = {"W_enc": stored["encoder.weight"].T, "b_enc": stored["encoder.bias"], "W_dec": stored["W_dec"]}
    tensors = thresholded(tensors | {"b_dec": stored["b_dec"]})
    d_in = whole(config, "d_in", path / CONFIG)
    d_sae = config.get("num_latents") or d_in * whole(config, "expansion_factor", path / CONFIG)
    check_shapes(tensors, weights, d_in, d_sae)
    return PeerSAE(format=NAME, path=weights, arch="topk", tensors=tensors, k=whole(config, "k", path / CONFIG))
