/*
 * clock.c - time, one helper thread, medians
 *
 * The helper spins while it waits, so that a loop of ten microseconds can be split; it exists only during measurements
 * on two threads and leaves the machine alone otherwise.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "bench.h"

double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static struct {
    pthread_t thread;
    atomic_int asked, done; /* counters of loops */
    atomic_bool stop;
    bnb_range_fn body;
    void *arg;
    int64_t begin, end;
} helper;

/* Spin for a while, then let others run: where another program has the second core, both threads share one. */
static inline void breathe(int *spins)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (++*spins > 4096) {
        sched_yield();
        *spins = 0;
    }
}

static void *help(void *unused)
{
    int seen = 0, spins = 0;
    for (;;) {
        while (atomic_load_explicit(&helper.asked, memory_order_acquire) == seen) {
            if (atomic_load_explicit(&helper.stop, memory_order_relaxed))
                return unused;
            breathe(&spins);
        }
        seen++;
        spins = 0;
        helper.body(helper.arg, helper.begin, helper.end);
        atomic_store_explicit(&helper.done, seen, memory_order_release);
    }
}

void helper_start(void)
{
    atomic_store(&helper.asked, 0);
    atomic_store(&helper.done, 0);
    atomic_store(&helper.stop, false);
    if (pthread_create(&helper.thread, NULL, help, NULL))
        abort();
}

void helper_stop(void)
{
    atomic_store(&helper.stop, true);
    pthread_join(helper.thread, NULL);
}

void run_on(int threads, int64_t n, bnb_range_fn body, void *arg)
{
    if (threads == 1 || n < 2) {
        body(arg, 0, n);
        return;
    }
    helper.body = body;
    helper.arg = arg;
    helper.begin = n / 2;
    helper.end = n;
    const int ticket = atomic_load_explicit(&helper.asked, memory_order_relaxed) + 1;
    atomic_store_explicit(&helper.asked, ticket, memory_order_release);
    body(arg, 0, n / 2);
    int spins = 0;
    while (atomic_load_explicit(&helper.done, memory_order_acquire) != ticket)
        breathe(&spins);
}

void two_halves(void *context, int64_t n, int64_t grain, bnb_range_fn body, void *arg)
{
    (void)context;
    (void)grain;
    run_on(2, n, body, arg);
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double timed(void (*job)(void *arg), void *arg, int repeats)
{
    const double start = now();
    for (int i = 0; i < repeats; i++)
        job(arg);
    return (now() - start) / repeats;
}

double median_time(void (*job)(void *arg), void *arg, int samples)
{
    enum { MOST = 64 };
    double time[MOST];
    job(arg);
    const double once = timed(job, arg, 2);
    const int repeats = once > 1e-3 ? 1 : (int)(1e-3 / once) + 1;
    samples = samples < MOST ? samples : MOST;
    for (int i = 0; i < samples; i++)
        time[i] = timed(job, arg, repeats);
    qsort(time, (size_t)samples, sizeof time[0], ascending);
    return time[samples / 2];
}

static void body_arithmetic(void *arg, int64_t begin, int64_t end)
{
    uint64_t state = (uint64_t)begin;
    for (int64_t i = begin; i < end; i++)
        state = state * 6364136223846793005u + 1442695040888963407u;
    atomic_fetch_add((atomic_ullong *)arg, state);
}

double free_cores(void)
{
    enum { STEPS = 1 << 26 };
    atomic_ullong sum = 0;
    const double start = now();
    run_on(1, STEPS, body_arithmetic, &sum);
    const double one = now() - start;
    helper_start();
    const double middle = now();
    run_on(2, STEPS, body_arithmetic, &sum);
    const double two = now() - middle;
    helper_stop();
    return one / two;
}
