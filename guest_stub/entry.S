/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The code that runs in the guest beside the application: the ring 3 entry, the ring 0 entry, the exception handlers
 * and the service vCPU's loop. See kvmsentry/vcpu/README.md for the protocol.
 *
 * GS base is the channel wherever %gs appears.
 */
#include "layout.h"

#define REG(r) %gs:(KS_CH_REGS + 8 * KS_##r)
#define CH(f) %gs:KS_CH_##f

/* All but RAX, RCX, R11, RSP: those are saved where they are still whole. */
.macro SAVE_GPRS
	mov %rbx, REG(RBX)
	mov %rdx, REG(RDX)
	mov %rsi, REG(RSI)
	mov %rdi, REG(RDI)
	mov %rbp, REG(RBP)
	mov %r8, REG(R8)
	mov %r9, REG(R9)
	mov %r10, REG(R10)
	mov %r12, REG(R12)
	mov %r13, REG(R13)
	mov %r14, REG(R14)
	mov %r15, REG(R15)
.endm

/* All but RCX, RSP, RIP, RFLAGS. */
.macro LOAD_GPRS
	mov REG(RAX), %rax
	mov REG(RBX), %rbx
	mov REG(RDX), %rdx
	mov REG(RSI), %rsi
	mov REG(RDI), %rdi
	mov REG(RBP), %rbp
	mov REG(R8), %r8
	mov REG(R9), %r9
	mov REG(R10), %r10
	mov REG(R11), %r11
	mov REG(R12), %r12
	mov REG(R13), %r13
	mov REG(R14), %r14
	mov REG(R15), %r15
.endm

	.section .ring3, "ax"
/*
 * Ring 3 entry: LSTAR on hosts that leave SYSCALL in ring 3. RCX is the return address, R11 a copy of the flags.
 * The flags themselves are live from here to the return (SFMASK is 0): nothing below may change them, hence lea,
 * jecxz, bswap and no cmp.
 */
	.globl u_entry, u_entry_patched, u_slow, u_published, u_park, u_answered, u_xrstored, u_save, u_end
u_entry:
	mov %rcx, %r11
u_entry_patched:		/* rewritten call sites come here with the return address in R11 */
	rdgsbase %rcx
	bswap %rcx		/* the upper half is now the lower, its bytes reversed */
	lea -0x00ffffff(%rcx), %ecx
	jecxz 1f
	/* The application has a GS base of its own: the runner reads the registers. */
	mov %r11, %rcx
u_slow:
	out %al, $KS_PORT_SLOW
	ud2

1:	mov %rax, REG(RAX)
	SAVE_GPRS
	mov %r11, REG(RIP)
	mov %rsp, REG(RSP)
	rdfsbase %rcx
	mov %rcx, REG(FS_BASE)
	rdgsbase %rsp
	lea (KS_CH_REGS + 8 * KS_RFLAGS + 8)(%rsp), %rsp
	pushfq
u_publish:
	mov $KS_ST_REQUEST, %eax
	xchg %eax, CH(STATE)	/* K1: the request is out, and whether the Sentry sleeps is read after it */
u_published:
	mov (u_entry + 0x1000 + KS_SH_ASLEEP)(%rip), %ecx
	jecxz u_spin
	out %al, $KS_PORT_DOORBELL
u_spin:
	mov (u_entry + 0x1000 + KS_SH_SPINS)(%rip), %eax
1:	mov CH(STATE), %ecx
	jecxz u_answered
	lea -KS_ST_LEAVE(%rcx), %ecx
	jecxz u_park
	lea -1(%rax), %eax
	mov %eax, %ecx
	jecxz u_park
	pause
	jmp 1b
u_park:
	out %al, $KS_PORT_PARK
	jmp u_spin

u_answered:			/* the runner starts and resumes vCPUs here as well: only GS base counts */
	mov CH(CMD), %ecx
	jecxz u_continue
	lea -KS_CMD_SAVE(%rcx), %ecx
	jecxz 1f
	lea (KS_CMD_SAVE - KS_CMD_GOTO)(%rcx), %ecx
	jecxz u_goto
	jmp u_reload
1:	jmp u_save

u_goto:				/* this thread is saved; the answer in the other's channel loads all there is */
	mov CH(TARGET), %rcx
	movl $KS_ST_GONE, CH(STATE)
	wrgsbase %rcx
	jmp u_answered

u_continue:
	mov CH(RESULT), %rax
	mov REG(RSP), %rsp
	mov REG(RDX), %rdx	/* SAVE uses it */
	mov REG(RFLAGS), %r11
	mov REG(RIP), %rcx
	jmp *%rcx

u_reload:
	mov CH(XFLAG), %ecx
	jecxz u_xrstored
	mov $-1, %eax
	mov $-1, %edx
	xrstor64 CH(XSAVE)
u_xrstored:
	mov REG(FS_BASE), %rcx
	wrfsbase %rcx
	rdgsbase %rsp
	lea (KS_CH_FRAME)(%rsp), %rsp
	push $2			/* below the frame there is room; NT would make iretq fault */
	popfq
	LOAD_GPRS
	mov REG(GS_BASE), %rcx
	jrcxz 1f
	wrgsbase %rcx
1:	mov (KS_CH_REGS + 8 * KS_RCX - KS_CH_FRAME)(%rsp), %rcx
	iretq

u_save:
	mov $-1, %eax
	mov $-1, %edx
	xsave64 CH(XSAVE)
	jmp u_publish
