/* Part of hooks.c: the hook on a module's call, and the module's table of contents. */

typedef struct {
  PyObject *top; /* largest entry of each channel so far */
  float *at;
  int64_t channels, inner; /* inner: entries in a row that belong to one channel, where channels do not come last */
  int64_t trailing[4];
  int dims, settled;
} Unit;

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  Outputs *outputs;
  PyObject *layer, *record, *units, *kind; /* kind: the class of module that `label` is for */
  int64_t label, pass, calls;
  Unit unit[OWN_CALLS + 1];
} OutputHook;

static int same_trailing(const Unit *unit, PyObject *x) {
  PyObject *shape = PyObject_GetAttr(x, s_shape);
  int same = shape && PyTuple_Check(shape) && PyTuple_GET_SIZE(shape) == unit->dims;
  for (int k = 1; same && k < unit->dims; k++)
    same = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, k)) == unit->trailing[k - 1];
  Py_XDECREF(shape);
  if (PyErr_Occurred()) PyErr_Clear();
  return same;
}

static int see_units(OutputHook *self, PyObject *module, PyObject *output, const Plain *x) {
  self->calls = self->pass == self->outputs->passes ? self->calls + 1 : 1;
  self->pass = self->outputs->passes;
  int call = self->calls > OWN_CALLS ? OWN_CALLS : (int)self->calls - 1;
  Unit *unit = &self->unit[call];
  if (x && unit->top && same_trailing(unit, output)) {
    if (unit->settled) return 0;
    int64_t inner = x->last ? 1 : unit->inner;
    gradlab_channel_max(x->at, x->n / (unit->channels * inner), unit->channels, inner, unit->at);
    int alive = 1;
    for (int64_t c = 0; c < unit->channels; c++) alive &= unit->at[c] > 0;
    unit->settled = alive; /* nothing more to learn; not so where NaN hides what a unit does */
    return 0;
  }
  PyObject *done = PyObject_CallFunction(self->units, "OiOO", (PyObject *)self, call, module, output);
  Py_XDECREF(done);
  return done ? 0 : -1;
}

/* A tensor that the kernel cannot read, of an accelerator say: Python reduces it. The slot, -1 where nobody can, -2 on an
 * error. */
static int64_t reduce_elsewhere(const Outputs *outputs, PyObject *output) {
  PyObject *slot = PyObject_CallOneArg(outputs->reduce, output);
  int64_t number = slot ? PyLong_AsLongLong(slot) : -2;
  Py_XDECREF(slot);
  return PyErr_Occurred() ? -2 : number;
}

static PyObject *output_call(PyObject *hook, PyObject *const *args, size_t count, PyObject *Py_UNUSED(names)) {
  OutputHook *self = (OutputHook *)hook;
  Outputs *outputs = self->outputs;
  if (PyVectorcall_NARGS(count) != 3) return PyErr_SetString(PyExc_TypeError, "an output hook takes three"), NULL;
  PyObject *module = args[0], *output = args[2];
  int64_t place = admit(outputs->gate, self->layer);
  if (place == -1) Py_RETURN_NONE;
  if (place == -2) return NULL;
  Plain x, *known = NULL;
  int64_t slot = -1, index;
  if ((PyObject *)Py_TYPE(module) == self->kind) {
    if (torch_plain(output, &x)) {
      slot = reduce_shared(outputs->rows, known = &x, 0);
      if (slot < 0) return NULL;
    } else if (torch_tensor(output, &x) && (slot = reduce_elsewhere(outputs, output)) == -2) {
      return NULL;
    }
  }
  if (slot >= 0) {
    if ((index = add_entry(outputs, self->label, place, x.n, slot)) < 0) return NULL;
    if (x.requires_grad && follow_gradient(outputs, index, output, &x)) return NULL;
  } else {
    PyObject *done = PyObject_CallFunction(self->record, "OLOO", hook, (long long)place, module, output);
    if (!done) return NULL;
    Py_DECREF(done);
  }
  if (self->units && see_units(self, module, output, known)) return NULL;
  Py_RETURN_NONE;
}

/* know(kind, label): what a plain output of a module of this very class is listed as. */
static PyObject *hook_know(OutputHook *self, PyObject *args) {
  PyObject *kind;
  long long label;
  if (!PyArg_ParseTuple(args, "OL", &kind, &label)) return NULL;
  Py_XSETREF(self->kind, Py_NewRef(kind));
  self->label = label;
  Py_RETURN_NONE;
}

