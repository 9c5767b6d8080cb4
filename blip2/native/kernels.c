/* What decoding on a processor spends its time in: products with int8 and int4 weights, with byte dot products (VNNI)
 * and without, and the attention of single tokens, which as separate operations would cost more than the products.
 *
 * A row of activations becomes two planes of signed bytes, the second holding what the first rounds away:
 *
 *     x[k]  ~  step * (high[k] + low[k] / 254),      step = max |x| / 127
 *
 * so that it has 15 bits of precision, whatever outliers stand in it, and depends on nothing but itself. The
 * products are sums of integers: exact, in any order and in any batch. A weight that is in a register meets both
 * planes, so that for a few rows the time is that of reading the weights from memory.
 *
 * Weights lie in tiles of 32 output channels, as the products read them. A code stands for (code - 128) * scale
 * in 8 bits, (code - 8) * scale in 4:
 *
 *     8 bits   codes[n / 32][k / 4][n % 32][k % 4]
 *     4 bits   codes[n / 32][k / 8][n % 32][k % 4], the low half of the byte for k % 8 < 4, the high half else
 *     scales   bfloat16 [n / 32][k / group][n % 32]
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_VNNI_CODE 1
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#else
#define HAS_VNNI_CODE 0
#endif

/* Several at a time, also where the order of floating point sums changes. */
#define PRAGMA(text) _Pragma(#text)
#define SIMD(clauses) PRAGMA(omp simd clauses)
#define INLINE static inline __attribute__((always_inline))
#define TILE 32
#define ROWS 4      /* rows of activations that meet a tile at a time */
#define AHEAD 16384 /* bytes between the weights in use and those being fetched: memory answers slowly */

