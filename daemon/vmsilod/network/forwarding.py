"""Kernel settings of single network devices below /proc/sys/net: what a TAP may do to this host, and between
which devices packets are forwarded. The host's global switches stay as they are.

Called by the batch, in a worker, in the network namespace of that thread. A TAP's settings end with it. The
NAT interface is the host's: what it had is written down before it is changed, in /run, and given back when
no VM needs it or by the next vmsilod.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from vmsilod.errors import Failed

log = logging.getLogger(__name__)

SYSCTLS = Path("/proc/sys/net")
# Not *.json: those of that directory are VMs' lease records.
LENT_FILE = Path("/run/vmsilo/state/network-forwarding")

# What every TAP gets, before it is up. ARP is answered for its own addresses, not for the host's others.
_TAP_IPV4 = {
    "rp_filter": "1",
    "accept_redirects": "0",
    "secure_redirects": "0",
    "send_redirects": "0",
    "accept_source_route": "0",
    "route_localnet": "0",
    "proxy_arp": "0",
    "arp_ignore": "1",
    "arp_announce": "2",
    "arp_accept": "0",
    "shared_media": "0",
    "bootp_relay": "0",
}
_TAP_IPV6 = {
    "accept_ra": "0",
    "autoconf": "0",
    "accept_redirects": "0",
    "accept_source_route": "0",
    "router_solicitations": "0",
    "accept_dad": "0",
    "dad_transmits": "0",
    "proxy_ndp": "0",
}

FORWARDING = {"ipv4": "forwarding", "ipv6": "force_forwarding"}
"""By family: IPv6's `forwarding` of a device says what it is, not what happens; kernels before 6.17 have one
switch for all devices only, which is not ours to turn."""


def restrain_tap(name: str, *, ipv6: bool) -> None:
    """For a TAP that is down. Without `ipv6` the host has no IPv6 there at all. Raises Failed."""
    for key, value in _TAP_IPV4.items():
        _write("ipv4", name, key, value)
    if not _has_ipv6():
        return
    for key, value in _TAP_IPV6.items():
        _write("ipv6", name, key, value)
    _write("ipv6", name, "disable_ipv6", "0" if ipv6 else "1")


def forward(name: str, *, on: bool) -> None:
    """Whether packets that come in by this device may leave by another. Raises Failed."""
    for family, key in FORWARDING.items():
        if _path(family, name, key).exists():
            _write(family, name, key, "1" if on else "0")


def forwards(interface: str) -> bool:
    """True also for one that is not there."""
    return all(_read(family, interface, key) in (None, "1") for family, key in FORWARDING.items())


def lend_forwarding(interface: str, file: Path = LENT_FILE) -> None:
    """To the host's own `interface`, "" for none; what was lent to another before is given back.

    Raises Failed. An interface that is not there (yet) is no error.
    """
    lent = _load(file)
    for name in [name for name in lent if name != interface]:
        _give_back(name, lent.pop(name))
        _save(lent, file)
    if not interface:
        return
    for family, key in FORWARDING.items():
        before = _read(family, interface, key)
        if before is not None and before != "1":
            lent.setdefault(interface, {})[family] = before
            _save(lent, file)
            _write(family, interface, key, "1")


def find_lent(interface: str, file: Path = LENT_FILE) -> frozenset[int]:
    """The versions of IP that `interface` forwards for VMs alone, or will after lend_forwarding()."""
    lent = _load(file).get(interface, {})
    return frozenset(
        version
        for version, (family, key) in zip((4, 6), FORWARDING.items(), strict=True)
        if interface
        and _read(family, "all", "forwarding") != "1"
        and (family in lent or _read(family, interface, key) not in (None, "1"))
    )


def _give_back(interface: str, before: dict[str, str]) -> None:
    for family, value in before.items():
        # Switched on for all since then: somebody else forwards, and this device too.
        if _read(family, "all", "forwarding") == "1" or family not in FORWARDING:
            continue
        if _read(family, interface, FORWARDING[family]) == "1":
            _write(family, interface, FORWARDING[family], value)


def _load(file: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(file.read_text())
        return {str(name): {str(k): str(v) for k, v in of.items()} for name, of in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        log.error("%s cannot be read, ignoring it: %s", file, error)
        return {}


def _save(lent: dict[str, dict[str, str]], file: Path) -> None:
    temporary = file.with_name(f".{file.name}.new")
    try:
        if not lent:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(json.dumps(lent))
        temporary.rename(file)
    except OSError as error:
        raise Failed(f"cannot write {file}: {error.strerror}") from error


def _path(family: str, name: str, key: str) -> Path:
    return SYSCTLS / family / "conf" / name / key


def _has_ipv6() -> bool:
    return (SYSCTLS / "ipv6").is_dir()


def _read(family: str, name: str, key: str) -> str | None:
    try:
        return _path(family, name, key).read_text().strip()
    except OSError:
        return None


def _write(family: str, name: str, key: str, value: str) -> None:
    path = _path(family, name, key)
    try:
        path.write_text(value)
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}") from error
