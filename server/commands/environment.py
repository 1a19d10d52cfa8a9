"""Variables of the environment that libraries read: nobody is told anything, except where it is asked for."""

import logging
import os

from server import jobs, tracking
from server.settings import Settings, read_secret

_wandb_mode: str | None = None  # as a person set it


def report_to_nobody() -> None:
    """Nothing that runs here reports to anybody. Set before the libraries that read it are imported."""
    global _wandb_mode
    _wandb_mode = os.environ.get("WANDB_MODE")
    os.environ.update({"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"})
    if not os.environ.get("HEADSCOPE_WANDB"):
        os.environ["WANDB_MODE"] = "disabled"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    jobs.quiet()
    logging.captureWarnings(True)


def allow_wandb(settings: Settings) -> None:
    """Take our ban off where a project is named; what a person set stays."""
    if settings.wandb:
        tracking.need_wandb()
        os.environ.pop("WANDB_MODE", None)
        os.environ.update({"WANDB_MODE": _wandb_mode} if _wandb_mode else {})


def give_token(settings: Settings) -> None:
    """Put the Hugging Face token where the hub's library looks for it."""
    if settings.hf_token_file is not None:
        os.environ["HF_TOKEN"] = read_secret(settings.hf_token_file, "hf_token_file")
