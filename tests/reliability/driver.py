"""Do one edit with the commit layer alone, without torch, from prepared files; run as a child process under strace.

usage: driver.py TARGET NEW CHANGE, with NEW a copy of the new state and CHANGE as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.file_marks import survey
from vraxion_ckpt.commit.journal import FileChanges
from vraxion_ckpt.commit.staging import exclusive, staged
from vraxion_ckpt.errors import CkptError

target, new = Path(sys.argv[1]), Path(sys.argv[2])
facts = json.loads(sys.argv[3])
change = FileChanges(facts["exchanged"], tuple(facts["first"]), tuple(facts["later"]), tuple(facts["removed"]))
assert "torch" not in sys.modules
try:
    with exclusive(target):
        marks = survey(target)
        with staged(target, directory=target.is_dir(), overwrite=True, change=change) as stage:
            for file in sorted(file for file in (new, *new.rglob("*")) if file.is_file()):
                name = file.relative_to(new)
                content = file.read_bytes()
                (stage.path / name).parent.mkdir(parents=True, exist_ok=True)
                if not (target / name).exists() or (target / name).read_bytes() != content:
                    system_calls.write_new(stage.path / name, content)
                elif change.exchanged == ".":
                    system_calls.link_or_copy(target / name, stage.path / name)
            stage.publish(watched=marks)
except CkptError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(error.exit_code)
