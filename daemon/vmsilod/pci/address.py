"""The address of a PCI function, DOMAIN:BUS:DEVICE.FUNCTION, as the kernel spells it.

Called by the configuration's models, by the bus and by everything of this package. Pure.
"""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([01][0-9a-fA-F])\.([0-7])")


def parse_address(text: str) -> str:
    """`01:00.0` and `0000:01:00.0` -> `0000:01:00.0`; raises ValueError for anything else."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a PCI address like 01:00.0 or 0000:01:00.0 (see lspci -D)")
    domain, bus, device, function = match.groups()
    return f"{int(domain or '0', 16):04x}:{bus.lower()}:{device.lower()}.{function}"


def find_addresses(path: str) -> list[str]:
    """Every PCI function on a path below /sys/devices, the outermost bridge first."""
    return [part for part in path.split("/") if _ADDRESS.fullmatch(part) and part.count(":") == 2]
