"""What a VMM does for a guest's network, without the guest: frames from one TAP's descriptor to another's.

pump.py PORT_FD GUEST_FD [BYTES_PER_SECOND towards the guest]
"""

import os
import select
import sys
import time

BATCH = 64
DEBT = 0.0005  # seconds: shorter pauses are not worth a sleep


def main() -> None:
    port, guest = int(sys.argv[1]), int(sys.argv[2])
    rate = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    poll = select.poll()
    poll.register(port, select.POLLIN)
    poll.register(guest, select.POLLIN)
    buffer = memoryview(bytearray(70_000))
    free = 0.0
    while True:
        for fd, _ in poll.poll():
            sent = move(fd, guest if fd == port else port, buffer, BATCH if not rate else 1)
            if fd == port and rate:
                now = time.monotonic()
                free = max(free, now) + sent / rate
                if free - now > DEBT:
                    time.sleep(free - now)


def move(source: int, target: int, buffer: memoryview, most: int) -> int:
    total = 0
    for _ in range(most):
        try:
            size = os.readv(source, [buffer])
        except BlockingIOError:
            break
        try:
            os.write(target, buffer[:size])
        except OSError:
            continue  # a frame that the other side does not take
        total += size
    return total


main()
