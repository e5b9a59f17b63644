"""ssh into a real guest over vsock: who gets in, who does not, and what of it is left."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.container import Container

KEYS = "/var/lib/vmsilo/ssh"
# What vm-shell does after its options.
ENTRY = """#!/usr/bin/python3 -IS
import sys
sys.path[:0] = ["/usr/local/lib/vmsilo/client", "/usr/local/lib/vmsilo/guest"]
from vmsilo import ssh
from vmsilo.errors import ClientError
from vmsilo.place import Place
site = "/usr/local/lib/vmsilo/venv/lib/python%d.%d/site-packages" % sys.version_info[:2]
place = Place("/usr/local/lib/vmsilo", site_dirs=(site, "/usr/lib/python3/dist-packages"))
root = sys.argv[1] == "--root"
name, *command = sys.argv[2 if root else 1 :]
try:
    sys.exit(ssh.main(name, root=root, command=command, place=place))
except ClientError as error:
    sys.exit(f"{error.fact}\\n{error.hint}")
"""

NO_ROOT = """
polkit.addRule(function (action, subject) {
    if (action.id === "org.vmsilo1.run-as-root" && subject.user === "user") {
        return action.lookup("command") === "(any, by ssh)" ? polkit.Result.NO : polkit.Result.YES;
    }
});
"""


@pytest.fixture
def shell(demo: Container) -> Iterator[Container]:
    demo.write("/usr/local/bin/ssh-into", ENTRY, mode=0o755)
    yield demo
    deadline = time.monotonic() + 20
    while holders := demo.run(["pgrep", "-af", "ssh-into"], check=False).stdout:
        assert time.monotonic() < deadline, f"outlive ssh: {holders}"
        time.sleep(0.1)


def ssh(
    host: Container, *arguments: str, user: str = "user", check: bool = True
) -> subprocess.CompletedProcess[str]:
    return host.run(["ssh-into", *arguments], user=user, check=check, timeout=120)


def in_guest(host: Container, *command: str, check: bool = True) -> str:
    return host.run(["vm-run", "--root", "demo", *command], user="user", check=check).stdout


def test_the_user_logs_in(shell: Container) -> None:
    done = ssh(shell, "demo", "id -un; echo $XDG_RUNTIME_DIR; hostname; echo err >&2; exit 42", check=False)
    assert (done.returncode, done.stderr) == (42, "err\n")
    assert done.stdout == "user\n/run/user/1000\ndemo\n"


def test_root_logs_in(shell: Container) -> None:
    assert ssh(shell, "--root", "demo", "id", "-u").stdout == "0\n"


def test_bytes_and_a_terminal(shell: Container) -> None:
    done = shell.run(["ssh-into", "demo", "tr", "a-z", "A-Z"], user="user", input="text\n")
    assert done.stdout == "TEXT\n"
    inner = "stty rows 31 cols 97; ssh-into demo 'stty size; tty'"
    done = shell.run(["script", "-qec", inner, "/dev/null"], user="user")
    assert "31 97" in done.stdout
    assert "/dev/pts/" in done.stdout


def test_another_user_is_refused(shell: Container) -> None:
    done = ssh(shell, "demo", "id", user="mallory", check=False)
    assert done.returncode == 1
    assert "not allowed" in done.stderr
    assert shell.run(["ls", f"{KEYS}/demo"], user="mallory", check=False).returncode


def test_the_owner_may_be_denied_root(shell: Container) -> None:
    rule = "/etc/polkit-1/rules.d/40-no-root.rules"
    shell.write(rule, NO_ROOT)
    try:
        shell.wait_until("! runuser -u user -- ssh-into --root demo true", seconds=60)
        assert "not allowed" in ssh(shell, "--root", "demo", "id", check=False).stderr
        assert ssh(shell, "demo", "id", "-un").stdout == "user\n"
    finally:
        shell.run(["rm", rule])
        shell.wait_until("runuser -u user -- ssh-into --root demo true", seconds=60)


def test_the_host_key_is_pinned(shell: Container) -> None:
    shell.run(f"cp {KEYS}/demo/host.pub /root/kept && cp {KEYS}/demo/root.pub {KEYS}/demo/host.pub")
    try:
        done = ssh(shell, "demo", "id", check=False)
        assert (done.returncode, done.stdout) == (255, "")
        assert "HOST IDENTIFICATION HAS CHANGED" in done.stderr
    finally:
        shell.run(f"cp /root/kept {KEYS}/demo/host.pub")
    assert ssh(shell, "demo", "id", "-un").stdout == "user\n"


def test_the_users_key_does_not_open_root(shell: Container) -> None:
    """Not even where the guest's root has put it to where sshd usually looks."""
    copy = "mkdir -p /root/.ssh && cp /run/vmsilo/ssh/authorized/user /root/.ssh/authorized_keys"
    in_guest(shell, "sh", "-c", copy)
    shell.run(f"cp -p {KEYS}/demo/root /root/kept && cp {KEYS}/demo/user {KEYS}/demo/root")
    try:
        done = ssh(shell, "--root", "demo", "id", check=False)
        assert (done.returncode, done.stdout) == (255, "")
        assert "Permission denied (publickey)" in done.stderr
    finally:
        shell.run(f"cp -p /root/kept {KEYS}/demo/root")
    assert ssh(shell, "--root", "demo", "id", "-u").stdout == "0\n"


