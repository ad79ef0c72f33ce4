"""Loading an ELF program: segments, interpreter, heap, stack (System V ABI, x86-64 psABI 3.4, fs/binfmt_elf.c).

The file is an attacker's: every header is read once into a tuple, bounded and checked before anything is mapped. What
the loader maps goes through AddressSpace.mmap like any mapping of the application's, so a bad segment can do no more
than a bad mmap.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from kvmsentry.errors import Errno
from kvmsentry.mm.stack import Stack
from kvmsentry.mm.vma import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    random_below,
)

PAGE = 4096
EHDR = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
PHDR = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little endian
ET_EXEC, ET_DYN, EM_X86_64 = 2, 3, 62
PT_LOAD, PT_INTERP, PT_GNU_STACK = 1, 3, 0x6474E551
PF_X, PF_W, PF_R = 1, 2, 4
PHDRS_MAX = 65536  # bytes of program headers that Linux reads
PATH_MAX = 4096
ALIGN_MAX = 1 << 30
BRK_RND = 0x0200_0000  # arch_randomize_brk: 32 MiB
ET_DYN_RND_PAGES = 1 << 28

AT_NULL, AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_BASE, AT_FLAGS, AT_ENTRY = 0, 3, 4, 5, 6, 7, 8, 9
AT_UID, AT_EUID, AT_GID, AT_EGID, AT_PLATFORM, AT_HWCAP, AT_CLKTCK = 11, 12, 13, 14, 15, 16, 17
AT_SECURE, AT_RANDOM, AT_HWCAP2, AT_RSEQ_FEATURE_SIZE, AT_RSEQ_ALIGN, AT_EXECFN = 23, 25, 26, 27, 28, 31
AT_SYSINFO_EHDR, AT_MINSIGSTKSZ = 33, 51


class Reader(Protocol):
    """The file as the loader reads it: `pread` may come short only at the end."""

    @property
    def size(self) -> int: ...

    def pread(self, offset: int, n: int) -> bytes: ...


class Segment(NamedTuple):
    """A program header, Elf64_Phdr's fields."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Program(NamedTuple):
    """A checked file: its headers, nothing mapped yet."""

    dynamic: bool
    entry: int
    phoff: int
    segments: list[Segment]

    @property
    def loads(self) -> list[Segment]:
        return [segment for segment in self.segments if segment.type == PT_LOAD]

    @property
    def low(self) -> int:
        return min(segment.vaddr for segment in self.loads) & -PAGE

    @property
    def high(self) -> int:
        return max(segment.vaddr + segment.memsz for segment in self.loads)

    @property
    def align(self) -> int:
        """The largest alignment asked for that is a power of two and sane."""
        wanted = [s.align for s in self.loads if s.align & (s.align - 1) == 0 and PAGE < s.align <= ALIGN_MAX]
        return max(wanted, default=PAGE)


@dataclass(slots=True)
class Image:
    """What exec needs to start the program, and what /proc/PID shows of it."""

    entry: int = 0  # where the first instruction is: the interpreter's, if there is one
    stack_pointer: int = 0
    base: int = 0  # the interpreter's load address, 0 without one
    bias: int = 0
    program_entry: int = 0
    phdr: int = 0
    start_code: int = 0
    end_code: int = 0
    start_data: int = 0
    end_data: int = 0
    start_brk: int = 0
    start_stack: int = 0
    arg_start: int = 0
    arg_end: int = 0
    env_start: int = 0
    env_end: int = 0
    auxv: bytes = b""
    interpreter: bytes = b""
    executable_stack: bool = False


@dataclass(slots=True)
class Aux:
    """The auxiliary vector's values that the kernel knows and the file does not."""

    uid: int = 0
    euid: int = 0
    gid: int = 0
    egid: int = 0
    secure: bool = False
    hwcap: int = 0  # CPUID 1 EDX
    hwcap2: int = 2  # bit 1: FSGSBASE may be used (arch/x86/include/uapi/asm/hwcap2.h)
    clktck: int = 100
    minsigstksz: int = 0  # 0: not given
    sysinfo_ehdr: int = 0  # address of the vDSO, which the caller has mapped; 0: not given
    rseq_size: int = 0  # 0: not given
    rseq_align: int = 0
    random: bytes = field(default_factory=lambda: os.urandom(16))


def is_elf(head: bytes) -> bool:
    """Whether a file that begins so is for this loader (else exec goes on with `#!`)."""
    return head[:4] == b"\x7fELF"


