/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Sentry's side: wait for events, answer them, kick, stop, and save processor state. One thread calls all of this.
 */
#include "ks.h"

#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "api.h"

enum {
	POLL_US = 50,		/* host descriptors are looked at this often when there is never a reason to sleep */
	REKICK_US = 2000,
	SAVE_US = 100,
	SETTLE_US = 50,
	DUE_US = 15,		/* a wake-up that another's park may make needless is put off so long */
	HOT = 64,		/* parks made portable after one that could have made room for another */
	WAITS_US = 5,		/* a request that comes sooner leaves no doubt that its vCPU has a processor */
};

static void list_add(struct ks_vcpu *v)
{
	struct ks_machine *m = v->m;

	if (v->running < 0) {
		v->running = m->nrunning;
		m->running[m->nrunning++] = v;
	}
}

static void list_remove(struct ks_vcpu *v)
{
	struct ks_machine *m = v->m;

	if (v->running >= 0) {
		struct ks_vcpu *last = m->running[--m->nrunning];

		m->running[v->running] = last;
		last->running = v->running;
		v->running = -1;
	}
}

static void forget_kick(struct ks_vcpu *v)
{
	if (v->kicked_at) {
		v->kicked_at = 0;
		v->m->nkicked--;
		atomic_store(&v->kick, 0);
	}
}

/* An event of `v`, or its end: whoever it took the place of has its channel for itself. */
static void succeeded(struct ks_vcpu *v)
{
	if (v->predecessor) {
		v->predecessor->successor = NULL;
		v->predecessor = NULL;
	}
}

static struct ks_vcpu *scan(struct ks_machine *m)
{
	u32 n = m->nrunning, at = m->next;

	for (u32 i = 0; i < n; i++) {
		struct ks_vcpu *v;
		u32 guest = KS_GUEST;

		if (++at >= n)
			at = 0;
		v = m->running[at];
		if (atomic_load_explicit(&v->pending, memory_order_acquire)) {
			atomic_store_explicit(&v->pending, 0, memory_order_relaxed);
		} else {
			if (KS_READ(v->ch->state) != KS_ST_REQUEST)
				continue;
			if (!atomic_compare_exchange_strong(&v->owner, &guest, KS_TAKEN))
				continue;
			ks_take_channel(v);
		}
		m->next = at;
		m->count_events++;
		v->held = 1;
		v->portable = 0;
		succeeded(v);
		forget_kick(v);
		return v;
	}
	return NULL;
}

static void send_kick(struct ks_vcpu *v)
{
	v->on->run->immediate_exit = 1;
	syscall(SYS_tgkill, getpid(), v->on->tid, ks_kick_signal());
}

/* A kick that was dropped because a request was about to come (K1, K2) and then did not: an application can do that. */
static void kick_again(struct ks_machine *m, u64 now)
{
	for (u32 i = 0; i < m->nrunning; i++) {
		struct ks_vcpu *v = m->running[i];

		if (v->kicked_at && now - v->kicked_at > ks_us(m, REKICK_US)) {
			v->kicked_at = now;
			atomic_store(&v->kick, 1);
			send_kick(v);
		}
	}
}

static int sleep_on_epoll(struct ks_machine *m, struct epoll_event *events, int64_t ns)
{
	struct timespec ts = { ns / 1000000000, ns % 1000000000 };
	struct itimerspec timer = { .it_value = ts };

	if (ns == 0)
		return epoll_wait(m->epoll, events, KS_MAX_HOST_EVENTS, 0);
	if (ns < 0)
		return epoll_wait(m->epoll, events, KS_MAX_HOST_EVENTS, -1);
#ifdef SYS_epoll_pwait2
	if (m->have_pwait2) {
		int n = syscall(SYS_epoll_pwait2, m->epoll, events, KS_MAX_HOST_EVENTS, &ts, NULL, 0);

		if (n >= 0 || errno != ENOSYS)
			return n;
		m->have_pwait2 = 0;
	}
#endif
	timerfd_settime(m->timer, 0, &timer, NULL);
	return epoll_wait(m->epoll, events, KS_MAX_HOST_EVENTS, -1);
}

/* One epoll; the bell and the timer are dealt with here. Returns how many host descriptors are ready, -1 - errno if it failed. */
static int look_at_host(struct ks_machine *m, int64_t ns)
{
	struct epoll_event events[KS_MAX_HOST_EVENTS];
	u64 count;
	int n = sleep_on_epoll(m, events, ns);

	m->polled = ks_ticks();
	if (n < 0 && errno != EINTR)
		return -1 - errno;
	if (n < 0) {	/* a signal, whose handler is Python's: back to it */
		atomic_store(&m->woken, 1);
		return 0;
	}
	m->nhost = 0;
	for (int i = 0; i < n; i++) {
		if (events[i].data.fd == m->bell) {
			m->count_doorbells++;
		} else if (events[i].data.fd == m->timer) {
			if (read(m->timer, &count, sizeof(count)) < 0)
				continue;
		} else {
			m->host[m->nhost++] = events[i];
		}
	}
	return m->nhost;
}