enum { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* not a number */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float load(const void *values, long index, int type) {
    return type == BFLOAT16 ? from_bfloat16(((const uint16_t *)values)[index]) : ((const float *)values)[index];
}

INLINE void store(void *values, long index, float value, int type) {
    if (type == BFLOAT16) ((uint16_t *)values)[index] = to_bfloat16(value);
    else ((float *)values)[index] = value;
}

INLINE float clamp(float value, float least, float most) {
    value = value < least ? least : value;
    return value > most ? most : value;
}

/* ---- activations: a row to its planes, their sums over each group, and its step ---- */

typedef float Split(const void *row, int type, long width, long padded, long group, int8_t *high, int8_t *low,
                    int32_t *sums);

INLINE float split_typed(const void *row, const int type, long width, long padded, long group, int8_t *high,
                         int8_t *low, int32_t *sums) {
    float largest = 0, poison = 0;
    SIMD(reduction(max : largest) reduction(+ : poison))
    for (long k = 0; k < width; k++) {
        float x = load(row, k, type), size = fabsf(x);
        largest = size > largest ? size : largest;
        poison += x - x; /* 0, unless x is infinite or not a number: then so is the step */
    }
    float inverse = largest > 0 ? 127 / largest : 0;
    SIMD()
    for (long k = 0; k < width; k++) {
        float scaled = load(row, k, type) * inverse, rounded = rintf(scaled);
        high[k] = (int8_t)(int)rounded;
        low[k] = (int8_t)(int)rintf((scaled - rounded) * 254);
    }
    memset(high + width, 0, padded - width);
    memset(low + width, 0, padded - width);
    long groups = padded / group;
    for (long g = 0; g < groups; g++) {
        int32_t high_sum = 0, low_sum = 0;
        SIMD(reduction(+ : high_sum, low_sum))
        for (long k = g * group; k < (g + 1) * group; k++) high_sum += high[k], low_sum += low[k];
        sums[g] = high_sum, sums[groups + g] = low_sum;
    }
    return largest / 127 + poison;
}

#define SPLIT(type) split_typed(row, type, width, padded, group, high, low, sums)
static float split_plain(const void *row, int type, long width, long padded, long group, int8_t *high, int8_t *low,
                         int32_t *sums) {
    return type == BFLOAT16 ? SPLIT(BFLOAT16) : SPLIT(FLOAT32);
}

/* ---- products: up to ROWS rows with a tile; out[row][channel] in units of step / 254 ---- */

typedef void Product(const int8_t *planes, const int32_t *sums, long padded, long plane, long group, int rows,
                     int bits, const uint8_t *codes, const uint16_t *scales, float *out);

static void product_plain(const int8_t *planes, const int32_t *sums, long padded, long plane, long group, int rows,
                          int bits, const uint8_t *codes, const uint16_t *scales, float *out) {
    long groups = padded / group, step = 32 / bits;
    for (int r = 0; r < rows; r++) {
        float total[TILE] = {0};
        for (long g = 0; g < groups; g++) {
            int32_t sum[2][TILE];
            for (int p = 0; p < 2; p++)
                for (int c = 0; c < TILE; c++) sum[p][c] = -(1 << (bits - 1)) * sums[(r * 2 + p) * groups + g];
            for (long k = g * group; k < (g + 1) * group; k += step)
                for (int p = 0; p < 2; p++) {
                    const int8_t *x = planes + p * plane + r * padded + k;
                    const uint8_t *bytes = codes + k / step * TILE * 4;
                    for (int c = 0; c < TILE; c++)
                        for (int j = 0; j < 4; j++) {
                            int byte = bytes[c * 4 + j];
                            sum[p][c] += bits == 8 ? byte * x[j] : (byte & 15) * x[j] + (byte >> 4) * x[j + 4];
                        }
                }
            for (int c = 0; c < TILE; c++)
                total[c] = fmaf(fmaf((float)sum[0][c], 254, (float)sum[1][c]), from_bfloat16(scales[g * TILE + c]),
                                total[c]);
        }
        memcpy(out + r * TILE, total, sizeof total);
    }
}

/* ---- weights: the codes and scales of a tile; channels beyond `channels` are zeros ---- */

typedef void Quantize(const void *weight, int type, long channels, long width, long padded, long group, int bits,
                      uint8_t *codes, uint16_t *scales);

/* The scale of a group in 4 bits with the least squared error of several, as bfloat16. The largest value becomes
 * code 0 or nearly: -8 is further from zero than 7. */
INLINE float scale_of_group(const float *values, long group) {
    static const float ends[] = {8, 7.5f, 7, 8.5f, 9};
    float least = 0, most = 0, best = 0, scale = 0;
    SIMD(reduction(min : least) reduction(max : most))
    for (long k = 0; k < group; k++) {
        least = values[k] < least ? values[k] : least;
        most = values[k] > most ? values[k] : most;
    }
    float extreme = -least > most ? least : most;
    if (extreme == 0) return 0;
    for (int i = 0; i < 5; i++) {
        float inverse = -ends[i] / extreme, product = 0, square = 0;
        SIMD(reduction(+ : product, square))
        for (long k = 0; k < group; k++) {
            float code = clamp(rintf(values[k] * inverse), -8, 7);
            product += values[k] * code;
            square += code * code;
        }
        /* The best scale for these codes is product / square, which leaves out product^2 / square of the error. */
        if (product * product > best * square) best = product * product / square, scale = product / square;
    }
    return from_bfloat16(to_bfloat16(scale));
}

INLINE void quantize_typed(const void *weight, const int type, long channels, long width, long padded, long group,
                           int bits, uint8_t *codes, uint16_t *scales) {
    const int zero = 1 << (bits - 1);
    memset(codes, bits == 8 ? 0x80 : 0x88, padded * TILE * bits / 8);
    memset(scales, 0, padded / group * TILE * 2);
    for (long c = 0; c < channels; c++)
        for (long g = 0; g < padded / group; g++) {
            float values[group], scale;
            uint8_t code[group];
            long known = width - g * group < group ? width - g * group : group;
            SIMD()
            for (long k = 0; k < known; k++) values[k] = load(weight, c * width + g * group + k, type);
            for (long k = known; k < group; k++) values[k] = 0;
            if (bits == 4) scale = scale_of_group(values, group);
            else {
                float largest = 0;
                SIMD(reduction(max : largest))
                for (long k = 0; k < group; k++) largest = fabsf(values[k]) > largest ? fabsf(values[k]) : largest;
                scale = from_bfloat16(to_bfloat16(largest / 127));
            }
            float inverse = scale != 0 ? 1 / scale : 0, first = bits == 8 ? -127 : -8, last = zero - 1;
            SIMD()
            for (long k = 0; k < group; k++)
                code[k] = (uint8_t)((int)clamp(rintf(values[k] * inverse), first, last) + zero);
            uint8_t *bytes = codes + g * group * TILE * bits / 8 + c * 4;
            for (long k = 0; k < group; k += 32 / bits) {
                uint32_t four, other;
                memcpy(&four, code + k, 4);
                if (bits == 4) memcpy(&other, code + k + 4, 4), four |= other << 4;
                memcpy(bytes + k * bits / 32 * TILE * 4, &four, 4);
            }
            scales[g * TILE + c] = to_bfloat16(scale);
        }
}

#define QUANTIZE(type) quantize_typed(weight, type, channels, width, padded, group, bits, codes, scales)
static void quantize_plain(const void *weight, int type, long channels, long width, long padded, long group, int bits,
                           uint8_t *codes, uint16_t *scales) {
    if (type == BFLOAT16) QUANTIZE(BFLOAT16);
    else QUANTIZE(FLOAT32);
}

/* ---- the same with byte dot products ---- */

#if HAS_VNNI_CODE

VNNI static float split_vnni(const void *row, int type, long width, long padded, long group, int8_t *high, int8_t *low,
                             int32_t *sums) {
    return type == BFLOAT16 ? SPLIT(BFLOAT16) : SPLIT(FLOAT32);
}

VNNI static void quantize_vnni(const void *weight, int type, long channels, long width, long padded, long group,
                               int bits, uint8_t *codes, uint16_t *scales) {
    if (type == BFLOAT16) QUANTIZE(BFLOAT16);
    else QUANTIZE(FLOAT32);
}

VNNI INLINE __m512i four_bytes(const int8_t *bytes) {
    int32_t four;
    memcpy(&four, bytes, 4);
    return _mm512_set1_epi32(four);
}

/* Codes are multiplied unsigned, as the instruction wants one side; that they stand for code - zero is in where the
 * sums begin. A register holds 16 channels of 4 inputs each. */
VNNI INLINE void product_of(const int8_t *planes, const int32_t *sums, long padded, long plane, long group,
                            const int rows, const int bits, const uint8_t *codes, const uint16_t *scales, float *out) {
    const long groups = padded / group, step = 32 / bits;
    const __m512i half = _mm512_set1_epi8(15);
    __m512 total[ROWS][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i sum[ROWS][2][2];
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < 2; p++)
                sum[r][p][0] = sum[r][p][1] =
                    _mm512_set1_epi32(-(1 << (bits - 1)) * sums[(r * 2 + p) * groups + g]);
        for (long k = g * group; k < (g + 1) * group; k += step) {
            const uint8_t *bytes = codes + k / step * TILE * 4;
            _mm_prefetch((const char *)bytes + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)bytes + AHEAD + 64, _MM_HINT_T0);
            __m512i left = _mm512_loadu_si512(bytes), right = _mm512_loadu_si512(bytes + 64), left_high, right_high;
            if (bits == 4) {
                left_high = _mm512_and_si512(_mm512_srli_epi16(left, 4), half);
                right_high = _mm512_and_si512(_mm512_srli_epi16(right, 4), half);
                left = _mm512_and_si512(left, half);
                right = _mm512_and_si512(right, half);
            }
            for (int r = 0; r < rows; r++)
                for (int p = 0; p < 2; p++) {
                    const int8_t *x = planes + p * plane + r * padded + k;
                    __m512i four = four_bytes(x);
                    sum[r][p][0] = _mm512_dpbusd_epi32(sum[r][p][0], left, four);
                    sum[r][p][1] = _mm512_dpbusd_epi32(sum[r][p][1], right, four);
                    if (bits == 4) {
                        four = four_bytes(x + 4);
                        sum[r][p][0] = _mm512_dpbusd_epi32(sum[r][p][0], left_high, four);
                        sum[r][p][1] = _mm512_dpbusd_epi32(sum[r][p][1], right_high, four);
                    }
                }
        }
        for (int side = 0; side < 2; side++) {
            __m256i wide = _mm256_loadu_si256((const __m256i *)(scales + g * TILE + side * 16));
            __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(wide), 16));
            for (int r = 0; r < rows; r++) {
                __m512 both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0][side]), _mm512_set1_ps(254),
                                              _mm512_cvtepi32_ps(sum[r][1][side]));
                total[r][side] = _mm512_fmadd_ps(both, scale, total[r][side]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int side = 0; side < 2; side++) _mm512_storeu_ps(out + r * TILE + side * 16, total[r][side]);
}

