/* The heads of a batch, dealt out to threads. */

/* Does something to item `i` of `work`, with at most `threads` threads and `scratch` memory. */
typedef void Item(const void *work, int i, float *scratch, int threads);

/* All items of a batch: those of few sequences one after the other, each by all threads, those of many side by side, each
 * by one. A region around the first would make those of `decode_head` nested, whose threads are started anew each time;
 * `scratch` has `room` numbers a thread. */
static void each_item(Item *item, const void *work, int batch, int heads, float *scratch, int64_t room, int threads) {
    const int items = batch * heads;
    if (items < threads || batch == 1) {
        for (int i = 0; i < items; i++) item(work, i, scratch, threads);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int i = 0; i < items; i++) {
        float *mine = scratch;
#ifdef _OPENMP
        mine += omp_get_thread_num() * room;
#endif
        item(work, i, mine, 1);
    }
}
