/* The probes' hooks without the interpreter between them: the same contract as the Python classes of the same names in
 * rows.py, hooks.py and outputs.py, which tell what each does. Nothing here knows torch's C++ types: a tensor is asked
 * in Python's words (dtype, data_ptr(), ...), so that this compiles in a second and fits any torch.
 *
 * What is plain (a dense float32 CPU tensor, see `plain`) is done here; anything else goes to the Python callables that
 * the objects were given. All of it runs with the interpreter's lock held, which is what keeps threads apart.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "reduce.c"

#define OWN_CALLS 8 /* as in units.py */
#define SEEN 8
#define REMEMBERED 65536

static PyObject *tensor_type, *parameter_type, *float32, *channels_last, *ordered_dict;
static PyObject *is_grad_enabled, *current_graph_task;
#define NAMES(X)                                                                                                       \
  X(dtype) X(is_cpu) X(is_nested) X(is_contiguous) X(numel) X(data_ptr) X(dim) X(shape) X(_version) X(_base)  \
  X(requires_grad) X(grad_fn) X(_backward_hooks) X(_register_hook_dict) X(memory_format) X(grad)
#define X(name) static PyObject *s_##name;
NAMES(X)
#undef X

typedef struct {
  const float *at;
  int64_t n;
  int last; /* channels last */
} Plain;

static int is_attr(PyObject *x, PyObject *name, PyObject *wanted) {
  PyObject *got = PyObject_GetAttr(x, name);
  Py_XDECREF(got);
  return got == wanted; /* singletons: they live on */
}

static int64_t whole_number(PyObject *made) {
  if (!made) return PyErr_Clear(), -1;
  int64_t value = PyLong_AsLongLong(made);
  Py_DECREF(made);
  if (value == -1 && PyErr_Occurred()) PyErr_Clear();
  return value;
}

static int truth(PyObject *made) {
  if (!made) return PyErr_Clear(), 0;
  int value = made == Py_True;
  Py_DECREF(made);
  return value;
}

/* Whether the kernel can read the entries of x as they lie; no exception is left. Each question costs 50 ns, so none is
 * asked whose answer follows: what is sparse, or handed through by torch.func, raises when asked for its memory. */
static int plain(PyObject *x, Plain *out) {
  if ((PyObject *)Py_TYPE(x) != tensor_type && (PyObject *)Py_TYPE(x) != parameter_type) return 0;
  if (!is_attr(x, s_is_cpu, Py_True) || !is_attr(x, s_dtype, float32) || !is_attr(x, s_is_nested, Py_False))
    return PyErr_Clear(), 0;
  out->last = 0;
  if (!truth(PyObject_CallMethodNoArgs(x, s_is_contiguous))) {
    if (whole_number(PyObject_CallMethodNoArgs(x, s_dim)) != 4) return 0;
    PyObject *args[] = {x, channels_last}, *names = PyTuple_Pack(1, s_memory_format);
    if (!names) return PyErr_Clear(), 0;
    out->last = truth(PyObject_VectorcallMethod(s_is_contiguous, args, 1, names));
    Py_DECREF(names);
    if (!out->last) return 0;
  }
  out->n = whole_number(PyObject_CallMethodNoArgs(x, s_numel));
  if (out->n <= 0) return 0;
  int64_t at = whole_number(PyObject_CallMethodNoArgs(x, s_data_ptr));
  out->at = (const float *)(intptr_t)at;
  return at != 0 && at != -1;
}

static int64_t version_of(PyObject *x) { return whole_number(PyObject_GetAttr(x, s__version)); /* -1: inference */ }

/* -- Rows ----------------------------------------------------------------------------------------------------------- */

typedef struct {
  PyObject *weak;
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

static double *take_row(Rows *self, int64_t *slot) {
  if (self->slots >= self->capacity) {
    PyObject *done = PyObject_CallFunction(self->grow, "L", (long long)self->slots);
    if (!done) return NULL;
    Py_DECREF(done);
    if (self->slots >= self->capacity) return PyErr_SetString(PyExc_SystemError, "rows did not grow"), NULL;
  }
  if (self->slots >= self->scales_room) {
    float *scales = PyMem_Realloc(self->scales, self->capacity * sizeof(float));
    if (!scales) return PyErr_NoMemory(), NULL;
    for (int64_t k = self->scales_room; k < self->capacity; k++) scales[k] = 1.0f;
    self->scales = scales, self->scales_room = self->capacity;
  }
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
  for (int k = 0; k < SEEN; k++) Py_CLEAR(self->seen[k].weak);
  self->grad_at = NULL;
}

static int refers_to(PyObject *weak, PyObject *x) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject *found = NULL;
  if (PyWeakref_GetRef(weak, &found) < 0) PyErr_Clear();
  Py_XDECREF(found);
  return found == x;
#else
  return PyWeakref_GET_OBJECT(weak) == x;
#endif
}

