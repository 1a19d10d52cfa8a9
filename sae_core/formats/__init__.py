"""Peers' SAE files: which format they are in, and our SAE that computes the same.

One module a format, each with `matches(path)`, which looks at what is there, and `read(path)`. `open_peer` asks each in turn;
`peer.convert` makes an SAE of ours of what was read; `saelens.write` goes the other way.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sae_core.errors import UnreadableSAE, UsageError
from sae_core.formats import dictionary_learning, gemma_scope, kissane, own, saelens, sparsify
from sae_core.formats.hub import fetched
from sae_core.formats.peer import PeerSAE, convert
from sae_core.formats.saelens import write as write_saelens


class Format(NamedTuple):
    """How one peer saves its SAEs."""

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], PeerSAE]
    read_scaled: Callable[[Path, float], PeerSAE] | None = None  # where its files may lack the scale of the inputs


FORMATS = (
    Format(saelens.NAME, saelens.matches, saelens.read, saelens.read),
    *(Format(module.NAME, module.matches, module.read) for module in (own, sparsify, gemma_scope, dictionary_learning, kissane)),
)


def open_peer(path: Path, name: str | None = None, scale: float | None = None) -> PeerSAE:
    """The SAE at `path`, a folder or a file, in the format `name`, or in the one that what is there shows.

    `scale` is the factor by which inputs are multiplied, for files that may lack it. Raises UnreadableSAE where it is no SAE that
    is known, damaged, incomplete or unsafe; UnsupportedSAE where it is one that our form cannot carry exactly.
    """
    if not path.exists():
        raise UnreadableSAE(f"There is no file or folder {path}; check the path.", field="location")
    if name is not None and name not in {form.name for form in FORMATS}:
        raise UsageError(f"There is no format {name}; there are {', '.join(form.name for form in FORMATS)}.", field="format")
    found = next((form for form in FORMATS if name in (None, form.name) and form.matches(path)), None)
    if found is None:
        listed = ", ".join(sorted(p.name for p in path.iterdir())[:6]) if path.is_dir() else path.name
        raise UnreadableSAE(
            f"{path} is no SAE in {f'the format {name}' if name else 'a format that is known'} (it has {listed or 'nothing'}); "
            f"known are {', '.join(form.name for form in FORMATS)}.",
            field="location",
        )
    if scale is None:
        return found.read(path)
    if found.read_scaled is None:
        raise UsageError(f"An SAE of {found.name} says its scale itself; leave --scale out.", field="scale")
    return found.read_scaled(path, scale)


__all__ = ["FORMATS", "Format", "PeerSAE", "convert", "fetched", "open_peer", "write_saelens"]
