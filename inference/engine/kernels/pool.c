/* Threads of an operation.
 *
 * The calling thread runs an operation's items together with helpers that take items as they come. It waits for items that
 * were taken, never for a helper to come round: this process shares its cores with others, and OpenMP's barriers, which do
 * wait for every thread and spin meanwhile, made steps ten times longer where cores were short. Idle helpers sleep. */

#include <pthread.h>
#include <sched.h>

#include "kernels.h"

#define SPINS 600 /* looks at a shared word before a thread gives up its core: some 30 us */
#define ENOUGH (2L << 20) /* multiply-adds worth a second thread, some 25 us */
#define MAX_HELPERS 255

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
void run(Task task, const void *arg, long count, long work) {
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

int num_helpers(void) { return LOAD(pool.limit); }
