/* SPDX-License-Identifier: Apache-2.0 */
/* What Python calls, with cffi's API mode; cffi_build.py reads this file too: keep it plain declarations. */
#ifndef KVMSENTRY_PTRACE_API_H
#define KVMSENTRY_PTRACE_API_H
/* cffi: from here */
#define PT_TIMEOUT -1
#define PT_HOST -2
#define PT_WOKEN -3
#define PT_FAILED 100	/* below -PT_FAILED: -PT_FAILED - 1 - errno */

#define PT_OPS 950	/* system calls in one run of the executor */
#define PT_OP_WORDS 7	/* of each: number and six arguments */

struct pt_tracer;
struct pt_thread;
struct pt_ctx;

/* Addresses of the stub's pages: code, list (read only), scratch. */
uint64_t pt_stub_base(void);
uint64_t pt_list_length(void);

/* Errors of all these: negative errno; *failed names the operation. */
int pt_tracer_new(uint64_t xcr0_mask, struct pt_tracer **out, const char **failed);
void pt_tracer_free(struct pt_tracer *m);
uint64_t pt_xcr0(struct pt_tracer *m);
uint32_t pt_xsave_size(struct pt_tracer *m);
int pt_epoll_fd(struct pt_tracer *m);
uint64_t pt_counter(struct pt_tracer *m, int which);
/* Events of a kind, KS_EV_*, that pt_wait returned. */
uint64_t pt_kind_counter(struct pt_tracer *m, int kind);

/* The first stub process, whose copies the others are. `list`: GPA of the list in memfd, mapped at `ops` here. */
int pt_start(struct pt_tracer *m, int memfd, int sock, uint64_t list, void *ops, struct pt_thread **out, const char **failed);
/* A copy of the process of t (its thread is stopped), or another thread of it when `same`. */
int pt_clone(struct pt_tracer *m, struct pt_thread *t, int same, struct pt_thread **out);
/* Runs n system calls of the list in t, which is stopped; 0, or the first one's -errno, the index in *at. */
int pt_run(struct pt_tracer *m, struct pt_thread *t, uint32_t n, uint32_t *at);
/* Sends descriptors to the stubs' socket; the next recvmsg of a stub gets them. */
int pt_send_fds(int sock, int *fds, int n);
int pt_tid(struct pt_thread *t);
int pt_dead(struct pt_thread *t);
void pt_forsake(struct pt_thread *t);
int pt_kill(struct pt_tracer *m, int pid);
/* Stops the thread of a context that runs; 1: it has an event of its own, which wait will return; 0: go on with pt_go. */
int pt_stop(struct pt_tracer *m, struct pt_ctx *c);
void pt_go(struct pt_tracer *m, struct pt_ctx *c);

int pt_ctx_new(struct pt_tracer *m, struct pt_ctx **out);
void pt_ctx_free(struct pt_tracer *m, struct pt_ctx *c);
void pt_attach(struct pt_tracer *m, struct pt_ctx *c, struct pt_thread *t);
void pt_detach(struct pt_tracer *m, struct pt_ctx *c);
void pt_fail(struct pt_tracer *m, struct pt_ctx *c, int error);
uint32_t pt_id(struct pt_ctx *c);
struct pt_thread *pt_thread_of(struct pt_ctx *c);
uint64_t pt_ticks(void);
int pt_running(struct pt_ctx *c);
void *pt_regs(struct pt_ctx *c);
void *pt_call(struct pt_ctx *c);
uint64_t pt_fault_address(struct pt_ctx *c);
uint64_t pt_error_code(struct pt_ctx *c);
uint32_t pt_vector(struct pt_ctx *c);
uint64_t pt_cpu_ns(struct pt_ctx *c);

int pt_wait(struct pt_tracer *m, int64_t timeout);
void pt_reply(struct pt_tracer *m, struct pt_ctx *c, int64_t result);
void pt_reload(struct pt_tracer *m, struct pt_ctx *c);
void pt_kick(struct pt_tracer *m, struct pt_ctx *c);
void pt_xinit(struct pt_tracer *m, struct pt_ctx *c);
void pt_set_xsave(struct pt_tracer *m, struct pt_ctx *c, const void *data, uint32_t length);
int pt_xsave(struct pt_tracer *m, struct pt_ctx *c, void *to, uint32_t length);
int pt_set_debug(struct pt_ctx *c, const uint64_t *dr);
int64_t pt_debug_status(struct pt_ctx *c);
void pt_wake(struct pt_tracer *m);
uint64_t pt_host_event(struct pt_tracer *m, int i);
int pt_memory_barrier(void);

int pt_memfd(void);
int pt_map_ram(int memfd, void *at, uint64_t offset, uint64_t length);
int pt_give_back(int memfd, uint64_t offset, uint64_t length);
/* cffi: to here */
#endif
