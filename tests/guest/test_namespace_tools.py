"""util-linux's and bubblewrap's tools do inside what they do natively."""

from __future__ import annotations

import shutil
import subprocess

import pytest

IDS = "cat /proc/self/uid_map; id -u"
COMMANDS = {
    "unshare-pid": "unshare -pf --mount-proc ps -o pid=,ppid=,comm=",
    "unshare-user": f"unshare -Ur sh -c '{IDS}'",
    "unshare-user-pid": f"unshare -Urpfm --mount-proc sh -c 'echo $$; {IDS}; ls -d /proc/[0-9]*'",
    "unshare-as-user": "setpriv --reuid 1000 --regid 1000 --clear-groups "
    f"unshare -Urpfm --mount-proc sh -c '{IDS}; mount -t tmpfs x /mnt && umount /mnt; umount /proc'",
    "unshare-uts-ipc": "unshare -ui sh -c 'hostname q; hostname; ipcmk -Q >/dev/null; ipcs -q | wc -l'; "
    "ipcs -q | wc -l",
    "unshare-net": "unshare -n sh -c 'wc -l </proc/self/net/dev'",
    "unshare-time": "unshare -T --boottime 8640000 --monotonic 864000 sh -c 'cat /proc/self/timens_offsets; "
    "expr $(cut -d. -f1 /proc/uptime) / 8640000; exec sleep 60' & "
    "until grep -qx sleep /proc/$!/comm; do sleep 0.1; done; cat /proc/$!/timens_offsets; "
    "nsenter -t $! -T sh -c 'expr $(cut -d. -f1 /proc/uptime) / 8640000; readlink /proc/self/ns/time' "
    "| grep -cxF -e 1 -e $(readlink /proc/$!/ns/time); kill -9 $!",
    "kill-child": "unshare -pf --kill-child sh -c 'kill -9 1; echo alive'",
    "init-takes-all": "unshare -pf sh -c 'sleep 60 & sleep 60 & exit 3'",
    "nsenter": "unshare -pfu --mount-proc sh -c 'hostname inner; exec sleep 60' & sleep 0.5; "
    "nsenter -t $(pgrep -P $!) -p -u -m sh -c 'hostname; ps -o pid=,comm='; kill -9 $(pgrep -P $!)",
    "bound": "d=$(mktemp -d); touch $d/u; unshare --uts=$d/u hostname bound; nsenter --uts=$d/u hostname; "
    "umount $d/u; rm -r $d",
    "mount-namespace-file": "unshare -m sh -c 'mount -t tmpfs x /mnt; touch /mnt/here; exec sleep 1' & sleep 0.5; "
    "exec 7</proc/$!/ns/mnt; wait; exec nsenter --mount=/proc/self/fd/7 ls /mnt",
    "propagation": "unshare -m sh -c 'mount -t tmpfs x /mnt; cd /mnt; mkdir a b c; mount -t tmpfs x a; "
    "mount --make-shared a; mount --bind a b; mount --bind a c; mount --make-slave c; mkdir a/d; mount -t tmpfs x a/d; "
    "findmnt -nlo TARGET,PROPAGATION -R /mnt; umount b/d; findmnt -nlo TARGET -R /mnt; "
    "unshare -m --propagation unchanged findmnt -no PROPAGATION /mnt/a; unshare -m findmnt -no PROPAGATION /mnt/a; "
    "unshare -m --propagation slave findmnt -no PROPAGATION /mnt/b; unshare -Urm findmnt -no PROPAGATION /mnt/c; "
    "mount --make-unbindable b; mount --bind b /opt; echo $?; umount -R /mnt/a; echo $?'",
    "lsns": "unshare -Urpf sleep 60 & sleep 0.5; lsns -n -p $(pgrep -P $!) -t pid -o TYPE,NPROCS,COMMAND; "
    "kill -9 $(pgrep -P $!)",
    "bwrap": "bwrap --ro-bind / / --unshare-all --proc /proc --dev /dev --tmpfs /tmp --hostname b --die-with-parent "
    f"sh -c 'hostname; ps -o pid=,comm=; ls /tmp; touch /x; {IDS}; ls /dev | sort'",
    "bwrap-as-user": "setpriv --reuid 1000 --regid 1000 --clear-groups bwrap --ro-bind / / --unshare-all "
    f"--proc /proc --dev /dev --uid 7 sh -c '{IDS}; grep CapEff /proc/self/status'",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_tools(name: str, kvmsentry_do: list[str]) -> None:
    command = COMMANDS[name]
    tool = "bwrap" if name.startswith("bwrap") else "unshare"
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")

    def run(argv: list[str]) -> tuple[int, list[list[str]], str]:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, errors="replace"
        )
        return done.returncode, [line.split() for line in done.stdout.splitlines()], done.stderr

    status, lines, errors = run(["bash", "-c", command])
    if not lines and status not in (3,):
        pytest.skip(f"not possible natively: {errors}")
    assert run([*kvmsentry_do, "bash", "-c", command])[:2] == (status, lines)
