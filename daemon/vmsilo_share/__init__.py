"""What the units of shared directories run before they become virtiofsd. Standard library only."""
