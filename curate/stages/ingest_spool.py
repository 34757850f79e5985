"""Remote tars on a local disk between their index and their decode, so that each is read once.

`ingest` has to read a remote tar from end to end for its headers. What it reads is kept here as far
as there is room, and `embed` finds it. A copy that is not there, on this machine or any more, is
read from the store: whoever removes one costs time and nothing else.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from curate import storage
from curate.formats.sources import Source, open_binary

__all__ = ["Spool", "open_spool"]

_log = logging.getLogger(__name__)

#: Within OUT, or by run among what others keep for a while.
_OWN, _SHARED = ".spool", "curate-spool-"
#: How much copies may take of what their disk would have free without them.
_FREE_SHARE = 1 / 4
_BLOCK_BYTES = 16 << 20
#: Copies that no run asked for in so long are those of a killed one.
_STALE_SECONDS = 86_400


@dataclass(frozen=True)
class Spool:
    """Copies of one run's remote tars.

    Parameters
    ----------
    folder : str
        On a local disk; made with the first copy.
    index : str
        Fingerprint of the index, and with it of the sources' content: a copy is never stale.
    limit_bytes : int
        What all copies may take together; never more than a quarter of the disk's free space.
    """

    folder: str
    index: str
    limit_bytes: int

    def find(self, name: str) -> str | None:
        """Return the path of a source's copy, if there is one here."""
        path = self._path(name)
        if not (self._is_own() and path.is_file()):
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder)
        return str(path)

    def fetch(self, source: Source) -> str | None:
        """Copy a source, in requests of 16 MiB; return the path, None if there is no room for it.

        Raises
        ------
        SourceChangedError
            If it is gone.
        StorageError
            If its store cannot be reached.
        """
        path = self._path(source.name)
        temporary = path.with_name(storage.TEMPORARY_PREFIX + path.name)
        if self.limit_bytes <= 0 or path.is_file():
            return self.find(source.name)
        try:
            self._make_folder()
            if not self._reserve(temporary, source.size_bytes):
                return None
            with open_binary(source.url, 0) as file:
                # Of some servers' files the size is known only now.
                if not self._reserve(temporary, file.seek(0, os.SEEK_END)):
                    return None
                file.seek(0)
                with temporary.open("r+b") as copy:
                    while block := file.read(_BLOCK_BYTES):
                        copy.write(block)
                    copy.truncate()
            temporary.replace(path)
        except OSError as error:  # of the disk: what the store says comes as an error of ours
            _log.warning("%s: cannot be kept in %s: %s", source.name, self.folder, error)
            return None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return str(path)

    def clear(self) -> None:
        """Remove all copies of this run on this machine."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(f"{self.index}/{name}".encode(), digest_size=16).hexdigest()
        return Path(self.folder, f"{digest}.tar")

    def _is_own(self) -> bool:
        """Tell whether the folder is this user's: among temporary files it may be anybody's."""
        try:
            found = os.lstat(self.folder)
        except OSError:
            return False
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()

    def _make_folder(self) -> None:
        folder = Path(self.folder)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            _clear_stale(folder.parent)
        if not self._is_own():
            raise PermissionError(f"{self.folder} is another user's")

    def _reserve(self, temporary: Path, size_bytes: int) -> bool:
        """Set room aside before it is used, so that workers do not promise the same room twice."""
        with temporary.open("ab") as file:
            file.truncate(size_bytes)
        used = allocated = 0
        for one in Path(self.folder).iterdir():
            with contextlib.suppress(FileNotFoundError):
                found = one.stat()
                used += found.st_size
                allocated += found.st_blocks * 512
        free = shutil.disk_usage(self.folder).free + allocated
        return used <= min(self.limit_bytes, int(_FREE_SHARE * free))


def open_spool(index: str, folder: str | None, limit_gb: float) -> Spool:
    """Return the copies that belong to an index.

    Parameters
    ----------
    index : str
        Folder of the index, in OUT's `stages`.
    folder : str or None
        Where copies are kept; None: in OUT where that is on a disk, which all workers see, else
        among the machine's temporary files.
    limit_gb : float
        GB that they may take together; 0: none are kept.
    """
    out, _, name = index.rpartition("/stages/")
    place = storage.filesystem(out)[1]
    if folder is None and storage.is_local(out):
        own = os.path.join(place, _OWN)
    else:
        run = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
        own = os.path.join(folder or tempfile.gettempdir(), _SHARED + run)
    return Spool(own, name.rpartition("-")[2], int(limit_gb * 1e9))


def _clear_stale(parent: Path) -> None:
    """Remove what killed runs left among the machine's temporary files."""
    for folder in parent.glob(f"{_SHARED}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