#define PRODUCT(rows, bits) product_of(planes, sums, padded, plane, group, rows, bits, codes, scales, out)
VNNI static void product_vnni(const int8_t *planes, const int32_t *sums, long padded, long plane, long group, int rows,
                              int bits, const uint8_t *codes, const uint16_t *scales, float *out) {
    switch (rows * 8 + bits) { /* each a loop of its own, with everything in registers */
        case 1 * 8 + 4: PRODUCT(1, 4); break;
        case 2 * 8 + 4: PRODUCT(2, 4); break;
        case 3 * 8 + 4: PRODUCT(3, 4); break;
        case 4 * 8 + 4: PRODUCT(4, 4); break;
        case 1 * 8 + 8: PRODUCT(1, 8); break;
        case 2 * 8 + 8: PRODUCT(2, 8); break;
        case 3 * 8 + 8: PRODUCT(3, 8); break;
        default: PRODUCT(4, 8);
    }
}

#endif

/* ---- single tokens ---- */

INLINE void attend_head(const void *query, long at_q, const void *keys, long at_k, long step_k, const void *values,
                        long at_v, long step_v, const void *mask, long at_m, long step_m, int mask_kind,
                        const int type, long length, long size, float scale, float *scores, void *out, long at_out) {
    float *asked = scores + length, *sum = asked + size, most = -INFINITY, total = 0;
    SIMD()
    for (long d = 0; d < size; d++) asked[d] = load(query, at_q + d, type) * scale, sum[d] = 0;
    for (long s = 0; s < length; s++) {
        float score = 0;
        SIMD(reduction(+ : score))
        for (long d = 0; d < size; d++) score += asked[d] * load(keys, at_k + s * step_k + d, type);
        if (mask_kind == 1) score += load(mask, at_m + s * step_m, type);
        if (mask_kind == 2 && !((const uint8_t *)mask)[at_m + s * step_m]) score = -INFINITY;
        scores[s] = score;
        most = score > most ? score : most;
    }
    for (long s = 0; s < length; s++) {
        float weight = scores[s] == -INFINITY ? 0 : expf(scores[s] - most);
        total += weight;
        if (weight == 0) continue;
        SIMD()
        for (long d = 0; d < size; d++) sum[d] += weight * load(values, at_v + s * step_v + d, type);
    }
    SIMD()
    for (long d = 0; d < size; d++) store(out, at_out + d, sum[d] / total, type);
}

