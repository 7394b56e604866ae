/* What vectors read as once they have been stored: what `read_back/api.py` says. A source of its own, compiled in a second:
 * a profile needs it, and does not need what decodes. */

#include "store.h"
#include "codecs.h"

/* `rows` vectors f32 [rows, dim] of `x`, as they are read from a codec, to `out` f32 [rows, dim]. */
void kvc_read_back(const float *x, float *out, int64_t rows, int codec, int dim, int threads) {
    const int norm = keeps_norm(codec);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * dim;
        float *to = out + r * dim;
        int end = 0;
        for (int which = 0; which < 2; which++) {
            const Section s = section(codec, which, dim);
            for (int g = 0; g < s.count; g++, end += s.size) {
                uint8_t codes[MOST_DIM];
                const float scale = (float)encode_group(codes, from + end, s.bits, s.size, norm);
                for (int i = 0; i < s.size; i++) to[end + i] = scale * (codes[i] + (0.5f - (float)(1 << (s.bits - 1))));
            }
        }
        memset(to + end, 0, sizeof(float) * (size_t)(dim - end));
    }
}
