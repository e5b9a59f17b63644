"""vmsilo image list: the real vmsilo-image's versions, with VMs of a stand-in for vmsilod."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_host import ROOT
from image_tree import FIRST, SECOND, THIRD, make_version

pytest.importorskip("jeepney")
from client_host_bus import FakeDaemon, Programs, fake_daemon, message_bus, vm


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    with message_bus(tmp_path) as address:
        yield address


@pytest.fixture
def programs(tmp_path: Path, bus: str) -> Programs:
    """With a vmsilo-image that runs from the tree."""
    program = tmp_path / "lib" / "bin" / "vmsilo-image"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT / 'daemon')!r})\n"
        "from vmsilo_image.__main__ import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    return Programs(tmp_path, bus)


@pytest.fixture
def daemon(bus: str) -> Iterator[FakeDaemon]:
    with fake_daemon(bus) as daemon:
        yield daemon


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for version in (FIRST, SECOND, THIRD):
        make_version(tmp_path / "images", "web", version)
    return tmp_path / "images"


def using(name: str, image: str, version: str = "") -> dict[str, tuple[str, object]]:
    return vm(name, "running" if version else "stopped", Image=("s", image), ImageVersion=("s", version))


def test_who_uses_what(programs: Programs, daemon: FakeDaemon, images: Path) -> None:
    daemon.vms = [
        using("work", "web"),
        using("bank", "web", SECOND),
        using("chat", "web", THIRD),
        using("mail", "post"),
        using("own", "none", "custom"),
    ]
    done = programs("vmsilo", "image", "list", "--images", str(images))
    assert done.returncode == 0, done.stderr
    rows = [[cell for cell in line.split("  ") if cell] for line in done.stdout.decode().splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["IMAGE", "VERSION", "STATE", "DISK", "BUILT", "VMS"]
    assert [(row[1].strip(), row[2].strip(), row[5].strip()) for row in rows[1:4]] == [
        (THIRD, "current", "chat (running), work"),
        (SECOND, "previous", "bank (running)"),
        (FIRST, "-", "-"),
    ]
    assert rows[4] == ["no current version: post, for mail"]
    assert done.stderr == b""
    shown = json.loads(programs("vmsilo", "image", "list", "--json", f"--images={images}").stdout)
    assert shown[0]["vms"] == [{"name": "chat", "running": True}, {"name": "work", "running": False}]
    assert (shown[1]["version"], shown[1]["previous"]) == (SECOND, True)


def test_without_vmsilod_the_versions_are_shown_all_the_same(programs: Programs, images: Path) -> None:
    done = programs("vmsilo", "image", "list", f"--images={images}")
    assert done.returncode == 0
    assert FIRST in done.stdout.decode()
    assert done.stderr == b"vmsilo: the VMs are not shown: vmsilo is not running\n"
    rows = json.loads(programs("vmsilo", "image", "list", f"--images={images}", "--json").stdout)
    assert rows[0]["vms"] is None


def test_other_commands_are_those_of_vmsilo_image(programs: Programs, images: Path, tmp_path: Path) -> None:
    done = programs("vmsilo", "image", "path", "web", f"--images={images}")
    assert done.stdout.decode() == f"{images}/web/{THIRD}\n"
    assert programs("vmsilo", "image", "burn").returncode == 2
    assert programs("vmsilo", "image", "list", "web").returncode == 2
    assert programs("vmsilo", "image").stdout.startswith(b"Usage: vmsilo image ")
    empty = programs("vmsilo", "image", "list", f"--images={tmp_path / 'none'}")
    assert empty.stdout == b"There is no image yet: sudo vmsilo image build default\n"
