/* Logits and values of a head in codes, on any processor: codes become numbers of 16 bits, of which two share a lane. */

#define PAIRS 16 /* of slots whose values are added up as whole numbers */

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

/* Logits f32 [group, filled] of the slots [from, to) of a head in codes. */
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
                *(Shorts *)(x[j] + i) = widened(*(const Bytes *)(codes[j] + i));
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

/* Weights of one query in `PAIRS` pairs of slots as whole numbers of 16 bits, times `unit`; `sum` is that of them all. As of
 * a query, one limb is off by 2^-16 of the largest, and `limb` 1 has what the first one lacks. */
ALWAYS float quantise_weights(int16_t *whole, int32_t *sum, const float *w, int limb) {
    const float largest = largest_of(w, 2 * PAIRS, 1e-30f);
    const float unit = largest / WHOLE, by = WHOLE / largest;
    *sum = 0;
    for (int j = 0; j < 2 * PAIRS; j++) {
        const float x = w[j] * by, first = rintf(x);
        whole[j] = (int16_t)(limb ? rintf((x - first) * 2 * WHOLE) : first);
        *sum += whole[j];
    }
    return limb ? unit / (2 * WHOLE) : unit;
}

/* Values of a group in `PAIRS` pairs of slots, whose codes are `x` [PAIRS, 2 MOST_WIDTH] from element `at` on, those of a
 * pair side by side, times the weights `w`, added to `out`. */
ALWAYS void add_group(float *out, const int16_t *x, int at, const float *w, int limbs, Section s) {
    for (int limb = 0; limb < limbs; limb++) {
        int16_t whole[2 * PAIRS];
        int32_t sum;
        const float unit = 0.5f * quantise_weights(whole, &sum, w, limb);
        const Ints centre = (Ints){0} + ((1 << s.bits) - 1) * sum;
        Ints sums[KVC_GROUP / 8] = {{0}};
        for (int p = 0; p < PAIRS; p++) {
            int32_t both;
            memcpy(&both, whole + 2 * p, 4);
            const Shorts pair = (Shorts)((Ints){0} + both);
            for (int i = 0; i < padded(s.size); i += 8)
                sums[i / 8] = add_products(sums[i / 8], pair, *(const Shorts *)(x + p * 2 * MOST_WIDTH + 2 * (at + i)));
        }
        for (int i = 0; i < padded(s.size); i += 8)
            *(Floats *)(out + at + i) += unit * __builtin_convertvector(2 * sums[i / 8] - centre, Floats);
    }
}

/* The slots' values times their weights, added up in `out` [group, stride], of a head in codes. */
ALWAYS void coded_values(
    const Stored *values, int group, int64_t filled, int64_t from, int64_t to, const float *weights, float *out, int stride,
    int limbs, int codec, int dim
) {
    const int width = width_of(codec, dim), per = scales_of(codec, dim);
    const Section first = section(codec, 0, dim), second = section(codec, 1, dim);
    uint8_t codes[2 * PAIRS][MOST_WIDTH];
    int16_t x[PAIRS][2 * MOST_WIDTH];
    for (int j = 0; j < 2 * PAIRS; j++) memset(codes[j], 0, width);
    for (int64_t s = from; s < to; s += 2 * PAIRS) {
        const int64_t count = to - s < 2 * PAIRS ? to - s : 2 * PAIRS;
        const int exact = s == 0 && values->anchor;
        float used = 0, scales[MOST_GROUPS][2 * PAIRS] = {{0}};
        for (int r = 0; r < group; r++)
            for (int j = exact; j < count; j++) used += weights[r * filled + s + j];
        if (used == 0) continue;
        for (int j = 0; j < count; j++) {
            read_codes(codes[j], values, s + j, codec, dim);
            for (int g = 0; g < per; g++) scales[g][j] = (float)values->scales[(s + j) * per + g];
        }
        for (int p = 0; p < PAIRS; p++)
            for (int i = 0; i < width; i += 16) {
                const Bytes a = *(const Bytes *)(codes[2 * p] + i), b = *(const Bytes *)(codes[2 * p + 1] + i);
                *(Shorts *)(x[p] + 2 * i) = widened(LOWER(a, b));
                *(Shorts *)(x[p] + 2 * i + 16) = widened(UPPER(a, b));
            }
        for (int r = 0; r < group; r++) {
            float w[2 * PAIRS] = {0}, scaled[2 * PAIRS];
            memcpy(w, weights + r * filled + s, sizeof(float) * count);
            if (exact) w[0] = 0;
            int g = 0, at = 0;
            for (int which = 0; which < 2; which++) {
                const Section part = which ? second : first;
                for (int i = 0; i < part.count; i++, g++, at += padded(part.size)) {
                    for (int j = 0; j < 2 * PAIRS; j++) scaled[j] = w[j] * scales[g][j];
                    add_group(out + r * stride, x[0], at, scaled, limbs, part);
                }
            }
        }
    }
}
