"""Compare a result that was read back with what was to be written.

The writers read each piece that they have written back from the target, and compute its CRC-32
(`vraxion_ckpt.checkpoint.written_files`). So most bytes need not be read again here: equal checksums prove that the
target has the bytes of the source. Names, dtypes, shapes and small values are compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from vraxion_ckpt.checkpoint.comparison import alike, checkpoint_differences, in_threads, same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.checkpoint.written_files import WrittenFiles


def read_back_differences(expected: Checkpoint, found: Checkpoint, written: WrittenFiles) -> Iterator[str]:
    """Yield one line for each difference between two checkpoints.

    A source part whose stated checksum is confirmed by its copy is marked as proven.

    Args:
        expected: the checkpoint that was written.
        found: the checkpoint that was read back.
        written: the checksums that the writers have read back.
    """
    pairs: dict[tuple[int, int], tuple[TensorRef, TensorRef]] = {}

    def postpone(x: TensorRef, y: TensorRef) -> bool:
        if not alike(x, y):
            return False
        if not _has_checksum_of(x, y, written):
            pairs[id(x), id(y)] = x, y
        return True

    others = list(checkpoint_differences(expected, found, same=postpone))
    verdicts = dict(zip(pairs, in_threads(same_bits, list(pairs.values())), strict=True))
    same = verdicts.values()
    if others or not all(same):  # repeat, to yield the differences in order

        def judged(x: TensorRef, y: TensorRef) -> bool:
            return verdicts[id(x), id(y)] if (id(x), id(y)) in verdicts else is_copy(x, y, written)

        yield from checkpoint_differences(expected, found, same=judged)


def is_copy(x: TensorRef, y: TensorRef, written: WrittenFiles) -> bool:
    """Return whether `y`, read from a written file, has the type, dtype, shape and bytes of `x`."""
    return alike(x, y) and (_has_checksum_of(x, y, written) or same_bits(x, y))


def _has_checksum_of(x: TensorRef, y: TensorRef, written: WrittenFiles) -> bool:
    """Return whether the bytes of `y` were read back and have the checksum of those of `x`."""
    source, target = x.storage, y.storage
    known = source.known_crc if isinstance(source, StoredBytes) else source.crc
    if known is None or not isinstance(target, StoredBytes) or not (x.fills_storage() and y.fills_storage()):
        return False
    read_back = written.crc(target.file, target.start, target.nbytes)
    if read_back is None:
        return False
    target.proven = target.crc == read_back
    if known != read_back:
        return False
    if isinstance(source, StoredBytes):
        source.proven = True
    return True
