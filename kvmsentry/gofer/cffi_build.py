"""How kvmsentry.gofer._listing is built: listing.c, with listing.h as the interface. setup.py runs this."""

from __future__ import annotations

import os

from cffi import FFI

HERE = os.path.join("kvmsentry", "gofer")


def interface() -> str:
    """The declarations of listing.h between its two markers."""
    with open(os.path.join(HERE, "listing.h")) as file:
        text = file.read()
    return text.split("/* cffi: from here */")[1].split("/* cffi: to here */")[0]


ffibuilder = FFI()
ffibuilder.cdef(interface())
ffibuilder.set_source(
    "kvmsentry.gofer._listing",
    '#include "listing.h"\n',
    sources=[os.path.join(HERE, "listing.c")],
    depends=[os.path.join(HERE, "listing.h")],
    include_dirs=[HERE],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)