def parse(reader: Reader, user_top: int, bad: int = errno.ENOEXEC) -> Program:
    """Reads and checks the headers. Errno(`bad`) for what is no program for this machine, Errno(EINVAL) for sizes that
    cannot be."""
    header = reader.pread(0, EHDR.size)
    if len(header) < EHDR.size:
        raise Errno(bad)
    ident, kind, machine, _version, entry, phoff, _shoff, _flags, _ehsize, phentsize, phnum = EHDR.unpack(header)[:11]
    if ident[:6] != MAGIC or kind not in (ET_EXEC, ET_DYN) or machine != EM_X86_64:
        raise Errno(bad)
    length = phnum * PHDR.size
    if phentsize != PHDR.size or not 0 < length <= PHDRS_MAX or phoff + length > reader.size:
        raise Errno(bad)
    table = reader.pread(phoff, length)
    if len(table) != length:
        raise Errno(bad)
    segments = [Segment._make(fields) for fields in PHDR.iter_unpack(table)]
    loads = 0
    for segment in segments:
        if segment.type != PT_LOAD:
            continue
        loads += 1
        if (
            segment.filesz > segment.memsz
            or segment.memsz > user_top
            or segment.vaddr > user_top - segment.memsz
            or segment.filesz
            and (segment.vaddr - segment.offset) % PAGE
        ):
            raise Errno(errno.EINVAL)
        if segment.filesz and segment.offset + segment.filesz > reader.size:
            raise Errno(bad)
    if not loads:
        raise Errno(bad)
    return Program(kind == ET_DYN, entry, phoff, segments)


def interpreter_of(program: Program, reader: Reader) -> bytes:
    """The path in PT_INTERP, b"" without one. Errno(ENOEXEC) when it is too long or not terminated, Errno(EIO) when cut
    off."""
    for segment in program.segments:
        if segment.type == PT_INTERP:
            if not 2 <= segment.filesz <= PATH_MAX:
                raise Errno(errno.ENOEXEC)
            path = reader.pread(segment.offset, segment.filesz)
            if len(path) != segment.filesz:
                raise Errno(errno.EIO)
            if path[-1]:
                raise Errno(errno.ENOEXEC)
            return path.split(b"\0", 1)[0]
    return b""


def map_program(space: Any, program: Program, backing: Any, bias: int) -> None:
    """Maps every PT_LOAD at its address plus `bias`; the range is known to be free, segments may replace one another's
    edges."""
    for segment in program.loads:
        prot = (
            (PROT_READ if segment.flags & PF_R else 0)
            | (PROT_WRITE if segment.flags & PF_W else 0)
            | (PROT_EXEC if segment.flags & PF_X else 0)
        )
        start = segment.vaddr + bias
        file_end = start + segment.filesz
        end = start + segment.memsz
        page = start & -PAGE
        anonymous = page
        if segment.filesz:
            length = file_end - page
            space.mmap(page, length, prot, MAP_PRIVATE | MAP_FIXED, backing, segment.offset - (start - page))
            anonymous = file_end + PAGE - 1 & -PAGE
            if segment.memsz > segment.filesz and prot & PROT_WRITE:
                # To the page's end, not the segment's: ld.so's first allocator uses the rest (padzero,
                # fs/binfmt_elf.c).
                space.zero(file_end, anonymous - file_end)
        if end > anonymous:  # writable whatever the segment says, as memory of brk(2) is (vm_brk_flags)
            prot = PROT_READ | PROT_WRITE | prot & PROT_EXEC
            space.mmap(anonymous, end - anonymous, prot, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS)


def _place(space: Any, program: Program, near: int) -> int:
    """The load bias for a position-independent program: at `near` or, for 0, where mmap would put it. Errno(ENOMEM)."""
    length = program.high - program.low
    align = program.align
    if near:
        start = near - near % align
        if start >= space.mmap_min and space.tree.free(start, start + length) and start + length <= space.user_top:
            return start - program.low
    start = space.tree.gap_below(length, space.mmap_min, space.mmap_base, align)
    return start - program.low


