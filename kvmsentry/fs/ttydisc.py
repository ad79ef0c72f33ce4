"""The line discipline N_TTY: what stands between a terminal's bytes and read(2) and write(2); termios(3).

    keyboard --input--> backlog --receive--> [echo -> output] buffer, lines --take--> read(2)
    write(2) --output processing (OPOST)--> emit --> screen

It follows drivers/tty/n_tty.c closely, since its habits are visible: what a chunk of input that holds an interrupt
character does to the echo of the bytes before it, when a full line stops taking input, how a tab is rubbed out. The
order of
the tests in `_special` is that of n_tty_receive_char_special. Whoever owns the wires (a pty, the host's terminal)
implements
the hooks at the end of the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

# uapi/asm-generic/termbits.h
IGNBRK, BRKINT, IGNPAR, PARMRK, INPCK, ISTRIP, INLCR, IGNCR, ICRNL = 1, 2, 4, 8, 16, 32, 64, 128, 256
IUCLC, IXON, IXANY, IXOFF, IMAXBEL, IUTF8 = 512, 1024, 2048, 4096, 8192, 16384
OPOST, OLCUC, ONLCR, OCRNL, ONOCR, ONLRET, TABDLY, XTABS = 1, 2, 4, 8, 16, 32, 0x1800, 0x1800
CBAUD, CSIZE, CS8, CREAD, PARENB, B38400 = 0x100F, 0x30, 0x30, 0x80, 0x100, 15
ISIG, ICANON, ECHO, ECHOE, ECHOK, ECHONL, NOFLSH, TOSTOP = 1, 2, 8, 16, 32, 64, 128, 256
ECHOCTL, ECHOPRT, ECHOKE, FLUSHO, PENDIN, IEXTEN, EXTPROC = 0x200, 0x400, 0x800, 0x1000, 0x4000, 0x8000, 0x10000
(VINTR, VQUIT, VERASE, VKILL, VEOF, VTIME, VMIN, VSWTC, VSTART, VSTOP, VSUSP, VEOL, VREPRINT, VDISCARD, VWERASE, VLNEXT,
 VEOL2) = range(17)  # fmt: skip
NCCS = 19
DISABLED = 0  # _POSIX_VDISABLE

SIGHUP, SIGINT, SIGQUIT, SIGCONT, SIGTSTP, SIGTTIN, SIGTTOU, SIGWINCH = 1, 2, 3, 18, 20, 21, 22, 28  # signal(7)

N_TTY_BUF_SIZE = 4096  # bytes of input that wait for a reader
ECHO_LIMIT = 4096  # echo operations kept while output is stopped

# Operations of the echo buffer beyond plain bytes (0..255, which pass output processing).
_CTL = 256  # + c: shown as ^X
_RAW_FF = 600
_SET_CANON_COLUMN, _MOVE_BACK = 601, 602
_ERASE_TAB = 1024  # + columns since the start of input, | 128 when counted from a tab before

_CONTROLS = bytes(c for c in range(256) if c < 32 or c == 127)
_IS_CONTROL = [c < 32 or c == 127 for c in range(256)]
# isalnum() of lib/ctype.c, which knows Latin-1
_IS_ALNUM = [chr(c).isalnum() and (c < 128 or c >= 192) for c in range(256)]

INIT_CC = bytes([3, 28, 127, 21, 4, 0, 1, 0, 17, 19, 26, 0, 18, 15, 23, 22, 0, 0, 0])  # include/asm-generic/termios.h


class Termios:
    """struct ktermios: the modes of a terminal."""

    __slots__ = ("iflag", "oflag", "cflag", "lflag", "line", "cc", "ispeed", "ospeed")

    def __init__(self) -> None:
        """tty_std_termios with the pts driver's cflag (drivers/tty/pty.c)."""
        self.iflag, self.oflag, self.cflag = ICRNL | IXON, OPOST | ONLCR, B38400 | CS8 | CREAD
        self.lflag = ISIG | ICANON | ECHO | ECHOE | ECHOK | ECHOCTL | ECHOKE | IEXTEN
        self.line, self.cc = 0, bytearray(INIT_CC)
        self.ispeed = self.ospeed = 38400

    def copy(self) -> Termios:
        """The same modes, to change and `set_termios`."""
        new = Termios()
        new.iflag, new.oflag, new.cflag, new.lflag, new.line = self.iflag, self.oflag, self.cflag, self.lflag, self.line
        new.cc, new.ispeed, new.ospeed = bytearray(self.cc), self.ispeed, self.ospeed
        return new


