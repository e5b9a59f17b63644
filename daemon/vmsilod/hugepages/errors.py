"""What keeps an image out of huge pages. Raised by the store; a VM may be configured to start without."""

from __future__ import annotations

from vmsilod.errors import StartFailed

PAGE = 2 << 20  # bytes; of one huge page of x86


class NoHugepages(StartFailed):
    """This host has no such pages, or not enough of them: nothing is wrong with the image."""


def short_of_pages(image: str, needed: int, free: int, more: str) -> NoHugepages:
    """`free` were in nobody's use before; `more` says what could be made."""
    return NoHugepages(
        f"not enough huge pages for image '{image}': it needs {needed} of 2 MiB ({needed * PAGE >> 20} MiB);"
        f" {free} were free, and {more}",
        f"end what uses memory; or have them made at boot (sysctl vm.nr_hugepages={needed});"
        ' or set image.short_of_pages = "page-cache"',
    )
