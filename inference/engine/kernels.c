/* Kernels of the CPU path, in float32: linear layers over packed weights, attention over paged keys and values, and a
 * whole forward pass of the Llama family made of them. Plain C with GNU vectors; compiled for this machine at first use.
 *
 * A row's result does not depend on the rows beside it: sums run over the inner dimension in one order whatever the batch,
 * so that a request gets the same tokens in any batch. */

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_num_threads() 1
#define omp_get_max_threads() 1
#endif

#define BLOCK 16  /* tokens per KV block: one vector of scores */
#define PANEL 32  /* outputs per packed panel: two vectors */
#define ROWS 12   /* rows per tile: 24 accumulators, which AVX-512 has registers for */
#define SPINS 2000 /* looks at a gate before a thread lets others have its core */
#define MAX_SHARDS 64
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
    long first_token;   /* number of the first token within the whole batch, which `rows` count in */
} Batch;

typedef struct {
    long heads, kv_heads, head_dim, window; /* window 0: none */
    float scale, softcap;                   /* softcap 0: none */
} Heads;

/* Where the threads of a forward pass meet between operations. Unlike OpenMP's barrier it gives way soon: this process
 * shares its cores with others, and who waits by spinning holds up the very thread it waits for. */
typedef struct {
    int arrived, phase;
} Gate;

static void meet(Gate *gate) {
    int threads = omp_get_num_threads();
    if (threads == 1) return;
    int phase = __atomic_load_n(&gate->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&gate->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&gate->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&gate->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&gate->phase, __ATOMIC_ACQUIRE) == phase; spins++)
        if (spins > SPINS) sched_yield();
}

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

/* Called by all threads of a parallel region, as is everything named `_shared`; they meet at its end. */
static void linear_shared(const Linear *l, const float *x, long rows, int add, float *out, Gate *gate) {
    long panels = (l->outputs + PANEL - 1) / PANEL;
    for (long at = 0; at < rows; at += CHUNK) {
        long count = rows - at < CHUNK ? rows - at : CHUNK;
#pragma omp for schedule(static) nowait
        for (long p = 0; p < panels; p++)
            panel(l, p, x + at * l->inputs, l->inputs, count, add, out + at * l->outputs, l->outputs);
    }
    meet(gate);
}

