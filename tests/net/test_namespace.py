"""The ground of this tier itself: a namespace with nothing in it but what a test makes."""

from __future__ import annotations

import subprocess


def test_there_is_the_loopback_device_alone() -> None:
    listed = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert [line.split(": ")[1] for line in listed.splitlines()] == ["lo"]
