/* Logits of a head's slots, and their values times weights: `BLOCK` slots are decoded at a time, and then meet all
 * queries of the group. Vectors are in the order of `place`. */

#define BLOCK 8
#define MOST_GROUPS (MOST_DIM / KVC_GROUP + 2)
#define MOST_WIDTH (MOST_DIM + MOST_GROUPS * LANES)

/* The queries [group, stride] of a head, `exact`, and for keys in codes as whole numbers of 16 bits: `whole` [limbs,
 * group, stride] times `scale` [limbs, group]; `sums` [limbs, group, MOST_GROUPS] are over the elements of every group of
 * codes. Products with codes are exact then, and two of them share a lane. One limb is off by 2^-16 of the largest
 * element, which half precision does not show; of float32 there are two. */
typedef struct {
    float *exact, *scale;
    int16_t *whole;
    int32_t *sums;
    int limbs, stride;
} Query;

static void quantise_query(Query *query, int group, int codec, int dim) {
    const int stride = query->stride, width = width_of(codec, dim);
    for (int r = 0; r < group; r++) {
        const float *q = query->exact + r * stride;
        float largest = 1e-30f;
        for (int i = 0; i < width; i++) largest = fabsf(q[i]) > largest ? fabsf(q[i]) : largest;
        const float unit = largest / 32767.0f;
        for (int limb = 0; limb < query->limbs; limb++) {
            const int row = limb * group + r;
            int16_t *whole = query->whole + row * stride;
            for (int i = 0; i < width; i++) {
                const float x = q[i] / unit, first = rintf(x);
                whole[i] = (int16_t)(limb ? rintf((x - first) * 65534.0f) : first);
            }
            query->scale[row] = limb ? unit / 65534.0f : unit;
            int start = 0, g = 0;
            for (int which = 0; which < 2; which++) {
                const Section s = section(codec, which, dim);
                for (int i = 0; i < s.count; i++, g++, start += padded(s.size)) {
                    int32_t sum = 0;
                    for (int e = 0; e < padded(s.size); e++) sum += whole[start + e];
                    query->sums[row * MOST_GROUPS + g] = sum;
                }
            }
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

/* Products of query r with group g of `BLOCK` slots, whose codes c are `x` from element `at` on: as whole numbers, with b
 * bits, the sum of q (2 c - 2^b + 1), which is twice that of q (c - centre). */
ALWAYS Floats of_group(const Query *query, int group, int r, int g, const int16_t *x, int at, Section s) {
    Floats total = {0};
    for (int limb = 0; limb < query->limbs; limb++) {
        const int row = limb * group + r;
        const int16_t *q = query->whole + row * query->stride + at;
        Ints sums[BLOCK] = {{0}};
        for (int i = 0; i < padded(s.size); i += 16)
            for (int j = 0; j < BLOCK; j++)
                sums[j] = add_products(sums[j], *(const Shorts *)(q + i), *(const Shorts *)(x + j * MOST_WIDTH + at + i));
        const Ints whole = 2 * added_ints(sums) - ((1 << s.bits) - 1) * query->sums[row * MOST_GROUPS + g];
        total += __builtin_convertvector(whole, Floats) * query->scale[row];
    }
    return total;
}

/* The same of a head in codes. */
ALWAYS void coded_keys(
    const Query *query, const Stored *keys, int group, int64_t filled, int64_t from, int64_t to, float *weights, int codec,
    int dim
) {
    const int width = width_of(codec, dim), per = scales_of(codec, dim);
    uint8_t codes[BLOCK][MOST_WIDTH];
    int16_t x[BLOCK][MOST_WIDTH];
    for (int j = 0; j < BLOCK; j++) memset(codes[j], 0, width);
    for (int64_t s = from; s < to; s += BLOCK) {
        const int64_t count = to - s < BLOCK ? to - s : BLOCK;
        float scales[MOST_GROUPS][BLOCK] = {{0}};
        for (int j = 0; j < count; j++) {
            read_codes(codes[j], keys, s + j, codec, dim);
            for (int g = 0; g < per; g++) scales[g][j] = 0.5f * (float)keys->scales[(s + j) * per + g];
        }
        for (int j = 0; j < BLOCK; j++)
            for (int i = 0; i < width; i += 16)
                *(Shorts *)(x[j] + i) = __builtin_convertvector(*(const Bytes *)(codes[j] + i), Shorts);
        const Section first = section(codec, 0, dim), second = section(codec, 1, dim);
        for (int r = 0; r < group; r++) {
            Floats found = {0};
            int g = 0, at = 0;
            for (; g < first.count; g++, at += padded(first.size))
                found += of_group(query, group, r, g, x[0], at, first) * *(const Floats *)scales[g];
            for (; g < per; g++, at += padded(second.size))
                found += of_group(query, group, r, g, x[0], at, second) * *(const Floats *)scales[g];
            put(weights + r * filled + s, found, count);
        }
    }
}

/* Logits of the slots [from, to) of a head, `weights` [group, filled]. */
ALWAYS void keys_of(
    const Query *query, const Stored *keys, int64_t capacity, int type, int group, int64_t seen, int64_t window,
    int64_t filled, int64_t from, int64_t to, float *weights, int codec, int dim
) {
    if (codec == EXACT) exact_keys(query, keys, type, group, filled, from, to, weights, dim);
    else coded_keys(query, keys, group, filled, from, to, weights, codec, dim);
    if (from == 0 && to > 0 && keys->anchor)
        for (int r = 0; r < group; r++) {
            float sum = 0;
            for (int i = 0; i < dim; i++)
                sum += query->exact[r * query->stride + place(i, codec, dim)] * read_number(keys->anchor, i, type);
            weights[r * filled] = sum;
        }
    if (window > 0)
        /* A sliding layer is one ring without sinks: a slot holds the last token that is its number modulo the ring. */
        for (int64_t s = from; s < to; s++)
            if (seen - 1 - (seen - 1 - s) % capacity <= seen - 1 - window)
                for (int r = 0; r < group; r++) weights[r * filled + s] = -INFINITY;
}

/* What the codes of a section stand for; between groups there may be other numbers. */
ALWAYS void read_numbers(float *restrict x, const uint8_t *restrict codes, const _Float16 *scales, Section s) {
    for (int g = 0; g < s.count; g++, x += padded(s.size), codes += padded(s.size)) {
        const float step = (float)scales[g], shift = -((float)(1 << (s.bits - 1)) - 0.5f) * step;
        for (int i = 0; i < padded(s.size); i++) x[i] = (float)codes[i] * step + shift;
    }
}

/* The slots' values times their weights, added up in `out` [group, stride]. */
ALWAYS void values_of(
    const Stored *values, int type, int group, int64_t filled, int64_t from, int64_t to, const float *weights, float *out,
    int stride, int codec, int dim
) {
    const int width = width_of(codec, dim);
    uint8_t codes[BLOCK][MOST_WIDTH];
    float x[BLOCK][MOST_WIDTH];
    for (int j = 0; j < BLOCK; j++) memset(codes[j], 0, width), memset(x[j], 0, sizeof(float) * width);
    memset(out, 0, sizeof(float) * group * stride);
    for (int64_t s = from; s < to; s += BLOCK) {
        const int64_t count = to - s < BLOCK ? to - s : BLOCK;
        const int exact = s == 0 && values->anchor;
        float used = 0;
        for (int r = 0; r < group; r++)
            for (int j = exact; j < count; j++) used += weights[r * filled + s + j];
        if (used == 0) continue;
        if (codec == EXACT) {
            for (int j = 0; j < count; j++) read_exact(x[j], values->exact, s + j, type, dim);
        } else {
            /* One after the other: what has just been written in small pieces is slow to read in large ones. */
            const Section first = section(codec, 0, dim), second = section(codec, 1, dim);
            const int per = first.count + second.count;
            for (int j = 0; j < count; j++) read_codes(codes[j], values, s + j, codec, dim);
            for (int j = 0; j < count; j++) {
                const int more = first.count * padded(first.size);
                const _Float16 *scale = values->scales + (s + j) * per;
                read_numbers(x[j], codes[j], scale, first);
                read_numbers(x[j] + more, codes[j] + more, scale + first.count, second);
            }
        }
        for (int r = 0; r < group; r++) {
            float w[BLOCK];
            get(w, weights + r * filled + s, count);
            if (exact) w[0] = 0;
            float *o = out + r * stride;
            for (int i = 0; i < width; i += 8) {
                Floats sum = *(const Floats *)(o + i);
                for (int j = 0; j < BLOCK; j++) sum += w[j] * *(const Floats *)(x[j] + i);
                *(Floats *)(o + i) = sum;
            }
        }
    }
    if (from == 0 && to > 0 && values->anchor)
        for (int r = 0; r < group; r++)
            for (int i = 0; i < dim; i++)
                out[r * stride + place(i, codec, dim)] += weights[r * filled] * read_number(values->anchor, i, type);
}
