"""The command, at hand: a process that has imported everything forks for each call.

To import torch takes longer than most of what a page of the manual does, and it does a dozen things. What is run is
the same; the arguments, the environment and the open files are the caller's.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import site
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_CALLER = """\
#!{python} -SE
import json, os, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({place!r})
call = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ), "packages": {packages!r}}}
socket.send_fds(server, [json.dumps(call).encode()], [0, 1, 2])
sys.exit(int(server.recv(16)))
"""


@cache
def _server() -> str:
    """Start the process that forks, and return the socket that it listens on."""
    folder = tempfile.TemporaryDirectory(prefix="forked")
    place = f"{folder.name}/socket"
    process = subprocess.Popen([sys.executable, __file__, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    def stop() -> None:
        process.kill()
        process.wait()
        folder.cleanup()

    atexit.register(stop)
    return place


def install(command: Path, packages: Path) -> None:
    """Write the command into an environment whose packages it sees beside those of this one."""
    command.write_text(_CALLER.format(python=sys.executable, place=_server(), packages=str(packages)))
    command.chmod(0o755)


def _serve(place: str) -> None:
    from vraxion_ckpt.cli import demo, main  # noqa: F401 - imports torch, and what most commands need

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    os.write(1, b"ready\n")
    while True:
        caller, _ = listener.accept()
        if os.fork() == 0:
            break
        caller.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, files, _, _ = socket.recv_fds(caller, 2**20, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    call = json.loads(text)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    site.addsitedir(call["packages"])
    code: object = 70
    try:
        main(call["arguments"])
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        caller.sendall(str(code).encode())
        os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
