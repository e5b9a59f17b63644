"""vmsilod: wires everything together in dependency order, and runs the GLib main loop.

The only constructor of long-lived parts. On SIGTERM it leaves at once: VMs, their units, leases and sockets
stay as they are, and the next vmsilod goes on with them.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from gi.repository import GLib
from systemd.journal import JournalHandler

from systemd import daemon
from vmsilod import loop
from vmsilod.bus import service
from vmsilod.bus.polkit import Polkit
from vmsilod.config.load import DEFAULT_ROOTS
from vmsilod.consoles import Consoles
from vmsilod.control import ControlServer
from vmsilod.disposables.keeper import Disposables
from vmsilod.disposables.leashes import Leashes
from vmsilod.endings import Endings
from vmsilod.errors import VmsiloError
from vmsilod.holders import Holders
from vmsilod.hugepages.images import HugepageImages
from vmsilod.image_watch import ImageWatch
from vmsilod.lifecycle import Lifecycle
from vmsilod.network.pool import NetworkPool
from vmsilod.network.switch import Switches
from vmsilod.network.switch_units import SwitchUnits
from vmsilod.network.watch import NetworkWatch
from vmsilod.pci.claims import PciClaims
from vmsilod.publication import Publication
from vmsilod.registry import Registry
from vmsilod.relay_client import RelayClient
from vmsilod.resources.image import IMAGES_DIR
from vmsilod.runs import Runs
from vmsilod.systemd import Systemd
from vmsilod.usb.attachments import UsbAttachments
from vmsilod.usb.watch import UsbWatch
from vmsilod.watch import ConfigurationWatch

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

log = logging.getLogger("vmsilod")

VERSION = "0.1.0"


class Daemon:
    """Everything that lives as long as vmsilod."""

    def __init__(self, main_loop: GLib.MainLoop, control: socket.socket) -> None:
        self._main_loop = main_loop
        self._exit = 0
        self._con = service.connect()
        self._registry = Registry()
        self._systemd = Systemd(self._con, lambda unit: self._lifecycle.unit_changed(unit))
        self._consoles = Consoles(self._registry)
        self._endings = Endings(self._registry, self._systemd, lambda vm: self._lifecycle.changed(vm))
        self._pci = PciClaims(self._systemd.start)
        self._usb = UsbAttachments(self._registry)
        self._network = NetworkPool(Switches(SwitchUnits(self._systemd)))
        self._publication = Publication(self._registry, self._systemd, self._pci, self._network)
        huge = HugepageImages(self._registry, self._systemd.start, lambda vm: self._lifecycle.changed(vm))
        holders = Holders(self._consoles, self._endings, self._pci, self._usb, self._network, huge)
        self._runs = Runs(self._registry, self._systemd, holders, lambda vm: self._lifecycle.changed(vm))
        self._lifecycle = Lifecycle(self._registry, self._systemd, holders, self._runs, self._publication)
        self._disposables = Disposables(
            self._registry, self._lifecycle, self._publication, self._network, Leashes(self._con)
        )
        self._publication.amend = self._disposables.amend
        self._publication.on_applied = self._take_over
        self._control_socket = control

    def _links_touched(self) -> None:
        self._network.links_touched()
        self._publication.links_touched()

    async def start(self) -> None:
        """Repair first, then take over the configuration, then let others in."""
        await self._systemd.subscribe()
        await self._endings.load()
        await self._disposables.load()
        await self._runs.repair()
        await self._lifecycle.refresh_all()
        self._image_watch = ImageWatch(
            IMAGES_DIR, self._registry.images, self._lifecycle.configuration_applied
        )
        self._network_watch = NetworkWatch(self._network.rules_touched, self._links_touched)
        await self._publication.reload()
        await self._lifecycle.refresh_all()
        await self._usb.load()
        self._relay = RelayClient(self._lifecycle.relay_event, lambda: _start(self._runs.agree_with_relay()))
        self._runs.use_relay(self._relay)
        self._relay.open()
        self._consoles.connect()
        self._lifecycle.subscribe(self._consoles.vm_changed)
        self._lifecycle.subscribe(self._disposables.vm_changed)
        self._lifecycle.use_disposables(self._disposables)
        self._control = ControlServer(self._control_socket, self._runs)
        self._service = service.serve(
            self._con, self._lifecycle, Polkit(self._con), version=VERSION, on_closed=self._lost_bus
        )
        self._watch = ConfigurationWatch(DEFAULT_ROOTS, lambda: _start(self._publication.reload()))
        await self._endings.resume()
        self._disposables.resume()
        notify("READY=1")
        _start(self._usb.repair())  # it asks the VMMs, and one that hangs must not keep the others waiting
        self._lifecycle.subscribe(self._usb.vm_changed)
        self._usb_watch = UsbWatch(self._usb.refresh)
        await self._publication.start_autostart_vms()

    def _take_over(self, problems: int) -> None:
        """A configuration was read and its units written."""
        self._lifecycle.configuration_applied(problems)
        self._consoles.agree_soon()

    def run(self) -> int:
        GLib.unix_signal_add(GLib.PRIORITY_HIGH, signal.SIGTERM, self._main_loop.quit)
        GLib.unix_signal_add(GLib.PRIORITY_HIGH, signal.SIGINT, self._main_loop.quit)
        keep_watchdog_fed()
        started = loop.spawn(self.start())
        started.add_done_callback(lambda future: loop.call_soon(self._check_start, future))
        self._main_loop.run()
        notify("STOPPING=1")
        return self._exit

    def _check_start(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            log.error("cannot start: %s", error, exc_info=None if isinstance(error, VmsiloError) else error)
            self._fail()

    def _lost_bus(self) -> None:
        log.error("the system bus is gone; starting again")
        self._fail()

    def _fail(self) -> None:
        self._exit = 1
        self._main_loop.quit()


def _start(coroutine: Coroutine[Any, Any, object]) -> None:
    loop.spawn(coroutine)


def notify(state: str) -> None:
    try:
        daemon.notify(state)
    except OSError as error:
        log.warning("ignoring: the service manager does not hear %s: %s", state, error.strerror)


def keep_watchdog_fed() -> None:
    """From a timer of the main loop, so that a blocked loop is noticed."""
    usec = int(os.environ.get("WATCHDOG_USEC", "0"))

    def feed() -> bool:
        notify("WATCHDOG=1")
        return True

    if usec:
        GLib.timeout_add(usec // 2000, feed)


def take_control_socket() -> socket.socket:
    names = daemon.listen_fds_with_names()
    for fd, name in names.items():
        if name == "control":
            return socket.socket(fileno=fd)
    raise SystemExit("vmsilod: no control socket was passed; start it with: systemctl start vmsilod.service")


def main(argv: list[str]) -> int:
    if argv:
        print("vmsilod: takes no arguments; it is started by systemd", file=sys.stderr)
        return 2
    handler: logging.Handler = JournalHandler(SYSLOG_IDENTIFIER="vmsilod")
    if not os.environ.get("JOURNAL_STREAM"):
        handler = logging.StreamHandler()
    logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(message)s")
    os.umask(0o077)
    return Daemon(GLib.MainLoop(), take_control_socket()).run()
