/* How much errors in attention to a context matter: what `error_weights/dense.py` computes. Threads are torch's own; see
 * `errors.py`. As in `prompt.c` a vector has one number for each of several rows, here of one query head. */

#include "strips.h"

/* Vectors are floats or, with `pairs`, bfloat16. `query` [num_heads, rows, dim]; `keys` of the context [heads, counts[0], dim],
 * then of what follows [heads, counts[1], dim], and `values` of the context, all padded with zeros to multiples of 8 tokens,
 * which `steps` count; `turned` its values again, with pairs [heads, steps[0] / 2, dim] of two neighbouring tokens.
 * `last` [rows]: the last of the own tokens that a row sees, ascending. `metric` [num_heads, dim, dim] M, and `energy`
 * [num_heads, counts[0]] v'Mv. */
typedef struct {
    const lane *query, *keys[2], *values, *turned;
    const int32_t *last;
    const float *metric, *energy;
    float *by_token; /* [strips, num_heads, 2, counts[0]]: of keys, then of values */
    float *by_row;   /* [num_heads, 2, rows]: of queries, then of outputs */
    int64_t num_heads, group, rows, counts[2], steps[2], dim, pairs, room, threads;
    float scale; /* of logits to base 2 */
} Call;

typedef struct {
    vec *query, *logits, *other, *mixed, *moved;
    ivec *last;
} Strip;

ALWAYS float total_of(vec x) {
    float sum = x[0];
    for (int i = 1; i < WIDTH; i++) sum += x[i];
    return sum;
}

/* `count` rows from `first` on of query head q. */
ALWAYS void meet(const Call *c, const Strip *s, int64_t q, int64_t first, int64_t count, int64_t own, int wide, int pairs) {
    const int dim = (int)c->dim, depth = pairs ? dim / 2 : dim;
    const int64_t h = q / c->group, before = c->counts[0], padded = c->steps[0];
    vec *rest = s->logits + padded * wide;
    const lane *values = c->values + h * padded * depth, *turned = c->turned + h * padded * depth;
    dots(s->logits, 0, s->query, c->keys[0] + h * padded * depth, padded, depth, wide, pairs);
    dots(rest, 0, s->query, c->keys[1] + h * c->steps[1] * depth, own, depth, wide, pairs);
    for (int j = 0; j < wide; j++) {
        vec highest = every(BELOW), total = every(0), *logits = s->logits + j;
        for (int64_t k = 0; k < before; k++) highest = larger(highest, logits[k * wide]);
        for (int64_t k = 0; k < own; k++)
            highest = larger(highest, choose(s->last[j] >= (int32_t)k, rest[k * wide + j], every(HIDDEN)));
        highest *= c->scale;
        for (int64_t k = 0; k < before; k++)
            total += logits[k * wide] = power(logits[k * wide] * c->scale - highest, 0);
        for (int64_t k = 0; k < own; k++) {
            const ivec seen = s->last[j] >= (int32_t)k;
            const vec weight = power(choose(seen, rest[k * wide + j] * c->scale - highest, every(0)), 0);
            total += choose(seen, weight, every(0));
        }
        const vec inverse = 1.0f / total;
        for (int64_t k = 0; k < before; k++) logits[k * wide] *= inverse;
        for (int64_t k = before; k < padded; k++) logits[k * wide] = every(0);
    }
    /* o, and M o as what is multiplied with values. */
    const vec *weights = s->logits;
    if (pairs) {
        for (int64_t k = 0; k < padded; k += 2)
            for (int j = 0; j < wide; j++)
                s->other[k / 2 * wide + j] = pair(s->logits[k * wide + j], s->logits[(k + 1) * wide + j]);
        weights = s->other;
    }
    vec energy[WIDE], by_row[WIDE][2];
    memset(s->mixed, 0, sizeof(vec) * dim * wide);
    mix(s->mixed, weights, turned, pairs ? padded / 2 : padded, dim, wide, pairs);
    for (int j = 0; j < wide; j++) energy[j] = by_row[j][0] = by_row[j][1] = every(0);
    const float *metric = c->metric + q * dim * dim;
    for (int d = 0; d < dim; d++) {
        vec *to = s->moved + d * wide;
        for (int j = 0; j < wide; j++) to[j] = every(0);
        for (int e = 0; e < dim; e++)
            for (int j = 0; j < wide; j++) to[j] += metric[d * dim + e] * s->mixed[e * wide + j];
        for (int j = 0; j < wide; j++) energy[j] += to[j] * s->mixed[d * wide + j];
    }
    if (pairs)
        for (int d = 0; d < depth; d++)
            for (int j = 0; j < wide; j++)
                s->moved[d * wide + j] = pair(s->moved[2 * d * wide + j], s->moved[(2 * d + 1) * wide + j]);
    dots(s->other, 0, s->moved, values, before, depth, wide, pairs);
    float *keys = c->by_token + (first / (WIDE * WIDTH) * c->num_heads + q) * 2 * before;
    keys[0] = keys[before] = 0; /* token 0 is stored as it is */
    ivec real[WIDE]; /* the last row may be there twice */
    for (int i = 0; i < wide * WIDTH; i++) ((int32_t *)real)[i] = -(i < count);
    for (int64_t k = 1; k < before; k++) {
        vec by_key = every(0), by_value = every(0);
        for (int j = 0; j < wide; j++) {
            const vec p = s->logits[k * wide + j], squared = choose(real[j], p * p, every(0));
            const vec apart = larger(energy[j] + c->energy[q * before + k] - 2 * s->other[k * wide + j], every(0));
            by_key += apart * squared, by_value += squared;
            by_row[j][0] += apart * squared, by_row[j][1] += squared;
        }
        keys[k] = total_of(by_key), keys[before + k] = total_of(by_value);
    }
    for (int64_t i = 0; i < count; i++)
        for (int n = 0; n < 2; n++)
            c->by_row[(q * 2 + n) * c->rows + first + i] = by_row[i / WIDTH][n][i % WIDTH];
}

