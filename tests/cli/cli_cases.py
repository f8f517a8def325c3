"""Arguments that keep a verb short, and the verb run in the process."""

from click.testing import CliRunner, Result

from gradrank.cli.main import main

TINY = ("--model", "tiny-llama", "--task", "tiny-lm", "--max-length", "16", "--batch-size", "4")
SHORT = ("--steps", "4", "--lr", "1e-2", "--eval-batches", "2")


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])
