/* One read of a float32 tensor for all its statistics. Plain C, called with a pointer and a length.
 *
 * A row is scale, sum, squares, spread, min, max, zeros, nonfinite, as in reduce.py. The quick pass keeps LANES partial
 * results apart so that the compiler vectorizes it, and adds them up in double after every block. What it cannot get
 * right (squares outside float32's range, NaN, Inf, a mean far larger than the spread) is read again in double about a
 * pivot, whose range holds every float32 square.
 */
#include <math.h>
#include <stdint.h>

#define LANES 16
#define BLOCK 8192
#define SAFE_SQUARES 1e-25
#define SAFE_VARIANCE 1e-3

static void exact(const float *x, int64_t n, double *row) {
  double s[LANES] = {0}, q[LANES] = {0}, ds[LANES] = {0}, dq[LANES] = {0}, lo[LANES], hi[LANES];
  int64_t z[LANES] = {0}, bad[LANES] = {0}, nans[LANES] = {0};
  double pivot = isfinite(x[0]) ? x[0] : 0.0;
  for (int l = 0; l < LANES; l++) lo[l] = INFINITY, hi[l] = -INFINITY;
#define STEP(l)                                                                                                        \
  do {                                                                                                                 \
    double v = x[start + l], d = v - pivot;                                                                            \
    s[l] += v, q[l] += v * v, ds[l] += d, dq[l] += d * d;                                                              \
    z[l] += v == 0.0, bad[l] += !(v - v == 0.0), nans[l] += v != v; /* v - v is NaN for NaN and Inf */                 \
    lo[l] = v < lo[l] ? v : lo[l], hi[l] = v > hi[l] ? v : hi[l];                                                      \
  } while (0)
  int64_t start = 0;
  for (; start + LANES <= n; start += LANES)
    for (int l = 0; l < LANES; l++) STEP(l);
  for (int l = 0; start + l < n; l++) STEP(l);
#undef STEP
  for (int l = 1; l < LANES; l++) {
    s[0] += s[l], q[0] += q[l], ds[0] += ds[l], dq[0] += dq[l];
    z[0] += z[l], bad[0] += bad[l], nans[0] += nans[l];
    lo[0] = lo[l] < lo[0] ? lo[l] : lo[0];
    hi[0] = hi[l] > hi[0] ? hi[l] : hi[0];
  }
  double spread = dq[0] - ds[0] * ds[0] / (double)n;
  row[0] = 1.0;
  row[1] = s[0];
  row[2] = q[0];
  row[3] = spread < 0 ? 0.0 : spread; /* keeps NaN */
  row[4] = nans[0] ? NAN : lo[0];
  row[5] = nans[0] ? NAN : hi[0];
  row[6] = (double)z[0];
  row[7] = (double)bad[0];
}

void gradlab_row(const float *x, int64_t n, int32_t moments, double *row) {
  double sum = 0, squares = 0;
  float low = INFINITY, high = -INFINITY;
  int64_t zeros = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const float *p = x + start;
    int64_t m = n - start < BLOCK ? n - start : BLOCK, k = 0;
    float s[LANES] = {0}, q[LANES] = {0}, lo[LANES], hi[LANES];
    int32_t z[LANES] = {0};
    for (int l = 0; l < LANES; l++) lo[l] = INFINITY, hi[l] = -INFINITY;
    for (; k + LANES <= m; k += LANES)
      for (int l = 0; l < LANES; l++) {
        float v = p[k + l];
        s[l] += v;
        q[l] += v * v;
        lo[l] = v < lo[l] ? v : lo[l];
        hi[l] = v > hi[l] ? v : hi[l];
        z[l] += v == 0.0f;
      }
    for (int l = 0; k < m; k++, l++) {
      float v = p[k];
      s[l] += v;
      q[l] += v * v;
      lo[l] = v < lo[l] ? v : lo[l];
      hi[l] = v > hi[l] ? v : hi[l];
      z[l] += v == 0.0f;
    }
    for (int l = 0; l < LANES; l++) {
      sum += s[l];
      squares += q[l];
      zeros += z[l];
      low = lo[l] < low ? lo[l] : low;
      high = hi[l] > high ? hi[l] : high;
    }
  }
  double spread = squares - sum * sum / (double)n;
  int safe = (isfinite(squares) && squares >= SAFE_SQUARES && (!moments || spread > SAFE_VARIANCE * squares)) ||
             (squares == 0.0 && low == 0.0f && high == 0.0f);
  if (!safe) {
    exact(x, n, row);
    return;
  }
  row[0] = 1.0;
  row[1] = sum;
  row[2] = squares;
  row[3] = spread < 0 ? 0.0 : spread;
  row[4] = low;
  row[5] = high;
  row[6] = (double)zeros;
  row[7] = 0.0;
}

/* Sum of squares of a, or of a - b where b is given; but for scale, squares and nonfinite the row holds NaN. */
void gradlab_norm(const float *a, const float *b, int64_t n, double *row) {
  double squares = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const float *p = a + start;
    int64_t m = n - start < BLOCK ? n - start : BLOCK, k = 0;
    float q[LANES] = {0};
    if (b) {
      const float *r = b + start;
      for (; k + LANES <= m; k += LANES)
        for (int l = 0; l < LANES; l++) {
          float v = p[k + l] - r[k + l];
          q[l] += v * v;
        }
      for (int l = 0; k < m; k++, l++) {
        float v = p[k] - r[k];
        q[l] += v * v;
      }
    } else {
      for (; k + LANES <= m; k += LANES)
        for (int l = 0; l < LANES; l++) q[l] += p[k + l] * p[k + l];
      for (int l = 0; k < m; k++, l++) q[l] += p[k] * p[k];
    }
    for (int l = 0; l < LANES; l++) squares += q[l];
  }
  int64_t nonfinite = 0;
  if (!(isfinite(squares) && squares >= SAFE_SQUARES)) {
    double q[LANES] = {0};
    int64_t bad[LANES] = {0};
    int64_t start = 0;
#define STEP(l)                                                                                                        \
  do {                                                                                                                 \
    float difference = b ? a[start + l] - b[start + l] : a[start + l];                                                 \
    double v = difference;                                                                                             \
    q[l] += v * v, bad[l] += !(v - v == 0.0);                                                                          \
  } while (0)
    for (; start + LANES <= n; start += LANES)
      for (int l = 0; l < LANES; l++) STEP(l);
    for (int l = 0; start + l < n; l++) STEP(l);
#undef STEP
    squares = 0;
    for (int l = 0; l < LANES; l++) squares += q[l], nonfinite += bad[l];
  }
  for (int k = 0; k < 8; k++) row[k] = NAN;
  row[0] = 1.0;
  row[2] = squares;
  row[7] = (double)nonfinite;
}
