"""SAEs on the hub: `owner/repository`, a folder or file inside it after that, fetched by huggingface_hub into its own cache."""

import re
from pathlib import Path

from sae_core.errors import DownloadFailed, UnreadableSAE

AT_TOP = (
    "cfg.json",
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "ae.pt",
    "config.json",
    "activation_scaler.json",
)
HUB = re.compile(r"^(?:hf:)?([\w.-]+/[\w.-]+)(?:/(.+?))?/?$")


def fetched(location: str, revision: str | None = None) -> Path:
    """The SAE's files on this machine: `location` itself where it is a path, else what the hub has under that name.

    Of a repository only what is named is fetched: a folder, a `.pt` or a `.safetensors` with its config, an `.npz`. Raises
    UnreadableSAE for a name that cannot be one, DownloadFailed where the hub does not have it or is away.
    """
    path = Path(location).expanduser()
    if path.exists():
        return path.resolve()
    named = HUB.match(location)
    if location.startswith((".", "/", "~")) or named is None:
        raise UnreadableSAE(
            f"There is no file or folder {location}; check the path, or write <owner>/<repository>/<folder> for the hub.",
            field="location",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, inside = named.groups()
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_wanted(inside)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise DownloadFailed(
            f"{repo} could not be fetched from the hub ({str(error).strip().splitlines()[0][:200]}); check the name and the "
            "network, or download it and name the folder.",
            field="location",
        ) from error
    found = folder / inside if inside else folder
    if not found.exists():
        raise UnreadableSAE(f"{repo} has no {inside}; look at its files on the hub.", field="location")
    return found


def _wanted(inside: str | None) -> list[str]:
    if inside is None:
        return list(AT_TOP)
    file = Path(inside)
    if file.suffix == ".pt":
        return [inside, file.with_name(f"{file.stem}_cfg.json").as_posix(), file.with_name("config.json").as_posix()]
    if file.suffix == ".safetensors":
        return [inside, *(file.with_name(name).as_posix() for name in ("config.yaml", "config.json"))]
    return [inside] if file.suffix == ".npz" else [f"{inside}/{name}" for name in AT_TOP]
