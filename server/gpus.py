"""The GPUs of this machine: how many workers each takes, and what is in use of their memory."""

import os
import socket

import torch

from sae_core.errors import SlotTaken
from server.settings import Settings
from server.slots import Slot
from server.watch import Gpu


def take_gpu(settings: Settings, device: str) -> Slot | None:
    """One of the places that a GPU has for workers, held as long as the process lives; None on other devices.

    Raises SlotTaken where none is free.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[int(index or 0)] if visible else index or "0"
    found = Slot.first(settings, [f"gpu-{socket.gethostname()}-{name}-{n}" for n in range(settings.gpu_workers)])
    if found is None:
        places = f"{settings.gpu_workers} worker{'s' if settings.gpu_workers > 1 else ''}"
        raise SlotTaken(
            f"{device} of this machine has {places} already, as many as HEADSCOPE_GPU_WORKERS allows; choose another device with "
            "--device, or set it higher.",
            field="device",
        )
    return found


def gpus() -> list[Gpu]:
    """Memory of the GPUs that this process has begun to use."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []  # asking would take a few hundred MB of it
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(f"cuda:{index}", total - free, total, torch.cuda.memory_reserved(index)))
    return found
