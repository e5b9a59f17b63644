"""Runs commands in turn and says how long each took.

argv[1]: {"commands": [[WORD, ...], ...], "rounds": N, "seconds": MOST}. Prints, per command,
a list of [begin, seconds, CPU seconds of it and its children, status]; begin is on the monotonic clock.
"""

import json
import os
import sys
import time


def run_once(argv: list[str], null: int) -> list[float]:
    actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1)]
    begin = time.monotonic()
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
    _pid, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - begin
    return [begin, seconds, usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)]


def main() -> None:
    request = json.loads(sys.argv[1])
    found: list[list[list[float]]] = [[] for _ in request["commands"]]
    deadline = time.monotonic() + request["seconds"]
    null = os.open(os.devnull, os.O_RDWR)
    for _ in range(request["rounds"]):
        for times, argv in zip(found, request["commands"], strict=True):
            times.append(run_once(argv, null))
        if time.monotonic() > deadline:
            break
    print(json.dumps(found))


main()
