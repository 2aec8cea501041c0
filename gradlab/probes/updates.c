/* Part of hooks.c: norms of parameters, their gradients and what SGD is about to add to them, all parameters at once. */

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

#define NOT_PLAIN (-1)
#define MISSING (-2)

typedef struct {
  float lr, momentum, undamped, decay, sign; /* undamped: 1 - dampening; sign: -1 to maximize */
  int nesterov;
} Sgd;

/* An entry after the update, by the operations of torch.optim.SGD in float32 and in their order. */
static inline float stepped(float w, float g, float b, int begun, const Sgd *s) {
  float d = FMA(w, s->decay, s->sign * g);
  float buffer = begun ? FMA(d, s->undamped, b * s->momentum) : d;
  return FMA(s->nesterov ? FMA(buffer, s->momentum, d) : buffer, -s->lr, w);
}

/* Sums of squares of w, g and the update in one read, each times its scale; b is the momentum buffer, or null where
 * there is none yet. */
static void sgd_squares(const float *w, const float *g, const float *b, int64_t n, const Sgd *s, const float *by,
                        double *squares) {
  const float by_w = by[0], by_g = by[1], by_u = by[2];
  squares[0] = squares[1] = squares[2] = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    int64_t end = n - start < BLOCK ? n : start + BLOCK, k = start;
    float qw[LANES] = {0}, qg[LANES] = {0}, qu[LANES] = {0};
#define STEP(at, lane, begun)                                                                                          \
  do {                                                                                                                 \
    float w0 = w[at], u = (stepped(w0, g[at], (begun) ? b[at] : 0, begun, s) - w0) * by_u;                              \
    float vw = w0 * by_w, vg = g[at] * by_g;                                                                           \
    qw[lane] += vw * vw, qg[lane] += vg * vg, qu[lane] += u * u;                                                       \
  } while (0)
    if (b)
      for (; k + LANES <= end; k += LANES)
        for (int l = 0; l < LANES; l++) STEP(k + l, l, 1);
    else
      for (; k + LANES <= end; k += LANES)
        for (int l = 0; l < LANES; l++) STEP(k + l, l, 0);
    for (int l = 0; k < end; k++, l++) STEP(k, l, b != NULL);
#undef STEP
    for (int l = 0; l < LANES; l++) squares[0] += qw[l], squares[1] += qg[l], squares[2] += qu[l];
  }
}

/* The same for the update alone, in double. */
static double exact_update(const float *w, const float *g, const float *b, int64_t n, const Sgd *s, int64_t *bad) {
  double squares = 0;
  *bad = 0;
  for (int64_t k = 0; k < n; k++) {
    float u = stepped(w[k], g[k], b ? b[k] : 0, b != NULL, s) - w[k];
    squares += (double)u * u, *bad += !(u - u == 0.0f);
  }
  return squares;
}

/* Fill three rows, read again with other scales where those in `by` were not right; these are kept for the next time. */
static void sgd_rows(const float *w, const float *g, const float *b, int64_t n, const Sgd *s, float *by, double *rows) {
  double squares[3], exactly[3];
  int64_t bad[3] = {0};
  int again = 0, wrong[3];
  sgd_squares(w, g, b, n, s, by, squares);
  for (int kind = 0; kind < 3; kind++) {
    wrong[kind] = !safe(squares[kind], by[kind]);
    if (!wrong[kind]) continue;
    exactly[kind] = kind < 2 ? exact_squares(kind ? g : w, NULL, n, &bad[kind]) : exact_update(w, g, b, n, s, &bad[2]);
    by[kind] = exactly[kind] == 0 ? LARGEST_SCALE : scale_for(exactly[kind], n);
    again |= exactly[kind] != 0 && !bad[kind];
  }
  if (again) sgd_squares(w, g, b, n, s, by, squares);
  for (int kind = 0; kind < 3; kind++) {
    int use = !wrong[kind] || (again && !bad[kind] && safe(squares[kind], by[kind]));
    norm_row(rows + 8 * kind, use ? by[kind] : 1.0f, use ? squares[kind] : exactly[kind], bad[kind]);
  }
}

/* What a dict has under a key, borrowed; null where there is neither. */
static PyObject *value_of(PyObject *dict, PyObject *key) {
  if (!dict || !PyDict_Check(dict)) return NULL;
  PyObject *value = PyDict_GetItemWithError(dict, key);
  if (!value) PyErr_Clear();
  return value;
}

/* parameters(params): shape (n, 2) as bytes: the slots of each parameter and its gradient, NOT_PLAIN or MISSING. */
static PyObject *rows_parameters(Rows *self, PyObject *params) {
  if (!PyList_Check(params)) return PyErr_SetString(PyExc_TypeError, "parameters takes a list"), NULL;
  Py_ssize_t count = PyList_GET_SIZE(params);
  PyObject *made = PyBytes_FromStringAndSize(NULL, 2 * count * (Py_ssize_t)sizeof(int64_t));
  int64_t *slots = made ? (int64_t *)PyBytes_AS_STRING(made) : NULL;
  for (Py_ssize_t k = 0; made && k < count; k++) {
    Plain x;
    PyObject *param = PyList_GET_ITEM(params, k), *grad = PyObject_GetAttr(param, s_grad);
    slots[2 * k] = torch_plain(param, &x) ? reduce_plain(self, &x, 2) : NOT_PLAIN;
    slots[2 * k + 1] = grad == Py_None ? MISSING : grad && torch_plain(grad, &x) ? reduce_plain(self, &x, 2) : NOT_PLAIN;
    Py_XDECREF(grad);
    if (!grad || PyErr_Occurred()) Py_CLEAR(made);
  }
  return made;
}

