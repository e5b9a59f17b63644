"""Images in huge pages: what the ledger tells a later vmsilod, a pool that gives less than was asked, the
configuration. The kernel's own pages are in test_hugepages_kernel.py.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from unit.test_config_load import GLOBAL, facts, load
from vmsilod.errors import StartFailed
from vmsilod.hugepages import pool
from vmsilod.hugepages.copying import Source
from vmsilod.hugepages.errors import NoHugepages
from vmsilod.hugepages.images import find_source
from vmsilod.hugepages.ledger import Entry, Ledger
from vmsilod.hugepages.store import Store, StorePlace
from vmsilod.resources import image

if TYPE_CHECKING:
    from pathlib import Path

# Ledger


@pytest.mark.parametrize(
    ("entry", "persistent", "taken"),
    [
        (Entry("a", "1", "held", 5), 99, 5),
        (Entry("a", "1", "growing", 5, before=10), 10, 0),  # killed before it asked
        (Entry("a", "1", "growing", 5, before=10), 13, 3),  # the kernel had no more
        (Entry("a", "1", "growing", 5, before=10), 15, 5),
        (Entry("a", "1", "growing", 5, before=10), 40, 5),  # others grew the pool as well
        (Entry("a", "1", "growing", 5, before=10), 2, 0),  # others shrank it
        (Entry("a", "1", "shrinking", 5, before=15), 15, 5),  # killed before it gave back
        (Entry("a", "1", "shrinking", 5, before=15), 10, 0),  # and after
        (Entry("a", "1", "shrinking", 5, before=15), 12, 2),
    ],
)
def test_what_is_to_be_given_back(entry: Entry, persistent: int, taken: int) -> None:
    assert entry.count_taken(persistent) == taken


def test_ledger_survives_and_garbage_is_no_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "state" / "hugepages")
    first, second = Entry("a", "1", "held", 5), Entry("b", "1", "growing", 2, 7)
    ledger.put(first)
    ledger.put(second)
    ledger.remove(first)
    assert Ledger(tmp_path / "state" / "hugepages").load() == {("b", "1"): second}
    (tmp_path / "state" / "hugepages").write_text('[{"image":')
    assert ledger.load() == {}


# A pool that gives less than was asked: a recorded sysfs folder, which never changes


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    folder = tmp_path / "sysfs"
    folder.mkdir()
    for name, count in (("nr", 0), ("free", 0), ("resv", 0), ("surplus", 0)):
        (folder / f"{name}_hugepages").write_text(f"{count}\n")
    return folder


def make_store(tmp_path: Path, sysfs: Path) -> Store:
    (tmp_path / "huge").mkdir()
    (tmp_path / "root.erofs").write_bytes(b"x" * (3 << 20))
    return Store(StorePlace(tmp_path / "huge", tmp_path / "ledger", sysfs))


def test_kernel_that_makes_no_pages_is_told_with_numbers(tmp_path: Path, sysfs: Path) -> None:
    (sysfs / "nr_hugepages").unlink()
    (sysfs / "nr_hugepages").symlink_to("free_hugepages")  # what is asked for is there, but not free...
    (sysfs / "resv_hugepages").write_text("2\n")  # ... because somebody has reserved it
    store = make_store(tmp_path, sysfs)
    with pytest.raises(NoHugepages) as caught:
        store.add(Source("img", "v1", tmp_path / "root.erofs"), lambda _part: None)
    assert "image 'img': it needs 2 of 2 MiB (4 MiB); 0 were free, and the kernel could make 2 more" in str(
        caught.value
    )
    assert "vm.nr_hugepages=2" in caught.value.hint
    assert (sysfs / "nr_hugepages").read_text() == "0"  # given back
    assert json.loads((tmp_path / "ledger").read_text()) == []


def test_kernel_without_huge_pages(tmp_path: Path) -> None:
    store = make_store(tmp_path, tmp_path / "nowhere")
    with pytest.raises(NoHugepages, match="no huge pages of 2 MiB"):
        store.add(Source("img", "v1", tmp_path / "root.erofs"), lambda _part: None)


def test_surplus_pages_of_others_are_not_taken_for_new_ones(
    tmp_path: Path, sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pages that others overdraw become ordinary ones first: five have to be asked for."""
    (sysfs / "surplus_hugepages").write_text("3\n")
    (sysfs / "nr_hugepages").write_text("3\n")
    store = make_store(tmp_path, sysfs)
    written: list[str] = []
    original = pool.set_persistent

    def note(count: int, folder: Path = pool.SYSFS) -> None:
        written.append(str(count))
        original(count, folder)

    monkeypatch.setattr(pool, "set_persistent", note)  # only looked at: a folder keeps no history
    with pytest.raises(NoHugepages):
        store.add(Source("img", "v1", tmp_path / "root.erofs"), lambda _part: None)
    assert written[0] == "5"


