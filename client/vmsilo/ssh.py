"""`vm-shell --ssh`: the user's own ssh into a VM, over vsock, without a network.

vmsilod gives a connection to the guest's sshd, the login's private key as a memory file and the guest's host
key. This process becomes ssh, so terminal, signals and exit status are ssh's own. ssh closes every
descriptor that it inherits; so a small process beside it (the holder) keeps key and known host, which ssh
opens through /proc, and hands the connection to the ProxyCommand. It ends with ssh, whatever ends that, and
nothing was on a disk.
"""

import os
import select
import socket
import struct
import sys

from vmsilo.bus import START_WAIT, Bus, check_known, is_interactive
from vmsilo.errors import ClientError, write_stderr
from vmsilo.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import Any, NoReturn
else:
    import _signal as signal  # `signal` makes four enumerations at import: 5 ms

PROGRAM = "ssh"
POLKIT_WAIT = 120
UCRED = struct.Struct("iII")
PASSER = os.path.join(os.path.dirname(__file__), "ssh_pass.py")  # noqa: PTH118, PTH120 - pathlib is dear
# What ssh itself, its terminal and its messages need. Not its agent, its askpass program or a display.
KEPT = ("HOME", "LANG", "LOGNAME", "PATH", "TERM", "USER")

# The guest is hostile: it gets no agent, display, forwarding or variable, asks for nothing, changes no file.
OPTIONS = (
    "BatchMode=yes",
    "CheckHostIP=no",
    "ClearAllForwardings=yes",
    "ControlMaster=no",
    "ControlPath=none",
    "ForwardAgent=no",
    "ForwardX11=no",
    "GlobalKnownHostsFile=none",
    "HostKeyAlgorithms=ssh-ed25519",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    "KbdInteractiveAuthentication=no",
    "LogLevel=ERROR",  # below it the guest's banner is shown
    "PasswordAuthentication=no",
    "PermitLocalCommand=no",
    "PreferredAuthentications=publickey",
    "ProxyUseFdpass=yes",
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    "VerifyHostKeyDNS=no",
)


class Login:
    """What vmsilod gave; the descriptors are the caller's."""

    __slots__ = ("host_key", "key_fd", "login", "stream_fd")

    def __init__(self, stream_fd: int, key_fd: int, login: str, host_key: str) -> None:
        self.stream_fd = stream_fd
        self.key_fd = key_fd
        self.login = login
        self.host_key = host_key


def main(name: str, *, root: bool, command: list[str], place: Place) -> int:
    """Starts the VM where needed, and becomes ssh: returns never, raises ClientError."""
    program = find_program(PROGRAM)
    login = ask_login(name, place, root=root)
    try:
        known_fd = os.memfd_create("vmsilo-known-hosts", os.MFD_CLOEXEC)
        os.fchmod(known_fd, 0o400)
        os.write(known_fd, known_host(name, login.host_key).encode())
        address = f"vmsilo-ssh-{os.urandom(16).hex()}"
        holder = start_holder(address, login.stream_fd)
    except OSError as exc:
        raise ClientError(f"cannot prepare a start of ssh: {exc.strerror}") from exc
    argv = plan_argv(
        name,
        login=login.login,
        files=(f"/proc/{holder}/fd/{login.key_fd}", f"/proc/{holder}/fd/{known_fd}"),
        proxy=plan_proxy(address),
        command=command,
        terminal=os.isatty(0) and os.isatty(1),
    )
    env = {key: os.environ[key] for key in KEPT if key in os.environ}
    env |= {key: value for key, value in os.environ.items() if key.startswith("LC_")}
    env["SHELL"] = "/bin/sh"  # what ssh runs the ProxyCommand with
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python's, not the caller's
    try:
        os.execve(program, argv, env)
    except OSError as exc:
        raise ClientError(f"cannot execute {program}: {exc.strerror}") from exc


def find_program(name: str) -> str:
    for folder in os.environ.get("PATH", "/usr/bin:/bin").split(":"):
        path = f"{folder}/{name}"
        if folder.startswith("/") and os.access(path, os.X_OK):
            return path
    raise ClientError(f"{name} is not installed", "install openssh-client (Arch: openssh)")


