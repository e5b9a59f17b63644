"""The polkit rule for the configured user: its text, and the file that polkitd reads.

polkit's rules cannot read vmsilo.toml, so vmsilod writes the user's name into one. Called when a
configuration has been loaded. It never touches another file of that directory.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from vmsilod.errors import Failed

# Version 122 of polkit reads /etc and /usr/share only; /run came with 126.
RULES_PATH = Path("/etc/polkit-1/rules.d/50-vmsilo.rules")

# The same text as polkit/50-vmsilo.rules.in, which is there for people and packages; a test compares them.
TEMPLATE = """\
// Written by vmsilod from the user named in vmsilo.toml, and again whenever that changes: do not edit.
// To decide otherwise, put a rule into a file that sorts before this one, such as 40-vmsilo.rules.
// The rest falls to the defaults of org.vmsilo1.policy. action.lookup("vm") is the name of the VM.
polkit.addRule(function (action, subject) {
    if (subject.user !== @user@) {
        return polkit.Result.NOT_HANDLED;
    }
    switch (action.id) {
    case "org.vmsilo1.view":
    case "org.vmsilo1.start":
    case "org.vmsilo1.stop":
    case "org.vmsilo1.kill":
    case "org.vmsilo1.run":
        return polkit.Result.YES;
    // Root of the user's own guest is no privilege on the host.
    case "org.vmsilo1.run-as-root":
        return polkit.Result.YES;
    // Host devices in the user's own VMs; what the host itself uses is refused to anybody.
    case "org.vmsilo1.manage-devices":
        return polkit.Result.YES;
    // Disposables have no more network than their template, and of directories what the user himself has.
    case "org.vmsilo1.create-disposable":
    case "org.vmsilo1.share-directory":
        return polkit.Result.YES;
    // Larger disks for the user's own VMs, and an end of what they keep.
    case "org.vmsilo1.manage-disks":
        return polkit.Result.YES;
    }
    return polkit.Result.NOT_HANDLED;
});
"""


def render_rules(user: str) -> str:
    """The rule that lets `user` and nobody else act without a password."""
    if not user:
        raise ValueError("a rule needs the name of a user")
    # JSON with ASCII only is a JavaScript string literal, whatever is in the name.
    return TEMPLATE.replace("@user@", json.dumps(user, ensure_ascii=True))


def write_rules(text: str, path: Path = RULES_PATH) -> bool:
    """Replace the rule file atomically if its content differs; says whether it did. Blocks for a disk write.

    polkitd runs as a user of its own and owns the directory, so the file is readable by all.
    """
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return False
        # polkitd takes files that end in ".rules", so never the unfinished one.
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=".", delete=False
        ) as new:
            try:
                new.write(text)
                new.flush()
                os.fchmod(new.fileno(), 0o644)
                os.fsync(new.fileno())
                Path(new.name).replace(path)
            except BaseException:
                Path(new.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}") from error
    return True


def remove_rules(path: Path = RULES_PATH) -> None:
    """For a configuration without a user: then only an administrator may act."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise Failed(f"cannot remove {path}: {error.strerror}") from error