def test_mount_is_recognised(tmp_path: Path) -> None:
    info = tmp_path / "mountinfo"
    store = Store(StorePlace(mountinfo=info))
    line = "74 26 0:54 / /run/vmsilo/hugepages rw,relatime shared:5 - {} hugetlbfs rw,pagesize=2M\n"
    info.write_text("26 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + line.format("hugetlbfs"))
    assert store.is_mounted()
    info.write_text(line.format("tmpfs"))
    assert not store.is_mounted()


# Which digest


@pytest.mark.parametrize(
    ("manifest", "digest"),
    [
        ({"sha256": {"root.erofs": "ab"}}, "ab"),
        ({}, ""),
    ],
)
def test_digest_is_the_manifests(tmp_path: Path, manifest: dict[str, object], digest: str) -> None:
    version = tmp_path / "default" / "v1"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "default" / "current").symlink_to("v1")
    source = find_source(image.BootChoice("default"), tmp_path)
    assert (source.version, source.path.name, source.digest) == ("v1", "root.erofs", digest)


def test_version_can_be_pinned(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        (tmp_path / "default" / version).mkdir(parents=True)
        (tmp_path / "default" / version / "manifest.json").write_text("{}")
    (tmp_path / "default" / "current").symlink_to("v2")
    assert image.find_boot_files(image.BootChoice("default", version="v1"), tmp_path).version == "v1"
    with pytest.raises(StartFailed):
        image.find_boot_files(image.BootChoice("default", version="v3"), tmp_path)


# Configuration


def test_image_is_a_name_or_a_table_and_merges_key_by_key(tmp_path: Path) -> None:
    configuration = load(
        tmp_path,
        {
            "etc/vmsilo.toml": GLOBAL + 'image = {name = "work", hugepages = true, keep = 5}\n',
            "etc/vms.d/a.toml": "",
            "etc/vms.d/b.toml": 'image = "other"\n',
            "etc/vms.d/c.toml": 'image = {hugepages = false, short_of_pages = "page-cache"}\n',
        },
    )
    assert facts(configuration) == []
    found = {
        name: (vm.image, vm.image_options.hugepages, vm.image_options.short_of_pages, vm.image_options.keep)
        for name, vm in configuration.vms.items()
    }
    assert found == {
        "a": ("work", True, "refuse", 5),
        "b": ("other", True, "refuse", 5),
        "c": ("work", False, "page-cache", 5),
    }


def test_restart_is_needed_for_what_the_guest_has_only(tmp_path: Path) -> None:
    texts = {"a": "", "b": "image = {keep = 1}", "c": "image = {hugepages = true}"}
    files = {f"etc/vms.d/{name}.toml": text for name, text in texts.items()}
    vms = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, **files}).vms
    digests = {name: vm.model_copy(update={"name": "x"}).digest() for name, vm in vms.items()}
    assert digests["a"] == digests["b"] != digests["c"]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (
            'root_disk = "/dev/null"\nimage = {hugepages = true}',
            ("image.hugepages", "only for an image's"),
        ),
        ('root_disk = "/dev/null"\nimage = {device = "pmem"}', ("image.device", "only for an image's")),
        ('vmm = "crosvm"\nimage = {hugepages = true, device = "pmem"}', ("image.device", "crosvm cannot")),
        ('image = {short_of_pages = "swap"}', ("image.short_of_pages", "")),
        ("image = {keep = -1}", ("image.keep", "")),
        ("image = {hugepage = true}", ("image", "")),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, text: str, fact: tuple[str, str]) -> None:
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/a.toml": text + "\n"})
    ((key, told),) = facts(configuration)
    assert (key, told[: len(fact[1])]) == fact
