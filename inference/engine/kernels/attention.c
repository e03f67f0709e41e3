/* Attention over paged keys [block][kv_head][head_dim][BLOCK] and values [block][kv_head][BLOCK][head_dim]. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define QUERIES 4 /* tokens of an attention item, and questions asked of a key at once */
#define STACK_TOKENS 4096 /* contexts up to this length need no memory from the heap */

/* One head's question at one position, of several that look at the same keys. */
typedef struct {
    const float *q;
    float *weights, *out;
    long first, position; /* the context it sees, both included */
    float factor;
} Query;

/* Blocks lie anywhere, and the processor's own prefetcher does not look past the end of one. */
INLINE void fetch_ahead(const float *block, long dim) {
    for (long i = 0; i < dim; i++) __builtin_prefetch(block + i * BLOCK);
}

INLINE void block_scores(const int n, const Query *queries, const float *k, const Heads *h, long at) {
    vec s[QUERIES][4];
    long d = 0;
    for (int i = 0; i < n; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = (vec){0};
    for (; d + 4 <= h->head_dim; d += 4) {
        const vec *keys = (const vec *)(k + d * BLOCK);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++)
            for (int j = 0; j < 4; j++) s[i][j] += queries[i].q[d + j] * keys[j];
    }
    for (; d < h->head_dim; d++)
        for (int i = 0; i < n; i++) s[i][0] += queries[i].q[d] * *(const vec *)(k + d * BLOCK);
    for (int i = 0; i < n; i++)
        *(vec *)(queries[i].weights + at) = ((s[i][0] + s[i][1]) + (s[i][2] + s[i][3])) * h->scale;
}

/* out[d .. d + 16 * vectors) = sum over first .. last of weight * value; weights of what a query does not see are 0. */
INLINE void weigh(const int n, const int vectors, const Query *queries, const int *table, const Heads *h,
                  const float *values, long head, long first, long last, long d) {
    vec a[QUERIES][4];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < vectors; j++) a[i][j] = (vec){0};
    for (long b = first / BLOCK; b <= last / BLOCK; b++) {
        const float *v = values + ((long)table[b] * h->kv_heads + head) * BLOCK * h->head_dim + d;
        long from = b * BLOCK < first ? first : b * BLOCK, to = b * BLOCK + BLOCK <= last ? b * BLOCK + BLOCK : last + 1;
        if (d == 0 && b < last / BLOCK)
            fetch_ahead(values + ((long)table[b + 1] * h->kv_heads + head) * BLOCK * h->head_dim, h->head_dim);
        for (long t = from; t < to; t++) {
            const vec *value = (const vec *)(v + (t - b * BLOCK) * h->head_dim);
#pragma GCC unroll 4
            for (int i = 0; i < n; i++)
                for (int j = 0; j < vectors; j++) a[i][j] += queries[i].weights[t] * value[j];
        }
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < vectors; j++) *(vec *)(queries[i].out + d + 16 * j) = a[i][j] * queries[i].factor;
}

/* exp(weight - largest) in place over what the query sees of first .. last, 0 elsewhere, in whole vectors; their sum. */
static float softmax(const Query *q, long first, long last) {
    float *weights = q->weights;
    long start = first / BLOCK * BLOCK, end = last / BLOCK * BLOCK + BLOCK;
    for (long t = start; t < q->first; t++) weights[t] = -INFINITY;
    for (long t = q->position + 1; t < end; t++) weights[t] = -INFINITY;
    vec *w = (vec *)weights, tops = w[q->first / BLOCK], sums = {0};
    long b0 = q->first / BLOCK, b1 = q->position / BLOCK;
    for (long b = b0; b <= b1; b++) tops = pick(w[b] > tops, w[b], tops);
    float top = -INFINITY, sum = 0;
    for (int i = 0; i < BLOCK; i++) top = tops[i] > top ? tops[i] : top;
    for (long b = b0; b <= b1; b++) sums += w[b] = exp_fast(w[b] - top);
    for (int i = 0; i < BLOCK; i++) sum += sums[i];
    for (long t = start; t < q->first; t++) weights[t] = 0;
    for (long t = q->position + 1; t < end; t++) weights[t] = 0;
    return sum;
}