def load(
    space: Any,
    reader: Reader,
    backing: Any,
    argv: Sequence[bytes],
    envp: Sequence[bytes],
    execfn: bytes,
    open_interpreter: Callable[[bytes], tuple[Reader, Any]],
    aux: Aux | None = None,
    randomize: bool = True,
    program: Program | None = None,
) -> Image:
    """Fills the empty `space` with the program in `reader` (mapped through `backing`), its interpreter, heap and stack.

    `open_interpreter(path)` gives the interpreter's (reader, backing) or raises Errno. `argv`, `envp`: strings without
    NUL. `program`: what parse() said, when it was called before. Errnos: ENOEXEC, ELIBBAD (interpreter), EINVAL,
    ENOMEM, E2BIG, EIO, EPERM (below mmap_min_addr); the space is then good for destroy() only.
    """
    aux = aux or Aux()
    user_top = space.user_top
    program = program or parse(reader, user_top)
    path = interpreter_of(program, reader)
    interpreter, interpreter_backing = None, None
    if path:
        interpreter_reader, interpreter_backing = open_interpreter(path)
        try:
            interpreter = parse(interpreter_reader, user_top, errno.ELIBBAD)
        except Errno as error:
            raise Errno(errno.ENOMEM if error.errno == errno.EINVAL else error.errno) from None
    stack_flags = next((segment.flags for segment in program.segments if segment.type == PT_GNU_STACK), PF_R | PF_W)
    image = Image(interpreter=path, executable_stack=bool(stack_flags & PF_X))
    stack = Stack(space, argv, envp, execfn, randomize)  # checks E2BIG before anything is mapped
    with space.building():
        space.set_layout(randomize)
        stack.map(image.executable_stack)
        if program.dynamic:
            near = 0
            if (
                interpreter is not None
            ):  # ELF_ET_DYN_BASE; a static-pie or an interpreter run by hand goes where mmap puts it
                near = user_top // 3 * 2
                if randomize:
                    near += random_below(min(ET_DYN_RND_PAGES, user_top // 8 >> 12)) * PAGE
            image.bias = _place(space, program, near)
        elif not space.tree.free(program.low, program.high):
            raise Errno(errno.ENOMEM)
        if not 0 <= program.entry + image.bias < user_top:
            raise Errno(errno.EINVAL)
        map_program(space, program, backing, image.bias)
        image.program_entry = image.entry = program.entry + image.bias
        if interpreter is not None:
            if interpreter.dynamic:
                base = _place(space, interpreter, 0)
            else:
                base = 0
                if not space.tree.free(interpreter.low, interpreter.high):
                    raise Errno(errno.ENOMEM)
            map_program(space, interpreter, interpreter_backing, base)
            image.base = base + interpreter.low if interpreter.dynamic else 0
            image.entry = interpreter.entry + base
            if not 0 <= image.entry < user_top:
                raise Errno(errno.EINVAL)
        _describe(image, program)
        _start_heap(space, image, program, interpreter is None, randomize)
        stack.fill(image, _auxv(image, program, aux, stack))
    space.image = image
    return image


def _describe(image: Image, program: Program) -> None:
    """The addresses that /proc/PID/stat shows, and AT_PHDR."""
    bias = image.bias
    code = [s for s in program.loads if s.flags & PF_X] or program.loads
    data = [s for s in program.loads if not s.flags & PF_X] or program.loads
    image.start_code = min(s.vaddr for s in code) + bias
    image.end_code = max(s.vaddr + s.filesz for s in code) + bias
    image.start_data = max(s.vaddr for s in data) + bias
    image.end_data = max(s.vaddr + s.filesz for s in data) + bias
    for segment in program.loads:
        if segment.offset <= program.phoff < segment.offset + segment.filesz:
            image.phdr = program.phoff - segment.offset + segment.vaddr + bias
            break


def _start_heap(space: Any, image: Image, program: Program, alone: bool, randomize: bool) -> None:
    start = program.high + image.bias + PAGE - 1 & -PAGE
    if program.dynamic and alone:
        # In the mmap area there may be a mapping right behind it: the heap gets the place of other programs.
        # Its start is page aligned (randomize_page): C libraries put their first thread's block right there.
        start = space.user_top // 3 * 2 + PAGE - 1 & -PAGE
    if randomize:
        start += random_below(BRK_RND // PAGE) * PAGE
    if start >= space.user_top:
        raise Errno(errno.ENOMEM)
    image.start_brk = start
    space.start_heap(start)


def _auxv(image: Image, program: Program, aux: Aux, stack: Stack) -> list[tuple[int, int]]:
    """Linux's order (ARCH_DLINFO, then create_elf_tables)."""
    vector = [(AT_SYSINFO_EHDR, aux.sysinfo_ehdr)] if aux.sysinfo_ehdr else []
    if aux.minsigstksz:
        vector.append((AT_MINSIGSTKSZ, aux.minsigstksz))
    random, platform = stack.place_random(aux.random)
    vector += [
        (AT_HWCAP, aux.hwcap),
        (AT_PAGESZ, PAGE),
        (AT_CLKTCK, aux.clktck),
        (AT_PHDR, image.phdr),
        (AT_PHENT, PHDR.size),
        (AT_PHNUM, len(program.segments)),
        (AT_BASE, image.base),
        (AT_FLAGS, 0),
        (AT_ENTRY, image.program_entry),
        (AT_UID, aux.uid),
        (AT_EUID, aux.euid),
        (AT_GID, aux.gid),
        (AT_EGID, aux.egid),
        (AT_SECURE, int(aux.secure)),
        (AT_RANDOM, random),
        (AT_HWCAP2, aux.hwcap2),
        (AT_EXECFN, stack.execfn_at),
        (AT_PLATFORM, platform),
    ]
    if aux.rseq_size:
        vector += [(AT_RSEQ_FEATURE_SIZE, aux.rseq_size), (AT_RSEQ_ALIGN, aux.rseq_align)]
    vector.append((AT_NULL, 0))
    return vector


__all__ = ["Aux", "Image", "Program", "Reader", "is_elf", "load", "parse"]
