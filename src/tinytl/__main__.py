"""`python -m tinytl`: the command line."""

from .cli import main

main()
