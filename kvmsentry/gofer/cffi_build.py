"""How kvmsentry.gofer._host is built: the C files here, with their headers as the interface. setup.py runs this."""

from __future__ import annotations

import os

from cffi import FFI

HERE = os.path.join("kvmsentry", "gofer")
PARTS = ("listing", "hostcalls")


def interface() -> str:
    """The declarations of the headers between their two markers."""
    declarations = []
    for part in PARTS:
        with open(os.path.join(HERE, f"{part}.h")) as file:
            text = file.read()
        declarations.append(text.split("/* cffi: from here */")[1].split("/* cffi: to here */")[0])
    return "".join(declarations)


ffibuilder = FFI()
ffibuilder.cdef(interface())
ffibuilder.set_source(
    "kvmsentry.gofer._host",
    "".join(f'#include "{part}.h"\n' for part in PARTS),
    sources=[os.path.join(HERE, f"{part}.c") for part in PARTS],
    depends=[os.path.join(HERE, f"{part}.h") for part in PARTS],
    include_dirs=[HERE],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)
