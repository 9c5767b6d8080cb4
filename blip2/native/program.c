/* Computes one token of every row through all layers of a language model, in one call. As separate operations called
 * from Python, the small ones between the products take a fifth of a token's time; meanwhile the memory, which limits
 * the products, is idle.
 *
 * A program is a list of operations on buffers with a row of numbers for each row of the batch. Each operation is
 * computed and rounded as in torch. Threads divide large operations and then wait for each other. Included by
 * kernels.c. */

enum { RMS_NORM, LAYER_NORM, LINEAR, ADD, TURN, WRITE, ATTEND, ACTIVATE };

#define PIECE 1024  /* numbers that one thread adds or activates */
#define LARGE 30000 /* products of numbers that are worth another thread */

/* `weights`, `sizes` and `numbers` by kind; a plane is a number of an entry of `planes`, or -1:
 *
 *   RMS_NORM    weight; sizes: count per row, numbers of each, first number; numbers: epsilon, offset of
 *               the weights
 *   LAYER_NORM  weight, bias or NULL; the same
 *   LINEAR      codes, scales, bias or NULL; sizes: width, padded, group, bits, channels
 *   ADD         numbers: factor of the addend
 *   TURN        rotary positions; sizes: first number, numbers from head to head, heads, planes of cosines and sines
 *   WRITE       sizes: first number, numbers from head to head, heads, size of a head, plane
 *   ATTEND      sizes: first number of the queries, numbers from head to head, heads, size of a head, heads that share
 *               keys and values, planes of keys, values and mask, kind of the mask; numbers: scale, cap or 0
 *   ACTIVATE    sizes: function, numbers, whether as many numbers follow that are multiplied by the result */
typedef struct {
    long kind, from, to;
    const void *weights[3];
    long sizes[9];
    float numbers[2];
} Operation;

/* A tensor that is not a buffer: [rows, heads, slots, numbers], strides in elements; 0 where all share one value. */
typedef struct {
    void *data;
    long row, head, slot;  /* stride from one to the next */
    long slots, length;    /* number of slots, and of numbers in each */
} Plane;

typedef struct {
    const Operation *operations;
    long count;
    const long *widths; /* of each buffer */
    long buffers;
    const Plane *planes;
    const int64_t *positions; /* the slot of each row's token */
    void *x;                  /* the first buffer: input and output */
    long type, rows;
} Run;

INLINE void add_typed(const void *x, void *y, const int type, long begin, long end, float factor) {
    SIMD()
    for (long i = begin; i < end; i++) {
        float value = load(x, i, type);
        if (factor != 1) {
            value *= factor;
            if (type == BFLOAT16) value = from_bfloat16(to_bfloat16(value));
        }
        store(y, i, load(y, i, type) + value, type);
    }
}

INLINE float rounded(float value, const int type) { return type == BFLOAT16 ? from_bfloat16(to_bfloat16(value)) : value; }

/* Numbers i and i + size / 2 of a head are a point that is rotated; sines of the first half are negative. */
INLINE void turn_typed(void *x, const int type, long at, long size, const void *cos, long at_cos, const void *sin,
                       long at_sin) {
    long half = size / 2;
    for (long i = 0; i < half; i++) {
        float first = load(x, at + i, type), second = load(x, at + half + i, type);
        float a = rounded(first * load(cos, at_cos + i, type), type) +
                  rounded(second * load(sin, at_sin + i, type), type);
        float b = rounded(second * load(cos, at_cos + half + i, type), type) +
                  rounded(first * load(sin, at_sin + half + i, type), type);
        store(x, at + i, a, type), store(x, at + half + i, b, type);
    }
}

INLINE void layer_norm_row(const void *x, const void *weight, const void *bias, const int type, long at, long width,
                           float eps, void *out) {
    float sum = 0, square = 0;
    SIMD(reduction(+ : sum))
    for (long d = 0; d < width; d++) sum += load(x, at + d, type);
    float mean = sum / width;
    SIMD(reduction(+ : square))
    for (long d = 0; d < width; d++) square += (load(x, at + d, type) - mean) * (load(x, at + d, type) - mean);
    float scale = 1 / sqrtf(square / width + eps);
    SIMD()
    for (long d = 0; d < width; d++)
        store(out, at + d, (load(x, at + d, type) - mean) * scale * load(weight, d, type) +
                           (bias ? load(bias, d, type) : 0), type);
}

