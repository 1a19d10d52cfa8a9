"""What can go wrong, one class each. The message is a sentence: what was wrong, where, what to do.

HeadscopeError
├── UsageError              the user asked for something that cannot be
│   ├── UnknownModel
│   ├── UnreadableModel
│   ├── UnsupportedModel
│   ├── LayerOutOfRange
│   ├── UnknownCorpus
│   ├── EmptyCorpus
│   ├── UnreadableCorpus
│   ├── UnreadableSAE
│   ├── UnsupportedSAE
│   ├── UnreadableDashboards
│   ├── SAEMismatch
│   ├── CacheMismatch
│   └── WrongChecksum
├── MachineError       the machine does not allow it now
│   ├── DataFolderNotWritable
│   ├── DiskFull
│   ├── PortTaken
│   ├── SlotTaken
│   ├── DatabaseTooNew
│   ├── DatabaseTooOld
│   ├── DatabaseAway
│   ├── EngineAway
│   ├── DownloadFailed
│   ├── CacheBusy
│   ├── ProcessLost
│   ├── Overloaded
│   └── MissingWorkerExtra
├── Diverged                a training run, or the model it reads, gave values that are not numbers
├── DamagedRow              what is stored of an example cannot be read
├── JobError
│   ├── UnknownJob
│   ├── Cancelled           a person cancelled the job; not a fault
│   ├── Fenced              another worker took this job over; this one must stop
│   └── TimeUp              a job worked for longer than it may
├── Outdated                somebody else changed it meanwhile
├── LoginNeeded             nobody knows who asks
├── Forbidden               whoever asks may not
├── TooOften                so often that others would wait
└── NotFound                no such SAE, feature, page
    └── Renamed             it has another name now

The CLI prints the sentence and exits 2; the API answers it as `{"error": {"code", "message", "field"}}`; a page shows it.
"""


class HeadscopeError(Exception):
    """Base of every error that a user may see; `str()` of it is the sentence shown."""

    status = 400
    field: str | None = None

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    @property
    def code(self) -> str:
        """Stable name for scripts: the class name in snake case."""
        name = type(self).__name__
        return "".join(
            "_" + c.lower() if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name)
        )


class UsageError(HeadscopeError):
    """The user asked for something that cannot be."""

    status = 422


class Unfitting(ValueError):
    """What a validator of several fields raises: which of them to change. Pydantic hands it on."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class UnknownModel(UsageError):
    """No model of that name: not registered, no such folder or file, not known to the hub."""


class UnreadableModel(UsageError):
    """The model file is damaged or not what its name says."""


class UnsupportedModel(UsageError):
    """The model loads, but pattern times v does not give its z, so attribution would be wrong."""


class LayerOutOfRange(UsageError):
    """The model lacks the layer."""


class UnknownCorpus(UsageError):
    """No corpus of that name or at that place."""


class EmptyCorpus(UsageError):
    """The corpus has too little text for what was asked."""


class UnreadableCorpus(UsageError):
    """The corpus file is binary or damaged."""


class UnreadableSAE(UsageError):
    """The SAE's files are damaged, incomplete or unsafe."""


class UnsupportedSAE(UsageError):
    """The SAE computes what Headscope's form cannot carry exactly, or reads another site than z."""


class UnreadableDashboards(UsageError):
    """Dashboards of another tool are damaged or incomplete."""


class SAEMismatch(UsageError):
    """The SAE does not fit the model it is used with."""


class CacheMismatch(UsageError):
    """The activation cache of that name holds other activations than those asked for."""


class WrongChecksum(UsageError):
    """A downloaded file is not the one that was expected."""


class MachineError(HeadscopeError):
    """The machine does not allow it now."""

    status = 503


class DataFolderNotWritable(MachineError):
    """The data folder cannot be written."""


class DiskFull(MachineError):
    """No room is left where Headscope writes."""


class PortTaken(MachineError):
    """Another program listens on the port."""


class SlotTaken(MachineError):
    """Another worker runs under this name."""


class DatabaseTooNew(MachineError):
    """The database was written by a newer Headscope."""


class DatabaseTooOld(MachineError):
    """The database must be upgraded first."""


class DatabaseAway(MachineError):
    """The database does not answer."""


class EngineAway(MachineError):
    """The engine does not answer, so live questions cannot be asked."""


class EngineBusy(MachineError):
    """So many questions wait for the engine that one more would only wait."""


class DownloadFailed(MachineError):
    """A package could not be fetched."""


class CacheBusy(MachineError):
    """Another run is filling the activation cache."""


class ProcessLost(MachineError):
    """One of the processes that train together was killed, or died without a word."""


class Overloaded(MachineError):
    """More is asked of the web than it can answer in time."""


class MissingWorkerExtra(MachineError):
    """torch or transformer_lens is not installed here."""


class Diverged(HeadscopeError):
    """Training, or the model it reads, gave values that are not finite; the last good checkpoint is kept."""

    status = 500


class DamagedRow(HeadscopeError):
    """What is stored of an example cannot be read."""

    status = 500


class JobError(HeadscopeError):
    """Something about a job."""


class UnknownJob(JobError):
    """No job of that id."""

    status = 404


class Cancelled(JobError):
    """A person cancelled the job, or the question to the engine."""


class Fenced(JobError):
    """Another worker has taken the job over; whatever this one still does must not count."""


class TimeUp(JobError):
    """The job has worked for longer than it may."""


class Outdated(HeadscopeError):
    """Somebody else changed it meanwhile, so what was asked for was not done."""

    status = 409


class LoginNeeded(HeadscopeError):
    """Only somebody with an account may do this, and nobody knows who asks."""

    status = 401


class Forbidden(HeadscopeError):
    """Whoever asks may not do this."""

    status = 403


class TooOften(HeadscopeError):
    """It was asked so often that it has to wait."""

    status = 429

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait
        """Seconds until it may be asked again."""


class NotFound(HeadscopeError):
    """There is nothing at that address."""

    status = 404


class Renamed(NotFound):
    """It has another name now; a page's old address leads to the new one."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(f"{old} is called {new} now.", field="sae")
        self.old, self.new = old, new
