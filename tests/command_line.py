"""The command line called in this process, as a shell would call it in another."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tinytl.cli import main

# a run that takes a second: a network of random weights at a small resolution
SMALL = ["--backbone", "proxylessnas_mobile", "--no-pretrained", "--resolution", "64", "--threads", "1"]
QUICK = [*SMALL, "--epochs", "1", "--batch-size", "4"]


@dataclass(frozen=True)
class Done:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The one line on stderr of a command that was refused."""
        assert self.status == 2, self.err
        assert "Traceback" not in self.err
        (line,) = self.err.splitlines()
        assert line.startswith("tinytl: ")
        return line


def tinytl(*arguments: object, **environment: str) -> Done:
    out, err = io.StringIO(), io.StringIO()
    status: Any = None
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "200", **environment}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return Done(status, out.getvalue(), err.getvalue())
