"""Files of vmsilod's state beside one another."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vmsilod.state_file import save_json, temporary_of

if TYPE_CHECKING:
    from pathlib import Path


def test_no_two_files_are_written_by_way_of_the_same_third(tmp_path: Path) -> None:
    """A VM may be called like a file that vmsilod keeps."""
    names = ("hugepages", "hugepages.json", "hugepages.history", "usb-attached", "usb-attached.json")
    files = [tmp_path / name for name in names]
    assert len({temporary_of(file) for file in files}) == len(files)
    for file in files:
        save_json(file, file.name)
    assert [json.loads(file.read_text()) for file in files] == list(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
