/* Rows of every codec: what `codecs/integers` defines. The launcher sets ids and sections from `codecs`. */

/* Codecs by their ids; EXACT rows are in the cache dtype. */
enum {
    EXACT, INT8 = KVC_INT8, INT4 = KVC_INT4, INT3 = KVC_INT3, INT2 = KVC_INT2, MIX3 = KVC_MIX3, MIX2 = KVC_MIX2,
    MIX1 = KVC_MIX1
};
#define EVERY_CODEC(DO, ...) \
    DO(EXACT, __VA_ARGS__) DO(INT8, __VA_ARGS__) DO(INT4, __VA_ARGS__) DO(INT3, __VA_ARGS__) DO(INT2, __VA_ARGS__) \
    DO(MIX3, __VA_ARGS__) DO(MIX2, __VA_ARGS__) DO(MIX1, __VA_ARGS__)

#define LANES 16 /* of which the groups of a decoded vector have a multiple */

/* Bits and eighths of a vector's elements, of two sections at most. */
ALWAYS const int *sections(int codec) {
    static const int eight[4] = KVC_INT8_SECTIONS, four[4] = KVC_INT4_SECTIONS, three[4] = KVC_INT3_SECTIONS;
    static const int two[4] = KVC_INT2_SECTIONS, mix3[4] = KVC_MIX3_SECTIONS, mix2[4] = KVC_MIX2_SECTIONS;
    static const int mix1[4] = KVC_MIX1_SECTIONS;
    switch (codec) {
        case INT8: return eight;
        case INT4: return four;
        case INT3: return three;
        case INT2: return two;
        case MIX3: return mix3;
        case MIX2: return mix2;
        default: return mix1;
    }
}

/* The `count` groups of a section, `size` elements each from element `start` on, their codes from byte `byte` and their
 * scales from number `scale` of a row on. */
typedef struct {
    int bits, count, size, start, byte, scale;
} Section;

ALWAYS Section section(int codec, int which, int dim) {
    const int *s = sections(codec);
    const int first = dim * s[1] / 8, firsts = (first + KVC_GROUP - 1) / KVC_GROUP;
    if (which == 0) return (Section){s[0], firsts, first / firsts, 0, 0, 0};
    const int second = dim * s[3] / 8, count = (second + KVC_GROUP - 1) / KVC_GROUP;
    return (Section){s[2], count, count ? second / count : 0, first, first * s[0] / 8, firsts};
}

/* Bytes and scales of a row. */
ALWAYS int code_bytes(int codec, int dim) {
    const int *s = sections(codec);
    return dim * s[1] / 8 * s[0] / 8 + dim * s[3] / 8 * s[2] / 8;
}
ALWAYS int scales_of(int codec, int dim) { return section(codec, 0, dim).count + section(codec, 1, dim).count; }

/* A decoded vector: every group begins at a multiple of `LANES`, and the codes of a byte come apart in parts, first the
 * first elements of all bytes, then the second ones, and so on. Elements that are not stored, and are 0, come last. */
ALWAYS int padded(int size) { return (size + LANES - 1) / LANES * LANES; }
ALWAYS int width_of(int codec, int dim) {
    if (codec == EXACT) return padded(dim);
    const Section first = section(codec, 0, dim), second = section(codec, 1, dim);
    return first.count * padded(first.size) + second.count * padded(second.size);
}

/* Where element i is in it. */
static int place(int i, int codec, int dim) {
    if (codec == EXACT) return i;
    int start = 0;
    for (int which = 0; which < 2; which++) {
        const Section s = section(codec, which, dim);
        if (i < s.count * s.size) {
            const int per = s.bits == 8 ? 1 : s.bits == 4 ? 2 : 4, e = i % s.size;
            return start + i / s.size * padded(s.size) + e % per * (s.size / per) + e / per;
        }
        i -= s.count * s.size;
        start += s.count * padded(s.size);
    }
    return start + i;
}

