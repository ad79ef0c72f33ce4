/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the vCPUs' threads may run: anywhere, or apart from the Sentry.
 *
 * Left to itself the scheduler puts the Sentry and its guests on one processor, where each waits for the other, while
 * another idles: who is woken is woken where the waker runs. So while there is much to answer the guests are kept off
 * the processor that the Sentry is on. The Sentry stays free to be moved; the guests then make room where it is now.
 *
 * Where other work of the host holds the guests' processors they would starve there, being below it in priority: that is
 * measured, and the Sentry, which is not, changes places with them.
 */
#include "ks.h"

enum {
	MOVE_US = 2000,		/* threads are not moved more often */
	APART_US = 80,		/* as many guests as processors: they make room if requests come closer than this */
	SAMPLE_US = 5000,	/* how often is looked whether they starve; more seldom while nothing helps, */
	SAMPLE_MOST_US = 200000,
	STARVED_PERCENT = 35,	/* of the processor time that running guests could have had */
	MANY = 64,		/* vCPUs, whose clocks it would take too long to read */
};

static void move(struct ks_machine *m, int apart, int here)
{
	struct ks_place *p = &m->place;
	cpu_set_t set = p->allowed;

	if (apart)
		CPU_CLR(here, &set);
	if (!CPU_COUNT(&set))
		return;
	p->kept_off = apart ? here : -1;
	p->moved_at = ks_ticks();
	p->guests = set;
	ks_spin_again(&m->spin);
	atomic_fetch_add(&p->number, 1);	/* runners that are out of the guest follow by themselves */
	for (u32 i = 0; i < m->nrunning; i++)
		if (atomic_load(&m->running[i]->on->where) == KS_RUNNING)
			sched_setaffinity(m->running[i]->on->tid, sizeof(set), &set);
}

/* Whether guests had too little of the time that they spent in KVM_RUN since the last sample. */
static int starved(struct ks_machine *m, u64 now)
{
	struct ks_place *p = &m->place;
	u64 elapsed = now - p->sampled_at, got = 0, wanted = 0, ns_got, ns_wanted;

	if (elapsed < ks_us(m, p->sample_us) || m->nvcpus > MANY)
		return 0;
	for (u32 i = 1; i < m->nvcpus; i++) {
		struct ks_runner *r = m->vcpus[i]->on;
		u64 entered = atomic_load(&r->entered);

		got += ks_runner_ns(r);
		wanted += atomic_load(&r->ran) + (entered && now > entered ? now - entered : 0);
	}
	ns_got = got - p->sampled_got;
	ns_wanted = (int64_t)(wanted - p->sampled_wanted) > 0 ? wanted - p->sampled_wanted : 0;
	if (ns_wanted > elapsed * (m->ncpus - 1))
		ns_wanted = elapsed * (m->ncpus - 1);
	ns_wanted = ns_wanted * 1000 / m->tick_us;
	p->sampled_at = now;
	p->sampled_got = got;
	p->sampled_wanted = wanted;
	if (ns_wanted < SAMPLE_US * 1000 / 4)	/* they hardly wanted any */
		return 0;
	if (ns_got * 100 < ns_wanted * STARVED_PERCENT)
		return 1;
	p->sample_us = SAMPLE_US;
	return 0;
}

/* The Sentry to another processor, where it may be moved on from. */
static void move_over(const struct ks_place *p)
{
	cpu_set_t others = p->allowed;

	CPU_CLR(sched_getcpu(), &others);
	if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof(others), &others))
		sched_setaffinity(0, sizeof(p->allowed), &p->allowed);
}

void ks_place(struct ks_machine *m, u64 now)
{
	struct ks_place *p = &m->place;
	int crowded, here;

	if (m->ncpus < 2 || !m->nrunning)
		return;
	if (p->kept_off >= 0 && starved(m, now)) {
		move_over(p);
		move(m, 1, sched_getcpu());
		p->sample_us = p->sample_us < SAMPLE_MOST_US / 2 ? p->sample_us * 2 : p->sample_us;
		return;
	}
	crowded = m->nrunning >= (u32)m->ncpus && m->spin.gap > ks_us(m, APART_US);
	here = sched_getcpu();
	if (here >= 0 && p->kept_off != (crowded ? -1 : here) && now - p->moved_at > ks_us(m, MOVE_US))
		move(m, !crowded, here);
}

int64_t ks_place_patience(struct ks_machine *m)
{
	return m->place.kept_off >= 0 && m->nrunning >= (u32)m->ncpus ? MOVE_US * 1000 : -1;
}

void ks_place_anywhere(struct ks_machine *m)
{
	move(m, 0, 0);
}

void ks_place_follow(struct ks_runner *r)
{
	struct ks_place *p = &r->m->place;
	cpu_set_t set;

	/* If the Sentry is writing the set just now, the number changes after that and this comes again. */
	r->placed = atomic_load(&p->number);
	set = p->guests;
	sched_setaffinity(0, sizeof(set), &set);
}

void ks_place_init(struct ks_machine *m)
{
	struct ks_place *p = &m->place;

	p->kept_off = -1;
	p->guests = p->allowed;
	p->sample_us = SAMPLE_US;
}
