/* What a layer stores, as the launcher gives it, and numbers of the cache dtype. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define MOST_DIM 512 /* elements of a head */

/* `layout.HeadRow`, and the kinds of heads there. */
enum { CAPACITY, SINK, RECENT, KIND, SCORE, SLOT, K_CODEC, K_ROW, K_ANCHOR, V_CODEC, V_ROW, V_ANCHOR, FIELDS };
enum { RING, SCORED, OTHER };
/* Types of rows in the cache dtype. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* Keys or values, as in `Buffers`, and how many bytes further on each of them goes on for the next sequence; `starts`
 * [heads, 2] has the first byte of every head's codes and the first of its scales, as in `regions.starts`. */
typedef struct {
    char *exact;
    uint8_t *codes;
    _Float16 *scales;
    char *anchors;
    int64_t steps[4];
    const int64_t *starts;
} Side;

/* One head's in one sequence: rows from its first on, and its copy of token 0 (NULL: it has none). */
typedef struct {
    int codec;
    void *exact;
    uint8_t *codes;
    _Float16 *scales;
    void *anchor;
} Stored;

/* `place` is that of the sequence, `row` the head's codec, row and anchor (`layout.Place`). */
ALWAYS Stored stored(const Side *side, int64_t place, int head, const int32_t *row, int type, int dim) {
    const int64_t *s = side->steps, size = (int64_t)dim * (type == FLOAT32 ? 4 : 2);
    return (Stored){row[0],
                    side->exact + place * s[0] + row[1] * size,
                    side->codes + place * s[1] + side->starts[2 * head],
                    (_Float16 *)((char *)side->scales + place * s[2]) + side->starts[2 * head + 1],
                    row[2] < 0 ? 0 : side->anchors + place * s[3] + row[2] * size};
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
