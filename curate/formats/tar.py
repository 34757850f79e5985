"""Headers of a tar file, read one after the other and no further than the file is sound.

The standard library's reader is not used for the walk: it takes a broken header for the end of
the archive, keeps every header in memory and, before Python 3.11.14, loops for ever on a negative
size (CVE-2025-8194). Its parser of one header block is used.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["Member", "Walk"]

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 20
_ORDINARY = ord(tarfile.REGTYPE)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file of a tar.

    Parameters
    ----------
    name : str
    offset, size_bytes : int
        Where its bytes lie.
    is_whole : bool
        False if the tar ends before its bytes do.
    """

    name: str
    offset: int
    size_bytes: int
    is_whole: bool


class Walk:
    """Iterate over the plain files of a tar; links, devices and sparse files are passed over.

    Archives that were put one after the other are read to the end.

    Attributes
    ----------
    damage : str or None
        After the loop: why it ended before the tar's end mark; None if the tar is sound.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Member]:
        """Yield the members in order."""
        position, has_end = 0, False
        extra: dict[str, str] = {}
        while True:
            block = self._read(position, _BLOCK)
            plain = _parse_plain(block) if not extra else None
            if plain is not None:
                has_end, data = False, position + _BLOCK
                position = data + -(-plain[1] // _BLOCK) * _BLOCK
                yield Member(plain[0], data, plain[1], data + plain[1] <= self._size)
                if position > self._size:
                    self.damage = f"cut short at byte {self._size}"
                    return
                continue
            if has_end and not any(block) and len(block) < _BLOCK:
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            except tarfile.HeaderError as error:
                if len(block) == _BLOCK and not any(block):
                    position, has_end = position + _BLOCK, True
                    continue
                self.damage = f"{error} at byte {position}" if block else "no end mark"
                return
            has_end = False
            data = position + _BLOCK
            if header.type == tarfile.GNUTYPE_SPARSE:
                data = self._skip_sparse_map(block, data)
            size = _number(extra.get("size"), header.size)
            if size < 0:
                self.damage = f"negative size at byte {position}"
                return
            position = data + (0 if header.type in _WITHOUT_DATA else -(-size // _BLOCK) * _BLOCK)
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX):
                extra |= self._read_extra(header.type, data, size)
                continue
            if header.type in _PLAIN and "sparse" not in extra:
                whole = data + size <= self._size
                yield Member(extra.get("path", header.name), data, size, whole)
            extra = {}
            if position > self._size:
                self.damage = f"cut short at byte {self._size}"
                return

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)  # costs nothing where the buffer has it; to ask where one is does
        return self._file.read(size)

    def _skip_sparse_map(self, block: bytes, data: int) -> int:
        """Return where the data of an old GNU sparse file begins, after its extra headers."""
        is_extended = block[482:483] not in (b"\0", b"")
        while is_extended:
            block = self._read(data, _BLOCK)
            data += _BLOCK
            is_extended = block[504:505] not in (b"\0", b"")
        return data

    def _read_extra(self, kind: bytes, data: int, size: int) -> dict[str, str]:
        """Return what an extension header says about the member that follows."""
        payload = self._read(data, size) if size <= _MAX_NAME_BYTES else b""
        if kind == tarfile.GNUTYPE_LONGLINK:
            return {}
        if kind == tarfile.GNUTYPE_LONGNAME:
            return {"path": payload.split(b"\0", 1)[0].decode("utf-8", "replace")}
        return _parse_pax(payload)


def _parse_plain(block: bytes) -> tuple[str, int] | None:
    """Return name and size from an ordinary header of an ordinary file; None: see for yourself.

    Nearly all are such, and the standard library's parser takes most of a scan's time.
    """
    size, checksum = block[124:135], block[148:154]
    if len(block) < _BLOCK or block[156] != _ORDINARY or block[345] or not block[0]:
        return None
    if block[135] or block[154] or not (size.isdigit() and checksum.isdigit()):
        return None
    try:
        # The checksum is taken with its own eight bytes as blanks.
        if int(checksum, 8) != sum(block) - sum(block[148:156]) + 8 * 32:
            return None
        return block[:100].split(b"\0", 1)[0].decode("utf-8", "replace"), int(size, 8)
    except ValueError:  # 8 or 9
        return None


def _parse_pax(payload: bytes) -> dict[str, str]:
    """Read the records `LENGTH KEY=VALUE` of which POSIX extension headers consist."""
    found: dict[str, str] = {}
    while payload:
        digits = payload[:20].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(payload):
            return found
        name, _, value = payload[len(digits) + 1 : length - 1].partition(b"=")
        if name in (b"path", b"size"):
            found[name.decode()] = value.decode("utf-8", "replace")
        elif name.startswith(b"GNU.sparse."):
            found["sparse"] = "yes"
        payload = payload[length:]
    return found


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else default
