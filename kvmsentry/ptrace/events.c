/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stops become events, answers become resumes. One thread, the tracer, calls all of this; only pt_wake may come from another.
 */
#include "pt.h"

#include <elf.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "api.h"

#ifndef PTRACE_SYSEMU
#define PTRACE_SYSEMU 31	/* arch/x86/include/uapi/asm/ptrace-abi.h */
#endif
#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif

enum {
	POLL_NS = 50000,	/* host descriptors are looked at this often when there is never a reason to sleep */
	SOON_NS = 50000,	/* an event so soon after the resume is a chatty thread's */
	CHATTY = 16,		/* so many in a row: better on our own processor than on another that has to be woken */
	ALOOF_NS = 1000000,	/* computing for so long: any processor again */
};

static const struct { u32 ours; u32 theirs; } map[] = {
#define REG(ours, theirs) { ours, offsetof(struct user_regs_struct, theirs) / 8 }
	REG(KS_RAX, rax), REG(KS_RBX, rbx), REG(KS_RCX, rcx), REG(KS_RDX, rdx), REG(KS_RSI, rsi), REG(KS_RDI, rdi),
	REG(KS_RSP, rsp), REG(KS_RBP, rbp), REG(KS_R8, r8), REG(KS_R9, r9), REG(KS_R10, r10), REG(KS_R11, r11),
	REG(KS_R12, r12), REG(KS_R13, r13), REG(KS_R14, r14), REG(KS_R15, r15), REG(KS_RIP, rip), REG(KS_RFLAGS, eflags),
	REG(KS_FS_BASE, fs_base), REG(KS_GS_BASE, gs_base),
};

/* Processors. */

static void pin(struct pt_tracer *m, struct pt_thread *t, int cpu)
{
	cpu_set_t set;

	if (!!t->pinned != (cpu >= 0))
		m->npinned += cpu >= 0 ? 1 : -1;
	t->pinned = cpu + 1;
	if (cpu >= 0) {
		CPU_ZERO(&set);
		CPU_SET(cpu, &set);
	} else {
		memset(&set, 0xff, sizeof(set));
	}
	/* Refused, it runs where it runs. */
	sched_setaffinity(t->tid, sizeof(set), &set);
}

static void unpin_aloof(struct pt_tracer *m, u64 now)
{
	m->repinned = now;
	for (u32 i = 0; i < m->ncontexts && m->npinned; i++) {
		struct pt_ctx *c = m->contexts[i];

		if (c && c->state == PT_RUNNING && c->thread && c->thread->pinned && now - c->resumed > ALOOF_NS) {
			c->thread->chatty = 0;
			pin(m, c->thread, -1);
		}
	}
}

/* An event of c came at `now`. */
static void place(struct pt_tracer *m, struct pt_ctx *c, u64 now)
{
	struct pt_thread *t = c->thread;

	if (m->ncpus < 2)
		return;
	if (now - c->resumed < SOON_NS) {
		if (++t->chatty % CHATTY == 0) {
			int cpu = sched_getcpu();

			if (cpu >= 0 && t->pinned != cpu + 1)
				pin(m, t, cpu);
		}
	} else if (t->chatty) {
		t->chatty = 0;
	}
}

/* Stops. */

static int host_error(struct pt_ctx *c, int error)
{
	c->event = KS_EV_HOST_ERROR;
	c->error_code = error;
	return 1;
}

static void exception(struct pt_ctx *c, u32 vector, u64 error)
{
	c->event = KS_EV_EXCEPTION;
	c->vector = vector;
	c->error_code = error;
}

static void fault(struct pt_ctx *c, u64 address, u64 error)
{
	c->event = KS_EV_FAULT;
	c->vector = 14;
	c->fault_address = address;
	c->error_code = error;	/* the tracer's Python knows the page, and with it the other bits */
}

