"""vmsilo-image: builds, lists and locates guest images below /var/lib/vmsilo/images.

A root command line tool, run by a person or by `vmsilo image`; no daemon imports it except `cpio`, which
vmsilod uses for the per-boot secret. It never talks to a running VM and never changes a published version.
"""
