"""One end of what is measured across a network.

flow.py sink ADDRESS            counts what the TCP connections bring: prints bytes and seconds
flow.py flood ADDRESS SECONDS   TCP connections, as fast as they go
flow.py echo ADDRESS            sends every datagram back
flow.py ping ADDRESS SECONDS    a datagram each 5 ms: prints the round trips, and how many were lost
"""

import json
import select
import socket
import sys
import time

PORT = 5201
EVERY = 0.005
CONNECTIONS = 8
LATE = 1.0  # seconds that the last answers are waited for


def sink(address: str, _seconds: float) -> None:
    with socket.create_server((address, PORT)) as server:
        print("ready", flush=True)
        connections = [server.accept()[0] for _ in range(CONNECTIONS)]
        buffer = bytearray(1 << 20)
        begin, total = time.monotonic(), 0
        while connections:
            for connection in select.select(connections, [], [])[0]:
                size = connection.recv_into(buffer)
                total += size
                if not size:
                    connections.remove(connection)
        print(json.dumps([total, time.monotonic() - begin]), flush=True)


def flood(address: str, seconds: float) -> None:
    data = bytes(1 << 18)
    connections = [socket.create_connection((address, PORT), timeout=5) for _ in range(CONNECTIONS)]
    for connection in connections:
        connection.settimeout(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for connection in select.select([], connections, [], 1)[1]:
            connection.send(data)
    for connection in connections:
        connection.close()


def echo(address: str, _seconds: float) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, PORT))
        print("ready", flush=True)
        while True:
            data, peer = sock.recvfrom(64)
            sock.sendto(data, peer)


def ping(address: str, seconds: float) -> None:
    found: list[float] = []
    sent, begin = 0, time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        following = begin
        while True:
            now = time.monotonic()
            if following <= now < begin + seconds:
                sock.send(repr(now).encode())
                sent += 1
                following += EVERY
            elif now >= begin + seconds and (sent == len(found) or now >= begin + seconds + LATE):
                break
            wait = min(EVERY, max(0.0, following - now)) if now < begin + seconds else 0.05
            if select.select([sock], [], [], wait)[0]:
                found.append(time.monotonic() - float(sock.recv(64)))
    print(json.dumps([found, sent - len(found)]), flush=True)


{"sink": sink, "flood": flood, "echo": echo, "ping": ping}[sys.argv[1]](
    sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
)