static void decode_signal(struct pt_ctx *c, int signal, const siginfo_t *si)
{
	u64 address = (u64)si->si_addr;

	switch (signal) {
	case SIGSEGV:
		if (si->si_code == SI_KERNEL)
			exception(c, 13, 0);
		else
			fault(c, address, 4);
		break;
	case SIGBUS:
		/* Stack segment, alignment check; else the host has no page to show (a file that shrank): SIGBUS all the same. */
		exception(c, si->si_code == BUS_ADRALN ? 17 : 12, 0);
		break;
	case SIGILL:
		exception(c, 6, 0);
		break;
	case SIGFPE:
		exception(c, si->si_code == FPE_INTDIV ? 0 : si->si_code == FPE_INTOVF ? 4 : 19, 0);
		break;
	case SIGTRAP:
		exception(c, si->si_code == SI_KERNEL ? 3 : 1, 0);
		break;
	case SIGSYS:
		/* The vsyscall page: the host has skipped the call and returned from it. Nothing is there for the application. */
		c->regs[KS_RIP] = (u64)si->si_call_addr;
		c->regs[KS_RSP] -= 8;
		fault(c, c->regs[KS_RIP], 0x14);
		break;
	}
}

/* #MF or #XM: the unmasked flag that is raised tells. */
static u32 float_vector(struct pt_tracer *m, struct pt_ctx *c)
{
	uint8_t area[PT_XSAVE_ROOM] __attribute__((aligned(64)));
	struct iovec iov = { area, sizeof(area) };
	u32 mxcsr;

	if (ptrace(PTRACE_GETREGSET, c->thread->tid, NT_X86_XSTATE, &iov) < 0)
		return 19;
	memcpy(&mxcsr, area + 24, 4);
	return mxcsr & ~(mxcsr >> 7) & 0x3f ? 19 : 16;
}

/* A status of waitpid for t. 1: its context has an event. 0: nothing that concerns the application; it runs on, or is gone. */
int pt_take(struct pt_tracer *m, struct pt_thread *t, int status)
{
	struct pt_ctx *c = t->ctx;
	struct user_regs_struct regs;
	u64 *raw = (u64 *)&regs, now;
	siginfo_t si;
	int signal, syscall_stop;

	if (!WIFSTOPPED(status)) {
		pt_buried(m, t);
		if (t->pinned)
			m->npinned--;
		t->pinned = 0;
		if (!c && t->forsaken)
			free(t);
		if (!c || c->state != PT_RUNNING)
			return 0;
		c->state = PT_STOPPED;
		m->nrunning--;
		return host_error(c, ESRCH);
	}
	if (!c || c->state != PT_RUNNING)
		return 0;	/* it was stopped, and is */
	signal = WSTOPSIG(status);
	syscall_stop = signal == (SIGTRAP | 0x80);
	if (!syscall_stop) {
		int known = signal == SIGSEGV || signal == SIGBUS || signal == SIGILL || signal == SIGFPE ||
			    signal == SIGTRAP || signal == SIGSYS;

		if (status >> 16 ? status >> 16 != PTRACE_EVENT_STOP || !c->kicked : !known) {
			m->count_spurious++;
			ptrace(PTRACE_SYSEMU, t->tid, 0, 0);
			return 0;
		}
		if (!(status >> 16)) {
			if (ptrace(PTRACE_GETSIGINFO, t->tid, 0, &si) < 0)
				return 0;	/* killed meanwhile: its exit comes */
			if (si.si_code <= 0) {	/* sent by somebody on the host, SI_USER and kin: not the application's doing */
				m->count_spurious++;
				ptrace(PTRACE_SYSEMU, t->tid, 0, 0);
				return 0;
			}
		}
	}
	if (ptrace(PTRACE_GETREGS, t->tid, 0, &regs) < 0)
		return 0;
	now = pt_now();
	c->used += now - c->resumed;
	place(m, c, now);
	c->state = PT_STOPPED;
	c->kicked = 0;
	m->nrunning--;
	m->count_events++;
	for (u32 i = 0; i < KS_NREGS; i++)
		c->regs[map[i].ours] = raw[map[i].theirs];
	if (regs.cs != KS_USER_CS) {
		/* Compatibility mode: our Linux has none. The next answer puts the segments right. */
		t->lost = 1;
		exception(c, 13, 0);
	} else if (syscall_stop) {
		if (regs.rcx != regs.rip || regs.r11 != regs.eflags) {	/* int $0x80: the gate is not there */
			t->lost = 1;
			c->regs[KS_RIP] -= 2;
			c->regs[KS_RAX] = regs.orig_rax;
			exception(c, 13, 0x80 << 3 | 2);
			return 1;
		}
		c->event = KS_EV_SYSCALL;
		c->regs[KS_RAX] = c->call[0] = regs.orig_rax;
		c->call[1] = regs.rdi;
		c->call[2] = regs.rsi;
		c->call[3] = regs.rdx;
		c->call[4] = regs.r10;
		c->call[5] = regs.r8;
		c->call[6] = regs.r9;
	} else if (status >> 16) {
		c->event = KS_EV_KICKED;
	} else {
		decode_signal(c, signal, &si);
		if (signal == SIGFPE && c->vector == 19)
			c->vector = float_vector(m, c);
	}
	return 1;
}

