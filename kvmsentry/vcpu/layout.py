"""Everything that Python, the C runner and the guest stub must agree on, written once.

The build turns every upper-case integer here into a `#define KS_<NAME>` (guest_stub/out/constants.h), so the stub's
assembly and the runner see the same numbers; `guest_stub/layout.h` pins the structures to them with _Static_assert.

Guest-virtual memory, as every address space sees it:

    0000000000000000 ..            user space, up to USER_TOP: VMAs, the application's
    ffff800000000000 .. (39 bits)  LINEAR_BASE: guest-physical memory, ring 0 only, PML4 entry 256
    ffffff0000000000 .. (4 GiB)    WINDOW: what the ring 3 entry uses, PML4 entry 510; none with the ring 0 entry
    ffffffff80000000 ..            STUB_BASE: the ring 0 stub, PML4 entry 511

Guest-physical memory: the machine's own memslot at 0 (below), RAM after it, file windows in the upper half of the
39 bits that the linear map can show.
"""

from __future__ import annotations

# Registers: struct kvm_regs' order, then the two bases. Index into Context.regs.
RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP = range(8)
R8, R9, R10, R11, R12, R13, R14, R15 = range(8, 16)
RIP, RFLAGS, FS_BASE, GS_BASE = range(16, 20)
NREGS = 20

# Event kinds.
EV_SYSCALL = 0
EV_FAULT = 1  # page fault: fault_address, error_code
EV_EXCEPTION = 2  # another exception of the application's: vector, error_code
EV_KICKED = 3  # Context.kick reached the guest
EV_HOST_ERROR = 4  # KVM_RUN failed or ended in a way that nothing here asked for: error_code is the host's errno
NEVENTS = 5
EVENT_NAMES = ("syscall", "fault", "exception", "kicked", "host_error")

NEVER = (1 << 63) - 1  # the deadline of no timer: ns of the kernel's clock

# Why a vCPU left the guest, as the runner counts it. What stays in the host's kernel (a doorbell, a fault that KVM
# mends itself) is no exit.
EXIT_PARK = 0  # to sleep until answered
EXIT_INTERRUPTED = 1  # KVM_RUN: EINTR, EAGAIN, KVM_EXIT_INTR: a kick, a halt, a signal
EXIT_FAULT = 2  # #PF; only where the entry is in ring 3, else the stub posts it
EXIT_EXCEPTION = 3  # another vector, likewise
EXIT_SLOW = 4  # a system call whose GS base is the application's own
EXIT_PORT = 5  # `out` by the application: #GP
EXIT_HOST_ERROR = 6  # KVM_RUN failed, or ended in a way that nothing here asked for
NEXITS = 7
EXIT_NAMES = ("park", "interrupted", "fault", "exception", "slow", "port", "host_error")

# Selectors as Linux has them, so that signal frames show the usual values (arch/x86/include/asm/segment.h).
KERNEL_CS = 0x10
KERNEL_DS = 0x18
USER_DS = 0x2B
USER_CS = 0x33
TSS_SELECTOR = 0x40

# What an application may set in RFLAGS: CF PF AF ZF SF TF DF OF NT RF AC ID (SDM vol. 1, 3.4.3).
RFLAGS_USER = 0x254DD5
RFLAGS_FIXED = 0x202  # bit 1 and IF

# Guest-virtual layout.
USER_TOP = 0x7FFFFFFFF000
LINEAR_BASE = 0xFFFF800000000000
WINDOW_BASE = 0xFFFFFF0000000000
STUB_BASE = 0xFFFFFFFF80000000
WINDOW_HIGH = 0xFFFFFF00  # the upper half of every address in the window
WINDOW_CODE = WINDOW_BASE  # the ring 3 entry, read and execute
WINDOW_SHARED = WINDOW_BASE + 0x1000  # the Sentry's state, read only
WINDOW_CHANNELS = WINDOW_BASE + 0x10000  # one page a thread
WINDOW_SLOTS = 1024
WINDOW_PML4 = 510
LINEAR_PML4 = 256
STUB_PML4 = 511