def test_keys_are_the_same_after_a_restart_and_the_images_own_are_gone(shell: Container) -> None:
    before = shell.run(f"sha256sum {KEYS}/demo/*").stdout
    public = shell.run(["cat", f"{KEYS}/demo/host.pub"]).stdout.split()[:2]
    shell.run(["vm-stop", "demo"], user="user")
    assert ssh(shell, "demo", "id", "-un").stdout == "user\n"  # which starts it
    assert shell.run(f"sha256sum {KEYS}/demo/*").stdout == before
    shown = in_guest(shell, "ssh-keygen", "-y", "-f", "/run/vmsilo/ssh/host_key").split()[:2]
    assert shown == public
    assert in_guest(shell, "sh", "-c", "ls /etc/ssh | grep ssh_host_", check=False) == ""
    modes = in_guest(
        shell, "stat", "-c", "%U %a", "/run/vmsilo", "/run/vmsilo/secret", "/run/vmsilo/ssh/host_key"
    )
    assert modes.split() == ["root", "711", "root", "400", "root", "400"]


def test_nothing_listens_but_on_vsock(shell: Container) -> None:
    assert in_guest(shell, "ss", "-Hltn") == ""
    assert "ssh-unix-local" not in in_guest(shell, "ss", "-Hlx")
    for unit in ("ssh.service", "ssh.socket"):
        assert in_guest(shell, "systemctl", "is-enabled", unit, check=False) == "masked\n"
    assert in_guest(shell, "systemctl", "is-active", "sshd-vsock.socket") == "active\n"
    assert in_guest(shell, "systemctl", "--failed", "--no-legend", "--plain") == ""


def test_a_killed_client_leaves_no_login(shell: Container) -> None:
    client = shell.popen(
        ["ssh-into", "demo", "echo up; exec sleep 984"], user="user", stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    shell.run(["pkill", "-KILL", "-u", "user", "-x", "ssh"])
    client.wait(60)
    deadline = time.monotonic() + 60
    while in_guest(shell, "pgrep", "-f", "^sshd-session: user", check=False):
        assert time.monotonic() < deadline, "sshd keeps the login of a dead client"
        time.sleep(0.5)


def test_without_ssh_no_key_travels_and_nothing_listens(shell: Container) -> None:
    shell.run(f"vm-stop --force other; rm -rf {KEYS}/other")  # tests before this one may have started it
    shell.write("/etc/vmsilo/vms.d/other.toml", "memory = 768\nssh = false\n")
    shell.run(["vmsilo", "check"])
    done = ssh(shell, "other", "id", check=False)
    assert "ssh = false" in done.stderr
    root = ["vm-run", "--root", "other"]
    assert shell.run([*root, "ls", "/run/vmsilo"], user="user").stdout == "secret\n"
    state = shell.run([*root, "systemctl", "is-active", "sshd-vsock.socket"], user="user", check=False)
    assert state.stdout == "inactive\n"
    assert not shell.run(f"ls -d {KEYS}/other", check=False).stdout
    shell.run(["vm-stop", "other"], user="user")


def test_keys_go_when_the_vm_does(shell: Container) -> None:
    shell.run(f"cp -r {KEYS}/demo {KEYS}/strange && mkdir {KEYS}/.strange.new")
    shell.write("/etc/vmsilo/vms.d/other.toml", "memory = 768\n")  # any change: the configuration is read
    shell.wait_until(f"test ! -e {KEYS}/strange && test ! -e {KEYS}/.strange.new", seconds=20)
    assert "demo" in shell.run(["ls", KEYS]).stdout.split()
    assert ssh(shell, "demo", "id", "-un").stdout == "user\n"
