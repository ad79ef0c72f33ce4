/* System V IPC's commands for those who look at all of it: INFO, STAT by index, MSG_COPY. */
#include "proc_check.h"
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>

struct message {
	long kind;
	char text[16];
};

/* The index that STAT_ANY finds `id` at. */
static int index_of(int id, int highest, int (*stat)(int))
{
	for (int index = 0; index <= highest; index++)
		if (stat(index) == id)
			return index;
	return -1;
}

static struct msqid_ds queue;
static struct shmid_ds segment;
static struct semid_ds set;

static int msg_stat(int index)
{
	return msgctl(index, MSG_STAT, &queue);
}

static int shm_stat(int index)
{
	return shmctl(index, SHM_STAT, &segment);
}

static int sem_stat(int index)
{
	return semctl(index, 0, SEM_STAT, &set);
}

static void messages(void)
{
	int id = msgget(IPC_PRIVATE, 0600), highest;
	struct message m = { 7, "first" };
	struct msginfo info;

	CHECK(id >= 0 && msgsnd(id, &m, 6, 0) == 0);
	m.kind = 8;
	strcpy(m.text, "second");
	CHECK(msgsnd(id, &m, 7, 0) == 0);
	CHECK(msgctl(id, IPC_INFO, (void *)&info) >= 0 && info.msgssz == 16);
	highest = msgctl(id, MSG_INFO, (void *)&info);
	CHECK(highest >= 0 && info.msgpool >= 1 && info.msgmap >= 2 && info.msgtql >= 13);
	CHECK(index_of(id, highest, msg_stat) >= 0 && queue.msg_qnum == 2);
	FAILS(msgctl(30000, MSG_STAT, &queue), EINVAL);
	FAILS(msgrcv(id, &m, sizeof(m.text), 1, MSG_COPY), EINVAL);
	FAILS(msgrcv(id, &m, sizeof(m.text), 1, MSG_COPY | IPC_NOWAIT | MSG_EXCEPT), EINVAL);
	errno = 0;
	if (msgrcv(id, &m, sizeof(m.text), 2, MSG_COPY | IPC_NOWAIT) == -1 && errno != ENOSYS) {
		CHECK(errno == ENOMSG);
		CHECK(msgrcv(id, &m, sizeof(m.text), 1, MSG_COPY | IPC_NOWAIT) == 7);
		CHECK(m.kind == 8 && strcmp(m.text, "second") == 0);
	}
	CHECK(msgrcv(id, &m, sizeof(m.text), 0, IPC_NOWAIT) == 6 && m.kind == 7);
	CHECK(msgctl(id, IPC_RMID, NULL) == 0);
}

static void semaphores(void)
{
	int id = semget(IPC_PRIVATE, 3, 0600), highest;
	struct seminfo info;

	CHECK(id >= 0);
	CHECK(semctl(0, 0, IPC_INFO, &info) >= 0 && info.semvmx == 32767 && info.semopm > 0);
	highest = semctl(0, 0, SEM_INFO, &info);
	CHECK(highest >= 0 && info.semusz >= 1 && info.semaem >= 3);
	CHECK(index_of(id, highest, sem_stat) >= 0 && set.sem_nsems == 3);
	FAILS(semctl(31000, 0, SEM_STAT, &set), EINVAL);
	CHECK(semctl(id, 0, IPC_RMID) == 0);
}

static void memory(void)
{
	int id = shmget(IPC_PRIVATE, 10000, 0600), highest;
	struct shminfo limits;
	struct shm_info info;

	CHECK(id >= 0);
	CHECK(shmctl(0, IPC_INFO, (void *)&limits) >= 0 && limits.shmmin == 1 && limits.shmmni == 4096);
	highest = shmctl(0, SHM_INFO, (void *)&info);
	CHECK(highest >= 0 && info.used_ids >= 1 && info.shm_tot >= 3);
	CHECK(index_of(id, highest, shm_stat) >= 0 && segment.shm_segsz == 10000);
	FAILS(shmctl(31000, SHM_STAT, &segment), EINVAL);
	CHECK(shmctl(id, IPC_RMID, NULL) == 0);
}

/* Whether /proc/sysvipc/NAME has a line for `id`, whose key is put into *key. */
static int listed(const char *name, int id, int *key)
{
	char path[64], line[512];
	int number, found = 0;
	FILE *list;

	snprintf(path, sizeof(path), "/proc/sysvipc/%s", name);
	list = fopen(path, "r");
	CHECK(list && fgets(line, sizeof(line), list));
	while (!found && fgets(line, sizeof(line), list))
		found = sscanf(line, "%d %d", key, &number) == 2 && number == id;
	fclose(list);
	return found;
}

