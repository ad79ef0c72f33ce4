/* Keyrings: the special ones, adding, searching, permissions, time-outs, what fork and exec keep. */
#include "proc_check.h"
#include <linux/keyctl.h>

typedef int32_t key_serial_t;

static long ctl(int op, long a, long b, long c, long d)
{
	return syscall(SYS_keyctl, op, a, b, c, d);
}

static key_serial_t add(const char *type, const char *name, const char *text, key_serial_t ring)
{
	return syscall(SYS_add_key, type, name, text, text ? strlen(text) : 0, ring);
}

static void wrong(void)
{
	char big[40];

	memset(big, 'x', 39), big[39] = 0;
	FAILS(add("nonesuch", "a", "b", KEY_SPEC_SESSION_KEYRING), ENODEV);
	FAILS(add(".dot", "a", "b", KEY_SPEC_SESSION_KEYRING), EPERM);
	FAILS(add(big, "a", "b", KEY_SPEC_SESSION_KEYRING), EINVAL);
	FAILS(add("user", "a", NULL, KEY_SPEC_SESSION_KEYRING), EINVAL);
	FAILS(add("user", "", "b", KEY_SPEC_SESSION_KEYRING), EINVAL);
	FAILS(add("keyring", "a", "b", KEY_SPEC_SESSION_KEYRING), EINVAL);
	FAILS(add("keyring", ".a", NULL, KEY_SPEC_SESSION_KEYRING), EPERM);
	FAILS(add("logon", "noservice", "b", KEY_SPEC_SESSION_KEYRING), EINVAL);
	FAILS(add("user", "a", "b", KEY_SPEC_GROUP_KEYRING), EINVAL);
	FAILS(add("user", "a", "b", 0), EINVAL);
	FAILS(syscall(SYS_add_key, "user", (char *)8, "b", 1, KEY_SPEC_SESSION_KEYRING), EFAULT);
	FAILS(syscall(SYS_request_key, "user", "no such key", NULL, 0), ENOKEY);
	FAILS(ctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_THREAD_KEYRING, 0, 0, 0), ENOKEY);
	FAILS(ctl(KEYCTL_GET_KEYRING_ID, 1, 0, 0, 0), ENOKEY);
	FAILS(ctl(999, 0, 0, 0, 0), EOPNOTSUPP);
	FAILS(ctl(KEYCTL_INSTANTIATE, 1, 0, 0, 0), EPERM);
}

static void one_key(void)
{
	char text[256];
	key_serial_t k = add("user", "test:one", "secret", KEY_SPEC_PROCESS_KEYRING), again;
	long n;

	CHECK(k > 0);
	CHECK(syscall(SYS_request_key, "user", "test:one", NULL, 0) == k);
	n = ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0);
	CHECK(n == 6 && memcmp(text, "secret", 6) == 0);
	CHECK(ctl(KEYCTL_READ, k, 0, 0, 0) == 6);
	n = ctl(KEYCTL_DESCRIBE, k, (long)text, sizeof(text), 0);
	CHECK(n == (long)strlen(text) + 1);
	printf("%s\n", text);
	again = add("user", "test:one", "changed", KEY_SPEC_PROCESS_KEYRING);
	CHECK(again == k);
	CHECK(ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0) == 7 && memcmp(text, "changed", 7) == 0);
	CHECK(ctl(KEYCTL_UPDATE, k, (long)"third", 5, 0) == 0);
	CHECK(ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0) == 5);
	FAILS(ctl(KEYCTL_UPDATE, k, (long)"", 0, 0), EINVAL);
	CHECK(ctl(KEYCTL_SETPERM, k, 0x3f3f0000, 0, 0) == 0);
	FAILS(ctl(KEYCTL_SETPERM, k, 0x40000000, 0, 0), EINVAL);
	CHECK(ctl(KEYCTL_GET_SECURITY, k, (long)text, sizeof(text), 0) >= 1);
	/* time-out */
	CHECK(ctl(KEYCTL_SET_TIMEOUT, k, 1, 0, 0) == 0);
	nap(2100);
	FAILS(ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0), EKEYEXPIRED);
	FAILS(syscall(SYS_request_key, "user", "test:one", NULL, 0), ENOKEY);
	/* revoked, invalidated */
	k = add("user", "test:two", "x", KEY_SPEC_PROCESS_KEYRING);
	CHECK(ctl(KEYCTL_REVOKE, k, 0, 0, 0) == 0);
	FAILS(ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0), EKEYREVOKED);
	k = add("user", "test:three", "x", KEY_SPEC_PROCESS_KEYRING);
	CHECK(ctl(KEYCTL_INVALIDATE, k, 0, 0, 0) == 0);
	CHECK(ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0) == -1 && (errno == ENOKEY || errno == EACCES));
	/* a logon key can't be read */
	k = add("logon", "svc:four", "x", KEY_SPEC_PROCESS_KEYRING);
	CHECK(k > 0);
	FAILS(ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0), EOPNOTSUPP);
	CHECK(ctl(KEYCTL_DESCRIBE, k, (long)text, sizeof(text), 0) > 0);
	printf("%s\n", text);
}