/* follow(call, top, address of top, inner entries, trailing shape): go on with this maximum without asking. */
static PyObject *hook_follow(OutputHook *self, PyObject *args) {
  int call;
  PyObject *top, *trailing;
  long long at, channels, inner;
  if (!PyArg_ParseTuple(args, "iOLLLO!", &call, &top, &at, &channels, &inner, &PyTuple_Type, &trailing)) return NULL;
  if (call < 0 || call > OWN_CALLS || PyTuple_GET_SIZE(trailing) > 4)
    return PyErr_SetString(PyExc_ValueError, "follow: no such call or shape"), NULL;
  Unit *unit = &self->unit[call];
  Py_XSETREF(unit->top, Py_NewRef(top));
  unit->at = (float *)(intptr_t)at, unit->channels = channels, unit->inner = inner, unit->settled = 0;
  unit->dims = 1 + (int)PyTuple_GET_SIZE(trailing);
  for (int k = 0; k + 1 < unit->dims; k++) unit->trailing[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(trailing, k));
  if (PyErr_Occurred()) return NULL;
  Py_RETURN_NONE;
}

/* forget(): keep no maximum any longer until told anew. */
static PyObject *hook_forget(OutputHook *self, PyObject *Py_UNUSED(none)) {
  for (int k = 0; k <= OWN_CALLS; k++) Py_CLEAR(self->unit[k].top);
  Py_RETURN_NONE;
}

static int hook_init(OutputHook *self, PyObject *args, PyObject *Py_UNUSED(named)) {
  PyObject *outputs, *layer, *record, *units;
  if (!PyArg_ParseTuple(args, "OUOO", &outputs, &layer, &record, &units)) return -1;
  self->call = output_call, self->pass = -1;
  Py_XSETREF(self->outputs, (Outputs *)Py_NewRef(outputs));
  Py_XSETREF(self->layer, Py_NewRef(layer));
  Py_XSETREF(self->record, Py_NewRef(record));
  Py_XSETREF(self->units, units == Py_None ? NULL : Py_NewRef(units));
  return 0;
}

static int hook_traverse(OutputHook *self, visitproc visit, void *arg) {
  Py_VISIT(self->outputs); Py_VISIT(self->record); Py_VISIT(self->units); Py_VISIT(self->kind);
  for (int k = 0; k <= OWN_CALLS; k++) Py_VISIT(self->unit[k].top);
  return 0;
}

static int hook_clear(OutputHook *self) {
  Py_CLEAR(self->record); Py_CLEAR(self->units); Py_CLEAR(self->kind);
  for (int k = 0; k <= OWN_CALLS; k++) Py_CLEAR(self->unit[k].top);
  return 0;
}

static void hook_dealloc(OutputHook *self) {
  PyObject_GC_UnTrack(self);
  hook_clear(self);
  Py_XDECREF(self->outputs), Py_XDECREF(self->layer);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef hook_methods[] = {{"know", (PyCFunction)hook_know, METH_VARARGS, NULL},
                                     {"follow", (PyCFunction)hook_follow, METH_VARARGS, NULL},
                                     {"forget", (PyCFunction)hook_forget, METH_NOARGS, NULL},
                                     {0}};
static PyTypeObject OutputHookType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "gradlab_hooks.OutputHook",
    .tp_basicsize = sizeof(OutputHook),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(OutputHook, call),
    .tp_call = PyVectorcall_Call,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)hook_init,
    .tp_dealloc = (destructor)hook_dealloc,
    .tp_traverse = (traverseproc)hook_traverse,
    .tp_clear = (inquiry)hook_clear,
    .tp_methods = hook_methods,
};

/* -- the methods of Outputs ----------------------------------------------------------------------------------------- */

static int known_index(Outputs *self, int64_t index) {
  if (index >= 0 && index < self->count) return 1;
  return PyErr_SetString(PyExc_IndexError, "no such entry"), 0;
}

static PyObject *outputs_add(Outputs *self, PyObject *args) {
  long long label, place, size, slot;
  if (!PyArg_ParseTuple(args, "LLLL", &label, &place, &size, &slot)) return NULL;
  int64_t index = add_entry(self, label, place, size, slot);
  return index < 0 ? NULL : PyLong_FromLongLong(index);
}

static PyObject *outputs_gradient_hook(Outputs *self, PyObject *number) {
  int64_t index = PyLong_AsLongLong(number);
  return PyErr_Occurred() || !known_index(self, index) ? NULL : gradient_hook(self, index);
}

static PyObject *outputs_set_gradient(Outputs *self, PyObject *args) {
  long long index, slot;
  if (!PyArg_ParseTuple(args, "LL", &index, &slot) || !known_index(self, index)) return NULL;
  if (set_gradient(self, index, slot)) return NULL;
  Py_RETURN_NONE;
}

