"""Run Python in a fork of a process that has imported torch.

Importing torch takes seconds, longer than most calls. A fork runs the same code with the caller's arguments,
environment and open files. Tests about starting a process, signals or closed streams need a real process.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pkgutil
import select
import site
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

COMMAND = ("-m", "vraxion_ckpt.cli")

_CALLER = """\
#!{python} -SE
import json, os, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({place!r})
arguments = [*{before!r}, *sys.argv[1:]]
call = {{"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "packages": {packages!r}}}
server.sendall(b"%16d" % len(json.dumps(call)))
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(json.dumps(call).encode())
sys.exit(int(server.recv(16) or 70))
"""


@cache
def _server() -> Path:
    """Start the process that forks. Return the folder of its socket."""
    folder = tempfile.TemporaryDirectory(prefix="forked")
    place = Path(folder.name)
    process = subprocess.Popen(
        [sys.executable, __file__, place / "socket"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    def stop() -> None:
        process.communicate()  # closes its input
        folder.cleanup()

    atexit.register(stop)
    return place


@cache
def python() -> str:
    """Return a command that takes ``-c SCRIPT`` or ``-m vraxion_ckpt.cli``, and arguments, as Python does."""
    return str(_write(_server() / "python", (), None))


def install(command: Path, packages: Path) -> None:
    """Write a ``vraxion-ckpt`` script that sees the packages of the given environment and of this one."""
    _write(command, COMMAND, packages)


def _write(caller: Path, before: Sequence[str], packages: Path | None) -> Path:
    seen = str(packages) if packages else None
    place = str(_server() / "socket")
    caller.write_text(_CALLER.format(python=sys.executable, place=place, before=before, packages=seen))
    caller.chmod(0o755)
    return caller


def _serve(place: str) -> None:
    import vraxion_ckpt_adapters
    import vraxion_ckpt_transforms

    import vraxion_ckpt

    for package in (vraxion_ckpt, vraxion_ckpt_adapters, vraxion_ckpt_transforms):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") and ".testing" not in module.name:
                importlib.import_module(module.name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    os.write(1, b"ready\n")
    running = set()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # the process that started this has ended
            return
        caller, _ = listener.accept()
        child = os.fork()
        if child == 0:
            break
        caller.close()
        # Waiting for them also adds their time to that of the tests.
        running = {process for process in {*running, child} if os.waitpid(process, os.WNOHANG)[0] == 0}
    listener.close()
    size = int(_received(caller, 16))
    _, files, _, _ = socket.recv_fds(caller, 1, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    call = json.loads(_received(caller, size))
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.path[:1] = filter(None, os.environ.get("PYTHONPATH", "").split(":"))  # not the folder of this file
    if call["packages"]:
        site.addsitedir(call["packages"])
    code: object = 1
    try:
        _run(call["arguments"])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        caller.sendall(str(code).encode())
        os._exit(0)


def _received(caller: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += caller.recv(size - len(received))
    return received


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        from vraxion_ckpt.cli import main

        assert tuple(arguments[:2]) == COMMAND
        main(arguments[2:])


if __name__ == "__main__":
    _serve(sys.argv[1])
