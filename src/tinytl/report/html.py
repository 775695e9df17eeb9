"""Text and data put into HTML so that they stay text and data, whatever names of classes and files hold."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from importlib import resources
from typing import Any

from tinytl.errors import one_line


def text(value: object) -> str:
    """A value as HTML text, also for an attribute in quotes; what is not printable shows as its escape."""
    return html.escape(one_line(str(value)), quote=True)


def data(value: Any) -> str:
    """A value as JSON that may stand in a script element: no character of it can end the element."""
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def megabytes(count: int) -> str:
    """Bytes as they are printed: MB (10^6 bytes), two digits; small ones in kB, so that none looks like nothing."""
    return f"{count / 1e6:,.2f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB" if count else "0"


def picture(jpeg: bytes) -> str:
    """A JPEG as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def document(title: str, body: Iterable[str]) -> str:
    """A whole page around `body`: style and script inside it, and a policy that lets it load nothing."""
    style, script = (
        resources.files("tinytl.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            *body,
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )
