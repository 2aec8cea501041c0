/* One read of a float32 tensor for all its statistics. Plain C, called with a pointer and a length.
 *
 * A row is scale, sum, squares, spread, min, max, zeros, nonfinite, as in reduce.py. The quick pass keeps LANES partial
 * results apart so that the compiler vectorizes it, and adds them up in double after every block. What it cannot get
 * right (squares outside float32's range, a mean far larger than the spread) is read again, scaled by a power of two and
 * about the mean; what that cannot either (NaN, Inf) in double, whose range holds every float32 square. Where gradients
 * vanish that would be every tensor of every step: so a reading may begin with the power of two that was right the last
 * time (`by`), which changes no digit of a sum of squares.
 *
 * Beside it stand the other reads that a probe makes of a tensor's memory: the largest entry of each channel, and how a
 * BatchNorm layer's batch compares with its running statistics.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define BLOCK 8192
#define SAFE_SQUARES 1e-25
#define SAFE_VARIANCE 1e-3
#define LARGEST_SCALE 0x1p126f /* with it the square of every entry but 0 is above 1e-14 */

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

static float power_of_two(int exponent) {
  return ldexpf(1.0f, exponent < -126 ? -126 : exponent > 126 ? 126 : exponent);
}

/* Read finite entries again, times a power of two that brings the largest to about 1, and about their mean.
 * Fills scale, sum, squares and spread; returns whether they are right. */
static int scaled(const float *x, int64_t n, float top, double mean, int moments, double *row) {
  int exponent;
  frexpf(top, &exponent);
  float by = power_of_two(-exponent), pivot = isfinite(mean) ? (float)(mean * by) : 0.0f;
  double sum = 0, squares = 0, about = 0, about_squares = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    int64_t end = n - start < BLOCK ? n : start + BLOCK, k = start;
    float s[LANES] = {0}, q[LANES] = {0}, ds[LANES] = {0}, dq[LANES] = {0};
#define STEP(at, l)                                                                                                    \
  do {                                                                                                                 \
    float v = x[at] * by, d = v - pivot;                                                                               \
    s[l] += v, q[l] += v * v, ds[l] += d, dq[l] += d * d;                                                              \
  } while (0)
    for (; k + LANES <= end; k += LANES)
      for (int l = 0; l < LANES; l++) STEP(k + l, l);
    for (int l = 0; k < end; k++, l++) STEP(k, l);
#undef STEP
    for (int l = 0; l < LANES; l++) sum += s[l], squares += q[l], about += ds[l], about_squares += dq[l];
  }
  double spread = about_squares - about * about / (double)n;
  row[0] = 1.0 / by, row[1] = sum, row[2] = squares, row[3] = spread < 0 ? 0.0 : spread;
  return isfinite(squares) && squares >= SAFE_SQUARES && (!moments || spread > SAFE_VARIANCE * about_squares);
}

/* The power of two that brings the root mean square of n entries to about 1, or 1 where no scale is needed. */
static float scale_for(double squares, int64_t n) {
  int exponent;
  if (!(isfinite(squares) && squares > 0)) return 1.0f;
  frexp(sqrt(squares / (double)n), &exponent);
  return exponent > -20 && exponent < 30 ? 1.0f : power_of_two(-exponent);
}

static int safe(double squares, float by) {
  return isfinite(squares) && (squares >= SAFE_SQUARES || (squares == 0 && by == LARGEST_SCALE));
}

static void row_by(const float *x, int64_t n, int32_t moments, float *scale, double *row) {
  const float by = *scale;
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
        float v = p[k + l], u = v * by;
        s[l] += u;
        q[l] += u * u;
        lo[l] = v < lo[l] ? v : lo[l];
        hi[l] = v > hi[l] ? v : hi[l];
        z[l] += v == 0.0f;
      }
    for (int l = 0; k < m; k++, l++) {
      float v = p[k], u = v * by;
      s[l] += u;
      q[l] += u * u;
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
  int good = (safe(squares, 1.0f) && (!moments || spread > SAFE_VARIANCE * squares)) ||
             (squares == 0.0 && low == 0.0f && high == 0.0f);
  float top = -low > high ? -low : high;
  if (good) {
    row[0] = 1.0 / by, row[1] = sum, row[2] = squares, row[3] = spread < 0 ? 0.0 : spread;
  } else if (squares != squares || !isfinite(top) || !scaled(x, n, top, sum / by / (double)n, moments, row)) {
    exact(x, n, row);
    *scale = scale_for(row[2], n);
    return;
  } else {
    *scale = scale_for(row[0] * row[0] * row[2], n);
  }
  row[4] = low;
  row[5] = high;
  row[6] = (double)zeros;
  row[7] = 0.0;
}

void gradlab_row(const float *x, int64_t n, int32_t moments, double *row) {
  float by = 1.0f;
  row_by(x, n, moments, &by, row);
}

static double sum_of_squares(const float *a, const float *b, int64_t n, float by) {
  double squares = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const float *p = a + start;
    int64_t m = n - start < BLOCK ? n - start : BLOCK, k = 0;
    float q[LANES] = {0};
    if (b) {
      const float *r = b + start;
      for (; k + LANES <= m; k += LANES)
        for (int l = 0; l < LANES; l++) {
          float v = (p[k + l] - r[k + l]) * by;
          q[l] += v * v;
        }
      for (int l = 0; k < m; k++, l++) {
        float v = (p[k] - r[k]) * by;
        q[l] += v * v;
      }
    } else {
      for (; k + LANES <= m; k += LANES)
        for (int l = 0; l < LANES; l++) {
          float v = p[k + l] * by;
          q[l] += v * v;
        }
      for (int l = 0; k < m; k++, l++) {
        float v = p[k] * by;
        q[l] += v * v;
      }
    }
    for (int l = 0; l < LANES; l++) squares += q[l];
  }
  return squares;
}

