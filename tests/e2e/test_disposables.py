"""Disposables with a real guest: a command in one, its network, the working directory in it."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

TEMPLATE = """
memory = 768
[network]
allow = ["198.51.100.1:80/tcp"]
[network.interfaces.wan]
tap.host_address = "10.66.0.254/24"
addresses = ["10.66.0.1/24"]
routes."0.0.0.0/0" = { via = "10.66.0.254" }
"""
CONNECT = """
import socket, sys
sock = socket.socket()
sock.settimeout(4)
try:
    sock.connect((sys.argv[1], int(sys.argv[2])))
    print("connected")
except OSError as error:
    print("closed")
"""
LISTEN = """
import socket
sockets = []
for port in (80, 81):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("198.51.100.1", port))
    sock.listen()
    sockets.append(sock)
print("up", flush=True)
while True:
    sockets[0].accept()
"""
USER = "user"


def instances(host: Container) -> list[dict[str, Any]]:
    return [vm for vm in host.vms().values() if vm["Template"]]


def wait_until_gone(host: Container) -> None:
    deadline = time.monotonic() + 60
    while instances(host):
        assert time.monotonic() < deadline, "a disposable stays"
        time.sleep(0.2)
    assert not host.run("ls /run/vmsilo/vm /run/vmsilo/state/disposables").stdout.strip().count("-d")


@pytest.fixture
def template(host: Container) -> Iterator[str]:
    host.write("/etc/vmsilo/vms.d/pattern.toml", TEMPLATE)
    host.wait_until("test -S /run/vmsilo/pattern-command.socket")
    yield "pattern"
    host.run("rm /etc/vmsilo/vms.d/pattern.toml")
    host.wait_until("test ! -e /run/systemd/system/vmsilo-pattern.socket")


def test_a_command_in_a_disposable(
    host: Container, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    script = "hostname; ls -A ~ | grep -v '^[.]'; echo kept > ~/file; exit 5"
    argv = host.argv(["vm-run", "--disposable", template, "sh", "-c", script], user=USER)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stderr is not None
        first = client.stdout.readline().decode()
        first_byte = time.monotonic() - began
        rest = client.stdout.read()
        at_end = time.monotonic()
        assert client.wait(30) == 5, client.stderr.read()
        prompt = time.monotonic() - at_end
    assert first.startswith("pattern-d")
    assert rest == b""  # its home is empty
    (gone,) = [first.strip()]
    with capsys.disabled():
        print(f"\ndisposable: first byte {first_byte:.2f} s, end to prompt {prompt * 1000:.0f} ms")
    wait_until_gone(host)
    assert gone not in host.run("systemctl list-units --all --no-legend 'vmsilo*'").stdout
    assert host.vms()[template]["State"] == "stopped"


def test_its_network_lets_through_what_the_templates_does(host: Container, template: str) -> None:
    host.run("ip address replace 198.51.100.1/32 dev lo")
    server = host.popen(["python3", "-c", LISTEN], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        script = "; ".join(
            f"python3 -c '{CONNECT}' {address} {port}"
            for address, port in (("198.51.100.1", 80), ("198.51.100.1", 81), ("10.66.0.254", 22))
        )
        script = f"ip -4 -o address show scope global; {script}"
        done = host.run(["vm-run", "--disposable", template, "sh", "-c", script], user=USER)
        address, *answers = done.stdout.splitlines()
        assert " 10.138." in address
        assert answers == ["connected", "closed", "closed"]
    finally:
        host.run(["pkill", "-f", "198.51.100.1"], check=False)
        server.wait(20)
        host.run("ip address delete 198.51.100.1/32 dev lo")
    wait_until_gone(host)


@pytest.fixture
def project(host: Container) -> Iterator[str]:
    """Of a user whose uid is not that of the guest's user in the image."""
    path = "/srv/somebody/a project"
    renumber(host, 1234, 1235)
    host.run(f"mkdir -p '{path}' && chown user:user /srv/somebody '{path}' && echo before > '{path}/file'")
    host.run(f"chown user:user '{path}/file' && chmod 600 '{path}/file'")
    yield path
    host.run("rm -r /srv/somebody")
    renumber(host, 1000, 1000)


def renumber(host: Container, uid: int, gid: int) -> None:
    host.run(f"groupmod -g {gid} user && usermod -u {uid} -g {gid} user && chown -R user:user /home/user")


def here(host: Container, path: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    inner = ["sh", "-c", 'cd "$1" && shift && exec vm-run --here "$@"', "sh", path, *options]
    return host.run(inner, user=USER, check=check)


def test_here_is_the_same_directory_for_the_same_user(host: Container, project: str) -> None:
    script = (
        "pwd; id -u; stat -c %u .; cat file; echo made > new; mkdir inner; echo after > file; ip -o link"
    )
    done = here(host, project, "sh", "-c", script)
    lines = done.stdout.splitlines()
    assert lines[:4] == [project, "1234", "1234", "before"]
    assert [line.split(":")[1].strip() for line in lines[4:]] == ["lo"]
    look = "stat -c '%n %u %g' new inner file; cat file new"
    shown = host.run(f"cd '{project}' && {look}").stdout.splitlines()
    assert shown == ["new 1234 1235", "inner 1234 1235", "file 1234 1235", "after", "made"]
    wait_until_gone(host)


def test_here_can_be_read_only(host: Container, project: str) -> None:
    done = here(host, project, "--ro", "sh", "-c", "cat file; touch new", check=False)
    assert done.stdout == "before\n"
    assert done.returncode == 1
    assert "Read-only" in done.stderr
    assert host.run(f"ls '{project}'").stdout == "file\n"
    wait_until_gone(host)


@pytest.mark.parametrize(
    ("path", "fact"),
    [
        ("/", "cannot be shared"),
        ("/usr/share", "the guest needs /usr"),
        ("/home/user", "all of your home"),
        ("/tmp", "belongs to uid 0"),
    ],
)
def test_here_is_not_everywhere(host: Container, path: str, fact: str) -> None:
    done = here(host, path, "true", check=False)
    assert done.returncode == 125
    assert fact in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not instances(host)
