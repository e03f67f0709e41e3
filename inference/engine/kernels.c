/* Kernels of the CPU path, in float32: linear layers over packed weights, attention over paged keys and values, and a
 * whole forward pass of the Llama family made of them. Plain C with GNU vectors; compiled for this machine at first use.
 *
 * A row's result does not depend on the rows beside it: sums run over the inner dimension in one order whatever the batch,
 * so that a request gets the same tokens in any batch. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16  /* tokens per KV block: one vector of scores */
#define PANEL 32  /* outputs per packed panel: two vectors */
#define ROWS 12   /* rows per tile: 24 accumulators, which AVX-512 has registers for */
#define CHUNK 192 /* rows whose inputs stay in the second-level cache while all panels pass */

typedef float vec __attribute__((vector_size(64), aligned(4)));
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *weight; /* [ceil(outputs / PANEL)][inputs][PANEL] */
    const float *bias;   /* [outputs] or NULL */
    long inputs, outputs;
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

/* exp, to 2 units in the last place (Cephes' polynomial); NaN stays NaN. */
INLINE float exp_fast(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    float n = floorf(x * 1.44269504088896341f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int i; float f; } power = {((int)n + 127) << 23};
    return p * power.f;
}

/* ---- linear: out[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n]) (+ out[m][n] where `add`) ---- */

INLINE void tile(const int rows, const float *x, long x_stride, const float *w, const Linear *l, long first, int add,
                 float *out, long out_stride) {
    vec a[ROWS][2];
    for (int r = 0; r < rows; r++) a[r][0] = a[r][1] = (vec){0};
    for (long k = 0; k < l->inputs; k++) {
        vec w0 = *(const vec *)(w + k * PANEL), w1 = *(const vec *)(w + k * PANEL + 16);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            float b = x[r * x_stride + k];
            a[r][0] += b * w0;
            a[r][1] += b * w1;
        }
    }
    long columns = l->outputs - first < PANEL ? l->outputs - first : PANEL;
    for (int r = 0; r < rows; r++) {
        float result[PANEL], *to = out + r * out_stride + first;
        *(vec *)result = a[r][0];
        *(vec *)(result + 16) = a[r][1];
        for (long n = 0; n < columns; n++)
            to[n] = result[n] + (l->bias ? l->bias[first + n] : 0.0f) + (add ? to[n] : 0.0f);
    }
}

