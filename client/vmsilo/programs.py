"""The outermost edge of every command: from an installed script to an exit status.

The scripts in bin/ call `launch` with what the build knows: where the parts are. It never returns; it
ends the process without the interpreter's farewell, which would cost a millisecond.
"""

import os
import sys

from vmsilo.errors import ClientError, UsageError, report, write_stderr
from vmsilo.place import Place

FAILED = {"vm-run": (125, 125)}  # status of a failure, status of a wrong command line
FAILED_OTHERS = (1, 2)


def launch(program: str, libdir: str, site_dirs: tuple[str, ...] = (), run_dir: str = "/run/vmsilo") -> None:
    status = run_program(program, sys.argv[1:], Place(libdir, site_dirs=site_dirs, run_dir=run_dir))
    os._exit(status)


def run_program(program: str, argv: list[str], place: Place) -> int:
    failed, wrong = FAILED.get(program, FAILED_OTHERS)
    _occupy_standard_fds()
    try:
        return _dispatch(program, argv, place)
    except UsageError as error:
        if not error.hint:
            error.hint = f"{program} --help"
        report(program, error)
        return error.status or wrong
    except ClientError as error:
        report(program, error)
        return error.status or failed
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception:
        import traceback

        write_stderr(f"{program}: internal error\n{traceback.format_exc()}")
        return failed


def _dispatch(program: str, argv: list[str], place: Place) -> int:
    if program == "vm-run":
        from vmsilo.run import main
    elif program == "vm-start":
        from vmsilo.lifecycle import main_start as main
    elif program == "vm-stop":
        from vmsilo.lifecycle import main_stop as main
    elif program == "vm-start-debug":
        from vmsilo.debug import main
    elif program == "vm-shell":
        from vmsilo.shell import main
    elif program == "vmsilo":
        from vmsilo.overview import main
    else:
        raise UsageError(f"no program '{program}'")
    return main(argv, place)


def _occupy_standard_fds() -> None:
    """Started without one of descriptors 0 to 2, the next open would get its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)
