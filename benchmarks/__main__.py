"""Run every benchmark with its defaults: ``python -m benchmarks [name ...]`` (``make bench``)."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Run the benchmarks that were named, or all of them, one after the other."""
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    wanted = sys.argv[1:] or known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(f"no benchmark '{unknown[0]}'. Known: {', '.join(known)}.", file=sys.stderr)
        return 2
    for name in wanted:
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, str(HERE / f"bench_{name}.py")], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
