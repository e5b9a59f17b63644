"""The resident agent in the guest: runs commands for authenticated connections from the host.

Started as root by a systemd unit of the guest, `python3 -I -S /usr/lib/vmsilo/vmsilo-agent`, and lives as
long as the guest.  One process, one thread, one epoll loop; standard library and `vmsilo_wire` only.

The unit has to say:

    Type=notify              READY=1 is sent once the agent listens
    NotifyAccess=main
    Delegate=yes             each command gets a cgroup below the unit's, and is killed through it
    KillMode=mixed           SIGTERM ends the agent; what is left in the unit is killed afterwards
    OOMPolicy=continue       one command out of memory must not stop all the others
    TasksMax=infinity        commands count as tasks of this unit
    LimitNOFILE=             not set: the agent raises its soft limit, and gives commands the original

It never: asks the host for anything, opens a file in a directory that the guest user can write to as root
(the child does that after it became that user), blocks the loop on a command, or starts a shell.
"""
