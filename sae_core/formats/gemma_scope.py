"""Gemma Scope: one `params.npz` in `layer_<L>/width_<w>/average_l0_<n>/` (Lieberum et al. 2024, arXiv 2408.05147).

JumpReLU on z, with b_dec folded away from the encoder's side:

    preact = z W_enc + b_enc,  f = preact where preact > threshold,  z_hat = f W_dec + b_dec

Its repositories of residual and MLP SAEs have the same files; what tells them apart is the width of z.
"""

import re
from pathlib import Path

from sae_core.formats.peer import PeerSAE, check_shapes, thresholded
from sae_core.formats.read import read_npz, taken

NAME = "gemma-scope"
WEIGHTS = "params.npz"
CONTEXT = 1024  # section 3.1 of the report


def matches(path: Path) -> bool:
    """Whether it is an `.npz` file, or the folder of one."""
    return path.suffix == ".npz" if path.is_file() else (path / WEIGHTS).is_file()


def read(path: Path) -> PeerSAE:
    """The SAE in a file or its folder. Layer and L0 are read off the folders' names, as the release has them."""
    file = path if path.is_file() else path / WEIGHTS
    named = {name.replace("w_", "W_", 1): array for name, array in read_npz(file).items()}
    stored = taken(named, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), file)
    tensors = thresholded(stored, stored["threshold"])
    check_shapes(tensors, file)
    where = file.resolve().as_posix()
    layer, l0 = re.search(r"layer_(\d+)/", where), re.search(r"average_l0_(\d+)/", where)
    return PeerSAE(
        format=NAME,
        path=file,
        arch="jumprelu",
        tensors=tensors,
        k=int(l0[1]) if l0 else 0,
        subtracts=False,
        layer=int(layer[1]) if layer else None,
        context=CONTEXT,
    )
