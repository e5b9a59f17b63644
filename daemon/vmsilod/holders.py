"""Who holds what a run has beside its own leases, or what outlives it: its console, devices, image in huge
pages, the story of its ends.

Built once by main, handed to runs.py and lifecycle.py. A list of parts; it does nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmsilod.consoles import Consoles
    from vmsilod.endings import Endings
    from vmsilod.hugepages.images import HugepageImages
    from vmsilod.network.pool import NetworkPool
    from vmsilod.pci.claims import PciClaims
    from vmsilod.usb.attachments import UsbAttachments


@dataclass(frozen=True)
class Holders:
    consoles: Consoles
    endings: Endings
    pci: PciClaims
    usb: UsbAttachments
    network: NetworkPool
    hugepages: HugepageImages
