/* What sets of kept tokens, and other keys and values, do to the output of attention as a gradient sees it, in one pass over
 * a context and never more than a block of probabilities: what `attention_effects/dense.py` computes. Threads are torch's
 * own; see `effects.py`. As in `prompt.c` a vector has one number for each of several rows.
 *
 * A set is given by when each of its tokens comes in: sets that grow are sums of bins up to one of them. */

#include "strips.h"

#define COLUMNS 128 /* that are met at once */

/* Vectors are floats or, with `pairs`, bfloat16. KV heads come first everywhere: `query` and `gradient` [heads, rows, dim],
 * of whose rows the first `coded` are looked at with other keys; `keys` and `values` [heads, count, dim] of the
 * context, then [heads, own, dim] of what follows it; `key_changes` and `value_changes` [sets, heads, count, dim], what is
 * to be added. Tokens are padded with zeros to multiples of 8, which `steps` count. `bin` [heads, shares, steps[0]]: in
 * which of `bins` a token of the context comes in. `last` [rows]: the last of the own tokens that a row sees. */
typedef struct {
    const lane *query, *gradient, *keys[2], *values[2], *key_changes, *value_changes;
    const int32_t *bin, *last;
    float *out; /* [heads, rows, 2 * shares * bins + 2 * key sets + value sets] */
    int64_t heads, rows, coded, counts[2], steps[2], dim, pairs, key_sets, value_sets, shares, bins, room, threads;
    float scale; /* of logits to base 2 */
} Call;

/* What is known of a strip of rows: sums, `numbers` vectors for each of `wide`, and the largest logit of every set of keys. */
typedef struct {
    vec *query, *gradient, *sums, *largest, *logits, *other, *gains;
    ivec *last;
} Strip;

static int64_t numbers(const Call *c) { return 2 * c->shares * c->bins + 2 * c->key_sets + c->value_sets; }

/* Logits become weights: what a row does not see has none. Returns by what the sums before are to be multiplied. */
ALWAYS vec weigh(vec *logits, vec *largest, ivec last, int count, int wide, float scale) {
    vec highest = every(BELOW);
    for (int k = 0; k < count; k++) highest = larger(highest, choose(last >= k, logits[k * wide], every(HIDDEN)));
    const vec now = larger(*largest, highest * scale), shrunk = power(*largest - now, 0);
    for (int k = 0; k < count; k++) {
        const ivec seen = last >= k;
        logits[k * wide] = choose(seen, power(choose(seen, logits[k * wide] * scale - now, every(0)), 0), every(0));
    }
    *largest = now;
    return shrunk;
}

/* `count` columns from `first` on, of the context (`part` 0) or of what follows it, meet a strip. */
ALWAYS void meet(
    const Call *c, const Strip *s, int64_t h, int part, int64_t first, int count, int coded, int wide, int pairs
) {
    const int depth = (int)(pairs ? c->dim / 2 : c->dim), columns = (count + TILE - 1) / TILE * TILE;
    const int sets = 2 * (int)(c->shares * c->bins), sums = (int)numbers(c);
    const ptrdiff_t at = (h * c->steps[part] + first) * depth, step = c->heads * c->steps[0] * depth;
    dots(s->logits, 0, s->query, c->keys[part] + at, columns, depth, wide, pairs);
    dots(s->gains, 0, s->gradient, c->values[part] + at, columns, depth, wide, pairs);
    for (int x = 0; coded && x < c->key_sets; x++) {
        if (part == 0)
            dots(s->other, s->logits, s->query, c->key_changes + x * step + at, columns, depth, wide, pairs);
        else
            memcpy(s->other, s->logits, sizeof(vec) * count * wide);
        for (int j = 0; j < wide; j++) {
            vec *total = s->sums + j * sums + sets + 2 * x;
            const ivec last = s->last[j] - (int32_t)first;
            const vec shrunk = weigh(s->other + j, s->largest + (1 + x) * wide + j, last, count, wide, c->scale);
            vec mass = total[0] * shrunk, effect = total[1] * shrunk;
            for (int k = 0; k < count; k++) {
                mass += s->other[k * wide + j];
                effect += s->other[k * wide + j] * s->gains[k * wide + j];
            }
            total[0] = mass, total[1] = effect;
        }
    }
    for (int j = 0; j < wide; j++) {
        vec *total = s->sums + j * sums;
        const ivec last = s->last[j] - (int32_t)first;
        const vec shrunk = weigh(s->logits + j, s->largest + j, last, count, wide, c->scale);
        for (int i = 0; i < sets; i++) total[i] *= shrunk;
        for (int i = sets + 2 * (int)c->key_sets; i < sums; i++) total[i] *= shrunk;
        for (int64_t p = 0; p < c->shares; p++) {
            const int32_t *bin = c->bin + (h * c->shares + p) * c->steps[0] + first;
            vec *bins = total + 2 * p * c->bins;
            for (int k = 0; k < count; k++) {
                const vec weight = s->logits[k * wide + j];
                vec *one = bins + (part == 0 ? 2 * bin[k] : 0); /* what follows is always kept */
                one[0] += weight, one[1] += weight * s->gains[k * wide + j];
            }
        }
    }
    for (int y = 0; part == 0 && y < c->value_sets; y++) {
        dots(s->other, 0, s->gradient, c->value_changes + y * step + at, columns, depth, wide, pairs);
        for (int j = 0; j < wide; j++) {
            vec *total = s->sums + j * sums + sets + 2 * c->key_sets + y, effect = *total;
            for (int k = 0; k < count; k++) effect += s->logits[k * wide + j] * s->other[k * wide + j];
            *total = effect;
        }
    }
}

