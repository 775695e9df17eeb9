"""The command line: parse, call the library, print. Bad input is one line on stderr and exit status 2."""

from .app import main

__all__ = ["main"]
