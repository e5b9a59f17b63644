"""The D-Bus side of vmsilod: org.vmsilo1 over the `Domain` of views.py, with polkit before every call."""
