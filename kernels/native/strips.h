/* What the sources with strips of rows have in common, after their `Call`, `Strip`, `meet` and `strip`. */

#pragma once

#include "products.h"

/* `meet` for one to WIDE vectors of rows, with pairs and without, as NAME_wide_pairs. */
#if PAIRED
#define EACH_KIND(MADE) MADE(1, 0) MADE(2, 0) MADE(3, 0) MADE(1, 1) MADE(2, 1) MADE(3, 1)
#define KINDS {{meet_1_0, meet_2_0, meet_3_0}, {meet_1_1, meet_2_1, meet_3_1}}
#else
#define EACH_KIND(MADE) MADE(1, 0) MADE(2, 0) MADE(3, 0)
#define KINDS {{meet_1_0, meet_2_0, meet_3_0}}
#endif

/* The entry points of a source. kvc_NAME_rows: rows of a strip. kvc_NAME_room: bytes of scratch that a thread needs. kvc_NAME:
 * all strips of HEADS; `scratch` has `c->room` bytes for every thread, a multiple of 64, and is aligned to as many. */
#define LAUNCHED(NAME, HEADS) \
    int64_t kvc_##NAME##_rows(void) { return WIDE * WIDTH; } \
    int64_t kvc_##NAME##_room(const Call *c) { return strip(c, 0, 0, WIDE * WIDTH, 0); } \
    void kvc_##NAME(const Call *c, char *scratch) { \
        const int64_t each = WIDE * WIDTH, strips = (c->rows + each - 1) / each; \
        _Pragma("omp parallel for schedule(dynamic) num_threads((int)c->threads)") \
        for (int64_t i = 0; i < strips * c->HEADS; i++) { \
            const int64_t first = i / c->HEADS * each, stop = first + each < c->rows ? first + each : c->rows; \
            strip(c, i % c->HEADS, first, stop, scratch + THREAD * c->room); \
        } \
    }

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif
