/* Vectors as quantised heads store them, and back: what `kernels/transform.py` defines, in float32. */

/* The matrices of a layer [heads, dim, dim] and its means [heads, dim]; all NULL where no head is quantised. */
typedef struct {
    const float *key, *key_inverse, *key_mean, *value, *value_inverse, *value_mean;
} Transform;

/* y = M x */
static void product(const float *restrict m, const float *restrict x, float *restrict y, int dim) {
    for (int i = 0; i < dim; i++) {
        float sum = 0;
        for (int j = 0; j < dim; j++) sum += m[i * dim + j] * x[j];
        y[i] = sum;
    }
}

/* y = M^T x */
static void product_of_transposed(const float *restrict m, const float *restrict x, float *restrict y, int dim) {
    memset(y, 0, sizeof(float) * dim);
    for (int i = 0; i < dim; i++)
        for (int j = 0; j < dim; j++) y[j] += m[i * dim + j] * x[i];
}

/* T (x - mean) of a new key or value, in place; `room` [dim]. */
static void transform(const float *matrices, const float *means, int head, float *x, float *room, int dim) {
    if (!matrices) return;
    for (int i = 0; i < dim; i++) room[i] = x[i] - means[head * dim + i];
    product(matrices + (int64_t)head * dim * dim, room, x, dim);
}

/* T^-T q of a query, in place. */
static void transform_query(const Transform *t, int head, float *q, float *room, int dim) {
    if (!t->key_inverse) return;
    memcpy(room, q, sizeof(float) * dim);
    product_of_transposed(t->key_inverse + (int64_t)head * dim * dim, room, q, dim);
}

/* T^-1 o + mean of an output, in place. */
static void restore(const Transform *t, int head, float *o, float *room, int dim) {
    if (!t->value_inverse) return;
    memcpy(room, o, sizeof(float) * dim);
    product(t->value_inverse + (int64_t)head * dim * dim, room, o, dim);
    for (int i = 0; i < dim; i++) o[i] += t->value_mean[head * dim + i];
}
