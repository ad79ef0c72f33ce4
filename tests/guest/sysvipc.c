/* System V IPC's commands for those who look at all of it: INFO, STAT by index, MSG_COPY. */
#include "proc_check.h"
#include <sys/ipc.h>
#include <sys/msg.h>
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

int main(void)
{
	messages();
	semaphores();
	memory();
	puts("System V IPC tells of itself");
	return 0;
}
