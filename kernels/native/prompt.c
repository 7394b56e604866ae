/* Exact causal attention of a prompt on a CPU: what `prompt_attention/reference.py` defines, in the manner of
 * FlashAttention-2 (arXiv 2307.08691). Threads are torch's own; see `prompt.py`.
 *
 * Everything is transposed: a vector has one number for each of several queries (rows), so that the softmax is done for
 * all of them at once and nothing is summed inside of a vector. Numbers of keys and values are broadcast. */

#ifdef _OPENMP
#include <omp.h>
#endif

#include "products.h"

#define MOST_DIM 512  /* elements of a head */
#define STRIPS 4      /* times WIDE vectors of rows meet the same packed columns */
#define KEYS 128      /* columns that are packed at once */
#define PART 32       /* elements of float32 logits that are summed apart, so that less is lost */

enum { FLOAT32, BFLOAT16 };

/* Tensors [batch, heads, tokens, dim], whose `steps` count numbers from one sequence, head and token to the next. */
typedef struct {
    void *at;
    int64_t steps[3];
} Tensor;

/* `pad` [batch] or NULL: columns before it are not seen. `kept` [heads, columns - length] or NULL: which of the columns
 * before the queries' own are still there. `sinks` [heads * group] or NULL: logits to base 2 that take a part of the
 * weight and have no value. `window`: columns that a row sees, itself included; 0 for all. `scale`
 * is that of logits to base 2. */
typedef struct {
    Tensor query, keys, values, out;
    const int64_t *pad;
    const uint8_t *kept;
    const float *sinks;
    int64_t batch, heads, group, length, columns, dim, type, window, rows, room, threads;
    float scale;
} Call;

/* What is known of some rows, WIDE vectors or fewer of them: `query` [depth][wide], `sums` [dim][wide], and a vector of
 * each of `largest` logit times scale, `total` weight, and the columns `first` to `last` that a row sees. */
typedef struct {
    int wide;
    int32_t least_first, most_first, least_last, most_last;
    vec *query, *sums, *largest, *total;
    ivec *first, *last;
} Strip;

ALWAYS const char *row_of(const Tensor *t, int64_t b, int64_t h, int64_t token, int64_t type) {
    return (const char *)t->at + (b * t->steps[0] + h * t->steps[1] + token * t->steps[2]) * (type == FLOAT32 ? 4 : 2);
}

/* A row as lanes: floats, or pairs as they are. */
ALWAYS void copy(lane *restrict to, const char *restrict row, int dim, int type, int pairs) {
    if (type == FLOAT32 || pairs) {
        memcpy(to, row, (size_t)dim * (type == FLOAT32 ? 4 : 2));
    } else {
        for (int i = 0; i < dim; i++) to[i] = (lane)((uint32_t)((const uint16_t *)row)[i] << 16);
    }
}

/* Keys [KEYS][depth], and values [KEYS][dim], or with pairs [KEYS / 2][dim] of neighbours, of `count` columns and zeros. */
static void pack(
    const Call *c, int64_t b, int64_t h, const int32_t *columns, int count, lane *keys, lane *values, int pairs
) {
    const int dim = (int)c->dim, depth = pairs ? dim / 2 : dim, type = (int)c->type;
    static const uint16_t none[2 * MOST_DIM];
    for (int k = 0; k < (count + TILE - 1) / TILE * TILE; k++) {
        const char *key = k < count ? row_of(&c->keys, b, h, columns[k], type) : (const char *)none;
        const char *value = k < count ? row_of(&c->values, b, h, columns[k], type) : (const char *)none;
        copy(keys + (ptrdiff_t)k * depth, key, dim, type, pairs);
        if (pairs) {
            const uint16_t *restrict from = (const uint16_t *)value;
            uint16_t *restrict to = (uint16_t *)(values + (ptrdiff_t)(k / 2) * dim) + k % 2;
            for (int i = 0; i < dim; i++) to[2 * i] = from[i];
        } else {
            copy(values + (ptrdiff_t)k * dim, value, dim, type, 0);
        }
    }
}