def ask_login(name: str, place: Place, *, root: bool) -> Login:
    options: dict[str, tuple[str, Any]] = {"root": ("b", True)} if root else {}
    bus = Bus(place, interactive=is_interactive())
    try:
        vm = check_known(bus, name, place)
        if vm.get("State") != "running" and os.isatty(2):
            write_stderr(f"vm-shell: starting {name}\n")
        stream, key, login, host_key = bus.call(
            "OpenSsh", "sa{sv}", (name, options), wait=START_WAIT + POLKIT_WAIT
        )
        return Login(stream.to_raw_fd(), key.to_raw_fd(), str(login), str(host_key))
    finally:
        bus.close()


def known_host(name: str, host_key: str) -> str:
    return f"{alias(name)} {host_key}\n"


def alias(name: str) -> str:
    return f"{name}.vmsilo"


def plan_proxy(address: str) -> str:
    """A line for `/bin/sh -c "exec LINE"`; `%` is ssh's."""
    words = (sys.executable or "/usr/bin/python3", "-IS", PASSER, address)
    quoted = ("'" + word.replace("'", "'\\''") + "'" for word in words)
    return " ".join(quoted).replace("%", "%%")


def plan_argv(
    name: str, *, login: str, files: tuple[str, str], proxy: str, command: list[str], terminal: bool
) -> list[str]:
    """`files`: private key, known hosts. `-F none`: no configuration of user or host has a say."""
    key, known = files
    argv = [PROGRAM, "-F", "none", "-l", login, "-i", key, "-t" if terminal else "-T"]
    for option in (
        *OPTIONS,
        f"HostKeyAlias={alias(name)}",
        f"UserKnownHostsFile={known}",
        f"ProxyCommand={proxy}",
    ):
        argv += ["-o", option]
    return [*argv, "--", name, *command]


def start_holder(address: str, stream_fd: int) -> int:
    """Its PID; it has every descriptor of ours. It is no child of ours: ssh would not wait for it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(b"\0" + address.encode())  # without a file, so there is none to remove
    listener.listen(1)
    listener.settimeout(0)
    watched = os.pidfd_open(os.getpid())  # stays ours when we become ssh
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _become_holder(write_fd, listener, stream_fd, watched)
    os.waitpid(child, 0)
    os.close(write_fd)
    data = os.read(read_fd, 16)
    for fd in (read_fd, watched, stream_fd):
        os.close(fd)
    listener.close()
    if not data:
        raise ClientError("cannot start a process beside ssh")
    return int(data)


def _become_holder(write_fd: int, listener: socket.socket, stream_fd: int, watched: int) -> "NoReturn":
    try:
        os.setsid()  # no key at the terminal reaches it
        if os.fork():
            os._exit(0)
        os.write(write_fd, b"%d" % os.getpid())
        os.close(write_fd)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd)  # whoever reads ssh's output sees its end
        hold(listener, stream_fd, watched)
        os._exit(0)
    finally:
        os._exit(1)


def hold(listener: socket.socket, stream_fd: int, watched: int) -> None:
    """Pass the connection once, to a process of the same user; return when ssh has ended."""
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.register(listener.fileno(), select.POLLIN)
    passed = False
    while True:
        for fd, _events in poll.poll():
            if fd == watched:
                return
            if not passed and pass_stream(listener, stream_fd):
                passed = True
                poll.unregister(listener.fileno())
                listener.close()
                os.close(stream_fd)


def pass_stream(listener: socket.socket, stream_fd: int) -> bool:
    """False for a stranger: the address is in ssh's argv, which everybody reads."""
    try:
        peer, _address = listener.accept()
    except OSError:
        return False  # it went; the next may come
    try:
        _pid, uid, _gid = UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        if uid != os.getuid():
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", stream_fd))]
        peer.sendmsg([b"\0"], rights, socket.MSG_NOSIGNAL)
    except OSError:
        return False
    finally:
        peer.close()
    return True
