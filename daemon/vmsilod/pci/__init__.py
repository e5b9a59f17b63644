"""PCI passthrough: what is there, what may be given away, and who has it. Standard library only."""