static void rings(void)
{
	key_serial_t top = add("keyring", "top", NULL, KEY_SPEC_PROCESS_KEYRING), inner = add("keyring", "inner", NULL, top);
	key_serial_t k = add("user", "deep", "abc", inner), list[8], other = add("keyring", "other", NULL, KEY_SPEC_PROCESS_KEYRING);
	char text[64];

	CHECK(top > 0 && inner > 0 && k > 0);
	CHECK(ctl(KEYCTL_SEARCH, top, (long)"user", (long)"deep", 0) == k);
	FAILS(ctl(KEYCTL_SEARCH, top, (long)"user", (long)"shallow", 0), ENOKEY);
	FAILS(ctl(KEYCTL_SEARCH, k, (long)"user", (long)"deep", 0), ENOTDIR);
	CHECK(syscall(SYS_request_key, "user", "deep", NULL, other) == k);
	CHECK(ctl(KEYCTL_READ, other, (long)list, sizeof(list), 0) == 4 && list[0] == k);
	FAILS(ctl(KEYCTL_LINK, top, inner, 0, 0), EDEADLK);
	FAILS(ctl(KEYCTL_LINK, top, top, 0, 0), EDEADLK);
	FAILS(ctl(KEYCTL_LINK, k, k, 0, 0), ENOTDIR);
	CHECK(ctl(KEYCTL_UNLINK, k, inner, 0, 0) == 0);
	FAILS(ctl(KEYCTL_UNLINK, k, inner, 0, 0), ENOENT);
	CHECK(ctl(KEYCTL_LINK, k, top, 0, 0) == 0);
	CHECK(ctl(KEYCTL_MOVE, k, top, inner, 0) == 0);
	FAILS(ctl(KEYCTL_MOVE, k, top, inner, 0), ENOENT);
	CHECK(ctl(KEYCTL_READ, inner, (long)list, sizeof(list), 0) == 4 && list[0] == k);
	CHECK(ctl(KEYCTL_CLEAR, other, 0, 0, 0) == 0 && ctl(KEYCTL_READ, other, 0, 0, 0) == 0);
	FAILS(ctl(KEYCTL_UPDATE, other, (long)"x", 1, 0), EOPNOTSUPP);
	CHECK(ctl(KEYCTL_RESTRICT_KEYRING, other, 0, 0, 0) == 0);
	FAILS(ctl(KEYCTL_LINK, k, other, 0, 0), EPERM);
	FAILS(ctl(KEYCTL_RESTRICT_KEYRING, other, 0, 0, 0), EEXIST);
	/* without its last link a key is gone */
	CHECK(ctl(KEYCTL_UNLINK, k, inner, 0, 0) == 0);
	nap(50);
	FAILS(ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0), ENOKEY);
}

