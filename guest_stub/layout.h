/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The structures that the guest, the runner and Python share, pinned to the numbers of kvmsentry/vcpu/layout.py
 * (out/constants.h is made from it by the build).
 */
#ifndef KVMSENTRY_LAYOUT_H
#define KVMSENTRY_LAYOUT_H

#include "constants.h"

#ifndef __ASSEMBLER__
#include <stddef.h>
#include <stdint.h>

/* One page a vCPU. With the ring 3 entry the application can write all of it: read each word once. */
struct ks_channel {
	uint32_t state;
	uint32_t cmd;
	uint64_t result;
	uint32_t kind;
	uint32_t vector;
	uint64_t error;
	uint64_t cr2;
	uint32_t xflag;
	uint32_t pad0;
	uint64_t target;
	uint64_t pad3;
	uint64_t regs[KS_NREGS];
	uint64_t pad1[4];
	uint64_t frame[5];
	uint64_t pad2[27];
	uint8_t xsave[KS_CH_XSAVE_ROOM];
};

/* Read-only for the guest. */
struct ks_shared {
	uint32_t asleep;
	uint32_t spins;
};

#define KS_PIN(type, field, at) _Static_assert(offsetof(struct type, field) == (at), #type "." #field)
KS_PIN(ks_channel, state, KS_CH_STATE);
KS_PIN(ks_channel, cmd, KS_CH_CMD);
KS_PIN(ks_channel, result, KS_CH_RESULT);
KS_PIN(ks_channel, kind, KS_CH_KIND);
KS_PIN(ks_channel, vector, KS_CH_VECTOR);
KS_PIN(ks_channel, error, KS_CH_ERROR);
KS_PIN(ks_channel, cr2, KS_CH_CR2);
KS_PIN(ks_channel, xflag, KS_CH_XFLAG);
KS_PIN(ks_channel, target, KS_CH_TARGET);
KS_PIN(ks_channel, regs, KS_CH_REGS);
KS_PIN(ks_channel, frame, KS_CH_FRAME);
KS_PIN(ks_channel, xsave, KS_CH_XSAVE);
KS_PIN(ks_shared, asleep, KS_SH_ASLEEP);
KS_PIN(ks_shared, spins, KS_SH_SPINS);
_Static_assert(sizeof(struct ks_channel) == 4096, "a channel is a page");
_Static_assert(KS_CH_XSAVE % 64 == 0, "XSAVE wants 64-byte alignment");
_Static_assert(KS_XSAVE_MAX <= KS_CH_XSAVE_ROOM, "the XSAVE area fits in the channel");
_Static_assert(KS_CH_FRAME % 16 == 0, "iretq frame");
_Static_assert(KS_GPA_SUPERVISOR + KS_MAX_VCPUS * 4096 <= KS_GPA_CHANNELS, "supervisor pages fit");
_Static_assert(KS_GPA_CHANNELS + KS_CHANNEL_FRAMES * 4096 <= KS_MACHINE_SIZE, "channels fit");
#endif /* __ASSEMBLER__ */
#endif
