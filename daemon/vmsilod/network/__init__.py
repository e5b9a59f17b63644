"""The VMs' networks: TAPs, their addresses and the firewall around them."""
