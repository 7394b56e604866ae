/* Decoding and appending on a CPU: what `ragged_decode/reference.py` and `append/reference.py`
 * define, with every row decoded where it is used. Plain C; threads are torch's own; see `__init__.py`. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define MOST_DIM 512 /* elements of a head */
#define LEAST 50.0f  /* a weight of less than 2^-50 of the largest one is 0: float32 could not tell */

/* `layout.HeadRow`, and the kinds of heads there. */
enum { CAPACITY, SINK, RECENT, KIND, SCORE, SLOT, K_CODEC, K_ROW, K_ANCHOR, V_CODEC, V_ROW, V_ANCHOR, FIELDS };
enum { RING, SCORED, OTHER };
/* Types of rows in the cache dtype. */
enum { FLOAT32, BFLOAT16, FLOAT16 };
/* Codecs by their ids, which the launcher sets from `codecs`; EXACT rows are in the cache dtype. */
enum { EXACT, INT8 = KVC_INT8, INT4 = KVC_INT4 };

/* Keys or values, as in `Buffers`, and how many bytes further on each of them goes on for the next sequence. */
typedef struct {
    void *exact;
    uint8_t *codes8;
    _Float16 *scales8;
    uint8_t *codes4;
    _Float16 *scales4;
    void *anchors;
    int64_t steps[6];
} Side;

/* Those of one sequence. */
ALWAYS Side of_sequence(const Side *side, int64_t place) {
    const int64_t *s = side->steps;
    return (Side){(char *)side->exact + place * s[0],
                  side->codes8 + place * s[1],
                  (_Float16 *)((char *)side->scales8 + place * s[2]),
                  side->codes4 + place * s[3],
                  (_Float16 *)((char *)side->scales4 + place * s[4]),
                  (char *)side->anchors + place * s[5],
                  {0}};
}

