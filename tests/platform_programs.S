/*
 * What the vCPU tests run in ring 3, at 0x400000, position independent. The data page is at 0x600000.
 * System call numbers are the tests' own: 1000 and up.
 */
	.text
	.globl p_hello
p_hello:		/* three system calls with six arguments, the last says what the others gave */
	mov $1001, %eax
	mov $1, %edi
	mov $2, %esi
	mov $3, %edx
	mov $4, %r10d
	mov $5, %r8d
	mov $6, %r9d
	syscall
	mov %rax, %rbx
	mov $1002, %eax
	syscall
	mov %rax, %rsi
	mov %rbx, %rdi
	mov $1003, %eax
	syscall
	ud2

	.globl p_loop
p_loop:			/* rbx system calls, then 1003 */
1:	mov $39, %eax
	syscall
	dec %rbx
	jnz 1b
	mov $1003, %eax
	syscall
	ud2

	.globl p_jumps
p_jumps:		/* the same, straight to the ring 3 entry for patched call sites (its address in rbp) */
1:	mov $39, %eax
	lea 2f(%rip), %r11
	jmp *%rbp
2:	dec %rbx
	jnz 1b
	mov $1003, %eax
	syscall
	ud2

	.globl p_ids
p_ids:			/* counts answers that are not rbp, for ever */
	xor %r12d, %r12d
1:	mov $39, %eax
	mov %rbp, %rdi
	mov %r12, %rsi
	syscall
	cmp %rax, %rbp
	je 1b
	inc %r12
	jmp 1b

	.globl p_syscall
p_syscall:		/* as it stands: the test sets the registers */
	syscall
	.globl p_syscall_done
p_syscall_done:
	ud2

	.globl p_flags
p_flags:		/* pushes rbx as flags, makes a call, gives the flags after it */
	push %rbx
	popfq
	mov $1001, %eax
	syscall
	pushfq
	cld
	pop %rdi
	mov $1003, %eax
	syscall
	ud2

	.globl p_spin
p_spin:			/* counts in rbx until kicked */
1:	inc %rbx
	jmp 1b

	.globl p_await
p_await:		/* a call for each change of the word at rdi */
	mov $1001, %eax
	syscall
1:	pause
	mov (%rdi), %rax
	cmp %rax, %rbx
	je 1b
	mov %rax, %rbx
	jmp p_await

	.globl p_int3, p_ud2, p_div0, p_gp, p_load, p_store, p_port
p_int3:	int3
	mov $1003, %eax
	syscall
p_ud2:	ud2
p_div0:	xor %ecx, %ecx
	mov $1, %eax
	xor %edx, %edx
	div %ecx
	ud2
p_gp:	hlt
p_port:	out %al, $0
	ud2
p_load:	mov (%rdi), %rax
	mov %rax, %rdi
	mov $1003, %eax
	syscall
	ud2
p_store: mov %rsi, (%rdi)
	mov $1003, %eax
	syscall
	ud2

	.globl p_fs
p_fs:			/* reads what FS points at, before and after a call */
	mov %fs:0, %rbx
	mov $1001, %eax
	syscall
	mov %fs:0, %rsi
	mov %rbx, %rdi
	mov $1003, %eax
	syscall
	ud2

	.globl p_gs
p_gs:			/* an own GS base: rdi; calls go on working, and GS is kept */
	wrgsbase %rdi
	mov $1001, %eax
	mov $7, %esi
	syscall
	mov %rax, %rbx
	mov %gs:8, %rsi
	rdgsbase %rdx
	mov %rbx, %rdi
	mov $1003, %eax
	syscall
	ud2

	.globl p_avx
p_avx:			/* fills ymm0-15 from the data page, makes a call, stores them behind */
	mov $0x600000, %r13d
	vmovdqu (%r13), %ymm0
	vmovdqu 32(%r13), %ymm1
	vmovdqu 480(%r13), %ymm15
	mov $1001, %eax
	syscall
	vmovdqu %ymm0, 1024(%r13)
	vmovdqu %ymm1, 1056(%r13)
	vmovdqu %ymm15, 1504(%r13)
	mov $1003, %eax
	syscall
	ud2

	.globl p_avx512
p_avx512:
	mov $0x600000, %r13d
	vmovdqu64 (%r13), %zmm0
	vmovdqu64 64(%r13), %zmm31
	kmovq 128(%r13), %k3
	mov $1001, %eax
	syscall
	vmovdqu64 %zmm0, 1024(%r13)
	vmovdqu64 %zmm31, 1088(%r13)
	kmovq %k3, 1152(%r13)
	mov $1003, %eax
	syscall
	ud2

	.globl p_seen
p_seen:			/* xmm0, mxcsr and x87 control word as a new thread finds them */
	mov $0x600000, %r13d
	movdqu %xmm0, (%r13)
	stmxcsr 16(%r13)
	fnstcw 20(%r13)
	movdqu %xmm9, 32(%r13)
	mov $1003, %eax
	syscall
	ud2

	.globl p_stores
p_stores:		/* stores rbx, counted up, to (rdi) for ever; a call every 2^16 */
1:	inc %rbx
	mov %rbx, (%rdi)
	jmp 1b

	.globl p_forge
p_forge:		/* writes rsi to the state word of the channel at rdi for ever */
1:	mov %esi, (%rdi)
	jmp 1b
