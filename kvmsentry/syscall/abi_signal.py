"""Layouts and numbers of signals on amd64: siginfo_t, struct rt_sigframe, struct sigaction, stack_t.

arch/x86/include/uapi/asm/{signal,sigcontext,ucontext}.h, uapi/asm-generic/siginfo.h
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmsentry.kernel.task import SigInfo

(SIGHUP, SIGINT, SIGQUIT, SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGKILL, SIGUSR1, SIGSEGV, SIGUSR2,
 SIGPIPE, SIGALRM, SIGTERM, SIGSTKFLT, SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGXCPU,
 SIGXFSZ, SIGVTALRM, SIGPROF, SIGWINCH, SIGIO, SIGPWR, SIGSYS) = range(1, 32)  # fmt: skip
SIGRTMIN = 32
NSIG_VALID = 64


def bit(*signals: int) -> int:
    """The mask (sigset_t) of some signals."""
    mask = 0
    for signo in signals:
        mask |= 1 << (signo - 1)
    return mask


ALL = (1 << 64) - 1
KILL = bit(SIGKILL)
UNBLOCKABLE = bit(SIGKILL, SIGSTOP)
STOPS = bit(SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU)
IGNORED = bit(SIGCONT, SIGCHLD, SIGWINCH, SIGURG)  # by default: SIG_KERNEL_IGNORE_MASK, include/linux/signal.h
CORES = bit(SIGQUIT, SIGILL, SIGTRAP, SIGABRT, SIGFPE, SIGSEGV, SIGBUS, SIGSYS, SIGXCPU, SIGXFSZ)
SYNCHRONOUS = bit(SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGSYS)  # taken first, kernel/signal.c

SIG_DFL, SIG_IGN = 0, 1
SA_NOCLDSTOP, SA_NOCLDWAIT, SA_SIGINFO, SA_EXPOSE_TAGBITS = 1, 2, 4, 0x800
SA_RESTORER, SA_ONSTACK, SA_RESTART, SA_NODEFER, SA_RESETHAND = (
    0x04000000,
    0x08000000,
    0x10000000,
    0x40000000,
    0x80000000,
)
SA_KNOWN = 0xDC000007  # what sigaction(2) gives back; unknown bits are cleared (UAPI_SA_FLAGS)

SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK = 0, 1, 2
SS_ONSTACK, SS_DISABLE, SS_AUTODISARM = 1, 2, 1 << 31
MINSIGSTKSZ = 2048

SI_USER, SI_KERNEL, SI_QUEUE, SI_TIMER, SI_MESGQ, SI_ASYNCIO, SI_SIGIO, SI_TKILL = 0, 0x80, -1, -2, -3, -4, -5, -6
ILL_ILLOPN = 2
FPE_INTDIV, FPE_INTOVF, FPE_FLTDIV, FPE_FLTOVF, FPE_FLTUND, FPE_FLTRES, FPE_FLTINV = 1, 2, 3, 4, 5, 6, 7
SEGV_MAPERR, SEGV_ACCERR = 1, 2
BUS_ADRALN, BUS_ADRERR, BUS_OBJERR = 1, 2, 3
TRAP_BRKPT, TRAP_TRACE, TRAP_HWBKPT = 1, 2, 4
CLD_EXITED, CLD_KILLED, CLD_DUMPED, CLD_TRAPPED, CLD_STOPPED, CLD_CONTINUED = 1, 2, 3, 4, 5, 6
SYS_SECCOMP = 1

SIGACTION = Struct("<QQQQ")  # struct kernel_sigaction: sa_handler, sa_flags, sa_restorer, sa_mask
STACK_T = Struct("<QI4xQ")  # ss_sp, ss_flags, ss_size
SIGINFO_SIZE = 128
_HEAD = Struct("<iii4x")  # si_signo, si_errno, si_code
_KILL = Struct("<iii4xiI104x")
_RT = Struct("<iii4xiIQ96x")  # si_pid, si_uid, si_value
_TIMER = Struct("<iii4xiiQ96x")  # si_tid, si_overrun, si_value
_CHILD = Struct("<iii4xiIi4xqq80x")  # si_pid, si_uid, si_status, si_utime, si_stime
_FAULT = Struct("<iii4xQh102x")  # si_addr, si_addr_lsb
_POLL = Struct("<iii4xqi100x")  # si_band, si_fd
_SYS = Struct("<iii4xQiI96x")  # si_call_addr, si_syscall, si_arch
_RAW = Struct("<iii4xQQQQ80x")
_USER = Struct("<iii4xQQQQ")
_PID_UID_VALUE = Struct("<iIQ")
_WORDS = Struct("<QQ")


def pack_siginfo(info: SigInfo) -> bytes:
    """siginfo_t as the application sees it, 128 bytes; the union's member follows from what `fields` holds
    (siginfo_layout in kernel/signal.c)."""
    f = info.fields
    head = info.signo, info.errno, info.code
    if "q0" in f:
        return _RAW.pack(*head, f["q0"], f["q1"], f["q2"], f["q3"])
    if "status" in f:
        return _CHILD.pack(*head, f.get("pid", 0), f.get("uid", 0), f["status"], f.get("utime", 0), f.get("stime", 0))
    if "syscall" in f:
        return _SYS.pack(*head, f.get("addr", 0), f["syscall"], f.get("arch", 0))
    if "addr" in f:
        return _FAULT.pack(*head, f["addr"], f.get("addr_lsb", 0))
    if "timerid" in f:
        return _TIMER.pack(*head, f["timerid"], f.get("overrun", 0), f.get("value", 0) & ALL)
    if "band" in f:
        return _POLL.pack(*head, f["band"], f.get("fd", 0))
    if "value" in f:
        return _RT.pack(*head, f.get("pid", 0), f.get("uid", 0), f["value"] & ALL)
    return _KILL.pack(*head, f.get("pid", 0), f.get("uid", 0))


def unpack_siginfo(data: bytes, signo: int) -> SigInfo:
    """What an application handed to rt_sigqueueinfo(2) or pidfd_send_signal(2), kept word for word (48 bytes count)."""
    from kvmsentry.kernel.task import SigInfo

    _, error, code, q0, q1, q2, q3 = _USER.unpack_from(data)
    pid, uid, value = _PID_UID_VALUE.unpack(_WORDS.pack(q0, q1))
    return SigInfo(signo, code, error, pid=pid, uid=uid, value=value, q0=q0, q1=q1, q2=q2, q3=q3)


# struct rt_sigframe: pretcode, struct ucontext (uc_flags, uc_link, uc_stack, uc_mcontext, uc_sigmask), struct siginfo.
# uc_mcontext: r8..r15 di si bp bx dx ax cx sp ip flags | cs gs fs ss | err trapno oldmask cr2 fpstate reserved1[8]
FRAME = Struct("<Q QQ QI4xQ 18Q 4H QQQQ Q 64x Q 128s")
FRAME_SIZE = FRAME.size  # 440
UCONTEXT = Struct("<QQ QI4xQ 18Q 4H QQQQ Q 64x Q")  # the part that rt_sigreturn reads
UCONTEXT_OFFSET = 8
SIGINFO_OFFSET = FRAME_SIZE - SIGINFO_SIZE
UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS = 1, 2, 4
USER_CS, USER_SS = 0x33, 0x2B  # arch/x86/include/asm/segment.h

FP_XSTATE_MAGIC1, FP_XSTATE_MAGIC2 = 0x46505853, 0x46505845
SW_BYTES = Struct("<IIQI28x")  # struct _fpx_sw_bytes: magic1, extended_size, xfeatures, xstate_size
SW_OFFSET = 464  # in the FXSAVE area
FXSAVE_SIZE = 512
XSAVE_HEADER = 512  # XSTATE_BV is its first word (SDM vol. 1, 13.4.2)

FIX_EFLAGS = 0x50DD5  # AC OF DF TF SF ZF AF PF CF RF: what rt_sigreturn may set (arch/x86/kernel/signal_64.c)
EFLAGS_TF, EFLAGS_DF, EFLAGS_RF = 0x100, 0x400, 0x10000
