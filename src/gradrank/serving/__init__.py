"""Adapters on their way to engines: read safely, folded, padded, written, checked, merged."""
