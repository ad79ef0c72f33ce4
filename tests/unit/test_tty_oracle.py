"""The line discipline against the host's: the same termios, the same bytes in the same chunks, the same echo and the
same reads."""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import time

import pytest

from kvmsentry.fs.ttydisc import (
    ECHO,
    ECHOCTL,
    ECHOE,
    ECHOK,
    ECHOKE,
    ECHONL,
    ECHOPRT,
    EXTPROC,
    ICANON,
    ICRNL,
    IEXTEN,
    IGNCR,
    INLCR,
    ISIG,
    ISTRIP,
    IUCLC,
    IUTF8,
    IXANY,
    IXON,
    NOFLSH,
    OCRNL,
    OLCUC,
    ONLCR,
    ONLRET,
    ONOCR,
    OPOST,
    PARMRK,
    TOSTOP,
    VEOL,
    VMIN,
    VTIME,
    XTABS,
    LineDiscipline,
    Termios,
)  # fmt: skip

TERMIOS = struct.Struct("<4IB19s")
TCGETS, TCSETS = 0x5401, 0x5402


class Wires(LineDiscipline):
    """Our line discipline with its screen in a bytearray."""

    def __init__(self) -> None:
        self.screen = bytearray()
        self.signals: list[int] = []
        super().__init__()

    def emit(self, data: bytes) -> None:
        self.screen += data

    def write_room(self) -> int:
        return 65536

    def signal_foreground(self, signo: int) -> None:
        self.signals.append(signo)

    def set_raw(self, packed: bytes) -> None:
        new = Termios()
        new.iflag, new.oflag, new.cflag, new.lflag, new.line, cc = TERMIOS.unpack(packed)
        new.cc = bytearray(cc)
        self.set_termios(new)


