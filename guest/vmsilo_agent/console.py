"""The size of the guest's console, which a serial line does not say by itself.

Called by a connection whose client has the console on its terminal. The device is opened for the one call
and never becomes the agent's controlling terminal; what is typed or shown there is nobody's business here.
"""

import errno
import fcntl
import os
import struct
import termios

from vmsilo_wire import PONG, encode_frame, parse_console_size
from vmsilo_wire.payload import encode_error

_CMDLINE = "/proc/cmdline"
_CMDLINE_MAX = 64 * 1024
_FLAGS = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC


def answer_size(untrusted_payload: bytes, console: str) -> bytes:
    """PONG with the same payload, or ERROR; the connection can go on after either. `console`: a device's
    path, or empty for the kernel's own."""
    rows, cols = parse_console_size(untrusted_payload)
    try:
        device = console or find_console(_read_cmdline())
        set_size(device, rows, cols)
    except OSError as exc:
        return encode_error("failed", f"the console has no size: {exc.strerror}")
    return encode_frame(PONG, untrusted_payload)


def find_console(cmdline: str, folder: str = "/dev") -> str:
    """The last `console=` that is a terminal, as the kernel chooses /dev/console; OSError if none is."""
    words = (word.removeprefix("console=") for word in cmdline.split() if word.startswith("console="))
    for word in reversed([*words]):
        name = word.partition(",")[0]
        if name.isalnum() and _is_terminal(f"{folder}/{name}"):
            return f"{folder}/{name}"
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


def set_size(device: str, rows: int, cols: int) -> None:
    """Programs on the console get SIGWINCH. OSError where `device` is no terminal."""
    fd = os.open(device, _FLAGS)
    try:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
    finally:
        os.close(fd)


def _is_terminal(device: str) -> bool:
    try:
        fd = os.open(device, _FLAGS)
    except OSError:
        return False
    try:
        return os.isatty(fd)
    finally:
        os.close(fd)


def _read_cmdline() -> str:
    fd = os.open(_CMDLINE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _CMDLINE_MAX).decode("utf-8", "replace")
    finally:
        os.close(fd)