typedef void Attend(const void *query, long at_q, const void *keys, long at_k, long step_k, const void *values,
                    long at_v, long step_v, const void *mask, long at_m, long step_m, int mask_kind, int type,
                    long length, long size, float scale, float *scores, void *out, long at_out);

#define ATTEND(type) \
    attend_head(query, at_q, keys, at_k, step_k, values, at_v, step_v, mask, at_m, step_m, mask_kind, type, length, \
                size, scale, scores, out, at_out)
static void attend_plain(const void *query, long at_q, const void *keys, long at_k, long step_k, const void *values,
                         long at_v, long step_v, const void *mask, long at_m, long step_m, int mask_kind, int type,
                         long length, long size, float scale, float *scores, void *out, long at_out) {
    if (type == BFLOAT16) ATTEND(BFLOAT16);
    else ATTEND(FLOAT32);
}

#if HAS_VNNI_CODE
VNNI static void attend_vnni(const void *query, long at_q, const void *keys, long at_k, long step_k,
                             const void *values, long at_v, long step_v, const void *mask, long at_m, long step_m,
                             int mask_kind, int type, long length, long size, float scale, float *scores, void *out,
                             long at_out) {
    if (type == BFLOAT16) ATTEND(BFLOAT16);
    else ATTEND(FLOAT32);
}
#endif

INLINE void rms_norm_row(const void *x, const void *weight, const int type, long at, long width, float eps, void *out) {
    float square = 0;
    SIMD(reduction(+ : square))
    for (long d = 0; d < width; d++) square += load(x, at + d, type) * load(x, at + d, type);
    float scale = 1 / sqrtf(square / width + eps);
    SIMD()
    for (long d = 0; d < width; d++) {
        float normed = load(x, at + d, type) * scale;
        if (type == BFLOAT16) normed = from_bfloat16(to_bfloat16(normed));
        store(out, at + d, normed * load(weight, d, type), type);
    }
}

/* ---- what Python calls ---- */

static Split *split = split_plain;
static Product *product = product_plain;
static Quantize *quantize = quantize_plain;
static Attend *attend = attend_plain;