/* One strip meets the packed columns, which are `columns` [count] and then some that nobody sees. `weights`
 * [KEYS][wide]: logits, then weights, or pairs of them. */
ALWAYS void meet(
    Strip *s, const lane *keys, const lane *values, const int32_t *columns, int count, vec *weights, float scale, int dim,
    int wide, int pairs
) {
    int from = 0, to = count;
    if (columns[0] > s->most_last || columns[count - 1] < s->least_first) return;
    while (columns[to - 1] > s->most_last) to--;
    while (columns[from + TILE - 1] < s->least_first) from += TILE;
    to = from + (to - from + TILE - 1) / TILE * TILE;
    const int masked = columns[to - 1] > s->least_last || columns[from] < s->most_first;
    const int depth = pairs ? dim / 2 : dim, part = pairs ? depth : PART;
    vec highest[WIDE], shrunk[WIDE], totals[WIDE], largest[WIDE], sums[TILE][WIDE];
    for (int j = 0; j < wide; j++) highest[j] = every(BELOW);
    for (int k = from; k < to; k += TILE) {
        vec *at = weights + k * wide;
        const lane *tile = keys + (ptrdiff_t)k * depth;
        for (int x = 0;; x += part) {
            products(sums, s->query + x * wide, tile + x, depth, 1, depth - x < part ? depth - x : part, wide, pairs);
            if (x) EACH(i, j, wide) sums[i][j] += at[i * wide + j];
            if (x + part >= depth) break;
            EACH(i, j, wide) at[i * wide + j] = sums[i][j];
        }
        if (masked)
            EACH(i, j, wide) {
                const int32_t column = columns[k + i];
                sums[i][j] = choose((s->first[j] <= column) & (s->last[j] >= column), sums[i][j], every(HIDDEN));
            }
        EACH(i, j, wide) {
            highest[j] = larger(highest[j], sums[i][j]);
            at[i * wide + j] = sums[i][j];
        }
    }
    for (int j = 0; j < wide; j++) {
        largest[j] = larger(s->largest[j], highest[j] * scale);
        shrunk[j] = power(s->largest[j] - largest[j], 0);
        totals[j] = s->total[j] * shrunk[j];
        s->largest[j] = largest[j];
    }
    vec *packed = weights;
    for (int k = from; k < to; k += 2) {
        const vec *two = weights + k * wide;
        vec even[WIDE], odd[WIDE];
        for (int j = 0; j < wide; j++) {
            even[j] = power(two[j] * scale - largest[j], pairs);
            odd[j] = power(two[wide + j] * scale - largest[j], pairs);
            totals[j] += even[j] + odd[j];
        }
        for (int j = 0; j < wide; j++) {
            packed[j] = pairs ? pair(even[j], odd[j]) : even[j];
            if (!pairs) packed[wide + j] = odd[j];
        }
        packed += pairs ? wide : 2 * wide;
    }
    for (int j = 0; j < wide; j++) s->total[j] = totals[j];
    values += (ptrdiff_t)(pairs ? from / 2 : from) * dim;
    for (int d = 0; d < dim; d += TILE) {
        vec *at = s->sums + d * wide;
        products(sums, weights, values + d, 1, dim, pairs ? (to - from) / 2 : to - from, wide, pairs);
        EACH(i, j, wide) at[i * wide + j] = at[i * wide + j] * shrunk[j] + sums[i][j];
    }
}

typedef void Meet(Strip *, const lane *, const lane *, const int32_t *, int, vec *, float, int);
#define MADE(W, P) \
    static void meet_##W##_##P( \
        Strip *s, const lane *keys, const lane *values, const int32_t *columns, int count, vec *weights, float scale, int dim \
    ) { \
        meet(s, keys, values, columns, count, weights, scale, dim, W, P); \
    }
MADE(1, 0) MADE(2, 0) MADE(3, 0)
#ifdef __AVX512BF16__
MADE(1, 1) MADE(2, 1) MADE(3, 1)
#define PAIRS(type) ((type) == BFLOAT16)
static Meet *const MEET[2][WIDE] = {{meet_1_0, meet_2_0, meet_3_0}, {meet_1_1, meet_2_1, meet_3_1}};
#else
#define PAIRS(type) 0
static Meet *const MEET[1][WIDE] = {{meet_1_0, meet_2_0, meet_3_0}};
#endif

