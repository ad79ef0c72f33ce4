"""The initial stack of a program, as the x86-64 psABI (3.4.1) and Linux (fs/exec.c, create_elf_tables) lay it out.

top             8 zero bytes
                execfn NUL
                envp strings, argv strings (each block in order, argv below envp)
                up to 8 KiB at random, aligned to 16
                "x86_64" NUL, 16 random bytes
                padding to 16
                auxv pairs, AT_NULL last
                envp pointers, 0
                argv pointers, 0
stack pointer   argc
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.mm.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_GROWSDOWN, MAP_PRIVATE, MAP_STACK, random_below

PAGE = 4096
MAX_ARG_STRLEN = 32 * PAGE  # uapi/linux/binfmts.h
ARG_MAX = 131072
STACK_LIMIT = 8 << 20  # _STK_LIM
STACK_EXPAND = 128 << 10  # setup_arg_pages: mapped below the strings from the start
STACK_RND_PAGES = 1 << 22  # arch/x86: 16 GiB
PLATFORM = b"x86_64\0"


class Stack:
    """Sizes up the strings (Errno(E2BIG)), then maps, then fills. `execfn_at` and the rest are addresses once
    constructed."""

    def __init__(
        self, space: Any, argv: Sequence[bytes], envp: Sequence[bytes], execfn: bytes, randomize: bool
    ) -> None:
        self.space = space
        argv = argv or [b""]  # Linux 5.18: a program always has argv[0]
        self.argc, self.envc = len(argv), len(envp)
        total = sum(map(len, argv)) + sum(map(len, envp)) + self.argc + self.envc + len(execfn) + 1
        limit = max(min(STACK_LIMIT // 4 * 3, space.rlimit_stack // 4), ARG_MAX)
        longest = max(max(map(len, argv)), max(map(len, envp), default=0), len(execfn))
        if longest >= MAX_ARG_STRLEN or total + 8 * (self.argc + self.envc) > limit:
            raise Errno(errno.E2BIG)
        self.top = space.user_top & -PAGE
        if randomize:
            self.top -= random_below(min(STACK_RND_PAGES, space.user_top // 16 >> 12)) * PAGE
        self.argv_block = b"".join([arg + b"\0" for arg in argv])
        self.envp_block = b"".join([entry + b"\0" for entry in envp])
        self.argv_lengths = [len(arg) + 1 for arg in argv]
        self.envp_lengths = [len(entry) + 1 for entry in envp]
        self.execfn = execfn + b"\0"
        self.execfn_at = self.top - 8 - len(self.execfn)
        self.envp_at = self.execfn_at - len(self.envp_block)
        self.argv_at = self.envp_at - len(self.argv_block)
        shift = random_below(8192) if randomize else 0  # arch_align_stack
        self.below = self.argv_at - shift & -16
        self.random_at = self.platform_at = 0
        self.random = b""

    def map(self, executable: bool) -> None:
        """Maps [stack]; it grows down by faults up to RLIMIT_STACK."""
        words = 1 + self.argc + 1 + self.envc + 1 + 2 * 32
        start = self.below - 64 - 8 * words - STACK_EXPAND & -PAGE
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_GROWSDOWN | MAP_STACK
        self.space.mmap(start, self.top - start, 7 if executable else 3, flags, label=b"[stack]")

    def place_random(self, random: bytes) -> tuple[int, int]:
        """Where AT_RANDOM's 16 bytes and AT_PLATFORM's string will be."""
        self.platform_at = self.below - len(PLATFORM)
        self.random_at = self.platform_at - 16
        self.random = random[:16].ljust(16, b"\0")
        return self.random_at, self.platform_at

    def fill(self, image: Any, auxv: list[tuple[int, int]]) -> None:
        """Writes it all and sets the stack's addresses in `image`."""
        strings = self.argv_block + self.envp_block + self.execfn + bytes(8)
        words = [self.argc]
        at = self.argv_at
        for length in self.argv_lengths:
            words.append(at)
            at += length
        words.append(0)
        at = self.envp_at
        for length in self.envp_lengths:
            words.append(at)
            at += length
        words.append(0)
        vector = [word for pair in auxv for word in pair]
        words += vector
        sp = self.random_at - 8 * len(words) & -16
        low = struct.pack(f"<{len(words)}Q", *words)
        low += bytes(self.random_at - sp - len(low)) + self.random + PLATFORM
        self.space.write(sp, low)
        self.space.write(self.argv_at, strings)
        image.stack_pointer = image.start_stack = sp
        image.arg_start, image.arg_end = self.argv_at, self.envp_at
        image.env_start, image.env_end = self.envp_at, self.execfn_at
        image.auxv = struct.pack(f"<{len(vector)}Q", *vector)
