"""Floor 2: hooks that observe gradients, and the statistics gathered from them. No PEFT here."""
