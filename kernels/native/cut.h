/* Tokens of prompts into the slots of a class: what `compact/reference.py` defines. */

#define ROWS 4    /* that share what is read of a matrix */
#define SLOTS 64  /* of a head that a thread takes at once */

/* `tokens` [batch, count, kept]: whose keys (or values) go into the first slots of the heads from `first` on; `matrices` and
 * `means` as in `Transform`, of all heads, or NULL. `column` is K_CODEC or V_CODEC. Numbers of `at` are of type `type_in`,
 * those of the next sequence, head and token so many further on. */
typedef struct {
    const void *at;
    int64_t sequence, head, token;
    const Side *side;
    const int32_t *rows;
    const float *matrices, *means;
    const int64_t *tokens;
    int64_t kept;
    int first, count, batch, column, type_in, type, threads, dim;
} Cut;

static void cut_slots(const Cut *c, int b, int h, int64_t from, int64_t to) {
    const int dim = c->dim;
    const Stored side = stored(c->side, b, h, c->rows + h * FIELDS + c->column, c->type, dim);
    const int moved = c->matrices && side.codec != EXACT;
    const int64_t *tokens = c->tokens + ((int64_t)b * c->count + h - c->first) * c->kept;
    float x[ROWS * MOST_DIM], y[ROWS * MOST_DIM];
    for (int64_t s = from; s < to; s += ROWS) {
        const int n = (int)(to - s < ROWS ? to - s : ROWS);
        for (int r = 0; r < n; r++) {
            const int64_t start = b * c->sequence + h * c->head + tokens[s + r] * c->token;
            for (int i = 0; i < dim; i++) x[r * dim + i] = read_number(c->at, start + i, c->type_in);
            for (int i = 0; moved && i < dim; i++) x[r * dim + i] -= c->means[h * dim + i];
        }
        if (moved) multiply(x, c->matrices + (int64_t)h * dim * dim, y, n, dim);
        for (int r = 0; r < n; r++) write_row((moved ? y : x) + r * dim, &side, s + r, c->type, dim);
    }
}

void kvc_compact(const Cut *c) {
    const int64_t blocks = (c->kept + SLOTS - 1) / SLOTS;
#pragma omp parallel for schedule(dynamic) num_threads(c->threads)
    for (int64_t i = 0; i < blocks * c->batch * c->count; i++) {
        const int64_t from = i % blocks * SLOTS, to = from + SLOTS < c->kept ? from + SLOTS : c->kept, head = i / blocks;
        cut_slots(c, (int)(head / c->count), c->first + (int)(head % c->count), from, to);
    }
}
