"""A private bus with the policies of a system bus and our own, an authority on it, the service in a process.

Nothing of the host is touched: polkitd runs in a mount namespace with our action and rule files.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("gi", reason="needs python3-gi")
pytest.importorskip("pydbus", reason="needs python3-pydbus")
pytest.importorskip("jeepney", reason="needs jeepney")

HERE = Path(__file__).parent
TREE = HERE.parent.parent
POLKITD = "/usr/lib/polkit-1/polkitd"
# Users that every system has: nobody stands for the configured user, daemon for another one.
OWNER, STRANGER = 65534, 1

BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
  </policy>
  <include>{ours}</include>
  <!-- The limits that dbus-daemon has by default, written down because tests rely on them. -->
  <limit name="max_replies_per_connection">128</limit>
  <limit name="max_message_unix_fds">16</limit>
</busconfig>
"""

# A mount namespace in which polkitd finds our files only; it changes to its own user by itself.
POLKIT_START = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /usr/share/polkit-1/actions
mount -t tmpfs -o mode=755 tmpfs /usr/share/polkit-1/rules.d
mount -t tmpfs -o mode=755 tmpfs /etc/polkit-1/rules.d
cp "$1" /usr/share/polkit-1/actions/
cp "$2" /etc/polkit-1/rules.d/
exec "$3" --no-debug
"""


@contextlib.contextmanager
def running(argv: list[str], ready: bytes = b"", **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process until the end of the block; with `ready`, only once it has printed that."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{TREE}/daemon:{TREE}/guest", **env}
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, env=environ)
    assert child.stdout is not None
    try:
        if ready:
            line = child.stdout.readline()
            assert line.startswith(ready), f"{argv} did not start: {line!r}"
        yield child
    finally:
        child.terminate()
        child.wait(10)
        child.stdout.close()


@contextlib.contextmanager
def private_bus(directory: Path) -> Iterator[str]:
    """The address of a new bus, open to every user of this machine."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the bus is called by several users")
    if shutil.which("dbus-daemon") is None:
        pytest.skip("needs dbus-daemon")
    config, socket = directory / "bus.conf", directory / "bus"
    config.write_text(BUS_CONFIG.format(socket=socket, ours=TREE / "systemd/org.vmsilo1.conf"))
    argv = ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"]
    with running(argv, b"unix:path"):
        socket.chmod(0o666)
        yield f"unix:path={socket}"


@contextlib.contextmanager
def served(address: str, quiet_seconds: float = 10) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, str(HERE / "served.py"), address, str(quiet_seconds)]
    with running(argv, b"ready") as child:
        yield child


@pytest.fixture(scope="session")
def open_directory() -> Iterator[Path]:
    """A short directory that every user may pass through: pytest's own is closed to others."""
    directory = Path(f"/tmp/vmsilo-bus-{os.getpid()}")
    directory.mkdir(mode=0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def real_polkit(open_directory: Path) -> Iterator[str]:
    """A bus with the real polkitd, our policy, and the rule for the user of uid OWNER."""
    from vmsilod.bus.rules import render_rules

    directory = open_directory / "polkit"
    directory.mkdir()
    rules = directory / "50-vmsilo.rules"
    rules.write_text(render_rules(pwd.getpwuid(OWNER).pw_name))
    with polkit_bus(directory, rules) as address:
        yield address


@contextlib.contextmanager
def polkit_bus(directory: Path, rules: Path) -> Iterator[str]:
    """A bus of its own in `directory`, with the real polkitd, our policy, and these rules alone."""
    if not Path(POLKITD).exists() or shutil.which("unshare") is None:
        pytest.skip("needs polkitd and unshare")
    policy = TREE / "polkit/org.vmsilo1.policy"
    with private_bus(directory) as address:
        argv = ["unshare", "-m", "sh", "-c", POLKIT_START, "sh", str(policy), str(rules), POLKITD]
        with running(argv, DBUS_SYSTEM_BUS_ADDRESS=address):
            wait_for_name(address, "org.freedesktop.PolicyKit1")
            yield address


@pytest.fixture
def stand_in(open_directory: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A bus with the authority of stand_in.py."""
    directory = open_directory / f"{abs(hash(request.node.name)):x}"
    directory.mkdir()
    with (
        private_bus(directory) as address,
        running([sys.executable, str(HERE / "stand_in.py"), address], b"ready"),
    ):
        yield address


@pytest.fixture
def lone_bus(open_directory: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A bus without any authority."""
    directory = open_directory / f"{abs(hash(request.node.name)):x}"
    directory.mkdir()
    with private_bus(directory) as address:
        yield address


def wait_for_name(address: str, name: str) -> None:
    """Returns when the name has an owner, by the bus's own signal."""
    from jeepney import MatchRule
    from jeepney.bus_messages import message_bus
    from jeepney.io.blocking import open_dbus_connection

    with open_dbus_connection(address) as con:
        rule = MatchRule(type="signal", member="NameOwnerChanged", path="/org/freedesktop/DBus")
        rule.add_arg_condition(0, name)
        con.send_and_get_reply(message_bus.AddMatch(rule))
        with con.filter(rule) as queue:
            if not con.send_and_get_reply(message_bus.NameHasOwner(name)).body[0]:
                con.recv_until_filtered(queue, timeout=10)