void pt_put_pending(struct pt_tracer *m, struct pt_ctx *c)
{
	c->pending = 1;
	c->pending_next = m->pending;
	m->pending = c;
}

void pt_drop_pending(struct pt_tracer *m, struct pt_ctx *c)
{
	struct pt_ctx **at = &m->pending;

	while (*at && *at != c)
		at = &(*at)->pending_next;
	if (*at)
		*at = c->pending_next;
	c->pending = 0;
}

/* Waiting. */

static int sleep_on_epoll(struct pt_tracer *m, struct epoll_event *events, int64_t ns)
{
	struct timespec ts = { ns / 1000000000, ns % 1000000000 };
	struct itimerspec timer = { .it_value = ts };

	if (ns == 0)
		return epoll_wait(m->epoll, events, PT_MAX_HOST_EVENTS, 0);
	if (ns < 0)
		return epoll_wait(m->epoll, events, PT_MAX_HOST_EVENTS, -1);
#ifdef SYS_epoll_pwait2
	if (m->have_pwait2) {
		int n = syscall(SYS_epoll_pwait2, m->epoll, events, PT_MAX_HOST_EVENTS, &ts, NULL, 0);

		if (n >= 0 || errno != ENOSYS)
			return n;
		m->have_pwait2 = 0;
	}
#endif
	timerfd_settime(m->timer, 0, &timer, NULL);
	return epoll_wait(m->epoll, events, PT_MAX_HOST_EVENTS, -1);
}

/* One epoll; bell, timer and SIGCHLD are dealt with here. How many host descriptors are ready, or -1 - errno. */
static int look_at_host(struct pt_tracer *m, int64_t ns)
{
	struct epoll_event events[PT_MAX_HOST_EVENTS];
	struct signalfd_siginfo info;
	u64 count;
	int n = sleep_on_epoll(m, events, ns);

	if (ns == 0)
		m->polled = pt_now();
	if (n < 0) {
		if (errno != EINTR)
			return -1 - errno;
		m->woken = 1;	/* Python has a handler to run */
		return 0;
	}
	m->nhost = 0;
	for (int i = 0; i < n; i++) {
		if (events[i].data.fd == m->signals) {
			/* Read before the statuses are collected: a stop after that sends another. */
			if (read(m->signals, &info, sizeof(info)) > 0)
				m->drained = 0;
		} else if (events[i].data.fd == m->bell || events[i].data.fd == m->timer) {
			if (read(events[i].data.fd, &count, sizeof(count)) < 0)
				continue;
		} else {
			m->host[m->nhost++] = events[i];
		}
	}
	return m->nhost;
}

static struct pt_ctx *collect(struct pt_tracer *m)
{
	int status, tid;

	if (m->pending) {
		struct pt_ctx *c = m->pending;

		pt_drop_pending(m, c);
		return c;
	}
	while (!m->drained) {
		struct pt_thread *t;

		tid = waitpid(-1, &status, __WALL | WNOHANG);
		if (tid <= 0) {
			m->drained = 1;
			return NULL;
		}
		t = pt_find(m, tid);
		if (t && pt_take(m, t, status))
			return t->ctx;
	}
	return NULL;
}

static int found(struct pt_tracer *m, const struct pt_ctx *c)
{
	m->count_kinds[c->event]++;
	return c->event << 16 | c->id;
}

