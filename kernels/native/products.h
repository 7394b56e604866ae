/* Products of packed rows with columns, for `prompt.c` and what profiles measure (`strips.h`). */

#pragma once

#include "rows.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE 8 /* keys, or elements of values, by WIDE vectors of rows are summed in registers: 24 of 32, or 12 of 16 */
#else
#define TILE 4
#endif
#define WIDE 3
#ifdef __AVX512BF16__
#define PAIRED 1
#else
#define PAIRED 0
#endif
#if defined(__AVX__) && !defined(__AVX512F__)
#define KEEP(x) __asm__("" : "+x"(x)) /* in a register: gcc would load it anew for each product */
#else
#define KEEP(x)
#endif
#define HIDDEN -1e30f /* logit of what is not seen; below BELOW, so that rows that have seen nothing yet give it no weight */
#define BELOW -1e29f  /* the largest logit before there is any */
#define EACH(i, j, wide) \
    _Pragma("GCC unroll 8") for (int i = 0; i < TILE; i++) _Pragma("GCC unroll 3") for (int j = 0; j < (wide); j++)

/* Whether a processor multiplies bfloat16 two at once. */
int64_t kvc_pairs(void) { return PAIRED; }

/* sums[i][j] = over x of a[x][j] * b[i * across + x * along]. */
ALWAYS void products(
    vec sums[TILE][WIDE], const vec *a, const lane *b, ptrdiff_t across, ptrdiff_t along, int depth, int wide, int pairs
) {
    EACH(i, j, wide) sums[i][j] = every(0);
    for (int x = 0; x < depth; x++, a += wide, b += along) {
        vec row[WIDE];
        _Pragma("GCC unroll 3") for (int j = 0; j < wide; j++) {
            row[j] = a[j];
            KEEP(row[j]);
        }
        EACH(i, j, wide) sums[i][j] = multiply_add(sums[i][j], row[j], b[i * across], pairs);
    }
}

/* to[k][j] = a[j] . b[k], on top of `more` where there is any. */
ALWAYS void dots(vec *to, const vec *more, const vec *a, const lane *b, int64_t columns, int depth, int wide, int pairs) {
    vec sums[TILE][WIDE];
    for (int64_t k = 0; k < columns; k += TILE) {
        products(sums, a, b + k * depth, depth, 1, depth, wide, pairs);
        if (more) EACH(i, j, wide) sums[i][j] += more[(k + i) * wide + j];
        EACH(i, j, wide) to[(k + i) * wide + j] = sums[i][j];
    }
}

#define BLOCK 64 /* columns, or pairs of them, whose elements the nearest cache holds beside their weights */

/* sums[d][j] += over columns of weights[column][j] * turned[column][d]. */
ALWAYS void mix(vec *sums, const vec *weights, const lane *turned, int64_t columns, int dim, int wide, int pairs) {
    vec some[TILE][WIDE];
    for (int64_t k = 0; k < columns; k += BLOCK) {
        const int count = columns - k < BLOCK ? (int)(columns - k) : BLOCK;
        for (int d = 0; d < dim; d += TILE) {
            products(some, weights + k * wide, turned + k * dim + d, 1, dim, count, wide, pairs);
            EACH(i, j, wide) sums[(d + i) * wide + j] += some[i][j];
        }
    }
}

/* Rows of vectors as lanes, the other way round; the last row fills the vector. */
static inline void lay(vec *to, const lane *rows, int64_t count, int wide, int depth, lane *stage) {
    for (int i = 0; i < wide * WIDTH; i++) {
        memcpy(stage + (ptrdiff_t)(i % WIDTH) * depth, rows + (i < count ? i : count - 1) * depth, sizeof(lane) * depth);
        if (i % WIDTH == WIDTH - 1) turn(stage, depth, (lane *)(to + i / WIDTH), (ptrdiff_t)wide * WIDTH, depth);
    }
}

/* A share of a thread's scratch. */
ALWAYS void *take(char **scratch, int64_t bytes) {
    char *found = *scratch;
    *scratch += (bytes + 63) / 64 * 64;
    return found;
}
