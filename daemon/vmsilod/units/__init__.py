"""The per-VM systemd units: their text (`render.py`)."""