ALWAYS float read_number(const void *at, int64_t i, int type) {
    if (type == FLOAT32) return ((const float *)at)[i];
    if (type == FLOAT16) return (float)((const _Float16 *)at)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

ALWAYS void write_number(void *at, int64_t i, int type, float x) {
    if (type == FLOAT32) {
        ((float *)at)[i] = x;
    } else if (type == FLOAT16) {
        ((_Float16 *)at)[i] = (_Float16)x;
    } else {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        bits += 0x7fff + ((bits >> 16) & 1); /* to the nearest, ties to even */
        ((uint16_t *)at)[i] = (uint16_t)(bits >> 16);
    }
}

/* Vectors of int4 rows are kept as their even and then their odd elements, as the two codes of a byte come apart. */
ALWAYS int place(int i, int codec, int dim) { return codec == INT4 ? (i & 1) * (dim / 2) + i / 2 : i; }

ALWAYS void read_exact(float *x, const void *rows, int64_t row, int type, int codec, int dim) {
    if (codec != INT4) {
        for (int i = 0; i < dim; i++) x[i] = read_number(rows, row * dim + i, type);
    } else {
        for (int i = 0; i < dim; i++) x[place(i, INT4, dim)] = read_number(rows, row * dim + i, type);
    }
}

ALWAYS void read_row(float *restrict x, const Side *side, int64_t row, int type, int codec, int dim, int groups) {
    if (codec == EXACT) {
        read_exact(x, side->exact, row, type, EXACT, dim);
        return;
    }
    const int size = dim / groups;
    for (int g = 0; g < groups; g++) {
        if (codec == INT8) {
            const uint8_t *restrict c = side->codes8 + row * dim + g * size;
            const float scale = (float)side->scales8[row * groups + g];
            for (int i = 0; i < size; i++) x[g * size + i] = ((float)c[i] - 127.5f) * scale;
        } else {
            const int half = size / 2;
            const uint8_t *restrict c = side->codes4 + row * (dim / 2) + g * half;
            const float scale = (float)side->scales4[row * groups + g];
            float *restrict even = x + g * half, *restrict odd = x + dim / 2 + g * half;
            for (int i = 0; i < half; i++) {
                even[i] = ((float)(c[i] & 15) - 7.5f) * scale;
                odd[i] = ((float)(c[i] >> 4) - 7.5f) * scale;
            }
        }
    }
}

/* 2^x for -LEAST <= x <= 0, to a few units in the last place. */
ALWAYS float exp2_negative(float x) {
    const float whole = floorf(x + 0.5f), part = (x - whole) * 0.69314718056f;
    float y = 1.0f / 720;
    y = y * part + 1.0f / 120;
    y = y * part + 1.0f / 24;
    y = y * part + 1.0f / 6;
    y = y * part + 0.5f;
    y = y * part + 1.0f;
    y = y * part + 1.0f;
    const int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

/* Logits of the slots [from, to) of a head, `weights` [group, filled]. */
ALWAYS void keys_of(
    const float *query, const Side *keys, const int32_t *head, int type, int group, int64_t seen, int64_t window,
    int64_t filled, int64_t from, int64_t to, float *weights, int codec, int dim, int groups
) {
    const int64_t capacity = head[CAPACITY];
    float x[MOST_DIM];
    for (int64_t s = from; s < to; s++) {
        if (s == 0 && head[K_ANCHOR] >= 0) read_exact(x, keys->anchors, head[K_ANCHOR], type, codec, dim);
        else read_row(x, keys, head[K_ROW] + s, type, codec, dim, groups);
        /* A sliding layer is one ring without sinks: a slot holds the last token that is its number modulo the ring. */
        const int hidden = window > 0 && seen - 1 - (seen - 1 - s) % capacity <= seen - 1 - window;
        for (int r = 0; r < group; r++) {
            const float *restrict q = query + r * dim;
            float sum = 0;
            for (int i = 0; i < dim; i++) sum += q[i] * x[i];
            weights[r * filled + s] = hidden ? -INFINITY : sum;
        }
    }
}

/* The slots' values times their weights, added up in `out` [group, dim]. */
ALWAYS void values_of(
    const Side *values, const int32_t *head, int type, int group, int64_t filled, int64_t from, int64_t to,
    const float *weights, float *out, int codec, int dim, int groups
) {
    float x[MOST_DIM];
    memset(out, 0, sizeof(float) * group * dim);
    for (int64_t s = from; s < to; s++) {
        float used = 0;
        for (int r = 0; r < group; r++) used += weights[r * filled + s];
        if (used == 0) continue;
        if (s == 0 && head[V_ANCHOR] >= 0) read_exact(x, values->anchors, head[V_ANCHOR], type, codec, dim);
        else read_row(x, values, head[V_ROW] + s, type, codec, dim, groups);
        for (int r = 0; r < group; r++) {
            const float w = weights[r * filled + s];
            float *restrict o = out + r * dim;
            for (int i = 0; i < dim; i++) o[i] += w * x[i];
        }
    }
}

static void softmax(float *restrict w, int64_t count) {
    float highest = -INFINITY, total = 0;
    for (int64_t s = 0; s < count; s++) highest = w[s] > highest ? w[s] : highest;
    for (int64_t s = 0; s < count; s++) {
        const float below = (w[s] - highest) * 1.44269504089f, kept = below < -LEAST ? -LEAST : below;
        w[s] = below < -LEAST ? 0.0f : exp2_negative(kept);
        total += w[s];
    }
    for (int64_t s = 0; s < count; s++) w[s] /= total;
}

/* Both for every codec, and for the usual head sizes as constants: `keys_INT8_64` and so on. */
typedef void KeysOf(const float *, const Side *, const int32_t *, int, int, int64_t, int64_t, int64_t, int64_t, int64_t,
                    float *, int, int);
typedef void ValuesOf(const Side *, const int32_t *, int, int, int64_t, int64_t, int64_t, const float *, float *, int, int);
#define MADE(C, NAME, D, G) \
    static void keys_##C##_##NAME( \
        const float *query, const Side *keys, const int32_t *head, int type, int group, int64_t seen, int64_t window, \
        int64_t filled, int64_t from, int64_t to, float *weights, int dim, int groups \
    ) { \
        (void)dim, (void)groups; \
        keys_of(query, keys, head, type, group, seen, window, filled, from, to, weights, C, D, G); \
    } \
    static void values_##C##_##NAME( \
        const Side *values, const int32_t *head, int type, int group, int64_t filled, int64_t from, int64_t to, \
        const float *weights, float *out, int dim, int groups \
    ) { \
        (void)dim, (void)groups; \
        values_of(values, head, type, group, filled, from, to, weights, out, C, D, G); \
    }
