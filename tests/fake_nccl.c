// A stand-in for libnccl.so.2: the same functions over host memory, ranks as threads of one process.
//
// It behaves as NCCL does where that matters to a caller: communicators connect when all ranks have
// come, calls return before the operation has run, operations of a stream run in order in a thread of
// the stream, a send meets its receive, an operation whose ranks do not come hangs until the
// communicator is aborted. Functions named fake_* are for the test: scripted results, what was called.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 8, SLOTS = 1024, IN_PROGRESS = 7 };
enum Kind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND, RECV };

typedef struct { char bytes[128]; } Id;

typedef struct Op {
    enum Kind kind;
    const void* in;
    void* out;
    size_t count;
    int dtype, op, peer;
    struct Comm* comm;
    struct Op* next;
} Op;

typedef struct { Op* of[MAX_RANKS]; int arrived, done; } Slot;
typedef struct Mail { const void* data; size_t bytes; int taken; struct Mail* next; } Mail;

typedef struct World {
    Id id;
    int size, joined, split_arrived, split_round, colors[MAX_RANKS], keys[MAX_RANKS];
    Slot slots[SLOTS];
    Mail* mail[MAX_RANKS][MAX_RANKS];
    struct World* child[MAX_RANKS];
    struct World* next;
} World;

typedef struct Comm { World* world; int rank, aborted, seq, error; } Comm;
typedef struct Task { Op* ops; struct Task* next; } Task;
typedef struct Stream { Task *first, *last; long enqueued, completed; } Stream;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static World* worlds;
static uint64_t ids;
static char called[1 << 16];
static char config[48];
static struct { char name[40]; int result, times; } scripts[16];
static int in_progress_polls, after_polls;
static void **late_handle, *late_value;
static int version = 22000;

static __thread int depth;
static __thread Op *group_first, *group_last;
static __thread Stream* group_stream;

// -- for the test ------------------------------------------------------------------------------------

void fake_reset(void) {
    pthread_mutex_lock(&lock);
    memset(scripts, 0, sizeof scripts);
    called[0] = 0;
    in_progress_polls = after_polls = 0;
    late_handle = NULL;
    version = 22000;
    pthread_mutex_unlock(&lock);
}

// The next `times` calls of a function give `result` (7: they are done all the same).
void fake_script(const char* name, int result, int times) {
    for (int i = 0; i < 16; ++i)
        if (!scripts[i].times) {
            snprintf(scripts[i].name, sizeof scripts[i].name, "%s", name);
            scripts[i].result = result;
            scripts[i].times = times;
            return;
        }
}

// The next `polls` questions for the state are answered "in progress", the one after them `then`.
void fake_states(int polls, int then) { in_progress_polls = polls, after_polls = then; }
void fake_version(int v) { version = v; }
void fake_break(Comm* comm, int error) { comm->error = error; }
const char* fake_called(void) { return called; }
const char* fake_config(void) { return config; }

static int scripted(const char* name) {
    pthread_mutex_lock(&lock);
    if (strcmp(name, "ncclCommGetAsyncError") && strlen(called) + strlen(name) + 2 < sizeof called)
        strcat(strcat(called, name + 4), " ");
    int result = 0;
    for (int i = 0; i < 16 && !result; ++i)
        if (scripts[i].times > 0 && !strcmp(scripts[i].name, name)) scripts[i].times--, result = scripts[i].result;
    pthread_mutex_unlock(&lock);
    return result;
}

#define ENTER int scripted_result = scripted(__func__); if (scripted_result && scripted_result != IN_PROGRESS) return scripted_result
#define LEAVE return scripted_result

// -- streams -----------------------------------------------------------------------------------------

static void run(Op* ops);

static void* work(void* arg) {
    Stream* s = arg;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (!s->first) pthread_cond_wait(&wake, &lock);
        Task* task = s->first;
        s->first = task->next;
        pthread_mutex_unlock(&lock);
        run(task->ops);
        pthread_mutex_lock(&lock);
        s->completed++;
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
        free(task);
    }
    return NULL;
}

Stream* fake_stream(void) {
    Stream* s = calloc(1, sizeof *s);
    pthread_t thread;
    pthread_create(&thread, NULL, work, s);
    pthread_detach(thread);
    return s;
}

