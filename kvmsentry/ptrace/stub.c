/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stub: the executor's code, and how the first stub process comes to be. The others are its copies.
 *
 * The way there: fork; the child clones itself once more with CLONE_VM | CLONE_PARENT and ends. What is left is a child of
 * the Sentry's with memory of its own, and without what glibc had registered with the kernel for its thread (rseq), which a
 * plain fork keeps. It waits on a pipe until it is traced, gives up what it has, and traps in the executor. From then on it
 * executes only what the tracer sets; a seccomp filter holds the executor to the calls it needs and allows none from elsewhere.
 */
#include "pt.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "api.h"

/*
 * R15: the list, R14: how many. Each entry: number, RDI RSI RDX R10 R8 R9. Ends at pt_code_done, or at pt_code_failed with
 * -errno in RAX and R15 at the entry. The scratch page starts as the template: struct msghdr, then its iovec.
 */
__asm__(
	".pushsection .rodata\n"
	".globl pt_code_start, pt_code_end, pt_code_run, pt_code_call, pt_code_done, pt_code_failed\n"
	".balign 16\n"
	"pt_code_start:\n"
	"pt_code_run:\n"
	"	lea	9f(%rip), %rsi\n"
	"	movabs	$0x7fffffff1000, %rdi\n"
	"	mov	$128, %ecx\n"
	"	cld\n"
	"	rep movsb\n"
	"1:	mov	(%r15), %rax\n"
	"	mov	8(%r15), %rdi\n"
	"	mov	16(%r15), %rsi\n"
	"	mov	24(%r15), %rdx\n"
	"	mov	32(%r15), %r10\n"
	"	mov	40(%r15), %r8\n"
	"	mov	48(%r15), %r9\n"
	"	syscall\n"
	"pt_code_call:\n"
	"	cmp	$-4095, %rax\n"
	"	jae	2f\n"
	"	add	$56, %r15\n"
	"	dec	%r14\n"
	"	jnz	1b\n"
	"	int3\n"
	"pt_code_done:\n"
	"2:	int3\n"
	"pt_code_failed:\n"
	"	.balign 16\n"
	"9:	.quad	0, 0\n"				/* msg_name, msg_namelen */
	"	.quad	0x7fffffff1040, 1\n"		/* msg_iov, msg_iovlen */
	"	.quad	0x7fffffff1100, 1040\n"		/* msg_control, msg_controllen: SCM_MAX_FD descriptors */
	"	.quad	0, 0\n"				/* msg_flags */
	"	.quad	0x7fffffff1080, 1\n"		/* the iovec */
	"	.fill	6, 8, 0\n"
	"pt_code_end:\n"
	".popsection\n");

static long sys(long nr, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#define CODE(label) (PT_STUB + (u64)(label - pt_code_start))

struct birth {
	int memfd, sock, tell, go;
	u64 list;
	struct sock_fprog filter;
};

/* seccomp: the executor's calls only; whatever else gets here (the vsyscall page) is SIGSYS, which the tracer sees. */
#define ALLOW(nr) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
static struct sock_filter rules[] = {
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 4),
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PT_STUB >> 32, 0, 2),
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer)),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0 /* CODE(pt_code_call), filled in */, 1, 0),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	ALLOW(SYS_mmap), ALLOW(SYS_munmap), ALLOW(SYS_mprotect), ALLOW(SYS_recvmsg), ALLOW(SYS_close_range), ALLOW(SYS_close),
	ALLOW(SYS_clone),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
};

/* Runs with memory of its own that is a copy of the Sentry's; libc is out of reach (its locks, its errno). */
static void __attribute__((noreturn, noinline)) born(struct birth *b)
{
	const long private = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	struct __user_cap_header_struct caps = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct none[2] = { 0 };
	int pid = sys(SYS_getpid, 0, 0, 0, 0, 0, 0), memfd, sock;
	char go;

	/* The tracer may be undumpable by now, and this with it: tracing wants it dumpable (ptrace(2)). */
	sys(SYS_prctl, PR_SET_DUMPABLE, 1, 0, 0, 0, 0);
	sys(SYS_write, b->tell, (long)&pid, sizeof(pid), 0, 0, 0);
	if (sys(SYS_read, b->go, (long)&go, 1, 0, 0, 0) != 1)
		goto failed;

	memfd = sys(SYS_fcntl, b->memfd, F_DUPFD, 200, 0, 0, 0);
	sock = sys(SYS_fcntl, b->sock, F_DUPFD, 200, 0, 0, 0);
	sys(SYS_dup2, memfd, 0, 0, 0, 0, 0);
	sys(SYS_dup2, sock, 1, 0, 0, 0, 0);
	if (sys(SYS_close_range, 2, ~0U, 0, 0, 0, 0) < 0)
		for (int fd = 2; fd < 65536; fd++)
			sys(SYS_close, fd, 0, 0, 0, 0, 0);
	if (sys(SYS_mmap, PT_STUB, 0x2000, PROT_READ | PROT_WRITE, private, -1, 0) != (long)PT_STUB)
		goto failed;
	if (sys(SYS_mmap, PT_LIST, PT_LIST_LENGTH, PROT_READ, MAP_SHARED | MAP_FIXED, 0, b->list) != (long)PT_LIST)
		goto failed;
	for (const char *from = pt_code_start; from < pt_code_end; from++)
		((volatile char *)PT_STUB)[from - pt_code_start] = *from;
	if (sys(SYS_mprotect, PT_STUB, 0x1000, PROT_READ | PROT_EXEC, 0, 0, 0))
		goto failed;
	if (sys(SYS_capset, (long)&caps, (long)none, 0, 0, 0, 0))
		goto failed;
	if (sys(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0))
		goto failed;
	if (sys(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, (long)&b->filter, 0, 0, 0))
		goto failed;
	__asm__ volatile("jmp *%0" : : "r"(CODE(pt_code_done) - 1) : "memory");
failed:
	sys(SYS_exit_group, 1, 0, 0, 0, 0, 0);
	__builtin_unreachable();
}

