"""ssh's ProxyCommand with ProxyUseFdpass=yes: gets the connection from the holder (ssh.py), gives it to ssh.

Run by path, as `python3 -IS ssh_pass.py ADDRESS`, with standard output a socket of ssh's; so it imports
nothing of ours. Ends at once: no byte of the connection passes here.
"""

import _socket
import os
import sys


def main(address: str) -> int:
    try:
        holder = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        holder.connect(b"\0" + os.fsencode(address))
        _data, ancillary, _flags, _from = holder.recvmsg(1, _socket.CMSG_SPACE(4))
        for level, kind, data in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS and len(data) == 4:
                rights = [(level, kind, data)]
                _socket.socket(fileno=1).sendmsg([b"\0"], rights)
                os._exit(0)  # closes descriptor 1, which the socket object owns now
    except OSError as exc:
        os.write(2, f"vm-shell: no connection for ssh: {exc.strerror}\n".encode())
        return 1
    os.write(2, b"vm-shell: no connection for ssh\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
