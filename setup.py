"""Builds the guest stub (gcc, ld, objcopy), then the cffi extensions that carry it.

kvmsentry/vcpu/layout.py is the one truth about layouts: its integers become guest_stub/out/constants.h.
"""

from __future__ import annotations

import glob
import os
import runpy
import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = os.path.dirname(os.path.abspath(__file__))
STUB = os.path.join(ROOT, "guest_stub")
OUT = os.path.join(STUB, "out")


def write_if_changed(path: str, text: str) -> None:
    """Keeps timestamps of unchanged generated files, so that nothing is rebuilt for them."""
    try:
        with open(path) as file:
            if file.read() == text:
                return
    except FileNotFoundError:
        pass
    with open(path, "w") as file:
        file.write(text)


def write_constants() -> None:
    """guest_stub/out/constants.h: `#define KS_NAME value` for every upper-case integer of layout.py."""
    layout = runpy.run_path(os.path.join(ROOT, "kvmsentry", "vcpu", "layout.py"))
    lines = ["/* Made from kvmsentry/vcpu/layout.py by setup.py. */"]
    for name, value in layout.items():
        if name.isupper() and isinstance(value, int):
            lines.append(f"#define KS_{name} {value:#x}")
    write_if_changed(os.path.join(OUT, "constants.h"), "\n".join(lines) + "\n")


def build_stub() -> None:
    """Links guest_stub/entry.S to a flat image; leaves it and its symbols in guest_stub/out/stub_blob.h."""
    os.makedirs(OUT, exist_ok=True)
    write_constants()

    def path(name: str) -> str:
        return os.path.join(OUT, name)

    compiler = os.environ.get("CC", "gcc").split()
    assemble = [*compiler, "-ffreestanding", "-c", f"-I{STUB}", f"-I{OUT}", "-o", path("entry.o")]
    subprocess.run([*assemble, os.path.join(STUB, "entry.S")], check=True)
    link = ["ld", "-nostdlib", "-z", "noexecstack", "--build-id=none", "-e", "n_start", "-o", path("stub.elf")]
    subprocess.run([*link, "-T", os.path.join(STUB, "stub.ld"), path("entry.o")], check=True)
    subprocess.run(["objcopy", "-O", "binary", path("stub.elf"), path("stub.bin")], check=True)
    symbols = subprocess.run(["nm", path("stub.elf")], check=True, capture_output=True, text=True).stdout
    with open(path("stub.bin"), "rb") as file:
        blob = file.read()
    lines = ["/* Made from guest_stub/ by setup.py: the image at KS_GPA_ENTRY and its addresses. */"]
    for line in symbols.splitlines():
        value, kind, name = line.split()
        if kind == "T" and name[1] == "_":
            lines.append(f"#define STUB_{name} 0x{value}ULL")
    rows = [",".join(str(byte) for byte in blob[i : i + 32]) for i in range(0, len(blob), 32)]
    lines.append("static const unsigned char ks_stub_blob[] = {\n" + ",\n".join(rows) + "\n};")
    write_if_changed(path("stub_blob.h"), "\n".join(lines) + "\n")


def build_vdso() -> None:
    """Links guest_stub/vdso.c to the shared object that applications get mapped; guest_stub/out/vdso_blob.h."""
    image = os.path.join(OUT, "vdso.so")
    compiler = os.environ.get("CC", "gcc").split()
    flags = "-O2 -std=gnu11 -fPIC -shared -nostdlib -ffreestanding -fno-builtin -fno-stack-protector -mno-avx".split()
    flags += ["-fcf-protection=none", "-fasynchronous-unwind-tables", "-s"]
    linker = ["-soname=linux-vdso.so.1", "--hash-style=both", "--build-id=none", "-z,max-page-size=4096"]
    linker += ["--eh-frame-hdr", "-T," + os.path.join(STUB, "vdso.ld")]
    subprocess.run(
        [*compiler, *flags, *[f"-Wl,{word}" for word in linker], "-o", image, os.path.join(STUB, "vdso.c")], check=True
    )
    with open(image, "rb") as file:
        blob = file.read()
    rows = [",".join(str(byte) for byte in blob[i : i + 32]) for i in range(0, len(blob), 32)]
    text = "/* Made from guest_stub/vdso.c by setup.py. */\nstatic const unsigned char ks_vdso_blob[] = {\n"
    write_if_changed(os.path.join(OUT, "vdso_blob.h"), text + ",\n".join(rows) + "\n};\n")


class BuildExt(build_ext):
    """The stub first: the extension embeds it."""

    def run(self) -> None:
        build_stub()
        build_vdso()
        super().run()


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Extension(
            "kvmsentry.vcpu._dispatch",
            sources=["kvmsentry/vcpu/dispatch.c"],
            depends=[*glob.glob("kvmsentry/vcpu/*.h"), "guest_stub/layout.h", "guest_stub/out/constants.h"],
            include_dirs=["kvmsentry/vcpu", "guest_stub", "guest_stub/out"],
            extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
        )
    ],
    cffi_modules=[f"{path}:ffibuilder" for path in sorted(glob.glob("kvmsentry/*/cffi_build.py"))],
)
