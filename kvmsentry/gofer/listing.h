/* SPDX-License-Identifier: Apache-2.0 */
/* What Python calls, with cffi's API mode; cffi_build.py reads this file too: keep it plain declarations. */
#ifndef KVMSENTRY_LISTING_H
#define KVMSENTRY_LISTING_H
#include <stdint.h>
/* cffi: from here */
#define KG_ENTRY 82	/* bytes of an entry before its name */
#define KG_DEVICES 256

/* Host st_dev by the index that the peer is shown. */
struct kg_devices {
	uint32_t count;
	uint64_t dev[256];
};

/*
 * Entries of the directory `fd` (open for reading, at its start) without "." and "..", at `out`. Returns their bytes;
 * -EOVERFLOW when they are more than `room` bytes or hold more than `most` directories, -ENFILE when there are more
 * devices than KG_DEVICES, or the host's -errno. `directories`: offsets of those that are directories, *found of them.
 */
int64_t kg_list(int fd, void *out, uint64_t room, struct kg_devices *known, uint32_t *directories, uint32_t most,
		uint32_t *found);
/* cffi: to here */
#endif
