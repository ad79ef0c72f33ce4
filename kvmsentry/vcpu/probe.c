/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Asks the host, instead of assuming, how its KVM behaves where the machine depends on it: a throw-away VM of 2 MiB,
 * a few instructions in each ring. Takes some milliseconds; kvmsentry/vcpu/traits.py keeps the answers.
 */
#include "ks.h"

#include <cpuid.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "api.h"

/* Guest-physical layout, a page each; the first 2 MiB are mapped one to one, user-accessible but for the first table. */
enum {
	GDT = 0x1000, TSS = 0x2000, IDT = 0x3000, PML4 = 0x4000, PDPT = 0x5000, PD = 0x6000, PT = 0x7000,
	KCODE = 0x8000, KSTACK = 0x9000, UCODE = 0xa000, USTACK = 0xb000, DATA = 0xc000, DATA_A = 0xd000, DATA_B = 0xe000,
	RAM = 2 << 20,
};
enum { P_DONE = 0x21, P_RING0 = 0x10, P_TRAP = 0x31 };

__asm__(".section .rodata\n"
	".globl ksp_k, ksp_k_end, ksp_syscall, ksp_trap, ksp_spin, ksp_cr3, ksp_u, ksp_u_end, ksp_u_syscall, ksp_u_store, ksp_u_bases, ksp_u_tsc\n"
	"ksp_k:\n"
	"ksp_syscall: out %al,$0x10; 1: jmp 1b\n"
	"ksp_trap:    out %al,$0x31; 1: jmp 1b\n"
	"ksp_spin: 1: dec %rbx; jnz 1b; out %al,$0x21\n"
	"ksp_cr3:     mov %cr3,%rax; mov %rax,%cr3; out %al,$0x21\n"
	"ksp_k_end:\n"
	"ksp_u:\n"
	"ksp_u_syscall: syscall; ud2\n"
	"ksp_u_store:   mov %rbx,0xc000; ud2\n"
	"ksp_u_bases:   rdgsbase %rcx; wrfsbase %rcx; mov $7,%ebx; ud2\n"
	"ksp_u_tsc:     rdtsc; shl $32,%rdx; lea (%rax,%rdx),%rbx; ud2\n"
	"ksp_u_end:\n.previous\n");
extern char ksp_k[], ksp_k_end[], ksp_syscall[], ksp_trap[], ksp_spin[], ksp_cr3[], ksp_u[], ksp_u_end[], ksp_u_syscall[],
	ksp_u_store[], ksp_u_bases[], ksp_u_tsc[];
#define K(label) (KCODE + ((label) - ksp_k))
#define U(label) (UCODE + ((label) - ksp_u))

struct probe {
	uint8_t *mem;
	int vm, vcpu;
	struct kvm_run *run;
	struct ks_traits *t;
};

static u64 now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (u64)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int refused(struct probe *p, const char *operation)
{
	p->t->failed = operation;
	p->t->error = errno;
	return -1;
}

/* Runs from rip in the ring; returns the port at which the guest reports, -1 on failure. */
static int run_at(struct probe *p, int ring, u64 rip, u64 rbx)
{
	struct kvm_sregs s;
	struct kvm_regs r = { .rip = rip, .rbx = rbx, .rflags = 2, .rsp = (ring ? USTACK : KSTACK) + 0xff0 };

	if (ioctl(p->vcpu, KVM_GET_SREGS, &s) < 0)
		return refused(p, "KVM_GET_SREGS");
	s.cs = ring ? ks_segment(KS_USER_CS, 11, 3, 1) : ks_segment(KS_KERNEL_CS, 11, 0, 1);
	s.ss = ring ? ks_segment(KS_USER_DS, 3, 3, 0) : ks_segment(KS_KERNEL_DS, 3, 0, 0);
	if (ioctl(p->vcpu, KVM_SET_SREGS, &s) < 0 || ioctl(p->vcpu, KVM_SET_REGS, &r) < 0)
		return refused(p, "KVM_SET_SREGS");
	for (;;) {
		if (ioctl(p->vcpu, KVM_RUN, 0) < 0) {
			if (errno == EINTR)
				continue;
			return refused(p, "KVM_RUN");
		}
		if (p->run->exit_reason == KVM_EXIT_IO)
			return p->run->io.port;
		errno = EPROTO;
		return refused(p, "KVM_RUN of the probe");
	}
}