static int child_of_child(struct birth *b, char *stack)
{
	register struct birth *arg __asm__("rbx") = b;	/* callee saved, so alive in the clone, which returns here too */
	register void (*fn)(struct birth *) __asm__("r12") = born;
	long result;

	__asm__ volatile(
		"syscall\n"
		"	test	%%rax, %%rax\n"
		"	jnz	1f\n"
		"	mov	%%rbx, %%rdi\n"
		"	call	*%%r12\n"
		"1:\n"
		: "=a"(result)
		: "a"((long)SYS_clone), "D"((long)(CLONE_VM | CLONE_PARENT)), "S"(stack), "d"(0L), "r"(arg), "r"(fn)
		: "rcx", "r11", "memory");
	return result;
}

static int read_all(int fd, void *to, size_t n)
{
	ssize_t got;

	do
		got = read(fd, to, n);
	while (got < 0 && errno == EINTR);
	return got == (ssize_t)n ? 0 : -1;
}

int pt_start(struct pt_tracer *m, int memfd, int sock, uint64_t list, void *ops, struct pt_thread **out, const char **failed)
{
	const long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK;
	struct birth b = { .memfd = memfd, .sock = sock, .list = list };
	int tell[2], go[2], status, pid = -1, child, rc;
	u32 at;
	char *stack;
	u64 *op = ops;

	_Static_assert(PT_STUB == 0x7fffffff0000ULL, "the executor's template names addresses");
	rules[5].k = (u32)CODE(pt_code_call);
	b.filter.len = sizeof(rules) / sizeof(rules[0]);
	b.filter.filter = rules;
	*failed = "pipe";
	if (pipe2(tell, O_CLOEXEC) < 0)
		return -errno;
	if (pipe2(go, O_CLOEXEC) < 0) {
		rc = -errno;
		close(tell[0]);
		close(tell[1]);
		return rc;
	}
	b.tell = tell[1];
	b.go = go[0];
	*failed = "mmap";
	stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	rc = stack == MAP_FAILED ? -errno : 0;
	if (rc)
		goto out_pipes;
	*failed = "starting a stub process";
	child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);	/* all that come after end with this signal too */
	if (child < 0) {
		rc = -errno;
		goto out_stack;
	}
	if (child == 0) {
		sys(SYS_close, go[1], 0, 0, 0, 0, 0);	/* else the copy would wait for itself should the Sentry die */
		rc = child_of_child(&b, stack + 65536 - 64);
		sys(SYS_exit_group, rc < 0, 0, 0, 0, 0, 0);
		__builtin_unreachable();
	}
	rc = -ECHILD;
	while (waitpid(child, &status, __WALL) < 0 && errno == EINTR)
		;
	close(tell[1]);
	tell[1] = -1;
	if (!WIFEXITED(status) || WEXITSTATUS(status) || read_all(tell[0], &pid, sizeof(pid)))
		goto out_stack;
	*failed = "PTRACE_SEIZE";
	if (ptrace(PTRACE_SEIZE, pid, 0, options) < 0) {
		rc = -errno;
		goto out_kill;
	}
	*failed = "stub process";
	if (write(go[1], "", 1) != 1)
		goto out_kill;
	for (;;) {
		if (waitpid(pid, &status, __WALL) < 0) {
			if (errno == EINTR)
				continue;
			rc = -errno;
			goto out_stack;
		}
		if (!WIFSTOPPED(status)) {
			rc = -ECHILD;
			goto out_stack;
		}
		if (WSTOPSIG(status) == SIGTRAP && status >> 16 == 0)
			break;
		if (WSTOPSIG(status) == SIGSEGV || WSTOPSIG(status) == SIGSYS) {
			rc = -EFAULT;
			goto out_kill;
		}
		ptrace(PTRACE_CONT, pid, 0, 0);
	}
	*out = pt_thread_new(m, pid);
	rc = *out ? 0 : -ENOMEM;
	if (rc)
		goto out_kill;
	m->ops = ops;
	m->started = 1;
	/* All that it has of the Sentry's: gone, with its vdso; the stub's pages reach to the end of user space. */
	*failed = "munmap in the stub process";
	memset(op, 0, 7 * sizeof(*op));
	op[0] = SYS_munmap;
	op[2] = PT_STUB;
	rc = pt_run(m, *out, 1, &at);
	if (rc >= 0)
		goto out_stack;
out_kill:
	kill(pid, SIGKILL);
	while (waitpid(pid, &status, __WALL) < 0 && errno == EINTR)
		;
out_stack:
	munmap(stack, 65536);
out_pipes:
	close(tell[0]);
	if (tell[1] >= 0)
		close(tell[1]);
	close(go[0]);
	close(go[1]);
	return rc;
}

uint64_t pt_stub_base(void)
{
	return PT_STUB;
}

uint64_t pt_list_length(void)
{
	return PT_LIST_LENGTH;
}