#define EVERY_CODEC(NAME, D, G) MADE(EXACT, NAME, D, G) MADE(INT8, NAME, D, G) MADE(INT4, NAME, D, G)
EVERY_CODEC(64, 64, 1)
EVERY_CODEC(128, 128, 2)
EVERY_CODEC(any, dim, groups)
#define ROW_OF(KIND) \
    {{KIND##_EXACT_64, KIND##_INT8_64, KIND##_INT4_64}, {KIND##_EXACT_128, KIND##_INT8_128, KIND##_INT4_128}, \
     {KIND##_EXACT_any, KIND##_INT8_any, KIND##_INT4_any}}
static KeysOf *const KEYS[3][3] = ROW_OF(keys);
static ValuesOf *const VALUES[3][3] = ROW_OF(values);

/* Attention of one head of one sequence by at most `threads` threads: `query` and `out` [group, dim]. `scratch` has room
 * for group * (capacity + (threads + 1) * dim) numbers. */
static void decode_head(
    const float *query, const Side *keys, const Side *values, const int32_t *head, int type, int group, int64_t seen,
    int64_t window, float *out, float *scratch, int threads, int dim, int groups
) {
    const int shape = dim == 64 && groups == 1 ? 0 : (dim == 128 && groups == 2 ? 1 : 2), size = group * dim;
    float *halves = scratch, *sums = scratch + size, *weights = sums + (int64_t)threads * size;
    const int64_t filled = seen < head[CAPACITY] ? seen : head[CAPACITY];
    if (head[K_CODEC] == INT4) {
        for (int j = 0; j < size; j++) halves[j / dim * dim + place(j % dim, INT4, dim)] = query[j];
        query = halves;
    }
    KeysOf *const by_keys = KEYS[shape][head[K_CODEC] == EXACT ? 0 : (head[K_CODEC] == INT8 ? 1 : 2)];
    ValuesOf *const by_values = VALUES[shape][head[V_CODEC] == EXACT ? 0 : (head[V_CODEC] == INT8 ? 1 : 2)];
    int parts = filled < 256 ? 1 : threads;
#pragma omp parallel num_threads(parts)
    {
        int part = 0, of = 1;
#ifdef _OPENMP
        part = omp_get_thread_num(), of = omp_get_num_threads();
#endif
        const int64_t from = filled * part / of, to = filled * (part + 1) / of;
        by_keys(query, keys, head, type, group, seen, window, filled, from, to, weights, dim, groups);
#pragma omp barrier
        for (int r = part; r < group; r += of) softmax(weights + r * filled, filled);
#pragma omp barrier
        by_values(values, head, type, group, filled, from, to, weights, sums + (int64_t)part * size, dim, groups);
#pragma omp single
        parts = of;
    }
    for (int part = 1; part < parts; part++)
        for (int j = 0; j < size; j++) sums[j] += sums[(int64_t)part * size + j];
    for (int j = 0; j < size; j++) out[j] = sums[j / dim * dim + place(j % dim, head[V_CODEC], dim)];
}

/* Attention of one stored token a sequence: `query` [batch, heads * group, dim], scaled already, and `out` of the same
 * shape; `seen` and `places` [batch] say how much is stored and where. The heads of few sequences are read by all threads
 * together, those of many by one each; `scratch` has room for threads * group * (largest capacity + 2 * dim) numbers. */
void kvc_decode(
    const float *query, const Side *keys, const Side *values, const int32_t *rows, int heads, int type, int group,
    int batch, const int64_t *seen, const int64_t *places, int64_t window, float *out, float *scratch, int64_t room,
    int threads, int dim, int groups
) {
    const int items = batch * heads, together = items < threads || batch == 1, size = group * dim;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (!together)
    for (int i = 0; i < items; i++) {
        const int b = i / heads, h = i % heads;
        float *mine = scratch;
#ifdef _OPENMP
        if (!together) mine += omp_get_thread_num() * room;
#endif
        const Side k = of_sequence(keys, places[b]), v = of_sequence(values, places[b]);
        decode_head(query + (int64_t)i * size, &k, &v, rows + h * FIELDS, type, group, seen[b], window,
                    out + (int64_t)i * size, mine, together ? threads : 1, dim, groups);
    }
}

static void write_row(
    const float *x, Side *side, int64_t row, int64_t anchor, int type, int codec, int dim, int groups
) {
    if (anchor >= 0)
        for (int i = 0; i < dim; i++) write_number(side->anchors, anchor * dim + i, type, x[i]);
    if (codec == EXACT) {
        for (int i = 0; i < dim; i++) write_number(side->exact, row * dim + i, type, x[i]);
        return;
    }
    const int size = dim / groups;
    const float half = codec == INT8 ? 128.0f : 8.0f;
    for (int g = 0; g < groups; g++) {
        float largest = 0;
        for (int i = 0; i < size; i++) largest = fabsf(x[g * size + i]) > largest ? fabsf(x[g * size + i]) : largest;
        float scale = largest / half;
        scale = scale < 0x1p-14f ? 0x1p-14f : (scale > 65504.0f ? 65504.0f : scale);
        const _Float16 kept = (_Float16)scale;
        uint8_t codes[MOST_DIM];
        for (int i = 0; i < size; i++) {
            const float code = floorf(x[g * size + i] / (float)kept);
            codes[i] = (uint8_t)((code < -half ? -half : (code > half - 1 ? half - 1 : code)) + half);
        }
        if (codec == INT8) {
            side->scales8[row * groups + g] = kept;
            memcpy(side->codes8 + row * dim + g * size, codes, size);
        } else {
            side->scales4[row * groups + g] = kept;
            for (int i = 0; i < size / 2; i++)
                side->codes4[row * (dim / 2) + g * size / 2 + i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        }
    }
}

static void move_row(Side *side, int64_t from, int64_t to, int type, int codec, int dim, int groups) {
    if (codec == EXACT) {
        const int64_t size = (int64_t)dim * (type == FLOAT32 ? 4 : 2);
        memcpy((char *)side->exact + to * size, (char *)side->exact + from * size, size);
    } else if (codec == INT8) {
        memcpy(side->codes8 + to * dim, side->codes8 + from * dim, dim);
        memcpy(side->scales8 + to * groups, side->scales8 + from * groups, 2 * groups);
    } else {
        memcpy(side->codes4 + to * (dim / 2), side->codes4 + from * (dim / 2), dim / 2);
        memcpy(side->scales4 + to * groups, side->scales4 + from * groups, 2 * groups);
    }
}

/* The new token of one head of one sequence: `new_key` and `new_value` [dim], its score and the sequence's `scores`. */
static void append_head(
    Side *keys, Side *values, const int32_t *head, int type, const float *new_key, const float *new_value, float score,
    _Float16 *scores, int64_t seen, int dim, int groups
) {
    const int64_t capacity = head[CAPACITY], ring = capacity - head[RECENT];
    const int64_t slot = seen < capacity ? seen : ring + (seen - capacity) % head[RECENT];
    if (head[KIND] == SCORED) {
        _Float16 *held = scores + head[SCORE];
        if (seen >= capacity && ring > head[SINK]) {
            int64_t victim = head[SINK];
            float worst = (float)held[victim];
            for (int64_t s = victim + 1; s < ring; s++) {
                const float one = (float)held[s];
                if (one <= worst) worst = one, victim = s; /* of equal ones the lower slot stays */
            }
            if ((float)held[slot] > worst) {
                move_row(keys, head[K_ROW] + slot, head[K_ROW] + victim, type, head[K_CODEC], dim, groups);
                move_row(values, head[V_ROW] + slot, head[V_ROW] + victim, type, head[V_CODEC], dim, groups);
                held[victim] = held[slot];
            }
        }
        held[slot] = (_Float16)score;
    }
    write_row(new_key, keys, head[K_ROW] + slot, slot ? -1 : head[K_ANCHOR], type,
              head[K_CODEC], dim, groups);
    write_row(new_value, values, head[V_ROW] + slot, slot ? -1 : head[V_ANCHOR], type, head[V_CODEC], dim, groups);
}

/* One new token a sequence: `new_keys` and `new_values` [batch, heads, dim], `score` [batch, heads] and `scores`, of which
 * the next sequence's are `step` numbers further on (both NULL where no head is scored). */
void kvc_append(
    const Side *keys, const Side *values, const int32_t *rows, int heads, int type, int batch, const int64_t *seen,
    const int64_t *places, const float *new_keys, const float *new_values, const float *score, _Float16 *scores,
    int64_t step, int threads, int dim, int groups
) {
#pragma omp parallel for num_threads(threads) if (batch > 1)
    for (int i = 0; i < batch * heads; i++) {
        const int b = i / heads;
        const int32_t *head = rows + i % heads * FIELDS;
        if (head[KIND] == OTHER) continue;
        Side k = of_sequence(keys, places[b]), v = of_sequence(values, places[b]);
        append_head(&k, &v, head, type, new_keys + (int64_t)i * dim, new_values + (int64_t)i * dim,
                    score ? score[i] : 0.0f, scores ? scores + places[b] * step : 0, seen[b], dim, groups);
    }
}