long fake_mark(Stream* s) { return s->enqueued; }

int fake_reached(Stream* s, long mark) {
    pthread_mutex_lock(&lock);
    const int reached = s->completed >= mark;
    pthread_mutex_unlock(&lock);
    return reached;
}

void fake_wait(Stream* s, long mark) {
    pthread_mutex_lock(&lock);
    while (s->completed < mark) pthread_cond_wait(&wake, &lock);
    pthread_mutex_unlock(&lock);
}

static void enqueue(Stream* s, Op* ops) {
    Task* task = calloc(1, sizeof *task);
    task->ops = ops;
    pthread_mutex_lock(&lock);
    if (s->first) s->last->next = task; else s->first = task;
    s->last = task;
    s->enqueued++;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
}

// -- operations --------------------------------------------------------------------------------------

static size_t width(int dtype) { return dtype == 4 || dtype == 8 ? 8 : dtype == 7 ? 4 : 2; }

static float bf16_up(uint16_t x) { uint32_t w = (uint32_t)x << 16; float f; memcpy(&f, &w, 4); return f; }
static uint16_t bf16_down(float f) {
    uint32_t w;
    memcpy(&w, &f, 4);
    return (uint16_t)((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}

#define COMBINE(T, UP, DOWN)                                            \
    for (size_t i = 0; i < n; ++i) {                                    \
        T a = UP(((T##_raw*)acc)[i]), b = UP(((const T##_raw*)x)[i]);   \
        T r = op == 0 ? (T)(a + b) : op == 2 ? (a > b ? a : b) : (a < b ? a : b); \
        ((T##_raw*)acc)[i] = DOWN(r);                                   \
    }
#define SAME(x) (x)
typedef float f32; typedef float f32_raw; typedef double f64; typedef double f64_raw;
typedef int64_t i64; typedef int64_t i64_raw;
typedef _Float16 f16; typedef _Float16 f16_raw; typedef float bf; typedef uint16_t bf_raw;

static void combine(void* acc, const void* x, size_t n, int dtype, int op) {
    switch (dtype) {
        case 4: COMBINE(i64, SAME, SAME) break;
        case 6: COMBINE(f16, SAME, SAME) break;
        case 7: COMBINE(f32, SAME, SAME) break;
        case 8: COMBINE(f64, SAME, SAME) break;
        default: COMBINE(bf, bf16_up, bf16_down)
    }
}

// With the lock held, all ranks there: the data of a collective. Sums run from the last rank to the
// first, rounding at each: another order than the host's.
static void complete(World* w, Slot* slot) {
    Op* first = slot->of[0];
    const size_t n = w->size, bytes = first->count * width(first->dtype);
    char* result = malloc(bytes * n + 1);
    if (first->kind == ALL_REDUCE || first->kind == REDUCE_SCATTER) {
        const size_t total = first->count * (first->kind == ALL_REDUCE ? 1 : n);
        memcpy(result, slot->of[n - 1]->in, total * width(first->dtype));
        for (int r = (int)n - 2; r >= 0; --r) combine(result, slot->of[r]->in, total, first->dtype, first->op);
    } else if (first->kind == ALL_GATHER) {
        for (size_t r = 0; r < n; ++r) memcpy(result + r * bytes, slot->of[r]->in, bytes);
    } else {
        memcpy(result, slot->of[first->peer]->in, bytes);
    }
    for (size_t r = 0; r < n; ++r) {
        const size_t from = first->kind == REDUCE_SCATTER ? r * bytes : 0;
        memcpy(slot->of[r]->out, result + from, first->kind == ALL_GATHER ? bytes * n : bytes);
    }
    free(result);
}

static void collective(Op* op) {
    Comm* c = op->comm;
    pthread_mutex_lock(&lock);
    Slot* slot = &c->world->slots[c->seq++ % SLOTS];
    if (slot->done) memset(slot, 0, sizeof *slot);
    slot->of[c->rank] = op;
    if (++slot->arrived == c->world->size) {
        int fits = 1;  // what NCCL does with operations that differ is undefined; this hangs
        for (int r = 1; r < c->world->size; ++r)
            fits &= slot->of[r]->kind == slot->of[0]->kind && slot->of[r]->count == slot->of[0]->count &&
                    slot->of[r]->dtype == slot->of[0]->dtype;
        if (fits) {
            complete(c->world, slot);
            slot->done = 1;
            pthread_cond_broadcast(&wake);
        }
    }
    while (!slot->done && !c->aborted) pthread_cond_wait(&wake, &lock);
    pthread_mutex_unlock(&lock);
}

static void exchange(Op* ops) {
    Comm* c = ops->comm;
    Mail* sent[64];
    int n = 0;
    pthread_mutex_lock(&lock);
    for (Op* op = ops; op; op = op->next)
        if (op->kind == SEND) {
            Mail* mail = calloc(1, sizeof *mail);
            mail->data = op->in, mail->bytes = op->count * width(op->dtype);
            Mail** end = &c->world->mail[c->rank][op->peer];
            while (*end) end = &(*end)->next;
            *end = sent[n++] = mail;
        }
    pthread_cond_broadcast(&wake);
    for (Op* op = ops; op; op = op->next)
        if (op->kind == RECV) {
            Mail** box = &c->world->mail[op->peer][c->rank];
            while (!*box && !c->aborted) pthread_cond_wait(&wake, &lock);
            if (c->aborted) break;
            Mail* mail = *box;
            *box = mail->next;
            const size_t room = op->count * width(op->dtype);
            memcpy(op->out, mail->data, mail->bytes < room ? mail->bytes : room);
            mail->taken = 1;
            pthread_cond_broadcast(&wake);
        }
    for (int i = 0; i < n; ++i)
        while (!sent[i]->taken && !c->aborted) pthread_cond_wait(&wake, &lock);
    pthread_mutex_unlock(&lock);
}

static void run(Op* ops) {
    if (ops->kind == SEND || ops->kind == RECV) exchange(ops);
    else collective(ops);
}

static void add(enum Kind kind, const void* in, void* out, size_t count, int dtype, int op, int peer, Comm* comm,
                Stream* stream) {
    Op* o = calloc(1, sizeof *o);
    *o = (Op){kind, in, out, count, dtype, op, peer, comm, NULL};
    if (!depth) { enqueue(stream, o); return; }
    if (group_first) group_last->next = o; else group_first = o;
    group_last = o;
    group_stream = stream;
}

// -- NCCL's functions --------------------------------------------------------------------------------

int ncclGetVersion(int* v) { *v = version; return 0; }
const char* ncclGetErrorString(int result) { return result == 2 ? "unhandled system error" : result == 7 ? "in progress" : "scripted error"; }
const char* ncclGetLastError(void* comm) { return comm ? "the last words of the fake" : ""; }

int ncclGetUniqueId(Id* id) {
    ENTER;
    memset(id, 0, sizeof *id);
    pthread_mutex_lock(&lock);
    snprintf(id->bytes, sizeof id->bytes, "fake-%llu", (unsigned long long)++ids);
    pthread_mutex_unlock(&lock);
    LEAVE;
}

static Comm* join(World* w, int rank) {
    Comm* c = calloc(1, sizeof *c);
    c->world = w, c->rank = rank;
    w->joined++;
    return c;
}

int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, const void* settings) {
    ENTER;
    pthread_mutex_lock(&lock);
    memcpy(config, settings, sizeof config);
    World* w = worlds;
    while (w && memcmp(&w->id, &id, sizeof id)) w = w->next;
    if (!w) {
        w = calloc(1, sizeof *w);
        w->id = id, w->size = size, w->next = worlds;
        worlds = w;
    }
    *comm = join(w, rank);
    const int all = w->joined == w->size;
    pthread_mutex_unlock(&lock);
    return all ? scripted_result : IN_PROGRESS;
}

int ncclCommGetAsyncError(Comm* comm, int* state) {
    ENTER;
    pthread_mutex_lock(&lock);
    *state = comm->world->joined < comm->world->size ? IN_PROGRESS : comm->error;
    if (in_progress_polls > 0) {
        *state = IN_PROGRESS;
        if (--in_progress_polls == 0 && late_handle) *late_handle = late_value, late_handle = NULL;
    } else if (after_polls) {
        *state = after_polls, after_polls = 0;
    }
    pthread_mutex_unlock(&lock);
    LEAVE;
}

int ncclCommFinalize(Comm* comm) { (void)comm; ENTER; LEAVE; }
int ncclCommDestroy(Comm* comm) { (void)comm; ENTER; LEAVE; }
int ncclCommAbort(Comm* comm) {
    ENTER;
    pthread_mutex_lock(&lock);
    comm->aborted = 1;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    LEAVE;
}

int ncclGroupStart(void) { ENTER; depth++; LEAVE; }
int ncclGroupEnd(void) {
    if (--depth == 0 && group_first) {
        Op* ops = group_first;
        group_first = group_last = NULL;
        enqueue(group_stream, ops);
    }
    ENTER;
    LEAVE;
}

int ncclAllReduce(const void* in, void* out, size_t n, int dtype, int op, Comm* c, Stream* s) {
    ENTER; add(ALL_REDUCE, in, out, n, dtype, op, 0, c, s); LEAVE;
}
int ncclReduceScatter(const void* in, void* out, size_t n, int dtype, int op, Comm* c, Stream* s) {
    ENTER; add(REDUCE_SCATTER, in, out, n, dtype, op, 0, c, s); LEAVE;
}
int ncclAllGather(const void* in, void* out, size_t n, int dtype, Comm* c, Stream* s) {
    ENTER; add(ALL_GATHER, in, out, n, dtype, 0, 0, c, s); LEAVE;
}
int ncclBroadcast(const void* in, void* out, size_t n, int dtype, int root, Comm* c, Stream* s) {
    ENTER; add(BROADCAST, in, out, n, dtype, 0, root, c, s); LEAVE;
}
int ncclSend(const void* in, size_t n, int dtype, int peer, Comm* c, Stream* s) {
    ENTER; add(SEND, in, NULL, n, dtype, 0, peer, c, s); LEAVE;
}
int ncclRecv(void* out, size_t n, int dtype, int peer, Comm* c, Stream* s) {
    ENTER; add(RECV, NULL, out, n, dtype, 0, peer, c, s); LEAVE;
}

#ifndef OLD
// The new handle is written when the last "in progress" has been answered, if any was scripted.
int ncclCommSplit(Comm* comm, int color, int key, Comm** made, const void* settings) {
    ENTER;
    World* w = comm->world;
    Comm* result = NULL;
    pthread_mutex_lock(&lock);
    memcpy(config, settings, sizeof config);
    w->colors[comm->rank] = color, w->keys[comm->rank] = key;
    const int round = w->split_round;
    if (++w->split_arrived == w->size) {
        for (int r = 0; r < w->size; ++r) {
            w->child[r] = NULL;
            for (int q = 0; q < r; ++q)
                if (w->colors[q] == w->colors[r]) w->child[r] = w->child[q];
            if (!w->child[r]) w->child[r] = calloc(1, sizeof(World));
            w->child[r]->size++;
        }
        w->split_arrived = 0, w->split_round++;
        pthread_cond_broadcast(&wake);
    }
    while (w->split_round == round) pthread_cond_wait(&wake, &lock);
    if (color >= 0) {
        int rank = 0;
        for (int r = 0; r < w->size; ++r) rank += w->colors[r] == color && w->keys[r] < key;
        result = join(w->child[comm->rank], rank);
    }
    if (in_progress_polls > 0) late_handle = (void**)made, late_value = result;
    else *made = result;
    pthread_mutex_unlock(&lock);
    LEAVE;
}

int ncclMemAlloc(void** p, size_t n) { ENTER; *p = malloc(n); LEAVE; }
int ncclMemFree(void* p) { ENTER; free(p); LEAVE; }
int ncclCommRegister(Comm* c, void* p, size_t n, void** handle) { (void)c, (void)n; ENTER; *handle = p; LEAVE; }
int ncclCommDeregister(Comm* c, void* handle) { (void)c, (void)handle; ENTER; LEAVE; }
int ncclCommWindowRegister(Comm* c, void* p, size_t n, void** w, int flags) {
    (void)c, (void)n, (void)flags; ENTER; *w = p; LEAVE;
}
int ncclCommWindowDeregister(Comm* c, void* w) { (void)c, (void)w; ENTER; LEAVE; }
#endif