typedef void Meet(const Call *, const Strip *, int64_t, int64_t, int64_t, int64_t);
#define MADE(W, P) \
    static void meet_##W##_##P(const Call *c, const Strip *s, int64_t q, int64_t first, int64_t count, int64_t own) { \
        meet(c, s, q, first, count, own, W, P); \
    }
EACH_KIND(MADE)
static Meet *const MEET[][WIDE] = KINDS;

/* Rows [first, stop) of a query head, WIDE vectors at most. With `scratch` NULL: no work, but the bytes of it. */
static int64_t strip(const Call *c, int64_t q, int64_t first, int64_t stop, char *scratch) {
    const int depth = (int)(c->pairs ? c->dim / 2 : c->dim), wide = (int)((stop - first + WIDTH - 1) / WIDTH);
    char *next = scratch;
    Strip s;
    lane *stage = take(&next, 4L * WIDTH * depth);
    s.query = take(&next, (int64_t)sizeof(vec) * depth * wide);
    s.logits = take(&next, (int64_t)sizeof(vec) * (c->steps[0] + c->steps[1]) * wide);
    s.other = take(&next, (int64_t)sizeof(vec) * c->steps[0] * wide);
    s.mixed = take(&next, (int64_t)sizeof(vec) * c->dim * wide), s.moved = take(&next, (int64_t)sizeof(vec) * c->dim * wide);
    s.last = take(&next, (int64_t)sizeof(vec) * wide);
    if (!scratch) return next - scratch;
    lay(s.query, c->query + (q * c->rows + first) * depth, stop - first, wide, depth, stage);
    for (int i = 0; i < wide * WIDTH; i++) ((int32_t *)s.last)[i] = c->last[first + i < stop ? first + i : stop - 1];
    MEET[c->pairs][wide - 1](c, &s, q, first, stop - first, c->last[stop - 1] + 1);
    return 0;
}

LAUNCHED(errors, num_heads)