static int found(const struct ks_vcpu *v)
{
	return v->event << 16 | v->id;
}

static void ring_runner(struct ks_runner *r)
{
	atomic_fetch_add(&r->bell, 1);
	ks_futex_wake(&r->bell);
}

/* Wakes the runner whose waking was put off, if it still sleeps over an answer. */
static void wake_due(struct ks_machine *m)
{
	struct ks_vcpu *v = m->due;

	m->due = NULL;
	if (atomic_load(&v->owner) == KS_GUEST && atomic_load(&v->on->asleep))
		ring_runner(v->on);
}

/* What needs no waiting: an event, or KS_HOST; KS_TIMEOUT when there is nothing. */
int ks_look(struct ks_machine *m)
{
	struct ks_vcpu *v;
	u64 now;
	int n;

	if (m->due && ks_ticks() - m->due_at > ks_us(m, DUE_US))
		wake_due(m);
	if (m->host_held) {	/* edges that a vCPU's event overtook: epoll tells of them once only */
		m->host_held = 0;
		return KS_HOST;
	}
	if (m->host_due) {
		m->host_due = 0;
		if ((n = look_at_host(m, 0)))
			return n > 0 ? KS_HOST : n - KS_FAILED;
	}
	v = scan(m);
	if (!v)
		return KS_TIMEOUT;
	m->spin.gap -= m->spin.gap / 8;
	/* Never a reason to sleep: host descriptors get their turn all the same. */
	if (!(m->count_events & 31)) {
		now = ks_ticks();
		if (now - m->polled > ks_us(m, POLL_US))
			m->host_due = 1;
	}
	return found(v);
}

int ks_wait(struct ks_machine *m, int64_t timeout)
{
	struct ks_vcpu *v;
	u64 start, now, spin = 0, end = 0;
	int n, slept = 0;

	n = ks_look(m);
	if (n != KS_TIMEOUT)
		return n;
	start = now = ks_ticks();
	if (timeout > 0)
		end = start + (u64)((unsigned __int128)timeout * m->tsc_khz / 1000000);
	if (timeout)
		spin = ks_spin_limit(&m->spin, m->nrunning, m->ncpus);
	for (;;) {
		if (atomic_load_explicit(&m->woken, memory_order_relaxed)) {
			atomic_store(&m->woken, 0);
			return KS_WOKEN;
		}
		if (now - m->polled > ks_us(m, POLL_US)) {
			if ((n = look_at_host(m, 0)))
				return n > 0 ? KS_HOST : n - KS_FAILED;
		}
		if (timeout == 0 || (timeout > 0 && (int64_t)(now - end) >= 0))
			return KS_TIMEOUT;
		if (m->nkicked)
			kick_again(m, now);

		if (!slept && now - start < spin) {
			for (int i = 0; i < 16; i++) {
				ks_pause();
				if ((v = scan(m)))
					goto out;
			}
			m->count_spins++;
			now = ks_ticks();
			if (m->due && now - m->due_at > ks_us(m, DUE_US))
				wake_due(m);
			if (now - start > ks_us(m, WAITS_US))
				ks_place(m, now);
			continue;
		}

		if (m->due)
			wake_due(m);
		ks_place(m, now);
		m->shared->asleep = 1;
		atomic_store(&m->asleep, 1);	/* seq_cst: the guests' and runners' view before the last look */
		v = scan(m);
		if (!v && !atomic_load(&m->woken)) {
			int64_t ns = -1, patience = ks_place_patience(m);

			if (timeout > 0)
				ns = (u64)((unsigned __int128)(end - now) * 1000000 / m->tsc_khz) + 1;
			if (m->nkicked && (ns < 0 || ns > REKICK_US * 1000))
				ns = REKICK_US * 1000;
			if (patience >= 0 && slept)
				ks_place_anywhere(m);	/* they all compute */
			else if (patience >= 0 && (ns < 0 || ns > patience))
				ns = patience;
			m->count_sleeps++;
			slept = 1;
			n = look_at_host(m, ns);
		} else {
			n = 0;
		}
		m->shared->asleep = 0;
		atomic_store(&m->asleep, 0);
		if (v || (v = scan(m))) {
			m->host_held = n > 0;
			goto out;
		}
		if (n)
			return n > 0 ? KS_HOST : n - KS_FAILED;
		now = ks_ticks();
	}
out:
	ks_spin_learn(&m->spin, ks_ticks() - start);
	return found(v);
}

