"""Loading from directories: priorities, drop-ins, and that one broken file harms nobody else."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from vmsilod.config import Checks, Configuration, Problem, VmConfig, load_configuration
from vmsilod.config.schema import VmFile

BARE = Checks(files=False, accounts=False, ownership=False)
GLOBAL = 'user = "david"\n'
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load(root: Path, files: dict[str, str], checks: Checks = BARE) -> Configuration:
    """Writes `files` below `root` ("etc/vms.d/a.toml") and loads usr + etc."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return load_configuration((root / "usr", root / "etc"), checks)


def load_vm(root: Path, text: str, settings: str = GLOBAL) -> VmConfig:
    configuration = load(root, {"etc/vmsilo.toml": settings, "etc/vms.d/a.toml": text})
    assert configuration.problems == ()
    return configuration.vms["a"]


def facts(configuration: Configuration) -> list[tuple[str, str]]:
    return [(problem.key, problem.fact) for problem in configuration.problems]


def test_empty_file_is_a_vm_with_the_defaults(tmp_path: Path) -> None:
    vm = load_vm(tmp_path, "")
    assert (vm.name, vm.user, vm.memory, vm.cpus, vm.color) == ("a", "david", 1024, 2, "red")
    assert (vm.vmm, vm.image, vm.start_timeout, vm.stop_timeout) == ("auto", "default", 180, 30)
    assert (vm.kernel, vm.initramfs, vm.root_disk, vm.root_disk_readonly) == (None, None, None, True)
    assert (vm.crosvm.log_level, vm.qemu.accel, vm.qemu.machine) == ("info", "auto", "auto")
    assert not vm.auto_start
    assert vm.sources == (str(tmp_path / "etc/vms.d/a.toml"),)


def test_vm_inherits_and_overrides_global_values(tmp_path: Path) -> None:
    settings = (
        GLOBAL + 'vmm = "qemu"\nstop_timeout = 5\n'
        '[crosvm]\nlog_level = "debug"\nextra_args = ["--g"]\nextra_run_args = ["--gr"]\n'
        '[qemu]\naccel = "tcg"\nextra_args = ["-g"]\n'
    )
    vm = load_vm(
        tmp_path,
        'start_timeout = 7\n[crosvm]\nlog_level = "warn"\nextra_args = ["--v"]\n'
        '[qemu]\nmachine = "q35"\nextra_args = ["-v"]\n',
        settings,
    )
    assert (vm.vmm, vm.start_timeout, vm.stop_timeout) == ("qemu", 7, 5)
    assert (vm.crosvm.log_level, vm.crosvm.extra_args, vm.crosvm.extra_run_args) == (
        "warn",
        ("--g", "--v"),
        ("--gr",),
    )
    assert (vm.qemu.accel, vm.qemu.machine, vm.qemu.extra_args) == ("tcg", "q35", ("-g", "-v"))


def test_root_disk_is_a_path_or_a_table(tmp_path: Path) -> None:
    assert load_vm(tmp_path, 'root_disk = "/a"').root_disk_path == "/a"
    assert load_vm(tmp_path, 'root_disk = {path = "/b", format = "raw"}').root_disk_path == "/b"


def test_file_in_etc_replaces_vendor_file_and_drop_ins_merge(tmp_path: Path) -> None:
    configuration = load(
        tmp_path,
        {
            "usr/vmsilo.toml": 'user = "vendor"\nimage = "vendor"\n',
            "etc/vmsilo.toml": GLOBAL,
            "usr/vms.d/a.toml": "memory = 111\ncpus = 3\n",
            "etc/vms.d/a.toml": 'memory = 222\nkernel_params = ["x"]\n[crosvm]\nlog_level = "warn"\n',
            "usr/vms.d/a.toml.d/10.toml": "memory = 333\n",
            "usr/vms.d/a.toml.d/20.toml": "cpus = 9\n",
            "etc/vms.d/a.toml.d/20.toml": 'kernel_params = ["y", "z"]\n[crosvm]\nextra_args = ["-1"]\n',
        },
    )
    assert configuration.problems == ()
    vm = configuration.vms["a"]
    assert configuration.settings is not None
    assert (configuration.settings.user, configuration.settings.image.name) == ("david", "default")
    assert (vm.memory, vm.cpus, vm.kernel_params) == (333, 2, ("y", "z"))
    assert (vm.crosvm.log_level, vm.crosvm.extra_args) == ("warn", ("-1",))
    assert [Path(source).name for source in vm.sources] == ["a.toml", "10.toml", "20.toml"]


def test_problem_names_the_drop_in_that_set_the_key(tmp_path: Path) -> None:
    configuration = load(
        tmp_path,
        {
            "etc/vmsilo.toml": GLOBAL,
            "etc/vms.d/a.toml": "memory = 100\n",
            "etc/vms.d/a.toml.d/x.toml": '[crosvm]\nlog_level = "loud"\n',
        },
    )
    (problem,) = configuration.problems
    assert problem.file.endswith("a.toml.d/x.toml")
    assert problem.key == "crosvm.log_level"
    assert problem.vm == "a"


