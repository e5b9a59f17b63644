"""What a VM that starts is busy with before its guest says a word, such as the copy of its image into huge
pages: asked of vmsilod, only for a person at a terminal and only when it takes a while.
"""

from vmsilo.errors import ClientError, printable
from vmsilo.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsilo.bus import Bus

ASK_WAIT = 2.0  # seconds; a text that comes late is worth nothing
BAR = 20  # characters


class StatusWatch:
    """`read` asks again each time. What cannot be asked is silent: it is nobody's error."""

    def __init__(self, name: str, place: Place) -> None:
        self._name = name
        self._place = place
        self._bus: Bus | None = None
        self._failed = False

    def read(self) -> str:
        """The status of a VM that is starting, else ""."""
        from vmsilo.bus import Bus

        if self._failed:
            return ""
        try:
            self._bus = self._bus or Bus(self._place)
            (vms,) = self._bus.call("List", wait=ASK_WAIT)
        except ClientError:
            self._failed = True
            return ""
        for vm in vms:
            if vm.get("Name", ("", ""))[1] == self._name and vm.get("State", ("", ""))[1] == "starting":
                return printable(vm.get("Status", ("", ""))[1], 200)
        return ""

    def close(self) -> None:
        if self._bus is not None:
            self._bus.close()


def draw_bar(text: str) -> str:
    """A text that ends in "43%" as a bar, which stands first: a narrow terminal cuts the rest."""
    words, _, percent = text.rpartition(" ")
    if not (percent.endswith("%") and percent[:-1].isdecimal()):
        return text
    done = min(int(percent[:-1]), 100)
    bar = "#" * (done * BAR // 100)
    return f"[{bar.ljust(BAR)}] {done}% {words.rstrip(':')}"
