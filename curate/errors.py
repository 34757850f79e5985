"""Everything `curate` raises on purpose.

::

    CurateError                 any of the below; `exit_code` is what the command line returns
    ├── UsageError (2)          the request cannot be carried out as it stands
    │   ├── ConfigError         a pipeline, a `--set` or an option does not hold
    │   ├── InputError          an input is missing, unreadable or of an unknown layout
    │   └── OutputError         OUT is taken, locked, not ours or not writable
    ├── LimitExceededError (3)  an audit measured more than was allowed
    └── RunError (1)            the run began and could not end well
        ├── MissingWeightsError an encoder's weights cannot be had here
        ├── PluginError         a score plug-in does not load or does not score
        ├── SourceChangedError  a source no longer holds the bytes that were indexed
        ├── AlignmentError      side tables do not hold the same samples in the same order
        ├── ReconcileError      kept + dropped is not what was ingested
        ├── StorageError        a file could not be written or read (disk full, permission)
        ├── WorkerError         workers died, or are not fit for the run
        └── NothingKeptError    every sample was dropped

A message reads *where: what must hold; got what; do what* and fits one line.
"""

__all__ = [
    "AlignmentError",
    "ConfigError",
    "CurateError",
    "InputError",
    "LimitExceededError",
    "MissingWeightsError",
    "NothingKeptError",
    "OutputError",
    "PluginError",
    "ReconcileError",
    "RunError",
    "SourceChangedError",
    "StorageError",
    "UsageError",
    "WorkerError",
]


class CurateError(Exception):
    """Base of all errors that are shown to a user as one line."""

    exit_code = 1


class UsageError(CurateError):
    """The request cannot be carried out as it stands."""

    exit_code = 2


class ConfigError(UsageError):
    """A pipeline, a `--set` or an option does not hold."""


class InputError(UsageError):
    """An input is missing, unreadable or of an unknown layout."""


class OutputError(UsageError):
    """OUT is taken, locked, not ours or not writable."""


class LimitExceededError(CurateError):
    """An audit measured more than was allowed."""

    exit_code = 3


class RunError(CurateError):
    """The run began and could not end well."""


class MissingWeightsError(RunError):
    """An encoder's weights cannot be had here."""


class PluginError(RunError):
    """A score plug-in does not load or does not score."""


class SourceChangedError(RunError):
    """A source no longer holds the bytes that were indexed."""


class AlignmentError(RunError):
    """Side tables do not hold the same samples in the same order."""


class ReconcileError(RunError):
    """Kept + dropped is not what was ingested."""


class StorageError(RunError):
    """A file could not be written or read."""


class WorkerError(RunError):
    """Workers died, or are not fit for the run."""


class NothingKeptError(RunError):
    """Every sample was dropped."""
