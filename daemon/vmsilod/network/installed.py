"""Whether the rules of a plan are installed, and their installation. All that the pool knows of nftables.

Called by the batch and the pool, in a worker. The ruleset carries its own digest, so what is asked of the
kernel is whether it has these very rules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vmsilod.errors import Failed, VmsiloError
from vmsilod.network import macvtap, nft, ruleset

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsilod.network.plan import NetworkPlan, Port


def render(plan: NetworkPlan, lent: frozenset[int]) -> str:
    """The rules of this plan on this host as it is now. Raises Failed."""
    return ruleset.render_ruleset(plan, replace(nft.look_around(plan), lent=lent))


def ensure_rules(rules: str, *, anew: bool) -> None:
    """`anew`: also where they are there, since a hook ends with its device. Raises Failed."""
    if anew or not nft.is_installed(rules):
        nft.apply(rules)
        if not nft.is_installed(rules):
            raise Failed("the rules are not what was just installed")


def find_fault(rules: str) -> str:
    """Why these rules do not hold, "" if they do."""
    try:
        return "" if nft.is_installed(rules) else "its rules are not installed"
    except VmsiloError as error:
        return error.message


def has_rules() -> bool:
    """Whether any rules of ours are there; False where that cannot be found out."""
    try:
        return nft.has_rules()
    except VmsiloError:
        return False


def remove_rules() -> None:
    """Nothing of ours is left to rule. Raises Failed."""
    if nft.has_rules():
        nft.remove()


def ensure_filters(ports: Iterable[Port]) -> None:
    """What macvtaps that are open may send. Raises Failed."""
    for port in ports:
        if not nft.has_chain("netdev", macvtap.table_of(port), macvtap.CHAIN):
            nft.load(macvtap.render_filter(port))


def remove_filters(ports: Iterable[Port]) -> None:
    """Raises Failed."""
    for port in ports:
        nft.load(macvtap.render_removal(port))


def find_drops() -> dict[str, dict[str, int]]:
    """Packets refused, by TAP and by kind, as `nft.read_counts` has them. Raises Failed."""
    return {
        tap: {kind: count.packets for kind, count in kinds.items()}
        for tap, kinds in nft.read_counts().items()
    }


def find_refused(port: Port) -> int:
    """Packets of the guest's that the filter of a macvtap dropped. Raises Failed."""
    return nft.read_counters(macvtap.table_of(port), macvtap.CHAINS)


def find_obstacles() -> tuple[str, ...]:
    """Chains of others that keep from passing what vmsilo opens; () also where that cannot be told."""
    try:
        return nft.find_obstacles()
    except Failed:
        return ()
