"""`python -m sculpt_ops`, the same as the `sculpt` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without its packages, say how to get them."""
    try:
        from .continual.cli import app
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("sculpt_ops"):
            raise
        sys.exit(f"sculpt needs {error.name}: pip install sculpt-ops[train]")
    app(prog_name="sculpt")


if __name__ == "__main__":
    main()
