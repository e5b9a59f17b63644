"""The table of VMs: adds, removes and restores them, and keeps systemd's descriptor store and the state
directory in step with it.

Built by `main`, called by the control side and by what guests say. A crash or restart at any point loses no
listener: first the state file is written and the descriptors are stored, then vmsilod gets its answer.
"""

from __future__ import annotations

import socket

from vmsilo_wire import HOST_PORT

from vmsilo_relay.command import admit_client
from vmsilo_relay.hostport import OpenMessages, Speaker
from vmsilo_relay.journal import ERROR, INFO, WARNING
from vmsilo_relay.listener import Listener, check_listener
from vmsilo_relay.packet import Refusal
from vmsilo_relay.record import (
    KernelChannel,
    Record,
    delete_record,
    load_records,
    save_record,
)
from vmsilo_relay.vm import SAVE, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsilo_relay.context import Context
    from vmsilo_relay.systemd import Notifier

VSOCK_STORE_NAME = "vsock"


class Relay:
    def __init__(self, context: Context, notifier: Notifier, directory: str) -> None:
        self._context = context
        self._notifier = notifier
        self._directory = directory
        self._speakers = OpenMessages(context)
        self.vms: dict[str, Vm] = {}
        self.vsock: Listener | None = None
        self.subscribers: set[Callable[[dict[str, object]], None]] = set()

    def add(self, record: Record, listeners: dict[str, socket.socket]) -> None:
        """Take the VM and its listeners, replacing what has its name; raises Refusal and takes nothing."""
        for kind, sock in listeners.items():
            check_listener(sock, socket.AF_UNIX, LISTENER_TYPES[kind])
        if isinstance(record.channel, KernelChannel):
            other = self._find_cid(record.channel.cid)
            if other is not None and other.name != record.name:
                raise Refusal("bad-request", f"CID {record.channel.cid} belongs to {other.name}")
        vm = self.vms.get(record.name)
        if vm is not None and vm.record.generation == record.generation:
            record.agent, record.ready, record.status = vm.record.agent, vm.record.ready, vm.record.status
        try:
            save_record(self._directory, record)
        except OSError as exc:
            raise Refusal("failed", f"the state of {record.name} can't be written: {exc.strerror}") from exc
        if vm is not None and vm.record.generation != record.generation:
            self._close(vm)
            vm = None
        if vm is None:
            vm = self.vms[record.name] = Vm(self._context, record, self._announce)
        vm.close_listeners()
        vm.record = record
        for kind, prefix in STORE_PREFIXES.items():
            if kind in listeners:
                self._notifier.store(prefix + record.name, listeners[kind].fileno())
            else:
                self._notifier.drop(prefix + record.name)
        self._listen(vm, listeners)
        self._context.journal.log(INFO, record.name, f"added, generation {record.generation}")

    def remove(self, name: str, generation: str) -> None:
        """Forget this generation of the VM; nothing happens if it is not there."""
        vm = self.vms.get(name)
        if vm is None or vm.record.generation != generation:
            return
        self._forget_stored(name)
        self._close(vm)
        self._context.journal.log(INFO, name, "removed")
        self._context.journal.forget(name)

    def listen_vsock(self, sock: socket.socket) -> None:
        """Take the kernel's listener on HOST_PORT. Raises Refusal and then does not take it."""
        check_listener(sock, socket.AF_VSOCK, socket.SOCK_STREAM)
        address = sock.getsockname()
        if address[1] != HOST_PORT:
            raise Refusal("bad-request", f"the vsock listener is on port {address[1]}, not {HOST_PORT}")
        if self.vsock is not None:
            self.vsock.close()
        self._notifier.store(VSOCK_STORE_NAME, sock.fileno())
        self.vsock = Listener(self._context, "relayd", sock, self.hear_vsock)

    def restore(self, inherited: list[tuple[str, socket.socket]]) -> None:
        """Go on after a restart with the stored listeners; what does not fit together is forgotten."""
        stored: dict[str, socket.socket] = {}
        for name, sock in inherited:
            if name in stored:
                stored.pop(name).close()
            stored[name] = sock
        for name, record in load_records(self._directory):
            self._restore_vm(name, record, stored)
        if VSOCK_STORE_NAME in stored:
            sock = stored.pop(VSOCK_STORE_NAME)
            try:
                self.listen_vsock(sock)
            except Refusal as refusal:
                self._discard(VSOCK_STORE_NAME, sock, refusal.message)
        for name, sock in stored.items():
            self._discard(name, sock, "no VM has it")

    def _restore_vm(self, name: str, record: Record | Refusal, stored: dict[str, socket.socket]) -> None:
        found = {kind: stored.pop(prefix + name, None) for kind, prefix in STORE_PREFIXES.items()}
        listeners = {kind: sock for kind, sock in found.items() if sock is not None}
        try:
            if isinstance(record, Refusal):
                raise record
            missing = [kind for kind in record.fds if kind not in listeners]
            if missing or len(listeners) != len(record.fds):
                raise Refusal(
                    "failed", f"listeners {sorted(listeners)} found, {sorted(record.fds)} expected"
                )
            for kind, sock in listeners.items():
                check_listener(sock, socket.AF_UNIX, LISTENER_TYPES[kind])
        except Refusal as refusal:
            self._context.journal.log(WARNING, name, f"forgotten after a restart: {refusal.message}")
            for sock in listeners.values():
                sock.close()
            self._forget_stored(name)
            return
        vm = self.vms[name] = Vm(self._context, record, self._announce)
        self._listen(vm, listeners)

    def _listen(self, vm: Vm, listeners: dict[str, socket.socket]) -> None:
        context, speakers = self._context, self._speakers

        def admit(sock: socket.socket, _address: object) -> None:
            admit_client(context, vm, sock)

        def hear(sock: socket.socket, _address: object) -> None:
            Speaker(context, vm, sock, speakers).start()

        for kind, on_accept in (("command", admit), ("host-port", hear)):
            if kind in listeners:
                vm.listeners.append(Listener(context, vm.name, listeners[kind], on_accept))

    def _discard(self, name: str, sock: socket.socket, reason: str) -> None:
        self._context.journal.log(WARNING, "relayd", f"stored descriptor {name!a} closed: {reason}")
        self._notifier.drop(name)
        sock.close()

    def _forget_stored(self, name: str) -> None:
        for prefix in STORE_PREFIXES.values():
            self._notifier.drop(prefix + name)
        try:
            delete_record(self._directory, name)
        except OSError as error:
            self._context.journal.log(ERROR, name, f"can't delete the state file, ignoring: {error}")

    def _close(self, vm: Vm) -> None:
        del self.vms[vm.name]
        self._speakers.close_of(vm)
        vm.close("stopping", f"{vm.name} is being stopped")

    def _find_cid(self, cid: object) -> Vm | None:
        for vm in self.vms.values():
            if isinstance(vm.record.channel, KernelChannel) and vm.record.channel.cid == cid:
                return vm
        return None

    def hear_vsock(self, sock: socket.socket, address: object) -> None:
        """Hear one connection to the shared listener; the CID in `address` is the kernel's word."""
        vm = self._find_cid(address[0]) if isinstance(address, tuple) else None
        if vm is None:
            self._context.journal.log(INFO, "relayd", f"message from unknown {address!r} dropped")
            sock.close()
            return
        Speaker(self._context, vm, sock, self._speakers).start()

    def _announce(self, vm: Vm, event: str) -> None:
        try:
            save_record(self._directory, vm.record)
        except OSError as error:
            self._context.journal.log(ERROR, vm.name, f"can't write the state file, ignoring: {error}")
        if event == SAVE:
            return
        record = vm.record
        text: dict[str, object] = {
            "event": event,
            "name": vm.name,
            "generation": record.generation,
            "text": record.status,
        }
        for send in tuple(self.subscribers):
            send(text)


STORE_PREFIXES = {"command": "cmd-", "host-port": "port-"}
LISTENER_TYPES = {"command": socket.SOCK_SEQPACKET, "host-port": socket.SOCK_STREAM}
