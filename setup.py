"""Builds the lab's compiled passes (native/lab_kernels.cpp) as a plain shared library beside tinytl.ops.

Everything else about the package stands in pyproject.toml. The library has a C interface and is loaded with ctypes,
so neither Python's headers nor PyTorch's are needed. Without a C++ compiler the package still installs and computes
the same results in plain PyTorch, more slowly: `optional=True` says so at build time, `tinytl profile` at run time.
"""

import sys

from setuptools import Extension, setup

OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

setup(
    ext_modules=[
        Extension(
            "tinytl.ops._lab_kernels",
            sources=["native/lab_kernels.cpp"],
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
        )
    ]
)
