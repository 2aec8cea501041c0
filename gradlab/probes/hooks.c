/* The probes' hooks without the interpreter between them: the same contract as the Python classes of the same names in
 * rows.py, hooks.py and outputs.py, which tell what each does. What they ask of torch is in torch_side.h.
 *
 * What is plain (a dense float32 CPU tensor, see `torch_plain`) is done here; anything else goes to the Python callables
 * that the objects were given. All of it runs with the interpreter's lock held, which is what keeps threads apart.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "reduce.c"
#include "torch_side.h"

#define OWN_CALLS 8 /* as in units.py */
#define SEEN 8
#define REMEMBERED 65536

static PyObject *s_grad, *s_shape, *s_register_hook, *s_compiled_autograd, *s_compiled_autograd_enabled;
static PyObject *s_momentum_buffer, *s_parameters;
static const struct {
  PyObject **place;
  const char *text;
} names[] = {{&s_grad, "grad"},
             {&s_shape, "shape"},
             {&s_register_hook, "register_hook"},
             {&s_compiled_autograd, "torch._dynamo.compiled_autograd"},
             {&s_compiled_autograd_enabled, "compiled_autograd_enabled"},
             {&s_momentum_buffer, "momentum_buffer"},
             {&s_parameters, "_parameters"}};

/* -- Rows ----------------------------------------------------------------------------------------------------------- */

typedef struct {
  void *held; /* a tensor, weakly */
  int64_t version, slot, n;
} Seen;

#define CHECKED 4 /* entries of each parameter whose new value is compared after the update */

typedef struct {
  const float *at;
  int64_t n;
  float value[CHECKED];
} Foretold;

typedef struct {
  PyObject_HEAD
  double *rows;
  int64_t capacity, slots, span;
  Seen seen[SEEN];
  int next;
  const float *grad_at; /* the gradient read last */
  int64_t grad_n, grad_version, grad_of, grad_slot;
  char gradients_are_shared;
  PyObject *grow;
  float *scales; /* by slot: with what it was read the last time, see reduce.c */
  int64_t scales_room;
  Foretold *foretold;
  int64_t told, told_room;
} Rows;

/* Make room for so many rows more: afterwards they are taken without a call into Python, which may let others run. */
static int make_room(Rows *self, int64_t count) {
  while (self->slots + count > self->capacity) { /* another thread may take slots while this one waits */
    int64_t before = self->capacity;
    PyObject *done = PyObject_CallFunction(self->grow, "L", (long long)(self->slots + count - 1));
    if (!done) return -1;
    Py_DECREF(done);
    if (self->capacity == before) return PyErr_SetString(PyExc_SystemError, "rows did not grow"), -1;
  }
  if (self->slots + count > self->scales_room) {
    float *scales = PyMem_Realloc(self->scales, self->capacity * sizeof(float));
    if (!scales) return PyErr_NoMemory(), -1;
    for (int64_t k = self->scales_room; k < self->capacity; k++) scales[k] = 1.0f;
    self->scales = scales, self->scales_room = self->capacity;
  }
  return 0;
}

static double *take_row(Rows *self, int64_t *slot) {
  if (make_room(self, 1)) return NULL;
  *slot = self->slots++;
  return self->rows + 8 * *slot;
}

static int64_t reduce_plain(Rows *self, const Plain *x, long how) { /* 0 all, 1 without moments, 2 norm only */
  int64_t slot;
  double *row = take_row(self, &slot);
  if (!row) return -2;
  if (how == 2)
    norm_by(x->at, NULL, x->n, &self->scales[slot], row);
  else
    row_by(x->at, x->n, how == 0, &self->scales[slot], row);
  return slot;
}

static void forget_seen(Rows *self) {
  for (int k = 0; k < SEEN; k++)
    if (self->seen[k].held) torch_let_go(self->seen[k].held), self->seen[k].held = NULL;
  self->grad_at = NULL;
}

static int64_t find_seen(Rows *self, const void *itself, int64_t version, int64_t n) {
  for (int k = 0; itself && version >= 0 && k < SEEN; k++) { /* without a version nobody knows whether it changed */
    Seen *seen = &self->seen[k];
    if (seen->held == itself && seen->n == n && seen->version == version) return seen->slot;
  }
  return -1;
}

/* Read a tensor once as long as it is the same object, or a view of all of it, and unchanged: an output that several
 * probes look at, or the gradient of a sum, which is that of each of its terms. */
static int64_t reduce_shared(Rows *self, const Plain *x, long how) {
  int64_t slot = find_seen(self, x->itself, x->version, x->n);
  if (slot < 0) slot = find_seen(self, x->whole, x->whole_version, x->n);
  if (slot >= 0 || (slot = reduce_plain(self, x, how)) < 0) return slot;
  Seen *place = &self->seen[self->next = (self->next + 1) % SEEN];
  if (place->held) torch_let_go(place->held);
  *place = (Seen){torch_hold(x->itself), x->version, slot, x->n};
  return slot;
}

static PyObject *rows_reduce(Rows *self, PyObject *const *args, Py_ssize_t count) {
  Plain x;
  if (count != 2) return PyErr_SetString(PyExc_TypeError, "reduce takes a tensor and how"), NULL;
  int64_t slot = torch_plain(args[0], &x) ? reduce_plain(self, &x, PyLong_AsLong(args[1])) : -1;
  return slot < -1 ? NULL : PyLong_FromLongLong(slot);
}

static PyObject *rows_reduce_shared(Rows *self, PyObject *x) {
  Plain p;
  int64_t slot = torch_plain(x, &p) ? reduce_shared(self, &p, 0) : -1;
  return slot < -1 ? NULL : PyLong_FromLongLong(slot);
}

