/* Part of hooks.c: which calls are recorded, what they put out, and the gradients that come back to it. */

/* -- CallGate ------------------------------------------------------------------------------------------------------- */

typedef struct {
  int64_t layer, place;
  char with_grad, repeated;
} Call;

typedef struct {
  PyObject_HEAD
  char recording, without_grad;
  int64_t calls, calls_without_grad;
  Call *log; /* a ring of the last calls of the step */
  int64_t logged, room;
  PyObject *layers; /* name -> number */
} Gate;

static int remember(Gate *self, int64_t layer, int64_t place, int with_grad) {
  if (self->logged >= self->room && self->room < REMEMBERED) {
    int64_t room = self->room ? 2 * self->room : 256;
    Call *log = PyMem_Realloc(self->log, room * sizeof(Call));
    if (!log) return PyErr_NoMemory(), -1;
    self->log = log, self->room = room;
  }
  self->log[self->logged++ % self->room] = (Call){layer, place, (char)with_grad, 0};
  return 0;
}

static int64_t layer_number(Gate *self, PyObject *layer) {
  PyObject *known = PyDict_GetItemWithError(self->layers, layer);
  if (known) return PyLong_AsLongLong(known);
  if (PyErr_Occurred()) return -1;
  PyObject *made = PyLong_FromSsize_t(PyDict_GET_SIZE(self->layers));
  int64_t number = made && !PyDict_SetItem(self->layers, layer, made) ? PyLong_AsLongLong(made) : -1;
  Py_XDECREF(made);
  return number;
}

/* The place of a call that begins now, -1 if it is not recorded, -2 on an error. */
static int64_t admit(Gate *self, PyObject *layer) {
  if (!self->recording) return -1;
  int64_t number = layer_number(self, layer);
  if (number < 0) return -2;
  int with_grad = torch_grad_enabled();
  if (torch_recomputing()) {
    int64_t oldest = self->logged > self->room ? self->logged - self->room : 0;
    for (int64_t k = self->logged - 1; k >= oldest; k--) {
      Call *call = &self->log[k % self->room];
      if (call->layer != number || call->repeated) continue;
      call->repeated = 1;
      if (call->with_grad || !with_grad) return -1;
      self->calls_without_grad -= !self->without_grad;
      return call->place;
    }
    return -1;
  }
  int64_t place = self->calls++;
  if (remember(self, number, place, with_grad)) return -2;
  if (with_grad || self->without_grad) return place;
  self->calls_without_grad++;
  return -1;
}

static PyObject *gate_admit(Gate *self, PyObject *layer) {
  int64_t place = admit(self, layer);
  if (place == -2) return NULL;
  if (place < 0) Py_RETURN_NONE;
  return PyLong_FromLongLong(place);
}

static PyObject *gate_close_step(Gate *self, PyObject *Py_UNUSED(none)) {
  self->calls = self->logged = 0;
  Py_RETURN_NONE;
}

static PyObject *gate_remembered(Gate *self, void *Py_UNUSED(closure)) {
  return PyLong_FromLongLong(self->logged < self->room ? self->logged : self->room);
}

static int gate_init(Gate *self, PyObject *args, PyObject *named) {
  static char *names[] = {"without_grad", NULL};
  int without_grad;
  if (!PyArg_ParseTupleAndKeywords(args, named, "$p", names, &without_grad)) return -1;
  self->without_grad = (char)without_grad;
  Py_XSETREF(self->layers, PyDict_New());
  return self->layers ? 0 : -1;
}

static void gate_dealloc(Gate *self) {
  PyMem_Free(self->log);
  Py_XDECREF(self->layers); /* texts and numbers: no cycle leads through here */
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef gate_methods[] = {{"admit", (PyCFunction)gate_admit, METH_O, NULL},
                                     {"close_step", (PyCFunction)gate_close_step, METH_NOARGS, NULL},
                                     {0}};
static PyMemberDef gate_members[] = {{"recording", T_BOOL, offsetof(Gate, recording), 0, NULL},
                                     {"calls", T_LONGLONG, offsetof(Gate, calls), READONLY, NULL},
                                     {"calls_without_grad", T_LONGLONG, offsetof(Gate, calls_without_grad), 0, NULL},
                                     {0}};
static PyGetSetDef gate_getters[] = {{"remembered", (getter)gate_remembered, NULL, NULL, NULL}, {0}};
static PyTypeObject GateType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "gradlab_hooks.CallGate",
    .tp_basicsize = sizeof(Gate),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)gate_init,
    .tp_dealloc = (destructor)gate_dealloc,
    .tp_methods = gate_methods,
    .tp_members = gate_members,
    .tp_getset = gate_getters,
};

/* -- Outputs -------------------------------------------------------------------------------------------------------- */

typedef struct {
  int64_t label, place, size, act_slot, grad_slot, span;
} Entry;

typedef struct {
  PyObject_HEAD
  Rows *rows;
  Gate *gate;
  PyObject *slow_gradient, *repeated, *leaf, *reduce;
  void *anchor; /* what hooks in graphs know it by */
  Entry *entries;
  int64_t count, room, generation, passes, with_gradient;
  char hooks_in_python;
} Outputs;