static void panel(const Linear *l, long index, const float *x, long x_stride, long rows, int add, float *out, long out_stride) {
    const float *w = l->weight + index * l->inputs * PANEL;
    long first = index * PANEL;
    while (rows > 0) {
        /* 16 rows as 8 + 8 rather than 12 + 4: both halves then run at full speed */
        long take = rows > ROWS ? (rows < 2 * ROWS ? (rows + 1) / 2 : ROWS) : rows;
        switch (take) {
#define CASE(R) case R: tile(R, x, x_stride, w, l, first, add, out, out_stride); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
        x += take * x_stride;
        out += take * out_stride;
        rows -= take;
    }
}

/* Called by all threads of a parallel region. */
static void linear_shared(const Linear *l, const float *x, long rows, int add, float *out) {
    long panels = (l->outputs + PANEL - 1) / PANEL;
    for (long at = 0; at < rows; at += CHUNK) {
        long count = rows - at < CHUNK ? rows - at : CHUNK;
#pragma omp for schedule(static)
        for (long p = 0; p < panels; p++)
            panel(l, p, x + at * l->inputs, l->inputs, count, add, out + at * l->outputs, l->outputs);
    }
}

void linear(const Linear *l, const float *x, long rows, float *out) {
#pragma omp parallel
    linear_shared(l, x, rows, 0, out);
}

void pack(const float *weight, long outputs, long inputs, float *packed) {
    long panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (long p = 0; p < panels; p++)
        for (long k = 0; k < inputs; k++)
            for (long n = 0; n < PANEL; n++) {
                long row = p * PANEL + n;
                packed[(p * inputs + k) * PANEL + n] = row < outputs ? weight[row * inputs + k] : 0.0f;
            }
}

/* ---- attention: keys [block][kv_head][head_dim][BLOCK], values [block][kv_head][BLOCK][head_dim] ---- */

INLINE vec block_scores(const float *q, const float *k, long dim) {
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    long d = 0;
    for (; d + 4 <= dim; d += 4) {
        s0 += q[d] * *(const vec *)(k + d * BLOCK);
        s1 += q[d + 1] * *(const vec *)(k + (d + 1) * BLOCK);
        s2 += q[d + 2] * *(const vec *)(k + (d + 2) * BLOCK);
        s3 += q[d + 3] * *(const vec *)(k + (d + 3) * BLOCK);
    }
    for (; d < dim; d++) s0 += q[d] * *(const vec *)(k + d * BLOCK);
    return (s0 + s1) + (s2 + s3);
}

/* out[0 .. 16 * vectors) = sum over the positions of weight * value */
INLINE void weigh(const int vectors, const float *weights, const int *table, const Heads *h, const float *values, long head,
                  long first, long last, float factor, float *out) {
    vec a[4];
    for (int i = 0; i < vectors; i++) a[i] = (vec){0};
    for (long t = first; t <= last; t++) {
        const float *v = values + (((long)table[t / BLOCK] * h->kv_heads + head) * BLOCK + t % BLOCK) * h->head_dim;
        for (int i = 0; i < vectors; i++) a[i] += weights[t] * *(const vec *)(v + 16 * i);
    }
    for (int i = 0; i < vectors; i++) *(vec *)(out + 16 * i) = a[i] * factor;
}

static void attend(const Heads *h, const float *q, const float *keys, const float *values, const int *table, long head,
                   long position, float *weights, float *out) {
    long first = h->window && position >= h->window ? position - h->window + 1 : 0;
    for (long b = first / BLOCK; b <= position / BLOCK; b++) {
        const float *k = keys + ((long)table[b] * h->kv_heads + head) * h->head_dim * BLOCK;
        *(vec *)(weights + b * BLOCK) = block_scores(q, k, h->head_dim) * h->scale;
    }
    if (h->softcap > 0)
        for (long t = first; t <= position; t++) weights[t] = tanhf(weights[t] / h->softcap) * h->softcap;
    float top = weights[first], sum = 0;
#pragma omp simd reduction(max : top)
    for (long t = first; t <= position; t++) top = weights[t] > top ? weights[t] : top;
#pragma omp simd reduction(+ : sum)
    for (long t = first; t <= position; t++) sum += weights[t] = exp_fast(weights[t] - top);
    float factor = 1.0f / sum;
    long d = 0;
    for (; d + 64 <= h->head_dim; d += 64) weigh(4, weights, table, h, values + d, head, first, position, factor, out + d);
    for (; d + 16 <= h->head_dim; d += 16) weigh(1, weights, table, h, values + d, head, first, position, factor, out + d);
    for (; d < h->head_dim; d++) {
        float a = 0;
        for (long t = first; t <= position; t++)
            a += weights[t] * values[(((long)table[t / BLOCK] * h->kv_heads + head) * BLOCK + t % BLOCK) * h->head_dim + d];
        out[d] = a * factor;
    }
}

static void store(const Heads *h, long slot, const float *k, long k_stride, const float *v, long v_stride, float *keys,
                  float *values) {
    long block = slot / BLOCK, offset = slot % BLOCK;
    for (long head = 0; head < h->kv_heads; head++) {
        float *to = keys + (block * h->kv_heads + head) * h->head_dim * BLOCK + offset;
        for (long d = 0; d < h->head_dim; d++) to[d * BLOCK] = k[head * k_stride + d];
        memcpy(values + ((block * h->kv_heads + head) * BLOCK + offset) * h->head_dim, v + head * v_stride,
               h->head_dim * sizeof(float));
    }
}

/* Called by all threads; the keys and values of the step are stored. q [token][head][head_dim], strides in floats. */
static void attention_shared(const Heads *h, const Batch *b, const float *q, long token_stride, long head_stride,
                             const float *keys, const float *values, float *out) {
    long group = h->heads / h->kv_heads, longest = b->table_width * BLOCK;
    float *weights = malloc(longest * sizeof(float));
#pragma omp for schedule(dynamic, 4)
    for (long item = 0; item < b->num_tokens * h->kv_heads; item++) {
        long t = item / h->kv_heads, head = item % h->kv_heads;
        const int *table = b->block_tables + b->part_of[t] * b->table_width;
        for (long i = head * group; i < (head + 1) * group; i++)
            attend(h, q + t * token_stride + i * head_stride, keys, values, table, head, b->positions[t], weights,
                   out + (t * h->heads + i) * h->head_dim);
    }
    free(weights);
}

/* One layer's attention for any architecture. strides: token and head of q, k, v, in floats. */
void paged_attention(const Heads *h, const Batch *b, const float *q, const float *k, const float *v, const long *strides,
                     float *keys, float *values, float *out) {
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long t = 0; t < b->num_tokens; t++)
            store(h, b->slots[t], k + t * strides[2], strides[3], v + t * strides[4], strides[5], keys, values);
        attention_shared(h, b, q, strides[0], strides[1], keys, values, out);
    }
}

