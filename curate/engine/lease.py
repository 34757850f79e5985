"""Hold an OUT on an object store by a lock that must be renewed: killed processes release none.

The lock is an object that only one can create (a conditional put). Its holder rewrites it again and
again; who finds one waits whether it changes, so that no clocks are compared. A holder that hung
for long may lose it: two runs then write the same files, each whole, and the first says so.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curate import storage
from curate.errors import CurateError, OutputError

__all__ = ["hold"]

_log = logging.getLogger(__name__)

#: How often a lock is renewed, and after how many times without it is thought to be left behind.
_BEAT_SECONDS = 10.0
_PATIENCE = 3


@contextlib.contextmanager
def hold(url: str, where: str, holds: str) -> Iterator[None]:
    """Hold the lock at `url`; a store without conditional puts is used without one.

    Parameters
    ----------
    where, holds : str
        OUT and what it is held for, for messages.

    Raises
    ------
    OutputError
        If another process holds it, or took it meanwhile.
    """
    own = {"id": uuid.uuid4().hex, "host": _host(), "pid": os.getpid(), "beat": 0}
    try:
        _take(url, own, where, holds)
    except NotImplementedError:
        _log.warning("%s: its store has no locks: see that no other %s uses it", where, holds)
        yield
        return
    over, is_own = threading.Event(), True
    beats = threading.Thread(target=_renew, args=(url, own, over), daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()
        # What went wrong in the block is what the user must be told.
        with contextlib.suppress(CurateError):
            is_own = _read(url).get("id", own["id"]) == own["id"]
            if is_own:
                storage.remove(url)
    if not is_own:
        raise OutputError(
            f"{where}: must not be in use; another {holds} took it while this one hung. Run the "
            "same command again."
        )


def _take(url: str, own: dict[str, Any], where: str, holds: str) -> None:
    if _create(url, own):
        return
    if not _is_alive(url, _read(url)):
        _log.warning("%s: had been left locked by a %s that ended early", where, holds)
        storage.remove(url)
        if _create(url, own):
            return
    raise OutputError(
        f"{where}: must not be in use; another {holds} holds it. Wait for it, or choose another "
        "--output."
    )


def _create(url: str, own: dict[str, Any]) -> bool:
    # A put that the store carried out but did not confirm was tried again, and found itself.
    return storage.create_json(url, own) or _read(url).get("id") == own["id"]


def _host() -> str:
    """Name the machine, or the part of it, in which a process number means one process."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()}/{os.readlink(space) if space.is_symlink() else ''}"


def _read(url: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_bytes(url))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(url: str, found: dict[str, Any]) -> bool:
    """Tell whether the holder of a lock is at work; it may take some beats to know."""
    if found.get("host") == _host() and not _runs(found.get("pid")):
        return False
    pause = threading.Event()
    for _ in range(2 * _PATIENCE):
        pause.wait(_BEAT_SECONDS / 2)
        if _read(url) != found:
            return True
    return False


def _runs(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _renew(url: str, own: dict[str, Any], over: threading.Event) -> None:
    while not over.wait(_BEAT_SECONDS):
        # A store that does not answer is the run's trouble, and told there.
        with contextlib.suppress(CurateError, OSError):
            if _read(url).get("id", own["id"]) != own["id"]:
                _log.warning("%s: another process took the lock", url)
                return
            own = {**own, "beat": own["beat"] + 1}
            storage.commit_json(url, own)