/* Same memory, unchanged, right after the gradient of the output in slot `of` was read there: the same gradient. */
static PyObject *rows_same_gradient(Rows *self, PyObject *const *args, Py_ssize_t count) {
  Plain x;
  int64_t slot = -1;
  if (count == 2 && self->grad_at && self->grad_of == PyLong_AsLongLong(args[1]) && torch_plain(args[0], &x) &&
      x.at == self->grad_at && x.n == self->grad_n && x.version == self->grad_version)
    slot = self->grad_slot;
  return PyErr_Occurred() ? NULL : PyLong_FromLongLong(slot);
}

#include "updates.c"

static PyObject *rows_difference(Rows *self, PyObject *const *args, Py_ssize_t count) {
  Plain a, b;
  int64_t slot = -1;
  if (count == 2 && torch_plain(args[0], &a) && torch_plain(args[1], &b) && a.n == b.n && a.last == b.last) {
    double *row = take_row(self, &slot);
    if (!row) return NULL;
    norm_by(a.at, b.at, a.n, &self->scales[slot], row);
  }
  return PyLong_FromLongLong(slot);
}

static PyObject *rows_batchnorm(Rows *self, PyObject *args) {
  PyObject *given[5];
  Plain of[5];
  long long n;
  double eps;
  if (!PyArg_ParseTuple(args, "OOOOOLd", given, given + 1, given + 2, given + 3, given + 4, &n, &eps)) return NULL;
  for (int k = 0; k < 5; k++) {
    of[k].at = NULL;
    if (given[k] == Py_None && k > 1) continue;
    if (!torch_plain(given[k], &of[k]) || of[k].n != of[0].n) return PyLong_FromLong(-1);
  }
  int64_t slot;
  double *row = take_row(self, &slot);
  if (!row) return NULL;
  gradlab_batchnorm(of[0].at, of[1].at, of[2].at, of[3].at, of[4].at, of[0].n, n, eps, row);
  return PyLong_FromLongLong(slot);
}

static PyObject *rows_take(Rows *self, PyObject *number) {
  int64_t count = PyLong_AsLongLong(number), first = self->slots;
  if (PyErr_Occurred()) return NULL;
  self->slots += count;
  return PyLong_FromLongLong(first);
}

static PyObject *rows_place(Rows *self, PyObject *args) {
  long long at, capacity;
  if (!PyArg_ParseTuple(args, "LL", &at, &capacity)) return NULL;
  double *rows = (double *)(intptr_t)at;
  int64_t used = self->slots < self->capacity ? self->slots : self->capacity;
  if (self->rows && used) memcpy(rows, self->rows, used * 8 * sizeof(double));
  self->rows = rows, self->capacity = capacity;
  Py_RETURN_NONE;
}

static PyObject *rows_discard(Rows *self, PyObject *Py_UNUSED(none)) {
  self->slots = self->span = self->told = 0;
  forget_seen(self);
  Py_RETURN_NONE;
}

static int rows_init(Rows *self, PyObject *args, PyObject *Py_UNUSED(named)) {
  PyObject *grow;
  if (!PyArg_ParseTuple(args, "O", &grow)) return -1;
  Py_XSETREF(self->grow, Py_NewRef(grow));
  return 0;
}

static int rows_traverse(Rows *self, visitproc visit, void *arg) {
  Py_VISIT(self->grow);
  return 0;
}

static int rows_clear(Rows *self) {
  Py_CLEAR(self->grow);
  forget_seen(self);
  return 0;
}

static void rows_dealloc(Rows *self) {
  PyObject_GC_UnTrack(self);
  rows_clear(self);
  PyMem_Free(self->foretold), PyMem_Free(self->scales);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef rows_methods[] = {
    {"reduce", (PyCFunction)(void (*)(void))rows_reduce, METH_FASTCALL, NULL},
    {"reduce_shared", (PyCFunction)rows_reduce_shared, METH_O, NULL},
    {"same_gradient", (PyCFunction)(void (*)(void))rows_same_gradient, METH_FASTCALL, NULL},
    {"parameters", (PyCFunction)rows_parameters, METH_O, NULL},
    {"sgd", (PyCFunction)rows_sgd, METH_VARARGS, NULL},
    {"stepped", (PyCFunction)rows_stepped, METH_O, NULL},
    {"holds", (PyCFunction)rows_holds, METH_VARARGS, NULL},
    {"difference", (PyCFunction)(void (*)(void))rows_difference, METH_FASTCALL, NULL},
    {"batchnorm", (PyCFunction)rows_batchnorm, METH_VARARGS, NULL},
    {"place", (PyCFunction)rows_place, METH_VARARGS, NULL},
    {"take", (PyCFunction)rows_take, METH_O, NULL},
    {"discard", (PyCFunction)rows_discard, METH_NOARGS, NULL},
    {0}};
static PyMemberDef rows_members[] = {{"slots", T_LONGLONG, offsetof(Rows, slots), 0, NULL},
                                     {"span", T_LONGLONG, offsetof(Rows, span), 0, NULL},
                                     {"gradients_are_shared", T_BOOL, offsetof(Rows, gradients_are_shared), 0, NULL},
                                     {0}};
static PyTypeObject RowsType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "gradlab_hooks.Rows",
    .tp_basicsize = sizeof(Rows),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)rows_init,
    .tp_dealloc = (destructor)rows_dealloc,
    .tp_traverse = (traverseproc)rows_traverse,
    .tp_clear = (inquiry)rows_clear,
    .tp_methods = rows_methods,
    .tp_members = rows_members,
};

#include "outputs.c"