static int build(struct probe *p, int kvm)
{
	struct kvm_cpuid2 *cpuid;
	struct kvm_userspace_memory_region slot = { .memory_size = RAM };
	struct { struct kvm_msrs head; struct kvm_msr_entry entry[3]; } msrs = { .head.nmsrs = 3 };
	struct kvm_sregs s;
	u64 *t;
	int rc;

	p->vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (p->vm < 0)
		return refused(p, "KVM_CREATE_VM");
	p->mem = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (p->mem == MAP_FAILED) {
		p->mem = NULL;
		return refused(p, "mmap");
	}
	slot.userspace_addr = (u64)p->mem;
	if (ioctl(p->vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
		return refused(p, "KVM_SET_USER_MEMORY_REGION");
	p->vcpu = ioctl(p->vm, KVM_CREATE_VCPU, 0);
	if (p->vcpu < 0)
		return refused(p, "KVM_CREATE_VCPU");
	p->run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, p->vcpu, 0);
	if (p->run == MAP_FAILED) {
		p->run = NULL;
		return refused(p, "mmap of kvm_run");
	}
	cpuid = calloc(1, sizeof(*cpuid) + 256 * sizeof(struct kvm_cpuid_entry2));
	cpuid->nent = 256;
	rc = ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid) < 0 ? refused(p, "KVM_GET_SUPPORTED_CPUID") : 0;
	for (u32 i = 0; !rc && i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 *e = &cpuid->entries[i];

		if (e->function == 0xd && e->index == 0)
			p->t->xcr0 = (u64)e->edx << 32 | e->eax;
		if (e->function == 0x80000008)
			p->t->phys_bits = e->eax & 0xff;
	}
	if (!rc && ioctl(p->vcpu, KVM_SET_CPUID2, cpuid) < 0)
		rc = refused(p, "KVM_SET_CPUID2");
	free(cpuid);
	if (rc)
		return rc;

	memcpy(p->mem + KCODE, ksp_k, ksp_k_end - ksp_k);
	memcpy(p->mem + UCODE, ksp_u, ksp_u_end - ksp_u);
	t = (u64 *)(p->mem + GDT);
	t[2] = 0x00af9b000000ffffull;
	t[3] = 0x00cf93000000ffffull;
	t[5] = 0x00cff3000000ffffull;
	t[6] = 0x00affb000000ffffull;
	*(u64 *)(p->mem + TSS + 4) = KSTACK + 0xff0;
	for (int v = 0; v < 32; v++) {
		u32 *e = (u32 *)(p->mem + IDT + v * 16);

		e[0] = KS_KERNEL_CS << 16 | K(ksp_trap);
		e[1] = 0x8e00;
	}
	*(u64 *)(p->mem + PML4) = PDPT | 7;
	*(u64 *)(p->mem + PDPT) = PD | 7;
	*(u64 *)(p->mem + PD) = PT | 7;
	t = (u64 *)(p->mem + PT);
	for (u64 i = 0; i < 16; i++)	/* ring 3 pages are the last ones: SMEP is off, but a host may look at U all the same */
		t[i] = i << 12 | (i << 12 >= UCODE ? 0x67 : 0x63);
	t[DATA >> 12] = DATA_A | 0x67;

	if (ioctl(p->vcpu, KVM_GET_SREGS, &s) < 0)
		return refused(p, "KVM_GET_SREGS");
	s.cr0 = KS_CR0;
	s.cr3 = PML4;
	s.cr4 = KS_CR4;
	s.efer = KS_EFER;
	s.gdt.base = GDT;
	s.gdt.limit = 0x7f;
	s.idt.base = IDT;
	s.idt.limit = 0x1ff;
	s.tr = (struct kvm_segment){ .base = TSS, .limit = 0x67, .selector = KS_TSS_SELECTOR, .type = 11, .present = 1 };
	s.cs = ks_segment(KS_KERNEL_CS, 11, 0, 1);
	s.ss = s.ds = s.es = s.fs = s.gs = ks_segment(KS_KERNEL_DS, 3, 0, 0);
	if (ioctl(p->vcpu, KVM_SET_SREGS, &s) < 0)
		return refused(p, "KVM_SET_SREGS with FSGSBASE and OSXSAVE");
	msrs.entry[0] = (struct kvm_msr_entry){ .index = 0xc0000081, .data = (u64)0x23 << 48 | (u64)KS_KERNEL_CS << 32 };
	msrs.entry[1] = (struct kvm_msr_entry){ .index = 0xc0000082, .data = K(ksp_syscall) };
	msrs.entry[2] = (struct kvm_msr_entry){ .index = 0xc0000084, .data = 0x47700 };
	if (ioctl(p->vcpu, KVM_SET_MSRS, &msrs) != 3)
		return refused(p, "KVM_SET_MSRS");
	return 0;
}