/* ---- the Llama family ---- */

typedef struct {
    const float *input_norm, *post_norm;
    const float *q_norm, *k_norm; /* [head_dim], Qwen3; or NULL */
    Linear qkv, output, gate_up, down;
    Heads heads;
    float *keys, *values;
} Layer;

typedef struct {
    long num_layers, hidden;
    float eps;
    const Layer *layers;
    const float *embedding;   /* [vocab][hidden] */
    const float *cos, *sin;   /* [position][head_dim] */
    const float *norm;
    Linear lm_head;
} Model;

static void rms_norm(const float *x, const float *weight, long n, float eps, float *out) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    float factor = 1.0f / sqrtf(sum / n + eps);
#pragma omp simd
    for (long i = 0; i < n; i++) out[i] = weight[i] * (x[i] * factor);
}

static void rotate(float *x, const float *cos, const float *sin, long dim) {
    long half = dim / 2;
#pragma omp simd
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

static void place(const Model *m, const Layer *l, const Batch *b, long t, float *qkv) {
    const Heads *h = &l->heads;
    long position = b->positions[t], dim = h->head_dim;
    float *k = qkv + h->heads * dim;
    for (long i = 0; i < h->heads + h->kv_heads; i++) {
        const float *norm = i < h->heads ? l->q_norm : l->k_norm;
        if (norm) rms_norm(qkv + i * dim, norm, dim, m->eps, qkv + i * dim);
        rotate(qkv + i * dim, m->cos + position * dim, m->sin + position * dim, dim);
    }
    store(h, b->slots[t], k, dim, k + h->kv_heads * dim, dim, l->keys, l->values);
}

static void activate(float *gate_up, long n, float *out) {
    const float *up = gate_up + n;
#pragma omp simd
    for (long i = 0; i < n; i++) out[i] = gate_up[i] / (1.0f + exp_fast(-gate_up[i])) * up[i];
}

static void layer_shared(const Model *m, const Layer *l, const Batch *b, float *x, float *normed, float *wide, float *inner) {
    long tokens = b->num_tokens, hidden = m->hidden, dim = l->heads.head_dim;
#pragma omp for schedule(static)
    for (long t = 0; t < tokens; t++) rms_norm(x + t * hidden, l->input_norm, hidden, m->eps, normed + t * hidden);
    linear_shared(&l->qkv, normed, tokens, 0, wide);
#pragma omp for schedule(static)
    for (long t = 0; t < tokens; t++) place(m, l, b, t, wide + t * l->qkv.outputs);
    attention_shared(&l->heads, b, wide, l->qkv.outputs, dim, l->keys, l->values, inner);
    linear_shared(&l->output, inner, tokens, 1, x);
#pragma omp for schedule(static)
    for (long t = 0; t < tokens; t++) rms_norm(x + t * hidden, l->post_norm, hidden, m->eps, normed + t * hidden);
    linear_shared(&l->gate_up, normed, tokens, 0, wide);
#pragma omp for schedule(static)
    for (long t = 0; t < tokens; t++) activate(wide + t * l->gate_up.outputs, l->down.inputs, inner + t * l->down.inputs);
    linear_shared(&l->down, inner, tokens, 1, x);
}

/* Logits [num_rows][vocab] of the rows asked for. Scratch: x, normed [tokens][hidden]; wide [tokens][widest qkv or gate_up];
 * inner [tokens][widest attention or MLP]. */
void llama_forward(const Model *m, const Batch *b, float *x, float *normed, float *wide, float *inner, float *logits) {
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long t = 0; t < b->num_tokens; t++)
            memcpy(x + t * m->hidden, m->embedding + b->token_ids[t] * m->hidden, m->hidden * sizeof(float));
        for (long i = 0; i < m->num_layers; i++) layer_shared(m, m->layers + i, b, x, normed, wide, inner);
#pragma omp for schedule(static)
        for (long r = 0; r < b->num_rows; r++)
            rms_norm(x + b->rows[r] * m->hidden, m->norm, m->hidden, m->eps, normed + r * m->hidden);
        linear_shared(&m->lm_head, normed, b->num_rows, 0, logits);
    }
}
