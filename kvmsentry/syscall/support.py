"""The support table: every amd64 call up to Linux 6.1, made from the rows. `python -m kvmsentry.syscall.support`
writes docs/syscalls.md."""

from __future__ import annotations

import os

from kvmsentry.syscall import table
from kvmsentry.syscall.names import NAMES

# What the table says of calls that are not there.
ABSENT = {
    154: "as without CONFIG_MODIFY_LDT_SYSCALL",
    300: "file notification for privileged watchers",
    301: "",
    334: "glibc does without; nothing here would tell when the host moves a vCPU",
    425: "large, and switched off in many containers",
    426: "as io_uring_setup",
    427: "as io_uring_setup",
}


def entries() -> list[tuple[int, str, str, str]]:
    """(number, name, status, remarks) of every call; status is full, partial or no. The table must be loaded."""
    result = []
    for nr, name in sorted(NAMES.items()):
        row = table.rows[nr]
        if row is None:
            result.append((nr, name, "no", ABSENT.get(nr, "")))
        else:
            result.append((nr, name, row.status, "; ".join(text for text in (row.partial, row.note) if text)))
    return result


def counts() -> tuple[int, int, int]:
    """How many calls are (full, partial, not there)."""
    found = [status for _, _, status, _ in entries()]
    return found.count("full"), found.count("partial"), found.count("no")


def markdown() -> str:
    """docs/syscalls.md."""
    full, partial, missing = counts()
    lines = [
        "# System calls",
        "",
        "Made from the rows of `kvmsentry/syscall` by `python -m kvmsentry.syscall.support`;",
        "`kvmsentry help syscalls` prints the same. *full*: as Linux 6.1 does it, as far as an application in the",
        "sandbox can tell (a remark names what differs); *partial*: the remark says what is missing; *no*: answers",
        "ENOSYS and leaves a line in the log.",
        "",
        f"{full} full, {partial} partial, {missing} not supported, of {full + partial + missing}.",
        "",
        "| nr | name | support | remarks |",
        "| ---: | --- | --- | --- |",
    ]
    lines += [f"| {nr} | {name} | {status} | {remarks} |" for nr, name, status, remarks in entries()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the file beside the package."""
    table.load()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with open(os.path.join(root, "docs", "syscalls.md"), "w", encoding="utf-8") as file:
        file.write(markdown())


if __name__ == "__main__":
    main()
