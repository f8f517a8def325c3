"""Floor 3: one file per method, one line per method in the registry."""
