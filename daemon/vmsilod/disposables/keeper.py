"""Makes disposables, and takes away those that nobody holds any more.

Built by main; the bus asks it for new ones, the publication for their configurations (`amend`), the
lifecycle tells it of every change of a VM. A disposable lives for the bus connections of those who asked for
it, and for one run. What must not be forgotten is in its record before anything is acquired, so that vmsilod
can be killed at any moment. Nobody waits for the clean-up: the caller has gone when it begins. It is
repeated until nothing is left.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from concurrent.futures import Future
from types import MappingProxyType
from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.bus.views import VmView
from vmsilod.config.model import VmConfig
from vmsilod.config.schema import check_vm_name
from vmsilod.disposables import records
from vmsilod.disposables.derive import Wish, derive
from vmsilod.disposables.find import Templates, find_taken, find_template
from vmsilod.disposables.places import accept_directory
from vmsilod.disposables.records import DisposableRecord
from vmsilod.disposables.subnets import Subnets
from vmsilod.errors import BadRequest, Busy, Denied, Failed, Timeout, VmsiloError
from vmsilod.host import find_uid
from vmsilod.waiting import Lock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsilod.bus.requests import DisposableRequest
    from vmsilod.bus.views import Change
    from vmsilod.config.load import Configuration
    from vmsilod.disposables.leashes import Leashes
    from vmsilod.lifecycle import Lifecycle
    from vmsilod.network.pool import NetworkPool
    from vmsilod.publication import Publication
    from vmsilod.registry import Registry

log = logging.getLogger(__name__)

NAME_MAX = 31
SUFFIX_BYTES = 3
GONE_SECONDS = 60.0
RETRY_SECONDS = 2.0  # after the first attempt to take one away that failed; then twice as long each time
RETRY_MAX_SECONDS = 300.0
UP = ("starting", "running", "stopping")


@dataclasses.dataclass(eq=False)
class Disposable:
    """`leaving`: on its way out; `removed`: no VM any more; `gone` is set when nothing is left of it. The
    lock keeps the changes of its record in order.
    """

    record: DisposableRecord
    config: VmConfig
    was_up: bool = False
    leaving: bool = False
    removed: bool = False
    lock: Lock = dataclasses.field(default_factory=Lock)
    shadows: bool = False  # a file describes a VM of this name by now
    gone: Future[None] = dataclasses.field(default_factory=Future)

    @property
    def name(self) -> str:
        return self.record.name


class Disposables:
    """`bus.views.DisposableDomain`: all disposables by name."""

    def __init__(
        self,
        registry: Registry,
        lifecycle: Lifecycle,
        publication: Publication,
        network: NetworkPool,
        leashes: Leashes,
    ) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._publication = publication
        self._network = network
        self._leashes = leashes
        self._all: dict[str, Disposable] = {}
        self._templates = Templates()

    async def load(self) -> None:
        """At start, before the configuration is read: what there was when the last vmsilod ended."""
        for record in await loop.in_worker(records.load_records):
            try:
                config = VmConfig.from_json(record.config)
            except ValueError:
                log.error("the record of the disposable %s is of another version", record.name)
                await loop.in_worker(records.forget_record, record.name)
                continue
            self._all[record.name] = Disposable(record, config)

    def resume(self) -> None:
        """At start, when everything else runs: take away those whose command has gone meanwhile."""
        for disposable in list(self._all.values()):
            vm = self._registry.find(disposable.name)
            disposable.was_up = vm is not None and vm.is_up
            if disposable.record.ended or not disposable.record.holders:
                loop.spawn(self._destroy(disposable))
                continue
            for holder in disposable.record.holders:
                self._leashes.watch(holder, self._holder_gone)

    def amend(self, configuration: Configuration) -> Configuration:
        """The configuration with all disposables in it. What changes live in a VM follows the template; with
        one that is broken or gone it stays as it was.
        """
        self._templates = Templates(configuration.settings, configuration.vms)
        vms, broken = dict(configuration.vms), dict(configuration.broken)
        for name, disposable in self._all.items():
            if disposable.removed:
                continue
            disposable.shadows = name in vms or name in broken
            broken.pop(name, None)
            vms[name] = self._follow(disposable)
        return dataclasses.replace(configuration, vms=MappingProxyType(vms), broken=MappingProxyType(broken))

    def _follow(self, disposable: Disposable) -> VmConfig:
        config = disposable.config
        template = self._templates.vms.get(config.template or "")
        if template is not None and not disposable.leaving:
            network = config.network.model_copy(update={"allow": template.network.allow})
            disposable.config = config = config.model_copy(update={"network": network})
        return config

    async def create(self, request: DisposableRequest) -> tuple[str, Sequence[str]]:
        check_name(request.name)
        self._leashes.require_room()
        while (known := self._all.get(request.name)) is not None:
            if not known.leaving and not known.record.ended:
                return await self._join(known, request)
            try:
                await loop.with_deadline(known.gone, GONE_SECONDS)
            except TimeoutError as error:
                raise Timeout(
                    f"the disposable '{request.name}' does not end", "journalctl -u vmsilod"
                ) from error
        template = find_template(self._templates, request.template)
        owner = find_uid(template.user)
        if request.uid not in (0, owner):
            raise Denied(f"disposables belong to the user '{template.user}'")
        here = None
        if request.shared is not None:
            here = await loop.in_worker(accept_directory, request.shared, owner)
        self._refuse_too_many(owner)
        name = self._name(request.name, template.name)
        # Of those that are made just now the network does not know yet.
        others = (disposable.config for disposable in self._all.values())
        subnets = Subnets(self._templates.options, find_taken(self._network, others))
        derived = derive(template, Wish(name, request.network, here, owner), subnets)
        record = DisposableRecord(name, derived.config.to_json(), owner, (request.sender,))
        disposable = Disposable(record, derived.config)
        self._all[name] = disposable  # from here on, in this same turn, the name and the networks are taken
        vm = self._registry.adopt(name)
        vm.config, vm.configured = derived.config, True
        try:
            await self._save(disposable, record)
            await self._publication.add(vm)
        except BaseException:
            loop.spawn(self._destroy(disposable))
            raise
        self._lifecycle.changed(vm)
        # Last: whoever has gone while it was made is noticed now.
        self._leashes.watch(request.sender, self._holder_gone)
        log.info("VM %s: made of %s for uid %d", name, template.name, request.uid)
        return name, derived.notes

    async def _join(self, known: Disposable, request: DisposableRequest) -> tuple[str, Sequence[str]]:
        """Another command in a named one."""
        template = request.template or find_template(self._templates, "").name
        if known.config.template != template or request.shared is not None:
            raise Busy(
                f"the disposable '{known.name}' is one of '{known.config.template}'", "give it another name"
            )
        if request.uid not in (0, known.record.uid):
            raise Denied(f"disposables belong to the user '{known.config.user}'")
        if request.sender not in known.record.holders:
            holders = (*known.record.holders, request.sender)
            await self._save(known, dataclasses.replace(known.record, holders=holders))
        self._leashes.watch(request.sender, self._holder_gone)
        return known.name, ()

    def _refuse_too_many(self, owner: int) -> None:
        limit = self._templates.options.limit
        own = [disposable for disposable in self._all.values() if disposable.record.uid == owner]
        if sum(not disposable.leaving for disposable in own) >= limit:
            raise Busy(
                f"there are {limit} disposables already, the most that one user may have",
                "end one of them (vmsilo list), or raise disposables.limit in vmsilo.toml",
            )
        if len(own) >= 2 * limit:
            raise Busy(f"{limit} disposables are still on their way out", "try again; journalctl -u vmsilod")

    def _name(self, wanted: str, template: str) -> str:
        if wanted:
            if self._registry.find(wanted) is not None:
                raise Busy(f"there is a VM '{wanted}' already", "give the disposable another name")
            return wanted
        while True:
            suffix = f"-d{secrets.token_hex(SUFFIX_BYTES)}"
            name = template[: NAME_MAX - len(suffix)].rstrip("-") + suffix
            if self._registry.find(name) is None:
                return name

    # What happens by itself

    def vm_changed(self, change: Change) -> None:
        """A disposable has one run: nobody starts it again."""
        if not isinstance(change, VmView) or (disposable := self._all.get(change.name)) is None:
            return
        if change.state in UP:
            disposable.was_up = True
        elif (disposable.was_up or change.state == "failed") and not disposable.record.ended:
            loop.spawn(self._end(disposable))

    async def _end(self, disposable: Disposable) -> None:
        """Its name stays for those who still hold it: they are told how it ended."""
        if disposable.record.ended or disposable.leaving:
            return
        await self._save(disposable, dataclasses.replace(disposable.record, ended=True))
        vm = self._registry.find(disposable.name)
        if vm is not None and not disposable.leaving:
            await self._publication.close(vm)

    def _holder_gone(self, holder: str) -> None:
        for disposable in list(self._all.values()):
            if holder in disposable.record.holders:
                loop.spawn(self._let_go(disposable, holder))

    async def _let_go(self, disposable: Disposable, holder: str) -> None:
        left = tuple(each for each in disposable.record.holders if each != holder)
        record = dataclasses.replace(disposable.record, holders=left)
        if left:
            await self._save(disposable, record)
        else:
            disposable.record = record
            await self._destroy(disposable)

    async def _destroy(self, disposable: Disposable) -> None:
        """Take all of it away, the record last. What cannot be taken away yet counts until it is."""
        if disposable.leaving:
            return
        disposable.leaving = True
        self._drop_leashes(disposable)
        delay = RETRY_SECONDS
        while True:
            try:
                await self._take_away(disposable)
                break
            except Exception as error:  # nobody is above: whatever it is, the VM must not be forgotten
                bug = None if isinstance(error, VmsiloError) else error
                text = "VM %s: the disposable cannot be taken away yet, again in %g s: %s"
                level = logging.INFO if delay == RETRY_SECONDS and bug is None else logging.ERROR
                log.log(level, text, disposable.name, delay, error, exc_info=bug)
            await loop.after(delay)
            delay = min(2 * delay, RETRY_MAX_SECONDS)
        del self._all[disposable.name]
        disposable.gone.set_result(None)
        if disposable.shadows:
            await self._publication.reload()

    def _drop_leashes(self, disposable: Disposable) -> None:
        """But those of connections that hold another one."""
        others = [other for other in self._all.values() if not other.leaving]
        held = {holder for other in others for holder in other.record.holders}
        for holder in disposable.record.holders:
            if holder not in held:
                self._leashes.drop(holder)

    async def _take_away(self, disposable: Disposable) -> None:
        """Again after a failure: each step finds what the last attempt has left."""
        name = disposable.name
        vm = self._registry.find(name)
        if vm is not None and not disposable.removed:
            await self._lifecycle.discard(name)
            if vm.is_up or vm.record is not None:
                raise Failed("its run has not ended")
            await self._publication.remove(vm)
            disposable.removed = True
            vm.config, vm.configured, vm.problems = None, False, ("it was a disposable",)
            self._lifecycle.drop_gone()
        async with disposable.lock:
            await loop.in_worker(records.forget_record, name)

    async def _save(self, disposable: Disposable, record: DisposableRecord) -> None:
        disposable.record = record
        async with disposable.lock:
            if not disposable.leaving:
                await loop.in_worker(records.save_record, disposable.record)


def check_name(untrusted_name: str) -> None:
    """Before any path is made of it; "" asks for a name that is made up."""
    try:
        if untrusted_name:
            check_vm_name(untrusted_name)
    except ValueError as error:
        raise BadRequest(str(error)) from error
