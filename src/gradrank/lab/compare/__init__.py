"""The grid of a comparison: which runs it has, in which order, and how each is carried out."""
