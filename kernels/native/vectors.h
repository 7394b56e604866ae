/* Vectors of eight numbers, as gcc and clang have them on any processor. */

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4)));
typedef int16_t Shorts __attribute__((vector_size(32), aligned(2))); /* sixteen of them */
typedef int16_t HalfShorts __attribute__((vector_size(16), aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1))); /* sixteen of them */
typedef uint8_t HalfBytes __attribute__((vector_size(8), aligned(1)));

#ifdef __clang__
#define PICK(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define PICK(A, B, ...) __builtin_shuffle(A, B, (__typeof__((Ints){0})){__VA_ARGS__})
#endif
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
    const HalfShorts *p = (const HalfShorts *)&a, *q = (const HalfShorts *)&b;
    for (int i = 0; i < 2; i++) sum += __builtin_convertvector(p[i], Ints) * __builtin_convertvector(q[i], Ints);
    return sum;
#endif
}
