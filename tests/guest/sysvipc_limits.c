/* Limits of System V IPC, which each IPC namespace has for itself, and /proc/sysvipc. */
#include "proc_check.h"
#include <fcntl.h>
#include <sched.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

static void get(const char *name, char *to, size_t size)
{
	char path[64];
	ssize_t n;

	snprintf(path, sizeof path, "/proc/%s", name);
	int fd = open(path, O_RDONLY);
	CHECK(fd >= 0 && (n = read(fd, to, size - 1)) >= 0);
	to[n] = 0;
	close(fd);
}

static int set(const char *name, const char *value)
{
	char path[64];

	snprintf(path, sizeof path, "/proc/sys/kernel/%s", name);
	int fd = open(path, O_WRONLY), error;
	if (fd < 0)
		return -1;
	int done = write(fd, value, strlen(value));
	error = errno;
	close(fd);
	errno = error;
	return done < 0 ? -1 : 0;
}

static void show(const char *name)
{
	char path[64], text[256];

	snprintf(path, sizeof path, "sys/kernel/%s", name);
	get(path, text, sizeof text);
	printf("%s: %s", name, text);
}

static void show_all(void)
{
	static const char *const names[] = { "shmmax", "shmall", "shmmni", "shm_rmid_forced", "msgmax", "msgmnb", "msgmni",
					     "sem", "msg_next_id", "sem_next_id", "shm_next_id" };

	for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
		show(names[i]);
}

static void messages(void)
{
	struct { long kind; char text[64]; } message = { 1, "" };
	struct msqid_ds state;
	struct msginfo info;

	CHECK(!set("msgmax", "16") && !set("msgmnb", "40") && !set("msgmni", "2"));
	int queue = msgget(IPC_PRIVATE, 0600), other = msgget(IPC_PRIVATE, 0600);
	CHECK(queue >= 0 && other >= 0);
	FAILS(msgget(IPC_PRIVATE, 0600), ENOSPC);
	FAILS(msgsnd(queue, &message, 17, IPC_NOWAIT), EINVAL);
	CHECK(!msgsnd(queue, &message, 16, IPC_NOWAIT) && !msgsnd(queue, &message, 16, IPC_NOWAIT));
	FAILS(msgsnd(queue, &message, 16, IPC_NOWAIT), EAGAIN);
	CHECK(!msgctl(queue, IPC_STAT, &state) && state.msg_qbytes == 40);
	CHECK(msgctl(0, IPC_INFO, (void *)&info) >= 0 && info.msgmax == 16 && info.msgmnb == 40 && info.msgmni == 2);
	CHECK(!msgctl(queue, IPC_RMID, NULL) && !msgctl(other, IPC_RMID, NULL));
	FAILS(set("msgmni", "32769"), EINVAL);
	FAILS(set("msgmax", "-1"), EINVAL);
	CHECK(!set("msg_next_id", "98309")); /* sequence 3, index 5 */
	show("msg_next_id");
	queue = msgget(IPC_PRIVATE, 0600);
	printf("wanted: %d\n", queue);
	show("msg_next_id");
	CHECK(!set("msg_next_id", "131077")); /* index 5 again, which is taken */
	other = msgget(IPC_PRIVATE, 0600);
	printf("beside: %d\n", other);
	CHECK(!msgctl(queue, IPC_RMID, NULL) && !msgctl(other, IPC_RMID, NULL));
	int next = msgget(IPC_PRIVATE, 0600);
	CHECK(next >= 0 && next != queue && next != other && !msgctl(next, IPC_RMID, NULL));
	puts("messages");
}

/* Ids go round: one that is gone does not come again soon. */
static void round_ids(void)
{
	int kept[100];

	CHECK(!set("msgmni", "200"));
	for (int i = 0; i < 150; i++) {
		int queue = msgget(IPC_PRIVATE, 0600);
		printf("%d ", queue);
		CHECK(queue >= 0 && !msgctl(queue, IPC_RMID, NULL));
	}
	for (int i = 0; i < 100; i++) {
		printf("%d ", kept[i] = msgget(IPC_PRIVATE, 0600));
		CHECK(kept[i] >= 0);
	}
	for (int i = 0; i < 100; i += 2)
		CHECK(!msgctl(kept[i], IPC_RMID, NULL));
	for (int i = 0; i < 100; i += 2)
		printf("%d ", kept[i] = msgget(IPC_PRIVATE, 0600));
	for (int i = 0; i < 100; i++)
		CHECK(!msgctl(kept[i], IPC_RMID, NULL));
	puts("round");
}

