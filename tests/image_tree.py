"""Versions as the builder leaves them, of files that could not boot: for tests of the store, and for the
test host with stand-in VMs.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from vmsilo_image import store

if TYPE_CHECKING:
    from pathlib import Path

FIRST, SECOND, THIRD, FOURTH = (f"2026010{day}T000000Z-0000000{day}" for day in range(1, 5))
RECIPE = {"suite": "trixie", "compression": "lz4", "packages": ["foot"], "files": {}}


def version_files(version: str, files: dict[str, bytes], **facts: Any) -> dict[str, bytes]:
    """With the packages and the manifest that go with them."""
    packages = facts.pop("packages", {"foot": "1.0"})
    whole = {**files, "packages.json": json.dumps(packages).encode()}
    manifest = {
        "version": version,
        "built": f"{version[:4]}-{version[4:6]}-{version[6:8]}T00:00:00+00:00",
        "packages": len(packages),
        "recipe": RECIPE,
        **facts,
        "sizes": {name: len(data) for name, data in whole.items()},
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in whole.items()},
    }
    return {**whole, "manifest.json": json.dumps(manifest).encode()}


def make_version(images: Path, name: str, version: str, root: bytes = b"root", **facts: Any) -> Path:
    """Published as a build publishes it; current from here on."""
    files = {"root.erofs": root + version.encode(), "vmlinuz": b"kernel", "initrd": b"initrd"}
    with store.private_build(images) as work:
        ready = work / "out"
        ready.mkdir()
        for file, data in version_files(version, files, **facts).items():
            (ready / file).write_bytes(data)
        return store.publish(images, name, ready, version)
