/* Logits of a head's slots, and their values times weights: `BLOCK` slots are decoded at a time, and then meet all
 * queries of the group. Vectors are in the order of `place`. */

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__F16C__)
#define WIDE /* `wide.h`, else `narrow.h` */
#endif
#define BLOCK 8
#define WHOLE 32512 /* the largest of the whole numbers of 16 bits: as a high and a low byte, both signed, 127 and 0 */
#define MOST_GROUPS (MOST_DIM / KVC_GROUP + 2)
#define MOST_WIDTH (MOST_DIM + MOST_GROUPS * LANES)

/* The queries [group, stride] of a head, `exact`, and for keys in codes as whole numbers of 16 bits: `whole` [limbs,
 * group, stride] times `scale` [limbs, group]; `sums` [limbs, group, MOST_GROUPS] are over the elements of every group of
 * codes. Products with codes are exact then. One limb is off by 2^-16 of the largest element, which half precision does
 * not show; of float32 there are two. */
typedef struct {
    float *exact, *scale;
    int16_t *whole;
    int32_t *sums;
    int limbs, stride;
} Query;

#ifdef WIDE
/* `whole` [count], in its place, as all low bytes and then all high ones, of which there are `count` as well. */
static void part_bytes(int16_t *whole, int count) {
    int8_t *bytes = (int8_t *)whole, low[MOST_WIDTH];
    int16_t numbers[MOST_WIDTH];
    memcpy(numbers, whole, sizeof(int16_t) * count);
    for (int i = 0; i < count; i++) {
        const int high = (numbers[i] + 128) >> 8;
        low[i] = (int8_t)(numbers[i] - 256 * high);
        bytes[count + i] = (int8_t)high;
    }
    memcpy(bytes, low, count);
}
#endif

static void quantise_query(Query *query, int group, int codec, int dim) {
    const int stride = query->stride, width = width_of(codec, dim);
    for (int r = 0; r < group; r++) {
        const float *q = query->exact + r * stride;
        float largest = 1e-30f;
        for (int i = 0; i < width; i++) largest = fabsf(q[i]) > largest ? fabsf(q[i]) : largest;
        const float unit = largest / WHOLE;
        for (int limb = 0; limb < query->limbs; limb++) {
            const int row = limb * group + r;
            int16_t *whole = query->whole + row * stride;
            for (int i = 0; i < width; i++) {
                const float x = q[i] / unit, first = rintf(x);
                whole[i] = (int16_t)(limb ? rintf((x - first) * 2 * WHOLE) : first);
            }
            query->scale[row] = limb ? unit / (2 * WHOLE) : unit;
            int start = 0, g = 0;
            for (int which = 0; which < 2; which++) {
                const Section s = section(codec, which, dim);
                for (int i = 0; i < s.count; i++, g++, start += padded(s.size)) {
                    int32_t sum = 0;
                    for (int e = 0; e < padded(s.size); e++) sum += whole[start + e];
                    query->sums[row * MOST_GROUPS + g] = sum;
                }
            }
#ifdef WIDE
            part_bytes(whole, stride);
#endif
        }
    }
}

/* The numbers of the cache dtype in a slot. */
ALWAYS void read_exact(float *restrict x, const void *rows, int64_t slot, int type, int dim) {
    for (int i = 0; i < dim; i++) x[i] = read_number(rows, slot * dim + i, type);
}

/* The first `count` of eight numbers to and from memory; a `memcpy` of a size that is not known would be a call. */
ALWAYS void put(float *to, Floats found, int64_t count) {
    if (count == BLOCK) *(Floats *)to = found;
    else
        for (int j = 0; j < count; j++) to[j] = found[j];
}
ALWAYS void get(float *to, const float *from, int64_t count) {
    if (count == BLOCK) memcpy(to, from, sizeof(float) * BLOCK);
    else
        for (int j = 0; j < BLOCK; j++) to[j] = j < count ? from[j] : 0;
}

