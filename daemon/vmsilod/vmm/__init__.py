"""VMM drivers: pure plans of an argv, and small control clients for a VMM that runs."""
