"""Who this kernel says it is: uname(2), /proc/version and the story of its boot that dmesg(1) tells.

The version is fixed and ours, whatever the host runs; nothing here is read from the host.
"""

from __future__ import annotations

from typing import Any

SYSNAME = "Linux"
RELEASE = "6.1.0-kvmsentry"
VERSION = "#1 SMP PREEMPT_DYNAMIC kvmsentry"
MACHINE = "x86_64"
BUILDER = "sentry@tower"
COMPILER = "CPython, hand-rolled, no optimisation needed"

_STORY = (
    "Teaching the processor what a 'syscall' is (it claims to know already)...",
    "Counting the rings: 0, 3. Nobody misses 1 and 2.",
    "Posting a sentry at the gate...",
    "Reading 1,024 man pages and pretending to like them...",
    "Asking the Gofer for the root filesystem; politely, over 9P.",
    "Watering the page tables...",
    "Checking the GIL: held by one thread, as it should be.",
    "Untangling wait queues; found two ends, hoping that is all.",
    "Spinning. Still spinning. Answered in under a microsecond.",
    "Looking for the host... nothing there. Good.",
    "Searching for pid 1 under the sofa...",
    "Waking the doorbell; it rang.",
    "Renaming EWOULDBLOCK to EAGAIN, again.",
    "Sharpening copy-on-write knives...",
)


def proc_version() -> str:
    """The line of /proc/version, without its newline."""
    return f"{SYSNAME} version {RELEASE} ({BUILDER}) ({COMPILER}) {VERSION}"


class _Dice:
    """Numbers that look random and are the same for the same seed (Knuth's MMIX generator)."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, n: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        return (self.state >> 33) % n


def boot_lines(kernel: Any) -> list[tuple[int, int, str]]:
    """How this kernel booted: (level, microseconds since boot, line), in order; /dev/kmsg.

    The same every time it is asked in one sandbox, a little different in the next.
    """
    cpus, mebibytes = len(kernel.all_cpus), kernel.frames.limit_pages >> 8
    dice = _Dice(kernel.boot_time)
    at, lines = 0, []

    def say(level: int, text: str) -> None:
        nonlocal at
        lines.append((level, at, text))
        at += 9_000 + dice.below(181_000)

    say(5, proc_version())
    say(6, "Command line: " + command_line())
    say(6, "Hypervisor detected: we are it")
    say(6, f"Memory: {mebibytes}M available, all of it borrowed")
    say(6, f"smp: Brought up 1 node, {cpus} CPU{'s' if cpus != 1 else ''}")
    story = list(_STORY)
    for _ in range(min(7, len(story))):
        say(6, story.pop(dice.below(len(story))))
    say(5, "VFS: Mounted root (9p filesystem), read-only at heart.")
    say(6, "Ready. Run /sbin/init as init process? No: yours.")
    return lines


def command_line() -> str:
    """/proc/cmdline, without its newline."""
    return "console=tty quiet panic=-1 kvmsentry"


def dmesg(kernel: Any) -> str:
    """The ring buffer as syslog(2) SYSLOG_ACTION_READ_ALL gives it: `<level>[seconds] text` lines."""
    records = (*boot_lines(kernel), *kernel.messages)
    return "".join(f"<{level}>[{at // 1_000_000:5d}.{at % 1_000_000:06d}] {text}\n" for level, at, text in records)
