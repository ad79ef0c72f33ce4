// SPDX-License-Identifier: Apache-2.0
/* Single system calls: the way into the kernel and back, with little or a page of data. */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static char page[4096], path[4096];
static int file = -1, zero = -1, null = -1;
static volatile sig_atomic_t arrived;

static void getpid_(long n)
{
	long pid = getpid();

	while (n--)
		expect(syscall(SYS_getpid) == pid);
}

static void clock_(long n)
{
	struct timespec before = { 0, 0 }, t;

	while (n--) {
		expect(clock_gettime(CLOCK_MONOTONIC, &t) == 0);
		expect(t.tv_sec > before.tv_sec || (t.tv_sec == before.tv_sec && t.tv_nsec >= before.tv_nsec));
		before = t;
	}
}

/* A page of known bytes in a file in memory. */
static int open_file(void)
{
	snprintf(path, sizeof(path), "%s/kvmsentry-bench-%d", scratch, getpid());
	memset(page, 'x', sizeof(page));
	file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (file < 0)
		return -1;
	return pwrite(file, page, sizeof(page), 0) == sizeof(page) ? 0 : -1;
}

static void close_file(void)
{
	close(file);
	unlink(path);
}

static int open_zero(void) { return (zero = open("/dev/zero", O_RDONLY)) < 0 ? -1 : 0; }
static void close_zero(void) { close(zero); }
static int open_null(void) { return (null = open("/dev/null", O_WRONLY)) < 0 ? -1 : 0; }
static void close_null(void) { close(null); }

static void read_file(long n, int size)
{
	page[0] = 0;
	while (n--)
		expect(pread(file, page, size, 0) == size);
	expect(page[0] == 'x' && page[size - 1] == 'x');
}

static void write_file(long n, int size)
{
	while (n--)
		expect(pwrite(file, page, size, 0) == size);
}

static void read_zero(long n, int size)
{
	page[0] = page[size - 1] = 1;
	while (n--)
		expect(read(zero, page, size) == size);
	expect(page[0] == 0 && page[size - 1] == 0);
}

static void write_null(long n, int size)
{
	while (n--)
		expect(write(null, page, size) == size);
}

static void read_1(long n) { read_file(n, 1); }
static void read_4k(long n) { read_file(n, 4096); }
static void write_1(long n) { write_file(n, 1); }
static void write_4k(long n) { write_file(n, 4096); }
static void zero_1(long n) { read_zero(n, 1); }
static void zero_4k(long n) { read_zero(n, 4096); }
static void null_1(long n) { write_null(n, 1); }
static void null_4k(long n) { write_null(n, 4096); }

static void open_close(long n)
{
	while (n--) {
		int fd = open(path, O_RDONLY);

		expect(fd >= 0);
		expect(close(fd) == 0);
	}
}

static void stat_(long n)
{
	struct stat st;

	while (n--) {
		expect(stat(path, &st) == 0);
		expect(st.st_size == 4096);
	}
}

static void on_signal(int signo)
{
	(void)signo;
	arrived = arrived + 1;
}

static int handle(void)
{
	struct sigaction sa = { .sa_handler = on_signal };

	return sigaction(SIGUSR1, &sa, NULL);
}

static void raise_(long n)
{
	long pid = getpid(), tid = syscall(SYS_gettid), before = arrived, sent = n;

	while (n--)
		expect(syscall(SYS_tgkill, pid, tid, SIGUSR1) == 0);
	expect(arrived - before == sent);
}

static const struct row rows[] = {
	{ "getpid", getpid_ },
	{ "clock", clock_ },
	{ "read-1", read_1, open_file, close_file },
	{ "read-4k", read_4k, open_file, close_file },
	{ "write-1", write_1, open_file, close_file },
	{ "write-4k", write_4k, open_file, close_file },
	{ "zero-1", zero_1, open_zero, close_zero },
	{ "zero-4k", zero_4k, open_zero, close_zero },
	{ "null-1", null_1, open_null, close_null },
	{ "null-4k", null_4k, open_null, close_null },
	{ "open", open_close, open_file, close_file },
	{ "stat", stat_, open_file, close_file },
	{ "signal", raise_, handle },
};

int main(int argc, char **argv)
{
	return run_rows(argc, argv, rows, sizeof(rows) / sizeof(rows[0]));
}