/* A removed segment lives on, without its key, until the last who has it attached lets go. */
static void removed_while_attached(void)
{
	int key = getpid() << 8 | 5, id = shmget(key, 5000, IPC_CREAT | 0640), shown;
	char *first, *second;
	pid_t child;

	CHECK(id >= 0 && listed("shm", id, &shown) && shown == key);
	first = shmat(id, NULL, 0);
	CHECK(first != (void *)-1);
	strcpy(first, "kept");
	CHECK(shmctl(id, SHM_LOCK, NULL) == 0 && shmctl(id, IPC_STAT, &segment) == 0);
	CHECK((segment.shm_perm.mode & 07777) == (SHM_LOCKED | 0640));
	CHECK(shmctl(id, SHM_UNLOCK, NULL) == 0 && shmctl(id, IPC_RMID, NULL) == 0);
	CHECK(shmctl(id, IPC_STAT, &segment) == 0 && segment.shm_nattch == 1);
	CHECK((segment.shm_perm.mode & 07777) == (SHM_DEST | 0640) && segment.shm_perm.__key == IPC_PRIVATE);
	CHECK(listed("shm", id, &shown) && shown == 0);
	FAILS(shmget(key, 5000, 0), ENOENT);
	second = shmat(id, NULL, SHM_RDONLY);
	CHECK(second != (void *)-1 && strcmp(second, "kept") == 0);
	CHECK(shmctl(id, IPC_RMID, NULL) == 0 && shmdt(first) == 0);
	child = fork();
	if (child == 0)
		_exit(shmctl(id, IPC_STAT, &segment) || segment.shm_nattch != 2);
	CHECK(status_of(child) == 0);
	CHECK(shmctl(id, IPC_STAT, &segment) == 0 && segment.shm_nattch == 1 && shmdt(second) == 0);
	errno = 0;
	CHECK(shmctl(id, IPC_STAT, &segment) == -1 && (errno == EINVAL || errno == EIDRM));
	CHECK(!listed("shm", id, &shown));
	id = msgget(key, IPC_CREAT | 0600);
	CHECK(id >= 0 && listed("msg", id, &shown) && shown == key && msgctl(id, IPC_RMID, NULL) == 0);
	id = semget(key, 1, IPC_CREAT | 0600);
	CHECK(id >= 0 && listed("sem", id, &shown) && shown == key && semctl(id, 0, IPC_RMID) == 0);
}

/* The end of the process that has it attached, too, is the end of a removed segment. */
static void ends_with_process(void)
{
	int fds[2], id;
	pid_t child;

	CHECK(pipe(fds) == 0);
	child = fork();
	if (child == 0) {
		id = shmget(IPC_PRIVATE, 12288, 0600);
		char *at = shmat(id, NULL, 0);
		if (at == (void *)-1 || shmctl(id, SHM_LOCK, NULL) || shmctl(id, IPC_RMID, NULL) || munmap(at + 4096, 4096))
			_exit(1);
		if (shmctl(id, IPC_STAT, &segment) || segment.shm_nattch != 2)
			_exit(2);
		segment.shm_perm.mode = 0604; /* the marks stay */
		if (shmctl(id, IPC_SET, &segment) || shmctl(id, IPC_STAT, &segment))
			_exit(3);
		if ((segment.shm_perm.mode & 07777) != (SHM_DEST | SHM_LOCKED | 0604))
			_exit(4);
		_exit(write(fds[1], &id, sizeof(id)) != sizeof(id));
	}
	CHECK(status_of(child) == 0 && read(fds[0], &id, sizeof(id)) == sizeof(id));
	errno = 0;
	CHECK(shmctl(id, IPC_STAT, &segment) == -1 && (errno == EINVAL || errno == EIDRM));
	close(fds[0]), close(fds[1]);
}

/* RLIMIT_MEMLOCK counts the locked segments of an unprivileged user. */
static void locked(void)
{
	struct rlimit limit = { 16384, 16384 };
	pid_t child = fork();

	if (child == 0) {
		CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0);
		if (geteuid() == 0)
			CHECK(setresuid(12345, 12345, 12345) == 0);
		int three = shmget(IPC_PRIVATE, 12288, 0600), two = shmget(IPC_PRIVATE, 8192, 0600);
		int five = shmget(IPC_PRIVATE, 20000, 0600);
		CHECK(three >= 0 && two >= 0 && five >= 0);
		FAILS(shmctl(five, SHM_LOCK, NULL), ENOMEM);
		CHECK(shmctl(three, SHM_LOCK, NULL) == 0 && shmctl(three, SHM_LOCK, NULL) == 0);
		FAILS(shmctl(two, SHM_LOCK, NULL), ENOMEM);
		CHECK(shmctl(three, SHM_UNLOCK, NULL) == 0 && shmctl(two, SHM_LOCK, NULL) == 0);
		CHECK(shmctl(two, IPC_RMID, NULL) == 0 && shmctl(three, SHM_LOCK, NULL) == 0);
		limit.rlim_cur = 0;
		CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0);
		FAILS(shmctl(five, SHM_LOCK, NULL), EPERM);
		CHECK(shmctl(three, IPC_RMID, NULL) == 0 && shmctl(five, IPC_RMID, NULL) == 0);
		_exit(0);
	}
	CHECK(status_of(child) == 0);
}

int main(void)
{
	messages();
	semaphores();
	memory();
	removed_while_attached();
	ends_with_process();
	locked();
	puts("System V IPC tells of itself");
	return 0;
}
