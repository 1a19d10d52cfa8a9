"""What a run holds in a device's memory at once, part by part: arithmetic from the model's sizes and the run's config.

The model stays throughout; collecting, training, measuring and visiting take turns, so the peak is the model and the largest
of them. It counts tensors, which is what PyTorch's allocator saw on SmolLM2 to 1 % for passes and logits (LOG.md); reserve and
workspace come on top, and a step is bounded from above. No torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_core.config import Arch, TrainConfig

if TYPE_CHECKING:
    from sae_core.sizes import ModelSizes

FLOAT, HALF = 4, 2
LOGITS_AT_ONCE = 2**26  # elements, as the lens splits its rows
VECTORS: dict[Arch, int] = {"gated": 3, "jumprelu": 2}
"""Parameters per feature beside its two directions: b_enc, and what an architecture adds to it."""


@dataclass(frozen=True)
class Plan:
    """Bytes by part."""

    model: dict[str, int]
    """Held all the time."""
    collecting: dict[str, int]
    """While z is read from one layer; z is the part `z`."""
    all_layers: int
    """Bytes of z while all layers are read in one pass, instead of one layer's."""
    training: dict[str, int]
    """While one SAE is trained; the SAEs of a sweep take turns."""
    measuring: dict[str, int]
    """While losses are measured."""
    visiting: dict[str, int]
    """While a harvest visits rows in float32, attention step by step."""

    @property
    def peak(self) -> int:
        """With one layer."""
        return self._peak(self.collecting["z"])

    @property
    def peak_all(self) -> int:
        """With all layers in one pass."""
        return self._peak(self.all_layers)

    def _peak(self, z: int) -> int:
        turns = ({**self.collecting, "z": z}, self.training, self.measuring, self.visiting)
        return sum(self.model.values()) + max(sum(parts.values()) for parts in turns)


def plan(cfg: TrainConfig, sizes: "ModelSizes", *, half_pass: bool, half_step: bool) -> Plan:
    """The plan of a run; `half_pass` and `half_step`: whether the model's pass and the SAE's encoder product are in bfloat16."""
    d_in, width = sizes.n_heads * sizes.d_head, HALF if half_pass else FLOAT
    d_sae, context = cfg.expansion * d_in, cfg.rows.context
    tokens = cfg.collect_rows * context

    model = {"float32 weights": FLOAT * sizes.parameters}
    if half_pass:
        model["bfloat16 weights"] = HALF * sizes.parameters

    # At a block's widest point: the embedding, the stream and its norm; and either gate, up and their product, or q, k, v, z.
    widest = 3 * sizes.d_model + max(3 * sizes.d_mlp, 2 * (sizes.n_heads + sizes.n_kv_heads) * sizes.d_head)
    collecting = {"pass": width * tokens * widest, "z": width * tokens * d_in}

    parameters = FLOAT * (2 * d_in * d_sae + VECTORS.get(cfg.arch, 1) * d_sae + d_in)
    training = {
        "SAE": parameters,
        "gradients": parameters,
        "Adam's moments": 2 * parameters,
        # Pre-activations, and what their gradient or AuxK makes of them; x, its reconstruction and its error.
        "step": FLOAT * cfg.batch * (3 * d_sae + 3 * d_in),
    }
    if half_step:
        training["bfloat16 encoder"] = HALF * d_in * d_sae

    rows = max(1, LOGITS_AT_ONCE // (context * sizes.d_vocab))
    logits = 2 * FLOAT * rows * context * sizes.d_vocab  # and their logarithms of probabilities
    visited = max((harvest.batch_rows for harvest in cfg.harvests), default=0)
    visiting = {
        "SAE": parameters,
        "visit": FLOAT * visited * context * (3 * sizes.d_model + 5 * d_in),  # q; k, v for each query head, rotated; z
        "patterns": 3 * FLOAT * visited * sizes.n_heads * context**2,  # scores, masked scores, softmax
    }
    z_of_all = width * tokens * d_in * sizes.n_layers
    return Plan(model, collecting, z_of_all, training, {"SAE": parameters, "logits": logits}, visiting)
