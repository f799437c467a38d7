"""The demo: what leaks into the protected space, and three tasks in a row with and without protection.

Run it with `python examples/demo/demo.py`; README.md beside this file says what it shows and what it does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

NEEDED = ("sculpt_ops", "transformers", "accelerate", "gguf", "rich", "matplotlib")
CACHE_VARIABLE = "SCULPT_DEMO_CACHE"
DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "sculpt-demo"


def main() -> int:
    arguments = _arguments()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"The demo needs {', '.join(missing)}. At the top of the repository run\n"
              "    python -m pip install --no-build-isolation -e '.[train,demo]'", file=sys.stderr)  # fmt: skip
        return 1
    # Before torch starts its threads: those that wait by spinning fight with whatever else runs. 28 decompositions on
    # two busy cores took 58 s, and 4 s with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The bar of transformers' GGUF reader heeds nothing else, and would run into the demo's own.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # kill is to clean up like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from packages import DemoError
    from stages import FULL, QUICK, run_demo

    cache = Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser().resolve()
    output = arguments.output or cache / "results" / time.strftime("%Y%m%d-%H%M%S")
    try:
        run_demo(cache, output.resolve(), QUICK if arguments.quick else FULL)
    except DemoError as error:
        print(f"\nThe demo cannot go on: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The cache holds finished files only.", file=sys.stderr)
        return 130
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes: runs everything, shows nothing")
    parser.add_argument("--output", type=Path, help=f"new folder for the report (default: in ${CACHE_VARIABLE})")
    parser.epilog = f"{CACHE_VARIABLE}: folder for model and texts, default .cache/sculpt-demo in the repository"
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
