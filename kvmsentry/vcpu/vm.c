/* SPDX-License-Identifier: Apache-2.0 */
/* The machine: KVM's VM, its own memslot (stub, descriptor tables, kernel page tables), vCPUs, the service vCPU. */
#include "ks.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "api.h"
#include "stub_blob.h"
#include "vdso_blob.h"

enum { MSR_STAR = 0xc0000081, MSR_LSTAR, MSR_CSTAR, MSR_SFMASK, MSR_KERNEL_GS_BASE = 0xc0000102 };
enum { PTE_P = 1, PTE_W = 2, PTE_U = 4, PTE_A = 0x20, PTE_D = 0x40, PTE_PS = 0x80 };
#define PTE_NX (1ull << 63)

struct kvm_segment ks_segment(int selector, int type, int dpl, int code)
{
	return (struct kvm_segment){ .selector = selector, .type = type, .present = 1, .dpl = dpl, .s = 1, .l = code,
				     .db = !code, .g = 1, .limit = 0xffffffff };
}

/* Pages that no structure of ours uses read as zero; everything below is written once, before the first KVM_RUN. */
static void fill_memory(struct ks_machine *m)
{
	u64 *gdt = (u64 *)(m->mem + KS_GPA_GDT), *t;

	memcpy(m->mem + KS_GPA_ENTRY, ks_stub_blob, sizeof(ks_stub_blob));
	gdt[2] = 0x00af9b000000ffffull;		/* KERNEL_CS */
	gdt[3] = 0x00cf93000000ffffull;		/* KERNEL_DS */
	gdt[5] = 0x00cff3000000ffffull;		/* USER_DS */
	gdt[6] = 0x00affb000000ffffull;		/* USER_CS */
	for (int table = 0; table < 2; table++) {
		for (int v = 0; v < 32; v++) {
			u32 *e = (u32 *)(m->mem + (table ? KS_GPA_IDT_RING0 : KS_GPA_IDT_RING3) + v * 16);
			u64 handler = table ? STUB_n_vectors + 16 * v : STUB_e_vectors + 8 * v;
			int dpl = v == 3 || v == 4 ? 3 : 0;	/* int3, into */

			e[0] = KS_KERNEL_CS << 16 | (handler & 0xffff);
			e[1] = (handler & 0xffff0000) | 0x8e00 | dpl << 13;
			e[2] = handler >> 32;
			e[3] = 0;
		}
	}
	/* The kernel half: STUB_BASE shows the machine's first 2 MiB, LINEAR_BASE all of guest-physical memory (add_linear). */
	t = (u64 *)(m->mem + KS_GPA_KERNEL_PDPT);
	t[510] = KS_GPA_KERNEL_PD | PTE_P | PTE_W | PTE_A;
	t = (u64 *)(m->mem + KS_GPA_KERNEL_PD);
	t[0] = KS_GPA_KERNEL_PT | PTE_P | PTE_W | PTE_A;
	t = (u64 *)(m->mem + KS_GPA_KERNEL_PT);
	for (u64 gpa = KS_GPA_STUB; gpa < KS_GPA_SERVICE_PML4; gpa += 4096) {
		int code = gpa < KS_GPA_STUB + KS_STUB_PAGES * 4096;

		t[gpa >> 12] = gpa | PTE_P | PTE_A | PTE_D | (code ? 0 : PTE_W | PTE_NX);
	}
	t = (u64 *)(m->mem + KS_GPA_LINEAR_PDPT);
	for (u64 i = 0; i < 512; i++)
		t[i] = (KS_GPA_LINEAR_PDS + (i << 12)) | PTE_P | PTE_W | PTE_A;
	t = (u64 *)(m->mem + KS_GPA_SERVICE_PML4);
	t[KS_LINEAR_PML4] = KS_GPA_LINEAR_PDPT | PTE_P | PTE_W | PTE_A;
	t[KS_STUB_PML4] = KS_GPA_KERNEL_PDPT | PTE_P | PTE_W | PTE_A;
	m->shared = (struct ks_shared *)(m->mem + KS_GPA_SHARED);
}

