"""Compare a result that was read back with what was to be written.

The writers read each piece that they have written back from the target, and compute its CRC-32
(`vraxion_ckpt.checkpoint.written_files`). So most bytes need not be read again here: equal checksums prove that the
target has the bytes of the source. Names, dtypes, shapes and small values are compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from vraxion_ckpt.checkpoint.comparison import alike, checkpoint_differences, in_threads, same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.references import StoredBytes, TensorRef
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
        if alike(x, y):
            pairs[id(x), id(y)] = x, y
            return True
        return False

    others = list(checkpoint_differences(expected, found, same=postpone))
    same = in_threads(lambda x, y: is_copy(x, y, written), list(pairs.values()))
    verdicts = dict(zip(pairs, same, strict=True))
    if others or not all(same):  # repeat, to yield the differences in order

        def judged(x: TensorRef, y: TensorRef) -> bool:
            return verdicts[id(x), id(y)] if (id(x), id(y)) in verdicts else is_copy(x, y, written)

        yield from checkpoint_differences(expected, found, same=judged)


def is_copy(x: TensorRef, y: TensorRef, written: WrittenFiles) -> bool:
    """Return whether `y`, read from a written file, has the type, dtype, shape and bytes of `x`."""
    if not alike(x, y):
        return False
    if x.fills_storage() and y.fills_storage() and isinstance(y.storage, StoredBytes):
        read_back = written.crc(y.storage.file, y.storage.start, y.storage.nbytes)
        if read_back is not None and x.storage.crc is not None:
            y.storage.proven = y.storage.crc == read_back
            if x.storage.crc == read_back:
                if isinstance(x.storage, StoredBytes):
                    x.storage.proven = True
                return True
    return same_bits(x, y)