/* `n` queries over the same keys at once: each is read once. What a query gets does not depend on those beside it. */
INLINE void attend(const int n, Query *queries, const Heads *h, const float *keys, const float *values, const int *table,
                   long head) {
    long first = queries[0].first, last = queries[n - 1].position, d = 0; /* in the order of their positions */
    for (long b = first / BLOCK; b <= last / BLOCK; b++) {
        const float *k = keys + ((long)table[b] * h->kv_heads + head) * h->head_dim * BLOCK;
        if (b < last / BLOCK)
            fetch_ahead(keys + ((long)table[b + 1] * h->kv_heads + head) * h->head_dim * BLOCK, h->head_dim);
        block_scores(n, queries, k, h, b * BLOCK);
    }
    for (int i = 0; i < n; i++) {
        if (h->softcap > 0)
            for (long t = queries[i].first; t <= queries[i].position; t++)
                queries[i].weights[t] = tanhf(queries[i].weights[t] / h->softcap) * h->softcap;
        queries[i].factor = 1.0f / softmax(queries + i, first, last);
    }
    for (; d + 64 <= h->head_dim; d += 64) weigh(n, 4, queries, table, h, values, head, first, last, d);
    for (; d + 16 <= h->head_dim; d += 16) weigh(n, 1, queries, table, h, values, head, first, last, d);
    for (; d < h->head_dim; d++)
        for (int i = 0; i < n; i++) {
            float a = 0;
            for (long t = queries[i].first; t <= queries[i].position; t++)
                a += queries[i].weights[t] *
                     values[(((long)table[t / BLOCK] * h->kv_heads + head) * BLOCK + t % BLOCK) * h->head_dim + d];
            queries[i].out[d] = a * queries[i].factor;
        }
}

void store(const Heads *h, long slot, const float *k, long k_stride, const float *v, long v_stride, float *keys,
           float *values) {
    long block = slot / BLOCK, offset = slot % BLOCK;
    for (long head = 0; head < h->kv_heads; head++) {
        float *to = keys + (block * h->kv_heads + head) * h->head_dim * BLOCK + offset;
        for (long d = 0; d < h->head_dim; d++) to[d * BLOCK] = k[head * k_stride + d];
        memcpy(values + ((block * h->kv_heads + head) * BLOCK + offset) * h->head_dim, v + head * v_stride,
               h->head_dim * sizeof(float));
    }
}

static void store_token(const void *arg, long t) {
    const AttentionJob *job = arg;
    const long *s = job->strides;
    store(job->h, job->b->slots[t], job->k + t * s[2], s[3], job->v + t * s[4], s[5], job->keys, job->values);
}

/* The heads that share a key head, for tokens start .. end of one part. */
static void attend_run(const AttentionJob *job, long head, long start, long end, float *weights, long room) {
    const Heads *h = job->h;
    const Batch *b = job->b;
    const int *table = b->block_tables + b->part_of[start] * b->table_width;
    long group = h->heads / h->kv_heads, count = (end - start) * group;
    for (long at = 0; at < count; at += QUERIES) {
        int n = count - at < QUERIES ? (int)(count - at) : QUERIES;
        Query queries[QUERIES];
        for (int i = 0; i < n; i++) {
            long t = start + (at + i) / group, own = head * group + (at + i) % group, position = b->positions[t];
            long first = h->window && position >= h->window ? position - h->window + 1 : 0;
            queries[i] = (Query){job->q + t * job->strides[0] + own * job->strides[1], weights + i * room,
                                 job->out + (t * h->heads + own) * h->head_dim, first, position, 0};
        }
        switch (n) {
            case 1: attend(1, queries, h, job->keys, job->values, table, head); break;
            case 2: attend(2, queries, h, job->keys, job->values, table, head); break;
            case 3: attend(3, queries, h, job->keys, job->values, table, head); break;
            default: attend(4, queries, h, job->keys, job->values, table, head);
        }
    }
}

/* One key head for QUERIES tokens, those of each part together. */
static void attend_item(const void *arg, long item) {
    const AttentionJob *job = arg;
    const Batch *b = job->b;
    long head = item % job->h->kv_heads, start = item / job->h->kv_heads * QUERIES;
    long end = start + QUERIES < b->num_tokens ? start + QUERIES : b->num_tokens, longest = 0;
    for (long t = start; t < end; t++) longest = b->positions[t] > longest ? b->positions[t] : longest;
    long room = longest / BLOCK * BLOCK + BLOCK;
    float on_stack[QUERIES * STACK_TOKENS], *weights = on_stack;
    if (room > STACK_TOKENS) weights = malloc(QUERIES * room * sizeof(float));
    for (long next = start; start < end; start = next) {
        while (next < end && b->part_of[next] == b->part_of[start]) next++;
        attend_run(job, head, start, next, weights, room);
    }
    if (weights != on_stack) free(weights);
}

void attend_all(const AttentionJob *job) {
    const Heads *h = job->h;
    long group = h->heads / h->kv_heads, keys = 0, each = 2 * h->kv_heads * h->head_dim;
    for (long t = 0; t < job->b->num_tokens; t++) keys += job->b->positions[t] + 1;
    long work = keys * each * (group > WEIGHT_ROWS ? group : WEIGHT_ROWS);
    run(attend_item, job, (job->b->num_tokens + QUERIES - 1) / QUERIES * h->kv_heads, work);
}

/* One layer's attention for any architecture. */
void paged_attention(const Heads *h, const Batch *b, const float *q, const float *k, const float *v, const long *strides,
                     float *keys, float *values, float *out) {
    AttentionJob job = {h, b, q, k, v, strides, keys, values, out};
    run(store_token, &job, b->num_tokens, b->num_tokens * h->kv_heads * h->head_dim * WEIGHT_ROWS);
    attend_all(&job);
}
