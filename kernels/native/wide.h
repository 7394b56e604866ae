/* `coded_keys` and `coded_values` with the vectors of 64 bytes that AVX-512 has: codes stay bytes, and four products go
 * into a lane at once. A number of 16 bits is two bytes then, 256 times the high one and the low one, both signed. */

#include "packed.h"

#define KEY_SLOTS 16 /* whose keys are decoded at a time, one to a lane */
#define QUADS 16     /* times four slots whose values are added up as whole numbers */
#define VECTORS 4    /* of their weights */
#define EACH(v) _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++)

/* Scale g of the slots [s, s + count) of a head, at most sixteen. */
ALWAYS __m512 scales_at(const Stored *side, int64_t s, int64_t count, int g, int per) {
    if (per == 1 && count >= 16) return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(side->scales + s)));
    uint16_t found[16] = {0};
    for (int j = 0; j < 16 && j < count; j++) memcpy(found + j, side->scales + (s + j) * per + g, 2);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)found));
}

/* Fetch codes and scales of the slots [s, s + count) that are `AHEAD` of those: a processor guesses only inside of a page,
 * and the next one's first lines would be waited for. */
#define AHEAD 64
ALWAYS void fetch(const Stored *side, int64_t s, int64_t count, int bytes, int per) {
    const char *codes = (const char *)(side->codes + (s + AHEAD) * bytes);
    const char *scales = (const char *)(side->scales + (s + AHEAD) * per);
    for (int64_t i = 0; i < count * bytes; i += MANY) __builtin_prefetch(codes + i);
    for (int64_t i = 0; i < count * per * 2; i += MANY) __builtin_prefetch(scales + i);
}

ALWAYS void coded_keys(
    const Query *query, const Stored *keys, int group, int64_t filled, int64_t from, int64_t to, float *weights, int codec,
    int dim
) {
    const int width = width_of(codec, dim), per = scales_of(codec, dim), stride = query->stride;
    const uint8_t *const rows = keys->codes;
    const int bytes = code_bytes(codec, dim);
    __m512i codes[KEY_SLOTS], x[CHUNKS * 16];
    const Packed *packed = packed_of(codec, dim);
    for (int64_t s = from; s < to; s += KEY_SLOTS) {
        const int64_t count = to - s < KEY_SLOTS ? to - s : KEY_SLOTS;
        __m512 scales[MOST_GROUPS];
        fetch(keys, s, KEY_SLOTS, bytes, per);
        for (int g = 0; g < per; g++) scales[g] = scales_at(keys, s, count, g, per);
        for (int i = 0; i < width; i += MANY) {
#pragma GCC unroll 16
            for (int j = 0; j < KEY_SLOTS; j++) /* after the last one, that one again */
                codes[j] = unpack(packed + i / MANY, rows + (j < count ? s + j : to - 1) * bytes, codec, dim);
            transpose(codes, x + i / 4);
        }
        for (int r = 0; r < group; r++) {
            __m512 found = _mm512_setzero_ps();
            for (int limb = 0; limb < query->limbs; limb++) {
                const int row = limb * group + r;
                const int8_t *low = (const int8_t *)(query->whole + row * stride), *high = low + stride;
                const __m512 unit = _mm512_set1_ps(0.5f * query->scale[row]);
                int at = 0, g = 0;
                for (int which = 0; which < 2; which++) {
                    const Section part = section(codec, which, dim);
                    for (int i = 0; i < part.count; i++, g++) {
                        __m512i lows = _mm512_setzero_si512(), highs = _mm512_setzero_si512();
                        const int end = at + padded(part.size);
                        for (; at < end; at += 4) {
                            int32_t a, b;
                            memcpy(&a, low + at, 4), memcpy(&b, high + at, 4);
                            lows = _mm512_dpbusd_epi32(lows, x[at / 4], _mm512_set1_epi32(a));
                            highs = _mm512_dpbusd_epi32(highs, x[at / 4], _mm512_set1_epi32(b));
                        }
                        const int centre = ((1 << part.bits) - 1) * query->sums[row * MOST_GROUPS + g];
                        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(highs, 9), _mm512_slli_epi32(lows, 1));
                        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(whole, _mm512_set1_epi32(centre)));
                        found = _mm512_fmadd_ps(_mm512_mul_ps(sum, unit), scales[g], found);
                    }
                }
            }
            _mm512_mask_storeu_ps(weights + r * filled + s, (__mmask16)((1u << count) - 1), found);
        }
    }
}

