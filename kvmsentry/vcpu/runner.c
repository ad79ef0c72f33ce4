/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The runner: one thread a vCPU, which lives in KVM_RUN and comes out to sleep, to fault, or because it was told to.
 *
 * Races, numbered alike in kvmsentry/vcpu/README.md, tests/vcpu and tests/platforms:
 *   K1  a kick lands in the entry code before the request is out: run on, the system call's event will come
 *   K2  a kick lands while the guest waits for an answer that is not there yet: run on, the event has come or will
 *   K3  a kick lands after the answer, while the exit path restores registers: the registers are known (they are the
 *       private copy), so the exit path is cut short and EV_KICKED is posted with them
 *   K4  the answer is written while the runner goes to sleep: `asleep`, a fence, and `owner` looked at again
 *   K5  the application forges the state word of a channel: GUEST -> TAKEN happens once, and the runner waits for TAKEN
 *       to end before it posts an event of its own
 *   K6  such a forged request makes a context TAKEN while its runner is about to enter the guest: where = RUNNING, a
 *       fence, and `owner` looked at again, so that ks_halt never believes a vCPU stopped that runs
 *   K7  a request is taken and answered by the Sentry while the runner, going to sleep, is about to take it: `owner` is
 *       GUEST both times, so the state is looked at once more after GUEST -> TAKEN
 *   K8  two contexts trade runners while one of these, stopped, looks whether its context may go on: where = RUNNING, a
 *       fence, and `seat` looked at again after `owner`. A runner reads `seat` anew after every wait
 */
#include "ks.h"

#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "stub_blob.h"

enum {
	NICE_BELOW_SENTRY = 10,
	REST_US = 400,		/* look for so long before sleeping, */
	REST_NEAR_US = 200,	/* if the usual rest is below this */
	REST_CLIP_US = 1000,	/* a rest counts for no more */
};

int ks_kick_signal(void)
{
	return SIGRTMIN + 7;
}

