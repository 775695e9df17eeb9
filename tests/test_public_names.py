"""What `import tinytl` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tinytl


def test_every_public_name_is_there() -> None:
    assert set(tinytl._ORIGIN) == set(tinytl.__all__)
    for name in tinytl.__all__:
        assert getattr(tinytl, name) is not None
    assert set(tinytl.__all__) < set(dir(tinytl))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'tinytl' has no attribute 'nothing'"):
        _ = tinytl.nothing


def test_importing_the_package_is_light() -> None:
    code = "import sys, tinytl; print([m for m in ('torch', 'numpy', 'PIL', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