/* What is known of the groups that a chunk of MANY elements meets: numbers `first` to `last`, and their lanes where four
 * neighbouring elements of every quarter are in a vector. */
typedef struct {
    int first, last;
    __mmask16 lanes[4];
} Chunk;

ALWAYS void find_chunks(Chunk *chunks, int codec, int dim) {
    int at = 0, g = 0;
    for (int which = 0; which < 2; which++) {
        const Section part = section(codec, which, dim);
        for (int i = 0; i < part.count; i++, g++)
            for (int e = 0; e < padded(part.size); e += 16, at += 16) {
                Chunk *c = chunks + at / MANY;
                const int quarter = at % MANY / 16;
                if (quarter == 0) *c = (Chunk){g, g, {0}};
                c->last = g;
                c->lanes[g - c->first] |= (__mmask16)(15 << 4 * quarter);
            }
    }
}

/* A number of every group [g * step] in the lanes of the groups that a chunk meets. */
ALWAYS __m512i spread_out(const Chunk *c, const int32_t *numbers, int step) {
    __m512i found = _mm512_set1_epi32(numbers[c->first * step]);
    for (int g = c->first + 1; g <= c->last; g++)
        found = _mm512_mask_set1_epi32(found, c->lanes[g - c->first], numbers[g * step]);
    return found;
}

/* One query's weights of 4 * QUADS slots and each group as bytes, times `unit`; `centre` is what codes count too much. */
typedef struct {
    int32_t low[MOST_GROUPS][QUADS], high[MOST_GROUPS][QUADS], centre[MOST_GROUPS];
    int32_t unit[MOST_GROUPS]; /* the bits of floats */
} Weights;

ALWAYS void quantise_weights(
    Weights *found, const __m512 *w, __m512 scales[MOST_GROUPS][VECTORS], int limb, int codec, int dim
) {
    int g = 0;
    for (int which = 0; which < 2; which++) {
        const Section part = section(codec, which, dim);
        for (int i = 0; i < part.count; i++, g++) {
            __m512 scaled[VECTORS], most = _mm512_set1_ps(1e-30f);
            EACH(v) scaled[v] = _mm512_mul_ps(w[v], scales[g][v]), most = _mm512_max_ps(most, scaled[v]);
            const float largest = _mm512_reduce_max_ps(most), unit = 0.5f / WHOLE * largest;
            const __m512 by = _mm512_set1_ps(WHOLE / largest), finer = _mm512_set1_ps(2 * WHOLE);
            __m512i sum = _mm512_setzero_si512();
            EACH(v) {
                __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(scaled[v], by));
                const __m512 lacking = _mm512_fmsub_ps(scaled[v], by, _mm512_cvtepi32_ps(x));
                if (limb) x = _mm512_cvtps_epi32(_mm512_mul_ps(lacking, finer));
                const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
                _mm_storeu_si128((void *)(found->low[g] + 4 * v), _mm512_cvtepi32_epi8(x)); /* that of x - 256 high */
                _mm_storeu_si128((void *)(found->high[g] + 4 * v), _mm512_cvtepi32_epi8(high));
                sum = _mm512_add_epi32(sum, x);
            }
            found->centre[g] = ((1 << part.bits) - 1) * _mm512_reduce_add_epi32(sum);
            const float one = limb ? unit / (2 * WHOLE) : unit;
            memcpy(found->unit + g, &one, 4);
        }
    }
}

