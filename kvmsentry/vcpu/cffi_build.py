"""How kvmsentry.vcpu._kvm is built: the C of this folder, with api.h as the interface. setup.py runs this."""

from __future__ import annotations

import os

from cffi import FFI

HERE = os.path.join("kvmsentry", "vcpu")
SOURCES = ("vm", "runner", "sentry", "place", "spin", "probe", "mem")


def interface() -> str:
    """The declarations of api.h between its two markers."""
    with open(os.path.join(HERE, "api.h")) as file:
        text = file.read()
    return text.split("/* cffi: from here */")[1].split("/* cffi: to here */")[0]


ffibuilder = FFI()
ffibuilder.cdef(interface())
ffibuilder.set_source(
    "kvmsentry.vcpu._kvm",
    '#include "ks.h"\n#include "api.h"\n',
    sources=[os.path.join(HERE, f"{name}.c") for name in SOURCES],
    depends=[
        os.path.join(HERE, "ks.h"),
        os.path.join(HERE, "api.h"),
        os.path.join(HERE, "spin.h"),
        "guest_stub/layout.h",
        "guest_stub/out/stub_blob.h",
        "guest_stub/out/vdso_blob.h",
        "guest_stub/out/constants.h",
    ],
    include_dirs=[HERE, "guest_stub", os.path.join("guest_stub", "out")],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fno-strict-aliasing"],
)