static void sessions(char *self)
{
	char text[64];
	key_serial_t ses = ctl(KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0), k, user, user_session;
	pid_t child;

	CHECK(ses > 0);
	CHECK(ctl(KEYCTL_DESCRIBE, ses, (long)text, sizeof(text), 0) > 0);
	printf("%s\n", text);
	CHECK(ctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0, 0, 0) == ses);
	k = add("user", "kept", "abc", KEY_SPEC_SESSION_KEYRING);
	CHECK(k > 0);
	CHECK(add("user", "lost", "abc", KEY_SPEC_PROCESS_KEYRING) > 0);
	user = ctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_USER_KEYRING, 0, 0, 0);
	user_session = ctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_USER_SESSION_KEYRING, 0, 0, 0);
	CHECK(user > 0 && user_session > 0 && user != user_session);
	CHECK(ctl(KEYCTL_DESCRIBE, user, (long)text, sizeof(text), 0) > 0);
	printf("%s\n", text);
	CHECK(ctl(KEYCTL_LINK, KEY_SPEC_USER_KEYRING, KEY_SPEC_SESSION_KEYRING, 0, 0) == 0);
	child = fork();
	if (child == 0) {
		CHECK(syscall(SYS_request_key, "user", "kept", NULL, 0) == k);
		FAILS(syscall(SYS_request_key, "user", "lost", NULL, 0), ENOKEY);
		execl(self, self, "after", NULL);
		_exit(9);
	}
	CHECK(status_of(child) == 0);
	CHECK(ctl(KEYCTL_SETPERM, k, 0x3f000000, 0, 0) == 0);
	child = fork();
	if (child == 0) { /* a made key would go to the session, which is not to be written to */
		CHECK(ctl(KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0) > 0);
		CHECK(ctl(KEYCTL_SETPERM, KEY_SPEC_SESSION_KEYRING, 0x0b000000, 0, 0) == 0);
		FAILS(syscall(SYS_request_key, "user", "no such key", "make it", 0), EACCES);
		FAILS(syscall(SYS_request_key, "user", "no such key", NULL, 0), ENOKEY);
		_exit(0);
	}
	CHECK(status_of(child) == 0);
	child = fork();
	if (child == 0) { /* another session does not possess it */
		CHECK(ctl(KEYCTL_JOIN_SESSION_KEYRING, (long)"named", 0, 0, 0) > 0);
		FAILS(ctl(KEYCTL_READ, k, (long)text, sizeof(text), 0), EACCES);
		FAILS(ctl(KEYCTL_DESCRIBE, k, (long)text, sizeof(text), 0), EACCES);
		_exit(0);
	}
	CHECK(status_of(child) == 0);
}

static void quota(void)
{
	pid_t child = fork();

	if (child == 0) {
		char big[32767];
		int n = 0;

		if (geteuid() == 0)
			CHECK(setgid(54321) == 0 && setuid(54321) == 0);
		CHECK(ctl(KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0) > 0);
		memset(big, 'q', sizeof(big));
		FAILS(syscall(SYS_add_key, "user", "big", big, sizeof(big), KEY_SPEC_SESSION_KEYRING), EDQUOT);
		for (; n < 1000; n++) {
			char name[16];

			snprintf(name, sizeof(name), "k%d", n);
			if (add("user", name, "x", KEY_SPEC_SESSION_KEYRING) < 0)
				break;
		}
		CHECK(errno == EDQUOT && n > 50 && n <= 200);
		CHECK(ctl(KEYCTL_CLEAR, KEY_SPEC_SESSION_KEYRING, 0, 0, 0) == 0);
		nap(100);
		CHECK(add("user", "again", "x", KEY_SPEC_SESSION_KEYRING) > 0);
		_exit(0);
	}
	CHECK(status_of(child) == 0);
}

int main(int argc, char **argv)
{
	if (argc > 1) {
		CHECK(syscall(SYS_request_key, "user", "kept", NULL, 0) > 0);
		FAILS(ctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 0, 0, 0), ENOKEY);
		return 0;
	}
	if (add("user", "probe", "x", KEY_SPEC_PROCESS_KEYRING) == -1 && (errno == ENOSYS || errno == EPERM)) {
		puts("no keys here");
		return 4;
	}
	wrong();
	one_key();
	rings();
	sessions(argv[0]);
	quota();
	puts("keys on rings");
	return 0;
}
