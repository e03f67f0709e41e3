/* Kernels of the CPU path, in float32: linear layers over packed weights, attention over paged keys and values, and a
 * whole forward pass of the Llama family made of them. Plain C with GNU vectors; compiled for this machine at first use.
 *
 * A row's result does not depend on the rows beside it: sums run over the inner dimension in one order whatever the batch,
 * so that a request gets the same tokens in any batch. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16  /* tokens per KV block: one vector of scores */
#define PANEL 32  /* outputs per packed panel: two vectors */
#ifdef __AVX512F__
#define ROWS 12 /* rows per tile of two vectors: 24 sums, which AVX-512 has registers for */
#else
#define ROWS 3 /* 12 sums of half a vector with AVX2 */
#endif
#define SPINS 600 /* looks at a shared word before a thread gives up its core: some 30 us */
#define ENOUGH (2L << 20) /* multiply-adds worth a second thread, some 25 us */
#define WEIGHT_ROWS 12 /* multiply-adds in the time that one weight takes from memory */
#define MAX_HELPERS 255
#define QUERIES 4 /* tokens of an attention item, and questions asked of a key at once */
#define STACK_TOKENS 4096 /* contexts up to this length need no memory from the heap */
#define CHUNK_FLOATS (192 * 1024) /* inputs of the rows that stay in the second-level cache while all panels pass */

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

/* ---- threads ----
 * The calling thread runs an operation's items together with helpers that take items as they come. It waits for items that
 * were taken, never for a helper to come round: this process shares its cores with others, and OpenMP's barriers, which do
 * wait for every thread and spin meanwhile, made steps ten times longer where cores were short. Idle helpers sleep. */

typedef void (*Task)(const void *arg, long item);

