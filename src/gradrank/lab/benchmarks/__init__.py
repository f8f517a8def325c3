"""Public benchmarks: each file reads one family from a local folder or from the public hub."""