long ks_futex_wait(_Atomic u32 *word, u32 value)
{
	return syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

void ks_futex_wake(_Atomic u32 *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static int same(struct ks_runner *r, struct ks_vcpu *v, u32 owner)
{
	return atomic_load(&v->owner) == owner && atomic_load(&r->seat) == v;
}

/*
 * Out of the guest until `owner` is no longer as it was, or another context has the seat. First by looking at it again and
 * again, in between letting others have the processor: where a moment later this vCPU or another goes on here, the processor
 * that fell asleep and had to be woken would be most of the time. How long waits took lately decides.
 */
static void rest(struct ks_runner *r, struct ks_vcpu *v, u32 owner)
{
	struct ks_machine *m = r->m;
	u64 start = ks_ticks(), now = start, waited;
	u64 limit = owner == KS_TAKEN && r->usual_rest < ks_us(m, REST_NEAR_US) ? ks_us(m, REST_US) : 0;

	if (limit) {
		if (atomic_fetch_add(&m->resting, 1) >= (u32)m->ncpus)
			limit = 0;
		while (now - start < limit && same(r, v, owner)) {
			for (int i = 0; i < 8 && atomic_load_explicit(&v->owner, memory_order_relaxed) == owner; i++)
				ks_pause();
			sched_yield();
			now = ks_ticks();
		}
		atomic_fetch_sub(&m->resting, 1);
	}
	while (same(r, v, owner)) {
		u32 rings = atomic_load(&r->bell);

		atomic_store(&r->asleep, 1);
		if (same(r, v, owner))
			ks_futex_wait(&r->bell, rings);
		atomic_store(&r->asleep, 0);
	}
	if (owner != KS_TAKEN)
		return;
	now = atomic_load(&r->answered);
	waited = (int64_t)(now - start) > 0 ? now - start : 0;
	/* In another's seat: this runner is the spare one of two, and had better sleep. */
	if (waited > ks_us(m, REST_CLIP_US) || atomic_load(&r->seat) != v)
		waited = ks_us(m, REST_CLIP_US);
	r->usual_rest += (int64_t)(waited - r->usual_rest) / 8;
}

/* Wakes a Sentry that sleeps; costs a load when it doesn't. Callers have published what it shall find. */
void ks_ring(struct ks_machine *m)
{
	u64 one = 1;

	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load_explicit(&m->asleep, memory_order_relaxed))
		while (write(m->bell, &one, sizeof(one)) < 0 && errno == EINTR)
			;
}

/* Copies a request out of the channel. The caller has moved owner to TAKEN. Nothing of the copy is trusted. */
void ks_take_channel(struct ks_vcpu *v)
{
	struct ks_channel *ch = v->ch;
	u64 *r = v->regs;

	for (int i = 0; i < KS_NREGS; i++)
		r[i] = KS_READ(ch->regs[i]);
	v->source = KS_FROM_CHANNEL;
	v->event = KS_EV_SYSCALL;
	if (v->m->ring0) {
		v->event = ch->kind;
		if (v->event != KS_EV_SYSCALL) {
			v->vector = ch->vector;
			v->error_code = ch->error;
			v->fault_address = v->event == KS_EV_FAULT ? ch->cr2 : 0;
			return;
		}
	} else {
		r[KS_GS_BASE] = 0;	/* it is the channel: the application has none of its own */
	}
	r[KS_RCX] = r[KS_RIP];		/* as SYSCALL leaves them */
	r[KS_R11] = r[KS_RFLAGS];
	v->call[0] = r[KS_RAX];
	v->call[1] = r[KS_RDI];
	v->call[2] = r[KS_RSI];
	v->call[3] = r[KS_RDX];
	v->call[4] = r[KS_R10];
	v->call[5] = r[KS_R8];
	v->call[6] = r[KS_R9];
}

static int user_mode(const struct ks_runner *r)
{
	return r->run->s.regs.sregs.cs.selector & 3;
}

static void copy_gprs(u64 *to, const struct kvm_regs *from)
{
	memcpy(to, from, 16 * sizeof(u64));	/* struct kvm_regs starts with ours, in order */
	to[KS_RIP] = from->rip;
	to[KS_RFLAGS] = from->rflags;
}
_Static_assert(offsetof(struct kvm_regs, rsp) == KS_RSP * 8 && offsetof(struct kvm_regs, r15) == KS_R15 * 8 &&
	       offsetof(struct kvm_regs, rcx) == KS_RCX * 8, "register order");

/* The application's registers while the vCPU stands in ring 3, outside the entry code. */
static void registers_in_ring3(struct ks_runner *runner, u64 *r)
{
	const struct kvm_sregs *s = &runner->run->s.regs.sregs;

	copy_gprs(r, &runner->run->s.regs.regs);
	r[KS_FS_BASE] = s->fs.base;
	r[KS_GS_BASE] = s->gs.base == atomic_load(&runner->seat)->ch_va && !runner->m->ring0 ? 0 : s->gs.base;
}

/*
 * Posts an event of the runner's own. `r` are the registers, NULL: the private copy holds them already (the exit path
 * was cut short, so the private copy is what the application was about to have). Returns 0 if the context was taken
 * away meanwhile (released), else 1.
 */
static int post(struct ks_runner *runner, u32 event, u32 vector, u64 error, u64 address, const u64 *r)
{
	struct ks_vcpu *v;
	u32 owner;

	atomic_store(&runner->where, KS_STOPPED);
	for (;;) {	/* K5 */
		v = atomic_load(&runner->seat);
		owner = KS_GUEST;
		if (atomic_compare_exchange_strong(&v->owner, &owner, KS_TAKEN))
			break;
		if (owner != KS_TAKEN)
			return 0;
		rest(runner, v, KS_TAKEN);
	}
	if (r)
		memcpy(v->regs, r, sizeof(v->regs));
	v->event = event;
	v->vector = vector;
	v->error_code = error;
	v->fault_address = address;
	v->source = KS_FROM_RUNNER;
	v->relocate = 1;
	if (event == KS_EV_SYSCALL) {
		v->call[0] = v->regs[KS_RAX];
		v->call[1] = v->regs[KS_RDI];
		v->call[2] = v->regs[KS_RSI];
		v->call[3] = v->regs[KS_RDX];
		v->call[4] = v->regs[KS_R10];
		v->call[5] = v->regs[KS_R8];
		v->call[6] = v->regs[KS_R9];
	}
	atomic_store_explicit(&v->pending, 1, memory_order_release);
	ks_ring(v->m);
	return 1;
}

/* Where in the entry code an address of the guest's lies, whichever entry it uses. */
enum place { OUTSIDE, BEFORE_REQUEST, WAITING, SAVING, BEFORE_XRSTOR, LEAVING };

static enum place place_of(const struct ks_runner *runner, u64 rip)
{
	if (runner->m->ring0) {
		if (rip < STUB_n_start || rip >= STUB_n_end)
			return OUTSIDE;
		if (rip < STUB_n_published || rip >= STUB_n_common)
			return BEFORE_REQUEST;
		if (rip >= STUB_n_save)
			return SAVING;
		if (rip < STUB_n_answered)
			return WAITING;
		return rip < STUB_n_xrstored ? BEFORE_XRSTOR : LEAVING;
	}
	if (rip < STUB_u_entry || rip >= STUB_u_entry + 4096)
		return OUTSIDE;
	if (rip < STUB_u_published)
		return BEFORE_REQUEST;
	if (rip >= STUB_u_save)
		return SAVING;
	if (rip < STUB_u_answered)
		return WAITING;
	return rip < STUB_u_xrstored ? BEFORE_XRSTOR : LEAVING;
}

/* The exit path did not finish: what it has not loaded must be loaded by the next one. */
static void cut_short(struct ks_vcpu *v, enum place at)
{
	v->xlost = at == BEFORE_XRSTOR && v->xset;
}

/* Returns 1 if the vCPU shall stay out. */
static int on_kick(struct ks_runner *runner)
{
	const struct kvm_regs *now = &runner->run->s.regs.regs;
	struct ks_vcpu *v = atomic_load(&runner->seat);
	u64 r[KS_NREGS];
	enum place at;

	if (!user_mode(runner) && !runner->m->ring0) {
		if (now->rip != STUB_e_iretq || atomic_load(&v->owner) != KS_GUEST)
			return 0;	/* on its way to an event */
		cut_short(v, BEFORE_XRSTOR);
		return post(runner, KS_EV_KICKED, 0, 0, 0, NULL);
	}
	at = place_of(runner, now->rip);
	switch (at) {
	case OUTSIDE:
		if (!user_mode(runner))
			return 0;
		registers_in_ring3(runner, r);
		return post(runner, KS_EV_KICKED, 0, 0, 0, r);
	case BEFORE_REQUEST:	/* K1 */
	case SAVING:
		return 0;
	case WAITING:
		if (KS_READ(v->ch->state) != KS_ST_ANSWERED)	/* K2 */
			return 0;
		at = BEFORE_XRSTOR;
		/* fall through */
	default:		/* K3 */
		if (atomic_load(&v->owner) != KS_GUEST)
			return 0;
		cut_short(v, at);
		return post(runner, KS_EV_KICKED, 0, 0, 0, NULL);
	}
}

static int has_error_code(int vector)
{
	return vector < 32 && (0x60227d00u >> vector & 1);	/* 8 10-14 17 21 29 30 */
}

/* An exception that left the guest at once (ring 3 entry hosts). */
static int on_vector(struct ks_runner *runner, int vector)
{
	const struct kvm_sregs *s = &runner->run->s.regs.sregs;
	const u64 *frame = (const u64 *)(runner->sup + KS_SUP_FRAME);
	u64 r[KS_NREGS], error = has_error_code(vector) ? frame[-1] : 0;
	u32 event = vector == 14 ? KS_EV_FAULT : KS_EV_EXCEPTION;
	u64 address = vector == 14 ? s->cr2 : 0;
	struct ks_vcpu *v = atomic_load(&runner->seat);
	enum place at;

	if (!(frame[1] & 3)) {
		runner->exits[KS_EXIT_HOST_ERROR]++;
		return post(runner, KS_EV_HOST_ERROR, vector, EFAULT, s->cr2, NULL);
	}
	runner->exits[event == KS_EV_FAULT ? KS_EXIT_FAULT : KS_EXIT_EXCEPTION]++;
	registers_in_ring3(runner, r);
	r[KS_RIP] = frame[0];
	r[KS_RFLAGS] = frame[2];
	r[KS_RSP] = frame[3];
	if (vector == 1 && !runner->m->ring0 && (r[KS_RIP] == STUB_u_entry || r[KS_RIP] == STUB_u_entry_patched)) {
		/*
		 * A program that steps through a system call: SFMASK is 0, so TF came along and the entry's first
		 * instruction was not reached. The registers are whole. As where the kernel's flag mask clears TF, the
		 * call is made, and the trap comes after the instruction that follows it.
		 */
		r[KS_RIP] = r[KS_RIP] == STUB_u_entry ? r[KS_RCX] : r[KS_R11];
		r[KS_RCX] = r[KS_RIP];
		r[KS_R11] = r[KS_RFLAGS];
		return post(runner, KS_EV_SYSCALL, 0, 0, 0, r);
	}
	at = place_of(runner, r[KS_RIP]);
	if ((at == BEFORE_XRSTOR || at == LEAVING) && atomic_load(&v->owner) == KS_GUEST) {
		/* Registers that cannot be loaded (a wild RIP, a broken XSAVE image): as if it happened after the return. */
		cut_short(v, at);
		return post(runner, event, vector, error, address, NULL);
	}
	return post(runner, event, vector, error, address, r);
}

/* The guest came out to sleep until its request is answered. Returns 1 if something else is asked of the vCPU. */
static int on_park(struct ks_runner *runner)
{
	runner->exits[KS_EXIT_PARK]++;
	atomic_store(&runner->where, KS_STOPPED);
	for (;;) {
		struct ks_vcpu *v = atomic_load(&runner->seat);
		u32 owner = atomic_load(&v->owner);

		if (owner != KS_GUEST && owner != KS_TAKEN)
			return 1;
		if (owner == KS_TAKEN) {
			rest(runner, v, KS_TAKEN);
			continue;
		}
		if (v->fresh || v->relocate)
			return 1;
		if (KS_READ(v->ch->state) == KS_ST_ANSWERED) {	/* K4 */
			atomic_store(&runner->where, KS_RUNNING);
			if (same(runner, v, KS_GUEST))	/* K6, K8 */
				return 0;
			atomic_store(&runner->where, KS_STOPPED);
			continue;
		}
		/* Not seen by the Sentry yet, or a forged state: from here it lies in private memory. */
		if (atomic_compare_exchange_strong(&v->owner, &owner, KS_TAKEN)) {
			if (KS_READ(v->ch->state) == KS_ST_ANSWERED) {
				/* K7: taken and answered between our two looks. */
				atomic_store(&v->owner, KS_GUEST);
				continue;
			}
			ks_take_channel(v);
			atomic_store_explicit(&v->pending, 1, memory_order_release);
			ks_ring(runner->m);
		}
	}
}

static int on_port(struct ks_runner *runner, int port)
{
	struct kvm_regs *now = &runner->run->s.regs.regs;
	u64 r[KS_NREGS];
	int ours = !user_mode(runner) || (now->rip - STUB_u_entry < 4096);

	if (runner->m->ring0 && user_mode(runner))
		ours = 0;
	if (port == KS_PORT_PARK && ours)
		return on_park(runner);
	if (port == KS_PORT_SLOW && ours && user_mode(runner)) {
		runner->exits[KS_EXIT_SLOW]++;
		registers_in_ring3(runner, r);
		r[KS_RIP] = r[KS_RCX];
		r[KS_R11] = r[KS_RFLAGS];
		return post(runner, KS_EV_SYSCALL, 0, 0, 0, r);
	}
	if (user_mode(runner)) {	/* an application that uses our ports: they are closed, as all are */
		runner->exits[KS_EXIT_PORT]++;
		registers_in_ring3(runner, r);
		return post(runner, KS_EV_EXCEPTION, 13, 0, 0, r);
	}
	if (port >= KS_PORT_VECTOR && port < KS_PORT_VECTOR + 32)
		return on_vector(runner, port - KS_PORT_VECTOR);
	runner->exits[KS_EXIT_HOST_ERROR]++;
	return post(runner, KS_EV_HOST_ERROR, KVM_EXIT_IO, EPROTO, port, NULL);
}

static int host_error(struct ks_runner *runner, int error)
{
	struct kvm_run *run = runner->run;
	u64 r[KS_NREGS], address = ~0ull;
	int entry = !user_mode(runner) || place_of(runner, run->s.regs.regs.rip) != OUTSIDE;

	runner->exits[KS_EXIT_HOST_ERROR]++;
#ifdef KVM_EXIT_MEMORY_FAULT
	if (error == EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT)
		address = run->memory_fault.gpa;
#endif
	if (!entry)
		registers_in_ring3(runner, r);
	return post(runner, KS_EV_HOST_ERROR, run->exit_reason, error, address, entry ? NULL : r);
}

/* Sets the vCPU to go on at `answered`, where the guest loads all registers from the channel by itself. */
static void relocate(struct ks_runner *runner, struct ks_vcpu *v)
{
	struct ks_machine *m = v->m;
	struct kvm_run *run = runner->run;
	struct kvm_regs *r = &run->s.regs.regs;
	struct kvm_sregs *s = &run->s.regs.sregs;
	u64 target = m->ring0 ? STUB_n_answered : STUB_u_answered;

	run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
	if (v->fresh || m->ring0) {
		*s = m->sregs;
		s->cr3 = v->cr3;
		s->gs.base = v->ch_va;
		s->tr.base = runner->sup_va + KS_SUP_TSS;
		memset(r, 0, sizeof(*r));
		r->rip = target;
		r->rflags = m->ring0 ? 2 : KS_RFLAGS_FIXED;
		r->rsp = m->ring0 ? runner->sup_va + KS_SUP_STACK : v->ch_va + KS_CH_FRAME;
		run->kvm_dirty_regs |= KVM_SYNC_X86_SREGS;
	} else if (user_mode(runner)) {
		r->rip = target;
		r->rflags = KS_RFLAGS_FIXED;
		r->rsp = v->ch_va + KS_CH_FRAME;
	} else {
		u64 *frame = (u64 *)(runner->sup + KS_SUP_FRAME);

		frame[0] = target;
		frame[1] = KS_USER_CS;
		frame[2] = KS_RFLAGS_FIXED;
		frame[3] = v->ch_va + KS_CH_FRAME;
		frame[4] = KS_USER_DS;
		r->rsp = runner->sup_va + KS_SUP_FRAME;
		r->rip = STUB_e_iretq;
		r->rflags = 2;
	}
	if (s->gs.base != v->ch_va) {
		s->gs.base = v->ch_va;
		run->kvm_dirty_regs |= KVM_SYNC_X86_SREGS;
	}
	v->fresh = v->relocate = 0;
}

/* Until the vCPU shall stay out. */
static void run_guest(struct ks_runner *runner)
{
	struct kvm_run *run = runner->run;
	int stop = 0, again = 0;

	while (!stop) {
		u64 entered, ran;
		int rc, error;

		if (runner->placed != atomic_load_explicit(&runner->m->place.number, memory_order_acquire))
			ks_place_follow(runner);
		entered = ks_ticks();
		atomic_store_explicit(&runner->entered, entered, memory_order_relaxed);
		rc = ioctl(runner->fd, KVM_RUN, 0);
		error = errno;
		atomic_store_explicit(&runner->entered, 0, memory_order_relaxed);
		ran = atomic_load_explicit(&runner->ran, memory_order_relaxed) + ks_ticks() - entered;
		atomic_store_explicit(&runner->ran, ran, memory_order_relaxed);
		run->kvm_dirty_regs = 0;
		if (rc < 0 && (error == EINTR || error == EAGAIN)) {
			run->immediate_exit = 0;
			if (error == EAGAIN && ++again > 1000) {
				stop = host_error(runner, error);
				continue;
			}
			runner->exits[KS_EXIT_INTERRUPTED]++;
			if (atomic_load(&runner->halt))
				break;
			if (atomic_exchange(&atomic_load(&runner->seat)->kick, 0))
				stop = on_kick(runner);
			continue;
		}
		again = 0;
		if (rc < 0)
			stop = host_error(runner, error);
		else if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT)
			stop = on_port(runner, run->io.port);
		else if (run->exit_reason == KVM_EXIT_INTR)
			runner->exits[KS_EXIT_INTERRUPTED]++;
		else
			stop = host_error(runner, EIO);
	}
}

