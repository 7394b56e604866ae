/* Both for every codec, and for the usual head sizes as constants: `keys_INT8_64` and so on. */
typedef void KeysOf(const Query *, const Stored *, int64_t, int, int, int64_t, int64_t, int64_t, int64_t, int64_t,
                    float *, int);
typedef void ValuesOf(const Stored *, int, int, int64_t, int64_t, int64_t, const float *, float *, int, int, int);
#define MADE(C, NAME, D) \
    static void keys_##C##_##NAME( \
        const Query *query, const Stored *keys, int64_t capacity, int type, int group, int64_t seen, int64_t window, \
        int64_t filled, int64_t from, int64_t to, float *weights, int dim \
    ) { \
        (void)dim; \
        keys_of(query, keys, capacity, type, group, seen, window, filled, from, to, weights, C, D); \
    } \
    static void values_##C##_##NAME( \
        const Stored *values, int type, int group, int64_t filled, int64_t from, int64_t to, const float *weights, \
        float *out, int stride, int limbs, int dim \
    ) { \
        (void)dim; \
        values_of(values, type, group, filled, from, to, weights, out, stride, limbs, C, D); \
    }
EVERY_CODEC(MADE, 64, 64)
EVERY_CODEC(MADE, 128, 128)
EVERY_CODEC(MADE, any, dim)

#define CASE(C, KIND, NAME) \
    case C: return KIND##_##C##_##NAME;
#define OF(KIND) \
    if (dim == 64) switch (codec) { EVERY_CODEC(CASE, KIND, 64) } \
    if (dim == 128) switch (codec) { EVERY_CODEC(CASE, KIND, 128) } \
    switch (codec) { EVERY_CODEC(CASE, KIND, any) } \
    return 0;
static KeysOf *keys_for(int codec, int dim) { OF(keys) }
static ValuesOf *values_for(int codec, int dim) { OF(values) }
