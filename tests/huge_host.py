"""The kernel's huge pages as a container host of the tests sees them. Used by tests/host, tests/e2e and
tests/bench.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from vmsilod.hugepages import pool

if TYPE_CHECKING:
    from hosts.container import Container

FOLDER = "/run/vmsilo/hugepages"


def require_pages(count: int) -> None:
    """Skip where this machine's kernel cannot make that many pages of 2 MiB."""
    if not pool.SYSFS.is_dir():
        pytest.skip("needs a kernel with huge pages of 2 MiB")
    before = pool.read_counters().persistent
    pool.set_persistent(before + count)
    made = pool.read_counters().persistent - before
    pool.set_persistent(before)
    if made < count:
        pytest.skip(f"needs {count} huge pages, and the kernel could make only {made}")


OPEN_SYSFS = """
mount -o remount,rw "$(findmnt -n -o TARGET --target /sys/kernel/mm)" || exit
test -w /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages && systemctl restart vmsilod.service
"""


def open_sysfs(host: Container) -> None:
    """systemd-nspawn mounts sysfs read-only; a real host has it writable, which is what vmsilod gets."""
    host.run(OPEN_SYSFS)


PLAIN = """
cd /var/lib/vmsilo/images/default/$(readlink /var/lib/vmsilo/images/default/current)
target=/var/lib/vmsilo/images/plain/20260101T000000Z-00000001
mkdir -p $target && cp --reflink=auto vmlinuz initrd manifest.json $target/
work=$(mktemp -d -p /var/tmp)
fsck.erofs --extract=$work/root --preserve --overwrite root.erofs >/dev/null
mkfs.erofs --quiet --preserve-mtime -Enoinline_data $target/root.erofs $work/root
rm -rf $work
truncate -s %2M $target/root.erofs
sum=$(sha256sum $target/root.erofs | cut -d' ' -f1)
size=$(stat -c %s $target/root.erofs)
sed -i '/"root.erofs"/{s/: "[0-9a-f]*"/: "'$sum'"/;s/: [0-9][0-9]*/: '$size'/}' $target/manifest.json
ln -sfn 20260101T000000Z-00000001 /var/lib/vmsilo/images/plain/current
echo $size
"""


def make_plain_image(host: Container) -> int:
    """The default image once more, as "plain" and without compression: only that is used in place (DAX).
    Returns its root's pages. It lies in the cached images folder: drop_plain_image().
    """
    return int(host.run(f"set -e\n{PLAIN}").stdout.split()[-1]) >> 21


def drop_plain_image(host: Container) -> None:
    host.run(["rm", "-rf", "/var/lib/vmsilo/images/plain"])


def list_images(host: Container) -> list[str]:
    """What is in vmsilo's hugetlbfs, partial copies too."""
    return host.run(f"ls -A {FOLDER} 2>/dev/null", check=False).stdout.split()
