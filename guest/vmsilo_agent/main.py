"""Wires the agent together, in the order in which its parts depend on each other, and runs its loop.

Called by the `vmsilo-agent` script; `main` returns only if the loop is stopped, and SystemExit says what is
wrong with how the agent was started.
"""

import os
import resource
import signal
import socket
import sys
from pathlib import Path

from vmsilo_wire import AGENT_PORT, HOST_CID, HOST_PORT, ProtocolError
from vmsilo_wire.payload import load_json

from vmsilo_agent.announce import Announcer, announce, notify_systemd, say_leaving
from vmsilo_agent.cgroup import find_tree
from vmsilo_agent.loop import Loop
from vmsilo_agent.server import Server, Settings

SETTINGS_FILE = "/etc/vmsilo/agent.json"
USAGE = """usage: vmsilo-agent [--listen vsock:PORT|unix:PATH] [--announce vsock:CID:PORT|unix:PATH|none]
                    [--secret-file FILE] [--user NAME] [--systemctl COMMAND] [--poweroff-command "WORD ..."]
                    [--console DEVICE]
"""


class Options:
    """The command line, over /etc/vmsilo/agent.json ({"user": NAME}), over the defaults."""

    def __init__(self) -> None:
        self.listen = f"vsock:{AGENT_PORT}"
        self.announce = f"vsock:{HOST_CID}:{HOST_PORT}"
        self.secret_file = "/run/vmsilo/secret"
        self.user = ""
        self.systemctl = "systemctl"
        self.poweroff_command = "systemctl poweroff --no-block"
        self.console = ""  # the kernel's


def parse_options(words: list[str]) -> Options:
    """SystemExit for anything that is not an option with a value."""
    options = Options()
    known = vars(options).keys()
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in known:
            raise SystemExit(USAGE)
        setattr(options, name, value if equals else next(rest, ""))
    options.user = options.user or _read_user() or "user"
    return options


def main(words: list[str]) -> None:
    options = parse_options(words)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _fill_standard_descriptors()
    secret = _read_secret(options.secret_file)
    loop = Loop()
    listener = _bind(options.listen)
    tree = find_tree(loop)
    settings = Settings(
        secret=secret,
        user=options.user,
        poweroff=tuple(options.poweroff_command.split()),
        nofile=_raise_descriptor_limit(),
        console=options.console,
    )
    Server(loop, settings, tree, listener)
    notify_systemd("READY=1")
    address = _parse_address(options.announce)
    if address is not None:
        signal.signal(signal.SIGTERM, lambda _number, _frame: _leave(address))
        announce(loop, Announcer(loop, address), options.systemctl)
    loop.run()


def _leave(address: str | tuple[int, int]) -> None:
    say_leaving(address)
    os._exit(0)


def _read_secret(path: str) -> str:
    """64 hexadecimal digits, which the initrd got in memory from the host; new for each boot."""
    try:
        text = Path(path).read_text("ascii").strip().lower()
    except (OSError, ValueError) as exc:
        raise SystemExit(f"vmsilo-agent: cannot read the secret {path}: {exc}") from exc
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise SystemExit(f"vmsilo-agent: {path} does not hold 64 hexadecimal digits")
    return text


def _read_user() -> str:
    try:
        user = load_json(Path(SETTINGS_FILE).read_bytes()).get("user", "")
    except FileNotFoundError:
        return ""
    except (OSError, ProtocolError) as exc:
        raise SystemExit(f"vmsilo-agent: {SETTINGS_FILE}: {exc}") from exc
    if not isinstance(user, str):
        raise SystemExit(f'vmsilo-agent: {SETTINGS_FILE}: "user" is not a string')
    return user


def _parse_address(text: str) -> str | tuple[int, int] | None:
    kind, _, rest = text.partition(":")
    try:
        if kind == "unix" and rest:
            return rest
        if kind == "vsock":
            cid, _, port = rest.rpartition(":")
            return int(cid) if cid else socket.VMADDR_CID_ANY, int(port)
    except ValueError as exc:
        raise SystemExit(USAGE) from exc
    if kind != "none":
        raise SystemExit(USAGE)
    return None


def _bind(text: str) -> socket.socket:
    address = _parse_address(text)
    if address is None:
        raise SystemExit(USAGE)
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_VSOCK
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
    except OSError as exc:
        raise SystemExit(f"vmsilo-agent: cannot listen on {text}: {exc.strerror}") from exc
    return listener


def _raise_descriptor_limit() -> tuple[int, int]:
    """The limit that commands get back: select(2) in them breaks with descriptors of 1024 and above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def _fill_standard_descriptors() -> None:
    """0, 1 and 2 must be in use, because the child puts the command's ends there."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - a descriptor, for the whole life
