"""One connection from the host: authentication, then at most one command.

Created by the server for each accepted socket, and closed by itself.  A connection is `new` until its
HELLO was good, then `ready`; SPAWN makes it `running`; EXIT or ERROR makes it `closing`: everything is
flushed, the peer is told with a shutdown and given some time to close first.  Anything unexpected ends in
`close`, which also ends the command.
"""

import socket
from collections.abc import Callable
from typing import ParamSpec

from vmsilo_wire import (
    ACCEPT,
    CONNECT,
    CONSOLE_SIZE,
    DATA_MAX,
    HEADER_SIZE,
    PING,
    PONG,
    POWEROFF,
    RESIZE,
    SIGNAL,
    SPAWN,
    STDIN,
    ProtocolError,
    encode_consumed,
    encode_frame,
    pack_header,
    parse_port,
    parse_resize,
    parse_signal,
)
from vmsilo_wire.payload import Spawn, encode_error, encode_exit, encode_started, parse_hello, parse_spawn

from vmsilo_agent.account import Account, find_account
from vmsilo_agent.console import answer_size
from vmsilo_agent.host import Host, compare_digest
from vmsilo_agent.intake import Intake
from vmsilo_agent.loop import GONE, READ, WRITE, Timer, log
from vmsilo_agent.process import Process, Watcher, start_process
from vmsilo_agent.streams import Input, Output, Streams, open_null, open_pipes, open_terminal, resize

_P = ParamSpec("_P")

HELLO_TIMEOUT = 10.0
LINGER = 10.0  # seconds a peer has to close after it was told everything
DRAIN_QUIET = 0.2  # seconds without output after which a pipe that a background process holds is given up
_COMMAND_ROLES = ("user", "root")
_OUT_MAX = 512 * 1024  # queued answers to a peer that does not read, beyond which it is not read either


