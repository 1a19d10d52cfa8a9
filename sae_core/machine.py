"""What this machine has: devices, memory, and how fast it multiplies matrices."""

import functools
import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_core.config import PassDtype
from sae_core.errors import UsageError


@dataclass(frozen=True)
class Device:
    """Where models can run."""

    name: str
    """As PyTorch calls it: `cpu`, `cuda:0`, `mps`."""
    label: str
    """As its maker calls it."""
    memory: int
    """Bytes of memory in all."""
    free: int
    """Bytes free now."""


def devices() -> list[Device]:
    """GPUs first, the CPU last."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Device(f"cuda:{index}", torch.cuda.get_device_name(index), total, free))
    total, free = _memory()
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", total, free))
    return [*found, Device("cpu", _cpu_label(), total, free)]


def pick_device(choice: str) -> str:
    """The device that `auto` means here, or the one named. UsageError where there is no such device."""
    names = [device.name for device in devices()]
    if choice == "auto":
        return names[0]
    wanted = "cuda:0" if choice == "cuda" else choice
    if wanted not in names:
        raise UsageError(f"There is no device {choice} here; there is {', '.join(names)}.", field="device")
    return wanted


def matmul_speed(device: str, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.3) -> float:
    """Operations per second of a [size, size] matrix product: the best of `seconds` of them, so that a neighbour that was
    busy for a moment does not count."""
    a = torch.randn(size, size).to(device, dtype)
    begun, best = time.perf_counter(), float("inf")
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        _ = a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def speeds(device: str) -> dict[str, float]:
    """Operations per second by precision."""
    return {name: matmul_speed(device, getattr(torch, name)) for name in ("float32", "bfloat16")}


def versions() -> dict[str, str]:
    """Versions of what matters, by name; missing ones are left out."""
    names = ("headscope", "torch", "transformers", "transformer_lens", "sqlalchemy", "fastapi", "dbos", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_features() -> list[str]:
    """The instruction sets that matter for bfloat16, as far as the system tells."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def _memory() -> tuple[int, int]:
    """Bytes of RAM in all, and available."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return total, int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return total, total


def _cpu_label() -> str:
    try:
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        label = line.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        label = platform.processor() or platform.machine()
    return f"{label}, {os.cpu_count()} cores"


@functools.cache
def _bf16_gain(device: torch.device) -> float:
    """How many times faster a bfloat16 product is here: best of five, taken in turns so that neighbours disturb both alike."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return 0.0
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    matrices = {dtype: torch.ones(1024, 1024, device=device, dtype=dtype) for dtype in best}
    for _ in range(6):  # the first round warms up; a minimum forgets it
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # reading a number waits for the device
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def resolve_dtype(choice: PassDtype, device: torch.device) -> torch.dtype:
    """The dtype that a choice means on a device. `auto` takes bfloat16 only where a short product, measured once per
    process, is at least 1.5 times as fast as in float32 (AMX, AVX-512 BF16, GPUs)."""
    if choice == "auto":
        return torch.bfloat16 if _bf16_gain(device) >= 1.5 else torch.float32
    return torch.bfloat16 if choice == "bfloat16" else torch.float32
