/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "hostcalls.h"

#include <errno.h>
#include <unistd.h>

int64_t kg_syscall(int64_t number, const uint64_t *a)
{
	long result = syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);

	return result == -1 ? -errno : result;
}
