/* Vectors of eight numbers, as gcc and clang have them on any processor. */

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4)));
typedef int16_t Shorts __attribute__((vector_size(32), aligned(2))); /* sixteen of them */
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1))); /* sixteen of them */

#ifdef __clang__
#define PICK(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define PICK(A, B, ...) __builtin_shuffle(A, B, (__typeof__((Ints){0})){__VA_ARGS__})
#endif
/* Bytes of two vectors in turn: the lower eight of each, and the upper ones. */
#ifdef __clang__
#define TURNS(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define TURNS(A, B, ...) __builtin_shuffle(A, B, (Bytes){__VA_ARGS__})
#endif
#define LOWER(A, B) TURNS(A, B, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define UPPER(A, B) TURNS(A, B, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
/* As floats whatever they are: some processors have the instruction for these alone. */
#define EVEN(A, B) PICK((Floats)A, (Floats)B, 0, 2, 8, 10, 4, 6, 12, 14)
#define ODD(A, B) PICK((Floats)A, (Floats)B, 1, 3, 9, 11, 5, 7, 13, 15)

/* Of eight vectors, the sum over the lanes of each. */
#define ADDED(NAME, T) \
    ALWAYS T NAME(const T *s) { \
        const T a = (T)EVEN(s[0], s[1]) + (T)ODD(s[0], s[1]), b = (T)EVEN(s[2], s[3]) + (T)ODD(s[2], s[3]); \
        const T c = (T)EVEN(s[4], s[5]) + (T)ODD(s[4], s[5]), d = (T)EVEN(s[6], s[7]) + (T)ODD(s[6], s[7]); \
        const T e = (T)EVEN(a, b) + (T)ODD(a, b), f = (T)EVEN(c, d) + (T)ODD(c, d); \
        return PICK(e, f, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(e, f, 4, 5, 6, 7, 12, 13, 14, 15); \
    }
ADDED(added_floats, Floats)
ADDED(added_ints, Ints)

/* The products of sixteen numbers, two by two, added to `sum`. */
ALWAYS Ints add_products(Ints sum, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (Ints)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const Ints p = (Ints)a, q = (Ints)b;
    return sum + (p << 16 >> 16) * (q << 16 >> 16) + (p >> 16) * (q >> 16);
#endif
}

/* Sixteen bytes as numbers of 16 bits. */
ALWAYS Shorts widened(Bytes bytes) {
#ifdef __AVX2__ /* gcc converts the halves one by one */
    return (Shorts)_mm256_cvtepu8_epi16((__m128i)bytes);
#else
    return __builtin_convertvector(bytes, Shorts);
#endif
}

ALWAYS Floats higher(Floats a, Floats b) {
#ifdef __AVX2__
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    const Ints first = a > b;
    return (Floats)(((Ints)a & first) | ((Ints)b & ~first));
#endif
}

/* The largest of `count` numbers, a multiple of eight, and of `least`. */
ALWAYS float largest_of(const float *x, int count, float least) {
    Floats most = (Floats){0} + least;
    for (int i = 0; i < count; i += 8) most = higher(most, *(const Floats *)(x + i));
    most = higher(most, PICK(most, most, 4, 5, 6, 7, 0, 1, 2, 3));
    most = higher(most, PICK(most, most, 2, 3, 0, 1, 6, 7, 4, 5));
    most = higher(most, PICK(most, most, 1, 0, 3, 2, 5, 4, 7, 6));
    return most[0];
}