static struct {
    unsigned long state; /* number of the operation << 32 | next item; CLOSED while an operation is being changed */
    Task task;
    const void *arg;
    unsigned long count, done;
    int busy, limit, helpers, sleeping;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#define CLOSED 0xffffffffUL
#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define STORE(x, v) __atomic_store_n(&(x), v, __ATOMIC_SEQ_CST)
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() __asm__ volatile("" ::: "memory")
#endif

/* Take and run one item; 0 where there is none. What is read of an operation is its own if the exchange succeeds: it is
 * closed, which changes the state, before it is changed. */
static int take_item(void) {
    unsigned long state = LOAD(pool.state), item = state & CLOSED;
    Task task = LOAD(pool.task);
    const void *arg = LOAD(pool.arg);
    if (item >= LOAD(pool.count)) return 0;
    if (__atomic_compare_exchange_n(&pool.state, &state, state + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        task(arg, (long)item);
        __atomic_add_fetch(&pool.done, 1, __ATOMIC_SEQ_CST);
    }
    return 1;
}

static void *help(void *rank) {
    for (;;) {
        for (int spins = 0; spins < SPINS; spins++) {
            if ((long)rank < LOAD(pool.limit) && take_item()) spins = 0;
            PAUSE();
        }
        pthread_mutex_lock(&pool.lock);
        __atomic_add_fetch(&pool.sleeping, 1, __ATOMIC_SEQ_CST);
        while ((long)rank >= LOAD(pool.limit) || (LOAD(pool.state) & CLOSED) >= LOAD(pool.count))
            pthread_cond_wait(&pool.wake, &pool.lock);
        __atomic_add_fetch(&pool.sleeping, -1, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

static void forget_helpers(void) { /* a forked child has none */
    pool.helpers = pool.sleeping = pool.busy = 0;
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

/* How many threads run an operation, the caller among them. */
void set_threads(int threads) {
    static int registered;
    if (!registered++) pthread_atfork(NULL, NULL, forget_helpers);
    int limit = threads - 1 < MAX_HELPERS ? threads - 1 : MAX_HELPERS;
    for (pthread_t thread; pool.helpers < limit; pool.helpers++) {
        if (pthread_create(&thread, NULL, help, (void *)(long)pool.helpers)) break;
        pthread_detach(thread);
    }
    STORE(pool.limit, limit);
}

/* task(arg, i) for every i below count, in any order; `work` in multiply-adds says whether helpers are called at all.
 * A second caller at the same time runs its own items by itself. */
static void run(Task task, const void *arg, long count, long work) {
    if (count < 2 || work < ENOUGH || !LOAD(pool.limit) || __atomic_exchange_n(&pool.busy, 1, __ATOMIC_SEQ_CST)) {
        for (long i = 0; i < count; i++) task(arg, i);
        return;
    }
    unsigned long next = ((LOAD(pool.state) >> 32) + 1) << 32;
    STORE(pool.state, next | CLOSED);
    STORE(pool.task, task);
    STORE(pool.arg, arg);
    STORE(pool.done, 0);
    STORE(pool.count, (unsigned long)count);
    STORE(pool.state, next);
    if (LOAD(pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    while (take_item()) {}
    for (int spins = 0; LOAD(pool.done) < (unsigned long)count; spins++)
        if (spins > SPINS) sched_yield();
        else PAUSE();
    STORE(pool.busy, 0);
}

typedef int ints __attribute__((vector_size(64)));

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

/* ---- linear: out[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n]) (+ out[m][n] where `add`) ---- */

typedef struct {
    const Linear *l;
    const float *x; /* by tile: [inputs][rows of the tile] */
    float *out;
    long rows, tiles, panels_per_item;
    int add;
} LinearJob;

/* Tile t of an even split of `rows` begins here: 16 rows are 8 and 8, not 12 and 4. */
INLINE long tile_start(long rows, long tiles, long t) { return rows * t / tiles; }

/* One tile: `rows` rows by a panel of outputs; the sums stay in registers. Meanwhile `lines` cache lines an input of the
 * next panel are fetched from `next` on, so that no panel waits for memory. */
INLINE void tile(const int rows, const int lines, const Linear *l, const float *x, const float *w, const float *next,
                 float *out, long columns, const float *bias, int add) {
    vec a[ROWS][2];
    for (int r = 0; r < rows; r++) a[r][0] = a[r][1] = (vec){0};
    for (long k = 0; k < l->inputs; k++) {
        vec w0 = *(const vec *)(w + k * PANEL), w1 = *(const vec *)(w + k * PANEL + 16);
        if (lines > 0) __builtin_prefetch(next + k * lines * 16, 0, 2);
        if (lines > 1) __builtin_prefetch(next + k * lines * 16 + 16, 0, 2);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            float b = x[k * rows + r];
            a[r][0] += b * w0;
            a[r][1] += b * w1;
        }
    }
    if (columns == PANEL) {
        vec b0 = {0}, b1 = {0};
        if (bias) b0 = *(const vec *)bias, b1 = *(const vec *)(bias + 16);
        for (int r = 0; r < rows; r++) {
            vec *to = (vec *)(out + r * l->outputs);
            a[r][0] += b0, a[r][1] += b1;
            to[0] = add ? a[r][0] + to[0] : a[r][0];
            to[1] = add ? a[r][1] + to[1] : a[r][1];
        }
        return;
    }
    for (int r = 0; r < rows; r++) {
        float result[PANEL], *to = out + r * l->outputs;
        *(vec *)result = a[r][0];
        *(vec *)(result + 16) = a[r][1];
        for (long n = 0; n < columns; n++) to[n] = result[n] + (bias ? bias[n] : 0.0f) + (add ? to[n] : 0.0f);
    }
}

static void one_panel(const LinearJob *job, long index) {
    const Linear *l = job->l;
    const float *w = l->weight + index * l->inputs * PANEL, *next = w + l->inputs * PANEL;
    const float *bias = l->bias ? l->bias + index * PANEL : NULL;
    long columns = l->outputs - index * PANEL < PANEL ? l->outputs - index * PANEL : PANEL;
    for (long t = 0; t < job->tiles; t++) {
        long start = tile_start(job->rows, job->tiles, t), rows = tile_start(job->rows, job->tiles, t + 1) - start;
        const float *x = job->x + start * l->inputs;
        float *out = job->out + start * l->outputs + index * PANEL;
        switch (rows + (job->tiles > 1 ? t < 2 ? ROWS : 2 * ROWS : 0)) {
#define TILE(R) case R: tile(R, 2, l, x, w, next, out, columns, bias, job->add); break; \
                case ROWS + R: tile(R, 1, l, x, w, next + t * l->inputs * 16, out, columns, bias, job->add); break; \
                case 2 * ROWS + R: tile(R, 0, l, x, w, next, out, columns, bias, job->add); break;
            TILE(1) TILE(2) TILE(3)
#if ROWS > 3
            TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
        }
    }
}

static void panels(const void *arg, long item) {
    const LinearJob *job = arg;
    long count = (job->l->outputs + PANEL - 1) / PANEL, first = item * job->panels_per_item;
    for (long i = first; i < count && i < first + job->panels_per_item; i++) one_panel(job, i);
}

/* Inputs of a tile side by side, so that a tile reads one line after the other; rows 2048 floats apart would share
 * one set of the first-level cache. */
static void interleave(const float *x, long rows, long tiles, long inputs, float *to) {
    for (long t = 0; t < tiles; t++) {
        long start = tile_start(rows, tiles, t), n = tile_start(rows, tiles, t + 1) - start;
        for (long r = 0; r < n; r++)
            for (long k = 0; k < inputs; k++) to[start * inputs + k * n + r] = x[(start + r) * inputs + k];
    }
}

static void apply(const Linear *l, const float *x, long rows, int add, float *out) {
    static __thread float *space;
    static __thread long space_size;
    long most = CHUNK_FLOATS / l->inputs / ROWS * ROWS, count = (l->outputs + PANEL - 1) / PANEL;
    if (most < 2 * ROWS) most = 2 * ROWS;
    if (rows > 1 && space_size < most * l->inputs) {
        free(space);
        space_size = most * l->inputs;
        space = aligned_alloc(64, (space_size * sizeof(float) + 63) / 64 * 64);
    }
    for (long at = 0; at < rows; at += most) {
        long take = rows - at < most ? rows - at : most, tiles = (take + ROWS - 1) / ROWS;
        const float *from = x + at * l->inputs;
        if (take > 1) {
            interleave(from, take, tiles, l->inputs, space);
            from = space;
        }
        LinearJob job = {l, from, out + at * l->outputs, take, tiles, count, add};
        if (pool.limit) job.panels_per_item = (count + 4 * pool.limit + 3) / (4 * pool.limit + 4);
        long work = l->inputs * l->outputs * (take > WEIGHT_ROWS ? take : WEIGHT_ROWS);
        run(panels, &job, (count + job.panels_per_item - 1) / job.panels_per_item, work);
    }
}

void linear(const Linear *l, const float *x, long rows, float *out) { apply(l, x, rows, 0, out); }

void pack(const float *weight, long outputs, long inputs, float *packed) {
    for (long p = 0; p < (outputs + PANEL - 1) / PANEL; p++)
        for (long k = 0; k < inputs; k++)
            for (long n = 0; n < PANEL; n++) {
                long row = p * PANEL + n;
                packed[(p * inputs + k) * PANEL + n] = row < outputs ? weight[row * inputs + k] : 0.0f;
            }
}

/* ---- attention: keys [block][kv_head][head_dim][BLOCK], values [block][kv_head][BLOCK][head_dim] ---- */

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

typedef struct {
    const Heads *h;
    const Batch *b;
    const float *q, *k, *v;
    const long *strides; /* token and head of q, k, v, in floats */
    float *keys, *values, *out;
} AttentionJob;

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

static void attend_all(const AttentionJob *job) {
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

static void activate(const float *gate_up, long n, float *out) {
    const float *up = gate_up + n;
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        vec gate = *(const vec *)(gate_up + i);
        *(vec *)(out + i) = gate / (1.0f + exp_fast(-gate)) * *(const vec *)(up + i);
    }
    for (; i < n; i++) {
        vec gate = {gate_up[i]};
        out[i] = (gate / (1.0f + exp_fast(-gate)))[0] * up[i];
    }
}

/* Scratch of a forward pass, and where its logits go. */
typedef struct {
    float *x, *normed; /* [tokens][hidden] */
    float *wide;       /* [tokens][widest qkv or gate_up] */
    float *inner;      /* [tokens][widest attention or MLP] */
    float *logits;     /* [num_rows][vocab] */
} Space;

typedef struct {
    const Model *m;
    const Layer *l;
    const Batch *b;
    const Space *s;
} LayerJob;

static void input_norm_token(const void *arg, long t) {
    const LayerJob *j = arg;
    rms_norm(j->s->x + t * j->m->hidden, j->l->input_norm, j->m->hidden, j->m->eps, j->s->normed + t * j->m->hidden);
}

static void post_norm_token(const void *arg, long t) {
    const LayerJob *j = arg;
    rms_norm(j->s->x + t * j->m->hidden, j->l->post_norm, j->m->hidden, j->m->eps, j->s->normed + t * j->m->hidden);
}

static void place_token(const void *arg, long t) {
    const LayerJob *j = arg;
    place(j->m, j->l, j->b, t, j->s->wide + t * j->l->qkv.outputs);
}

static void activate_token(const void *arg, long t) {
    const LayerJob *j = arg;
    activate(j->s->wide + t * j->l->gate_up.outputs, j->l->down.inputs, j->s->inner + t * j->l->down.inputs);
}

/* A task for every token, over `size` numbers each. */
static void run_tokens(Task task, const LayerJob *job, long size) {
    run(task, job, job->b->num_tokens, job->b->num_tokens * size * WEIGHT_ROWS);
}

static void layer(const Model *m, const Layer *l, const Batch *b, const Space *s) {
    LayerJob job = {m, l, b, s};
    long strides[6] = {l->qkv.outputs, l->heads.head_dim};
    AttentionJob attention = {&l->heads, b, s->wide, NULL, NULL, strides, l->keys, l->values, s->inner};
    run_tokens(input_norm_token, &job, m->hidden);
    apply(&l->qkv, s->normed, b->num_tokens, 0, s->wide);
    run_tokens(place_token, &job, l->qkv.outputs);
    attend_all(&attention);
    apply(&l->output, s->inner, b->num_tokens, 1, s->x);
    run_tokens(post_norm_token, &job, m->hidden);
    apply(&l->gate_up, s->normed, b->num_tokens, 0, s->wide);
    run_tokens(activate_token, &job, l->gate_up.outputs);
    apply(&l->down, s->inner, b->num_tokens, 1, s->x);
}

/* Logits [num_rows][vocab] of the rows asked for. */
void llama_forward(const Model *m, const Batch *b, const Space *s) {
    for (long t = 0; t < b->num_tokens; t++)
        memcpy(s->x + t * m->hidden, m->embedding + b->token_ids[t] * m->hidden, m->hidden * sizeof(float));
    for (long i = 0; i < m->num_layers; i++) layer(m, m->layers + i, b, s);
    for (long r = 0; r < b->num_rows; r++)
        rms_norm(s->x + b->rows[r] * m->hidden, m->norm, m->hidden, m->eps, s->normed + r * m->hidden);
    apply(&m->lm_head, s->normed, b->num_rows, 0, s->logits);
}
