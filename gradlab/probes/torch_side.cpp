/* The hooks' questions to torch in its own words. A question in Python's words costs fifty nanoseconds and more, a gradient
 * hook in Python a Python object for each gradient. Of torch's headers only that of the plain tensor is read, which takes
 * three seconds to compile where those of the Python bindings take half a minute; what is needed of them is declared here,
 * and native.py makes sure that it is as in the header (MAYBE_OWNED) and tries the result in a process of its own.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/core/TensorBase.h>
#include <c10/core/GradMode.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "torch_side.h"

#ifdef MAYBE_OWNED
#include <c10/util/MaybeOwned.h>
#endif

namespace torch::autograd {
int get_current_graph_task_id();
}
PyObject *THPVariable_Wrap(const at::TensorBase &);

namespace {

PyObject *tensor_type, *parameter_type;

struct PythonTensor {
  PyObject_HEAD
#ifdef MAYBE_OWNED
  c10::MaybeOwned<at::TensorBase> data;
  const at::TensorBase &tensor() const { return *data; }
#else
  at::TensorBase data;
  const at::TensorBase &tensor() const { return data; }
#endif
};

const at::TensorBase *tensor_of(PyObject *x) {
  if ((PyObject *)Py_TYPE(x) != tensor_type && (PyObject *)Py_TYPE(x) != parameter_type) return nullptr;
  return &reinterpret_cast<PythonTensor *>(x)->tensor();
}

int64_t version_of(const at::TensorBase &x) { return x.is_inference() ? -1 : x._version(); }

const c10::DispatchKeySet not_itself({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                      c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});

bool look(const at::TensorBase &x, Plain *out) {
  if (!x.defined()) return false;
  const c10::TensorImpl *t = x.unsafeGetTensorImpl();
  /* What torch.func hands through a model has no entries of its own; what a Python class stands for is its own affair. */
  if (!t->is_cpu() || t->layout() != c10::kStrided || t->dtype() != caffe2::TypeMeta::Make<float>() ||
      !t->has_storage() || t->is_nested() || t->is_neg() ||
      t->key_set().has_any(not_itself))
    return false;
  out->last = 0;
  if (!x.is_contiguous()) {
    if (x.dim() != 4 || !x.is_contiguous(at::MemoryFormat::ChannelsLast)) return false;
    out->last = 1;
  }
  out->n = x.numel();
  if (out->n <= 0) return false;
  out->at = static_cast<const float *>(x.const_data_ptr());
  return out->at != nullptr;
}

void look_at_graph(const at::TensorBase &x, Plain *out) {
  out->requires_grad = x.requires_grad();
  out->has_node = out->requires_grad && x.grad_fn() != nullptr;
}

void look_closer(const at::TensorBase &x, Plain *out) {
  out->version = version_of(x), out->itself = x.unsafeGetTensorImpl(), out->whole = nullptr, out->whole_version = -1;
  look_at_graph(x, out);
  if (!x.is_view()) return;
  const at::TensorBase &base = x._base();
  Plain all;
  if (look(base, &all) && all.n == out->n) out->whole = base.unsafeGetTensorImpl(), out->whole_version = version_of(base);
}

bool look_safely(const at::TensorBase &x, Plain *out) {
  try {
    if (!look(x, out)) return false;
    look_closer(x, out);
    return true;
  } catch (const std::exception &) { /* a tensor that cannot say: the way through Python asks again */
    return false;
  }
}

struct Anchor {
  PyObject *outputs; /* borrowed; null when it is gone. Read and written with the interpreter's lock held */
};
using Shared = std::shared_ptr<Anchor>;

/* Whatever a slow way raised becomes torch's exception, which ends the backward pass; Ctrl-C comes again where it belongs,
 * in the main thread between two lines of Python. */
std::string take_error() {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  std::string text;
  if (type && PyErr_GivenExceptionMatches(type, PyExc_KeyboardInterrupt)) {
    PyErr_SetInterrupt();
  } else {
    PyObject *words = value ? PyObject_Str(value) : nullptr;
    const char *said = words ? PyUnicode_AsUTF8(words) : nullptr;
    text = std::string(type ? reinterpret_cast<PyTypeObject *>(type)->tp_name : "error") + ": " + (said ? said : "");
    Py_XDECREF(words);
    PyErr_Clear();
  }
  Py_XDECREF(type), Py_XDECREF(value), Py_XDECREF(trace);
  return text;
}

PyObject *wrapped(const at::TensorBase &x) {
  try {
    return THPVariable_Wrap(x);
  } catch (const std::exception &error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

void arrive(const Shared &anchor, int64_t index, int64_t generation, const at::TensorBase &grad) {
  if (!grad.defined() || !Py_IsInitialized()) return;
  Plain x;
  bool plain = look_safely(grad, &x);
  std::string error;
  PyGILState_STATE lock = PyGILState_Ensure();
  if (PyObject *outputs = anchor->outputs) {
    Py_INCREF(outputs);
    PyObject *tensor = plain ? nullptr : wrapped(grad);
    if ((!plain && !tensor) || gradient_arrived(outputs, index, generation, plain ? &x : nullptr, tensor))
      error = take_error();
    Py_XDECREF(tensor);
    Py_DECREF(outputs);
  }
  PyGILState_Release(lock);
  if (!error.empty()) throw std::runtime_error("gradlab could not record a gradient: " + error);
}

/* C++ exceptions must not pass through C. */
template <typename F>
int guarded(F &&f) {
  try {
    return f();
  } catch (const std::exception &error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return -1;
  }
}

} /* namespace */

void torch_setup(PyObject *tensor, PyObject *parameter) {
  Py_INCREF(tensor), Py_INCREF(parameter);
  tensor_type = tensor, parameter_type = parameter;
}

int torch_plain(PyObject *x, Plain *out) {
  const at::TensorBase *tensor = tensor_of(x);
  return tensor && look_safely(*tensor, out);
}

int torch_tensor(PyObject *x, Plain *out) {
  const at::TensorBase *tensor = tensor_of(x);
  if (!tensor) return 0;
  try {
    out->n = tensor->numel();
    look_at_graph(*tensor, out);
    return 1;
  } catch (const std::exception &) {
    return 0;
  }
}

int torch_plain_gradient(PyObject *x, Plain *out) {
  const at::TensorBase *tensor = tensor_of(x);
  /* at::Tensor is a TensorBase with more methods, of which none is needed */
  return tensor && look_safely(reinterpret_cast<const at::TensorBase &>(tensor->unsafeGetTensorImpl()->grad()), out);
}

int torch_grad_enabled(void) { return c10::GradMode::is_enabled(); }

int torch_recomputing(void) { return torch::autograd::get_current_graph_task_id() != -1; }

void *torch_hold(void *itself) {
  c10::raw::intrusive_ptr::make_weak(static_cast<c10::TensorImpl *>(itself));
  return itself;
}

void torch_let_go(void *held) { c10::raw::weak_intrusive_ptr::decref(static_cast<c10::TensorImpl *>(held)); }

void *torch_anchor(PyObject *outputs) { return new Shared(std::make_shared<Anchor>(Anchor{outputs})); }

void torch_cut(void *anchor) {
  auto *shared = static_cast<Shared *>(anchor);
  (*shared)->outputs = nullptr;
  delete shared;
}

int torch_follow(PyObject *x, void *anchor, int64_t index, int64_t generation) {
  return guarded([&] {
    tensor_of(x)->register_hook([shared = *static_cast<Shared *>(anchor), index, generation](const at::TensorBase &grad) {
      arrive(shared, index, generation, grad);
    });
    return 0;
  });
}
