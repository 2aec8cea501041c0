/* What hooks.c asks of torch: answered by torch_side.cpp, the only file that sees torch's headers. */
#include <stdint.h>

typedef struct {
  const float *at;
  int64_t n, version;                  /* version: -1 of a tensor made in inference mode, which counts none */
  void *itself, *whole;                /* torch's object, and that of which it is a view of all entries, or null */
  int64_t whole_version;
  char last, requires_grad, has_node;  /* last: channels come last in memory */
} Plain;

#ifdef __cplusplus
extern "C" {
#endif

/* torch.Tensor and torch.nn.Parameter: of other classes nothing is asked. */
void torch_setup(PyObject *tensor, PyObject *parameter);
/* Whether the kernel can read the entries of x as they lie: a dense float32 CPU tensor with entries. */
int torch_plain(PyObject *x, Plain *out);
/* Whether x is a tensor at all, of which only n, requires_grad and has_node are told. */
int torch_tensor(PyObject *x, Plain *out);
/* The same as torch_plain of its gradient. */
int torch_plain_gradient(PyObject *x, Plain *out);
int torch_grad_enabled(void);
int torch_recomputing(void); /* a forward pass inside a backward pass */

/* While a tensor is held so, no other gets its address; its memory is not kept. */
void *torch_hold(void *itself);
void torch_let_go(void *held);

/* What gradient hooks reach an Outputs by: it knows when that is gone, and keeps nothing alive. */
void *torch_anchor(PyObject *outputs);
void torch_cut(void *anchor);
/* Have gradient_arrived called with the gradient of x, which has a graph node. */
int torch_follow(PyObject *x, void *anchor, int64_t index, int64_t generation);

/* In outputs.c, called with the interpreter's lock held. x is null where the gradient is not plain; then `grad` is the
 * tensor. Returns 0, or -1 with an exception set. */
int gradient_arrived(PyObject *outputs, int64_t index, int64_t generation, const Plain *x, PyObject *grad);

#ifdef __cplusplus
}
#endif