/* Logits f32 [group, filled] of the slots [from, to) of a head in the cache dtype. */
ALWAYS void exact_keys(
    const Query *query, const Stored *keys, int type, int group, int64_t filled, int64_t from, int64_t to, float *weights,
    int dim
) {
    float x[BLOCK][MOST_WIDTH];
    for (int j = 0; j < BLOCK; j++) memset(x[j], 0, sizeof(float) * padded(dim));
    for (int64_t s = from; s < to; s += BLOCK) {
        const int64_t count = to - s < BLOCK ? to - s : BLOCK;
        for (int j = 0; j < count; j++) read_exact(x[j], keys->exact, s + j, type, dim);
        for (int r = 0; r < group; r++) {
            Floats sums[BLOCK] = {{0}};
            for (int i = 0; i < padded(dim); i += 8) {
                const Floats part = *(const Floats *)(query->exact + r * query->stride + i);
                for (int j = 0; j < BLOCK; j++) sums[j] += part * *(const Floats *)(x[j] + i);
            }
            const Floats found = added_floats(sums);
            put(weights + r * filled + s, found, count);
        }
    }
}

/* The slots' values times their weights, added up in `out` [group, stride], of a head in the cache dtype. */
ALWAYS void exact_values(
    const Stored *values, int type, int group, int64_t filled, int64_t from, int64_t to, const float *weights, float *out,
    int stride, int dim
) {
    const int width = padded(dim);
    float x[BLOCK][MOST_WIDTH];
    for (int j = 0; j < BLOCK; j++) memset(x[j], 0, sizeof(float) * width);
    for (int64_t s = from; s < to; s += BLOCK) {
        const int64_t count = to - s < BLOCK ? to - s : BLOCK;
        float used = 0;
        for (int r = 0; r < group; r++)
            for (int j = 0; j < count; j++) used += weights[r * filled + s + j];
        if (used == 0) continue;
        for (int j = 0; j < count; j++) read_exact(x[j], values->exact, s + j, type, dim);
        for (int r = 0; r < group; r++) {
            float w[BLOCK];
            get(w, weights + r * filled + s, count);
            float *o = out + r * stride;
            for (int i = 0; i < width; i += 8) {
                Floats sum = *(const Floats *)(o + i);
                for (int j = 0; j < BLOCK; j++) sum += w[j] * *(const Floats *)(x[j] + i);
                *(Floats *)(o + i) = sum;
            }
        }
    }
}

#ifdef WIDE
#include "wide.h"
#else
#include "narrow.h"
#endif

/* Logits of the slots [from, to) of a head, `weights` [group, filled]. */
ALWAYS void keys_of(
    const Query *query, const Stored *keys, int64_t capacity, int type, int group, int64_t seen, int64_t window,
    int64_t filled, int64_t from, int64_t to, float *weights, int codec, int dim
) {
    if (codec == EXACT) exact_keys(query, keys, type, group, filled, from, to, weights, dim);
    else coded_keys(query, keys, group, filled, from, to, weights, codec, dim);
    if (from == 0 && to > 0 && keys->anchor) {
        const int16_t *places = places_of(codec, dim);
        for (int r = 0; r < group; r++) {
            float sum = 0;
            for (int i = 0; i < dim; i++)
                sum += query->exact[r * query->stride + places[i]] * read_number(keys->anchor, i, type);
            weights[r * filled] = sum;
        }
    }
    if (window > 0)
        /* A sliding layer is one ring without sinks: a slot holds the last token that is its number modulo the ring. */
        for (int64_t s = from; s < to; s++)
            if (seen - 1 - (seen - 1 - s) % capacity <= seen - 1 - window)
                for (int r = 0; r < group; r++) weights[r * filled + s] = -INFINITY;
}

ALWAYS void values_of(
    const Stored *values, int type, int group, int64_t filled, int64_t from, int64_t to, const float *weights, float *out,
    int stride, int limbs, int codec, int dim
) {
    memset(out, 0, sizeof(float) * group * stride);
    if (codec == EXACT) exact_values(values, type, group, filled, from, to, weights, out, stride, dim);
    else coded_values(values, group, filled, from, to, weights, out, stride, limbs, codec, dim);
    if (from == 0 && to > 0 && values->anchor) {
        const int16_t *places = places_of(codec, dim);
        for (int r = 0; r < group; r++)
            for (int i = 0; i < dim; i++)
                out[r * stride + places[i]] += weights[r * filled] * read_number(values->anchor, i, type);
    }
}