/* Entries only appear here, which needs no invalidation. */
static void add_linear(struct ks_machine *m, u64 gpa, u64 length)
{
	u64 *pds = (u64 *)(m->mem + KS_GPA_LINEAR_PDS);

	for (u64 at = gpa; at < gpa + length; at += 2 << 20)
		pds[at >> 21] = at | PTE_P | PTE_W | PTE_A | PTE_D | PTE_PS | PTE_NX;
}

/* RAM and our own memory also appear in the linear map; file windows (readonly < 0) do not: ring 0 has no business there. */
int ks_set_memslot(struct ks_machine *m, int slot, uint64_t gpa, uint64_t length, int file)
{
	struct kvm_userspace_memory_region region = { .slot = slot, .guest_phys_addr = gpa, .memory_size = length,
						      .userspace_addr = (u64)(m->mem + gpa) };

	if (ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return -errno;
	if (!file && length)
		add_linear(m, gpa, length);
	return 0;
}

static int set_msrs(int vcpu, const struct kvm_msr_entry *entries, int n)
{
	struct { struct kvm_msrs head; struct kvm_msr_entry entry[8]; } m = { .head.nmsrs = n };

	memcpy(m.entry, entries, n * sizeof(*entries));
	if (ioctl(vcpu, KVM_SET_MSRS, &m) != n)
		return errno ? -errno : -EINVAL;
	return 0;
}

static int read_cpuid(struct ks_machine *m)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + 256 * sizeof(struct kvm_cpuid_entry2));
	u32 kept = 0;

	if (!c)
		return -ENOMEM;
	m->cpuid = c;
	c->nent = 256;
	if (ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, c) < 0)
		return -errno;
	for (u32 i = 0; i < c->nent; i++) {
		struct kvm_cpuid_entry2 *e = &c->entries[i];

		if (e->function >= 0x40000000 && e->function < 0x50000000)
			continue;	/* hypervisor leaves */
		if (e->function == 1)
			e->ecx &= ~(1u << 31);
		if (e->function == 0xd && e->index == 0) {
			e->eax &= (u32)m->xcr0;
			e->edx = 0;
		}
		c->entries[kept++] = *e;
	}
	c->nent = kept;
	return 0;
}

static void fill_sregs(struct ks_machine *m)
{
	struct kvm_sregs *s = &m->sregs;

	s->cr0 = KS_CR0;
	s->cr3 = KS_GPA_SERVICE_PML4;
	s->cr4 = KS_CR4;
	s->efer = KS_EFER;
	s->gdt.base = KS_STUB_BASE + KS_GPA_GDT;
	s->gdt.limit = 0x7f;
	s->idt.base = KS_STUB_BASE + (m->ring0 ? KS_GPA_IDT_RING0 : KS_GPA_IDT_RING3);
	s->idt.limit = 32 * 16 - 1;
	s->tr = (struct kvm_segment){ .limit = KS_SUP_TSS_LIMIT, .selector = KS_TSS_SELECTOR, .type = 11, .present = 1 };
	/* No LDT. At reset there is one, at linear address 0: the application's selectors must not find descriptors there. */
	s->ldt = (struct kvm_segment){ .type = 2, .unusable = 1 };
	if (m->ring0) {
		s->cs = ks_segment(KS_KERNEL_CS, 11, 0, 1);
		s->ss = s->ds = s->es = s->fs = s->gs = ks_segment(KS_KERNEL_DS, 3, 0, 0);
	} else {
		s->cs = ks_segment(KS_USER_CS, 11, 3, 1);
		s->ss = ks_segment(KS_USER_DS, 3, 3, 0);
	}
	s->ds = s->es = s->fs = s->gs = ks_segment(0, 3, 3, 0);
	s->ds.unusable = s->es.unusable = s->fs.unusable = s->gs.unusable = 1;
	s->ds.present = s->es.present = s->fs.present = s->gs.present = 0;
}

static int check(int rc, const char *operation, const char **failed)
{
	if (rc >= 0)
		return 0;
	*failed = operation;
	return errno ? -errno : -EIO;
}

