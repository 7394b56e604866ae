/* Codes in vectors of the 64 bytes that AVX-512 has: any codec's become bytes by one permutation and one shift. */

#include "transpose.h"

#define MANY 64 /* bytes of a vector */
#define CHUNKS ((MOST_WIDTH + MANY - 1) / MANY)

/* Where the codes of MANY elements in the order of `place` are: in which of the MANY bytes `from` that of the row on, of
 * which `there` belong to it, from which bit on, and the bits that count; of 3 bits the high one apart. */
typedef struct {
    __m512i byte, bit, mask, high_byte, high_bit, high_mask;
    __mmask64 there;
    int from;
} Packed;

static void find_packed(Packed *chunks, int codec, int dim) {
    uint8_t byte[CHUNKS * MANY] = {0}, bit[CHUNKS * MANY] = {0}, mask[CHUNKS * MANY] = {0};
    uint8_t high_byte[CHUNKS * MANY] = {0}, high_bit[CHUNKS * MANY] = {0}, high_mask[CHUNKS * MANY] = {0};
    const int width = width_of(codec, dim), bytes = code_bytes(codec, dim);
    int at = 0, row[CHUNKS * MANY];
    for (int i = 0; i < CHUNKS * MANY; i++) row[i] = -1;
    for (int which = 0; which < 2; which++) {
        const Section s = section(codec, which, dim);
        for (int g = 0; g < s.count; g++, at += padded(s.size)) {
            const int low = s.bits == 3 ? 2 : s.bits, n = s.size * low / 8, first = s.byte + g * (s.size * s.bits / 8);
            if (n < (s.bits == 3 ? 2 : 1)) continue; /* no size of head that the codec fits */
            for (int e = 0; e < s.size; e++) {
                const int i = e % n, to = at + e, chunk = to / MANY * MANY;
                if (row[chunk] < 0) row[chunk] = first + i; /* elements of a chunk are in neighbouring bytes from here on */
                row[to] = first + i, bit[to] = (uint8_t)(e / n * low), mask[to] = (uint8_t)((1 << low) - 1);
                if (s.bits == 3) { /* see `read_section` */
                    high_byte[to] = (uint8_t)(n + i % (n / 2) - i), high_mask[to] = 4;
                    high_bit[to] = (uint8_t)(e / n + (i >= n / 2 ? 4 : 0));
                }
            }
        }
    }
    for (int i = 0; i < width; i += MANY) {
        Packed *p = chunks + i / MANY;
        p->from = row[i] < 0 ? 0 : row[i];
        for (int j = i; j < i + MANY; j++) p->from = row[j] >= 0 && row[j] < p->from ? row[j] : p->from;
        for (int j = i; j < i + MANY; j++) {
            byte[j] = (uint8_t)(row[j] < 0 ? 0 : row[j] - p->from);
            high_byte[j] = (uint8_t)(byte[j] + high_byte[j]);
            bit[j] = (uint8_t)(8 * (j % 8) + bit[j]);
            high_bit[j] = (uint8_t)((8 * (j % 8) + high_bit[j] - 2) & 63); /* so that it becomes the third one */
        }
        const int left = bytes - p->from;
        p->there = left < MANY ? (1ull << left) - 1 : ~0ull;
        p->byte = _mm512_loadu_si512(byte + i), p->bit = _mm512_loadu_si512(bit + i);
        p->mask = _mm512_loadu_si512(mask + i), p->high_mask = _mm512_loadu_si512(high_mask + i);
        p->high_byte = _mm512_loadu_si512(high_byte + i), p->high_bit = _mm512_loadu_si512(high_bit + i);
    }
}

/* The same, worked out once a thread for the head size that it had last. */
static const Packed *packed_of(int codec, int dim) {
    static _Thread_local struct {
        int dim;
        Packed chunks[CHUNKS];
    } known[CODECS];
    const int i = number_of(codec);
    if (known[i].dim != dim) {
        find_packed(known[i].chunks, codec, dim);
        known[i].dim = dim;
    }
    return known[i].chunks;
}

/* The codes of a chunk of a row, a byte each. */
ALWAYS __m512i unpack(const Packed *p, const uint8_t *row, int codec, int dim) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(p->there, row + p->from);
    if (codec == INT8 && section(codec, 0, dim).size % LANES == 0) return bytes;
    const __m512i low = _mm512_multishift_epi64_epi8(p->bit, _mm512_permutexvar_epi8(p->byte, bytes));
    if (codec != INT3) return _mm512_and_si512(low, p->mask);
    const __m512i high = _mm512_multishift_epi64_epi8(p->high_bit, _mm512_permutexvar_epi8(p->high_byte, bytes));
    return _mm512_or_si512(_mm512_and_si512(low, p->mask), _mm512_and_si512(high, p->high_mask));
}
