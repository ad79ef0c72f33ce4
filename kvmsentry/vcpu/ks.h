/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvmsentry's KVM floor in C: the machine, one runner thread a vCPU, and the Sentry's side of the channel.
 *
 * Who owns a context's registers is one word, `owner`:
 *
 *   KS_GUEST  the application runs (or its request lies in the channel, not yet seen)
 *   KS_TAKEN  an event was taken into private memory: by the Sentry from the channel, or by the runner.
 *             Only the Sentry leaves this state, by answering
 *   KS_IDLE   in the pool, no application
 *   KS_EXIT   the runner thread ends
 *
 * GUEST -> TAKEN is a compare-and-swap, so an event is taken once, whatever the application does to its channel.
 * `where` says whether the runner is out of KVM_RUN, and stays out until `owner` changes. `asleep` says whether it wants to
 * be woken then. Runner: asleep = 1, fence, read owner; Sentry: owner = GUEST, fence, read asleep: one of them sees the other.
 *
 * Contexts and runners are pairs. Two contexts of one address space may trade places (trade_seats in sentry.c).
 */
#ifndef KVMSENTRY_KS_H
#define KVMSENTRY_KS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sched.h>
#include <stdint.h>
#include <sys/epoll.h>

#include "layout.h"
#include "spin.h"

typedef uint64_t u64;
typedef uint32_t u32;

enum { KS_GUEST, KS_TAKEN, KS_IDLE, KS_EXIT };
enum { KS_RUNNING, KS_STOPPED };
enum { KS_FROM_CHANNEL, KS_FROM_RUNNER };
enum { KS_MAX_HOST_EVENTS = 32 };

struct ks_machine;

struct ks_vcpu;

/* A vCPU of KVM's and the thread that runs it. */
struct ks_runner {
	struct ks_machine *m;
	int fd;
	struct kvm_run *run;
	pthread_t thread;
	int tid;

	/* Shared between the Sentry thread and the runner. */
	struct ks_vcpu *_Atomic seat;	/* the context that it serves; changed by the Sentry only (trade_seats) */
	_Atomic u32 where;
	_Atomic u32 halt;	/* come out of KVM_RUN although the context is TAKEN, and stay */
	_Atomic u32 asleep;	/* it sleeps on `bell`, or is about to: it wants a wake-up */
	_Atomic u32 bell;	/* futex word */
	_Atomic u64 answered;	/* when the Sentry last answered it while it was stopped, in ticks */
	_Atomic u64 entered;	/* KVM_RUN, in ticks; 0 when it is not there */
	_Atomic u64 ran;	/* ticks that it spent there before */

	/* The runner's. */
	u64 usual_rest;		/* smoothed ticks that it waits for answers, outside the guest */
	u32 placed;		/* m->place.number that its thread follows */
	u64 exits[KS_NEXITS];	/* the Sentry only reads them */
	uint8_t *sup;		/* supervisor page */
	u64 sup_va;
};

/* A context: one guest thread's processor, on a runner of its own. */
struct ks_vcpu {
	struct ks_machine *m;
	u32 id;
	struct ks_runner *on;	/* the Sentry's: on->seat is this context */

	/* Shared between the Sentry thread and the runner. */
	_Atomic u32 owner;
	_Atomic u32 pending;	/* the runner took an event that the Sentry has not seen */
	_Atomic u32 kick;

	/* Belongs to whoever holds TAKEN. */
	u64 call[7];		/* EV_SYSCALL: number and arguments, in order */
	u64 regs[KS_NREGS];
	u64 fault_address;
	u64 error_code;
	u32 event;
	u32 vector;
	u32 source;
	u32 relocate;		/* resume at `answered` instead of where the vCPU stands */
	u32 fresh;		/* resume with new segments and CR3: a start or an exec */
	u32 xwant;		/* the next RELOAD shall load xsave[] */
	u32 xset;		/* the last answer was a RELOAD that loads xsave[] */
	u32 xlost;		/* ... and it was cut short before that */
	u64 cr3;

