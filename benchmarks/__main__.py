"""Run the benchmarks: ``python -m benchmarks [NAME ...] [FLAGS]`` (``make bench``).

Without names, the suite: every figure of the page of benchmarks, in about 27 minutes on two idle
cores. Flags go to each of them: ``--quick`` for a smoke in a tiny model, ``--out FOLDER``,
``--profile`` (one at a time). ``--list`` names all. Then ``python -m benchmarks.page`` writes the
tables and the figure of ``docs/benchmarks.md``.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SUITE = ("start", "allocate", "resize", "measure", "decide", "dynamic", "igu", "pilora")


def main() -> int:
    """Run the benchmarks that were named, or the suite, one after the other."""
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    words = sys.argv[1:]
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    named, flags = words[:first], words[first:]
    if "--list" in flags or "-h" in flags or "--help" in flags:
        print(__doc__)
        print(f"suite: {', '.join(SUITE)}. Others: {', '.join(set(known) - set(SUITE)) or 'none'}.")
        return 0
    unknown = [name for name in named if name not in known]
    if unknown:
        print(f"no benchmark '{unknown[0]}'. Known: {', '.join(known)}.", file=sys.stderr)
        return 2
    failed = []
    for name in named or SUITE:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", *flags]
        if subprocess.run(command, check=False, cwd=HERE.parent).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
