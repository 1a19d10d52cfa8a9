"""Room on disk: what a job or a backup may still take, and what one is told that runs into the reserve. No torch."""

import os
import shutil
from pathlib import Path

from sae_core.errors import DiskFull
from server.settings import Settings

GB = 1e9


def size_of(folder: Path) -> int:
    """Bytes that a file or a folder takes on disk; what vanishes meanwhile counts as nothing."""
    total, waiting = 0, [folder]
    while waiting:
        place = waiting.pop()
        try:
            if place.is_dir() and not place.is_symlink():
                waiting.extend(place.iterdir())
            else:
                total += place.lstat().st_blocks * 512
        except OSError:
            continue
    return total


def need_room(settings: Settings, need: float, what: str = "This run") -> None:
    """Raise unless `need` bytes more fit into the data folder, the reserve left free and the quota kept: a disk that fills up
    under a memory-mapped file kills the process at once."""
    need_free(settings, settings.data, need, what)
    if settings.disk_quota_gb is not None:
        quota, used = settings.disk_quota_gb * GB, size_of(settings.data)
        if used + need > quota:
            raise DiskFull(
                f"{what} needs about {gigabytes(need)}, and {settings.data} holds {gigabytes(used)} of the {gigabytes(quota)} "
                "that it may (HEADSCOPE_DISK_QUOTA_GB); `headscope gc` shows what can go, or take fewer tokens."
            )


def need_free(settings: Settings, folder: Path, need: float, what: str) -> None:
    """Raise unless `need` bytes more fit onto the disk of `folder` with the reserve left free."""
    free, reserve = free_on(folder), settings.disk_reserve_gb * GB
    if need + reserve > free:
        spared = f", {gigabytes(reserve)} of which stay free (HEADSCOPE_DISK_RESERVE_GB)" if reserve else ""
        raise DiskFull(
            f"{what} needs about {gigabytes(need)} in {folder}, where {gigabytes(free)} are free{spared}; make room "
            "(`headscope gc` shows what can go), take fewer tokens, or use another disk."
        )


def watch(settings: Settings) -> None:
    """Raise when what is free has fallen below the reserve: whoever writes stops while there is room to stop cleanly."""
    free, reserve = free_on(settings.data), settings.disk_reserve_gb * GB
    if free < reserve:
        raise DiskFull(
            f"Only {gigabytes(free)} are left in {settings.data}, less than the {gigabytes(reserve)} that stay free "
            "(HEADSCOPE_DISK_RESERVE_GB), so the job stopped; make room (`headscope gc` shows what can go), then run it again."
        )


def free_on(folder: Path) -> int:
    """Bytes free where `folder` is or will be."""
    return shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())).free


def gigabytes(size: float) -> str:
    """Bytes as people say them."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def sync(path: Path) -> None:
    """See that what was written to a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