int pt_wait(struct pt_tracer *m, int64_t timeout)
{
	struct pt_ctx *c;
	u64 start = 0, now = 0;
	int64_t ns;
	int n;

	if (m->host_held) {	/* edges that a stub's event overtook: epoll tells of them once only */
		m->host_held = 0;
		return PT_HOST;
	}
	if (m->host_due) {
		m->host_due = 0;
		if ((n = look_at_host(m, 0)))
			return n > 0 ? PT_HOST : n - PT_FAILED;
	}
	c = collect(m);
	if (c) {
		/* Never a reason to sleep: host descriptors get their turn all the same. */
		if (!(m->count_events & 31)) {
			now = pt_now();
			if (now - m->polled > POLL_NS)
				m->host_due = 1;
			if (m->npinned && now - m->repinned > ALOOF_NS)
				unpin_aloof(m, now);
		}
		return found(m, c);
	}
	for (;;) {
		if (m->woken) {
			m->woken = 0;
			return PT_WOKEN;
		}
		ns = timeout;
		if (timeout > 0) {
			now = pt_now();
			if (!start)
				start = now;
			if (now - start >= (u64)timeout)
				return PT_TIMEOUT;
			ns = timeout - (now - start);
		}
		if (m->npinned && m->nrunning && (ns < 0 || ns > ALOOF_NS))
			ns = ALOOF_NS;
		m->count_sleeps++;
		n = look_at_host(m, ns);
		c = collect(m);
		if (c) {
			m->host_held = n > 0;
			return found(m, c);
		}
		if (n)
			return n > 0 ? PT_HOST : n - PT_FAILED;
		if (timeout == 0)
			return m->woken ? (m->woken = 0, PT_WOKEN) : PT_TIMEOUT;
		if (m->npinned)
			unpin_aloof(m, pt_now());
	}
}

