/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Spin or sleep: what the Sentry does when no request is there yet.
 *
 * With a processor for each, a request seen by spinning costs a hundred times less than one that must wake the Sentry.
 * Where the guest and the Sentry share one, spinning keeps the very guest from running that it waits for. Nothing tells
 * which it is (the scheduler moves threads, and others use the host), so both ways are tried and measured: the one that
 * stands, and now and then a short trial of the other. Mean time from an empty scan to the next request decides.
 *
 * No clock, no system call, no machine in here: tests drive it with numbers.
 */
#ifndef KVMSENTRY_SPIN_H
#define KVMSENTRY_SPIN_H

#include <stdint.h>

enum { KS_SPINS, KS_SLEEPS };

struct ks_spin {
	uint64_t us;		/* ticks in a microsecond */
	uint64_t gap;		/* smoothed ticks from an empty scan to the next request */
	uint64_t cost[2];	/* the same, clipped, when last tried either way */
	uint32_t way;		/* that stands: KS_SPINS or KS_SLEEPS */
	uint32_t waits;		/* since the last trial */
	uint32_t trial_gap;	/* waits until the next: doubled by trials that fail */
	uint32_t trial_left;	/* waits of the trial that goes on, or 0 */
	uint32_t trial_done;
	uint64_t trial_sum;
};

void ks_spin_init(struct ks_spin *s, uint64_t ticks_a_us);

/*
 * Before a wait: ticks to spin for, 0 to sleep at once. `guests` may run at this moment, on `processors`.
 */
uint64_t ks_spin_limit(struct ks_spin *s, uint32_t guests, uint32_t processors);

/* Threads were moved to other processors: what was found may no longer be so, and the next trial comes soon. */
void ks_spin_again(struct ks_spin *s);

/* After a wait that ended with a request: it took so many ticks. */
void ks_spin_learn(struct ks_spin *s, uint64_t ticks);

#endif
