/* Linear layers over packed weights: tiles of rows by panels of outputs, whose sums stay in registers. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#ifdef __AVX512F__
#define ROWS 12 /* rows per tile of two vectors: 24 sums, which AVX-512 has registers for */
#else
#define ROWS 3 /* 12 sums of half a vector with AVX2 */
#endif
#define CHUNK_FLOATS (192 * 1024) /* inputs of the rows that stay in the second-level cache while all panels pass */

typedef struct {
    const Linear *l;
    const float *x; /* by tile: [inputs][rows of the tile] */
    float *out;
    long rows, tiles, panels_per_item;
    int add;
} LinearJob;

/* Tile t of an even split of `rows` begins here: 16 rows are 8 and 8, not 12 and 4. */
INLINE long tile_start(long rows, long tiles, long t) { return rows * t / tiles; }

/* Bytes of a panel that belong to one input. */
INLINE long row_bytes(long kind) { return kind == FLOATS ? 4 * PANEL : kind == BYTES ? PANEL : 2 * PANEL; }

INLINE long panel_bytes(const Linear *l, long kind) {
    return (kind == BYTES ? l->inputs + l->inputs % 2 : l->inputs) * row_bytes(kind);
}

/* int8 weights lie in the high byte of a number, which is 2^24 times as large; the layer's scale makes up for it. */
INLINE vec high_byte(ints x) { return __builtin_convertvector(x & (int)0xff000000, vec); }

/* The weights of input k. */
INLINE void load(const int kind, const char *w, long k, vec *w0, vec *w1) {
    if (kind == FLOATS) {
        *w0 = *(const vec *)(w + k * 128);
        *w1 = *(const vec *)(w + k * 128 + 64);
    } else if (kind == HALVES) {
        ints pairs = *(const ints *)(w + k * 64);
        *w0 = (vec)(pairs << 16);
        *w1 = (vec)(pairs & (int)0xffff0000);
    } else {
        ints fours = *(const ints *)(w + k / 2 * 64) << (k % 2 ? 0 : 16);
        *w0 = high_byte(fours << 8);
        *w1 = high_byte(fours);
    }
}

/* One tile: `rows` rows by a panel of outputs. Meanwhile `stride` bytes an input are fetched from `next` on, at most two
 * cache lines; a stride of 0 fetches nothing new. */
INLINE void tile(const int kind, const int rows, const LinearJob *job, long index, long start, const char *next,
                 long stride) {
    const Linear *l = job->l;
    const char *w = (const char *)l->weight + index * panel_bytes(l, kind);
    const float *x = job->x + start * l->inputs, *bias = l->bias ? l->bias + index * PANEL : NULL;
    float *out = job->out + start * l->outputs + index * PANEL;
    long columns = l->outputs - index * PANEL < PANEL ? l->outputs - index * PANEL : PANEL;
    long second = stride > 64 ? 64 : 0;
    vec a[ROWS][2];
    for (int r = 0; r < rows; r++) a[r][0] = a[r][1] = (vec){0};
    for (long k = 0; k < l->inputs; k++) {
        vec w0, w1;
        load(kind, w, k, &w0, &w1);
        __builtin_prefetch(next + k * stride, 0, 2);
        if (kind == FLOATS) __builtin_prefetch(next + k * stride + second, 0, 2);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            float b = x[k * rows + r];
            a[r][0] += b * w0;
            a[r][1] += b * w1;
        }
    }
    if (kind == BYTES) {
        const vec *scale = (const vec *)(l->scale + index * PANEL);
        for (int r = 0; r < rows; r++) a[r][0] *= scale[0], a[r][1] *= scale[1];
    }
    if (columns == PANEL) {
        vec b0 = {0}, b1 = {0};
        if (bias) b0 = *(const vec *)bias, b1 = *(const vec *)(bias + 16);
        for (int r = 0; r < rows; r++) {
            vec *to = (vec *)(out + r * l->outputs);
            a[r][0] += b0, a[r][1] += b1;
            to[0] = job->add ? a[r][0] + to[0] : a[r][0];
            to[1] = job->add ? a[r][1] + to[1] : a[r][1];
        }
        return;
    }
    for (int r = 0; r < rows; r++) {
        float result[PANEL], *to = out + r * l->outputs;
        *(vec *)result = a[r][0];
        *(vec *)(result + 16) = a[r][1];
        for (long n = 0; n < columns; n++) to[n] = result[n] + (bias ? bias[n] : 0.0f) + (job->add ? to[n] : 0.0f);
    }
}