/* `place` of all elements [dim], worked out once a thread for the head size that it had last. */
#define CODECS 8
static int number_of(int codec) {
    static const int ids[CODECS] = {EXACT, INT8, INT4, INT3, INT2, MIX3, MIX2, MIX1};
    int i = 0;
    while (ids[i] != codec) i++;
    return i;
}
static const int16_t *places_of(int codec, int dim) {
    static _Thread_local struct {
        int dim;
        int16_t places[MOST_DIM];
    } known[CODECS];
    const int i = number_of(codec);
    if (known[i].dim != dim) {
        for (int e = 0; e < dim; e++) known[i].places[e] = (int16_t)place(e, codec, dim);
        known[i].dim = dim;
    }
    return known[i].places;
}

/* The codes of `n` bytes at `c`, the first elements of all of them in `x`, the second ones from `x + step` on, and so on.
 * Several bytes at a time are one number. Codes of 3 bits have the high bit of element j in bit j of `high`'s bytes, or in
 * bit 4 + j where these are `above`. */
#define SPREAD(T) \
    for (; i + (int)sizeof(T) <= n; i += sizeof(T)) { \
        const T ones = (T)0x0101010101010101; \
        T word, more = 0; \
        memcpy(&word, c + i, sizeof(T)); \
        if (bits == 3) memcpy(&more, high + i, sizeof(T)), more = above ? more >> 4 : more; \
        for (int j = 0; j < per; j++) { \
            const T low = (T)(word >> j * (8 / per)) & (T)(ones * ((1 << 8 / per) - 1)); \
            const T both = bits == 3 ? (T)(low | (((T)(more >> j) & ones) << 2)) : low; \
            memcpy(x + j * step + i, &both, sizeof(T)); \
        } \
    }
ALWAYS void spread(uint8_t *x, const uint8_t *c, const uint8_t *high, int above, int bits, int n, int step) {
    const int per = bits == 8 ? 1 : bits == 4 ? 2 : 4;
    int i = 0;
    if (bits != 3 && n >= 32) { /* which compilers do better with their own vectors */
        for (int j = 0; j < per; j++)
            for (i = 0; i < n; i++) x[j * step + i] = c[i] >> j * (8 / per) & ((1 << 8 / per) - 1);
        return;
    }
    SPREAD(uint64_t)
    SPREAD(uint32_t)
    SPREAD(uint8_t)
}

/* The codes of a section in the slot whose codes are at `c`, a byte each, to `x`. */
ALWAYS void read_section(uint8_t *x, const uint8_t *c, Section s) {
    for (int g = 0; g < s.count; g++, x += padded(s.size), c += s.size * s.bits / 8) {
        const int n = s.bits == 3 ? s.size / 4 : s.size * s.bits / 8;
        if (s.bits == 3) {
            /* High bits of byte i's elements are in byte i of the second part, those of byte i + n / 2 above them. */
            spread(x, c, c + n, 0, 3, n / 2, n);
            spread(x + n / 2, c + n / 2, c + n, 1, 3, n / 2, n);
        } else {
            spread(x, c, c, 0, s.bits, n, n);
        }
    }
}

/* The codes of a slot, in the order of `place`. */
ALWAYS void read_codes(uint8_t *x, const Stored *side, int64_t slot, int codec, int dim) {
    const uint8_t *c = side->codes + slot * code_bytes(codec, dim);
    const Section first = section(codec, 0, dim), second = section(codec, 1, dim);
    read_section(x, c, first);
    read_section(x + first.count * padded(first.size), c + second.byte, second);
}

/* Bytes of a group's codes. */
static void pack(uint8_t *to, const uint8_t *codes, int bits, int size) {
    if (bits == 3) {
        const int n = size / 4;
        for (int i = 0; i < n; i++) {
            to[i] = 0;
            for (int j = 0; j < 4; j++) to[i] |= (uint8_t)((codes[4 * i + j] & 3) << 2 * j);
        }
        for (int i = 0; i < n / 2; i++) {
            to[n + i] = 0;
            for (int j = 0; j < 8; j++) to[n + i] |= (uint8_t)(codes[4 * (i + j / 4 * (n / 2)) + j % 4] >> 2 << j);
        }
        return;
    }
    const int per = 8 / bits;
    for (int i = 0; i < size / per; i++) {
        to[i] = 0;
        for (int j = 0; j < per; j++) to[i] |= (uint8_t)(codes[per * i + j] << bits * j);
    }
}

