"""Finds a model's weights, a GGUF file, a local folder or a name on the hub, and reads them as transformers does.

A GGUF file is converted once, into a folder of the cache. Local models never touch the network; code that a repository brings is
not run. What goes wrong is told in a sentence.
"""

import contextlib
import hashlib
import io
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import huggingface_hub.constants
import torch
import transformers

from sae_core.config import ModelSource
from sae_core.errors import DiskFull, UnknownModel, UnreadableModel, UnsupportedModel

hf: Any = transformers  # its annotations do not describe what its Auto classes return

# The libraries draw progress bars and report usage by default; a server's log wants neither.
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS = True
hf.utils.logging.disable_progress_bar()
hf.utils.logging.set_verbosity_error()
logging.getLogger("gguf").setLevel(logging.ERROR)

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
STALE_SECONDS = 3600  # a conversion that was left unfinished for so long has died


class Found(NamedTuple):
    """Where a model's weights are."""

    location: str
    """What transformers is given."""
    shown: str
    """What its user called it."""
    fingerprint: str | None
    """Of local weights: `gguf:` or `weights:` and a sha256."""
    revision: str | None = None
    """Of the hub's."""


def find(source: ModelSource, cache: Path) -> Found:
    """Where the weights are, those of a GGUF file after they were converted into `cache/models/<its sha256>`.

    Raises UnknownModel, UnreadableModel, DiskFull.
    """
    path = Path(source.location).expanduser()
    if source.location.endswith(".gguf"):
        if not path.is_file():
            raise UnknownModel(f"There is no file {source.location}.", field="location")
        digest = _sha256(path)
        return Found(str(_converted(path, digest, cache / "models")), source.location, f"gguf:{digest}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnreadableModel(
                f"{source.location} holds no config.json, so it is no model in Hugging Face format.", field="location"
            )
        return Found(str(path), source.location, _folder_fingerprint(path))
    if not HUB_NAME.fullmatch(source.location):
        raise UnknownModel(f"There is no folder or file {source.location}, and the hub has no such names.", field="location")
    return Found(source.location, source.location, None, source.revision)


def read(found: Found) -> tuple[Any, Any, str]:
    """The model in fp32 with eager attention, its tokenizer, and a fingerprint: of the hub's weights, their commit."""
    local = found.fingerprint is not None
    where: dict[str, Any] = {"local_files_only": local, "revision": found.revision, "trust_remote_code": False}
    config = hf.AutoConfig.from_pretrained(found.location, **where)
    model, loading = hf.AutoModelForCausalLM.from_pretrained(
        found.location, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **where
    )
    if missing := sorted(loading["missing_keys"]) or sorted(map(str, loading["mismatched_keys"])):
        # transformers would draw these at random and go on.
        raise UnreadableModel(f"{found.shown} lacks weights that its config asks for, such as {missing[0]}.", field="location")
    tokenizer = hf.AutoTokenizer.from_pretrained(found.location, **where)
    return model, tokenizer, found.fingerprint or f"commit:{config._commit_hash}"


@contextlib.contextmanager
def refusals(found: Found, device: torch.device) -> Iterator[None]:
    """What goes wrong inside, in reading or in using what was read, becomes UnknownModel, UnreadableModel or UnsupportedModel."""
    try:
        yield
    except (UnreadableModel, UnsupportedModel):
        raise
    except torch.OutOfMemoryError as error:
        raise UnsupportedModel(
            f"{found.shown} does not fit into the memory of {device}; choose a smaller model or the CPU."
        ) from error
    except Exception as error:
        _refuse(found.shown, error, local=found.fingerprint is not None)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnreadableModel(f"{path} cannot be read ({error.strerror}).", field="location") from error


def _folder_fingerprint(folder: Path) -> str:
    """Hash of a folder's weights and config; moving or renaming the folder does not change it."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise UnreadableModel(f"{folder} holds no weights (*.safetensors).", field="location")
    lines = [f"{file.name} {_sha256(file)}" for file in (*weights, folder / "config.json")]
    return f"weights:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def _converted(gguf: Path, digest: str, models: Path) -> Path:
    """The folder that holds a gguf's weights in Hugging Face format: made aside, renamed when complete."""
    target = models / digest
    if target.is_dir():
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        for stale in models.glob(f"aside-{digest[:12]}-*"):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=f"aside-{digest[:12]}-", dir=models))
    except OSError as error:
        raise UnreadableModel(f"{models} cannot be written ({error.strerror}), so {gguf.name} cannot be converted.") from error
    try:
        _convert(gguf, aside)
        aside.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster: its folder holds the same
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    # The bytes decide, not the name: transformers' own complaint about a wrong file is a page long.
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UnreadableModel(f"{gguf} is not a GGUF file: its first bytes are not GGUF.", field="location")
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            model = hf.AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                dtype=torch.float32,
                # Without it weights stay packed and save_pretrained refuses.
                quantization_config=hf.GgufConfig(dequantize=True),
                **where,
            )
            tokenizer = hf.AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    except Exception as error:
        raise UnreadableModel(
            f"{gguf} cannot be read: it is damaged, or of a kind that transformers cannot convert ({short(error)}).",
            field="location",
        ) from error
    try:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    except Exception as error:
        if getattr(error, "errno", None) == 28 or "os error 28" in str(error):
            raise DiskFull(f"No room is left in {folder.parent}; {gguf.name} needs 4 bytes per parameter there.") from error
        raise


def _refuse(shown: str, error: Exception, *, local: bool) -> NoReturn:
    """Turn what transformers raises, which shares a few broad classes, into one of ours by what it says."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        raise UnsupportedModel(f"{shown} brings code of its own, which Headscope does not run.", field="location") from error
    if "does not recognize this architecture" in text or "Unrecognized configuration class" in text:
        raise UnsupportedModel(f"{shown} is of a kind that transformers cannot load as a language model.") from error
    if local:
        raise UnreadableModel(f"{shown} cannot be read: {short(error)}.", field="location") from error
    if "gated" in text or "401" in text or "403" in text:
        raise UnknownModel(
            f"The hub does not give {shown} to this account; accept its terms there and set HF_TOKEN.", field="location"
        ) from error
    raise UnknownModel(
        f"{shown} could not be had from the hub: no such model, or the hub cannot be reached ({short(error)}).",
        field="location",
    ) from error


def short(error: Exception) -> str:
    """The first line of an error, without its full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:200]
