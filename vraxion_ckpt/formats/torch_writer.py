"""Write torch files: the archive that ``torch.save`` would write, with storages copied from file to file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint.plain_data import check_plain
from vraxion_ckpt.checkpoint.references import Storage, as_written
from vraxion_ckpt.checkpoint.written_files import note_written
from vraxion_ckpt.errors import StorageError, UsageError, raise_if_out_of_memory
from vraxion_ckpt.formats.pickle_writer import pickled
from vraxion_ckpt.formats.storage_writer import Placement, write_storages
from vraxion_ckpt.formats.zip_layout import ALIGNMENT, NewMember, directory, directory_size, lay_out
from vraxion_ckpt.support import progress, signals
from vraxion_ckpt.support.checksums import crc32
from vraxion_ckpt.support.file_bytes import write_at
from vraxion_ckpt.support.file_copy import OpenFile

_PREFIX = "archive"
_IDENTITY = ".data/serialization_id"
_IDENTITY_SIZE = 40
_FEW_BYTES = 2**16  # of a member that is copied, so that it is written together with others


def save_torch_file(value: Any, path: Path) -> None:
    """Write plain data to a new file that ``torch.load`` can read. Bytes of source files are copied by the kernel.

    The file has the bytes that ``torch.save`` writes to a file object, except for the serialization id, and for one of
    the sizes in the local header of a member of 4 GiB or more, which torch leaves 0. The name inside the archive does
    not depend on `path`, so equal data gives equal bytes.

    Args:
        value: plain data with `torch.Tensor`s, references to tensors, or both.
        path: the file.

    Raises:
        UsageError: the name of the file ends in ``.safetensors``, which torch would read as another format.
        UnsupportedError: `value` is not plain data.
        CorruptError: a source file is damaged. The error names the file and the part.
        ChangedError: a source file was replaced, written to or removed.
        StorageError: the file cannot be written, or it differs when it is read back.
    """
    if path.name.endswith(".safetensors"):
        raise UsageError(
            "torch would read a file of this name as safetensors", path=path, hint="use a name that ends in .pt"
        )
    archive = _Archive(value)
    try:
        with (
            path.open("x+b", buffering=0) as file,
            progress.progress_bar("writing", sum(storage.nbytes for storage in archive.storages)) as advance,
            signals.deferred(),
        ):
            target = OpenFile(file.fileno(), path)
            file.truncate(archive.size)
            crcs = write_storages(archive.placements(), target, advance)
            archive.write_around(target, crcs)
            starts = [(member.start, member.size) for member in archive.storage_members]
            note_written(file.fileno(), dict(zip(starts, crcs, strict=True)))
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except RuntimeError as error:
        raise_if_out_of_memory(error, path)
        raise


def torch_file_size(value: Any) -> int:
    """Return how many bytes `save_torch_file` would write.

    Raises:
        UnsupportedError: `value` is not plain data.
    """
    return _Archive(value).size


class _Archive:
    """What is to be written, and where.

    Attributes:
        storages: the storages, by their number in the pickle.
        storage_members: the member of each storage.
        size: the size of the file.
    """

    def __init__(self, value: Any) -> None:
        check_plain(value)
        content = pickled(value)
        self.storages: Sequence[Storage] = content.storages
        before = {
            "data.pkl": content.content,
            ".format_version": b"1",
            ".storage_alignment": str(ALIGNMENT).encode(),
            "byteorder": b"little",
        }
        after = {"version": b"3\n"}
        self._contents = {f"{_PREFIX}/{name}".encode(): content for name, content in (before | after).items()}
        sizes = [
            *((name, len(content)) for name, content in before.items()),
            *((f"data/{key}", storage.nbytes) for key, storage in enumerate(self.storages)),
            *((name, len(content)) for name, content in after.items()),
            (_IDENTITY, _IDENTITY_SIZE),
        ]
        self._members = lay_out((f"{_PREFIX}/{name}", size) for name, size in sizes)
        self.storage_members = self._members[len(before) :][: len(self.storages)]
        self.size = self._members[-1].end + directory_size(self._members)

    def placements(self) -> list[Placement]:
        """Return where the storages go."""
        return [
            Placement(as_written(storage), 0, storage.nbytes, member.start)
            for storage, member in zip(self.storages, self.storage_members, strict=True)
        ]

    def write_around(self, target: OpenFile, storage_crcs: Sequence[int]) -> None:
        """Write all but the storages, whose CRC-32s are given."""
        crcs = {member.name: crc for member, crc in zip(self.storage_members, storage_crcs, strict=True)}
        crcs |= {name: crc32(content) for name, content in self._contents.items()}
        known = self._members[:-1]
        identity = _identity(known, [crcs[member.name] for member in known])
        last = self._members[-1].name
        contents = self._contents | {last: identity}
        crcs[last] = crc32(identity)
        start, pending = 0, bytearray()
        for member in self._members:
            pending += member.header()
            content = contents.get(member.name)
            if content is not None and len(content) <= _FEW_BYTES:
                pending += content
            elif member.size:
                write_at(target.descriptor, start, pending, target.path)
                start, pending = member.start + member.size, bytearray()
                if content is not None:
                    write_at(target.descriptor, member.start, content, target.path)
            pending += member.descriptor(crcs[member.name])
        pending += directory(self._members, [crcs[member.name] for member in self._members])
        write_at(target.descriptor, start, pending, target.path)


def _identity(members: Iterable[NewMember], crcs: Iterable[int]) -> bytes:
    """Return 40 digits that identify the data. Those of torch depend on the C++ library, and nothing reads them."""
    data = b"".join(b"%s\0%d\0" % (member.name, crc) for member, crc in zip(members, crcs, strict=True))
    return b"%040d" % int.from_bytes(blake2b(data, digest_size=16).digest())
