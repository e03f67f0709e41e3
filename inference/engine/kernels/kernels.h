/* What the kernels of the CPU path share. Plain C with GNU vectors; compiled for this very processor, so that what it has
 * is known here. Arithmetic is float32, but for layers of kind TILES.
 *
 * A row's result does not depend on the rows beside it: sums run over the inner dimension in one order whatever the batch,
 * so that a request gets the same tokens in any batch. */

#ifndef PENSTOCK_KERNELS_H
#define PENSTOCK_KERNELS_H

#include <stddef.h>

#define BLOCK 16       /* tokens per KV block: one vector of scores */
#define PANEL 32       /* outputs per packed panel: two vectors */
#define WEIGHT_ROWS 12 /* multiply-adds in the time that one weight takes from memory */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int ints __attribute__((vector_size(64), aligned(4)));

INLINE vec pick(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }

/* exp, to 2 units in the last place (Cephes' polynomial); NaN stays NaN. Sixteen at once: compilers leave a loop over
 * single ones as it is. */
INLINE vec exp_fast(vec x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: a sum with it is rounded to a whole number, in its last bits */
    x = pick(x < -87.3f, (vec){0} - 87.3f, x);
    x = pick(x > 88.3f, (vec){0} + 88.3f, x);
    vec shifted = x * 1.44269504088896341f + shift, n = shifted - shift;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vec)((ints)p + (((ints)shifted - 0x4b400000) << 23));
}

/* How a layer's weights are kept. */
enum {
    FLOATS, /* float32: [panel][input][PANEL] */
    HALVES, /* bfloat16, widened as they are used: [panel][input][16][outputs n, n + 16] */
    BYTES,  /* int8 with a scale for each output: [panel][input / 2][16][2 inputs][n, n + 16] */
    TILES   /* bfloat16 for AMX, inputs rounded to bfloat16 too: [panel][input / 32][2][16 pairs of inputs][16][2] */
};

typedef struct {
    const void *weight;
    const float *scale; /* [outputs rounded up to PANEL], 2^-24 of what it is; BYTES only */
    const float *bias;  /* [outputs] or NULL */
    long inputs, outputs, kind;
} Linear;

typedef struct {
    long num_tokens, num_parts, table_width, num_rows;
    const long *token_ids, *positions, *slots, *rows;
    const int *query_starts, *context_lens, *block_tables;
    const int *part_of; /* [num_tokens] */
} Batch;

typedef struct {
    long heads, kv_heads, head_dim, window; /* window 0: none */
    float scale, softcap;                   /* softcap 0: none */
} Heads;

/* pool.c */
typedef void (*Task)(const void *arg, long item);
void run(Task task, const void *arg, long count, long work);
int num_helpers(void);

/* linear.c, tiles.c: out[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n]) (+ out[m][n] where `add`) */
void apply(const Linear *l, const float *x, long rows, int add, float *out);
void apply_tiles(const Linear *l, const float *x, long rows, int add, float *out);
float *scratch(long size); /* of this thread, until the next call */

/* attention.c: keys [block][kv_head][head_dim][BLOCK], values [block][kv_head][BLOCK][head_dim] */
typedef struct {
    const Heads *h;
    const Batch *b;
    const float *q, *k, *v;
    const long *strides; /* token and head of q, k, v, in floats */
    float *keys, *values, *out;
} AttentionJob;

void store(const Heads *h, long slot, const float *k, long k_stride, const float *v, long v_stride, float *keys,
           float *values);
void attend_all(const AttentionJob *job);

#endif