	/* The Sentry's. */
	struct ks_channel *ch;
	u64 ch_gpa;
	u64 ch_va;		/* what GS base is */
	int running;		/* index in the list of contexts that can produce events, or -1 */
	u32 held;		/* stopped in an event that wait returned, or not started */
	u64 kicked_at;
	u32 portable;		/* parked, and regs[] and xsave[] are all of it: it can go on on another runner */
	u32 hot;		/* how many parks yet are made portable, for it lately could have gone on in another's place */
	struct ks_vcpu *successor;	/* who was given its runner; NULL again once an event of that one came */
	struct ks_vcpu *predecessor;	/* the same, the other way round */
	u64 cpu_offset;		/* ns: processor time on other runners than this one, less what others had on this one */

	uint8_t xsave[4096] __attribute__((aligned(64)));
};

/* place.c: where the vCPUs' threads may run. The Sentry's, but for `number` and `guests`. */
struct ks_place {
	cpu_set_t allowed;	/* the Sentry thread's processors */
	int kept_off;		/* the processor that guests are kept off, or -1 */
	u64 moved_at;
	u64 sample_us;		/* how often is looked whether they starve */
	u64 sampled_at, sampled_wanted, sampled_got;
	cpu_set_t guests;	/* written before `number` is raised */
	_Atomic u32 number;
};

struct ks_machine {
	int kvm, vm, bell, epoll, timer;
	int ring0;		/* the host's SYSCALL enters ring 0 and ring 0 is native */
	int ncpus;
	int have_pwait2;
	uint8_t *mem;		/* host address of GPA 0 */
	struct ks_shared *shared;
	struct kvm_sregs sregs;	/* as every context starts, but for CR3, GS and TR */
	struct kvm_cpuid2 *cpuid;
	u64 xcr0;
	u32 mxcsr_mask;
	int run_size;
	u32 nvcpus;
	struct ks_vcpu *vcpus[KS_MAX_VCPUS + 1];
	u32 nrunning, next;
	struct ks_vcpu *waiting;	/* answered last while its runner was out of the guest */
	struct ks_vcpu *due;	/* answered, and its runner sleeps: to be woken soon, if nobody makes room for it */
	u64 due_at;
	struct ks_vcpu *running[KS_MAX_VCPUS];
	u32 nkicked;
	_Atomic u32 asleep;	/* same as shared->asleep, for the runners */
	_Atomic u32 woken;

	_Atomic u32 resting;	/* runners that look for an answer instead of sleeping */
	u64 tick_us;		/* ticks in a microsecond */

	/* The wait's own. */
	u64 tsc_khz;
	struct ks_spin spin;
	struct ks_place place;
	u64 polled;		/* when the host's descriptors were last looked at */
	int nhost, host_due, host_held;
	struct epoll_event host[KS_MAX_HOST_EVENTS];
	u64 count_sleeps, count_spins, count_events, count_doorbells, count_services, count_trades;

	struct ks_vcpu *service;
};

/* What dispatch.c calls. */
struct ks_doors {
	int (*look)(struct ks_machine *m);
	int (*wait)(struct ks_machine *m, int64_t timeout);
	void (*reply)(struct ks_vcpu *v, int64_t result);
};

static inline u64 ks_ticks(void)
{
	u32 lo, hi;

	__asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
	return (u64)hi << 32 | lo;
}

/* Microseconds in ticks. */
static inline u64 ks_us(const struct ks_machine *m, u64 us) { return us * m->tick_us; }

static inline void ks_pause(void) { __builtin_ia32_pause(); }

/* One read of a word that the application may be writing. */
#define KS_READ(x) (*(volatile __typeof__(x) *)&(x))

void ks_tsc_as_host(int vcpu);
long ks_futex_wait(_Atomic u32 *word, u32 value);
void ks_futex_wake(_Atomic u32 *word);
void ks_ring(struct ks_machine *m);
void ks_take_channel(struct ks_vcpu *v);
void *ks_runner(void *arg);
int ks_kick_signal(void);
u64 ks_runner_ns(const struct ks_runner *r);	/* processor time of its thread; 0 when the host does not tell */
void ks_place_init(struct ks_machine *m);	/* `allowed` is set */
void ks_place(struct ks_machine *m, u64 now);	/* when the Sentry waits and nothing has come for some us */
int64_t ks_place_patience(struct ks_machine *m);	/* ns after which guests that ask for nothing may run anywhere; -1: for ever */
void ks_place_anywhere(struct ks_machine *m);
void ks_place_follow(struct ks_runner *r);	/* by the runner */
struct kvm_segment ks_segment(int selector, int type, int dpl, int code);

#endif