static void norm_row(const Operation *op, const void *x, void *out, int type, long at) {
    long width = op->sizes[1];
    if (op->kind == LAYER_NORM) {
        if (type == BFLOAT16) layer_norm_row(x, op->weights[0], op->weights[1], BFLOAT16, at, width, op->numbers[0], out);
        else layer_norm_row(x, op->weights[0], op->weights[1], FLOAT32, at, width, op->numbers[0], out);
    } else {
        if (type == BFLOAT16) rms_norm_row(x, op->weights[0], BFLOAT16, at, width, op->numbers[0], op->numbers[1], out);
        else rms_norm_row(x, op->weights[0], FLOAT32, at, width, op->numbers[0], op->numbers[1], out);
    }
}

#define TURNED(type) \
    turn_typed(to, type, at, cos->length, cos->data, row * cos->row, sin->data, row * sin->row)

/* The number of independent pieces of an operation. A product has two parts: first the rows are quantised, then the
 * tiles are multiplied. */
static long pieces(const Run *run, const Operation *op, int is_first) {
    const long *n = op->sizes, rows = run->rows;
    switch (op->kind) {
        case RMS_NORM:
        case LAYER_NORM: return rows * n[0];
        case LINEAR: return is_first ? rows : tiles_of(n[4]);
        case ADD: return (rows * run->widths[op->from] + PIECE - 1) / PIECE;
        case ACTIVATE: return rows * ((n[1] + PIECE - 1) / PIECE);
        default: return rows * n[2];
    }
}

/* Whether an operation is large enough for several threads, which then have to wait for each other. Other operations
 * run in one thread. */
static int is_large(const Run *run, const Operation *op, int is_first) {
    const long *n = op->sizes, numbers = run->rows * run->widths[op->from];
    if (op->kind == LINEAR) return !is_first || numbers > 4 * LARGE;
    if (op->kind == ATTEND) return run->rows * n[2] * n[3] * run->planes[n[7]].slots > LARGE;
    return numbers > (op->kind == ACTIVATE ? LARGE / 4 : 4 * LARGE);
}

/* Computes some pieces of an operation; `scores` is memory of the thread. */
static void operate(const Run *run, const Operation *op, int is_first, long begin, long end, char *const *buffers,
                    float *scores, int8_t *planes) {
    const long *n = op->sizes, rows = run->rows, width = run->widths[op->from], out_width = run->widths[op->to];
    const int type = (int)run->type;
    const long size = type == BFLOAT16 ? 2 : 4;
    void *from = buffers[op->from], *to = buffers[op->to];
    const Multiplication m = {from, type, rows, n[0], n[1], n[2], n[3], n[4], op->weights[0], op->weights[1],
                              op->weights[2], to, planes};
    if (op->kind == LINEAR && is_first) {
        split_rows(&m, begin, end);
        return;
    }
    for (long i = begin; i < end; i++) switch (op->kind) {
            case RMS_NORM:
            case LAYER_NORM:
                norm_row(op, from, to, type, i / n[0] * width + n[2] + i % n[0] * n[1]);
                break;
            case LINEAR:
                multiply_tile(&m, i);
                break;
            case ADD: {
                long last = (i + 1) * PIECE < rows * width ? (i + 1) * PIECE : rows * width;
                if (type == BFLOAT16) add_typed(from, to, BFLOAT16, i * PIECE, last, op->numbers[0]);
                else add_typed(from, to, FLOAT32, i * PIECE, last, op->numbers[0]);
                break;
            }
            case TURN: {
                const Plane *cos = run->planes + n[3], *sin = run->planes + n[4];
                long row = i / n[2], at = row * width + n[0] + i % n[2] * n[1];
                if (type == BFLOAT16) TURNED(BFLOAT16);
                else TURNED(FLOAT32);
                break;
            }
            case WRITE: {
                const Plane *plane = run->planes + n[4];
                long row = i / n[2], head = i % n[2];
                if (run->positions[row] < 0 || run->positions[row] >= plane->slots) break; /* outside of our memory */
                long at = row * plane->row + head * plane->head + run->positions[row] * plane->slot;
                memcpy((char *)plane->data + at * size, (char *)from + (row * width + n[0] + head * n[1]) * size,
                       n[3] * size);
                break;
            }
            case ATTEND: {
                const Plane *keys = run->planes + n[5], *values = run->planes + n[6], *mask = run->planes + n[7];
                long row = i / n[2], head = i % n[2], shared = head / n[4];
                kernels->attend(from, row * width + n[0] + head * n[1], keys->data,
                                row * keys->row + shared * keys->head, keys->slot, values->data,
                                row * values->row + shared * values->head, values->slot, mask->data,
                                row * mask->row + head * mask->head, mask->slot, (int)n[8], type, mask->slots, n[3],
                                op->numbers[0], op->numbers[1], scores, to, row * out_width + head * n[3]);
                break;
            }
            case ACTIVATE: {
                long parts = (n[1] + PIECE - 1) / PIECE, row = i / parts, first = i % parts * PIECE;
                long some = n[1] - first < PIECE ? n[1] - first : PIECE, at = row * width + first;
                kernels->activate(from, at, n[2] ? at + n[1] : -1, (int)n[0], some, type, to,
                                  row * out_width + first);
                break;
            }
        }
}

