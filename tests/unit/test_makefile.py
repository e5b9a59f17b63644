"""The Makefile's targets: each made once, phony, and those that the documents name are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

REPO = Path(__file__).parents[2]
TEXT = (REPO / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z][a-z-]*):", TEXT, re.MULTILINE)


def test_no_target_is_made_twice() -> None:
    assert sorted(set(TARGETS)) == sorted(TARGETS)
    shown = subprocess.run(["make", "-n", "help"], cwd=REPO, capture_output=True, text=True, check=True)
    assert shown.stderr == ""


def test_every_target_is_phony() -> None:
    (listed,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", TEXT, re.MULTILINE)
    assert sorted(listed.replace("\\", "").split()) == sorted(TARGETS)


def test_documents_name_targets_that_exist() -> None:
    documents = [REPO / "README.md", *(REPO / "docs").glob("**/*.md")]
    named = {
        target
        for document in documents
        for target in re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE)
    }
    assert {"test", "fast", "demo"} <= named
    assert named <= set(TARGETS)
