"""Hosts to test on: a container with real systemd, D-Bus and polkit, built and cached below .cache."""