/* Choose the code for this processor, or with `plain` that for any. Returns 1 for byte dot products, 0 without. */
int blip2_prepare(int plain) {
    split = split_plain, product = product_plain, quantize = quantize_plain, attend = attend_plain;
#if HAS_VNNI_CODE
    if (!plain && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni")) {
        split = split_vnni, product = product_vnni, quantize = quantize_vnni, attend = attend_vnni;
        return 1;
    }
#endif
    (void)plain;
    return 0;
}

/* weight[channels][width] to codes and scales, for `padded` inputs, a whole number of groups. */
void blip2_quantize(const void *weight, int type, long channels, long width, long padded, long group, int bits,
                    uint8_t *codes, uint16_t *scales, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long c = 0; c < channels; c += TILE)
        quantize((const char *)weight + c * width * (type == BFLOAT16 ? 2 : 4), type,
                 channels - c < TILE ? channels - c : TILE, width, padded, group, bits,
                 codes + c * padded * bits / 8, scales + c * (padded / group));
}

/* out[rows][channels] = x[rows][width] times the weights, plus bias (or NULL). Returns 1 if there is no memory. */
int blip2_linear(const void *x, int type, long rows, long width, long padded, long group, int bits,
                 const uint8_t *codes, const uint16_t *scales, const float *bias, long channels, void *out,
                 int threads) {
    long plane = rows * padded, groups = padded / group;
    int8_t *planes = aligned_alloc(64, (2 * plane + rows * 4 + 2 * rows * groups * 4 + 63) / 64 * 64);
    if (!planes) return 1;
    float *steps = (float *)(planes + 2 * plane);
    int32_t *sums = (int32_t *)(steps + rows); /* [rows][2][groups] */
#pragma omp parallel for num_threads(threads) if (rows > 4)
    for (long r = 0; r < rows; r++)
        steps[r] = split((const char *)x + r * width * (type == BFLOAT16 ? 2 : 4), type, width, padded, group,
                         planes + r * padded, planes + plane + r * padded, sums + r * 2 * groups);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long c = 0; c < (channels + TILE - 1) / TILE * TILE; c += TILE) {
        long some = channels - c < TILE ? channels - c : TILE;
        for (long r = 0; r < rows; r += ROWS) { /* the tile stays in the cache while all rows pass by */
            int few = rows - r < ROWS ? (int)(rows - r) : ROWS;
            float totals[ROWS * TILE];
            product(planes + r * padded, sums + r * 2 * groups, padded, plane, group, few, bits,
                    codes + c * padded * bits / 8, scales + c * groups, totals);
            for (int i = 0; i < few; i++)
                for (long j = 0; j < some; j++)
                    store(out, (r + i) * channels + c + j,
                          fmaf(totals[i * TILE + j], steps[r + i] / 254, bias ? bias[c + j] : 0), type);
        }
    }
    free(planes);
    return 0;
}

/* The attention of one new token for each row and head, in float32 whatever is stored.
 *
 * query, keys, values: `rows` x `heads` x (1 or `length`) x `size` elements of a type; strides in elements, the last
 * one 1. mask: no mask (kind 0), added to the scores (1, of the type), or bytes, 0 for what is not looked at (2);
 * its strides may be 0. out[rows][heads * size]. Returns 1 if there is no memory. */
int blip2_attend(const void *query, const void *keys, const void *values, const void *mask, int mask_kind,
                 const long *strides, int type, long rows, long heads, long length, long size, float scale, void *out,
                 int threads) {
    const long *q = strides, *k = strides + 2, *v = strides + 5, *m = strides + 8;
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (rows * heads * length * size > 30000)
    for (long pair = 0; pair < rows * heads; pair++) {
        float *scores = malloc((length + 2 * size) * sizeof(float));
        if (!scores) {
            failed = 1;
            continue;
        }
        long row = pair / heads, head = pair % heads;
        attend(query, row * q[0] + head * q[1], keys, row * k[0] + head * k[1], k[2], values,
               row * v[0] + head * v[1], v[2], mask, row * m[0] + head * m[1], m[2], mask_kind, type, length, size,
               scale, scores, out, pair * size);
        free(scores);
    }
    return failed;
}

/* Root-mean-square norm of rows: out = weight * (x / rms(x)), rounded to the type before the weight as T5 has it. */
void blip2_rms_norm(const void *x, const void *weight, int type, long rows, long width, float eps, void *out) {
    for (long r = 0; r < rows; r++) {
        if (type == BFLOAT16) rms_norm_row(x, weight, BFLOAT16, r * width, width, eps, out);
        else rms_norm_row(x, weight, FLOAT32, r * width, width, eps, out);
    }
}
