"""An SAE that a job has made, put where readers find it."""

import shutil
from typing import Any

from sae_core.saes import load_sae
from sae_core.train import made_by
from server.downloads import sha256_of
from server.store import registry
from server.work.run import Run


def publish_sae(run: Run, model: str, name: str, metrics: dict[str, Any], index: int = 0) -> None:
    """Move the SAE that the run of that index made to its place under `<data>/saes`, and write its row."""
    home, made = run.worker.settings.data / "saes" / name, made_by(run.folder, index)
    home.parent.mkdir(parents=True, exist_ok=True)
    if made.exists():  # else it was moved before a crash
        # Nothing is removed at the final name: that would be done by a late attempt too. What it renames starts or ends in its
        # own folder, which is gone once another attempt has taken the job.
        if home.exists():
            aside = run.folder / f"replaced-{index:03d}"
            shutil.rmtree(aside, ignore_errors=True)
            home.rename(aside)
        made.rename(home)
    sae, sha256 = load_sae(home), sha256_of(home / "sae.safetensors")
    with run.write() as session:
        registry.upsert_sae(
            session,
            job_id=run.id,
            run=index,
            name=name,
            model_id=registry.model(session, model).id,
            config=sae.cfg,
            metrics=metrics,
            folder=str(home.relative_to(run.worker.settings.data)),
            sha256=sha256,
        )
    run.say(f"The SAE is in {home}.")
