"""Small data made by seeded code: for tests, examples and trying things in seconds.

None of it measures language or vision; each has a pattern that a tiny model can learn.
"""

import numpy as np

_SUBJECTS = ("the cat", "a dog", "the old man", "my sister", "the small bird", "a tall tree")
_VERBS = ("sees", "likes", "finds", "hears", "draws", "follows")
_OBJECTS = ("the moon", "a river", "the red ball", "an open door", "the green hill", "a song")
_GOOD = ("wonderful", "bright", "moving", "funny", "clever", "warm")
_BAD = ("dull", "clumsy", "tedious", "empty", "noisy", "cold")
_FRAMES = ("the film is {}", "a {} story", "what a {} play", "i found it {}", "{} from the start")

IMAGE_CLASSES = ("horizontal", "vertical", "diagonal")


def sentences(count: int = 600, seed: int = 0) -> list[str]:
    """Make short sentences from a small grammar.

    Args:
        count: How many.
        seed: Seed.

    Returns:
        The sentences.
    """
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        subject, verb, thing = (
            words[int(rng.integers(len(words)))] for words in (_SUBJECTS, _VERBS, _OBJECTS)
        )
        made.append(f"{subject} {verb} {thing}.")
    return made


def opinions(count: int = 400, seed: int = 0) -> tuple[list[str], list[str]]:
    """Make one-line opinions with the label ``negative`` or ``positive``.

    Args:
        count: How many.
        seed: Seed.

    Returns:
        Texts and labels.
    """
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(count):
        positive = bool(rng.integers(2))
        words = _GOOD if positive else _BAD
        frame = _FRAMES[int(rng.integers(len(_FRAMES)))]
        texts.append(frame.format(words[int(rng.integers(len(words)))]))
        labels.append("positive" if positive else "negative")
    return texts, labels


def stripes(count: int = 240, size: int = 16, seed: int = 0) -> tuple[list[np.ndarray], list[str]]:
    """Make noisy pictures of stripes; the class is their direction.

    Args:
        count: How many.
        size: Width and height, pixels.
        seed: Seed.

    Returns:
        Pictures, each ``[size, size, 3]`` uint8, and labels from ``IMAGE_CLASSES``.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size]
    coordinates = {"horizontal": rows, "vertical": columns, "diagonal": rows + columns}
    pictures, labels = [], []
    for _ in range(count):
        label = IMAGE_CLASSES[int(rng.integers(len(IMAGE_CLASSES)))]
        phase = rng.uniform(0, 2 * np.pi)
        wave = 127.5 + 90 * np.sin(coordinates[label] * np.pi / 2 + phase)
        noisy = wave[:, :, None] + rng.normal(0, 20, size=(size, size, 3))
        pictures.append(np.clip(noisy, 0, 255).astype(np.uint8))
        labels.append(label)
    return pictures, labels
