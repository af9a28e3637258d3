"""Write torch files: the archive that ``torch.save`` would write, with storages copied from file to file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeGuard

from vraxion_ckpt.checkpoint.plain_data import check_plain
from vraxion_ckpt.checkpoint.references import Storage, as_written
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.checkpoint.written_files import note_written
from vraxion_ckpt.errors import StorageError, UsageError, raise_if_out_of_memory
from vraxion_ckpt.formats.pickle_writer import Pickled, pickled
from vraxion_ckpt.formats.storage_writer import Placement, write_storages
from vraxion_ckpt.formats.zip_layout import ALIGNMENT, NewMember, directory, directory_size, lay_out
from vraxion_ckpt.support import progress, signals
from vraxion_ckpt.support.checksums import crc32
from vraxion_ckpt.support.file_bytes import write_at
from vraxion_ckpt.support.file_copy import OpenFile, can_share_blocks

_PREFIX = "archive"
_IDENTITY = ".data/serialization_id"
_IDENTITY_SIZE = 40
_LEAST_SHARED = 2**20  # bytes; smaller storages are copied, so that padding adds at most 0.4 %
_FEW_BYTES = 2**16  # of a member that is copied, so that it is written together with others


def save_torch_file(value: Any, path: Path) -> None:
    """Write plain data to a new file that ``torch.load`` can read. Bytes of source files are copied from file to file.

    The file has the bytes that ``torch.save`` writes to a file object, except for the serialization id, and for one of
    the sizes in the local header of a member of 4 GiB or more, which torch leaves 0. The name inside the archive does
    not depend on `path`, so equal data gives equal bytes. One exception: where the file system lets the file share
    blocks with a source file, padding of up to 4 KiB before each large storage makes them share its blocks.

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
    content = _checked_pickle(value)
    try:
        with (
            path.open("x+b", buffering=0) as file,
            progress.progress_bar("writing", sum(storage.nbytes for storage in content.storages)) as advance,
            signals.deferred(),
        ):
            target = OpenFile(file.fileno(), path)
            archive = _Archive(content, _offsets_to_share(content.storages, target))
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
    content = _checked_pickle(value)
    return _Archive(content, [None] * len(content.storages)).size


def _checked_pickle(value: Any) -> Pickled:
    check_plain(value)
    return pickled(value)


def _offsets_to_share(storages: Sequence[Storage], target: OpenFile) -> list[int | None]:
    """Return the offset of each storage in its source file, or None if the empty target can share no blocks with it."""
    shares: dict[int, bool] = {}  # by the device of the source

    def is_shared(storage: Storage) -> TypeGuard[StoredBytes]:
        if not isinstance(storage, StoredBytes) or storage.given is not None or storage.nbytes < _LEAST_SHARED:
            return False
        device = storage.file.fingerprint.device
        if device not in shares:
            with storage.file.opened() as descriptor:
                shares[device] = can_share_blocks(OpenFile(descriptor, storage.file.path), target)
        return shares[device]

    return [storage.start if is_shared(storage) else None for storage in storages]


class _Archive:
    """What is to be written, and where.

    Attributes:
        storages: the storages, by their number in the pickle.
        storage_members: the member of each storage.
        size: the size of the file.
    """

    def __init__(self, content: Pickled, offsets_to_share: Sequence[int | None]) -> None:
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
            *((name, len(content), None) for name, content in before.items()),
            *(
                (f"data/{key}", storage.nbytes, offset)
                for key, (storage, offset) in enumerate(zip(self.storages, offsets_to_share, strict=True))
            ),
            *((name, len(content), None) for name, content in after.items()),
            (_IDENTITY, _IDENTITY_SIZE, None),
        ]
        self._members = lay_out((f"{_PREFIX}/{name}", size, offset) for name, size, offset in sizes)
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