static void ignore(int signal)
{
	(void)signal;
}

void *ks_runner(void *arg)
{
	struct ks_runner *runner = arg;
	struct sigaction action = { .sa_handler = ignore };
	sigset_t set;

	sigaction(ks_kick_signal(), &action, NULL);
	sigfillset(&set);
	sigdelset(&set, ks_kick_signal());
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	runner->tid = syscall(SYS_gettid);
	errno = 0;
	/* Below the Sentry, so that spinning guests never keep it off a processor. Needs no privilege. */
	setpriority(PRIO_PROCESS, runner->tid, getpriority(PRIO_PROCESS, runner->tid) + NICE_BELOW_SENTRY);
	for (;;) {
		struct ks_vcpu *v;
		u32 owner;

		atomic_store(&runner->where, KS_STOPPED);
		v = atomic_load(&runner->seat);
		owner = atomic_load(&v->owner);
		if (owner == KS_EXIT)
			return NULL;
		if (owner != KS_GUEST) {
			rest(runner, v, owner);
			continue;
		}
		atomic_store(&runner->where, KS_RUNNING);
		if (!same(runner, v, KS_GUEST))		/* K6, K8 */
			continue;
		if (v->fresh || v->relocate)
			relocate(runner, v);
		run_guest(runner);
	}
}
