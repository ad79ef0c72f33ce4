/* SPDX-License-Identifier: Apache-2.0 */
/* What Python calls, with cffi's API mode; cffi_build.py reads this file too: keep it plain declarations. */
#ifndef KVMSENTRY_API_H
#define KVMSENTRY_API_H
/* cffi: from here */
#define KS_TIMEOUT -1
#define KS_HOST -2
#define KS_WOKEN -3
#define KS_FAILED 100	/* below -KS_FAILED: -KS_FAILED - 1 - errno */

struct ks_machine;
struct ks_vcpu;
struct ks_doors;

struct ks_traits {
	int ring0_native;	/* ring 0 runs at the processor's speed */
	int syscall_ring0;	/* SYSCALL in ring 3 enters ring 0 */
	int sees_outside_writes;	/* page-table entries written by the host hold after a CR3 reload: nested paging */
	int sync_regs;
	int fsgsbase;
	int xsave_size;
	int max_vcpus;
	int immediate_exit;
	int phys_bits;
	int virtual;		/* the host is itself a virtual machine (CPUID leaf 1) */
	int tsc_is_hosts;	/* RDTSC in ring 3 reads the host's counter, once KVM's offset was set to 0 */
	uint64_t xcr0;
	uint64_t tsc_khz;
	uint64_t ring0_ns100;	/* ns for 100 instructions in ring 0 */
	const char *failed;	/* the operation that the host refused */
	int error;		/* its errno */
};

int ks_probe(int kvm, struct ks_traits *t);

/* Errors of all these: negative errno; *failed names the operation. */
int ks_machine_new(int kvm, int ring0, uint64_t xcr0, void *mem, struct ks_machine **out, const char **failed);
void ks_machine_free(struct ks_machine *m);
int ks_set_memslot(struct ks_machine *m, int slot, uint64_t gpa, uint64_t length, int readonly);
int ks_vcpu_new(struct ks_machine *m, struct ks_vcpu **out, const char **failed);
int ks_epoll_fd(struct ks_machine *m);
uint64_t ks_counter(struct ks_machine *m, int which);
/* Exits for a reason, KS_EXIT_*. */
uint64_t ks_vcpu_counter(struct ks_vcpu *v, int reason);
int ks_touch(struct ks_machine *m, uint64_t cr3, const uint64_t *places, int n);
int ks_flush_tlbs(struct ks_machine *m);

/* The vDSO's image. */
const void *ks_vdso(uint64_t *length);
uint64_t ks_host_ticks(void);

uint32_t ks_id(struct ks_vcpu *v);
/* Processor time of the vCPU's thread, ns; 0 when the host does not tell. */
uint64_t ks_cpu_ns(struct ks_vcpu *v);
void *ks_regs(struct ks_vcpu *v);
void *ks_call(struct ks_vcpu *v);
uint64_t ks_fault_address(struct ks_vcpu *v);
uint64_t ks_error_code(struct ks_vcpu *v);
uint32_t ks_vector(struct ks_vcpu *v);
int ks_owner(struct ks_vcpu *v);
int ks_where(struct ks_vcpu *v);

int ks_look(struct ks_machine *m);
int ks_wait(struct ks_machine *m, int64_t timeout);
void ks_reply(struct ks_vcpu *v, int64_t result);
void ks_reload(struct ks_vcpu *v);
void ks_park(struct ks_vcpu *v);
void ks_kick(struct ks_vcpu *v);
void ks_halt(struct ks_vcpu *v);
void ks_release(struct ks_vcpu *v);
void ks_claim(struct ks_vcpu *v);
void ks_fresh(struct ks_vcpu *v, uint64_t cr3, uint64_t channel_gpa, uint64_t channel_va);
void ks_xinit(struct ks_vcpu *v);
void ks_set_xsave(struct ks_vcpu *v, const void *data, uint32_t length);
int ks_xsave(struct ks_vcpu *v, void *to, uint32_t length);
void ks_wake(struct ks_machine *m);
uint64_t ks_host_event(struct ks_machine *m, int i);
/* For dispatch.c, which is a shared object of its own. */
const struct ks_doors *ks_doors(void);

void *ks_reserve(uint64_t length);
void ks_unreserve(void *base, uint64_t length);
int ks_map_ram(void *at, uint64_t length, int huge);
int ks_map_file(void *at, uint64_t length, int fd, uint64_t offset, int writable);
int ks_warm(void *at, uint64_t length);
int ks_unmap(void *at, uint64_t length);
int ks_give_back(void *at, uint64_t length);
void ks_zero(void *at, uint64_t length);
void ks_copy(void *to, const void *from, uint64_t length);
/* Atomic towards guest threads; returns what the word was. */
uint32_t ks_cmpxchg32(void *word, uint32_t expected, uint32_t desired);
/* Orders the memory accesses of all threads of the process, guests included; negative errno. */
int ks_memory_barrier(void);
int64_t ks_safe_read(const void *from, void *to, uint64_t length);
int64_t ks_safe_write(void *to, const void *from, uint64_t length);
/* cffi: to here */
#endif
