/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvmsentry's ptrace floor in C. A stub process is an address space of the application's: nothing in it but three pages of
 * ours (below) and what the Sentry maps there. Its threads are traced by the Sentry's one thread, which makes all calls here.
 *
 * A thread is in one of two hands. RUNNING: it executes the application under PTRACE_SYSEMU, and the next thing it does that
 * is not computing stops it. STOPPED: in a ptrace stop, ours; in its pool, or with a context whose event is being answered.
 *
 * The stub's pages, above all that the application can map:
 *
 *	PT_STUB			code: the executor, which runs a list of system calls and then traps; read and execute
 *	PT_STUB + 0x1000	scratch, the process's own: where recvmsg(2) may write
 *	PT_STUB + 0x2000	13 pages, the list: one for all stubs, written by the Sentry only; read only here
 */
#ifndef KVMSENTRY_PT_H
#define KVMSENTRY_PT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/types.h>
#include <sys/user.h>

#include "constants.h"

typedef uint64_t u64;
typedef uint32_t u32;

#define PT_STUB 0x7fffffff0000ULL
#define PT_SCRATCH (PT_STUB + 0x1000)
#define PT_LIST (PT_STUB + 0x2000)
#define PT_LIST_LENGTH 0xd000	/* to the end of user space, TASK_SIZE_MAX */

enum { PT_MAX_HOST_EVENTS = 32, PT_MAX_CONTEXTS = 32768, PT_HASH = 4096, PT_XSAVE_ROOM = 16384 };
enum { PT_STOPPED, PT_RUNNING };

struct pt_ctx;

struct pt_thread {
	int tid;
	int dead;		/* its exit was seen */
	int forsaken;		/* nobody else points to it: free it then */
	int lost;		/* its registers are the executor's */
	int pinned;		/* to this processor + 1; 0: to none */
	u32 chatty;		/* events in a row that came soon */
	struct pt_ctx *ctx;
	struct pt_thread *next;	/* of the same hash */
};

struct pt_ctx {
	u32 id;
	int state;
	int kicked;
	int pending;		/* stopped with an event that wait has not returned */
	int halted;		/* stopped by pt_stop, with no event */
	u32 event, vector;
	u64 call[7];		/* EV_SYSCALL: number and arguments, in order */
	u64 regs[KS_NREGS];
	u64 fault_address, error_code;
	int xwant;		/* the next reload loads xsave[] */
	u64 resumed, used;	/* ns */
	struct pt_thread *thread;
	struct pt_ctx *pending_next;
	uint8_t *xsave;
};

struct pt_tracer {
	int bell, signals, epoll, timer;
	int have_pwait2;
	int unblock;		/* SIGCHLD was not blocked before */
	int ncpus;
	u64 xcr0;
	u32 xsave_size;		/* of the features in xcr0 */
	u32 xsave_host;		/* what PTRACE_SETREGSET wants */
	u32 mxcsr_mask;
	int started;
	struct pt_thread *hash[PT_HASH];
	struct pt_ctx *contexts[PT_MAX_CONTEXTS];
	u32 ncontexts, free_from;
	u32 nrunning, npinned;
	struct pt_ctx *pending;
	u64 *ops;
	int drained;		/* waitpid had nothing since the signal descriptor was last read */
	volatile int woken;
	u64 polled, repinned;
	int nhost, host_due, host_held;
	struct epoll_event host[PT_MAX_HOST_EVENTS];
	u64 count_kinds[KS_NEVENTS];	/* events that wait returned, by EV_* */
	u64 count_events, count_sleeps, count_runs, count_ops, count_threads, count_spurious;
};

u64 pt_now(void);
struct pt_thread *pt_find(struct pt_tracer *m, int tid);
struct pt_thread *pt_thread_new(struct pt_tracer *m, int tid);
void pt_buried(struct pt_tracer *m, struct pt_thread *t);
int pt_take(struct pt_tracer *m, struct pt_thread *t, int status);
void pt_resume(struct pt_tracer *m, struct pt_ctx *c);
void pt_put_pending(struct pt_tracer *m, struct pt_ctx *c);
void pt_drop_pending(struct pt_tracer *m, struct pt_ctx *c);

extern const char pt_code_start[], pt_code_end[], pt_code_run[], pt_code_call[], pt_code_done[], pt_code_failed[];

#endif