ALWAYS void coded_values(
    const Stored *values, int group, int64_t filled, int64_t from, int64_t to, const float *weights, float *out, int stride,
    int limbs, int codec, int dim
) {
    const int width = width_of(codec, dim), per = scales_of(codec, dim);
    const uint8_t *const rows = values->codes;
    const int bytes = code_bytes(codec, dim);
    __m512i codes[4], x[CHUNKS][QUADS][4];
    const Packed *packed = packed_of(codec, dim);
    Chunk chunks[CHUNKS];
    find_chunks(chunks, codec, dim);
    for (int64_t s = from; s < to; s += 4 * QUADS) {
        const int count = (int)(to - s < 4 * QUADS ? to - s : 4 * QUADS), quads = (count + 3) / 4;
        const int exact = s == 0 && values->anchor;
        const uint64_t there = (count < MANY ? (1ull << count) - 1 : ~0ull) & ~(uint64_t)exact;
        fetch(values, s, MANY, bytes, per);
        __m512 used = _mm512_setzero_ps(), scales[MOST_GROUPS][VECTORS];
        for (int r = 0; r < group; r++)
            EACH(v) {
                const float *w = weights + r * filled + s + 16 * v;
                used = _mm512_add_ps(used, _mm512_maskz_loadu_ps((__mmask16)(there >> 16 * v), w));
            }
        if (!_mm512_cmpneq_ps_mask(used, _mm512_setzero_ps())) continue;
        for (int g = 0; g < per; g++)
            EACH(v) scales[g][v] = scales_at(values, s + 16 * v, count - 16 * v, g, per);
        for (int q = 0; q < quads; q++) {
            for (int i = 0; i < width; i += MANY) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const int64_t slot = s + 4 * q + j;
                    codes[j] = unpack(packed + i / MANY, rows + (slot < to ? slot : to - 1) * bytes, codec, dim);
                }
                const __m512i a = codes[0], b = codes[1], c = codes[2], d = codes[3];
                const __m512i e = _mm512_unpacklo_epi8(a, b), f = _mm512_unpackhi_epi8(a, b);
                const __m512i g = _mm512_unpacklo_epi8(c, d), h = _mm512_unpackhi_epi8(c, d);
                __m512i *to = x[i / MANY][q];
                to[0] = _mm512_unpacklo_epi16(e, g), to[1] = _mm512_unpackhi_epi16(e, g);
                to[2] = _mm512_unpacklo_epi16(f, h), to[3] = _mm512_unpackhi_epi16(f, h);
            }
        }
        for (int r = 0; r < group; r++) {
            __m512 w[VECTORS];
            EACH(v) w[v] = _mm512_maskz_loadu_ps((__mmask16)(there >> 16 * v), weights + r * filled + s + 16 * v);
            for (int limb = 0; limb < limbs; limb++) {
                Weights whole;
                quantise_weights(&whole, w, scales, limb, codec, dim);
                for (int i = 0; i < width; i += MANY) {
                    const Chunk *c = chunks + i / MANY;
                    __m512i lows[4] = {_mm512_setzero_si512()}, highs[4] = {_mm512_setzero_si512()};
                    for (int q = 0; q < quads; q++) {
                        const __m512i low = spread_out(c, whole.low[0] + q, QUADS);
                        const __m512i high = spread_out(c, whole.high[0] + q, QUADS);
#pragma GCC unroll 4
                        for (int e = 0; e < 4; e++) {
                            lows[e] = _mm512_dpbusd_epi32(lows[e], x[i / MANY][q][e], low);
                            highs[e] = _mm512_dpbusd_epi32(highs[e], x[i / MANY][q][e], high);
                        }
                    }
                    const __m512i centre = spread_out(c, whole.centre, 1);
                    const __m512 unit = _mm512_castsi512_ps(spread_out(c, whole.unit, 1));
                    float *to = out + r * stride + i;
#pragma GCC unroll 4
                    for (int e = 0; e < 4; e++) {
                        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(highs[e], 9), _mm512_slli_epi32(lows[e], 1));
                        const __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, centre)), unit);
                        const __m128 quarters[4] = {
                            _mm512_castps512_ps128(found), _mm512_extractf32x4_ps(found, 1), _mm512_extractf32x4_ps(found, 2),
                            _mm512_extractf32x4_ps(found, 3),
                        };
#pragma GCC unroll 4
                        for (int quarter = 0; quarter < 4; quarter++)
                            if (i + 16 * quarter < width) {
                                float *four = to + 16 * quarter + 4 * e;
                                _mm_storeu_ps(four, _mm_add_ps(_mm_loadu_ps(four), quarters[quarter]));
                            }
                    }
                }
            }
        }
    }
}