/* The number of pieces taken from each thread's own share; each counter has a cache line of its own. */
typedef struct {
    long pieces, unused[7];
} Done;

/* Returns 1 if there is not enough memory. */
int blip2_run(const Run *run, int threads) {
    const long size = run->type == BFLOAT16 ? 2 : 4;
    long numbers = 0, planes = 0, scores = 0, counts = 2 * run->count * threads * sizeof(Done);
    for (long b = 1; b < run->buffers; b++) numbers += (run->widths[b] * run->rows * size + 63) / 64 * 64;
    for (long i = 0; i < run->count; i++) {
        const Operation *op = run->operations + i;
        if (op->kind == LINEAR) {
            long needed = planes_bytes(run->rows, op->sizes[1], op->sizes[2]);
            planes = needed > planes ? needed : planes;
        }
        if (op->kind == ATTEND) {
            long needed = ((run->planes[op->sizes[7]].slots + 2 * op->sizes[3]) * 4 + 63) / 64 * 64;
            scores = needed > scores ? needed : scores;
        }
    }
    char *memory = aligned_alloc(64, planes + counts + scores * threads + numbers + 64);
    if (!memory) return 1;
    Done *done = (Done *)(memory + planes);
    memset(done, 0, counts);
    char *buffers[run->buffers], *end = memory + planes + counts + scores * threads;
    buffers[0] = run->x;
    for (long b = 1; b < run->buffers; b++) {
        buffers[b] = end;
        end += (run->widths[b] * run->rows * size + 63) / 64 * 64;
    }
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), several = omp_get_num_threads();
        float *own = (float *)(memory + planes + counts + scores * thread);
        int is_alone = 0; /* whether the first thread has computed something that the others have not waited for */
        for (long i = 0; i < 2 * run->count; i++) {
            const Operation *op = run->operations + i / 2;
            const int is_first = i % 2 == 0;
            if (is_first && op->kind != LINEAR) continue;
            const long all = pieces(run, op, is_first);
            if (several == 1 || !is_large(run, op, is_first)) {
                if (thread == 0) operate(run, op, is_first, 0, all, buffers, own, (int8_t *)memory);
                is_alone = 1;
                continue;
            }
            if (is_alone) {
#pragma omp barrier
            }
            is_alone = 0;
            /* Each thread has a contiguous share of the pieces, since memory is faster in order. When it is done it
             * takes pieces of other threads, whose CPU may be busy with other programs. */
            for (int turn = 0; turn < several; turn++) {
                const long whose = (thread + turn) % several, first = all * whose / several;
                const long own_end = all * (whose + 1) / several, some = (own_end - first) / 16 + 1;
                for (long begin; (begin = first + __atomic_fetch_add(&done[i * several + whose].pieces, some,
                                                                     __ATOMIC_RELAXED)) < own_end;)
                    operate(run, op, is_first, begin, begin + some < own_end ? begin + some : own_end, buffers, own,
                            (int8_t *)memory);
            }
#pragma omp barrier
        }
    }
    free(memory);
    return 0;
}