/* All tiles by one panel; up to four fetch a share of the next panel each, so that none waits for memory. */
INLINE void one_panel(const int kind, const LinearJob *job, long index) {
    const Linear *l = job->l;
    long share = job->tiles > 3 ? 4 : job->tiles > 1 ? 2 : 1, stride = row_bytes(kind) / share;
    const char *next = (const char *)l->weight + (index + 1) * panel_bytes(l, kind);
    for (long t = 0; t < job->tiles; t++, next += l->inputs * stride) {
        long start = tile_start(job->rows, job->tiles, t);
        if (t == share) stride = 0;
        switch (tile_start(job->rows, job->tiles, t + 1) - start) {
#define TILE(R) case R: tile(kind, R, job, index, start, next, stride); break;
            TILE(1) TILE(2) TILE(3)
#if ROWS > 3
            TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
        }
    }
}

#define PANELS(NAME, KIND) \
    static void NAME(const void *arg, long item) { \
        const LinearJob *job = arg; \
        long count = (job->l->outputs + PANEL - 1) / PANEL, first = item * job->panels_per_item; \
        for (long i = first; i < count && i < first + job->panels_per_item; i++) one_panel(KIND, job, i); \
    }
PANELS(float_panels, FLOATS)
PANELS(half_panels, HALVES)
PANELS(byte_panels, BYTES)

/* Inputs of a tile side by side, so that a tile reads one line after the other; rows 2048 floats apart would share
 * one set of the first-level cache. */
static void interleave(const float *x, long rows, long tiles, long inputs, float *to) {
    for (long t = 0; t < tiles; t++) {
        long start = tile_start(rows, tiles, t), n = tile_start(rows, tiles, t + 1) - start;
        for (long r = 0; r < n; r++)
            for (long k = 0; k < inputs; k++) to[start * inputs + k * n + r] = x[(start + r) * inputs + k];
    }
}

float *scratch(long size) {
    static __thread float *space;
    static __thread long space_size;
    if (space_size < size) {
        free(space);
        space_size = size;
        space = aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64);
    }
    return space;
}

void apply(const Linear *l, const float *x, long rows, int add, float *out) {
    if (l->kind == TILES) return apply_tiles(l, x, rows, add, out);
    long most = CHUNK_FLOATS / l->inputs / ROWS * ROWS, count = (l->outputs + PANEL - 1) / PANEL;
    if (most < 2 * ROWS) most = 2 * ROWS;
    float *space = rows > 1 ? scratch(most * l->inputs) : NULL;
    Task task = l->kind == FLOATS ? float_panels : l->kind == HALVES ? half_panels : byte_panels;
    for (long at = 0; at < rows; at += most) {
        long take = rows - at < most ? rows - at : most, tiles = (take + ROWS - 1) / ROWS;
        const float *from = x + at * l->inputs;
        if (take > 1) {
            interleave(from, take, tiles, l->inputs, space);
            from = space;
        }
        LinearJob job = {l, from, out + at * l->outputs, take, tiles, count, add};
        int helpers = num_helpers();
        if (helpers) job.panels_per_item = (count + 4 * helpers + 3) / (4 * helpers + 4);
        long work = l->inputs * l->outputs * (take > WEIGHT_ROWS ? take : WEIGHT_ROWS);
        run(task, &job, (count + job.panels_per_item - 1) / job.panels_per_item, work);
    }
}

void linear(const Linear *l, const float *x, long rows, float *out) { apply(l, x, rows, 0, out); }

/* Where weight (n, k) of a panel lies, in weights. */
static long place_of(long kind, long n, long k) {
    if (kind == HALVES) return k * PANEL + n % 16 * 2 + n / 16;
    if (kind == TILES) return (k / 32 * 2 + n / 16) * 512 + k % 32 / 2 * 32 + n % 16 * 2 + k % 2;
    if (kind == BYTES) return k / 2 * 2 * PANEL + n % 16 * 4 + k % 2 * 2 + n / 16;
    return k * PANEL + n;
}

/* Lay weights [outputs][inputs] of 4, 2, 1 or 2 bytes out for a kind; `packed` is zero where no weight goes. */
void pack(const void *weight, long outputs, long inputs, long kind, void *packed) {
    long padded = kind == TILES ? (inputs + 31) / 32 * 32 : kind == BYTES ? inputs + inputs % 2 : inputs;
    for (long row = 0; row < outputs; row++)
        for (long k = 0; k < inputs; k++) {
            long from = row * inputs + k, to = row / PANEL * padded * PANEL + place_of(kind, row % PANEL, k);
            if (kind == FLOATS) ((float *)packed)[to] = ((const float *)weight)[from];
            else if (kind == BYTES) ((char *)packed)[to] = ((const char *)weight)[from];
            else ((uint16_t *)packed)[to] = ((const uint16_t *)weight)[from];
        }
}
