"""Between fork and exec: what turns a copy of the agent into the command.

Called in the child only, as root (or as the same user, in tests); everything that touches the guest user's
files happens after it became that user, so that neither a symbolic link nor a hanging file system there can
do anything to the agent.  Ends in exec or _exit; never returns.
"""

import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import termios

from vmsilo_wire.payload import Spawn, is_env_name, to_bytes

from vmsilo_agent.account import Account

SESSION_ENV_MAX = 64 * 1024
JOURNAL_SOCKET = "/run/systemd/journal/stdout"
_PATH_USER = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
_PATH_ROOT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Stdio:
    """Descriptors the child makes its 0, 1 and 2; `pty`: they are a terminal that it has to take."""

    __slots__ = ("fds", "pty")

    def __init__(self, fds: tuple[int, int, int], *, pty: bool) -> None:
        self.fds = fds
        self.pty = pty


class _CannotRun(Exception):
    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message


def become_command(
    spawn: Spawn, account: Account, stdio: Stdio, status_fd: int, nofile: tuple[int, int]
) -> None:
    """Writes "code\\nmessage" to `status_fd` where it fails; a successful exec closes that."""
    try:
        try:
            _prepare(stdio, nofile)
            _drop_to(account)
            _run(spawn, account)
        except _CannotRun as exc:
            code, message = exc.code, exc.message
        except OSError as exc:
            code, message = "failed", f"cannot prepare the command: {exc.strerror}"
        except BaseException as exc:  # the outermost edge of this process
            code, message = "failed", f"cannot prepare the command: {type(exc).__name__}"
        os.write(status_fd, f"{code}\n{message}".encode("utf-8", "surrogateescape")[:4000])
    finally:
        os._exit(127)


def _prepare(stdio: Stdio, nofile: tuple[int, int]) -> None:
    os.setsid()
    if stdio.pty:
        fcntl.ioctl(stdio.fds[0], termios.TIOCSCTTY, 0)
    for target, fd in enumerate(stdio.fds):
        os.dup2(fd, target)  # never the same number: the agent keeps 0, 1 and 2 open
    resource.setrlimit(resource.RLIMIT_NOFILE, nofile)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)


def _drop_to(account: Account) -> None:
    if os.geteuid() == 0:
        os.setgroups(account.groups)
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
    elif os.geteuid() != account.uid:
        raise _CannotRun("failed", "the agent cannot change the user")


def _run(spawn: Spawn, account: Account) -> None:
    env = build_env(spawn, account)
    cwd = account.home if spawn.cwd is None else spawn.cwd
    try:
        os.chdir(to_bytes(cwd))
    except OSError as exc:
        if spawn.cwd is not None:
            raise _CannotRun("failed", f"cannot enter {cwd}: {exc.strerror}") from exc
        os.chdir("/")  # a guest user without a home can still run a command
    if spawn.detach:
        _connect_journal(spawn.argv[0])
    _exec([to_bytes(arg) for arg in spawn.argv], env)


def build_env(spawn: Spawn, account: Account) -> dict[bytes, bytes]:
    """Defaults, over them the user session's, over them the client's.

    The client is authorised to run any program as this account, so that LD_PRELOAD and the like give it
    nothing; they are kept.  The session's variables are the guest user's word: a root command gets none.
    """
    env = {
        "HOME": account.home,
        "USER": account.name,
        "LOGNAME": account.name,
        "SHELL": account.shell,
        "PATH": _PATH_USER if account.uid else _PATH_ROOT,
        "LANG": os.environ.get("LANG", "C.UTF-8"),
    }
    if os.path.isdir(account.runtime_dir):  # noqa: PTH112 - pathlib is not worth its import in every child
        env["XDG_RUNTIME_DIR"] = account.runtime_dir
        bus = f"{account.runtime_dir}/bus"
        if os.path.exists(bus):  # noqa: PTH110 - as above
            env["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path={bus}"
        if account.uid:
            env |= read_session_env(f"{account.runtime_dir}/vmsilo-session.env", account.uid)
    env |= spawn.env
    return {to_bytes(name): to_bytes(value) for name, value in env.items()}


def read_session_env(path: str, uid: int) -> dict[str, str]:
    """KEY=VALUE lines; what is not a regular file of that user, or not such a line, does not count."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return {}
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != uid or status.st_size > SESSION_ENV_MAX:
            return {}
        untrusted_text = os.read(fd, SESSION_ENV_MAX).decode("utf-8", "surrogateescape")
    except OSError:
        return {}
    finally:
        os.close(fd)
    pairs = (line.partition("=") for line in untrusted_text.split("\n"))
    return {
        name: value for name, equals, value in pairs if equals and is_env_name(name) and "\0" not in value
    }


def _connect_journal(argv0: str) -> None:
    """Output of a detached command to the guest's journal, if there is one."""
    name = os.path.basename(argv0) or "command"  # noqa: PTH119 - as above
    identifier = "".join(char for char in name if char.isprintable())[:64]
    try:
        journal = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        journal.connect(JOURNAL_SOCKET)
        journal.shutdown(socket.SHUT_RD)
        # sd_journal_stream_fd(3): identifier, unit, priority, level prefix, forward to syslog, kmsg, console
        journal.sendall(to_bytes(identifier) + b"\n\n6\n1\n0\n0\n0\n")
    except OSError:
        return  # /dev/null stays
    os.dup2(journal.fileno(), 1)
    os.dup2(journal.fileno(), 2)


def _exec(argv: list[bytes], env: dict[bytes, bytes]) -> None:
    shown = argv[0].decode("utf-8", "replace")[:200]
    if b"/" in argv[0]:
        candidates = [argv[0]]
    else:
        path = env.get(b"PATH", _PATH_USER.encode())
        candidates = [(directory or b".") + b"/" + argv[0] for directory in path.split(b":")]
    refused: OSError | None = None
    for candidate in candidates:
        try:
            os.execve(candidate, argv, env)
        except (FileNotFoundError, NotADirectoryError) as exc:
            if os.path.isfile(candidate):  # noqa: PTH113
                refused = exc  # the file is there: its interpreter is not
        except OSError as exc:
            refused = exc
            if exc.errno != errno.EACCES:
                break
    if refused is None:
        raise _CannotRun("not-found", f"{shown}: command not found")
    if refused.errno in {errno.E2BIG, errno.ENOMEM, errno.EAGAIN, errno.EIO}:
        raise _CannotRun("failed", f"{shown}: {refused.strerror}")
    if refused.errno == errno.ENOENT:
        raise _CannotRun("not-executable", f"{shown}: its interpreter does not exist")
    raise _CannotRun("not-executable", f"{shown}: {refused.strerror}")
