"""The command line: each command is a thin call of one Python function."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without its packages, say what to install."""
    try:
        from dinofast.commands import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f"dinofast: the command line needs {missing}: pip install 'dinofast[cli]'")
    run()


if __name__ == "__main__":
    main()
