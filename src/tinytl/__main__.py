"""`tinytl` and `python -m tinytl`: the command line, which is the lab's."""

import sys
from importlib.util import find_spec

NEEDED = ("torch", "numpy", "safetensors", "typer", "rich", "matplotlib")


def main() -> None:
    """Run the command line; without the lab's packages say what is missing, with exit status 2."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"tinytl: {', '.join(missing)} not found: this command belongs to the lab: pip install 'tinytl[lab]' "
            "(compiled programs train without it: python -m tinytl.runtime)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
