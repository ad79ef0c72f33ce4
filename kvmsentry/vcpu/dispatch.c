/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The short way of a system call through the Sentry's thread: from the channel to its handler in Python and back, without a step
 * of Python in between. It does what kernel.run() says, for tasks that nothing stands in the way of:
 *
 *	call = look() ---> handler(task, arguments) ---int---> reply
 *
 * and leaves all else to kernel.run(): other events, tasks that are traced or filtered, handlers that sleep, tasks with signals.
 * Python's objects are read and written where __slots__ put them: an attribute's offset is asked of its descriptor once.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <time.h>

#include "ks.h"
#include "api.h"

enum {
	NR = 512,		/* table.NR_SYSCALLS */
	CLOCK_EVERY = 16,	/* calls between two looks at the clock, when one comes after the other */
	RESTART_FIRST = -516, RESTART_LAST = -512,	/* ERESTART_RESTARTBLOCK, ERESTARTSYS: include/linux/errno.h */
};

struct row {
	PyObject *handler;
	int count;
	char kinds[6];
};

struct dispatcher {
	PyObject_HEAD
	vectorcallfunc call;
	const struct ks_doors *doors;
	struct ks_machine *m;
	PyObject *rows;		/* table.rows, a list */
	PyObject *contexts;	/* id -> context, a dict */
	PyObject *ready;	/* tasks to be stepped */
	PyObject *deferred;	/* a list of work */
	PyObject *timers;
	PyObject *errno_class, *task_type;
	PyObject *event_syscall;
	int64_t boot;		/* CLOCK_MONOTONIC when the kernel's began, ns */
	uint32_t served;
	Py_ssize_t owner, event;			/* in a context */
	Py_ssize_t in_guest, work, slow, orig_rax;	/* in a task */
	Py_ssize_t deadline;				/* in the timers */
	struct row known[NR];
};

static PyObject **slot(PyObject *object, Py_ssize_t offset)
{
	return (PyObject **)((char *)object + offset);
}

static void set_slot(PyObject *object, Py_ssize_t offset, PyObject *value)
{
	PyObject **place = slot(object, offset), *old = *place;

	Py_INCREF(value);
	*place = value;
	Py_XDECREF(old);
}

/* The offset of an attribute that `type` declares in its __slots__; -1 with an exception set when it is none. */
static Py_ssize_t offset_of(PyObject *type, const char *name)
{
	PyObject *descriptor = PyObject_GetAttrString(type, name);
	Py_ssize_t offset = -1;

	if (!descriptor)
		return -1;
	if (Py_IS_TYPE(descriptor, &PyMemberDescr_Type) && ((PyMemberDescrObject *)descriptor)->d_member->type == T_OBJECT_EX)
		offset = ((PyMemberDescrObject *)descriptor)->d_member->offset;
	else
		PyErr_Format(PyExc_TypeError, "%s is not in __slots__", name);
	Py_DECREF(descriptor);
	return offset;
}

/* Row.plan() of table.py: (handler, a letter for each argument). */
static int learn(struct dispatcher *d, struct row *row, PyObject *declared)
{
	PyObject *plan = PyObject_CallMethod(declared, "plan", NULL), *handler;
	const char *kinds;
	Py_ssize_t count;
	int ok;

	if (!plan)
		return -1;
	ok = PyArg_ParseTuple(plan, "Os#", &handler, &kinds, &count);
	if (ok && count > (Py_ssize_t)sizeof(row->kinds)) {
		PyErr_SetString(PyExc_ValueError, "a system call has six arguments");
		ok = 0;
	}
	if (ok) {
		row->count = count;
		memcpy(row->kinds, kinds, count);
		Py_INCREF(handler);
		row->handler = handler;
	}
	Py_DECREF(plan);
	return ok ? 0 : -1;
}

static PyObject *argument(char kind, u64 value)
{
	switch (kind) {		/* as in struct, table.py */
	case 'i':
		return PyLong_FromLong((int32_t)value);
	case 'I':
		return PyLong_FromLong((uint32_t)value);
	case 'q':
		return PyLong_FromLongLong((int64_t)value);
	default:
		return PyLong_FromUnsignedLongLong(value);
	}
}