/* The same in double, and how many entries are not finite. */
static double exact_squares(const float *a, const float *b, int64_t n, int64_t *nonfinite) {
  double q[LANES] = {0}, squares = 0;
  int64_t bad[LANES] = {0}, start = 0;
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
  *nonfinite = 0;
  for (int l = 0; l < LANES; l++) squares += q[l], *nonfinite += bad[l];
  return squares;
}

/* A row of which scale, squares and nonfinite are known; the others are NaN. */
static void norm_row(double *row, float by, double squares, int64_t nonfinite) {
  for (int k = 0; k < 8; k++) row[k] = NAN;
  row[0] = 1.0 / by, row[2] = squares, row[7] = (double)nonfinite;
}

/* Sum of squares of a, or of a - b where b is given. */
static void norm_by(const float *a, const float *b, int64_t n, float *by, double *row) {
  double squares = sum_of_squares(a, b, n, *by);
  int64_t nonfinite = 0;
  if (!safe(squares, *by)) {
    double exactly = exact_squares(a, b, n, &nonfinite);
    *by = exactly == 0 ? LARGEST_SCALE : scale_for(exactly, n);
    squares = exactly == 0 || nonfinite ? exactly : sum_of_squares(a, b, n, *by);
    if (!safe(squares, *by)) {
      norm_row(row, 1.0f, exactly, nonfinite);
      return;
    }
  }
  norm_row(row, *by, squares, nonfinite);
}

void gradlab_norm(const float *a, const float *b, int64_t n, double *row) {
  float by = 1.0f;
  norm_by(a, b, n, &by, row);
}

/* top[c] = max(top[c], all entries of channel c), for `outer` blocks of `channels` runs of `inner` entries. NaN stays. */
void gradlab_channel_max(const float *restrict x, int64_t outer, int64_t channels, int64_t inner, float *restrict top) {
  if (inner == 1) {
    for (int64_t o = 0; o < outer; o++, x += channels)
      for (int64_t c = 0; c < channels; c++) top[c] = (x[c] > top[c]) | (x[c] != x[c]) ? x[c] : top[c];
    return;
  }
  for (int64_t o = 0; o < outer; o++)
    for (int64_t c = 0; c < channels; c++, x += inner) {
      float most[LANES];
      int64_t k = 0;
      for (int l = 0; l < LANES; l++) most[l] = top[c];
      for (; k + LANES <= inner; k += LANES)
        for (int l = 0; l < LANES; l++) most[l] = (x[k + l] > most[l]) | (x[k + l] != x[k + l]) ? x[k + l] : most[l];
      for (; k < inner; k++) most[0] = x[k] > most[0] || x[k] != x[k] ? x[k] : most[0];
      for (int l = 0; l < LANES; l++) top[c] = most[l] > top[c] || most[l] != most[l] ? most[l] : top[c];
    }
}

/* The seven numbers of batchnorm.py's _STATE from a batch's mean and 1/sqrt(var + eps) of each channel, the running
 * mean and variance as they were before (or null), and gamma (or null); n entries a channel. NaN stays NaN. */
void gradlab_batchnorm(const float *mean, const float *inverse_std, const float *running_mean, const float *running_var,
                       const float *gamma, int64_t channels, int64_t n, double eps, double *row) {
  double least = eps > 1.17549435e-38 ? eps : 1.17549435e-38; /* float32's smallest normal */
  double mean_gap = 0, var_gap = 0, scale = 0, scale_squares = 0, most = 0, fewest = INFINITY, low = 0, vars = 0;
  for (int64_t c = 0; c < channels; c++) {
    double inverse = inverse_std[c], var = 1 / (inverse * inverse) - eps;
    var = var < 0 ? 0 : var;
    vars += var, low += var < eps;
    if (running_mean && running_var) {
      double unbiased = var * ((double)n / (double)(n > 1 ? n - 1 : 1)), running = running_var[c];
      unbiased = unbiased < least ? least : unbiased, running = running < least ? least : running;
      double gap = (double)mean[c] - running_mean[c], ratio = log(unbiased) - log(running);
      mean_gap += gap * gap / unbiased, var_gap += ratio * ratio;
    }
    double g = gamma ? gamma[c] : 1.0, size = fabs(g);
    scale += g;
    most = size > most || size != size ? size : most;
    fewest = size < fewest || size != size ? size : fewest;
  }
  double centre = scale / channels;
  for (int64_t c = 0; c < channels; c++) {
    double g = (gamma ? gamma[c] : 1.0) - centre;
    scale_squares += g * g;
  }
  int known = running_mean && running_var;
  row[0] = known ? sqrt(mean_gap / channels) : NAN;
  row[1] = known ? sqrt(var_gap / channels) : NAN;
  row[2] = centre;
  row[3] = sqrt(scale_squares / channels);
  row[4] = most;
  row[5] = fewest;
  row[6] = low / channels + 0 * vars; /* NaN where a variance is not finite */
  row[7] = NAN;
}