def test_link_to_dev_null_masks_the_vendor_vm(tmp_path: Path) -> None:
    (tmp_path / "etc/vms.d").mkdir(parents=True)
    (tmp_path / "etc/vms.d/a.toml").symlink_to("/dev/null")
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, "usr/vms.d/a.toml": ""})
    assert configuration.vms == {}
    assert configuration.problems == ()


def test_drop_ins_without_a_file_are_a_problem(tmp_path: Path) -> None:
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/a.toml.d/x.toml": ""})
    assert configuration.broken["a"][0].fact == "drop-ins for a VM without a file vms.d/a.toml"


def test_broken_file_disables_that_vm_alone_and_whoever_needs_it(tmp_path: Path) -> None:
    configuration = load(
        tmp_path,
        {
            "etc/vmsilo.toml": GLOBAL,
            "etc/vms.d/bad.toml": "memory = 1\n",
            "etc/vms.d/good.toml": "",
            "etc/vms.d/needs.toml": 'depends_on = ["bad", "good"]\n',
            "etc/vms.d/needs-needs.toml": 'depends_on = ["needs"]\n',
            "etc/vms.d/lost.toml": 'depends_on = ["nowhere"]\n',
        },
    )
    assert set(configuration.vms) == {"good"}
    assert set(configuration.broken) == {"bad", "needs", "needs-needs", "lost"}
    assert configuration.broken["needs"][0].fact == "names bad, which has problems of its own"
    assert configuration.broken["needs-needs"][0].fact == "names needs, which has problems of its own"
    assert configuration.broken["lost"][0].fact == "names nowhere, which does not exist"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (None, "does not exist"),
        ("", "required, but not set"),
        ('user = "david"\nuzer = 1\n', "unknown key 'uzer' (did you mean 'user'?)"),
    ],
)
def test_broken_global_file_breaks_every_vm(tmp_path: Path, text: str | None, fact: str) -> None:
    files = {"etc/vms.d/a.toml": "", "etc/vms.d/b.toml": ""}
    if text is not None:
        files["etc/vmsilo.toml"] = text
    configuration = load(tmp_path, files)
    assert configuration.settings is None
    assert configuration.vms == {}
    assert [problem.fact for problem in configuration.problems] == [fact]
    assert set(configuration.broken) == {"a", "b"}
    assert fact in configuration.broken["a"][0].fact


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    configuration = load(
        tmp_path,
        {
            "etc/vmsilo.toml": GLOBAL + "stop_timeout = 0\n",
            "etc/vms.d/a.toml": 'memory = 12\ncpus = "2"\nmemroy = 3\n',
            "etc/vms.d/b.toml": "memory = = 3\n",
        },
    )
    assert facts(configuration) == [
        ("stop_timeout", "0 is below 1 seconds"),
        ("memory", "12 is below 64 MiB"),
        ("cpus", "'2' is not a whole number"),
        ("", "unknown key 'memroy' (did you mean 'memory'?)"),
        ("", "line 1, column 10: Invalid value"),
    ]


def test_cycle_is_named_with_its_chain(tmp_path: Path) -> None:
    configuration = load(
        tmp_path,
        {
            "etc/vmsilo.toml": GLOBAL,
            "etc/vms.d/a.toml": 'depends_on = ["b"]',
            "etc/vms.d/b.toml": 'depends_on = ["c"]',
            "etc/vms.d/c.toml": 'depends_on = ["b"]',
            "etc/vms.d/self.toml": 'depends_on = ["self"]',
            "etc/vms.d/top.toml": 'depends_on = ["left", "right"]',
            "etc/vms.d/left.toml": 'depends_on = ["base"]',
            "etc/vms.d/right.toml": 'depends_on = ["base"]',
            "etc/vms.d/base.toml": "",
        },
    )
    assert {name: problems[0].fact for name, problems in configuration.broken.items()} == {
        "a": "names b, which has problems of its own",
        "b": "is a circle: b -> c -> b",
        "c": "is a circle: c -> b -> c",
        "self": "names the VM itself",
    }
    assert set(configuration.vms) == {"top", "left", "right", "base"}


def test_two_files_for_one_name_break_it_and_name_both_places(tmp_path: Path) -> None:
    configuration = load(
        tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/a.toml": "", "usr/vms.d/b.toml": 'name = "a"'}
    )
    assert configuration.vms == {}
    first, second = configuration.broken["a"]
    assert first.file.endswith("etc/vms.d/a.toml")
    assert "usr/vms.d/b.toml" in first.fact
    assert second.file.endswith("usr/vms.d/b.toml")
    assert "etc/vms.d/a.toml" in second.fact


@pytest.mark.parametrize("stem", ["Upper", "9a", "a" * 32, "a b", "relayd", "a\x1b[2J"])
def test_bad_names_are_refused(tmp_path: Path, stem: str) -> None:
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, f"etc/vms.d/{stem}.toml": ""})
    assert configuration.vms == {}
    assert configuration.problems[0].key in {"", "name"}
    assert all(str(problem).isprintable() for problem in configuration.problems)


