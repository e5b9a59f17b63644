"""Fixtures of the host tier: one container host with stand-in VMs, and after each test the look at what is
left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from conftest import require_container
from hosts.container import Container
from hosts.standin.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def standin_site() -> Iterator[Site]:
    require_container()
    with Container(with_image=False) as host:
        site = Site(host)
        site.install()
        host.configure()
        host.run("systemctl start vmsilo-relayd.service vmsilo-consoled.service")
        site.define(name="warm-up")
        assert site.vm_run("warm-up", "true").returncode == 0  # what is opened once, is open from here on
        host.run("vm-stop warm-up && rm /etc/vmsilo/vms.d/warm-up.toml")
        host.wait_until("test ! -e /run/systemd/system/vmsilo-warm-up.socket")
        yield site


@pytest.fixture
def site(standin_site: Site) -> Iterator[Site]:
    standin_site.arrive()
    yield standin_site
    left = standin_site.leave()
    assert not left, "left over:\n" + "\n".join(left)
