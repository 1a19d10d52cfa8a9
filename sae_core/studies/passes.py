"""What studies of a model's heads share: which layers, how many rows in a pass, which tokens random rows are made of."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sae_core.config import HeadsStudy, InductionStudy
from sae_core.errors import UsageError
from sae_core.studies.proxy import ordinary_tokens

if TYPE_CHECKING:
    from sae_core.lens import Lens

OfHeads = InductionStudy | HeadsStudy
DOES = 0.3
"""Share of its attention from which a head does what the score is about. The paper takes 0.3 for "attends"; heads that do it
now and then by another way stay far below that on distinct random tokens."""


def layers_of(cfg: OfHeads, lens: "Lens") -> list[int]:
    """The layers to look at; LayerOutOfRange for one that the model lacks."""
    layers = list(range(lens.info.n_layers)) if cfg.layers == "all" else sorted(cfg.layers)
    for layer in layers:
        lens.check_layer(layer)
    return layers


def rows_at_once(cfg: OfHeads, length: int) -> int:
    """Rows of so many tokens in one model pass."""
    return max(1, cfg.pass_tokens // length)


def row_tokens(cfg: OfHeads, lens: "Lens", distinct: int) -> NDArray[np.int64]:
    """Ids that a row of `cfg.length` tokens, `distinct` of them different, is drawn from; UsageError where the model takes no
    such row, or has too few tokens."""
    if cfg.length > lens.info.max_context:
        raise UsageError(
            f"{lens.info.name} takes at most {lens.info.max_context} tokens at once, not {cfg.length}; lower --length.",
            field="length",
        )
    ids = np.array(ordinary_tokens(lens))
    if len(ids) < distinct:
        raise UsageError(
            f"{lens.info.name} has {len(ids)} tokens, fewer than the {distinct} distinct ones of a row; lower --length.",
            field="length",
        )
    return ids
