/* Vectors as quantised heads store them, and back: what `kernels/transform.py` defines, in float32. */

/* The matrices of a layer [heads, dim, dim], by which a vector is multiplied from the left, and its means [heads, dim]; all
 * NULL where no head is quantised. */
typedef struct {
    const float *key, *key_inverse, *key_mean, *value, *value_inverse, *value_mean;
} Transform;

/* y = x M for `count` vectors, at most four, that share what is read of the matrix. */
ALWAYS void multiply_some(const float *restrict x, const float *restrict m, float *restrict y, int count, int dim) {
    int i = 0;
    for (; i + 32 <= dim; i += 32) {
        Floats sums[4][4] = {{{0}}};
        for (int j = 0; j < dim; j++) {
            const Floats *row = (const Floats *)(m + j * dim + i);
            _Pragma("GCC unroll 4") for (int r = 0; r < count; r++)
                _Pragma("GCC unroll 4") for (int e = 0; e < 4; e++) sums[r][e] += x[r * dim + j] * row[e];
        }
        for (int r = 0; r < count; r++) memcpy(y + r * dim + i, sums[r], sizeof(sums[r]));
    }
    for (; i < dim; i++)
        for (int r = 0; r < count; r++) {
            float sum = 0;
            for (int j = 0; j < dim; j++) sum += x[r * dim + j] * m[j * dim + i];
            y[r * dim + i] = sum;
        }
}

static void multiply(const float *x, const float *m, float *y, int count, int dim) {
    for (; count >= 4; count -= 4, x += 4 * dim, y += 4 * dim) multiply_some(x, m, y, 4, dim);
    if (count == 3) multiply_some(x, m, y, 3, dim);
    if (count == 2) multiply_some(x, m, y, 2, dim);
    if (count == 1) multiply_some(x, m, y, 1, dim);
}

/* T (x - mean) of a new key or value, in place; `room` [dim]. */
static void transform(const float *matrices, const float *means, int head, float *x, float *room, int dim) {
    if (!matrices) return;
    for (int i = 0; i < dim; i++) room[i] = x[i] - means[head * dim + i];
    multiply(room, matrices + (int64_t)head * dim * dim, x, 1, dim);
}

/* T^-T q of queries [count], to `moved`. */
static void transform_queries(const Transform *t, int head, const float *q, float *moved, int count, int dim) {
    if (t->key_inverse) multiply(q, t->key_inverse + (int64_t)head * dim * dim, moved, count, dim);
    else memcpy(moved, q, sizeof(float) * count * dim);
}

/* T^-1 o + mean of outputs [count], to `moved`. */
static void restore(const Transform *t, int head, const float *o, float *moved, int count, int dim) {
    if (t->value_inverse) multiply(o, t->value_inverse + (int64_t)head * dim * dim, moved, count, dim);
    else memcpy(moved, o, sizeof(float) * count * dim);
    for (int r = 0; t->value_mean && r < count; r++)
        for (int i = 0; i < dim; i++) moved[r * dim + i] += t->value_mean[head * dim + i];
}