@pytest.mark.parametrize("text", ["", 'name = "fine"\n'])
def test_file_name_that_is_not_utf8_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "etc/vms.d").mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/etc/vms.d/b\xff.toml")).write_text(text)
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL})
    assert configuration.vms == {}
    assert "not printable UTF-8" in configuration.problems[0].fact
    str(configuration.problems[0]).encode()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"color = '\xff'", "is not UTF-8 at byte 9"),
        (b"#" * (1024 * 1024 + 1), "is larger than 1048576 bytes"),
        (b"x=" + b"[" * 5000, "is nested too deeply"),
        (b"a" + b".a" * 2000 + b"=1", "is nested too deeply"),
        (b"x = " + b"9" * 5000, None),
    ],
)
def test_unreadable_content_is_a_problem_of_that_vm(
    tmp_path: Path, content: bytes, fact: str | None
) -> None:
    (tmp_path / "etc/vms.d").mkdir(parents=True)
    (tmp_path / "etc/vms.d/a.toml").write_bytes(content)
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/b.toml": ""})
    assert set(configuration.vms) == {"b"}
    if fact is not None:
        assert configuration.broken["a"][0].fact == fact


def test_fifo_and_directory_and_dangling_link_do_not_stop_the_load(tmp_path: Path) -> None:
    folder = tmp_path / "etc/vms.d"
    (folder / "dir.toml").mkdir(parents=True)
    os.mkfifo(folder / "fifo.toml")
    (folder / "link.toml").symlink_to("nowhere")
    (folder / ".#b.toml").symlink_to("editor@host")
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/b.toml": ""})
    assert {name: problems[0].fact for name, problems in configuration.broken.items()} == {
        "dir": "is not a regular file",
        "fifo": "is not a regular file",
        "link": "cannot be read: No such file or directory",
    }
    assert set(configuration.vms) == {"b"}


def test_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    checks = Checks(files=False, accounts=False, ownership=True)
    files = {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/a.toml": "", "etc/vms.d/b.toml": ""}
    load(tmp_path, files)
    (tmp_path / "etc/vms.d/a.toml").chmod(0o664)
    (tmp_path / "etc/vms.d/b.toml").chmod(0o644)
    configuration = load_configuration((tmp_path / "usr", tmp_path / "etc"), checks)
    if os.getuid() == 0:
        assert set(configuration.vms) == {"b"}
        assert configuration.broken["a"][0].fact == "can be written by others than root (mode 0664)"
    else:
        assert "not to root" in configuration.broken["b"][0].fact


def test_files_that_a_vm_names_must_exist(tmp_path: Path) -> None:
    kernel, folder = tmp_path / "vmlinuz", tmp_path / "folder"
    kernel.write_bytes(b"")
    folder.mkdir()
    configuration = load(
        tmp_path,
        {
            "etc/vmsilo.toml": GLOBAL,
            "etc/vms.d/a.toml": f'kernel = "{kernel}"\nroot_disk = "{kernel}"\n',
            "etc/vms.d/b.toml": f'kernel = "{folder}"\ninitramfs = "{tmp_path}/no"\nroot_disk = "/dev/null"',
        },
        Checks(files=True, accounts=False, ownership=False),
    )
    assert set(configuration.vms) == {"a"}
    assert [(problem.key, problem.fact) for problem in configuration.broken["b"]] == [
        ("kernel", f"'{folder}' is not a file"),
        ("initramfs", f"'{tmp_path}/no': No such file or directory"),
        ("root_disk.path", "'/dev/null' is not a file or block device"),
    ]


@pytest.mark.parametrize(
    ("user", "fact"),
    [("root", "'root' is root"), ("no-such-user", "this machine has no user 'no-such-user'")],
)
def test_user_must_exist_and_not_be_root(tmp_path: Path, user: str, fact: str) -> None:
    checks = Checks(files=False, accounts=True, ownership=False)
    configuration = load(tmp_path, {"etc/vmsilo.toml": f'user = "{user}"\n'}, checks)
    assert facts(configuration) == [("user", fact)]
    assert configuration.settings is None


def test_problem_as_a_line() -> None:
    assert str(Problem("/f", "a.b", "is bad", "hint")) == "/f: a.b: is bad"
    assert str(Problem("/f", "", "is bad")) == "/f: is bad"


def test_examples_have_no_problems() -> None:
    configuration = load_configuration((EXAMPLES,), BARE)
    assert configuration.problems == ()
    assert set(configuration.vms) == {"banking", "personal", "shopping", "untrusted"}
    spelled_out = tomllib.loads((EXAMPLES / "vms.d/personal.toml").read_text())
    assert spelled_out.keys() >= {"memory", "cpus"}
    for key, value in spelled_out.items():
        assert VmFile.model_fields[key].default == value
