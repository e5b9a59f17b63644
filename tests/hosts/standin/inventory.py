"""Prints as JSON what vmsilo holds in the test host now: units, processes, files, descriptors, network
devices, mounts.

Run inside of the host before and after each test; the two have to be equal.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

OWN_UNITS = {
    "vmsilod.service",
    "vmsilod.socket",
    "vmsilo-relayd.service",
    "vmsilo-relayd.socket",
    "vmsilo-consoled.service",
    "vmsilo-consoled.socket",
    "vmsilo.slice",
    "vmsilo-vms.target",
    "vmsilo-daemons.target",
}
DYNAMIC_UIDS = range(61184, 65520)  # systemd.exec(5), DynamicUser=


def read(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def find_units() -> list[str]:
    rows = read(["systemctl", "list-units", "--all", "--plain", "--no-legend", "vmsilo*"]).splitlines()
    found = sorted(" ".join(row.split()[:4]) for row in rows if row.split()[0] not in OWN_UNITS)
    # Of these nothing is there but the name, which systemd has heard and not yet forgotten.
    return [row for row in found if not row.endswith(" not-found inactive dead")]


def find_vm_processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "status").read_text()
            uid = int(status.partition("Uid:")[2].split()[0])
            if uid in DYNAMIC_UIDS:
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ")[:120]
                found.append(f"{uid} {words.decode(errors='replace')}")
        except (OSError, ValueError, IndexError):
            continue
    return sorted(found)


def find_files() -> list[str]:
    patterns = (
        "vmsilo/vm/*",
        "vmsilo/state/*.json",
        "vmsilo/state/disposables/*",
        "vmsilo/state/*.new*",
        "vmsilo/state/*.history",
        "vmsilo-relay/*",
        "vmsilo/*-command.socket",
        "vmsilo/*-console",
        "vmsilo-console/*",
        "systemd/system/vmsilo-*",
        "systemd/system/.vmsilo-*",
        "systemd/system/vmsilo-vms.target.wants/*",
    )
    found = [str(path) for pattern in patterns for path in Path("/run").glob(pattern)]
    return sorted(path for path in found if not path.endswith("vmsilo-vms.target.wants"))


def find_network() -> list[str]:
    """Network devices but the loopback, and tables of nftables."""
    links = [line.split(": ")[1].split("@")[0] for line in read(["ip", "-o", "link"]).splitlines()]
    return sorted({*links} - {"lo"}) + sorted(read(["/usr/sbin/nft", "list", "tables"]).splitlines())


def find_descriptors(unit: str) -> dict[str, Any]:
    pid = int(read(["systemctl", "show", "-P", "MainPID", unit]))
    kinds: dict[str, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir() if pid else ():
        try:
            kind = str(entry.readlink()).partition(":[")[0]
        except OSError:
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
    return {"pid": pid, "fds": kinds}


def main() -> None:
    left = {"units": find_units(), "processes": find_vm_processes(), "files": find_files()}
    left["network"] = find_network()
    left["mounts"] = [line for line in Path("/proc/mounts").read_text().splitlines() if "vmsilo" in line]
    stores = ("vmsilo-relayd.service", "vmsilo-consoled.service")
    stored = sum(int(read(["systemctl", "show", "-P", "NFileDescriptorStore", unit])) for unit in stores)
    daemons = {unit: find_descriptors(unit) for unit in ("vmsilod.service", *stores)}
    cursor = read(["journalctl", "-n0", "--show-cursor", "-q"]).partition("cursor: ")[2].strip()
    print(json.dumps({"left": left, "stored": stored, "daemons": daemons, "cursor": cursor}))


if __name__ == "__main__":
    main()
