/* Vectors of a processor for `prompt.c`: those of GCC and Clang, with intrinsics where x86 has better ones. Memory is seen
 * as lanes of 32 bits: a float, or with `pairs` two bfloat16 numbers that a processor multiplies and adds up at once. */

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define ALWAYS static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define WIDTH 16 /* lanes of a vector */
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define LEAST -100.0f /* weights are at least 2^-100 of the largest one, which no sum in float32 can tell from 0 */

typedef int32_t lane __attribute__((may_alias));
typedef float vec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), may_alias));

ALWAYS vec every(float x) { return x - (vec){0}; }
ALWAYS vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* The larger one; what is no number stays so if it is b. */
ALWAYS vec larger(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

/* sum + a * b, or with pairs the sum of both products. */
ALWAYS vec multiply_add(vec sum, vec a, lane b, int pairs) {
#ifdef __AVX512BF16__
    if (pairs) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(b));
#endif
    (void)pairs;
    float one;
    memcpy(&one, &b, 4);
    return sum + a * one;
}

/* 2^x for x <= 0, and no less than 2^LEAST: x is a whole number, in the mantissa of a sum with 1.5 * 2^23, and a part. */
ALWAYS vec power(vec x, int pairs) {
    x = larger(every(LEAST), x);
    const vec shifted = x + 12582912.0f, part = x - (shifted - 12582912.0f);
    vec y;
    if (pairs) { /* to 3e-6, as weights are rounded to 8 bits */
        y = 0x1.399776p-7f * part + 0x1.ca143ep-5f;
        y = y * part + 0x1.ec06dcp-3f;
        y = y * part + 0x1.62e0dcp-1f;
        y = y * part + 0x1.ffffe8p-1f;
    } else {
        y = 0x1.41d3p-13f * part + 0x1.5f456ap-10f;
        y = y * part + 0x1.3b2dbcp-7f;
        y = y * part + 0x1.c6aed4p-5f;
        y = y * part + 0x1.ebfbdap-3f;
        y = y * part + 0x1.62e43p-1f;
        y = y * part + 1.0f;
    }
    return y * (vec)(((ivec)shifted << 23) + (127 << 23));
}

/* Lanes of two vectors of weights: of `a` in the low half, of `b` in the high one. */
ALWAYS vec pair(vec a, vec b) {
#ifdef __AVX512BF16__
    static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    return (vec)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
#else
    (void)b;
    return a;
#endif
}

#ifdef __AVX512F__
#include "transpose.h"
#endif

/* to[j][i] = from[i][j] for WIDTH vectors i of `lanes` lanes. */
static void turn(const lane *from, ptrdiff_t from_step, lane *to, ptrdiff_t to_step, int lanes) {
    int j = 0;
#ifdef __AVX512F__
    for (; j + 16 <= lanes; j += 16) {
        __m512i a[16], b[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * from_step + j);
        transpose(a, b);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (j + i) * to_step, b[i]);
    }
#endif
    for (; j < lanes; j++)
        for (int i = 0; i < WIDTH; i++) to[j * to_step + i] = from[i * from_step + j];
}
