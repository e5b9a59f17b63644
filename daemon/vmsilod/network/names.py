"""Names and addresses that follow from a VM's name: its TAPs', its MACs, its link-local IPv6 addresses.

Pure, with the standard library only. Used by the checks of the configuration, by the planning, and by
whoever must know which addresses a port may have.
"""

from __future__ import annotations

import hashlib
from ipaddress import IPv6Address

INTERFACE_NAME_MAX = 15  # bytes: the kernel's IFNAMSIZ without the final zero
_VM_PART = 6
_HASH_PART = 8


def derive_tap(vm: str, index: int) -> str:
    """`<vm>-<index>`, or, where that is longer than the kernel takes, the first characters of the VM's name
    and 8 hexadecimal digits of SHA-256 over `<vm>-<index>`.

    Two short names differ; a short one never equals a long one's, since no index has eight digits. That two
    long ones are equal takes 2^32 tries: the checks of the configuration say so.
    """
    name = f"{vm}-{index}"
    if len(name) <= INTERFACE_NAME_MAX:
        return name
    return f"{vm[:_VM_PART]}-{hashlib.sha256(name.encode('ascii')).hexdigest()[:_HASH_PART]}"


def derive_mac(vm: str, interface: str) -> str:
    """The first six bytes of SHA-1 over `<vm>-<interface>`, the first of them made that of a locally
    administered unicast address.
    """
    digest = hashlib.sha1(f"{vm}-{interface}".encode(), usedforsecurity=False).digest()
    return bytes([digest[0] & 0xFC | 0x02, *digest[1:6]]).hex(":")


def derive_link_local(mac: str) -> IPv6Address:
    """fe80::/64 with the EUI-64 of `mac` (RFC 4291, appendix A), as a Linux guest forms it."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([octets[0] ^ 0x02, *octets[1:3], 0xFF, 0xFE, *octets[3:]])
    return IPv6Address(b"\xfe\x80" + bytes(6) + identifier)
