/* The forward pass of the Llama family. */

#include <math.h>
#include <string.h>

#include "kernels.h"

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