/* sgd(params, states, address of slots, address of places, lr, momentum, undamped, decay, sign, nesterov): puts the slots
 * of each parameter, its gradient and its coming update into row places[k] of slots, shape (, 3) of int64; how many were
 * not plain, whose rows are left as they are. What is to come of the others is kept for `stepped`. */
static PyObject *rows_sgd(Rows *self, PyObject *args) {
  PyObject *params, *states;
  Sgd s;
  long long to, at;
  if (!PyArg_ParseTuple(args, "O!O!LLfffffp", &PyList_Type, &params, &PyList_Type, &states, &to, &at, &s.lr,
                        &s.momentum, &s.undamped, &s.decay, &s.sign, &s.nesterov))
    return NULL;
  int64_t *slots = (int64_t *)(intptr_t)to;
  const int64_t *places = (const int64_t *)(intptr_t)at;
  long others = 0;
  Py_ssize_t count = PyList_GET_SIZE(params);
  if (PyList_GET_SIZE(states) != count) return PyErr_SetString(PyExc_ValueError, "one state a parameter"), NULL;
  if (self->told + count > self->told_room) {
    Foretold *foretold = PyMem_Realloc(self->foretold, (self->told + count) * sizeof(Foretold));
    if (!foretold) return PyErr_NoMemory();
    self->foretold = foretold, self->told_room = self->told + count;
  }
  for (Py_ssize_t k = 0; k < count; k++) {
    PyObject *param = PyList_GET_ITEM(params, k), *buffer = value_of(PyList_GET_ITEM(states, k), s_momentum_buffer);
    Plain w, g, b = {0};
    if (make_room(self, 3)) return NULL;
    int fits = torch_plain(param, &w) && torch_plain_gradient(param, &g) && g.n == w.n && g.last == w.last &&
               (!buffer || buffer == Py_None || (torch_plain(buffer, &b) && b.n == w.n && b.last == w.last));
    others += !fits;
    if (!fits) continue;
    int64_t first = self->slots;
    self->slots += 3;
    for (int kind = 0; kind < 3; kind++) slots[3 * places[k] + kind] = first + kind;
    sgd_rows(w.at, g.at, b.at, w.n, &s, self->scales + first, self->rows + 8 * first);
    Foretold *told = &self->foretold[self->told++];
    *told = (Foretold){.at = w.at, .n = w.n};
    for (int c = 0; c < CHECKED; c++) {
      int64_t at = c * (w.n - 1) / (CHECKED - 1);
      told->value[c] = stepped(w.at[at], g.at[at], b.at ? b.at[at] : 0, b.at != NULL, &s);
    }
  }
  return PyLong_FromLong(others);
}

/* holds(owners, names, params): whether owners[k]["_parameters"].get(names[k]) still is params[k]; owners are the __dict__
 * of modules. */
static PyObject *rows_holds(Rows *Py_UNUSED(self), PyObject *args) {
  PyObject *owners, *names, *params;
  if (!PyArg_ParseTuple(args, "O!O!O!", &PyList_Type, &owners, &PyList_Type, &names, &PyList_Type, &params)) return NULL;
  Py_ssize_t count = PyList_GET_SIZE(params);
  int same = PyList_GET_SIZE(owners) == count && PyList_GET_SIZE(names) == count;
  for (Py_ssize_t k = 0; same && k < count; k++) {
    PyObject *now = value_of(value_of(PyList_GET_ITEM(owners, k), s_parameters), PyList_GET_ITEM(names, k));
    same = (now ? now : Py_None) == PyList_GET_ITEM(params, k);
  }
  return PyBool_FromLong(same);
}

/* stepped(params): how many of the parameters that `sgd` read since the last call do not hold what it foretold; to be
 * given in its order. */
static PyObject *rows_stepped(Rows *self, PyObject *params) {
  if (!PyList_Check(params)) return PyErr_SetString(PyExc_TypeError, "stepped takes a list"), NULL;
  Py_ssize_t count = PyList_GET_SIZE(params);
  long others = count != self->told;
  for (Py_ssize_t k = 0; k < count && k < self->told; k++) {
    const Foretold *told = &self->foretold[k];
    Plain now;
    int same = torch_plain(PyList_GET_ITEM(params, k), &now) && now.at == told->at && now.n == told->n;
    for (int c = 0; same && c < CHECKED; c++) {
      float is = told->at[c * (told->n - 1) / (CHECKED - 1)], said = told->value[c];
      /* A compiler may round once where torch rounds twice: two units in the last place. */
      same = is == said || fabsf(is - said) <= 2.4e-7f * fabsf(said) || (is != is && said != said);
    }
    others += !same;
  }
  self->told = 0;
  return PyLong_FromLong(others);
}
