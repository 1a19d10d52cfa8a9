"""Which library multiplies a model's fp32 matrices on the CPU.

PyTorch takes MKL, which keeps its best kernels for its own maker's processors. On others that have AVX-512, oneDNN, which PyTorch
brings along for other precisions, is 5 to 30 % faster with weights as they are stored (LOG.md). The processor's name decides, not
a measurement: a job that is killed and goes on must compute the same numbers again.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products are quicker through oneDNN on this machine's CPU."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _maker() == "GenuineIntel":
        return False
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        return torch.equal(_product(x, weight, bias), torch.full((2, 4), 4.0))
    except (AttributeError, RuntimeError, TypeError):  # it is no public part of PyTorch, and may change
        return False


def through_onednn(model: nn.Module) -> None:
    """Have oneDNN multiply x [..., d_in] with the fp32 weights of a model's linear layers, in passes without gradients."""
    for module in model.modules():
        if type(module) is nn.Linear or type(module) is Conv1D:
            vars(module)["forward"] = functools.partial(_forward, module)


def _forward(module: Any, x: Tensor) -> Tensor:
    weight: Tensor = module.weight
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or torch.is_grad_enabled():
        plain: Tensor = type(module).forward(module, x)
        return plain
    return _product(x, weight.T if isinstance(module, Conv1D) else weight, module.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., d_in] times weight [d_out, d_in], transposed, plus bias [d_out]."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _maker() -> str:
    """Who made the processor, as it says itself; nothing where the system does not tell."""
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