class Connection:
    _receive = memoryview(bytearray(HEADER_SIZE + DATA_MAX))

    def __init__(self, host: Host, sock: socket.socket) -> None:
        self._host = host
        self._loop = host.loop
        self._sock = sock
        self._intake = Intake()
        self._out = bytearray()
        self._state = "new"
        self._role = ""
        self._process: Process | None = None
        self._streams: Streams | None = None
        self._input: Input | None = None
        self._output: Output | None = None
        self._pty: int | None = None
        self._detach = False
        self._timer: Timer | None = None
        sock.settimeout(0)
        self._set_timer(HELLO_TIMEOUT, self.close)
        self._watch()

    def close(self) -> None:
        """Ends the connection now, and with it the command, unless that has ended or is detached."""
        if self._state == "closed":
            return
        self._state = "closed"
        self._cancel_timer()
        self._loop.forget(self._sock.fileno())
        self._close_streams()
        process, self._process = self._process, None
        self._let_go(process)
        self._sock.close()
        self._host.connection_closed(self)

    # ---- the socket

    def _watch(self) -> None:
        if self._state == "closed":
            return
        events = READ if len(self._out) < _OUT_MAX else GONE
        if self._out:
            events |= WRITE
        self._loop.watch(self._sock.fileno(), events, self._ready)

    def _ready(self, mask: int) -> None:
        try:
            if mask & WRITE and self._out:
                self._flush()
            if mask & ~WRITE and self._state != "closed":
                self._read_socket()
        except ProtocolError as exc:
            self._fail("bad-request", str(exc))
        except Exception as exc:  # the connection's edge: it ends, the agent does not
            log(f"connection ended by an error: {type(exc).__name__}: {exc}")
            self.close()
        self._watch()

    def _read_socket(self) -> None:
        if len(self._out) >= _OUT_MAX:  # not reading: this wake-up can only be a hang-up
            self.close()
            return
        try:
            count = self._sock.recv_into(self._receive)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if count == 0:
            self.close()
        elif self._state != "closing":
            for kind, payload in self._intake.feed(self._receive[:count]):
                self._take(kind, payload)
                if self._state in {"closing", "closed"}:
                    break
            if self._input is not None and self._intake.between_frames:
                self._input.acknowledge_rest()

    def _send(self, frame: bytes | memoryview) -> None:
        if self._state == "closed":
            return
        sent = 0
        if not self._out:
            try:
                sent = self._sock.send(frame)
            except BlockingIOError:
                pass
            except OSError:  # reset; the command is ended by close
                self.close()
                return
        if sent < len(frame):
            self._out += frame[sent:]
            if self._output is not None:
                self._output.pause()
            self._watch()

    def _flush(self) -> None:
        try:
            with memoryview(self._out) as view:
                sent = self._sock.send(view)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._out[:sent]
        if not self._out:
            if self._state == "closing":
                self._shutdown()
            elif self._output is not None:
                self._output.resume()

    def _finish(self) -> None:
        """Nothing more will be sent: close once the peer has it."""
        self._state = "closing"
        self._cancel_timer()
        self._close_streams()
        if not self._out:
            self._shutdown()

    def _shutdown(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._set_timer(LINGER, self.close)

    def _fail(self, code: str, message: str) -> None:
        if self._state in {"closing", "closed"}:
            return
        self._send(encode_error(code, message))
        process, self._process = self._process, None
        self._let_go(process)
        if self._state != "closed":
            self._finish()

    # ---- frames

    def _take(self, kind: int, payload: bytes | memoryview) -> None:
        if self._state == "running" and kind == STDIN and self._input is not None:
            self._input.feed(payload)
        else:
            self._control(kind, bytes(payload))

    def _control(self, kind: int, payload: bytes) -> None:
        if kind == PING:
            self._send(encode_frame(PONG, payload))
        elif self._state == "new":
            self._authenticate(payload)
        elif self._state == "ready" and kind == SPAWN:
            self._spawn(parse_spawn(payload))
        elif self._state == "ready" and kind == POWEROFF:
            self._power_off()
        elif self._state == "ready" and kind == CONSOLE_SIZE and self._role in _COMMAND_ROLES:
            self._send(answer_size(payload, self._host.console))
        elif self._state == "ready" and kind in {CONNECT, ACCEPT} and self._role == "forward":
            self._become_forward(kind, parse_port(payload))
        elif self._state == "running" and kind == RESIZE and self._pty is not None:
            resize(self._pty, *parse_resize(payload))
        elif self._state == "running" and kind == SIGNAL and self._process is not None:
            self._process.signal(parse_signal(payload))
        elif self._state != "running" or kind != RESIZE:  # RESIZE after the terminal's end is only late
            raise ProtocolError(f"frame type {kind} not allowed now")

    def _authenticate(self, untrusted_payload: bytes) -> None:
        hello = parse_hello(untrusted_payload)
        if not compare_digest(hello.secret, self._host.secret):
            log("a connection did not know the secret")
            self._fail("denied", "wrong secret")
            return
        self._role = hello.role
        self._state = "ready"
        self._cancel_timer()
        self._host.connection_authenticated(self)

    def _power_off(self) -> None:
        if self._role not in {"root", "control"}:
            self._fail("denied", "this role cannot power off")
            return
        self._host.power_off()
        self._finish()

    def _become_forward(self, kind: int, port: int) -> None:
        if not self._intake.between_frames or self._out:
            raise ProtocolError("a forward begins with an answer of the agent")
        self._state = "closed"  # as a connection of commands
        self._loop.forget(self._sock.fileno())
        self._host.connection_closed(self)
        self._host.forward(kind, port, self._sock)

    # ---- the command

    def _spawn(self, spawn: Spawn) -> None:
        if self._role not in _COMMAND_ROLES:
            self._fail("denied", "this role cannot run commands")
            return
        name = "root" if self._role == "root" else self._host.user
        account = find_account(name)
        if account is None:
            self._fail("failed", f"the guest has no user {name}")
            return
        try:
            self._start(spawn, account)
        except OSError as exc:
            self._fail("failed", f"cannot start a process: {exc.strerror}")

    def _start(self, spawn: Spawn, account: Account) -> None:
        if spawn.detach:
            streams = open_null()
        elif spawn.pty is not None:
            streams = open_terminal(*spawn.pty, account)
        else:
            streams = open_pipes()
        host = self._host
        try:
            process = start_process(host.loop, host.tree, spawn, account, streams.stdio, host.nofile)
        except OSError:
            streams.close_own_ends()
            raise
        finally:
            streams.close_child_ends()
        self._state = "running"
        self._process = process
        self._detach = spawn.detach
        if not spawn.detach:
            self._pty = streams.pty
            self._input = Input(
                host.loop, streams.stdin, self._consumed, self._guard, pty=streams.pty is not None
            )
            self._streams = streams
        process.watch(
            Watcher(
                started=self._guard(self._started),
                failed=self._guard(self._not_started),
                exited=self._guard(self._exited),
            )
        )

    def _let_go(self, process: Process | None) -> None:
        """Of a command whose client is gone or broke the protocol."""
        if process is not None:
            if self._detach:
                process.release()
            else:
                process.terminate()

    def _guard(self, callback: Callable[_P, None]) -> Callable[_P, None]:
        """For what the loop calls on behalf of this connection: it ends the connection, not the loop."""

        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
            try:
                callback(*args, **kwargs)
            except Exception as exc:  # as in _ready
                log(f"connection ended by an error: {type(exc).__name__}: {exc}")
                self.close()

        return guarded

    def _started(self) -> None:
        process = self._process
        if process is None:
            return
        self._send(encode_started(process.pid))
        if self._detach and self._state == "running":
            self._process = None
            process.release()
            self._finish()
        elif self._streams is not None:
            outputs, self._streams.outputs = self._streams.outputs, {}
            self._output = Output(self._loop, outputs, self._output_ready, self._guard)
            if self._out:
                self._output.pause()

    def _not_started(self, code: str, message: str) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.release()
        self._fail(code, message)

    def _consumed(self, count: int) -> None:
        self._send(encode_consumed(count))

    def _output_ready(self, kind: int, length: int) -> None:
        if length:
            pack_header(Output.buffer, kind, length)
            self._send(memoryview(Output.buffer)[: HEADER_SIZE + length])
        elif self._output is not None and self._output.ended:
            self._pty = None
            if self._process is not None and self._process.status is not None:
                self._report_exit()

    def _exited(self, _status: int) -> None:
        if self._output is None or self._output.ended:
            self._report_exit()
        else:
            self._output.active = True
            self._drained()

    def _drained(self) -> None:
        """After the exit: until nothing came for a while, the peer's pauses not counted."""
        if self._output is None:
            return
        if self._output.active or self._output.paused:
            self._output.active = False
            self._set_timer(DRAIN_QUIET, self._drained)
        else:
            self._report_exit()

    def _report_exit(self) -> None:
        process, self._process = self._process, None
        if process is None or process.status is None:
            return
        self._send(encode_exit(process.status))
        process.release()
        if self._state != "closed":
            self._finish()

    # ---- the end

    def _close_streams(self) -> None:
        self._pty = None
        if self._output is not None:
            self._output.close()
        if self._input is not None:
            self._input.close()
        if self._streams is not None and self._output is None:
            for fd in self._streams.outputs:
                self._loop.forget(fd)
            self._streams.stdin = None  # the input's, closed above
            self._streams.close_own_ends()
        self._output = self._input = self._streams = None

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, self._guard(callback))

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
