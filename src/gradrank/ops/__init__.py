"""Floor 0: math on tensors. Nothing here knows modules, files or hooks."""
