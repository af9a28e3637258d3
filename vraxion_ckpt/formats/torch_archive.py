"""Check the zip archive of a ``.pt`` file before its pickle is read.

A ``.pt`` file is a zip archive of uncompressed members: ``<prefix>/data.pkl``, a pickle of the structure, and
``<prefix>/data/<key>``, one raw storage each (see ``torch/serialization.py``). ``torch.load`` trusts the archive: it
skips all checksums, and one flag of a member makes it return uninitialised memory. This module checks names, flags,
sizes, overlaps, checksums of small members, and that local headers agree with the directory. The checksums of storages
are verified when their bytes are copied or used. Imports without torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vraxion_ckpt.checkpoint.source_files import Fingerprint
from vraxion_ckpt.errors import CkptWarning, CorruptError, StorageError, UnsupportedError
from vraxion_ckpt.formats.zip_directory import Member, ZipDirectory, opened_bytes
from vraxion_ckpt.support.checksums import crc32
from vraxion_ckpt.wording import count, listed


@dataclass(frozen=True)
class Container:
    """A torch zip archive whose structure was checked.

    Attributes:
        path: the file.
        fingerprint: its fingerprint from before it was read.
        prefix: the name of the folder in the archive that has all members.
        pickled: the bytes of ``data.pkl``.
        storages: the members that are storages, by their keys, in the order of their bytes.
    """

    path: Path
    fingerprint: Fingerprint
    prefix: str
    pickled: bytes
    storages: dict[str, Member]


def check_archive(path: Path) -> Container:
    """Check the archive of a ``.pt`` file, and the checksums of all members that are not storages.

    Raises:
        CorruptError: the file is not a torch archive, or has contradicting, overlapping, duplicate or damaged members.
        UnsupportedError: the file is of an older torch format or TorchScript, is compressed, or is big-endian.
        LimitError: the file has too many members, or a compressed member that is larger than the file.
        StorageError: the file cannot be read.
    """
    if not path.is_file():
        raise CorruptError("is not a regular file", path=path)
    try:
        fingerprint = Fingerprint.of(path)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    with opened_bytes(path) as data:
        _refuse_other_kinds(path, bytes(data[:512]))
        members = ZipDirectory(path, data).members()
        prefix = _check_names(path, members)
        start = f"{prefix}/data/"
        storages = {member.name[len(start) :]: member for member in members if member.name.startswith(start)}
        small = {m.name: bytes(data[m.start : m.start + m.size]) for m in members if not m.name.startswith(start)}
    _check_checksums(path, [(member, small[member.name]) for member in members if member.name in small])
    if small.get(f"{prefix}/byteorder", b"little") != b"little":
        raise UnsupportedError("was saved on a big-endian machine", path=path)
    return Container(path, fingerprint, prefix, small[f"{prefix}/data.pkl"], storages)


def _check_checksums(path: Path, members: Sequence[tuple[Member, bytes]]) -> None:
    unchecked, damaged = 0, []
    for member, content in members:
        if member.crc == 0 and content:
            unchecked += 1
        elif crc32(content) != member.crc:
            damaged.append(member.name)
    if damaged:
        others = f"; the same holds for {listed(damaged[1:])}" if damaged[1:] else ""
        raise CorruptError(f"its checksum does not match its bytes{others}", path=path, key=damaged[0])
    if unchecked:
        some = f"{count(unchecked, 'member')} without a checksum"
        warnings.warn(f"{path}: has {some}, so damage to these bytes cannot be detected", CkptWarning, stacklevel=2)


def is_archive(path: Path) -> bool:
    """Tell whether a path is a regular file that begins like a torch archive, whose first member is the pickle."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(30)
            name = file.read(int.from_bytes(head[26:28], "little"))
    except OSError:
        return False
    return head.startswith(b"PK\x03\x04") and name.endswith(b"/data.pkl")


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        return
    resave = "load it with the version of torch that wrote it, and save it again with torch.save"
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        raise UnsupportedError("is in torch's format from before 1.6", path=path, hint=resave)
    if head[257:262] == b"ustar":
        raise UnsupportedError("is in torch's oldest format, a tar archive", path=path, hint=resave)
    if head.startswith(b"version https://git-lfs"):
        raise CorruptError("is a git-lfs pointer, not the file itself", path=path, hint="run `git lfs pull`")
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        raise CorruptError("is a web page, not a checkpoint", path=path, hint="download the file itself")
    if head.startswith(b"\x80"):
        raise UnsupportedError("is a bare pickle, which torch.save does not write", path=path, hint=resave)
    raise CorruptError("is not a torch archive", path=path)


def _check_names(path: Path, members: Sequence[Member]) -> str:
    """Check that the archive has one ``data.pkl``, and that all members have its prefix. Return the prefix."""
    pickles = [member.name for member in members if member.name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise CorruptError(f"has {len(pickles)} members called data.pkl; there must be one", path=path)
    prefix = pickles[0].removesuffix("/data.pkl")
    for member in members:
        if not member.name.startswith(f"{prefix}/"):
            raise CorruptError(f"is not inside {prefix}/", path=path, key=member.name)
        if member.name.startswith((f"{prefix}/code/", f"{prefix}/constants.pkl")):
            hint = "save the module's state_dict() with torch.save"
            raise UnsupportedError("is a TorchScript archive", path=path, hint=hint)
    return prefix