static void give(struct ks_vcpu *v)
{
	atomic_store(&v->owner, KS_GUEST);	/* seq_cst, before `asleep` is read (K4) */
	if (!atomic_load(&v->on->asleep))
		return;
	if (!v->hot) {
		ring_runner(v->on);
		return;
	}
	/* Soon another of its threads parks, as it does again and again, and makes room (make_room). */
	if (v->m->due)
		wake_due(v->m);
	v->m->due = v;
	v->m->due_at = ks_ticks();
}

/* The word the answer turns on was written; now the context is the guest's. */
static void hand_over(struct ks_vcpu *v)
{
	struct ks_runner *r = v->on;

	v->held = 0;
	if (atomic_load_explicit(&r->where, memory_order_relaxed) == KS_STOPPED) {
		atomic_store_explicit(&r->answered, ks_ticks(), memory_order_relaxed);
		v->m->waiting = v;
	}
	give(v);
	if (v->running < 0)
		list_add(v);
}

/*
 * `v` made room: its guest was told, by a word in v's channel, to go on as `successor`. Nothing was heard of that one since.
 * Before the channel is written again the word must have been read. Nearly always it was, long ago.
 */
static void settle(struct ks_vcpu *v)
{
	struct ks_vcpu *b = v->successor;
	u32 guest = KS_GUEST;
	u64 start;

	if (!b)
		return;
	start = ks_ticks();
	while (KS_READ(v->ch->state) != KS_ST_GONE) {
		if (ks_ticks() - start < ks_us(v->m, SETTLE_US)) {
			ks_pause();
			continue;
		}
		/* Its processor was taken away. Out with it: it goes on by way of the successor's own channel. */
		if (atomic_compare_exchange_strong(&b->owner, &guest, KS_TAKEN)) {
			ks_halt(b);
			if (KS_READ(v->ch->state) != KS_ST_GONE)
				b->relocate = 1;
			give(b);
		}
		break;		/* else an event of b's lies there: it has been there, or will be relocated */
	}
	succeeded(b);
}

static int canonical(u64 address)
{
	return (int64_t)(address << 16) >> 16 == (int64_t)address;
}

void ks_reload(struct ks_vcpu *v)
{
	struct ks_channel *ch = v->ch;
	u64 *r = v->regs;

	settle(v);
	r[KS_RFLAGS] = (r[KS_RFLAGS] & KS_RFLAGS_USER) | KS_RFLAGS_FIXED;
	if (!canonical(r[KS_FS_BASE]))
		r[KS_FS_BASE] = 0;
	if (!canonical(r[KS_GS_BASE]))
		r[KS_GS_BASE] = 0;
	memcpy(ch->regs, r, sizeof(ch->regs));
	ch->frame[0] = r[KS_RIP];
	if (v->m->ring0 && !canonical(r[KS_RIP]))
		ch->frame[0] = KS_USER_TOP;	/* ring 0's iretq must not fault: the fetch does, in ring 3 */
	ch->frame[1] = KS_USER_CS;
	ch->frame[2] = r[KS_RFLAGS];
	ch->frame[3] = r[KS_RSP];
	ch->frame[4] = KS_USER_DS;
	v->xset = v->xwant || v->xlost;
	v->xwant = v->xlost = 0;
	if (v->xset)
		memcpy(ch->xsave, v->xsave, KS_XSAVE_MAX);
	ch->xflag = v->xset;
	ch->cmd = KS_CMD_RELOAD;
	atomic_signal_fence(memory_order_seq_cst);
	*(volatile u32 *)&ch->state = KS_ST_ANSWERED;
	hand_over(v);
}

void ks_reply(struct ks_vcpu *v, int64_t result)
{
	struct ks_channel *ch = v->ch;

	v->regs[KS_RAX] = result;
	if (v->source != KS_FROM_CHANNEL || v->event != KS_EV_SYSCALL || v->fresh || v->xwant || v->xlost) {
		ks_reload(v);
		return;
	}
	v->xset = 0;
	ch->result = result;
	ch->cmd = KS_CMD_CONTINUE;
	atomic_signal_fence(memory_order_seq_cst);
	*(volatile u32 *)&ch->state = KS_ST_ANSWERED;
	hand_over(v);
}

