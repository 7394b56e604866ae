/* The gradient of attention to a context and to what follows it: what `attention_gradient/dense.py` computes. Threads are
 * torch's own; see `gradient.py`. As in `prompt.c` a vector has one number for each of several rows. */

#include "strips.h"

/* Vectors are floats or, with `pairs`, bfloat16. `query` and `upstream` [heads, rows, dim]; `keys` and `values` of the context
 * [heads, counts[0], dim], then of what follows [heads, counts[1], dim], padded with zeros to multiples of 8 tokens, which
 * `steps` count; `turned` the keys again, with pairs [heads, steps / 2, dim] of two neighbouring tokens. `last` [rows]: the
 * last of the own tokens that a row sees. */
typedef struct {
    const lane *query, *upstream, *keys[2], *values[2], *turned[2];
    const int32_t *last;
    float *by_query;          /* [heads, rows, dim] */
    float *weights, *slopes;  /* [heads, rows, counts[1]]: of own tokens, probabilities and gradients of logits */
    int64_t heads, rows, counts[2], steps[2], dim, pairs, room, threads;
    float scale; /* of logits to base 2 */
} Call;

typedef struct {
    vec *query, *upstream, *logits, *gains, *sums;
    ivec *last;
} Strip;

ALWAYS void meet(const Call *c, const Strip *s, int64_t h, int64_t first_row, int64_t count, int wide, int pairs) {
    const int dim = (int)c->dim, depth = pairs ? dim / 2 : dim;
    const int64_t before = c->counts[0], padded = c->steps[0], own = c->counts[1], all = padded + c->steps[1];
    for (int part = 0; part < 2; part++) {
        const int64_t from = part ? padded : 0, columns = c->steps[part];
        dots(s->logits + from * wide, 0, s->query, c->keys[part] + h * columns * depth, columns, depth, wide, pairs);
        dots(s->gains + from * wide, 0, s->upstream, c->values[part] + h * columns * depth, columns, depth, wide, pairs);
    }
    for (int j = 0; j < wide; j++) {
        vec highest = every(BELOW), total = every(0), effect = every(0);
        vec *logits = s->logits + j, *gains = s->gains + j;
        const ivec last = s->last[j];
        for (int64_t k = 0; k < before; k++) highest = larger(highest, logits[k * wide]);
        for (int64_t k = 0; k < own; k++)
            highest = larger(highest, choose(last >= (int32_t)k, logits[(padded + k) * wide], every(HIDDEN)));
        highest *= c->scale;
        for (int64_t k = 0; k < all; k++) {
            const ivec context = (ivec){0} - (k < before), seen = k < padded ? context : (ivec)(last >= (int32_t)(k - padded));
            const vec weight = power(choose(seen, logits[k * wide] * c->scale - highest, every(0)), 0);
            logits[k * wide] = choose(seen, weight, every(0));
            total += logits[k * wide], effect += logits[k * wide] * gains[k * wide];
        }
        const vec inverse = 1.0f / total, mean = effect * inverse;
        for (int64_t k = 0; k < all; k++) {
            logits[k * wide] *= inverse;
            gains[k * wide] = logits[k * wide] * (gains[k * wide] - mean);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = (h * c->rows + first_row + i) * own, lane_of = padded * wide * WIDTH + i;
        for (int64_t k = 0; k < own; k++) {
            c->weights[at + k] = ((const float *)s->logits)[lane_of + k * wide * WIDTH];
            c->slopes[at + k] = ((const float *)s->gains)[lane_of + k * wide * WIDTH];
        }
    }
    if (pairs)
        for (int64_t k = 0; k < all; k += 2)
            for (int j = 0; j < wide; j++)
                s->gains[k / 2 * wide + j] = pair(s->gains[k * wide + j], s->gains[(k + 1) * wide + j]);
    memset(s->sums, 0, sizeof(vec) * dim * wide);
    for (int part = 0; part < 2; part++) {
        const int64_t from = part ? padded : 0, columns = c->steps[part], deep = pairs ? columns / 2 : columns;
        mix(s->sums, s->gains + (pairs ? from / 2 : from) * wide, c->turned[part] + h * deep * dim, deep, dim, wide, pairs);
    }
    for (int64_t i = 0; i < count; i++) {
        float *to = c->by_query + (h * c->rows + first_row + i) * dim;
        for (int d = 0; d < dim; d++) to[d] = ((const float *)s->sums)[(ptrdiff_t)d * wide * WIDTH + i];
    }
}

typedef void Meet(const Call *, const Strip *, int64_t, int64_t, int64_t);
#define MADE(W, P) \
    static void meet_##W##_##P(const Call *c, const Strip *s, int64_t h, int64_t first_row, int64_t count) { \
        meet(c, s, h, first_row, count, W, P); \
    }
EACH_KIND(MADE)
static Meet *const MEET[][WIDE] = KINDS;

/* Rows [first, stop) of a KV head, WIDE vectors at most. With `scratch` NULL: no work, but the bytes of it. */
static int64_t strip(const Call *c, int64_t h, int64_t first, int64_t stop, char *scratch) {
    const int depth = (int)(c->pairs ? c->dim / 2 : c->dim), wide = (int)((stop - first + WIDTH - 1) / WIDTH);
    const int64_t columns = c->steps[0] + c->steps[1], at = (h * c->rows + first) * depth;
    char *next = scratch;
    Strip s;
    lane *stage = take(&next, 4L * WIDTH * depth);
    s.query = take(&next, (int64_t)sizeof(vec) * depth * wide), s.upstream = take(&next, (int64_t)sizeof(vec) * depth * wide);
    s.logits = take(&next, (int64_t)sizeof(vec) * columns * wide), s.gains = take(&next, (int64_t)sizeof(vec) * columns * wide);
    s.sums = take(&next, (int64_t)sizeof(vec) * c->dim * wide), s.last = take(&next, (int64_t)sizeof(vec) * wide);
    if (!scratch) return next - scratch;
    lay(s.query, c->query + at, stop - first, wide, depth, stage);
    lay(s.upstream, c->upstream + at, stop - first, wide, depth, stage);
    for (int i = 0; i < wide * WIDTH; i++) ((int32_t *)s.last)[i] = c->last[first + i < stop ? first + i : stop - 1];
    MEET[c->pairs][wide - 1](c, &s, h, first, stop - first);
    return 0;
}

LAUNCHED(gradient, heads)