static void semaphores(void)
{
	struct sembuf twice[3] = { { 0, 1, 0 }, { 0, 1, 0 }, { 0, 1, 0 } };

	CHECK(!set("sem", "4 6 2 2"));
	FAILS(semget(IPC_PRIVATE, 5, 0600), EINVAL);
	int one = semget(IPC_PRIVATE, 4, 0600), two;
	CHECK(one >= 0);
	FAILS(semget(IPC_PRIVATE, 3, 0600), ENOSPC);
	two = semget(IPC_PRIVATE, 2, 0600);
	CHECK(two >= 0);
	CHECK(!set("sem", "4 60"));
	show("sem");
	FAILS(semget(IPC_PRIVATE, 1, 0600), ENOSPC);
	CHECK(!semop(one, twice, 2));
	FAILS(semop(one, twice, 3), E2BIG);
	FAILS(set("sem", "5 60 2 32769"), ERANGE);
	show("sem");
	CHECK(!semctl(one, 0, IPC_RMID) && !semctl(two, 0, IPC_RMID));
	puts("semaphores");
}

static void segments(void)
{
	struct shminfo info;
	struct shmid_ds state;
	char text[1024];

	CHECK(!set("shmmax", "8192") && !set("shmall", "3") && !set("shmmni", "3"));
	FAILS(shmget(IPC_PRIVATE, 8193, 0600), EINVAL);
	int one = shmget(IPC_PRIVATE, 5000, 0600), two;
	CHECK(one >= 0);
	FAILS(shmget(IPC_PRIVATE, 4097, 0600), ENOSPC);
	two = shmget(IPC_PRIVATE, 4096, 0640);
	CHECK(two >= 0 && shmctl(0, IPC_INFO, (void *)&info) >= 0);
	printf("shm: %lu %lu %lu %lu\n", info.shmmax, info.shmmin, info.shmmni, info.shmall);
	CHECK(!shmctl(two, IPC_RMID, NULL));
	get("sysvipc/shm", text, sizeof text);
	printf("%.*s", (int)(strchr(text, '\n') + 1 - text), text);
	int key, id, mode, size;
	CHECK(sscanf(strchr(text, '\n'), "%d %d %o %d", &key, &id, &mode, &size) == 4);
	CHECK(!key && id == one && mode == 0600 && size == 5000);

	/* Whoever nobody has attached goes: at once, with its creator, and with the last detach. */
	CHECK(!set("shmall", "100"));
	pid_t pid = fork();
	if (!pid)
		_exit(shmget(77, 4096, IPC_CREAT | 0600) < 0);
	CHECK(!status_of(pid));
	int orphan = shmget(77, 0, 0);
	CHECK(orphan >= 0);
	CHECK(!set("shm_rmid_forced", "1"));
	FAILS(shmctl(orphan, IPC_STAT, &state), EINVAL);
	CHECK(!shmctl(one, IPC_STAT, &state));
	pid = fork();
	if (!pid)
		_exit(shmget(78, 4096, IPC_CREAT | 0600) < 0);
	CHECK(!status_of(pid));
	FAILS(shmget(78, 0, 0), ENOENT);
	char *memory = shmat(one, NULL, 0);
	CHECK(memory != (void *)-1 && !shmdt(memory));
	FAILS(shmctl(one, IPC_STAT, &state), EINVAL);
	FAILS(set("shm_rmid_forced", "2"), EINVAL);
	puts("segments");
}

int main(void)
{
	char text[512];

	setvbuf(stdout, 0, _IONBF, 0);
	if (unshare(CLONE_NEWIPC)) {
		puts("no IPC namespaces here");
		return 4;
	}
	show_all();
	get("sysvipc/msg", text, sizeof text), fputs(text, stdout);
	get("sysvipc/sem", text, sizeof text), fputs(text, stdout);
	messages(), round_ids(), semaphores(), segments();
	pid_t pid = fork();
	if (!pid) { /* another namespace has what every one begins with */
		CHECK(!unshare(CLONE_NEWIPC));
		show_all();
		_exit(0);
	}
	CHECK(!status_of(pid));
	show("msgmax");
	pid = fork();
	if (!pid) {
		CHECK(!setresuid(1000, 1000, 1000));
		FAILS(set("msgmax", "1"), EACCES);
		FAILS(set("msg_next_id", "1"), EACCES);
		_exit(0);
	}
	CHECK(!status_of(pid));
	return 0;
}