/* Row r of a KV head is query head r % group of token r / group, so that neighbours see nearly the same columns. */
static void begin(const Call *c, Strip *s, int64_t b, int64_t h, int64_t first, int64_t stop, lane *stage, int pairs) {
    const int dim = (int)c->dim, depth = pairs ? dim / 2 : dim;
    for (int i = 0; i < s->wide * WIDTH; i++) {
        const int64_t r = first + i < stop ? first + i : stop - 1, t = r / c->group; /* the last one fills the vector */
        const int64_t own = c->columns - c->length + t;
        int64_t from = c->window > 0 && own >= c->window ? own - c->window + 1 : 0;
        if (c->pad && c->pad[b] > from) from = c->pad[b] < own ? c->pad[b] : own; /* padding sees itself */
        ((int32_t *)s->first)[i] = (int32_t)from, ((int32_t *)s->last)[i] = (int32_t)own;
        copy(stage + (ptrdiff_t)(i % WIDTH) * depth, row_of(&c->query, b, h * c->group + r % c->group, t, c->type), dim,
             (int)c->type, pairs);
        if (i % WIDTH == WIDTH - 1)
            turn(stage, depth, (lane *)(s->query + i / WIDTH), s->wide * WIDTH, depth);
    }
    const int32_t *froms = (const int32_t *)s->first, *owns = (const int32_t *)s->last;
    const int count = s->wide * WIDTH;
    s->least_first = s->most_first = froms[0], s->least_last = owns[0], s->most_last = owns[count - 1];
    for (int i = 1; i < count; i++) {
        if (froms[i] < s->least_first) s->least_first = froms[i];
        if (froms[i] > s->most_first) s->most_first = froms[i];
    }
    for (int j = 0; j < s->wide; j++) s->largest[j] = every(BELOW), s->total[j] = every(0);
    for (int i = 0; c->sinks && i < count; i++) { /* as if a token of this logit and no value had been met already */
        const int64_t r = first + i < stop ? first + i : stop - 1;
        ((float *)s->largest)[i] = c->sinks[h * c->group + r % c->group], ((float *)s->total)[i] = 1;
    }
    memset(s->sums, 0, sizeof(vec) * dim * s->wide);
}

static void finish(const Call *c, const Strip *s, int64_t b, int64_t h, int64_t first, int64_t stop, lane *stage) {
    const int dim = (int)c->dim;
    for (int j = 0; j < s->wide; j++) {
        const vec inverse = 1.0f / s->total[j];
        for (int d = 0; d < dim; d++) s->sums[d * s->wide + j] *= inverse;
        for (int d = 0; d < dim; d += WIDTH) { /* the other way round: `dim` vectors of WIDTH rows */
            const int vectors = dim - d < WIDTH ? dim - d : WIDTH;
            lane square[WIDTH * WIDTH] = {0};
            for (int i = 0; i < vectors; i++) memcpy(square + i * WIDTH, s->sums + (d + i) * s->wide + j, sizeof(vec));
            turn(square, WIDTH, stage + d, (dim + WIDTH - 1) / WIDTH * WIDTH, WIDTH);
        }
        for (int i = 0; i < WIDTH && first + j * WIDTH + i < stop; i++) {
            const int64_t r = first + j * WIDTH + i;
            char *to = (char *)row_of(&c->out, b, h * c->group + r % c->group, r / c->group, c->type);
            const lane *row = stage + (ptrdiff_t)i * ((dim + WIDTH - 1) / WIDTH * WIDTH);
            if (c->type == FLOAT32) {
                memcpy(to, row, sizeof(float) * dim);
            } else {
                for (int d = 0; d < dim; d++) { /* to the nearest, ties to even; what is no number stays so */
                    const uint32_t bits = (uint32_t)row[d], rounded = bits + 0x7fff + ((bits >> 16) & 1);
                    ((uint16_t *)to)[d] = (uint16_t)(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16);
                }
            }
        }
    }
}