void pt_wake(struct pt_tracer *m)
{
	u64 one = 1;

	m->woken = 1;
	while (write(m->bell, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

uint64_t pt_host_event(struct pt_tracer *m, int i)
{
	return i < m->nhost ? (u64)m->host[i].events << 32 | (u32)m->host[i].data.fd : 0;
}

/* Answers. */

/* The host cannot run it: its next event says so. */
void pt_fail(struct pt_tracer *m, struct pt_ctx *c, int error)
{
	host_error(c, error);
	if (!c->pending)
		pt_put_pending(m, c);
}

void pt_resume(struct pt_tracer *m, struct pt_ctx *c)
{
	c->state = PT_RUNNING;
	m->nrunning++;
	c->resumed = pt_now();
	/* ESRCH: it was killed, and waitpid will tell. */
	ptrace(PTRACE_SYSEMU, c->thread->tid, 0, 0);
}

static int load_xsave(struct pt_tracer *m, struct pt_ctx *c)
{
	struct iovec iov = { c->xsave, m->xsave_host };

	return ptrace(PTRACE_SETREGSET, c->thread->tid, NT_X86_XSTATE, &iov) < 0 ? -errno : 0;
}

void pt_reload(struct pt_tracer *m, struct pt_ctx *c)
{
	struct pt_thread *t = c->thread;
	struct user_regs_struct regs = { .cs = KS_USER_CS, .ss = KS_USER_DS, .orig_rax = -1 };
	u64 *raw = (u64 *)&regs;
	int rc;

	c->regs[KS_RFLAGS] = (c->regs[KS_RFLAGS] & KS_RFLAGS_USER) | KS_RFLAGS_FIXED;
	for (u32 i = 0; i < KS_NREGS; i++)
		raw[map[i].theirs] = c->regs[map[i].ours];
	if (regs.fs_base >= KS_USER_TOP)	/* ptrace refuses those */
		c->regs[KS_FS_BASE] = regs.fs_base = 0;
	if (regs.gs_base >= KS_USER_TOP)
		c->regs[KS_GS_BASE] = regs.gs_base = 0;
	if (!t || t->dead) {
		pt_fail(m, c, ESRCH);
		return;
	}
	if (c->xwant) {
		rc = load_xsave(m, c);
		if (rc < 0 && rc != -ESRCH) {
			pt_fail(m, c, -rc);
			return;
		}
		c->xwant = 0;
	}
	if (ptrace(PTRACE_SETREGS, t->tid, 0, &regs) < 0 && errno != ESRCH) {
		pt_fail(m, c, errno);
		return;
	}
	t->lost = 0;
	pt_resume(m, c);
}

void pt_reply(struct pt_tracer *m, struct pt_ctx *c, int64_t result)
{
	c->regs[KS_RAX] = result;
	/* -512 .. -516 with orig_rax there would make the host restart a call (arch/x86/kernel/signal.c). */
	if (c->event != KS_EV_SYSCALL || c->xwant || !c->thread || c->thread->lost || c->thread->dead ||
	    (result <= -512 && result >= -516)) {
		pt_reload(m, c);
		return;
	}
	ptrace(PTRACE_POKEUSER, c->thread->tid, offsetof(struct user_regs_struct, rax), result);
	pt_resume(m, c);
}

void pt_kick(struct pt_tracer *m, struct pt_ctx *c)
{
	if (c->state != PT_RUNNING || !c->thread)
		return;
	c->kicked = 1;
	ptrace(PTRACE_INTERRUPT, c->thread->tid, 0, 0);
}

/* Processor state. */

void pt_xinit(struct pt_tracer *m, struct pt_ctx *c)
{
	/* XSTATE_BV 0 is the initial state; MXCSR comes from the image all the same (SDM vol. 1, 13.8.1). */
	memset(c->xsave, 0, PT_XSAVE_ROOM);
	c->xsave[0] = 0x7f;
	c->xsave[1] = 0x03;
	c->xsave[24] = 0x80;
	c->xsave[25] = 0x1f;
	c->xwant = 1;
}

void pt_set_xsave(struct pt_tracer *m, struct pt_ctx *c, const void *data, uint32_t length)
{
	u64 *header = (u64 *)(c->xsave + 512);
	u32 mxcsr;

	if (length > m->xsave_size)
		length = m->xsave_size;
	pt_xinit(m, c);
	memcpy(c->xsave, data, length);
	memcpy(&mxcsr, c->xsave + 24, 4);
	mxcsr &= m->mxcsr_mask;
	memcpy(c->xsave + 24, &mxcsr, 4);
	if (length < 576)
		header[0] = 3;
	header[0] &= m->xcr0;
	memset(header + 1, 0, 56);
}

int pt_xsave(struct pt_tracer *m, struct pt_ctx *c, void *to, uint32_t length)
{
	uint8_t area[PT_XSAVE_ROOM] __attribute__((aligned(64)));
	struct iovec iov = { area, sizeof(area) };
	u64 *header = (u64 *)(area + 512);

	if (length > m->xsave_size)
		length = m->xsave_size;
	if (c->xwant) {
		memcpy(to, c->xsave, length);
	} else {
		if (!c->thread || c->thread->dead)
			return -ESRCH;
		if (ptrace(PTRACE_GETREGSET, c->thread->tid, NT_X86_XSTATE, &iov) < 0)
			return -errno;
		header[0] &= m->xcr0;
		memcpy(to, area, length);
	}
	memset((uint8_t *)to + 464, 0, 48);	/* software's part of the legacy area */
	return 0;
}

/* Debug registers. */

static int set_debug(struct pt_ctx *c, int number, u64 value)
{
	return ptrace(PTRACE_POKEUSER, c->thread->tid, offsetof(struct user, u_debugreg) + 8 * number, value) < 0 ? -errno : 0;
}

int pt_set_debug(struct pt_ctx *c, const uint64_t *dr)
{
	int rc;

	if (!c->thread || c->thread->dead)
		return -ESRCH;
	rc = set_debug(c, 7, 0);	/* off, so that no address is refused for the kind that another had */
	for (int i = 0; i < 4 && !rc && dr[7] & 0xff; i++)
		rc = set_debug(c, i, dr[i]);
	return rc ? rc : set_debug(c, 7, dr[7]);
}

int64_t pt_debug_status(struct pt_ctx *c)
{
	long status;

	if (!c->thread || c->thread->dead)
		return -ESRCH;
	errno = 0;
	status = ptrace(PTRACE_PEEKUSER, c->thread->tid, offsetof(struct user, u_debugreg) + 8 * 6, 0);
	if (errno)
		return -errno;
	return set_debug(c, 6, 0xffff0ff0) ? -errno : status & 0xffffffff;
}
