"""The host's processor, as its kernel describes it."""


def cpu_field(name: str) -> str:
    """The first processor's line `name` in /proc/cpuinfo (proc(5)), "" when there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(name):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""
