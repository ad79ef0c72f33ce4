/* SPDX-License-Identifier: Apache-2.0 */
/* The policy of spin.h. Numbers are measured: see docs/performance.md. */
#include "spin.h"

enum {
	IDLE_US = 150,		/* spin for so long while a processor would be idle anyway */
	BUSY_US = 40,		/* and so long while guests could use it, */
	NEAR_US = 80,		/* if requests come closer than this */
	CLIP_US = 200,		/* a wait counts for no more: what comes later, comes later either way */
	WAKE_US = 15,		/* no wake-up is cheaper: below this nothing else is tried */
	TRIAL = 16,
	TRIAL_GAP = 16,
	TRIAL_GAP_MOST = 2048,
};

void ks_spin_init(struct ks_spin *s, uint64_t ticks_a_us)
{
	*s = (struct ks_spin){ .us = ticks_a_us ? ticks_a_us : 1, .way = KS_SPINS, .trial_gap = TRIAL_GAP };
	s->gap = 1000000 * s->us;
}

static uint32_t way_now(const struct ks_spin *s)
{
	return s->trial_left ? !s->way : s->way;
}

static int trial_is_due(struct ks_spin *s)
{
	if (++s->waits < s->trial_gap)
		return 0;
	return s->way == KS_SLEEPS || s->cost[KS_SPINS] > WAKE_US * s->us;
}

uint64_t ks_spin_limit(struct ks_spin *s, uint32_t guests, uint32_t processors)
{
	uint64_t limit;

	if (!guests)
		return 0;
	if (guests < processors)
		limit = IDLE_US * s->us;
	else if (s->gap < NEAR_US * s->us)
		limit = BUSY_US * s->us;
	else
		return 0;
	if (!s->trial_left && trial_is_due(s)) {
		s->trial_left = TRIAL + 1;	/* the first, which the change itself disturbs, is not counted */
		s->trial_sum = s->trial_done = 0;
	}
	if (way_now(s) == KS_SLEEPS)
		return 0;
	return s->trial_left ? BUSY_US * s->us : limit;
}

void ks_spin_again(struct ks_spin *s)
{
	s->trial_gap = TRIAL_GAP;
}

static void end_trial(struct ks_spin *s)
{
	uint64_t mean = s->trial_sum / (s->trial_done ? s->trial_done : 1);
	uint32_t tried = !s->way;

	s->trial_left = 0;
	s->waits = 0;
	s->cost[tried] = mean;
	if (mean < s->cost[s->way] - s->cost[s->way] / 4) {
		s->way = tried;
		s->trial_gap = TRIAL_GAP;
	} else if (s->trial_gap < TRIAL_GAP_MOST) {
		s->trial_gap *= 2;
	}
}

void ks_spin_learn(struct ks_spin *s, uint64_t ticks)
{
	uint64_t clipped = ticks < CLIP_US * s->us ? ticks : CLIP_US * s->us;

	s->gap += (int64_t)(ticks - s->gap) / 8;
	if (!s->trial_left) {
		s->cost[s->way] += (int64_t)(clipped - s->cost[s->way]) / 16;
		return;
	}
	if (s->trial_left-- == TRIAL + 1)
		return;
	s->trial_sum += clipped;
	s->trial_done++;
	if (!s->trial_left || s->trial_sum > TRIAL * s->cost[s->way])
		end_trial(s);
}
