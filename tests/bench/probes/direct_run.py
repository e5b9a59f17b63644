"""vm-run's own session with an agent on a Unix socket: no VM, no relay.

argv: LIBDIR SOCKET SECRET COMMAND...
"""

import os
import socket
import sys

libdir, where, secret, *command = sys.argv[1:]
sys.path[:0] = [f"{libdir}/client", f"{libdir}/guest"]

from vmsilo.session import Wish, run_session  # noqa: E402
from vmsilo_wire.payload import Spawn, encode_hello, encode_spawn  # noqa: E402

sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.connect(where)
sock.sendall(encode_hello("user", secret))
sock.settimeout(0)
wish = Wish(pty=False, detach=False, escapes=True)
os._exit(run_session(sock.detach(), encode_spawn(Spawn(tuple(command))), wish))