/* A vCPU with everything set that stays; in *out also when it fails (ks_machine_free cleans up). */
static int make_vcpu(struct ks_machine *m, struct ks_vcpu **out, const char **failed)
{
	struct ks_vcpu *v = aligned_alloc(64, (sizeof(*v) + 63) & ~63ul);
	struct ks_runner *r = calloc(1, sizeof(*r));
	struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs[0].value = m->xcr0 };
	struct kvm_sregs sregs;
	int rc;

	if (!v || !r) {
		free(v);
		free(r);
		return -ENOMEM;
	}
	memset(v, 0, sizeof(*v));
	v->m = r->m = m;
	v->on = r;
	r->seat = v;
	v->id = m->nvcpus;
	v->running = -1;
	v->owner = KS_IDLE;
	r->where = KS_RUNNING;	/* until its thread waits */
	r->fd = ioctl(m->vm, KVM_CREATE_VCPU, v->id);
	if (r->fd < 0) {
		free(v);
		free(r);
		return check(-1, "KVM_CREATE_VCPU", failed);
	}
	m->vcpus[m->nvcpus++] = v;
	ks_tsc_as_host(r->fd);
	r->run = mmap(NULL, m->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, 0);
	if (r->run == MAP_FAILED) {
		r->run = NULL;
		return check(-1, "mmap of kvm_run", failed);
	}
	r->run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	r->sup = m->mem + KS_GPA_SUPERVISOR + v->id * 4096;
	r->sup_va = KS_LINEAR_BASE + KS_GPA_SUPERVISOR + v->id * 4096;
	*(u64 *)(r->sup + 4) = r->sup_va + KS_SUP_STACK;	/* RSP0 */
	*(uint16_t *)(r->sup + 102) = KS_SUP_BITMAP;
	r->sup[KS_SUP_BITMAP] = m->ring0 ? 0xff : KS_PORTS_OPEN;
	r->sup[KS_SUP_BITMAP + 1] = r->sup[KS_SUP_BITMAP + 2] = 0xff;

	if ((rc = check(ioctl(r->fd, KVM_SET_CPUID2, m->cpuid), "KVM_SET_CPUID2", failed)) ||
	    (rc = check(ioctl(r->fd, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS", failed)))
		return rc;
	if (!m->sregs.cr0) {
		m->sregs = sregs;
		fill_sregs(m);
	}
	sregs = m->sregs;
	sregs.apic_base = m->sregs.apic_base;
	sregs.tr.base = r->sup_va + KS_SUP_TSS;
	if ((rc = check(ioctl(r->fd, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS", failed)) ||
	    (rc = check(ioctl(r->fd, KVM_SET_XCRS, &xcrs), "KVM_SET_XCRS", failed)))
		return rc;
	struct kvm_msr_entry msrs[] = {
		{ .index = MSR_STAR, .data = (u64)0x23 << 48 | (u64)KS_KERNEL_CS << 32 },
		{ .index = MSR_LSTAR, .data = m->ring0 ? STUB_n_syscall : STUB_u_entry },
		{ .index = MSR_SFMASK, .data = m->ring0 ? 0x47700 : 0 },	/* AC NT IOPL DF IF TF */
	};
	rc = set_msrs(r->fd, msrs, 3);
	if (rc)
		*failed = "KVM_SET_MSRS";
	*out = v;
	return rc;
}

int ks_vcpu_new(struct ks_machine *m, struct ks_vcpu **out, const char **failed)
{
	struct ks_vcpu *v;
	pthread_attr_t attributes;
	sigset_t all, before;
	int rc;

	if (m->nvcpus >= KS_MAX_VCPUS)
		return -EAGAIN;
	rc = make_vcpu(m, &v, failed);
	if (rc)
		return rc;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 128 << 10);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);	/* the runner never sees a signal of Python's */
	rc = pthread_create(&v->on->thread, &attributes, ks_runner, v->on);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	if (rc) {
		*failed = "pthread_create";
		return -rc;
	}
	while (atomic_load(&v->on->where) != KS_STOPPED)
		sched_yield();
	*out = v;
	return 0;
}

static u32 read_mxcsr_mask(void)
{
	struct { uint8_t b[512]; } __attribute__((aligned(16))) area;
	u32 mask;

	memset(&area, 0, sizeof(area));
	__asm__ volatile("fxsave64 %0" : "=m"(area));
	memcpy(&mask, area.b + 28, 4);
	return mask ? mask : 0xffbf;
}

int ks_machine_new(int kvm, int ring0, uint64_t xcr0, void *mem, struct ks_machine **out, const char **failed)
{
	struct ks_machine *m = calloc(1, sizeof(*m));
	struct epoll_event event = { .events = EPOLLIN };
	int rc;

	if (!m)
		return -ENOMEM;
	*out = m;
	m->vm = m->bell = m->epoll = m->timer = -1;
	m->kvm = kvm;
	m->ring0 = ring0;
	m->xcr0 = xcr0;
	m->mem = mem;
	m->have_pwait2 = 1;
	m->mxcsr_mask = read_mxcsr_mask();
	m->ncpus = sched_getaffinity(0, sizeof(m->place.allowed), &m->place.allowed) ? 1 : CPU_COUNT(&m->place.allowed);
	m->vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if ((rc = check(m->vm, "KVM_CREATE_VM", failed)))
		return rc;
	m->run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	m->bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	m->epoll = epoll_create1(EPOLL_CLOEXEC);
	m->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if ((rc = check(m->bell, "eventfd", failed)) || (rc = check(m->epoll, "epoll_create1", failed)) ||
	    (rc = check(m->timer, "timerfd_create", failed)))
		return rc;
	/* Edges: each ring is told once, and nobody needs to read the counter (2^64 rings fill it). */
	event.events = EPOLLIN | EPOLLET;
	event.data.fd = m->bell;
	if ((rc = check(epoll_ctl(m->epoll, EPOLL_CTL_ADD, m->bell, &event), "epoll_ctl", failed)))
		return rc;
	event.events = EPOLLIN;
	event.data.fd = m->timer;
	if ((rc = check(epoll_ctl(m->epoll, EPOLL_CTL_ADD, m->timer, &event), "epoll_ctl", failed)))
		return rc;
	struct kvm_ioeventfd bell = { .addr = KS_PORT_DOORBELL, .len = 1, .fd = m->bell, .flags = KVM_IOEVENTFD_FLAG_PIO };
	if ((rc = check(ioctl(m->vm, KVM_IOEVENTFD, &bell), "KVM_IOEVENTFD", failed)))
		return rc;
	fill_memory(m);
	rc = ks_set_memslot(m, 0, 0, KS_MACHINE_SIZE, 0);
	if (rc) {
		*failed = "KVM_SET_USER_MEMORY_REGION";
		return rc;
	}
	rc = read_cpuid(m);
	if (rc) {
		*failed = "KVM_GET_SUPPORTED_CPUID";
		return rc;
	}
	rc = make_vcpu(m, &m->service, failed);
	if (rc)
		return rc;
	rc = ioctl(m->service->on->fd, KVM_GET_TSC_KHZ, 0);
	m->tsc_khz = rc > 0 ? rc : 1000000;
	m->shared->spins = 20000;
	m->tick_us = m->tsc_khz >= 1000 ? m->tsc_khz / 1000 : 1;
	ks_place_init(m);
	ks_spin_init(&m->spin, m->tick_us);
	return 0;
}

void ks_machine_free(struct ks_machine *m)
{
	/* vCPU 0 is the service's and has no thread. */
	for (u32 i = 0; i < m->nvcpus; i++) {
		struct ks_vcpu *v = m->vcpus[i];

		if (v->on->thread) {
			u32 guest = KS_GUEST;

			atomic_compare_exchange_strong(&v->owner, &guest, KS_TAKEN);
			ks_halt(v);
			atomic_store(&v->owner, KS_EXIT);
			atomic_fetch_add(&v->on->bell, 1);
			ks_futex_wake(&v->on->bell);
			pthread_join(v->on->thread, NULL);
		}
		if (v->on->run)
			munmap(v->on->run, m->run_size);
		close(v->on->fd);
		free(v->on);
		free(v);
	}
	int fds[] = { m->vm, m->bell, m->epoll, m->timer };
	for (int i = 0; i < 4; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	free(m->cpuid);
	free(m);
}

/* Runs ring 0 code of the stub on the service vCPU until it says done. */
static int serve(struct ks_machine *m, u64 rip, u64 rdi, u64 rsi, u64 rcx, u64 cr3)
{
	struct ks_vcpu *v = m->service;
	struct kvm_run *run = v->on->run;
	struct kvm_sregs *s = &run->s.regs.sregs;

	m->count_services++;
	*s = m->sregs;
	s->cs = ks_segment(KS_KERNEL_CS, 11, 0, 1);
	s->ss = ks_segment(KS_KERNEL_DS, 3, 0, 0);
	s->tr.base = v->on->sup_va + KS_SUP_TSS;
	s->cr3 = cr3;
	run->s.regs.regs = (struct kvm_regs){ .rip = rip, .rdi = rdi, .rsi = rsi, .rcx = rcx, .rflags = 2,
					      .rsp = v->on->sup_va + KS_SUP_STACK };
	run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	for (;;) {
		int rc = ioctl(v->on->fd, KVM_RUN, 0);

		run->kvm_dirty_regs = 0;
		if (rc < 0 && errno == EINTR)
			continue;
		if (rc < 0)
			return -errno;
		if (run->exit_reason == KVM_EXIT_IO && run->io.port == KS_PORT_DONE)
			return 0;
		if (run->exit_reason != KVM_EXIT_INTR)
			return -EPROTO;
	}
}

/* `places`: GPAs in page-table pages, see s_touch. */
int ks_touch(struct ks_machine *m, uint64_t cr3, const uint64_t *places, int n)
{
	u64 *list = (u64 *)(m->mem + KS_GPA_SERVICE);

	for (int done = 0; done < n;) {
		int some = n - done < 512 ? n - done : 512, rc;

		for (int i = 0; i < some; i++)
			list[i] = KS_LINEAR_BASE + places[done + i];
		rc = serve(m, STUB_s_touch, 0, KS_STUB_BASE + KS_GPA_SERVICE, some, cr3);
		if (rc)
			return rc;
		done += some;
	}
	return 0;
}

int ks_flush_tlbs(struct ks_machine *m)
{
	int rc = serve(m, STUB_s_flush, KS_STUB_BASE + KS_GPA_FLUSH, 0, 0, KS_GPA_SERVICE_PML4);

	if (rc)
		return rc;
	/* KVM's MMU notifier takes the page from the guest and flushes every vCPU's TLB before madvise returns. */
	return madvise(m->mem + KS_GPA_FLUSH, 4096, MADV_DONTNEED) < 0 ? -errno : 0;
}

int ks_epoll_fd(struct ks_machine *m) { return m->epoll; }

uint64_t ks_counter(struct ks_machine *m, int which)
{
	u64 c[] = { m->count_events, m->count_sleeps, m->count_spins, m->count_doorbells, m->nvcpus, m->count_services,
		    m->count_trades, m->tsc_khz };

	return c[which];
}

uint64_t ks_vcpu_counter(struct ks_vcpu *v, int which)
{
	return v->on->exits[which];
}

/*
 * KVM starts a guest's time-stamp counter at 0 by an offset; without one all vCPUs read the same, the host's. Hosts that
 * don't know the attribute (before Linux 5.16, or without an offset at all) refuse; the probe tells what RDTSC reads then.
 */
void ks_tsc_as_host(int vcpu)
{
	u64 zero = 0;
	struct kvm_device_attr offset = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (u64)&zero };

	ioctl(vcpu, KVM_SET_DEVICE_ATTR, &offset);
}

const void *ks_vdso(uint64_t *length)
{
	*length = sizeof(ks_vdso_blob);
	return ks_vdso_blob;
}

uint64_t ks_host_ticks(void) { return ks_ticks(); }

uint32_t ks_id(struct ks_vcpu *v) { return v->id; }

u64 ks_runner_ns(const struct ks_runner *r)
{
	struct timespec t;
	clockid_t clock;

	if (pthread_getcpuclockid(r->thread, &clock) || clock_gettime(clock, &t))
		return 0;
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

uint64_t ks_cpu_ns(struct ks_vcpu *v) { return v->cpu_offset + ks_runner_ns(v->on); }
void *ks_regs(struct ks_vcpu *v) { return v->regs; }
void *ks_call(struct ks_vcpu *v) { return v->call; }
uint64_t ks_fault_address(struct ks_vcpu *v) { return v->fault_address; }
uint64_t ks_error_code(struct ks_vcpu *v) { return v->error_code; }
uint32_t ks_vector(struct ks_vcpu *v) { return v->vector; }
int ks_owner(struct ks_vcpu *v) { return v->owner; }
int ks_where(struct ks_vcpu *v) { return v->on->where; }
