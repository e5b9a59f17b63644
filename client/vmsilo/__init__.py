"""The commands that a user types: vm-run, vm-shell, vm-start, vm-stop, vm-start-debug and vmsilo.

Owns a terminal and nothing else. Never imports the daemon's code. A process lives as long as one command.

`vm-run` is started once for every window that a user opens, so its warm path loads few modules:
`_socket`, `_signal` and `_json` are used in the place of `socket`, `signal` and `json`, whose
enumerations and regular expressions take longer than everything else together (docs/clients.md has the
figures).
"""