class Host:
    """The host's pty, used as LineDiscipline is."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        os.set_blocking(self.slave, False)

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)

    def set_raw(self, packed: bytes) -> None:
        fcntl.ioctl(self.slave, TCSETS, packed)

    def settle(self, shown: int, typed: int, moment: int = 1) -> bytes:
        """What the screen shows. The host's buffers empty themselves later: patience until `shown` bytes have come
        and `typed` are there to be read, then a moment for what should not come."""
        out = b""
        patience = select.poll()
        patience.register(self.master, select.POLLIN)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            if patience.poll(moment):
                out += os.read(self.master, 65536)
            elif len(out) >= shown and self.waiting() == typed:
                break
        return out

    def waiting(self) -> int:
        """FIONREAD."""
        return struct.unpack("i", fcntl.ioctl(self.slave, 0x541B, bytes(4)))[0]

    def take(self, count: int) -> bytes | None:
        try:
            return os.read(self.slave, count)
        except BlockingIOError:
            return None


def packed(iflag: int, oflag: int, lflag: int, cc: dict[int, int] | None = None) -> bytes:
    termios = Termios()
    for index, value in (cc or {}).items():
        termios.cc[index] = value
    return TERMIOS.pack(iflag, oflag, termios.cflag, lflag, 0, bytes(termios.cc))


COOKED = ISIG | ICANON | ECHO | ECHOE | ECHOK | ECHOCTL | ECHOKE | IEXTEN
MODES = {
    "default": packed(ICRNL | IXON, OPOST | ONLCR, COOKED),
    "utf8": packed(ICRNL | IXON | IUTF8, OPOST | ONLCR, COOKED),
    "no echo": packed(ICRNL, OPOST | ONLCR, ICANON | IEXTEN | ECHONL),
    "old erase": packed(ICRNL, OPOST | ONLCR, ICANON | IEXTEN | ECHO | ECHOK | ISIG),
    "printer": packed(ICRNL, OPOST | ONLCR, ICANON | IEXTEN | ECHO | ECHOE | ECHOPRT | ECHOCTL),
    "printer utf8": packed(IUTF8, OPOST | ONLCR, ICANON | IEXTEN | ECHO | ECHOE | ECHOPRT | ECHOCTL | ECHOK | ECHOKE),
    "xtabs": packed(ICRNL, OPOST | ONLCR | XTABS, COOKED),
    "no opost": packed(ICRNL, 0, COOKED),
    "opost alone": packed(ICRNL, OPOST, COOKED),
    "ocrnl": packed(0, OPOST | OCRNL | ONLRET, COOKED),
    "onocr": packed(0, OPOST | ONOCR | ONLCR | OLCUC, COOKED),
    "inlcr": packed(INLCR, OPOST | ONLCR, COOKED),
    "igncr": packed(IGNCR | ISTRIP, OPOST | ONLCR, COOKED),
    "iuclc": packed(IUCLC | ICRNL, OPOST | ONLCR, COOKED),
    "parmrk": packed(PARMRK, OPOST | ONLCR, COOKED),
    "noflsh": packed(ICRNL | IXON, OPOST | ONLCR, COOKED | NOFLSH),
    "ixany": packed(ICRNL | IXON | IXANY, OPOST | ONLCR, COOKED),
    "no iexten": packed(ICRNL, OPOST | ONLCR, COOKED & ~IEXTEN),
    "eol": packed(ICRNL, OPOST | ONLCR, COOKED, {VEOL: ord(";")}),
    "cbreak": packed(ICRNL, OPOST | ONLCR, ECHO | ECHOCTL | ISIG, {VMIN: 1, VTIME: 0}),
    "raw": packed(0, 0, 0, {VMIN: 1, VTIME: 0}),
    "raw echo": packed(0, OPOST, ECHO | TOSTOP, {VMIN: 1, VTIME: 0}),
    "extproc": packed(ICRNL, OPOST | ONLCR, COOKED | EXTPROC),
}

TYPED = [
    b"hello\n", b"a\tb\tcd\x7f\x7f\x7f\x7fx\n", b"two words\x17\x17end\r", b"kill me\x15ok\n",
    b"\x16\x03\x16\x7f\x01\x02\x7f\n", b"abc\x12def\n", b"partial\x04\n", b"\x04", b"x\x04\x04",
    "häß€\x7f\x7fu\x7f\x7f\n".encode(), b"\xff\xfe\x80\n", b"abc\x03def\n", b"q\x1c", b"z\x1ay\n",
    b"one\ntwo\nthree\n", b"\x7f\x7f\x15\x17\n", b"a;b;c\n", b"\ta\x7f\x7f\n", b"12345678\t\x7f!\n",
    b"\x01\t\x7f\x7f\n", b"UPPER lower\n", b"caf\xe9 \xc9\n", b"\r\r\n\n", b"foo_bar-baz  \x17\x17\x17\n",
    b"\x00\x00a\n", b"\x1b[A\x7f\n",
]  # fmt: skip


def both(host: Host, ours: Wires, data: bytes) -> None:
    """Type one chunk on both sides; the screens must agree."""
    os.write(host.master, data)
    ours.input(data)
    shown = host.settle(len(ours.screen), ours.input_count())
    assert bytes(ours.screen) == shown, f"after {data!r}"
    ours.screen.clear()


def read_both(host: Host, ours: Wires, count: int) -> bytes | None:
    theirs = host.take(count)
    mine = ours.take(count) if ours.available() else None
    ours.refill()
    assert mine == theirs
    host.settle(0, ours.input_count(), 0)  # the kernel refills later than we do
    return theirs


@pytest.fixture
def host():
    try:
        pty = Host()
    except OSError as error:
        pytest.skip(f"no pty on this host: {error}")
    yield pty
    pty.close()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(host: Host, mode: str) -> None:
    ours = Wires()
    host.set_raw(MODES[mode])
    ours.set_raw(MODES[mode])
    for data in TYPED:
        both(host, ours, data)
        for count in (3, 100, 100, 100, 100):
            read_both(host, ours, count)


@pytest.mark.parametrize("mode", ["default", "utf8", "xtabs", "printer"])
def test_byte_by_byte(host: Host, mode: str) -> None:
    ours = Wires()
    host.set_raw(MODES[mode])
    ours.set_raw(MODES[mode])
    typed = b"ab\tc\x7f\x7f\x7f\x16\x03 w1 w2\x17\x12\x15l\xc3\xa9\x7fx\n"
    for c in typed:
        both(host, ours, bytes((c,)))
    read_both(host, ours, 100)


@pytest.mark.parametrize("seed", range(6))
def test_random_typing(host: Host, seed: int) -> None:
    dice = random.Random(seed)
    ours = Wires()
    alphabet = b"ab_ \t\x7f\x17\x15\x16\x12\n\r\x04\x01\x03\x1c\xc3\xa9\xff;Z"
    for _ in range(25):
        if dice.random() < 0.3:
            mode = dice.choice([m for m in MODES if m not in ("parmrk", "ixany", "extproc")])
            host.set_raw(MODES[mode])
            ours.set_raw(MODES[mode])
        both(host, ours, bytes(dice.choice(alphabet) for _ in range(dice.randrange(1, 20))))
        for _ in range(dice.randrange(4)):
            read_both(host, ours, dice.choice((1, 2, 5, 200)))


@pytest.mark.parametrize("mode", ["default", "xtabs", "no opost", "opost alone", "ocrnl", "onocr", "utf8"])
def test_output(host: Host, mode: str) -> None:
    """What programs write, and that echo afterwards knows the column."""
    ours = Wires()
    host.set_raw(MODES[mode])
    ours.set_raw(MODES[mode])
    for text in (
        b"plain\n",
        b"a\tb\tc\r\n",
        b"\r\rx\ry\n",
        b"prompt$ ",
        b"col\bumn\x1b[1m",
        "é€\t".encode(),
        b"many\nlines\nhere",
    ):
        os.write(host.slave, text)
        assert ours.output(text) == len(text)
        shown = host.settle(len(ours.screen), ours.input_count())
        assert bytes(ours.screen) == shown, text
        ours.screen.clear()
        both(host, ours, b"\tz\x7f\x7f")
        both(host, ours, b"\n")
        read_both(host, ours, 100)


def test_a_line_longer_than_the_buffer(host: Host) -> None:
    """4095 bytes fit; the rest of the line is lost but its end is not."""
    ours = Wires()
    noecho = packed(ICRNL, OPOST, ICANON)
    host.set_raw(noecho)
    ours.set_raw(noecho)
    long = b"".join(b"%07d," % i for i in range(640))
    for at in range(0, len(long), 512):
        both(host, ours, long[at : at + 512])
    both(host, ours, b"\n")
    data = read_both(host, ours, 8192)
    assert data is not None and len(data) == 4096 and data.endswith(b"\n")


def test_full_lines_stop_the_input(host: Host) -> None:
    """Complete lines that nobody reads stop the rest; reading lets it in again, with nothing lost."""
    ours = Wires()
    noecho = packed(ICRNL, OPOST, ICANON)
    host.set_raw(noecho)
    ours.set_raw(noecho)
    for i in range(12):
        both(host, ours, b"%d " % i * 150 + b"\n")
    for _ in range(14):
        read_both(host, ours, 8192)


def test_mode_change_keeps_what_was_typed(host: Host) -> None:
    ours = Wires()
    for mode in ("raw", "default", "raw", "default"):
        host.set_raw(MODES[mode])
        ours.set_raw(MODES[mode])
        both(host, ours, b"abc")
        read_both(host, ours, 2)
    both(host, ours, b"\n")
    for _ in range(4):
        read_both(host, ours, 100)


def test_stop_and_start(host: Host) -> None:
    """VSTOP holds echo back, VSTART lets it go."""
    ours = Wires()
    both(host, ours, b"a\x13")
    both(host, ours, b"bcd")
    assert ours.stopped
    both(host, ours, b"\x11")
    both(host, ours, b"\x13x\x03")  # a signal key starts output again
    assert not ours.stopped


@pytest.mark.parametrize("mode", ["default", "noflsh", "cbreak"])
def test_fionread(host: Host, mode: str) -> None:
    ours = Wires()
    host.set_raw(MODES[mode])
    ours.set_raw(MODES[mode])
    for data in (b"abc", b"\n", b"x\x04y", b"\x04\x04\n"):
        both(host, ours, data)
        assert ours.input_count() == host.waiting()


def test_raw_mode_is_copied_whole() -> None:
    """No oracle needed: raw bytes come out as they went in."""
    ours = Wires()
    ours.set_raw(MODES["raw"])
    data = bytes(range(256)) * 4
    ours.input(data)
    assert ours.take(2000) == data
    assert not ours.screen


def test_signals() -> None:
    ours = Wires()
    ours.input(b"a\x03b\x1cc\x1a")
    assert ours.signals == [2, 3, 20]
    assert bytes(ours.screen) == b"^Z"  # the echo of what a signal flushes is flushed too
    assert ours.input_count() == 0
