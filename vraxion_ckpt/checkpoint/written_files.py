"""Stub until the writers arrive."""

from contextlib import contextmanager


class WrittenFiles:
    def crc(self, file, start, nbytes):
        return None


@contextmanager
def recording():
    yield WrittenFiles()
