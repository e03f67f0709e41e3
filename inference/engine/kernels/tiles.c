/* Linear layers by AMX: 16 rows by 16 outputs by 32 inputs in one instruction, bfloat16 factors, float32 sums. */

#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STRIP 512 /* rows whose inputs are rounded and multiplied together */

typedef struct {
    const Linear *l;
    const uint16_t *x; /* [rows rounded up to 16][depth] */
    float *out;
    long rows, depth, panels_per_item; /* depth: inputs rounded up to 32 */
    int add;
} TilesJob;

/* The system saves tiles for a process that asked for it once. */
int has_tiles(void) {
    static int asked, allowed;
    if (!asked++) allowed = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return allowed;
}

static void write_rows(const TilesJob *job, long panel, long row, const float found[16][PANEL]) {
    const Linear *l = job->l;
    long columns = l->outputs - panel * PANEL < PANEL ? l->outputs - panel * PANEL : PANEL;
    for (long r = 0; r < 16 && row + r < job->rows; r++) {
        float *to = job->out + (row + r) * l->outputs + panel * PANEL;
        for (long n = 0; n < columns; n++)
            to[n] = found[r][n] + (l->bias ? l->bias[panel * PANEL + n] : 0.0f) + (job->add ? to[n] : 0.0f);
    }
}

/* 16 or 32 rows by a panel: tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights. */
INLINE void rows_by_panel(const TilesJob *job, const int both, long panel, long row) {
    const uint16_t *w = (const uint16_t *)job->l->weight + panel * job->depth * PANEL, *x = job->x + row * job->depth;
    float found[16][PANEL] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < job->depth; k += 32) {
        const uint16_t *here = w + k * PANEL;
        for (int line = 0; line < 32; line++) __builtin_prefetch(here + (job->depth + line) * PANEL, 0, 2);
        _tile_loadd(6, here, 64);
        _tile_loadd(7, here + 512, 64);
        _tile_loadd(4, x + k, job->depth * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + 16 * job->depth + k, job->depth * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, found, sizeof found[0]);
    _tile_stored(1, found[0] + 16, sizeof found[0]);
    write_rows(job, panel, row, found);
    if (!both) return;
    _tile_stored(2, found, sizeof found[0]);
    _tile_stored(3, found[0] + 16, sizeof found[0]);
    write_rows(job, panel, row + 16, found);
}

static void tile_panels(const void *arg, long item) {
    const TilesJob *job = arg;
    static const struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; }
    shape = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    long count = (job->l->outputs + PANEL - 1) / PANEL, first = item * job->panels_per_item;
    _tile_loadconfig(&shape);
    for (long panel = first; panel < count && panel < first + job->panels_per_item; panel++) {
        long row = 0;
        for (; row + 16 < job->rows; row += 32) rows_by_panel(job, 1, panel, row);
        if (row < job->rows) rows_by_panel(job, 0, panel, row);
    }
    _tile_release();
}

void apply_tiles(const Linear *l, const float *x, long rows, int add, float *out) {
    long depth = (l->inputs + 31) / 32 * 32, count = (l->outputs + PANEL - 1) / PANEL;
    long strip = (rows < STRIP ? rows : STRIP) + 31;
    uint16_t *rounded = (uint16_t *)scratch(strip / 32 * 32 * depth / 2 + 1);
    for (long at = 0; at < rows; at += STRIP) {
        long take = rows - at < STRIP ? rows - at : STRIP;
        for (long r = 0; r < (take + 31) / 32 * 32; r++)
            for (long k = 0; k < depth; k += 16) {
                long left = r < take && k < l->inputs ? l->inputs - k : 0;
                __mmask16 some = left >= 16 ? 0xffff : (1u << left) - 1;
                __m512 part = _mm512_maskz_loadu_ps(some, x + (at + r) * l->inputs + k);
                _mm256_storeu_si256((__m256i *)(rounded + r * depth + k), (__m256i)_mm512_cvtneps_pbh(part));
            }
        int helpers = num_helpers();
        TilesJob job = {l, rounded, out + at * l->outputs, take, depth, count, add};
        if (helpers) job.panels_per_item = (count + 4 * helpers + 3) / (4 * helpers + 4);
        /* A weight takes half the time from memory, and a multiply-add of tiles a tenth. */
        long work = l->inputs * l->outputs * (take / 10 > WEIGHT_ROWS / 2 ? take / 10 : WEIGHT_ROWS / 2);
        run(tile_panels, &job, (count + job.panels_per_item - 1) / job.panels_per_item, work);
    }
}

#else

int has_tiles(void) { return 0; }

void apply_tiles(const Linear *l, const float *x, long rows, int add, float *out) {
    (void)l, (void)x, (void)rows, (void)add, (void)out;
    __builtin_trap(); /* has_tiles() said no */
}

#endif
