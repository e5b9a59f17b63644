"""Where the installed parts are. Made once by the entry script, handed down, never changed."""


class Place:
    """`site_dirs` are searched for jeepney, and only when D-Bus is needed."""

    __slots__ = ("libdir", "run_dir", "site_dirs")

    def __init__(
        self,
        libdir: str = "/usr/lib/vmsilo",
        *,
        site_dirs: tuple[str, ...] = (),
        run_dir: str = "/run/vmsilo",
    ) -> None:
        self.libdir = libdir
        self.site_dirs = site_dirs
        self.run_dir = run_dir
