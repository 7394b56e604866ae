#pragma once

/* Sixteen vectors of sixteen numbers of 32 bits, the other way round. */
ALWAYS void transpose(const __m512i *a, __m512i *to) {
    __m512i b[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* 4 by 4 inside of every quarter */
        const __m512i p = _mm512_unpacklo_epi32(a[i], a[i + 1]), q = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]);
        const __m512i r = _mm512_unpackhi_epi32(a[i], a[i + 1]), s = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
        b[i] = _mm512_unpacklo_epi64(p, q), b[i + 1] = _mm512_unpackhi_epi64(p, q);
        b[i + 2] = _mm512_unpacklo_epi64(r, s), b[i + 3] = _mm512_unpackhi_epi64(r, s);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* quarters among themselves */
        const __m512i p = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), q = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        const __m512i r = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd), s = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        to[i] = _mm512_shuffle_i32x4(p, q, 0x88), to[8 + i] = _mm512_shuffle_i32x4(p, q, 0xdd);
        to[4 + i] = _mm512_shuffle_i32x4(r, s, 0x88), to[12 + i] = _mm512_shuffle_i32x4(r, s, 0xdd);
    }
}