static int64_t find_seen(Rows *self, PyObject *x, int64_t version, int64_t n) {
  for (int k = 0; k < SEEN; k++) {
    Seen *seen = &self->seen[k];
    if (seen->weak && seen->n == n && seen->version == version && refers_to(seen->weak, x))
      return seen->slot;
  }
  return -1;
}

/* Read a tensor once as long as it is the same object, or a view of all of it, and unchanged: an output that several
 * probes look at, or the gradient of a sum, which is that of each of its terms. */
static int64_t reduce_shared(Rows *self, PyObject *x, const Plain *p, long how) {
  int64_t version = version_of(x), slot = find_seen(self, x, version, p->n);
  if (slot >= 0) return slot;
  PyObject *base = PyObject_GetAttr(x, s__base);
  Plain whole;
  if (!base) PyErr_Clear();
  if (base && base != Py_None && plain(base, &whole) && whole.n == p->n) slot = find_seen(self, base, version, p->n);
  Py_XDECREF(base);
  if (slot >= 0) return slot;
  if ((slot = reduce_plain(self, p, how)) < 0) return slot;
  Seen *place = &self->seen[self->next = (self->next + 1) % SEEN];
  Py_XSETREF(place->weak, PyWeakref_NewRef(x, NULL));
  if (!place->weak) PyErr_Clear();
  place->version = version, place->slot = slot, place->n = p->n;
  return slot;
}

static PyObject *rows_reduce(Rows *self, PyObject *const *args, Py_ssize_t count) {
  Plain x;
  if (count != 2) return PyErr_SetString(PyExc_TypeError, "reduce takes a tensor and how"), NULL;
  int64_t slot = plain(args[0], &x) ? reduce_plain(self, &x, PyLong_AsLong(args[1])) : -1;
  return slot < -1 ? NULL : PyLong_FromLongLong(slot);
}

static PyObject *rows_reduce_shared(Rows *self, PyObject *x) {
  Plain p;
  int64_t slot = plain(x, &p) ? reduce_shared(self, x, &p, 0) : -1;
  return slot < -1 ? NULL : PyLong_FromLongLong(slot);
}

/* Same memory, unchanged, right after the gradient of the output in slot `of` was read there: the same gradient. */
static PyObject *rows_same_gradient(Rows *self, PyObject *const *args, Py_ssize_t count) {
  Plain x;
  int64_t slot = -1;
  if (count == 2 && self->grad_at && self->grad_of == PyLong_AsLongLong(args[1]) && plain(args[0], &x) &&
      x.at == self->grad_at && x.n == self->grad_n && version_of(args[0]) == self->grad_version)
    slot = self->grad_slot;
  return PyErr_Occurred() ? NULL : PyLong_FromLongLong(slot);
}

#include "updates.c"

static PyObject *rows_difference(Rows *self, PyObject *const *args, Py_ssize_t count) {
  Plain a, b;
  int64_t slot = -1;
  if (count == 2 && plain(args[0], &a) && plain(args[1], &b) && a.n == b.n && a.last == b.last) {
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
    if (!plain(given[k], &of[k]) || of[k].n != of[0].n) return PyLong_FromLong(-1);
  }
  int64_t slot;
  double *row = take_row(self, &slot);
  if (!row) return NULL;
  gradlab_batchnorm(of[0].at, of[1].at, of[2].at, of[3].at, of[4].at, of[0].n, n, eps, row);
  return PyLong_FromLongLong(slot);
}

static PyObject *rows_place(Rows *self, PyObject *args) {
  long long at, capacity;
  if (!PyArg_ParseTuple(args, "LL", &at, &capacity)) return NULL;
  self->rows = (double *)(intptr_t)at, self->capacity = capacity;
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
    {"difference", (PyCFunction)(void (*)(void))rows_difference, METH_FASTCALL, NULL},
    {"batchnorm", (PyCFunction)rows_batchnorm, METH_VARARGS, NULL},
    {"place", (PyCFunction)rows_place, METH_VARARGS, NULL},
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