/* The call itself; NULL with an exception set. */
static PyObject *invoke(const struct row *row, PyObject *task, const u64 *values)
{
	PyObject *arguments[8] = { NULL, task }, *result = NULL;
	int n;

	for (n = 0; n < row->count; n++) {
		arguments[2 + n] = argument(row->kinds[n], values[n]);
		if (!arguments[2 + n])
			break;
	}
	if (n == row->count)
		result = PyObject_Vectorcall(row->handler, arguments + 1, (1 + n) | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
	while (n)
		Py_DECREF(arguments[1 + n--]);
	return result;
}

/* What a handler raised: the negative errno of an Errno, else the exception itself, for kernel.run(). */
static PyObject *raised(struct dispatcher *d)
{
	PyObject *type, *error, *trace, *number, *negative;

	PyErr_Fetch(&type, &error, &trace);
	PyErr_NormalizeException(&type, &error, &trace);
	if (trace)
		PyException_SetTraceback(error, trace);
	Py_XDECREF(trace);
	Py_DECREF(type);
	if ((PyObject *)Py_TYPE(error) != d->errno_class)
		return error;
	number = PyObject_GetAttrString(error, "errno");
	Py_DECREF(error);
	if (!number)
		return NULL;
	negative = PyNumber_Negative(number);
	Py_DECREF(number);
	return negative;
}

/*
 * A system call of context `id`. 0: answered. 1: it is the caller's. 2: *rest is (task, result), which the caller answers.
 * -1: an exception that is nobody's.
 */
static int serve(struct dispatcher *d, int id, PyObject **rest)
{
	struct ks_vcpu *v = d->m->vcpus[id];
	u64 nr = v->call[0];
	PyObject *key, *ctx, *task, *result, *number;
	struct row *row;
	int64_t value;
	int overflow;

	if (nr >= NR)
		return 1;
	row = &d->known[nr];
	if (!row->handler) {
		PyObject *declared = PyList_GET_ITEM(d->rows, nr);

		if (declared == Py_None)
			return 1;
		if (learn(d, row, declared) < 0)
			return -1;
	}
	key = PyLong_FromLong(id);
	if (!key)
		return -1;
	ctx = PyDict_GetItemWithError(d->contexts, key);
	Py_DECREF(key);
	if (!ctx)
		return PyErr_Occurred() ? -1 : 1;
	task = *slot(ctx, d->owner);
	if (!Py_IS_TYPE(task, (PyTypeObject *)d->task_type) || *slot(task, d->slow) != Py_False)
		return 1;
	number = PyLong_FromLong(nr);
	if (!number)
		return -1;
	set_slot(ctx, d->event, d->event_syscall);
	set_slot(task, d->in_guest, Py_False);
	set_slot(task, d->orig_rax, number);
	Py_DECREF(number);

	Py_INCREF(task);	/* the call may be its last */
	result = invoke(row, task, v->call + 1);
	if (!result)
		result = raised(d);
	if (!result) {
		Py_DECREF(task);
		return -1;
	}
	if (PyLong_CheckExact(result) && *slot(task, d->work) == Py_False) {
		value = PyLong_AsLongLongAndOverflow(result, &overflow);
		if (!overflow && !(value >= RESTART_FIRST && value <= RESTART_LAST)) {
			set_slot(task, d->in_guest, Py_True);
			d->doors->reply(v, value);
			Py_DECREF(result);
			Py_DECREF(task);
			return 0;
		}
	}
	*rest = PyTuple_Pack(2, task, result);
	Py_DECREF(result);
	Py_DECREF(task);
	return *rest ? 2 : -1;
}

/* ns until the next timer; 0 when one is due, -1 when there is none. */
static int64_t patience(const struct dispatcher *d)
{
	PyObject *deadline = *slot(d->timers, d->deadline);
	struct timespec now;
	int64_t at, left;
	int overflow;

	at = PyLong_AsLongLongAndOverflow(deadline, &overflow);
	if (overflow > 0 || at == KS_NEVER)
		return -1;
	clock_gettime(CLOCK_MONOTONIC, &now);
	left = at - (now.tv_sec * 1000000000LL + now.tv_nsec - d->boot);
	return left > 0 ? left : 0;
}

/*
 * Serves until there is something for kernel.run(): what ks_wait() returns, as an int, when it is an event or news of the host; None
 * when a timer is due or a handler left work in `ready` or `deferred`; (task, result) for a call that is yet to be answered.
 */
static PyObject *dispatch(PyObject *self, PyObject *const *args, size_t nargs, PyObject *names)
{
	struct dispatcher *d = (struct dispatcher *)self;
	PyObject *rest;
	int64_t left;
	int n;

	for (;;) {
		Py_ssize_t ready = PyObject_Size(d->ready);

		if (ready < 0)
			return NULL;
		if (ready || PyList_GET_SIZE(d->deferred))
			Py_RETURN_NONE;
		if (!(++d->served % CLOCK_EVERY) && !patience(d))
			Py_RETURN_NONE;
		n = d->doors->look(d->m);
		if (n == KS_TIMEOUT) {
			left = patience(d);
			if (!left)
				Py_RETURN_NONE;
			Py_BEGIN_ALLOW_THREADS
			n = d->doors->wait(d->m, left);
			Py_END_ALLOW_THREADS
		}
		if (n < 0 || n > 0xffff)	/* no EV_SYSCALL << 16 | id */
			return PyLong_FromLong(n);
		switch (serve(d, n, &rest)) {
		case 0:
			continue;
		case 1:
			return PyLong_FromLong(n);
		case 2:
			return rest;
		default:
			return NULL;
		}
	}
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
	struct dispatcher *d = (struct dispatcher *)self;

	Py_VISIT(d->rows);
	Py_VISIT(d->contexts);
	Py_VISIT(d->ready);
	Py_VISIT(d->deferred);
	Py_VISIT(d->timers);
	Py_VISIT(d->errno_class);
	Py_VISIT(d->task_type);
	for (int nr = 0; nr < NR; nr++)
		Py_VISIT(d->known[nr].handler);
	return 0;
}

static int clear(PyObject *self)
{
	struct dispatcher *d = (struct dispatcher *)self;

	Py_CLEAR(d->rows);
	Py_CLEAR(d->contexts);
	Py_CLEAR(d->ready);
	Py_CLEAR(d->deferred);
	Py_CLEAR(d->timers);
	Py_CLEAR(d->errno_class);
	Py_CLEAR(d->task_type);
	Py_CLEAR(d->event_syscall);
	for (int nr = 0; nr < NR; nr++)
		Py_CLEAR(d->known[nr].handler);
	return 0;
}

static void dealloc(PyObject *self)
{
	PyObject_GC_UnTrack(self);
	clear(self);
	Py_TYPE(self)->tp_free(self);
}

static PyTypeObject type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "kvmsentry.vcpu._dispatch.Dispatcher",
	.tp_basicsize = sizeof(struct dispatcher),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
	.tp_vectorcall_offset = offsetof(struct dispatcher, call),
	.tp_call = PyVectorcall_Call,
	.tp_traverse = traverse,
	.tp_clear = clear,
	.tp_dealloc = dealloc,
	.tp_doc = "Serves system calls until something else is to be done. Called without arguments.",
};