/* take(): label and place of each output, its size, slots and span, and whether places only go up. */
static PyObject *outputs_take(Outputs *self, PyObject *Py_UNUSED(none)) {
  PyObject *which = PyBytes_FromStringAndSize(NULL, 2 * self->count * (Py_ssize_t)sizeof(int64_t));
  PyObject *what = PyBytes_FromStringAndSize(NULL, 4 * self->count * (Py_ssize_t)sizeof(int64_t));
  if (!which || !what) {
    Py_XDECREF(which);
    Py_XDECREF(what);
    return NULL;
  }
  int64_t *a = (int64_t *)PyBytes_AS_STRING(which), *b = (int64_t *)PyBytes_AS_STRING(what), last = -1;
  int in_order = 1;
  for (int64_t k = 0; k < self->count; k++, a += 2, b += 4) {
    const Entry *e = &self->entries[k];
    a[0] = e->label, a[1] = e->place;
    b[0] = e->size, b[1] = e->act_slot, b[2] = e->grad_slot, b[3] = e->span;
    in_order &= e->place >= last, last = e->place;
  }
  self->count = self->with_gradient = 0, self->generation++;
  return Py_BuildValue("(NNO)", which, what, in_order ? Py_True : Py_False);
}

static int outputs_init(Outputs *self, PyObject *args, PyObject *Py_UNUSED(named)) {
  PyObject *gate, *rows, *slow, *repeated, *leaf, *reduce;
  if (!PyArg_ParseTuple(args, "O!O!OOOO", &GateType, &gate, &RowsType, &rows, &slow, &repeated, &leaf, &reduce)) return -1;
  Py_XSETREF(self->reduce, Py_NewRef(reduce));
  Py_XSETREF(self->gate, (Gate *)Py_NewRef(gate));
  Py_XSETREF(self->rows, (Rows *)Py_NewRef(rows));
  Py_XSETREF(self->slow_gradient, Py_NewRef(slow));
  Py_XSETREF(self->repeated, Py_NewRef(repeated));
  Py_XSETREF(self->leaf, Py_NewRef(leaf));
  if (!self->anchor) self->anchor = torch_anchor((PyObject *)self);
  return 0;
}

static int outputs_traverse(Outputs *self, visitproc visit, void *arg) {
  Py_VISIT(self->rows); Py_VISIT(self->slow_gradient); Py_VISIT(self->repeated); Py_VISIT(self->leaf);
  Py_VISIT(self->reduce);
  return 0;
}

static int outputs_clear(Outputs *self) {
  Py_CLEAR(self->slow_gradient); Py_CLEAR(self->repeated); Py_CLEAR(self->leaf);
  Py_CLEAR(self->reduce);
  return 0;
}

static void outputs_dealloc(Outputs *self) {
  PyObject_GC_UnTrack(self);
  if (self->anchor) torch_cut(self->anchor);
  outputs_clear(self);
  Py_XDECREF(self->rows), Py_XDECREF(self->gate);
  PyMem_Free(self->entries);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef outputs_methods[] = {{"add", (PyCFunction)outputs_add, METH_VARARGS, NULL},
                                        {"gradient_hook", (PyCFunction)outputs_gradient_hook, METH_O, NULL},
                                        {"set_gradient", (PyCFunction)outputs_set_gradient, METH_VARARGS, NULL},
                                        {"take", (PyCFunction)outputs_take, METH_NOARGS, NULL},
                                        {0}};
static PyMemberDef outputs_members[] = {
    {"passes", T_LONGLONG, offsetof(Outputs, passes), 0, NULL},
    {"with_gradient", T_LONGLONG, offsetof(Outputs, with_gradient), READONLY, NULL},
    {"hooks_in_python", T_BOOL, offsetof(Outputs, hooks_in_python), 0, NULL},
    {0}};
static PyTypeObject OutputsType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "gradlab_hooks.Outputs",
    .tp_basicsize = sizeof(Outputs),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)outputs_init,
    .tp_dealloc = (destructor)outputs_dealloc,
    .tp_traverse = (traverseproc)outputs_traverse,
    .tp_clear = (inquiry)outputs_clear,
    .tp_methods = outputs_methods,
    .tp_members = outputs_members,
};

/* -- the module ----------------------------------------------------------------------------------------------------- */

/* setup(Tensor, Parameter): handed in so that nothing here looks for them. */
static PyObject *setup(PyObject *Py_UNUSED(module), PyObject *args) {
  PyObject *tensor, *parameter;
  if (!PyArg_ParseTuple(args, "OO", &tensor, &parameter)) return NULL;
  torch_setup(tensor, parameter);
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {{"setup", setup, METH_VARARGS, NULL}, {0}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "gradlab_hooks", .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit_gradlab_hooks(void) {
  for (size_t k = 0; k < sizeof(names) / sizeof(*names); k++)
    if (!(*names[k].place = PyUnicode_InternFromString(names[k].text))) return NULL;
  if (PyType_Ready(&GradientHookType)) return NULL;
  PyObject *module = PyModule_Create(&definition);
  PyTypeObject *types[] = {&RowsType, &GateType, &OutputsType, &OutputHookType};
  for (int k = 0; module && k < 4; k++)
    if (PyModule_AddType(module, types[k])) Py_CLEAR(module);
  return module;
}
