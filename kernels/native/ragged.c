/* Decoding and appending on a CPU: what `ragged_decode/reference.py` and `append/reference.py`
 * define, with every row decoded where it is used. Plain C and the vectors of gcc and clang; threads are torch's own; see
 * `__init__.py`. */

#include "store.h"
#include "codecs.h"
#include "vectors.h"
#include "attention.h"
#include "chosen.h"
#include "transform.h"
#include "cut.h"
#include "items.h"

#define LEAST 50.0f /* a weight of less than 2^-50 of the largest one is 0: float32 could not tell */

/* 2^x for -LEAST <= x <= 0, to a few units in the last place. */
ALWAYS float exp2_negative(float x) {
    const float whole = floorf(x + 0.5f), part = (x - whole) * 0.69314718056f;
    float y = 1.0f / 720;
    y = y * part + 1.0f / 120;
    y = y * part + 1.0f / 24;
    y = y * part + 1.0f / 6;
    y = y * part + 0.5f;
    y = y * part + 1.0f;
    y = y * part + 1.0f;
    const int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

/* Weights [count] of logits, not divided by their sum, which is returned; `largest` is that of the logits. */
static float softmax(float *restrict w, int64_t count, float *largest) {
    float highest[8], most = -INFINITY, total = 0;
    for (int i = 0; i < 8; i++) highest[i] = -INFINITY;
    const int64_t whole = count / 8 * 8;
    for (int64_t s = 0; s < whole; s += 8)
        for (int i = 0; i < 8; i++) highest[i] = w[s + i] > highest[i] ? w[s + i] : highest[i];
    for (int64_t s = whole; s < count; s++) most = w[s] > most ? w[s] : most;
    for (int i = 0; i < 8; i++) most = highest[i] > most ? highest[i] : most;
    *largest = most;
    for (int64_t s = 0; s < count; s++) {
        const float below = (w[s] - most) * 1.44269504089f, kept = below < -LEAST ? -LEAST : below;
        w[s] = below < -LEAST ? 0.0f : exp2_negative(kept);
        total += w[s];
    }
    return total;
}

ALWAYS int stride_of(int dim) { return dim + MOST_GROUPS * LANES; }

/* Numbers of scratch that a thread of `kvc_decode` needs: logits, sums of values, and of the query its numbers, and two
 * limbs with scales and sums. (Of a head that several threads read, all of theirs are more than enough.) `kvc_step` needs
 * room for queries, outputs and the new token as well. */
int64_t kvc_room(int64_t capacity, int group, int dim) {
    return group * (1 + capacity + 3 * (int64_t)stride_of(dim) + 2 + 2 * MOST_GROUPS) + (2 * group + 3) * dim;
}

/* Attention of one head of one sequence by at most `threads` threads: `query` and `out` [group, dim]; `all` [group, 2]
 * or NULL is filled with the largest logit of a query, and what the exponentials of all logits less that add up to. */
static void decode_head(
    const float *query, const Stored *keys, const Stored *values, int64_t capacity, int type, int group, int64_t seen,
    int64_t window, float *out, float *all, float *scratch, int threads, int dim
) {
    const int stride = stride_of(dim), size = group * stride;
    const int64_t filled = seen < capacity ? seen : capacity;
    float *totals = scratch, *exact = totals + group, *scale = exact + size, *whole = scale + 2 * group;
    float *by_group = whole + size, *weights = by_group + 2 * group * MOST_GROUPS, *sums = weights + group * filled;
    Query asked = {exact, scale, (int16_t *)whole, (int32_t *)by_group, type == FLOAT32 ? 2 : 1, stride};
    memset(exact, 0, sizeof(float) * (2 * size + 2 * group));
    const int16_t *places = places_of(keys->codec, dim);
    for (int r = 0; r < group; r++)
        for (int i = 0; i < dim; i++) asked.exact[r * stride + places[i]] = query[r * dim + i];
    if (keys->codec != EXACT) quantise_query(&asked, group, keys->codec, dim);
    KeysOf *const by_keys = keys_for(keys->codec, dim);
    ValuesOf *const by_values = values_for(values->codec, dim);
    int parts = filled < 256 ? 1 : threads;
#pragma omp parallel num_threads(parts)
    {
        int part = 0, of = 1;
#ifdef _OPENMP
        part = omp_get_thread_num(), of = omp_get_num_threads();
#endif
        const int64_t from = filled * part / of, to = filled * (part + 1) / of;
        by_keys(&asked, keys, capacity, type, group, seen, window, filled, from, to, weights, dim);
#pragma omp barrier
        for (int r = part; r < group; r += of) {
            float largest;
            totals[r] = softmax(weights + r * filled, filled, &largest);
            if (all) all[2 * r] = largest, all[2 * r + 1] = totals[r];
        }
#pragma omp barrier
        by_values(values, type, group, filled, from, to, weights, sums + (int64_t)part * size, stride, asked.limbs,
                  dim);
#pragma omp single
        parts = of;
    }
    for (int part = 1; part < parts; part++)
        for (int j = 0; j < size; j++) sums[j] += sums[(int64_t)part * size + j];
    places = places_of(values->codec, dim);
    for (int r = 0; r < group; r++)
        for (int i = 0; i < dim; i++) out[r * dim + i] = sums[r * stride + places[i]] / totals[r];
}

typedef struct {
    const float *query;
    const Side *keys, *values;
    const int32_t *rows, *seen, *places;
    float *out, *all;
    int64_t window;
    int heads, type, group, dim;
} Decode;

static void decode_item(const void *work, int i, float *scratch, int threads) {
    const Decode *d = work;
    const int b = i / d->heads, h = i % d->heads;
    const int32_t *head = d->rows + h * FIELDS;
    const int64_t first = (int64_t)i * d->group;
    const Stored k = stored(d->keys, d->places[b], h, head + K_CODEC, d->type, d->dim);
    const Stored v = stored(d->values, d->places[b], h, head + V_CODEC, d->type, d->dim);
    decode_head(d->query + first * d->dim, &k, &v, head[CAPACITY], d->type, d->group, d->seen[b], d->window,
                d->out + first * d->dim, d->all ? d->all + first * 2 : 0, scratch, threads, d->dim);
}

/* Attention of one stored token a sequence: `query` [batch, heads * group, dim], scaled already, `out` of the same
 * shape and `all` [batch, heads * group, 2] or NULL, see `decode_head`; `seen` and `places` [batch] say how much is stored
 * and where; `scratch` has `room` numbers a thread, those of `kvc_room` for the largest capacity. */
void kvc_decode(
    const float *query, const Side *keys, const Side *values, const int32_t *rows, int heads, int type, int group,
    int batch, const int32_t *seen, const int32_t *places, int64_t window, float *out, float *all, float *scratch,
    int64_t room, int threads, int dim
) {
    const Decode work = {query, keys, values, rows, seen, places, out, all, window, heads, type, group, dim};
    each_item(decode_item, &work, batch, heads, scratch, room, threads);
}

/* The new token of one head of one sequence: `new_key` and `new_value` [dim], its score and the sequence's `scores`. */
static void append_head(
    const Stored *keys, const Stored *values, const int32_t *head, int type, const float *new_key,
    const float *new_value, float score, _Float16 *scores, int64_t seen, int dim
) {
    const int64_t capacity = head[CAPACITY], ring = capacity - head[RECENT];
    const int64_t slot = seen < capacity ? seen : ring + (seen - capacity) % head[RECENT];
    if (head[KIND] == SCORED) {
        _Float16 *held = scores + head[SCORE];
        if (seen >= capacity && ring > head[SINK]) {
            int64_t victim = head[SINK];
            float worst = (float)held[victim];
            for (int64_t s = victim + 1; s < ring; s++) {
                const float one = (float)held[s];
                if (one <= worst) worst = one, victim = s; /* of equal ones the lower slot stays */
            }
            if ((float)held[slot] > worst) {
                move_row(keys, slot, victim, type, dim);
                move_row(values, slot, victim, type, dim);
                held[victim] = held[slot];
            }
        }
        held[slot] = (_Float16)score;
    }
    write_row(new_key, keys, slot, type, dim);
    write_row(new_value, values, slot, type, dim);
}

/* One new token a sequence: `new_keys` and `new_values` [batch, heads, dim], `score` [batch, heads] and `scores`, of which
 * the next sequence's are `step` numbers further on (both NULL where no head is scored). */
void kvc_append(
    const Side *keys, const Side *values, const int32_t *rows, int heads, int type, int batch, const int32_t *seen,
    const int32_t *places, const float *new_keys, const float *new_values, const float *score, _Float16 *scores,
    int64_t step, int threads, int dim
) {
#pragma omp parallel for num_threads(threads) if (batch > 1)
    for (int i = 0; i < batch * heads; i++) {
        const int b = i / heads, h = i % heads;
        const int32_t *head = rows + h * FIELDS;
        if (head[KIND] == OTHER) continue;
        const Stored k = stored(keys, places[b], h, head + K_CODEC, type, dim);
        const Stored v = stored(values, places[b], h, head + V_CODEC, type, dim);
        append_head(&k, &v, head, type, new_keys + (int64_t)i * dim, new_values + (int64_t)i * dim,
                    score ? score[i] : 0.0f, scores ? scores + places[b] * step : 0, seen[b], dim);
    }
}

/* Vectors of new tokens, numbers of `type`: those of the next sequence and of the next head so many numbers further on. */
typedef struct {
    void *at;
    int64_t sequence, head;
} Vectors;

static void read_vectors(float *x, const Vectors *from, int b, int h, int count, int type, int dim) {
    for (int r = 0; r < count; r++)
        for (int i = 0; i < dim; i++)
            x[r * dim + i] = read_number(from->at, b * from->sequence + (h * count + r) * from->head + i, type);
}

/* All that a step does to a layer: the new token of every sequence is transformed and stored, its queries attend, and what
 * they find is restored. Numbers of `query`, `new_keys`, `new_values` and `out` are of type `type_in`, `score` [batch,
 * heads] f32; the other arguments are those of `kvc_append` and `kvc_decode`, `seen` without the new token. */
typedef struct {
    Vectors query, new_keys, new_values, out;
    const Side *keys, *values;
    Transform transform;
    const int32_t *rows, *seen, *places;
    const float *score;
    _Float16 *scores;
    float *scratch;
    int64_t step, window, room;
    float scaling;
    int heads, group, batch, type_in, type, threads, dim;
} Step;

static void step_item(const void *work, int i, float *room, int threads) {
    const Step *s = work;
    const int b = i / s->heads, h = i % s->heads, dim = s->dim, size = s->group * dim;
    const int32_t *head = s->rows + h * FIELDS;
    float *query = room, *out = query + size, *key = out + size, *value = key + dim, *spare = value + dim;
    const Stored k = stored(s->keys, s->places[b], h, head + K_CODEC, s->type, dim);
    const Stored v = stored(s->values, s->places[b], h, head + V_CODEC, s->type, dim);
    read_vectors(key, &s->new_keys, b, h, 1, s->type_in, dim);
    read_vectors(value, &s->new_values, b, h, 1, s->type_in, dim);
    read_vectors(query, &s->query, b, h, s->group, s->type_in, dim);
    transform(s->transform.key, s->transform.key_mean, h, key, spare, dim);
    transform(s->transform.value, s->transform.value_mean, h, value, spare, dim);
    append_head(&k, &v, head, s->type, key, value, s->score ? s->score[i] : 0.0f,
                s->scores ? s->scores + s->places[b] * s->step : 0, s->seen[b], dim);
    transform_queries(&s->transform, h, query, out, s->group, dim);
    for (int j = 0; j < size; j++) query[j] = out[j] * s->scaling;
    decode_head(query, &k, &v, head[CAPACITY], s->type, s->group, s->seen[b] + 1, s->window, out, 0, spare + dim,
                threads, dim);
    restore(&s->transform, h, out, query, s->group, dim);
    for (int r = 0; r < s->group; r++)
        for (int j = 0; j < dim; j++)
            write_number(s->out.at, b * s->out.sequence + (h * s->group + r) * s->out.head + j, s->type_in,
                         query[r * dim + j]);
}

void kvc_step(const Step *s) {
    each_item(step_item, s, s->batch, s->heads, s->scratch, s->room, s->threads);
}