/*
 * dispatcher(doors, machine, rows, contexts, ready, deferred, timers, boot, errno_class, event_syscall, context_type, task_type):
 * the first two are addresses, of ks_doors() and of the machine.
 */
static PyObject *make(PyObject *module, PyObject *args)
{
	PyObject *rows, *contexts, *ready, *deferred, *timers, *errno_class, *event, *context_type, *task_type;
	unsigned long long doors, machine;
	long long boot;
	struct dispatcher *d;

	if (!PyArg_ParseTuple(args, "KKO!O!OO!OLOO!OO", &doors, &machine, &PyList_Type, &rows, &PyDict_Type, &contexts, &ready,
			      &PyList_Type, &deferred, &timers, &boot, &errno_class, &PyLong_Type, &event, &context_type, &task_type))
		return NULL;
	if (PyList_GET_SIZE(rows) != NR)
		return PyErr_Format(PyExc_ValueError, "a table of %d rows is expected", NR);
	d = PyObject_GC_New(struct dispatcher, &type);
	if (!d)
		return NULL;
	memset((char *)d + sizeof(PyObject), 0, sizeof(*d) - sizeof(PyObject));
	d->call = dispatch;
	d->doors = (const struct ks_doors *)(uintptr_t)doors;
	d->m = (struct ks_machine *)(uintptr_t)machine;
	d->boot = boot;
	d->rows = Py_NewRef(rows);
	d->contexts = Py_NewRef(contexts);
	d->ready = Py_NewRef(ready);
	d->deferred = Py_NewRef(deferred);
	d->timers = Py_NewRef(timers);
	d->errno_class = Py_NewRef(errno_class);
	d->task_type = Py_NewRef(task_type);
	d->event_syscall = Py_NewRef(event);
	PyObject_GC_Track(d);
	if ((d->owner = offset_of(context_type, "owner")) < 0 || (d->event = offset_of(context_type, "event")) < 0 ||
	    (d->in_guest = offset_of(task_type, "in_guest")) < 0 || (d->work = offset_of(task_type, "work")) < 0 ||
	    (d->slow = offset_of(task_type, "slow")) < 0 || (d->orig_rax = offset_of(task_type, "orig_rax")) < 0 ||
	    (d->deadline = offset_of((PyObject *)Py_TYPE(timers), "deadline")) < 0) {
		Py_DECREF(d);
		return NULL;
	}
	return (PyObject *)d;
}

static PyMethodDef methods[] = {
	{ "dispatcher", make, METH_VARARGS, "A Dispatcher; machine.py names the arguments." },
	{ NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_dispatch",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__dispatch(void)
{
	if (PyType_Ready(&type) < 0)
		return NULL;
	return PyModule_Create(&definition);
}