typedef void Meet(const Call *, const Strip *, int64_t, int, int64_t, int, int);
#define MADE(W, P) \
    static void meet_##W##_##P(const Call *c, const Strip *s, int64_t h, int part, int64_t first, int count, int coded) { \
        meet(c, s, h, part, first, count, coded, W, P); \
    }
EACH_KIND(MADE)
static Meet *const MEET[][WIDE] = KINDS;

/* Rows [first, stop) of a KV head, WIDE vectors at most. With `scratch` NULL: no work, but the bytes of it. */
static int64_t strip(const Call *c, int64_t h, int64_t first, int64_t stop, char *scratch) {
    const int depth = (int)(c->pairs ? c->dim / 2 : c->dim), wide = (int)((stop - first + WIDTH - 1) / WIDTH);
    const int sums = (int)numbers(c), coded = first < c->coded;
    char *next = scratch;
    Strip s;
    lane *stage = take(&next, 4L * WIDTH * depth);
    s.query = take(&next, (int64_t)sizeof(vec) * depth * wide), s.gradient = take(&next, (int64_t)sizeof(vec) * depth * wide);
    s.sums = take(&next, (int64_t)sizeof(vec) * sums * wide);
    s.largest = take(&next, (int64_t)sizeof(vec) * (1 + c->key_sets) * wide);
    s.logits = take(&next, (int64_t)sizeof(vec) * COLUMNS * wide), s.other = take(&next, (int64_t)sizeof(vec) * COLUMNS * wide);
    s.gains = take(&next, (int64_t)sizeof(vec) * COLUMNS * wide), s.last = take(&next, (int64_t)sizeof(vec) * wide);
    if (!scratch) return next - scratch;
    lay(s.query, c->query + (h * c->rows + first) * depth, stop - first, wide, depth, stage);
    lay(s.gradient, c->gradient + (h * c->rows + first) * depth, stop - first, wide, depth, stage);
    memset(s.sums, 0, sizeof(vec) * sums * wide);
    for (int i = 0; i < (1 + c->key_sets) * wide; i++) s.largest[i] = every(BELOW);
    int64_t own = 0; /* tokens that any of these rows sees */
    for (int64_t i = first; i < stop; i++) own = c->last[i] + 1 > own ? c->last[i] + 1 : own;
    for (int part = 0; part < 2; part++) {
        for (int i = 0; i < wide * WIDTH; i++)
            ((int32_t *)s.last)[i] = part == 0 ? INT32_MAX : c->last[first + i < stop ? first + i : stop - 1];
        const int64_t seen = part == 0 ? c->counts[0] : own;
        for (int64_t column = 0; column < seen; column += COLUMNS) {
            const int64_t left = seen - column;
            MEET[c->pairs][wide - 1](c, &s, h, part, column, left < COLUMNS ? (int)left : COLUMNS, coded);
        }
    }
    for (int64_t i = 0; i < stop - first; i++) {
        const float *from = (const float *)(s.sums + i / WIDTH * sums) + i % WIDTH;
        float *to = c->out + (h * c->rows + first + i) * sums;
        for (int n = 0; n < sums; n++) to[n] = from[(ptrdiff_t)n * WIDTH];
    }
    return 0;
}

LAUNCHED(effects, heads)
