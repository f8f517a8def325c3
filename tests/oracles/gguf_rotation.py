"""In which order llama.cpp keeps the rows of queries and keys of the Llama family, row by row."""


def rotation(d_out: int, heads: int) -> list[int]:
    """Return which row of transformers' matrix stands at each row of llama.cpp's.

    Transformers turns row ``i`` of a head with row ``i + h/2``, llama.cpp rows ``2i`` and
    ``2i + 1``.
    """
    size = d_out // heads
    found = []
    for head in range(heads):
        for pair in range(size // 2):
            found.append(head * size + pair)
            found.append(head * size + pair + size // 2)
    return found