void linear(const Linear *l, const float *x, long rows, float *out) {
    Gate gate = {0, 0};
#pragma omp parallel
    linear_shared(l, x, rows, 0, out, &gate);
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

/* The keys and values of the step are stored already. q [token][head][head_dim], strides in floats. */
static void attention_shared(const Heads *h, const Batch *b, const float *q, long token_stride, long head_stride,
                             const float *keys, const float *values, float *out, Gate *gate) {
    long group = h->heads / h->kv_heads, longest = b->table_width * BLOCK;
    float *weights = malloc(longest * sizeof(float));
#pragma omp for schedule(dynamic, 4) nowait
    for (long item = 0; item < b->num_tokens * h->kv_heads; item++) {
        long t = item / h->kv_heads, head = item % h->kv_heads;
        const int *table = b->block_tables + b->part_of[t] * b->table_width;
        for (long i = head * group; i < (head + 1) * group; i++)
            attend(h, q + t * token_stride + i * head_stride, keys, values, table, head, b->positions[t], weights,
                   out + (t * h->heads + i) * h->head_dim);
    }
    free(weights);
    meet(gate);
}

/* One layer's attention for any architecture. strides: token and head of q, k, v, in floats. */
void paged_attention(const Heads *h, const Batch *b, const float *q, const float *k, const float *v, const long *strides,
                     float *keys, float *values, float *out) {
    Gate gate = {0, 0};
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (long t = 0; t < b->num_tokens; t++)
            store(h, b->slots[t], k + t * strides[2], strides[3], v + t * strides[4], strides[5], keys, values);
        meet(&gate);
        attention_shared(h, b, q, strides[0], strides[1], keys, values, out, &gate);
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

/* Scratch of a forward pass, and where its logits go. */
typedef struct {
    float *x, *normed; /* [tokens][hidden] */
    float *wide;       /* [tokens][wide_width], qkv or gate_up */
    float *inner;      /* [tokens][inner_width], attention's or the MLP's */
    float *logits;     /* [num_rows][vocab] */
    long wide_width, inner_width;
} Space;

static void layer_shared(const Model *m, const Layer *l, const Batch *b, const Space *s, Gate *gate) {
    long tokens = b->num_tokens, hidden = m->hidden, wide = l->gate_up.outputs, inner = l->down.inputs;
#pragma omp for schedule(static) nowait
    for (long t = 0; t < tokens; t++) rms_norm(s->x + t * hidden, l->input_norm, hidden, m->eps, s->normed + t * hidden);
    meet(gate);
    linear_shared(&l->qkv, s->normed, tokens, 0, s->wide, gate);
#pragma omp for schedule(static) nowait
    for (long t = 0; t < tokens; t++) place(m, l, b, t, s->wide + t * l->qkv.outputs);
    meet(gate);
    attention_shared(&l->heads, b, s->wide, l->qkv.outputs, l->heads.head_dim, l->keys, l->values, s->inner, gate);
    linear_shared(&l->output, s->inner, tokens, 1, s->x, gate);
#pragma omp for schedule(static) nowait
    for (long t = 0; t < tokens; t++) rms_norm(s->x + t * hidden, l->post_norm, hidden, m->eps, s->normed + t * hidden);
    meet(gate);
    linear_shared(&l->gate_up, s->normed, tokens, 0, s->wide, gate);
#pragma omp for schedule(static) nowait
    for (long t = 0; t < tokens; t++) activate(s->wide + t * wide, inner, s->inner + t * inner);
    meet(gate);
    linear_shared(&l->down, s->inner, tokens, 1, s->x, gate);
}

static void forward_shared(const Model *m, const Batch *b, const Space *s, Gate *gate) {
#pragma omp for schedule(static) nowait
    for (long t = 0; t < b->num_tokens; t++)
        memcpy(s->x + t * m->hidden, m->embedding + b->token_ids[t] * m->hidden, m->hidden * sizeof(float));
    meet(gate);
    for (long i = 0; i < m->num_layers; i++) layer_shared(m, m->layers + i, b, s, gate);
#pragma omp for schedule(static) nowait
    for (long r = 0; r < b->num_rows; r++)
        rms_norm(s->x + (b->rows[r] - b->first_token) * m->hidden, m->norm, m->hidden, m->eps, s->normed + r * m->hidden);
    meet(gate);
    linear_shared(&m->lm_head, s->normed, b->num_rows, 0, s->logits, gate);
}

/* The part of a batch, and of its space, that begins at sequence `first` and ends before `last`. */
static void take_shard(const Model *m, const Batch *b, const Space *s, long first, long last, Batch *shard, Space *space) {
    long from = b->query_starts[first], row = 0, end = 0;
    while (row < b->num_rows && b->rows[row] < from) row++;
    for (end = row; end < b->num_rows && b->rows[end] < b->query_starts[last];) end++;
    *shard = *b;
    shard->num_tokens = b->query_starts[last] - from;
    shard->num_rows = end - row;
    shard->first_token = from;
    shard->token_ids += from;
    shard->positions += from;
    shard->slots += from;
    shard->part_of += from;
    shard->rows += row;
    *space = *s;
    space->x += from * m->hidden;
    space->normed += from * m->hidden;
    space->wide += from * s->wide_width;
    space->inner += from * s->inner_width;
    space->logits += row * m->lm_head.outputs;
}

/* Split the sequences into runs of about as many tokens; answers the tokens of the largest. */
static long split(const Batch *b, int shards, long *starts) {
    long part = 0, largest = 0;
    for (int i = 0; i < shards; i++) {
        starts[i] = part;
        while (part < b->num_parts && b->query_starts[part] < b->num_tokens * (i + 1) / shards) part++;
        long tokens = b->query_starts[part] - b->query_starts[starts[i]];
        largest = tokens > largest ? tokens : largest;
    }
    starts[shards] = b->num_parts;
    return largest;
}

/* Logits [num_rows][vocab] of the rows asked for. Where the weights stay in the cache (`small`), each thread takes some
 * of the sequences through all layers by itself and none waits for another; otherwise, and where one long prefill chunk
 * would keep a single thread busy, the threads share every operation and each weight is read once. */
void llama_forward(const Model *m, const Batch *b, const Space *s, int small) {
    long starts[MAX_SHARDS + 1];
    int threads = omp_get_max_threads() < MAX_SHARDS ? omp_get_max_threads() : MAX_SHARDS;
    int alone = small && (b->num_tokens <= 4 || split(b, threads, starts) * threads * 2 <= b->num_tokens * 3);
    if (alone && b->num_tokens > 4) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int i = 0; i < threads; i++) {
            Gate gate = {0, 0};
            Batch shard;
            Space space;
            take_shard(m, b, s, starts[i], starts[i + 1], &shard, &space);
            if (shard.num_tokens)
#pragma omp parallel num_threads(1)
                forward_shared(m, &shard, &space, &gate);
        }
        return;
    }
    Gate gate = {0, 0};
#pragma omp parallel num_threads(alone ? 1 : threads)
    forward_shared(m, b, s, &gate);
}
