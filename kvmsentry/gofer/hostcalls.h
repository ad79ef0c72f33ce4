/* SPDX-License-Identifier: Apache-2.0 */
/* What Python calls, with cffi's API mode; cffi_build.py reads this file too: keep it plain declarations. */
#ifndef KVMSENTRY_HOSTCALLS_H
#define KVMSENTRY_HOSTCALLS_H
#include <stdint.h>
/* cffi: from here */
/* syscall(2) with six arguments; -errno when it failed. */
int64_t kg_syscall(int64_t number, const uint64_t *arguments);
/* cffi: to here */
#endif