/* Rows [first, stop) of a KV head, at most `c->rows`. With `scratch` NULL: no work, but the bytes of it. */
static int64_t attend(const Call *c, int64_t b, int64_t h, int64_t first, int64_t stop, char *scratch) {
    const int dim = (int)c->dim, pairs = PAIRS(c->type), depth = pairs ? dim / 2 : dim;
    const int across = WIDE * WIDTH, strips = (int)((stop - first + across - 1) / across);
    char *next = scratch;
    Strip all[STRIPS] = {0};
    lane *keys = take(&next, 4L * KEYS * depth), *values = take(&next, 4L * KEYS * dim / (pairs ? 2 : 1));
    lane *stage = take(&next, 4L * WIDTH * (dim + WIDTH));
    vec *weights = take(&next, (int64_t)sizeof(vec) * KEYS * WIDE);
    int32_t *columns = take(&next, 4L * KEYS);
    for (int i = 0; i < strips; i++) {
        Strip *s = all + i;
        const int64_t left = stop - first - i * across;
        s->wide = left < across ? (int)((left + WIDTH - 1) / WIDTH) : WIDE;
        s->query = take(&next, (int64_t)sizeof(vec) * depth * s->wide);
        s->sums = take(&next, (int64_t)sizeof(vec) * dim * s->wide);
        s->largest = take(&next, sizeof(vec) * s->wide), s->total = take(&next, sizeof(vec) * s->wide);
        s->first = take(&next, sizeof(vec) * s->wide), s->last = take(&next, sizeof(vec) * s->wide);
    }
    if (!scratch) return next - scratch;
    for (int i = 0; i < strips; i++) begin(c, all + i, b, h, first + i * across, stop, stage, pairs);
    int32_t column = all[0].least_first;
    for (int i = 1; i < strips; i++) column = all[i].least_first < column ? all[i].least_first : column;
    const int32_t end = all[strips - 1].most_last, before = (int32_t)(c->columns - c->length);
    const uint8_t *kept = c->kept ? c->kept + h * before : 0;
    while (column <= end) {
        int count = 0;
        for (; count < KEYS && column <= end; column++)
            if (!kept || column >= before || kept[column]) columns[count++] = column;
        if (!count) break;
        pack(c, b, h, columns, count, keys, values, pairs);
        for (int i = count; i < KEYS; i++) columns[i] = INT32_MAX;
        for (int i = 0; i < strips; i++)
            MEET[pairs][all[i].wide - 1](all + i, keys, values, columns, count, weights, c->scale, dim);
    }
    for (int i = 0; i < strips; i++) finish(c, all + i, b, h, first + i * across, stop, stage);
    return 0;
}

/* Rows of an item: fewer than can be where there would be too few items for the threads. */
int64_t kvc_prompt_rows(const Call *c) {
    const int64_t all = c->length * c->group, heads = c->batch * c->heads;
    int64_t rows = STRIPS * WIDE * WIDTH;
    while (rows > WIDE * WIDTH && heads * ((all + rows - 1) / rows) < 4 * c->threads) rows -= WIDE * WIDTH;
    return rows < all ? rows : all;
}

/* Bytes of scratch that a thread needs for them. */
int64_t kvc_prompt_room(const Call *c) { return attend(c, 0, 0, 0, c->rows, 0); }

/* `scratch` has `c->room` bytes for every thread, a multiple of 64, and is aligned to as many. */
void kvc_prompt(const Call *c, char *scratch) {
    const int64_t rows = c->length * c->group, blocks = (rows + c->rows - 1) / c->rows, heads = c->batch * c->heads;
    /* The last rows see most, and come first. */
#pragma omp parallel for schedule(dynamic) num_threads((int)c->threads)
    for (int64_t i = 0; i < blocks * heads; i++) {
        const int64_t first = (blocks - 1 - i / heads) * c->rows, stop = first + c->rows < rows ? first + c->rows : rows;
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        attend(c, i % heads / c->heads, i % heads % c->heads, first, stop, scratch + thread * c->room);
    }
}