/* Stores through a page, points its entry elsewhere from outside, reloads CR3 in the guest, stores again. */
static int outside_writes(struct probe *p)
{
	u64 *pt = (u64 *)(p->mem + PT);

	if (run_at(p, 3, U(ksp_u_store), 0x1111) < 0)
		return -1;
	pt[DATA >> 12] = DATA_B | 0x67;
	if (run_at(p, 0, K(ksp_cr3), 0) < 0 || run_at(p, 3, U(ksp_u_store), 0x2222) < 0)
		return -1;
	return *(volatile u64 *)(p->mem + DATA_B) == 0x2222;
}

static int measure(struct probe *p, int kvm)
{
	struct ks_traits *t = p->t;
	enum { LOOP = 2000 };
	u64 took, best = ~0ull;
	struct kvm_regs r;
	u32 a, b, c, d;
	int port;

	for (int i = 0; i < 3; i++) {	/* the first run pays for the shadow */
		took = now_ns();
		if (run_at(p, 0, K(ksp_spin), LOOP) < 0)
			return -1;
		took = now_ns() - took;
		best = took < best ? took : best;
	}
	/* An emulated instruction is 400 ns and more: 1.6 ms; a native loop plus one exit, even nested in software, much less. */
	t->ring0_ns100 = best * 100 / (2 * LOOP);
	t->ring0_native = t->ring0_ns100 < 20000;
	port = run_at(p, 3, U(ksp_u_syscall), 0);
	if (port < 0)
		return -1;
	t->syscall_ring0 = port == P_RING0;
	/* Some hosts don't list FSGSBASE in the CPUID they support, and have it: try. */
	if (run_at(p, 3, U(ksp_u_bases), 0) < 0)
		return -1;
	if (ioctl(p->vcpu, KVM_GET_REGS, &r) < 0)
		return refused(p, "KVM_GET_REGS");
	t->fsgsbase = r.rbx == 7;
	ks_tsc_as_host(p->vcpu);
	took = ks_ticks();
	if (run_at(p, 3, U(ksp_u_tsc), 0) < 0)
		return -1;
	if (ioctl(p->vcpu, KVM_GET_REGS, &r) < 0)
		return refused(p, "KVM_GET_REGS");
	t->tsc_is_hosts = r.rbx >= took && r.rbx <= ks_ticks();
	t->sees_outside_writes = outside_writes(p);
	if (t->sees_outside_writes < 0)
		return -1;
	t->sync_regs = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS);
	t->immediate_exit = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT);
	t->max_vcpus = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS);
	took = ioctl(p->vcpu, KVM_GET_TSC_KHZ, 0);
	t->tsc_khz = (int64_t)took > 0 ? took : 0;
	__cpuid(1, a, b, c, d);
	t->virtual = c >> 31;
	/* What XCR0 allows of XSAVE, and how large that is in the standard format (SDM vol. 1, 13.5.2). */
	t->xcr0 &= KS_XCR0_MASK;
	if ((t->xcr0 & 0xe0) != 0xe0 || !(t->xcr0 & 4))
		t->xcr0 &= 7;
	t->xsave_size = 576;
	for (int i = 2; i < 8; i++) {
		if (!(t->xcr0 >> i & 1))
			continue;
		__cpuid_count(0xd, i, a, b, c, d);
		if ((int)(a + b) > t->xsave_size)
			t->xsave_size = a + b;
	}
	return 0;
}

/* Returns 0, or -errno with t->failed set. */
int ks_probe(int kvm, struct ks_traits *t)
{
	struct probe p = { .vm = -1, .vcpu = -1, .t = t };
	int rc;

	memset(t, 0, sizeof(*t));
	rc = build(&p, kvm) || measure(&p, kvm);
	if (p.run)
		munmap(p.run, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	if (p.mem)
		munmap(p.mem, RAM);
	if (p.vcpu >= 0)
		close(p.vcpu);
	if (p.vm >= 0)
		close(p.vm);
	return rc ? -(t->error ? t->error : EIO) : 0;
}