void ks_kick(struct ks_vcpu *v)
{
	if (v->held)
		return;
	if (!v->kicked_at)
		v->m->nkicked++;
	v->kicked_at = ks_ticks() | 1;
	atomic_store(&v->kick, 1);
	send_kick(v);
}

/* Brings a vCPU whose context is TAKEN out of the guest; it stays out until it is answered. */
void ks_halt(struct ks_vcpu *v)
{
	u64 sent = 0, now;

	if (atomic_load(&v->on->where) == KS_STOPPED)
		return;
	atomic_store(&v->on->halt, 1);
	for (;;) {
		now = ks_ticks();
		if (now - sent > ks_us(v->m, 1000)) {
			send_kick(v);
			sent = now;
		}
		for (int i = 0; i < 200; i++) {
			if (atomic_load(&v->on->where) == KS_STOPPED) {
				atomic_store(&v->on->halt, 0);
				return;
			}
			ks_pause();
		}
		struct timespec nap = { 0, 20000 };
		if (now - sent > ks_us(v->m, 30))
			nanosleep(&nap, NULL);
	}
}

void ks_release(struct ks_vcpu *v)
{
	u32 guest = KS_GUEST;

	atomic_compare_exchange_strong(&v->owner, &guest, KS_TAKEN);
	ks_halt(v);
	settle(v);
	succeeded(v);
	if (v->m->waiting == v)
		v->m->waiting = NULL;
	if (v->m->due == v)
		v->m->due = NULL;
	forget_kick(v);
	list_remove(v);
	atomic_store(&v->pending, 0);
	atomic_store(&v->owner, KS_IDLE);
}

/* Initial processor state: XSTATE_BV 0 makes XRSTOR load it; MXCSR comes from the image all the same (SDM vol. 1, 13.8.1). */
void ks_xinit(struct ks_vcpu *v)
{
	memset(v->xsave, 0, sizeof(v->xsave));
	v->xsave[0] = 0x7f;
	v->xsave[1] = 0x03;
	v->xsave[24] = 0x80;
	v->xsave[25] = 0x1f;
	v->xwant = 1;
}

void ks_set_xsave(struct ks_vcpu *v, const void *data, u32 length)
{
	u64 *header = (u64 *)(v->xsave + 512);
	u32 mxcsr;

	if (length > KS_XSAVE_MAX)
		length = KS_XSAVE_MAX;
	ks_xinit(v);
	memcpy(v->xsave, data, length);
	memcpy(&mxcsr, v->xsave + 24, 4);
	mxcsr &= v->m->mxcsr_mask;
	memcpy(v->xsave + 24, &mxcsr, 4);
	if (length < 576)
		header[0] = 3;
	header[0] &= v->m->xcr0;
	memset(header + 1, 0, 56);
}

/* Prepares a context that is TAKEN and stopped (new or exec) to start with the next reload. */
void ks_fresh(struct ks_vcpu *v, u64 cr3, u64 channel_gpa, u64 channel_va)
{
	ks_halt(v);
	settle(v);
	succeeded(v);
	v->portable = v->hot = 0;
	v->cr3 = cr3;
	v->ch_gpa = channel_gpa;
	v->ch = (struct ks_channel *)(v->m->mem + channel_gpa);
	v->ch_va = channel_va;
	memset(v->ch, 0, sizeof(*v->ch));
	v->fresh = 1;
	v->source = KS_FROM_RUNNER;
}

/* A pooled vCPU gets a context. */
void ks_claim(struct ks_vcpu *v)
{
	atomic_store(&v->owner, KS_TAKEN);
	memset(v->regs, 0, sizeof(v->regs));
	v->event = KS_EV_KICKED;
	v->held = 1;
	v->relocate = v->xset = v->xlost = 0;
	atomic_store(&v->kick, 0);
	atomic_store(&v->on->halt, 0);
	ks_xinit(v);
}

/*
 * Has the guest, which waits for an answer, save its own state into the channel: 150 ns where an exit is 10 us and more.
 * Returns 0 if it did not come to it in time; then the vCPU is out of the guest and resumes at `answered`, because
 * nobody knows how far it got.
 */
static int save_in_guest(struct ks_vcpu *v)
{
	struct ks_channel *ch = v->ch;
	u64 start = ks_ticks(), limit = ks_us(v->m, SAVE_US);

	if (v->source != KS_FROM_CHANNEL || v->fresh || KS_READ(ch->state) != KS_ST_REQUEST ||
	    atomic_load(&v->on->where) == KS_STOPPED)
		return 0;
	memset(ch->xsave + 512, 0, 64);		/* XSAVE leaves most of the header as it is */
	ch->cmd = KS_CMD_SAVE;
	atomic_signal_fence(memory_order_seq_cst);
	*(volatile u32 *)&ch->state = KS_ST_ANSWERED;
	while (KS_READ(ch->state) != KS_ST_REQUEST) {
		if (ks_ticks() - start > limit || atomic_load(&v->on->where) == KS_STOPPED) {
			ks_halt(v);
			v->source = KS_FROM_RUNNER;
			v->relocate = 1;
			return 0;
		}
		ks_pause();
	}
	return 1;
}

