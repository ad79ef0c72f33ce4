/* SPDX-License-Identifier: Apache-2.0 */
/* Contexts and the tracer itself: made, joined to threads, asked, ended. */
#include "pt.h"

#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "api.h"

/* Contexts. */

int pt_ctx_new(struct pt_tracer *m, struct pt_ctx **out)
{
	struct pt_ctx *c;
	u32 id = m->free_from;

	while (id < PT_MAX_CONTEXTS && m->contexts[id])
		id++;
	if (id == PT_MAX_CONTEXTS)
		return -EAGAIN;
	c = calloc(1, sizeof(*c));
	if (!c || posix_memalign((void **)&c->xsave, 64, PT_XSAVE_ROOM)) {
		free(c);
		return -ENOMEM;
	}
	c->id = id;
	c->event = KS_EV_KICKED;
	m->free_from = id + 1;
	if (id >= m->ncontexts)
		m->ncontexts = id + 1;
	m->contexts[id] = c;
	pt_xinit(m, c);
	*out = c;
	return 0;
}

void pt_ctx_free(struct pt_tracer *m, struct pt_ctx *c)
{
	pt_detach(m, c);
	m->contexts[c->id] = NULL;
	if (c->id < m->free_from)
		m->free_from = c->id;
	free(c->xsave);
	free(c);
}

void pt_attach(struct pt_tracer *m, struct pt_ctx *c, struct pt_thread *t)
{
	c->thread = t;
	t->ctx = c;
	t->lost = 1;
	t->chatty = 0;
}

void pt_detach(struct pt_tracer *m, struct pt_ctx *c)
{
	if (c->pending)
		pt_drop_pending(m, c);
	if (c->thread)
		c->thread->ctx = NULL;
	c->thread = NULL;
	c->kicked = 0;
}

uint32_t pt_id(struct pt_ctx *c)
{
	return c->id;
}

struct pt_thread *pt_thread_of(struct pt_ctx *c)
{
	return c->thread;
}

uint64_t pt_ticks(void)
{
	return __builtin_ia32_rdtsc();
}

int pt_running(struct pt_ctx *c)
{
	return c->state == PT_RUNNING;
}

void *pt_regs(struct pt_ctx *c)
{
	return c->regs;
}

void *pt_call(struct pt_ctx *c)
{
	return c->call;
}

uint64_t pt_fault_address(struct pt_ctx *c)
{
	return c->fault_address;
}

uint64_t pt_error_code(struct pt_ctx *c)
{
	return c->error_code;
}

uint32_t pt_vector(struct pt_ctx *c)
{
	return c->vector;
}

/* Wall time with the application: the host tells a thread's processor time to nobody outside its process. */
uint64_t pt_cpu_ns(struct pt_ctx *c)
{
	return c->used + (c->state == PT_RUNNING ? pt_now() - c->resumed : 0);
}

/* The tracer. */

static int traits(struct pt_tracer *m, u64 mask)
{
	u32 eax, ebx, ecx, edx, lo, hi;

	if (!__get_cpuid_count(1, 0, &eax, &ebx, &ecx, &edx) || !(ecx & 1 << 27))
		return -ENODEV;
	__asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
	m->xcr0 = ((u64)hi << 32 | lo) & mask;
	m->xsave_size = 576;
	for (u32 i = 2; i < 32; i++) {
		if (!(m->xcr0 >> i & 1))
			continue;
		__cpuid_count(0xd, i, eax, ebx, ecx, edx);	/* SDM vol. 1, 13.2: size, offset in the standard format */
		if (ebx + eax > m->xsave_size)
			m->xsave_size = ebx + eax;
	}
	__cpuid_count(0xd, 0, eax, ebx, ecx, edx);
	m->xsave_host = ebx;
	m->mxcsr_mask = 0xffff;
	return 0;
}

static int watch(struct pt_tracer *m, int fd)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

	return epoll_ctl(m->epoll, EPOLL_CTL_ADD, fd, &event);
}

int pt_tracer_new(uint64_t xcr0_mask, struct pt_tracer **out, const char **failed)
{
	struct pt_tracer *m = calloc(1, sizeof(*m));
	sigset_t set, old;
	int rc;

	*out = m;
	*failed = "memory for the tracer";
	if (!m)
		return -ENOMEM;
	m->bell = m->signals = m->epoll = m->timer = -1;
	m->have_pwait2 = 1;
	m->ncpus = sysconf(_SC_NPROCESSORS_ONLN);
	*failed = "XSAVE of the processor";
	rc = traits(m, xcr0_mask);
	if (rc < 0)
		return rc;
	/* Blocked in all threads that come after: a signal that another thread discards would leave us asleep. */
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	m->unblock = !sigismember(&old, SIGCHLD);
	*failed = "descriptors of the tracer";
	m->epoll = epoll_create1(EPOLL_CLOEXEC);
	m->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	m->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	m->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (m->epoll < 0 || m->bell < 0 || m->timer < 0 || m->signals < 0 || watch(m, m->bell) < 0 || watch(m, m->timer) < 0 ||
	    watch(m, m->signals) < 0)
		return -errno;
	return 0;
}

void pt_tracer_free(struct pt_tracer *m)
{
	int fds[] = { m->bell, m->signals, m->epoll, m->timer };

	/* A leader is reported after its threads only: all are killed first, then buried as they come. */
	for (u32 i = 0; i < PT_HASH; i++)
		for (struct pt_thread *t = m->hash[i]; t; t = t->next)
			kill(t->tid, SIGKILL);
	for (int left = 1, rounds = 0; left && rounds < 20000; rounds++) {
		struct timespec nap = { 0, 50000 };

		left = 0;
		for (u32 i = 0; i < PT_HASH; i++) {
			for (struct pt_thread **at = &m->hash[i]; *at;) {
				struct pt_thread *t = *at;
				int status, got = waitpid(t->tid, &status, __WALL | WNOHANG);

				if (got == t->tid ? !WIFSTOPPED(status) : got < 0 && errno == ECHILD) {
					*at = t->next;
					free(t);
				} else {
					left = 1;
					at = &t->next;
				}
			}
		}
		if (left)
			nanosleep(&nap, NULL);
	}
	for (u32 i = 0; i < m->ncontexts; i++) {
		if (m->contexts[i]) {
			free(m->contexts[i]->xsave);
			free(m->contexts[i]);
		}
	}
	for (u32 i = 0; i < 4; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	if (m->unblock) {
		sigset_t set;

		sigemptyset(&set);
		sigaddset(&set, SIGCHLD);
		pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	}
	free(m);
}

uint64_t pt_xcr0(struct pt_tracer *m)
{
	return m->xcr0;
}

uint32_t pt_xsave_size(struct pt_tracer *m)
{
	return m->xsave_size;
}

int pt_epoll_fd(struct pt_tracer *m)
{
	return m->epoll;
}

uint64_t pt_counter(struct pt_tracer *m, int which)
{
	u64 c[] = { m->count_events, m->count_sleeps, m->count_threads, m->count_runs, m->count_ops, m->count_spurious };

	return c[which];
}

uint64_t pt_kind_counter(struct pt_tracer *m, int kind)
{
	return m->count_kinds[kind];
}
