"""ELF loading: what is mapped where, the stack's layout, and hostile headers."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mm_fakes import PAGE, FakeFile, World

from kvmsentry.errors import Errno
from kvmsentry.mm import elf
from kvmsentry.mm.space import AddressSpace

R, RW, RX = 4, 6, 5  # PF_ bits
LOAD, INTERP, GNU_STACK = 1, 3, 0x6474E551


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    def pread(self, offset: int, n: int) -> bytes:
        return self.data[offset : offset + n]


def build(
    segments: list[tuple[int, ...]], kind: int = 2, entry: int = 0x401000, size: int = 3 * PAGE, **fields
) -> bytes:
    """An ELF file: segments of (type, flags, offset, vaddr, filesz, memsz[, align]); its bytes name their own page."""
    header = {
        "ident": elf.MAGIC + bytes(10),
        "machine": 62,
        "phoff": 64,
        "phentsize": 56,
        "phnum": len(segments),
        **fields,
    }
    data = bytearray(b"".join(bytes([0x41 + page]) * PAGE for page in range(size // PAGE)) + b"z" * (size % PAGE))
    head = elf.EHDR.pack(header["ident"], kind, header["machine"], 1, entry, header["phoff"], 0, 0, 64,
                         header["phentsize"], header["phnum"], 0, 0, 0)  # fmt: skip
    table = b"".join(
        elf.PHDR.pack(s[0], s[1], s[2], s[3], s[3], s[4], s[5], s[6] if len(s) > 6 else PAGE) for s in segments
    )
    data[: len(head)] = head
    data[64 : 64 + len(table)] = table
    return bytes(data[:size])


STATIC = [
    (LOAD, RX, 0, 0x400000, PAGE + 100, PAGE + 100),
    (LOAD, RW, PAGE + 0x200, 0x402200, 0x100, 3 * PAGE),
    (GNU_STACK, RW, 0, 0, 0, 0),
]
SPIE = [(LOAD, RX, 0, 0, PAGE + 100, PAGE + 100), (LOAD, RW, PAGE + 0x200, 0x2200, 0x100, 3 * PAGE)]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def space(world: World) -> Iterator[AddressSpace]:
    space = world.space()
    yield space
    space.destroy()
    assert world.census() == 0


def no_interpreter(path: bytes):
    raise Errno(errno.ENOENT)


def run(
    world: World, space: AddressSpace, data: bytes, argv=(b"prog",), envp=(), open_interpreter=no_interpreter, **more
):
    return elf.load(
        space, Reader(data), FakeFile(world.memory, data), argv, envp, b"/bin/prog", open_interpreter, **more
    )


def error(world: World, space: AddressSpace, data: bytes, **more) -> int:
    with pytest.raises(Errno) as caught:
        run(world, space, data, **more)
    return caught.value.errno


def test_static_program(world: World, space: AddressSpace) -> None:
    data = build(STATIC)
    image = run(world, space, data)
    assert image.entry == image.program_entry == 0x401000 and image.base == image.bias == 0
    assert image.phdr == 0x400040
    assert space.read(0x400000, PAGE + 100) == data[: PAGE + 100]
    assert space.read(0x402200, 0x100) == data[PAGE + 0x200 : PAGE + 0x300]
    assert space.read(0x402300, 3 * PAGE - 0x100) == bytes(3 * PAGE - 0x100), "bss"
    assert [(vma.start, vma.end, vma.prot) for vma in space.maps()][:3] == [
        (0x400000, 0x402000, 5),
        (0x402000, 0x403000, 3),
        (0x403000, 0x406000, 3),
    ]
    assert image.start_brk >= 0x406000 and space.set_brk(image.start_brk + PAGE) == image.start_brk + PAGE
    assert world.platform.calls == [], "nobody has run in it: nothing to invalidate"


def test_the_same_without_randomness_twice(world: World) -> None:
    images = []
    for _ in range(2):
        space = world.space()
        images.append(
            run(world, space, build(SPIE, kind=3, entry=0x1000), randomize=False, aux=elf.Aux(random=bytes(16)))
        )
        space.destroy()
    assert images[0] == images[1]


def test_static_pie_and_interpreter(world: World, space: AddressSpace) -> None:
    image = run(world, space, build(SPIE, kind=3, entry=0x1000))
    assert image.bias and image.entry == image.bias + 0x1000 and image.base == 0
    assert image.start_brk % PAGE == 0, "the C library's thread block goes there"
    assert space.read(image.bias + PAGE, 1) == b"B"
    other = world.space()
    path = b"/lib/ld.so\0"
    data = bytearray(build([*SPIE, (INTERP, R, 0x800, 0x800, len(path), len(path))], kind=3, entry=0x1000))
    data[0x800 : 0x800 + len(path)] = path
    linker = build(SPIE, kind=3, entry=0x1010)
    seen = []

    def open_interpreter(name: bytes):
        seen.append(name)
        return Reader(linker), FakeFile(world.memory, linker)

    image = run(world, other, bytes(data), open_interpreter=open_interpreter)
    assert seen == [b"/lib/ld.so"] == [image.interpreter]
    assert image.entry == image.base + 0x1010 and image.program_entry == image.bias + 0x1000
    assert other.read(image.base + PAGE, 1) == other.read(image.bias + PAGE, 1) == b"B"
    aux = dict(zip(*[iter(struct.unpack(f"<{len(image.auxv) // 8}Q", image.auxv))] * 2, strict=True))
    assert aux[elf.AT_BASE] == image.base and aux[elf.AT_ENTRY] == image.program_entry
    other.destroy()


def test_memory_without_a_file_is_writable_and_lies_anywhere_in_it(world: World, space: AddressSpace) -> None:
    segments = [*STATIC, (LOAD, R, 0x123, 0x410000, 0, PAGE), (LOAD, R, 1 << 40, 0x411000, 0, PAGE)]
    run(world, space, build(segments))
    assert [(vma.start, vma.end, vma.prot) for vma in space.maps() if 0x410000 <= vma.start < 0x412000] == [
        (0x410000, 0x412000, 3)
    ]


def test_alignment_of_segments_is_kept(world: World, space: AddressSpace) -> None:
    image = run(world, space, build([(LOAD, RX, 0, 0, PAGE, PAGE, 1 << 21)], kind=3, entry=0))
    assert image.bias % (1 << 21) == 0


def test_stack_as_the_abi_has_it(world: World, space: AddressSpace) -> None:
    aux = elf.Aux(
        uid=1, euid=2, gid=3, egid=4, secure=True, hwcap=0xBFEBFBFF, random=b"0123456789abcdef", minsigstksz=3632
    )
    image = run(world, space, build(STATIC), argv=[b"prog", b"", b"two words"], envp=[b"A=1", b"B="], aux=aux)
    sp = image.stack_pointer
    assert sp % 16 == 0
    argc, *pointers = struct.unpack("<8Q", space.read(sp, 64))
    assert argc == 3 and pointers[3] == 0 and pointers[6] == 0
    assert [space.read_cstring(at, 100) for at in pointers[:3]] == [b"prog", b"", b"two words"]
    assert [space.read_cstring(at, 100) for at in pointers[4:6]] == [b"A=1", b"B="]
    assert space.read(sp + 64, len(image.auxv)) == image.auxv
    vector = dict(zip(*[iter(struct.unpack(f"<{len(image.auxv) // 8}Q", image.auxv))] * 2, strict=True))
    assert image.auxv[-16:] == bytes(16)
    assert [vector[key] for key in (11, 12, 13, 14, 23)] == [1, 2, 3, 4, 1]
    assert vector[elf.AT_PHDR] == 0x400040 and vector[elf.AT_PHNUM] == 3 and vector[elf.AT_PHENT] == 56
    assert vector[elf.AT_PAGESZ] == PAGE and vector[elf.AT_CLKTCK] == 100 and vector[elf.AT_MINSIGSTKSZ] == 3632
    assert space.read(vector[elf.AT_RANDOM], 16) == b"0123456789abcdef"
    assert space.read_cstring(vector[elf.AT_PLATFORM], 16) == b"x86_64"
    assert space.read_cstring(vector[elf.AT_EXECFN], 100) == b"/bin/prog"
    assert space.read(image.arg_start, image.arg_end - image.arg_start) == b"prog\0\0two words\0"
    assert space.read(image.env_start, image.env_end - image.env_start) == b"A=1\0B=\0"
    stack = list(space.maps())[-1]
    assert stack.name == b"[stack]" and stack.prot == 3 and stack.end <= space.user_top
    assert space.read(stack.end - 8, 8) == bytes(8)
    assert space.handle_fault(stack.start - PAGE, 6) == 0, "it grows"


def test_executable_stack_only_when_asked_for(world: World, space: AddressSpace) -> None:
    assert run(world, space, build([*STATIC[:2], (GNU_STACK, 7, 0, 0, 0, 0)])).executable_stack
    assert list(space.maps())[-1].prot == 7


def test_argument_limits(world: World, space: AddressSpace) -> None:
    data = build(STATIC)
    assert error(world, space, data, argv=[b"x" * (128 << 10)]) == errno.E2BIG
    assert error(world, space, data, argv=[b"x" * 1000] * 2100) == errno.E2BIG
    assert error(world, space, data, envp=[b""] * 300_000) == errno.E2BIG
    image = run(world, space, data, argv=[b"x" * 1000] * 1900)
    assert space.read_u64(image.stack_pointer) == 1900


def test_no_arguments_make_one_empty_one(world: World, space: AddressSpace) -> None:
    image = run(world, space, build(STATIC), argv=[])
    assert space.read_u64(image.stack_pointer) == 1
    assert space.read_cstring(space.read_u64(image.stack_pointer + 8), 10) == b""


@pytest.mark.parametrize(
    "data,number",
    [
        (b"", errno.ENOEXEC),
        (b"\x7fELF", errno.ENOEXEC),
        (build(STATIC, ident=b"\x7fELF\x01\x01" + bytes(10)), errno.ENOEXEC),
        (build(STATIC, machine=183), errno.ENOEXEC),
        (build(STATIC, kind=1), errno.ENOEXEC),
        (build(STATIC, phentsize=32), errno.ENOEXEC),
        (build(STATIC, phnum=0), errno.ENOEXEC),
        (build(STATIC, phnum=2000), errno.ENOEXEC),
        (build(STATIC, phoff=1 << 63), errno.ENOEXEC),
        (build(STATIC, phoff=3 * PAGE - 10), errno.ENOEXEC),
        (build([(GNU_STACK, 6, 0, 0, 0, 0)]), errno.ENOEXEC),
        (build([(LOAD, RX, 0, 0x400000, PAGE, PAGE - 1)]), errno.EINVAL),
        (build([(LOAD, RX, 0, 0x400000, 0, 1 << 63)]), errno.EINVAL),
        (build([(LOAD, RX, 0, (1 << 64) - PAGE, PAGE, PAGE)]), errno.EINVAL),
        (build([(LOAD, RX, 0, 0x400010, PAGE, PAGE)]), errno.EINVAL),
        (build([(LOAD, RX, 2 * PAGE, 0x400000, 2 * PAGE, 2 * PAGE)]), errno.ENOEXEC),
        (build([(LOAD, RX, 1 << 63, 0x400000, 0x1000, 0x1000)]), errno.ENOEXEC),
        (build([(LOAD, RX, 0, 0, PAGE, PAGE)]), errno.EPERM),
        (build([(LOAD, RX, 0, 0x400000, PAGE, PAGE)], entry=1 << 63), errno.EINVAL),
        (build([*STATIC, (INTERP, R, 0x100, 0, 1, 1)]), errno.ENOEXEC),
        (build([*STATIC, (INTERP, R, 0x100, 0, 5000, 5000)]), errno.ENOEXEC),
        (build([*STATIC, (INTERP, R, 1 << 40, 0, 10, 10)]), errno.EIO),
        (build([*STATIC, (INTERP, R, PAGE, 0, 10, 10)]), errno.ENOEXEC),
    ],
)
def test_hostile_headers(world: World, space: AddressSpace, data: bytes, number: int) -> None:
    assert error(world, space, data or b"\0") == number


@pytest.mark.parametrize(
    "linker,number",
    [
        (b"#!/bin/sh\n", errno.ELIBBAD),
        (build(SPIE, kind=3, machine=183), errno.ELIBBAD),
        (build([(LOAD, RX, 0, 0x1000, PAGE, PAGE - 1)], kind=3), errno.ENOMEM),
    ],
)
def test_hostile_interpreter(world: World, space: AddressSpace, linker: bytes, number: int) -> None:
    data = bytearray(build([*STATIC, (INTERP, R, 0x800, 0, 3, 3)]))
    data[0x800:0x803] = b"/l\0"
    opened = (Reader(linker), FakeFile(world.memory, linker))
    assert error(world, space, bytes(data), open_interpreter=lambda path: opened) == number


def plausible(offset: int, vaddr: int, filesz: int, memsz: int, align: int) -> tuple[int, ...]:
    offset %= 2 * PAGE
    return (
        offset,
        vaddr & -PAGE & (1 << 47) - 1 | offset & PAGE - 1,
        filesz % PAGE,
        filesz % PAGE + memsz % (1 << 22),
        align,
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_headers_of_any_kind_end_in_a_program_or_an_errno(data: st.DataObject) -> None:
    """Never another exception, and never a frame lost."""
    number = st.one_of(
        st.sampled_from(
            [0, 1, PAGE - 1, PAGE, 0x400000, 0x401000, 1 << 21, 1 << 46, (1 << 47) - PAGE, 1 << 63, (1 << 64) - 1]
        ),
        st.integers(0, 1 << 24),
    )
    kinds = st.sampled_from([LOAD, LOAD, LOAD, INTERP, GNU_STACK])
    segment = st.tuples(kinds, st.integers(0, 7), number, number, number, number, number)
    segments = data.draw(st.lists(segment, min_size=1, max_size=5))
    if data.draw(st.booleans()):  # make them plausible: congruent and within the file
        segments = [(s[0], s[1], *plausible(*s[2:])) for s in segments]
    world = World(limit_pages=4096)
    space = world.space()
    program = build(segments, kind=data.draw(st.sampled_from([2, 3])), entry=data.draw(number))
    try:
        run(world, space, program, open_interpreter=lambda path: (Reader(program), FakeFile(world.memory, program)))
    except Errno:
        pass
    space.destroy()
    assert world.census() == 0


def test_an_entry_before_the_address_space() -> None:
    """A program that is moved down by more than its entry's address."""
    world = World(limit_pages=4096)
    space = world.space()
    program = build([(LOAD, 0, 0, (1 << 47) - 2 * PAGE, 0, PAGE, 0)], kind=3, entry=0)
    with pytest.raises(Errno):
        run(world, space, program)
    space.destroy()
    assert world.census() == 0