/* All of a context that waits in the guest into private memory. Returns 0 if its guest did not come to it. */
static int make_portable(struct ks_vcpu *v)
{
	if (!save_in_guest(v))
		return 0;
	ks_set_xsave(v, v->ch->xsave, KS_XSAVE_MAX);
	v->portable = 1;
	return 1;
}

/* Contexts a and b, both TAKEN, change runners. What stood in b's guest is lost: it is portable. */
static void trade_seats(struct ks_vcpu *a, struct ks_vcpu *b)
{
	struct ks_runner *ra = a->on, *rb = b->on;
	u64 more = ks_runner_ns(ra) - ks_runner_ns(rb);

	a->cpu_offset += more;
	b->cpu_offset -= more;
	a->on = rb;
	b->on = ra;
	atomic_store(&rb->seat, a);
	atomic_store(&ra->seat, b);	/* before b is the guest's (K8) */
	a->m->count_trades++;
}

/*
 * `a` is about to leave its processor, and `b`, a thread of the same process that was answered a moment ago, waits for one:
 * a's guest goes on as b without leaving. The world switches that this spares (and the waking of a processor) are a
 * hundred times as dear. Returns 0 if there is none such.
 */
static int make_room(struct ks_vcpu *a)
{
	struct ks_machine *m = a->m;
	struct ks_vcpu *b = m->waiting;
	u32 guest = KS_GUEST;

	if (!b || b == a || b->cr3 != a->cr3 || b->fresh || b->kicked_at || m->ring0 || a->source != KS_FROM_CHANNEL)
		return 0;
	m->waiting = NULL;
	if (atomic_load(&b->owner) != KS_GUEST || atomic_load(&b->on->where) != KS_STOPPED)
		return 0;
	if (!b->portable) {
		a->hot = b->hot = HOT;
		return 0;
	}
	if (!atomic_compare_exchange_strong(&b->owner, &guest, KS_TAKEN))
		return 0;
	if (atomic_load(&b->on->where) != KS_STOPPED || !make_portable(a)) {
		give(b);
		return 0;
	}
	trade_seats(a, b);
	a->relocate = 1;
	b->relocate = b->portable = 0;
	a->hot = b->hot = HOT;
	if (m->due == b)
		m->due = NULL;
	a->successor = b;
	b->predecessor = a;
	a->ch->target = b->ch_va;
	a->ch->cmd = KS_CMD_GOTO;
	*(volatile u32 *)&a->ch->state = KS_ST_ANSWERED;
	atomic_store(&b->owner, KS_GUEST);
	if (atomic_load(&b->on->asleep))	/* a's guest left all the same, tired of waiting */
		ring_runner(b->on);
	return 1;
}

void ks_park(struct ks_vcpu *v)
{
	if (!make_room(v)) {
		v->portable = 0;
		if (v->hot) {
			v->hot--;
			make_portable(v);
		}
		if (v->source == KS_FROM_CHANNEL)
			*(volatile u32 *)&v->ch->state = KS_ST_LEAVE;
	}
	list_remove(v);
}

int ks_xsave(struct ks_vcpu *v, void *to, u32 length)
{
	struct kvm_xsave area;

	if (v->xwant || v->xlost) {
		memcpy(to, v->xsave, length);
		return 0;
	}
	if (save_in_guest(v)) {
		memcpy(to, v->ch->xsave, length);
	} else {
		ks_halt(v);
		if (ioctl(v->on->fd, KVM_GET_XSAVE, &area) < 0)
			return -errno;
		memcpy(to, &area, length);
	}
	memset((uint8_t *)to + 464, 0, 48);	/* software's part of the legacy area */
	return 0;
}

void ks_wake(struct ks_machine *m)
{
	u64 one = 1;

	atomic_store(&m->woken, 1);
	while (write(m->bell, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

u64 ks_host_event(struct ks_machine *m, int i)
{
	return i < m->nhost ? (u64)m->host[i].events << 32 | (u32)m->host[i].data.fd : 0;
}

const struct ks_doors *ks_doors(void)
{
	static const struct ks_doors doors = { ks_look, ks_wait, ks_reply };

	return &doors;
}