u_end:

	.section .ring0, "ax"
/*
 * Exception handlers for hosts that emulate ring 0: one instruction each, the runner does the rest from the frame.
 * Eight bytes apart.
 */
	.globl e_vectors, e_iretq
	.balign 8
e_vectors:
	.set v, 0
	.rept 32
	.balign 8
	out %al, $(KS_PORT_VECTOR + v)
	ud2
	.set v, v + 1
	.endr
	.balign 8
e_iretq:
	iretq

/* The ring 0 entry. GS base is the channel after swapgs, KERNEL_GS_BASE before. */
	.globl n_syscall, n_published, n_answered, n_xrstored, n_save, n_common, n_vectors, n_end, n_start
n_start:
n_syscall:
	swapgs
	mov %rcx, REG(RIP)
	mov %rax, REG(RAX)
	SAVE_GPRS
	mov %rsp, REG(RSP)
	mov %r11, REG(RFLAGS)
	movl $KS_EV_SYSCALL, CH(KIND)
n_bases:
	rdfsbase %rcx
	mov %rcx, REG(FS_BASE)
	swapgs
	rdgsbase %rcx
	swapgs
	mov %rcx, REG(GS_BASE)
n_publish:
	mov $KS_ST_REQUEST, %eax
	xchg %eax, CH(STATE)
n_published:
	mov $(KS_STUB_BASE + KS_GPA_SHARED), %rsi
	cmpl $0, KS_SH_ASLEEP(%rsi)
	je n_spin
	out %al, $KS_PORT_DOORBELL
n_spin:
	mov KS_SH_SPINS(%rsi), %ecx
1:	mov CH(STATE), %eax
	test %eax, %eax
	je n_answered
	cmp $KS_ST_LEAVE, %eax
	je 2f
	dec %ecx
	je 2f
	pause
	jmp 1b
2:	out %al, $KS_PORT_PARK
	jmp n_spin

n_answered:			/* the runner starts and resumes vCPUs here: only GS base counts */
	mov CH(CMD), %eax
	cmp $KS_CMD_RELOAD, %eax
	je n_reload
	cmp $KS_CMD_SAVE, %eax
	je n_save
	mov CH(RESULT), %rax
	mov REG(RDX), %rdx
	mov REG(RSI), %rsi
	mov REG(RIP), %rcx
	mov REG(RFLAGS), %r11
	mov REG(RSP), %rsp
	swapgs
	sysretq

n_reload:
	cmpl $0, CH(XFLAG)
	je n_xrstored
	mov $-1, %eax
	mov $-1, %edx
	xrstor64 CH(XSAVE)
n_xrstored:
	mov REG(FS_BASE), %rcx
	wrfsbase %rcx
	rdgsbase %rsp
	add $KS_CH_FRAME, %rsp
	LOAD_GPRS
	mov REG(GS_BASE), %rcx
	swapgs
	wrgsbase %rcx
	mov (KS_CH_REGS + 8 * KS_RCX - KS_CH_FRAME)(%rsp), %rcx
	iretq

n_save:
	mov $-1, %eax
	mov $-1, %edx
	xsave64 CH(XSAVE)
	jmp n_publish

n_common:			/* on the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS */
	testb $3, 24(%rsp)
	je n_panic
	swapgs
	mov %rax, REG(RAX)
	mov %rcx, REG(RCX)
	mov %r11, REG(R11)
	SAVE_GPRS
	pop %rax
	mov %eax, CH(VECTOR)
	mov $KS_EV_EXCEPTION, %ecx
	mov $KS_EV_FAULT, %edx
	cmp $14, %eax
	cmove %edx, %ecx
	mov %ecx, CH(KIND)
	pop %rax
	mov %rax, CH(ERROR)
	pop %rax
	mov %rax, REG(RIP)
	pop %rax
	pop %rax
	mov %rax, REG(RFLAGS)
	pop %rax
	mov %rax, REG(RSP)
	mov %cr2, %rax
	mov %rax, CH(CR2)
	jmp n_bases

n_panic:
	out %al, $KS_PORT_PANIC
	jmp n_panic

/* Sixteen bytes apart. Vectors 8, 10-14, 17, 21, 29 and 30 come with an error code (SDM vol. 3, 6.13; APM 8.2). */
	.balign 16
n_vectors:
	.set v, 0
	.rept 32
	.balign 16
	.ifeq (v - 8) * (v - 10) * (v - 11) * (v - 12) * (v - 13) * (v - 14) * (v - 17) * (v - 21) * (v - 29) * (v - 30)
	.else
	push $0
	.endif
	push $v
	jmp n_common
	.set v, v + 1
	.endr
n_end:

/*
 * Service vCPU: writes to each place of a list what is there (RSI: the list, RCX: how many), so that KVM looks again at
 * what it shadows, then reloads CR3. Eight bytes at an entry: that entry. Eight bytes across two entries: KVM cannot tell
 * and forgets the whole table. Few instructions, because some hosts emulate each.
 */
	.globl s_touch, s_flush
s_touch:
1:	lodsq
	orq $0, (%rax)
	loop 1b
	mov %cr3, %rax
	mov %rax, %cr3
	out %al, $KS_PORT_DONE

/* Service vCPU: makes the flush page present (RDI), for the host to take it away. */
s_flush:
	mov %al, (%rdi)
	out %al, $KS_PORT_DONE