/* The level, a code and a half, of an element whose group has the largest magnitude 1. */
ALWAYS float level_of(float unit, float codes, float half) {
    const float code = floorf(unit * codes);
    return (code < -half ? -half : (code > half - 1 ? half - 1 : code)) + 0.5f;
}

/* Whether what is read has the norm of what was stored: where no element is left out. */
ALWAYS int keeps_norm(int codec) { return sections(codec)[1] + sections(codec)[3] == 8; }

/* Codes of a group of elements, and its scale; codecs/integers says which. */
static _Float16 encode_group(uint8_t *codes, const float *x, int bits, int size, int norm) {
    const float half = (float)(1 << (bits - 1));
    float unit[MOST_DIM], most = 0, own = 0, reach = half, along = 0, length = 1, worth = -1;
    for (int i = 0; i < size; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    most = most < half * 0x1p-14f ? half * 0x1p-14f : (most > half * 65504.0f ? half * 65504.0f : most);
    for (int i = 0; i < size; i++) {
        const float share = x[i] / most;
        unit[i] = share < -1 ? -1 : (share > 1 ? 1 : share);
        own += unit[i] * unit[i];
    }
    const int tried = bits < 8 ? 5 : 1;
    for (int j = 0; j < tried; j++) {
        const float rate = bits < 8 ? (float)(half / (0.4 + 0.1 * (bits + j))) : half;
        float product = 0, square = 0;
        for (int i = 0; i < size; i++) {
            const float level = level_of(unit[i], rate, half);
            product += level * unit[i], square += level * level;
        }
        const float its = product * product * (1 - 0x1p-16f * (float)j) / square;
        if (its > worth) worth = its, along = product, length = square, reach = rate;
    }
    for (int i = 0; i < size; i++) codes[i] = (uint8_t)(level_of(unit[i], reach, half) + (half - 0.5f));
    const float scale = most * (norm ? sqrtf(own / length) : own / (along < 0x1p-14f ? 0x1p-14f : along));
    return (_Float16)(scale < 0x1p-14f ? 0x1p-14f : (scale > 65504.0f ? 65504.0f : scale));
}

static void write_row(const float *x, const Stored *side, int64_t slot, int type, int dim) {
    if (slot == 0 && side->anchor)
        for (int i = 0; i < dim; i++) write_number(side->anchor, i, type, x[i]);
    if (side->codec == EXACT) {
        for (int i = 0; i < dim; i++) write_number(side->exact, slot * dim + i, type, x[i]);
        return;
    }
    uint8_t *to = side->codes + slot * code_bytes(side->codec, dim);
    _Float16 *scales = side->scales + slot * scales_of(side->codec, dim);
    const int norm = keeps_norm(side->codec);
    for (int which = 0; which < 2; which++) {
        const Section s = section(side->codec, which, dim);
        for (int g = 0; g < s.count; g++) {
            uint8_t codes[MOST_DIM];
            scales[s.scale + g] = encode_group(codes, x + s.start + g * s.size, s.bits, s.size, norm);
            pack(to + s.byte + g * (s.size * s.bits / 8), codes, s.bits, s.size);
        }
    }
}

static void move_row(const Stored *side, int64_t from, int64_t to, int type, int dim) {
    if (side->codec == EXACT) {
        const int64_t size = (int64_t)dim * (type == FLOAT32 ? 4 : 2);
        memcpy((char *)side->exact + to * size, (char *)side->exact + from * size, size);
    } else {
        const int bytes = code_bytes(side->codec, dim), scales = scales_of(side->codec, dim);
        memcpy(side->codes + to * bytes, side->codes + from * bytes, bytes);
        memcpy(side->scales + to * scales, side->scales + from * scales, 2 * scales);
    }
}
