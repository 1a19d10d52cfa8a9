"""Models and texts as a person names them: registered, on disk or on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from sae_core.config import CorpusSource, ModelSource, RowsConfig
from sae_core.errors import EmptyCorpus, UnknownCorpus, UnknownModel, UsageError
from server import doctor as doctors
from server.db import Database
from server.jobs import slug
from server.settings import Settings
from server.store import registry

if TYPE_CHECKING:
    from sae_core.lens import Lens


S = TypeVar("S")


class Found(Generic[S]):
    """A model or corpus that was asked for: registered, or to be registered under `name` once it is seen to be good."""

    def __init__(self, name: str, source: S, *, new: bool) -> None:
        self.name, self.source, self.new = name, source, new


def find_model(db: Database, asked: str, revision: str | None) -> Found[ModelSource]:
    """The model of that name, or at that place; UnknownModel where it can be at none."""
    with db.read() as session:
        known = {m.name: m for m in registry.models(session)}
        if asked in known and revision in (None, known[asked].source.revision):
            return Found(asked, known[asked].source, new=False)
        source = model_source(asked, revision)
        if same := registry.model_at(session, source):
            return Found(same.name, source, new=False)
    return Found(_free_name(asked, set(known)), source, new=True)


def model_source(asked: str, revision: str | None) -> ModelSource:
    """Where it is: a file or folder that is there, else the hub; UnknownModel for a path that leads nowhere."""
    path = Path(asked).expanduser()
    if path.exists():
        return ModelSource(location=str(path.resolve()))
    if asked.endswith(".gguf") or asked.startswith((".", "/", "~")):
        raise UnknownModel(f"There is no model at {asked}; check the path.", field="model")
    return ModelSource(location=asked, revision=revision)


def find_corpus(db: Database, asked: str) -> Found[CorpusSource]:
    """The corpus of that name, or at that place; UnknownCorpus where there is none."""
    with db.read() as session:
        known = {c.name: c for c in registry.corpora(session)}
        if asked in known:
            return Found(asked, known[asked].source, new=False)
        source = CorpusSource(location=corpus_location(asked))
        if same := registry.corpus_at(session, source):
            return Found(same.name, source, new=False)
    return Found(_free_name(asked.removeprefix("hf:"), set(known)), source, new=True)


def corpus_for(
    db: Database, record: registry.SAERecord, asked: str | None, what: str
) -> tuple[Found[CorpusSource], RowsConfig | None]:
    """The text that is asked for, else the training's; and the training's rows where it is the same text."""
    trained = record.config.train
    if asked is None and trained is None:
        raise UsageError(f"{record.name} was not trained here, so say what text to {what} it on: --corpus.", field="corpus")
    found = find_corpus(db, asked or (trained.corpus if trained else ""))
    return found, trained.rows if trained and trained.corpus == found.name else None


def corpus_location(asked: str) -> str:
    """Where it is: `hf:<data set>` as it stands, else a whole path; UnknownCorpus for one that leads nowhere."""
    if asked.startswith("hf:"):
        return asked
    path = Path(asked).expanduser()
    if not path.exists():
        raise UnknownCorpus(
            f"No corpus is registered as {asked}, and there is no file or folder of that name; "
            "check the path, or write hf:<name> for a data set on the hub.",
            field="corpus",
        )
    return str(path.resolve())


def _free_name(asked: str, taken: set[str]) -> str:
    base = slug(Path(asked).stem if asked.endswith((".gguf", ".txt", ".jsonl", ".parquet")) else asked)
    return next(name for n in range(1, 10**6) if (name := base if n == 1 else f"{base}-{n}") not in taken)


def check_text(source: CorpusSource) -> None:
    """Raise EmptyCorpus unless there is a document in it."""
    from sae_core.corpus import documents

    if next(documents(source), None) is None:
        raise EmptyCorpus(f"There is no text in {source.location}; add some, or name another corpus.", field="corpus")


def load_model(settings: Settings, name: str, source: ModelSource) -> "Lens":
    """The model, on the device of the settings; a sentence where a worker's packages are not installed."""
    doctors.need_worker_extra()
    from sae_core import machine
    from sae_core.lens import load_lens

    return load_lens(source, name=name, device=machine.pick_device(settings.device), cache=settings.cache)
