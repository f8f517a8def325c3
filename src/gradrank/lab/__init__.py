"""Lab: real models, data, tasks and training, for the command line and for comparisons.

The floor above :mod:`gradrank.session`. It may use transformers and datasets; nothing below it
does. This file imports nothing heavy, so that the command line starts at once.
"""