static int64_t add_entry(Outputs *self, int64_t label, int64_t place, int64_t size, int64_t slot) {
  if (self->count >= self->room) {
    int64_t room = self->room ? 2 * self->room : 256;
    Entry *entries = PyMem_Realloc(self->entries, room * sizeof(Entry));
    if (!entries) return PyErr_NoMemory(), -1;
    self->entries = entries, self->room = room;
  }
  self->entries[self->count] = (Entry){label, place, size, slot, -1, 0};
  return self->count++;
}

static int set_gradient(Outputs *self, int64_t index, int64_t slot) {
  Entry *entry = &self->entries[index];
  int again = entry->grad_slot >= 0;
  int64_t label = entry->label;
  self->with_gradient += !again;
  entry->grad_slot = slot, entry->span = self->rows->span;
  if (!again) return 0;
  PyObject *done = PyObject_CallFunction(self->repeated, "L", (long long)label);
  Py_XDECREF(done);
  return done ? 0 : -1;
}

int gradient_arrived(PyObject *whose, int64_t index, int64_t generation, const Plain *x, PyObject *grad) {
  Outputs *outputs = (Outputs *)whose;
  Rows *rows = outputs->rows;
  /* A graph may outlive its step; its late gradients belong to no open step. */
  if (!outputs->gate->recording || outputs->generation != generation) return 0;
  if (!x) {
    PyObject *done = PyObject_CallFunction(outputs->slow_gradient, "LO", (long long)index, grad);
    Py_XDECREF(done);
    return done ? 0 : -1;
  }
  int64_t slot = reduce_shared(rows, x, 1);
  if (slot < 0 || set_gradient(outputs, index, slot)) return -1;
  if (!rows->gradients_are_shared) return 0;
  rows->grad_at = x->at, rows->grad_n = x->n, rows->grad_version = x->version;
  rows->grad_of = outputs->entries[index].act_slot, rows->grad_slot = slot;
  return 0;
}

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  Outputs *outputs;
  int64_t index, generation;
} GradientHook;

static PyObject *gradient_call(PyObject *hook, PyObject *const *args, size_t count, PyObject *Py_UNUSED(names)) {
  GradientHook *self = (GradientHook *)hook;
  Plain x;
  if (PyVectorcall_NARGS(count) != 1) return PyErr_SetString(PyExc_TypeError, "a gradient hook takes one tensor"), NULL;
  const Plain *known = torch_plain(args[0], &x) ? &x : NULL;
  if (gradient_arrived((PyObject *)self->outputs, self->index, self->generation, known, args[0])) return NULL;
  Py_RETURN_NONE;
}

static int gradient_traverse(GradientHook *self, visitproc visit, void *arg) {
  Py_VISIT(self->outputs);
  return 0;
}

static int gradient_clear(GradientHook *Py_UNUSED(self)) { return 0; /* Outputs breaks the cycles it stands in */ }

static void gradient_dealloc(GradientHook *self) {
  PyObject_GC_UnTrack(self);
  Py_XDECREF(self->outputs);
  PyObject_GC_Del(self);
}

static PyTypeObject GradientHookType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "gradlab_hooks.GradientHook",
    .tp_basicsize = sizeof(GradientHook),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(GradientHook, call),
    .tp_call = PyVectorcall_Call,
    .tp_dealloc = (destructor)gradient_dealloc,
    .tp_traverse = (traverseproc)gradient_traverse,
    .tp_clear = (inquiry)gradient_clear,
};

static PyObject *gradient_hook(Outputs *self, int64_t index) {
  GradientHook *hook = PyObject_GC_New(GradientHook, &GradientHookType);
  if (!hook) return NULL;
  hook->call = gradient_call, hook->outputs = (Outputs *)Py_NewRef(self);
  hook->index = index, hook->generation = self->generation;
  PyObject_GC_Track(hook);
  return (PyObject *)hook;
}

/* Compiled autograd knows Python's hooks only. Whether it will run the backward pass is asked when the forward pass does. */
static int wants_python_hooks(const Outputs *self) {
  if (self->hooks_in_python) return 1;
  PyObject *module = PyImport_GetModule(s_compiled_autograd);
  PyObject *enabled = module ? PyObject_GetAttr(module, s_compiled_autograd_enabled) : NULL;
  int wants = enabled == Py_True;
  Py_XDECREF(module), Py_XDECREF(enabled);
  if (PyErr_Occurred()) PyErr_Clear();
  return wants;
}

static int follow_gradient(Outputs *self, int64_t index, PyObject *output, const Plain *x) {
  PyObject *done;
  if (!x->has_node) { /* a parameter or input handed through: it outlives the step and its graph */
    done = PyObject_CallFunction(self->leaf, "LO", (long long)index, output);
  } else if (wants_python_hooks(self)) {
    PyObject *hook = gradient_hook(self, index);
    done = hook ? PyObject_CallMethodOneArg(output, s_register_hook, hook) : NULL;
    Py_XDECREF(hook);
  } else {
    return torch_follow(output, self->anchor, index, self->generation);
  }
  Py_XDECREF(done);
  return done ? 0 : -1;
}

#include "output_hook.c"