# The machine's own guest-physical memory, memslot 0.
GPA_BITS = 39
GPA_ENTRY = 0x1000  # ring 3 entry code; one page, starts the stub's image
GPA_STUB = 0x2000  # ring 0 code and its tables of handlers
STUB_PAGES = 6
GPA_GDT = 0x8000
GPA_IDT_RING3 = 0x9000  # handlers that leave at once: for hosts that emulate ring 0
GPA_IDT_RING0 = 0xA000  # handlers that use the channel
GPA_SHARED = 0xB000
GPA_SERVICE = 0xC000  # arguments of the service vCPU
GPA_FLUSH = 0xD000  # touched by the service vCPU, taken away by the host: flushes every TLB under nested paging
GPA_SERVICE_PML4 = 0xE000
GPA_KERNEL_PDPT = 0x10000
GPA_LINEAR_PDPT = 0x11000
GPA_KERNEL_PD = 0x12000
GPA_KERNEL_PT = 0x13000
GPA_LINEAR_PDS = 0x200000  # 512 page directories: 2 MiB entries over 39 bits
GPA_SUPERVISOR = 0x400000  # a page a vCPU: TSS and ring 0 stack
GPA_CHANNELS = 0x800000  # channel frames
CHANNEL_FRAMES = 2048
MACHINE_SIZE = 0x1000000
MAX_VCPUS = 1024

# The supervisor page: a TSS with a permission bitmap for ports 0-7, then the stack, whose top is SUP_STACK.
SUP_TSS = 0
SUP_BITMAP = 0x68
SUP_TSS_LIMIT = 0x6A
SUP_STACK = 0xFF0
SUP_FRAME = SUP_STACK - 40  # where the CPU pushes RIP CS RFLAGS RSP SS coming from ring 3 (SDM vol. 3, 6.14.2)

# Ports. The first three are open to ring 3.
PORT_PARK = 0  # spun long enough, or told to leave: sleep until answered
PORT_SLOW = 1  # a system call whose GS base is not a channel: taken from the registers
PORT_DOORBELL = 2  # KVM_IOEVENTFD: wakes the Sentry, no exit to the runner
PORTS_OPEN = 0xF8  # the bitmap's byte: 0 is open
PORT_DONE = 0x20  # service vCPU: work done
PORT_PANIC = 0x21  # the stub took an exception in ring 0
PORT_VECTOR = 0x40  # + vector: an exception from ring 3

# The channel page.
CH_STATE = 0x00  # u32
CH_CMD = 0x04  # u32
CH_RESULT = 0x08
CH_KIND = 0x10  # u32, ring 0 entry only
CH_VECTOR = 0x14  # u32, ditto
CH_ERROR = 0x18
CH_CR2 = 0x20
CH_XFLAG = 0x28  # u32: RELOAD also loads the XSAVE area
CH_TARGET = 0x30  # address of a channel, for GOTO
CH_REGS = 0x40  # NREGS words
CH_FRAME = 0x100  # what RELOAD's iretq pops: RIP CS RFLAGS RSP SS
CH_XSAVE = 0x200
CH_XSAVE_ROOM = 0x1000 - 0x200

# Channel states: the guest only ever writes REQUEST and GONE, the Sentry the others.
ST_ANSWERED = 0
ST_REQUEST = 1
ST_LEAVE = 2  # taken, and the answer will take a while: leave the processor
ST_GONE = 3  # GOTO was read

CMD_CONTINUE = 0
CMD_RELOAD = 1
CMD_SAVE = 2
CMD_GOTO = 3  # go on with the channel at `target`, whose answer is a RELOAD: as another thread. Ring 3 entry only

# The shared page.
SH_ASLEEP = 0x00  # u32: the Sentry sleeps, ring the doorbell
SH_SPINS = 0x04  # u32: looks at the reply before parking

# Processor state that the guest gets.
CR0 = 0x80050033  # PG AM WP NE ET MP PE
CR4 = 0x50620  # PAE OSFXSR OSXMMEXCPT FSGSBASE OSXSAVE
EFER = 0xD01  # NXE LMA LME SCE
XCR0_MASK = 0xE7  # x87 SSE AVX and AVX-512; what fits in the channel
XSAVE_MAX = 2696