class LineDiscipline(ABC):
    """One terminal's modes, input buffer and columns. Positions count bytes since the terminal was made."""

    def __init__(self) -> None:
        self.termios = Termios()
        self.buffer = bytearray()  # received and not yet read; buffer[0] is at position `tail`
        self.backlog = bytearray()  # on the wire: there was no room for it in `buffer`
        self.tail = 0
        self.canon_head = 0  # end of the last complete line
        self.line_ends: deque[int] = deque()  # positions of line ends; a DISABLED byte there is an end of file
        self.lnext = self.erasing = False
        self.column = self.canon_column = 0
        self.stopped = self.stopped_by_ioctl = False  # output: VSTOP, tcflow(3)
        self._echo: list[int] = []
        self._special_map: frozenset[int] = frozenset()
        self._raw = False
        self._apply()

    # -- modes -------------------------------------------------------------------------------------------------------
    def set_termios(self, new: Termios) -> None:
        """Change the modes: n_tty_set_termios."""
        old, self.termios = self.termios, new
        if (old.lflag ^ new.lflag) & (ICANON | EXTPROC):
            self.line_ends.clear()
            if not new.lflag & ICANON or not self.buffer:
                self.canon_head = self.tail
            else:  # what was typed in raw mode becomes a line
                self.canon_head = self.tail + len(self.buffer)
                self.line_ends.append(self.canon_head - 1)
            self.erasing = self.lnext = False
        self._apply()
        if not new.iflag & IXON and old.iflag & IXON and not self.stopped_by_ioctl:
            self.start()
        self.refill()
        self.wake_readers()
        self.wake_writers()

    def _apply(self) -> None:
        iflag, lflag, cc = self.termios.iflag, self.termios.lflag, self.termios.cc
        self._raw = not (
            iflag & (ISTRIP | IUCLC | IGNCR | ICRNL | INLCR | IXON | PARMRK) or lflag & (ICANON | ISIG | ECHO)
        )
        special: set[int] = set()
        if iflag & (IGNCR | ICRNL):
            special.add(13)
        if iflag & INLCR:
            special.add(10)
        if lflag & ICANON:
            special |= {cc[VERASE], cc[VKILL], cc[VEOF], 10, cc[VEOL]}
            if lflag & IEXTEN:
                special |= {cc[VWERASE], cc[VLNEXT], cc[VEOL2]}
                if lflag & ECHO:
                    special.add(cc[VREPRINT])
        if iflag & IXON:
            special |= {cc[VSTART], cc[VSTOP]}
        if lflag & ISIG:
            special |= {cc[VINTR], cc[VQUIT], cc[VSUSP]}
        special.discard(DISABLED)
        self._special_map = frozenset(special)

    # -- input -------------------------------------------------------------------------------------------------------
    def input(self, data: bytes) -> None:
        """Bytes from the other side; what finds no room waits in `backlog`."""
        if self.backlog:
            self.backlog += data
            return
        taken = self.receive(data)
        if taken < len(data):
            self.backlog += data[taken:]

    def refill(self) -> None:
        """There may be room again."""
        if self.backlog:
            taken = self.receive(bytes(self.backlog))
            del self.backlog[:taken]
            if taken:
                self.input_room()

    def receive(self, data: bytes) -> int:
        """Take `data` into the input buffer; returns how many bytes found room (n_tty_receive_buf_common)."""
        pos, count = 0, len(data)
        while pos < count:
            room = N_TTY_BUF_SIZE - len(self.buffer)
            if self.termios.iflag & PARMRK:
                room = -(-room // 3)
            room -= 1
            if room <= 0:  # a line that is too long loses its last byte, so that its end can still come
                overflow = bool(self.termios.lflag & ICANON) and self.canon_head == self.tail
                if overflow and room < 0:
                    self.buffer.pop()
                room = int(overflow)
            n = min(count - pos, room)
            if n <= 0:
                break
            self._receive(data[pos : pos + n])
            pos += n
        return pos

    def _receive(self, data: bytes) -> None:
        lflag = self.termios.lflag
        if self._raw:
            self.buffer += data
        else:
            iflag, special = self.termios.iflag, self._special_map
            for c in data:
                if self.lnext:
                    self.lnext = False
                    self._plain(self._strip(c))
                    continue
                if iflag & (ISTRIP | IUCLC):
                    c = self._strip(c)
                if lflag & EXTPROC:
                    self.buffer.append(c)
                elif c in special:
                    self._special(c)
                else:
                    self._plain(c)
            self.flush_echo()
        if (not lflag & ICANON or lflag & EXTPROC) and self.buffer:
            self.wake_readers()

    def _strip(self, c: int) -> int:
        if self.termios.iflag & ISTRIP:
            c &= 0x7F
        if (
            self.termios.iflag & IUCLC
            and self.termios.lflag & IEXTEN
            and (65 <= c <= 90 or (192 <= c <= 222 and c != 215))
        ):
            c += 32
        return c

    def _put(self, c: int) -> None:
        if c == 0xFF and self.termios.iflag & PARMRK:
            self.buffer.append(c)
        self.buffer.append(c)

    def _plain(self, c: int) -> None:
        """n_tty_receive_char."""
        self._any_restarts()
        if self.termios.lflag & ECHO:
            self._finish_erasing()
            if self.canon_head == self.tail + len(self.buffer):
                self._echo.append(_SET_CANON_COLUMN)
            self._echo_char(c)
        self._put(c)

    def _any_restarts(self) -> None:
        if self.stopped and not self.stopped_by_ioctl and self.termios.iflag & (IXON | IXANY) == IXON | IXANY:
            self.start()

    def _special(self, c: int) -> None:
        termios = self.termios
        iflag, lflag, cc = termios.iflag, termios.lflag, termios.cc
        if iflag & IXON:
            if c == cc[VSTART]:
                self.start()
                return
            if c == cc[VSTOP]:
                self.stop()
                return
        if lflag & ISIG:
            for index, signo in ((VINTR, SIGINT), (VQUIT, SIGQUIT), (VSUSP, SIGTSTP)):
                if c == cc[index]:
                    self._signal_char(signo, c)
                    return
        self._any_restarts()
        if c == 13:
            if iflag & IGNCR:
                return
            if iflag & ICRNL:
                c = 10
        elif c == 10 and iflag & INLCR:
            c = 13
        if lflag & ICANON and self._canonical(c):
            return
        if lflag & ECHO:
            self._finish_erasing()
            if c == 10:
                self._echo_raw(10)
            else:
                if self.canon_head == self.tail + len(self.buffer):
                    self._echo.append(_SET_CANON_COLUMN)
                self._echo_char(c)
        self._put(c)

    def _signal_char(self, signo: int, c: int) -> None:
        self.signal_foreground(signo)
        if not self.termios.lflag & NOFLSH:
            self._echo.clear()
            self.flush_output()
            self.flush_input()
        if self.termios.iflag & IXON:
            self.start()
        if self.termios.lflag & ECHO:
            self._echo_char(c)  # sent with the rest of the chunk, unless another signal throws it away
        else:
            self.flush_echo()

    def _canonical(self, c: int) -> bool:
        """n_tty_receive_char_canon: True when the byte has been dealt with."""
        lflag, cc = self.termios.lflag, self.termios.cc
        if c in (cc[VERASE], cc[VKILL]) or (c == cc[VWERASE] and lflag & IEXTEN):
            self._erase(c)
            return True
        if c == cc[VLNEXT] and lflag & IEXTEN:
            self.lnext = True
            if lflag & ECHO:
                self._finish_erasing()
                if lflag & ECHOCTL:
                    self._echo_raw(94)  # ^
                    self._echo_raw(8)
            return True
        if c == cc[VREPRINT] and lflag & ECHO and lflag & IEXTEN:
            self._finish_erasing()
            self._echo_char(c)
            self._echo_raw(10)
            for byte in self.buffer[self.canon_head - self.tail :]:
                self._echo_char(byte)
            return True
        if c == 10:
            if lflag & (ECHO | ECHONL):
                self._echo_raw(10)
            self._end_line(c)
            return True
        if c == cc[VEOF]:
            self._end_line(DISABLED)
            return True
        if c == cc[VEOL] or (c == cc[VEOL2] and lflag & IEXTEN):
            if lflag & ECHO:
                if self.canon_head == self.tail + len(self.buffer):
                    self._echo.append(_SET_CANON_COLUMN)
                self._echo_char(c)
            if c == 0xFF and self.termios.iflag & PARMRK:
                self.buffer.append(c)
            self._end_line(c)
            return True
        return False

    def _end_line(self, c: int) -> None:
        head = self.tail + len(self.buffer)
        self.line_ends.append(head)
        self.buffer.append(c)
        self.canon_head = head + 1
        self.wake_readers()

    def _continuation(self, c: int) -> bool:
        return bool(self.termios.iflag & IUTF8) and c & 0xC0 == 0x80

    def _erase(self, c: int) -> None:
        """eraser(): VERASE, VWERASE and VKILL."""
        lflag, cc, buffer = self.termios.lflag, self.termios.cc, self.buffer
        start = self.canon_head - self.tail  # index of the line being typed
        if len(buffer) == start:
            return
        whole = word = False
        if c != cc[VERASE]:
            if c == cc[VWERASE]:
                word = True
            else:
                if not lflag & ECHO:
                    del buffer[start:]
                    return
                if lflag & (ECHOK | ECHOKE | ECHOE) != ECHOK | ECHOKE | ECHOE:
                    del buffer[start:]
                    self._finish_erasing()
                    self._echo_char(cc[VKILL])
                    if lflag & ECHOK:
                        self._echo_raw(10)
                    return
                whole = True
        seen = False
        while len(buffer) > start:
            head = len(buffer) - 1
            while self._continuation(buffer[head]) and head > start:
                head -= 1
            byte = buffer[head]
            if self._continuation(byte):
                break
            if word:
                if _IS_ALNUM[byte] or byte == 95:
                    seen = True
                elif seen:
                    break
            gone = bytes(buffer[head:])
            del buffer[head:]
            if lflag & ECHO:
                if lflag & ECHOPRT:
                    if not self.erasing:
                        self._echo_raw(92)  # backslash
                        self.erasing = True
                    self._echo_char(byte)
                    for more in gone[1:]:
                        self._echo_raw(more)
                        self._echo.append(_MOVE_BACK)
                elif not word and not whole and not lflag & ECHOE:
                    self._echo_char(cc[VERASE])
                elif byte == 9:
                    self._echo.append(_ERASE_TAB + self._columns_before(start))
                else:
                    if _IS_CONTROL[byte] and lflag & ECHOCTL:
                        self._echo += (8, 32, 8)
                    if not _IS_CONTROL[byte] or lflag & ECHOCTL:
                        self._echo += (8, 32, 8)
            if not word and not whole:
                break
        if len(buffer) == start and lflag & ECHO:
            self._finish_erasing()

    def _columns_before(self, start: int) -> int:
        """Columns since the start of input or a tab before, for rubbing out the tab that follows them."""
        columns, lflag = 0, self.termios.lflag
        for byte in reversed(self.buffer[start:]):
            if byte == 9:
                return columns & 7 | 128
            if _IS_CONTROL[byte]:
                if lflag & ECHOCTL:
                    columns += 2
            elif not self._continuation(byte):
                columns += 1
        return columns & 7

    # -- echo --------------------------------------------------------------------------------------------------------
    def _finish_erasing(self) -> None:
        if self.erasing:
            self._echo_raw(47)  # /
            self.erasing = False

    def _echo_raw(self, c: int) -> None:
        self._echo.append(_RAW_FF if c == 0xFF else c)

    def _echo_char(self, c: int) -> None:
        if c == 0xFF:
            self._echo.append(_RAW_FF)
        elif _IS_CONTROL[c] and c != 9 and self.termios.lflag & ECHOCTL:
            self._echo.append(_CTL + c)
        else:
            self._echo.append(c)

    def flush_echo(self) -> None:
        """Send the echo that has gathered; it stays while output is stopped or the other side is full."""
        echo = self._echo
        if not echo:
            return
        if self.stopped or self.write_room() <= 0:
            if len(echo) > ECHO_LIMIT:
                del echo[:-ECHO_LIMIT]
            return
        out = bytearray()
        opost = self.termios.oflag & OPOST
        for op in echo:
            if op < 256:
                if opost:
                    self._output_char(op, out)
                else:
                    out.append(op)
            elif op < _RAW_FF:
                out += bytes((94, (op - _CTL) ^ 0o100))
                self.column += 2
            elif op == _RAW_FF:
                out.append(0xFF)
                self.column += 1
            elif op == _SET_CANON_COLUMN:
                self.canon_column = self.column
            elif op == _MOVE_BACK:
                self.column = max(0, self.column - 1)
            else:
                columns = op - _ERASE_TAB
                if not columns & 128:
                    columns += self.canon_column
                back = 8 - (columns & 7)
                out += b"\b" * back
                self.column = max(0, self.column - back)
        echo.clear()
        if out:
            self.emit(bytes(out))

    # -- output ------------------------------------------------------------------------------------------------------
    def output(self, data: bytes) -> int:
        """Bytes that a program writes: as many as the other side has room for; returns how many were taken."""
        self.flush_echo()
        room = self.write_room()
        if self.stopped or room <= 0:
            return 0
        if len(data) > room:
            data = data[:room]
        self.emit(self.process(data))
        return len(data)

    def process(self, data: bytes) -> bytes:
        """Output processing (OPOST) of `data`, with the column kept."""
        oflag = self.termios.oflag
        if not oflag & OPOST:
            return data
        if oflag & (OLCUC | OCRNL | ONOCR | ONLRET) or oflag & TABDLY == XTABS or not oflag & ONLCR:
            out = bytearray()
            for c in data:
                self._output_char(c, out)
            return bytes(out)
        cut = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if cut:
            self.column = self.canon_column = 0
        rest = data[cut:] if cut else data
        if b"\t" in rest or b"\b" in rest:
            sink = bytearray()
            for c in rest:
                self._output_char(c, sink)
        else:
            self.column += len(rest.translate(None, _CONTROLS))
            if self.termios.iflag & IUTF8:
                self.column -= sum(1 for c in rest if c & 0xC0 == 0x80)
        return data.replace(b"\n", b"\r\n")

    def _output_char(self, c: int, out: bytearray) -> None:
        """do_output_char."""
        oflag = self.termios.oflag
        if c == 10:
            if oflag & ONLRET:
                self.column = 0
            if oflag & ONLCR:
                self.canon_column = self.column = 0
                out += b"\r\n"
                return
            self.canon_column = self.column
        elif c == 13:
            if oflag & ONOCR and self.column == 0:
                return
            if oflag & OCRNL:
                c = 10
                if oflag & ONLRET:
                    self.canon_column = self.column = 0
            else:
                self.canon_column = self.column = 0
        elif c == 9:
            spaces = 8 - (self.column & 7)
            self.column += spaces
            if oflag & TABDLY == XTABS:
                out += b" " * spaces
                return
        elif c == 8:
            self.column = max(0, self.column - 1)
        elif not _IS_CONTROL[c]:
            if oflag & OLCUC and (97 <= c <= 122 or (c >= 223 and c != 247)):
                c -= 32
            if not self._continuation(c):
                self.column += 1
        out.append(c)

    def stop(self) -> None:
        """VSTOP or tcflow(TCOOFF): nothing is written until `start`."""
        self.stopped = True

    def start(self) -> None:
        """VSTART or tcflow(TCOON)."""
        if self.stopped:
            self.stopped = False
            self.wake_writers()
        self.flush_echo()

    # -- reading -----------------------------------------------------------------------------------------------------
    def available(self, poll: bool = False) -> bool:
        """Is there something to read (input_available_p)? With `poll`, as much as VMIN asks for."""
        if self.termios.lflag & ICANON and not self.termios.lflag & EXTPROC:
            return self.canon_head != self.tail
        cc = self.termios.cc
        return len(self.buffer) >= (cc[VMIN] if poll and not cc[VTIME] and cc[VMIN] else 1)

    def take(self, count: int) -> bytes:
        """Up to `count` bytes of what is available: in canonical mode at most a line; b"" for an end of file."""
        buffer = self.buffer
        if self.termios.lflag & ICANON and not self.termios.lflag & EXTPROC:
            n = min(count, self.canon_head - self.tail)
            if self.line_ends and self.line_ends[0] < self.tail + n:
                gone = self.line_ends.popleft() - self.tail + 1
                n = gone - 1 if buffer[gone - 1] == DISABLED else gone
            else:
                gone = n
                if n == count and self.line_ends and self.line_ends[0] == self.tail + n and buffer[n] == DISABLED:
                    self.line_ends.popleft()  # an end of file right behind a full buffer belongs to it (canon_skip_eof)
                    gone += 1
        else:
            gone = n = min(count, len(buffer))
            if (
                self.termios.lflag & (EXTPROC | ICANON) == EXTPROC | ICANON
                and count
                and bytes(buffer) == bytes(self.termios.cc[VEOF : VEOF + 1])
            ):
                n = 0  # the last byte is an end of file: a read of nothing
        data = bytes(buffer[:n])
        del buffer[:gone]
        self.tail += gone
        if self.canon_head < self.tail:
            self.canon_head = self.tail
        return data

    def input_count(self) -> int:
        """FIONREAD: bytes that read(2) could give, ends of file not counted."""
        if self.termios.lflag & (ICANON | EXTPROC) == ICANON:
            count = self.canon_head - self.tail
            return count - sum(1 for end in self.line_ends if self.buffer[end - self.tail] == DISABLED)
        return len(self.buffer)

    def flush_input(self) -> None:
        """Throw away what was not read yet (TCIFLUSH)."""
        self.tail += len(self.buffer)
        self.buffer.clear()
        self.canon_head = self.tail
        self.line_ends.clear()
        self.lnext = self.erasing = False

    # -- hooks: the wires --------------------------------------------------------------------------------------------
    @abstractmethod
    def emit(self, data: bytes) -> None:
        """Bytes for the other side; all must be kept, also beyond `write_room`."""

    @abstractmethod
    def write_room(self) -> int:
        """How many bytes the other side can take; 0 holds writers back until `wake_writers`."""

    def flush_output(self) -> None:  # noqa: B027 - a hook that need not do anything
        """Throw away what the other side has not seen yet (TCOFLUSH)."""

    def input_room(self) -> None:  # noqa: B027 - a hook that need not do anything
        """`backlog` has become shorter."""

    def signal_foreground(self, signo: int) -> None:  # noqa: B027 - a hook that need not do anything
        """A key that means a signal was typed."""

    def wake_readers(self) -> None:  # noqa: B027 - a hook that need not do anything
        """Something may be read now."""

    def wake_writers(self) -> None:  # noqa: B027 - a hook that need not do anything
        """Something may be written now."""
