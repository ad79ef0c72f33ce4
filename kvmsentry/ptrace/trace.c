/* SPDX-License-Identifier: Apache-2.0 */
/* Threads of stub processes: known by tid, made, run through lists of system calls, stopped and killed. */
#include "pt.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "api.h"

u64 pt_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (u64)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

struct pt_thread *pt_find(struct pt_tracer *m, int tid)
{
	struct pt_thread *t = m->hash[tid % PT_HASH];

	while (t && t->tid != tid)
		t = t->next;
	return t;
}

struct pt_thread *pt_thread_new(struct pt_tracer *m, int tid)
{
	struct pt_thread *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	t->tid = tid;
	t->lost = 1;
	t->next = m->hash[tid % PT_HASH];
	m->hash[tid % PT_HASH] = t;
	m->count_threads++;
	return t;
}

/* Its exit was seen: the tid may be anybody's from now on. The structure lives on while a context or Python points to it. */
void pt_buried(struct pt_tracer *m, struct pt_thread *t)
{
	struct pt_thread **at = &m->hash[t->tid % PT_HASH];

	while (*at && *at != t)
		at = &(*at)->next;
	if (*at)
		*at = t->next;
	t->dead = 1;
}

static int wait_for(int tid, int *status)
{
	int got;

	do
		got = waitpid(tid, status, __WALL);
	while (got < 0 && errno == EINTR);
	return got;
}

static int new_thread(struct pt_tracer *m, int parent, struct pt_thread **born)
{
	unsigned long tid = 0;
	int status;

	if (ptrace(PTRACE_GETEVENTMSG, parent, 0, &tid) < 0)
		return -errno;
	/* Traced from birth; it stops before it executes anything. */
	if (wait_for(tid, &status) < 0)
		return -errno;
	if (!WIFSTOPPED(status))
		return -ESRCH;
	*born = pt_thread_new(m, tid);
	return *born ? 0 : -ENOMEM;
}

/* Runs n calls of the list; at most one of them is a clone, whose thread goes to *born. */
static int run(struct pt_tracer *m, struct pt_thread *t, u32 n, u32 *at, struct pt_thread **born)
{
	struct user_regs_struct regs = {
		.rip = PT_STUB + (pt_code_run - pt_code_start), .r15 = PT_LIST, .r14 = n,
		.rsp = PT_SCRATCH + 0x1000, .eflags = KS_RFLAGS_FIXED, .cs = KS_USER_CS, .ss = KS_USER_DS, .orig_rax = -1,
	};
	int status, rc;

	*at = 0;
	if (t->dead)
		return -ESRCH;
	t->lost = 1;
	m->count_runs++;
	m->count_ops += n;
	if (ptrace(PTRACE_SETREGS, t->tid, 0, &regs) < 0 || ptrace(PTRACE_CONT, t->tid, 0, 0) < 0)
		return -errno;
	for (;;) {
		if (wait_for(t->tid, &status) < 0)
			return -errno;
		if (!WIFSTOPPED(status)) {
			pt_buried(m, t);
			return -ESRCH;
		}
		if (status >> 16 == PTRACE_EVENT_CLONE || status >> 16 == PTRACE_EVENT_FORK) {
			rc = born ? new_thread(m, t->tid, born) : -EPERM;
			if (rc < 0)
				return rc;
		} else if (status >> 16 == 0) {
			switch (WSTOPSIG(status)) {
			case SIGTRAP:
				goto trapped;
			case SIGSEGV:
			case SIGBUS:
			case SIGSYS:
			case SIGILL:
				return -EFAULT;
			}
		}
		/* An interrupt that was on its way (a kick), or a signal from outside: neither is the executor's. */
		if (ptrace(PTRACE_CONT, t->tid, 0, 0) < 0)
			return -errno;
	}
trapped:
	if (ptrace(PTRACE_GETREGS, t->tid, 0, &regs) < 0)
		return -errno;
	if (regs.rip == PT_STUB + (u64)(pt_code_done - pt_code_start))
		return 0;
	*at = (regs.r15 - PT_LIST) / (PT_OP_WORDS * 8);
	return (int64_t)regs.rax < 0 ? (int)(int64_t)regs.rax : -EFAULT;
}

int pt_run(struct pt_tracer *m, struct pt_thread *t, uint32_t n, uint32_t *at)
{
	return run(m, t, n, at, NULL);
}

int pt_clone(struct pt_tracer *m, struct pt_thread *t, int same, struct pt_thread **out)
{
	const u64 thread = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
	u32 at;
	int rc;

	/* CLONE_PARENT: the Sentry buries it. CLONE_FILES: the memfd and the socket, one table for all stubs. */
	memset(m->ops, 0, PT_OP_WORDS * 8);
	m->ops[0] = SYS_clone;
	m->ops[1] = same ? thread : CLONE_PARENT | CLONE_FS | CLONE_FILES;
	*out = NULL;
	rc = run(m, t, 1, &at, out);
	if (rc == 0 && !*out)
		return -ECHILD;
	return rc;
}

int pt_send_fds(int sock, int *fds, int n)
{
	char control[CMSG_SPACE(253 * sizeof(int))] __attribute__((aligned(16))) = { 0 };
	struct iovec iov = { .iov_base = "", .iov_len = 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control };
	struct cmsghdr *c;

	if (n > 253)
		return -EINVAL;
	msg.msg_controllen = CMSG_SPACE(n * sizeof(int));
	c = CMSG_FIRSTHDR(&msg);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(n * sizeof(int));
	memcpy(CMSG_DATA(c), fds, n * sizeof(int));
	return sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

int pt_tid(struct pt_thread *t)
{
	return t->tid;
}

int pt_dead(struct pt_thread *t)
{
	return t->dead;
}

/* Nobody but the hash needs it any more: its process was killed. */
void pt_forsake(struct pt_thread *t)
{
	if (t->dead)
		free(t);
	else
		t->forsaken = 1;
}

int pt_kill(struct pt_tracer *m, int pid)
{
	return kill(pid, SIGKILL) < 0 ? -errno : 0;
}

int pt_stop(struct pt_tracer *m, struct pt_ctx *c)
{
	struct pt_thread *t = c->thread;
	int status, kicked = c->kicked;

	if (c->state != PT_RUNNING || !t)
		return 1;
	ptrace(PTRACE_INTERRUPT, t->tid, 0, 0);
	c->kicked = 1;	/* so that the stop counts as one */
	do {
		if (wait_for(t->tid, &status) < 0) {
			c->kicked = kicked;
			return 1;
		}
	} while (!pt_take(m, t, status));
	if (c->event == KS_EV_KICKED && !kicked) {
		c->halted = 1;
		return 0;
	}
	pt_put_pending(m, c);
	return 1;
}

void pt_go(struct pt_tracer *m, struct pt_ctx *c)
{
	if (c->halted) {
		c->halted = 0;
		pt_reload(m, c);
	}
}
