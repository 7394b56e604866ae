/* The largest attention that rows pay to each token of a context: what `attention_peaks/dense.py` computes. Threads are
 * torch's own; see `peaks.py`. As in `prompt.c` a vector has one number for each of several rows. */

#include <math.h>

#include "strips.h"

/* Vectors are floats or, with `pairs`, bfloat16: `query` [heads, rows, dim], `keys` [heads, count, dim] of the context, then
 * [heads, own, dim] of what follows it, padded with zeros to multiples of 8 tokens, which `steps` count. `last` [rows]: the
 * last of the own tokens that a row sees, ascending. */
typedef struct {
    const lane *query, *keys[2];
    const int32_t *last;
    float *out; /* [strips, heads, counts[0]]: logarithms to base 2 */
    int64_t heads, rows, counts[2], steps[2], dim, pairs, room, threads;
    float scale; /* of logits to base 2 */
} Call;

ALWAYS void meet(
    const Call *c, int64_t h, const vec *query, const ivec *last, int64_t own, vec *logits, float *out, int wide, int pairs
) {
    const int depth = (int)(pairs ? c->dim / 2 : c->dim);
    const int64_t before = c->counts[0], first = c->steps[0];
    vec *const rest = logits + first * wide;
    dots(logits, 0, query, c->keys[0] + h * c->steps[0] * depth, before, depth, wide, pairs);
    dots(rest, 0, query, c->keys[1] + h * c->steps[1] * depth, own, depth, wide, pairs);
    vec largest[WIDE], base[WIDE];
    for (int j = 0; j < wide; j++) {
        vec highest = every(BELOW), total = every(0);
        for (int64_t k = 0; k < before; k++) highest = larger(highest, logits[k * wide + j]);
        for (int64_t k = 0; k < own; k++)
            highest = larger(highest, choose(last[j] >= (int32_t)k, rest[k * wide + j], every(HIDDEN)));
        largest[j] = highest * c->scale;
        for (int64_t k = 0; k < before; k++) total += power(logits[k * wide + j] * c->scale - largest[j], 0);
        for (int64_t k = 0; k < own; k++) {
            const ivec seen = last[j] >= (int32_t)k;
            const vec weight = power(choose(seen, rest[k * wide + j] * c->scale - largest[j], every(0)), 0);
            total += choose(seen, weight, every(0));
        }
        for (int i = 0; i < WIDTH; i++) ((float *)&base[j])[i] = ((float *)&largest[j])[i] + log2f(((float *)&total)[i]);
    }
    for (int64_t k = 0; k < before; k++) {
        vec most = logits[k * wide] * c->scale - base[0];
        for (int j = 1; j < wide; j++) most = larger(most, logits[k * wide + j] * c->scale - base[j]);
        float found = most[0];
        for (int i = 1; i < WIDTH; i++) found = most[i] > found ? most[i] : found;
        out[k] = found;
    }
}

typedef void Meet(const Call *, int64_t, const vec *, const ivec *, int64_t, vec *, float *);
#define MADE(W, P) \
    static void meet_##W##_##P( \
        const Call *c, int64_t h, const vec *query, const ivec *last, int64_t own, vec *logits, float *out \
    ) { \
        meet(c, h, query, last, own, logits, out, W, P); \
    }
EACH_KIND(MADE)
static Meet *const MEET[][WIDE] = KINDS;

/* Rows [first, stop) of a KV head, WIDE vectors at most. With `scratch` NULL: no work, but the bytes of it. */
static int64_t strip(const Call *c, int64_t h, int64_t first, int64_t stop, char *scratch) {
    const int depth = (int)(c->pairs ? c->dim / 2 : c->dim), wide = (int)((stop - first + WIDTH - 1) / WIDTH);
    char *next = scratch;
    lane *stage = take(&next, 4L * WIDTH * depth);
    vec *query = take(&next, (int64_t)sizeof(vec) * depth * wide);
    ivec *last = take(&next, (int64_t)sizeof(vec) * wide);
    vec *logits = take(&next, (int64_t)sizeof(vec) * (c->steps[0] + c->steps[1]) * wide);
    if (!scratch) return next - scratch;
    lay(query, c->query + (h * c->rows + first) * depth, stop - first, wide, depth, stage);
    for (int i = 0; i < wide * WIDTH; i++) ((int32_t *)last)[i] = c->last[first + i < stop ? first + i : stop - 1];
    float *out = c->out + (first / (WIDE * WIDTH) * c->heads + h) * c->counts[0];
    MEET[c->pairs][wide - 1](c, h, query, last, c->last[stop - 1] + 1, logits, out);
    return 0;
}

LAUNCHED(peaks, heads)
