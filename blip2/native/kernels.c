/* The operations that take most of the time of decoding on a CPU: products with int8 and int4 weights, and attention
 * for single tokens, which would take longer than the products as separate operations. There is code for CPUs with
 * byte dot products (VNNI), for CPUs with AVX2, and for any CPU; the products are identical to the last bit.
 *
 * A row of activations is stored as two planes of signed bytes. The second holds the rounding error of the first:
 *
 *     x[k]  ~  step * (high[k] + low[k] / 254),      step = max |x| / 127
 *
 * So it has 15 bits of precision, also with outliers, and does not depend on other rows. The products are sums of
 * integers: exact, in any order and in any batch. A weight in a register is multiplied by both planes, so for a few
 * rows the time is that of reading the weights from memory.
 *
 * Weights are stored in tiles of 32 output channels, in the order in which the products read them. A code represents
 * (code - 128) * scale in 8 bits, (code - 8) * scale in 4 bits:
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
#include <cpuid.h>
#include <immintrin.h>
#define IS_X86 1
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define AVX2 __attribute__((target("avx2,fma")))
#else
#define IS_X86 0
#endif

/* Functions of OpenMP, declared here because some compilers that support OpenMP (Apple's) come without its header. */
int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* Lets the compiler use SIMD, also where that changes the order of floating-point sums. */
#define PRAGMA(text) _Pragma(#text)
#define SIMD(clauses) PRAGMA(omp simd clauses)
#define INLINE static inline __attribute__((always_inline))
#define TILE 32
#define ROWS 4      /* rows of activations multiplied by a tile at a time */
#define LEAST 4e-37f /* a row whose values are all smaller counts as zeros: 127 / largest would be infinite */
#define AHEAD 16384 /* prefetch distance in bytes */

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

/* ---- activations: the planes of a row, their sums over each group, and its step ---- */

typedef float Split(const void *row, int type, long width, long padded, long group, int8_t *high, int8_t *low,
                    int32_t *sums);

INLINE float split_typed(const void *row, const int type, long width, long padded, long group, int8_t *high,
                         int8_t *low, int32_t *sums) {
    float largest = 0, poison = 0;
    SIMD(reduction(max : largest) reduction(+ : poison))
    for (long k = 0; k < width; k++) {
        float x = load(row, k, type), size = fabsf(x);
        largest = size > largest ? size : largest;
        poison += x - x; /* 0, unless x is infinite or NaN: then the step is, too */
    }
    long groups = padded / group;
    if (poison != 0) { /* not finite: nothing can be quantised, and the step is not finite either */
        memset(high, 0, padded), memset(low, 0, padded), memset(sums, 0, 2 * groups * sizeof *sums);
        return poison;
    }
    float inverse = largest > LEAST ? 127 / largest : 0;
    SIMD()
    for (long k = 0; k < width; k++) {
        float scaled = load(row, k, type) * inverse, rounded = rintf(scaled);
        high[k] = (int8_t)(int)rounded;
        low[k] = (int8_t)(int)rintf((scaled - rounded) * 254);
    }
    memset(high + width, 0, padded - width);
    memset(low + width, 0, padded - width);
    for (long g = 0; g < groups; g++) {
        int32_t high_sum = 0, low_sum = 0;
        SIMD(reduction(+ : high_sum, low_sum))
        for (long k = g * group; k < (g + 1) * group; k++) high_sum += high[k], low_sum += low[k];
        sums[g] = high_sum, sums[groups + g] = low_sum;
    }
    return largest / 127;
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

/* ---- output: some channels of a row; `scale` is its step / 254 ---- */

typedef void Finish(const float *totals, float scale, const float *bias, long some, void *out, long at, int type);

INLINE void finish_typed(const float *totals, float scale, const float *bias, long some, void *out, long at,
                         const int type) {
    SIMD()
    for (long c = 0; c < some; c++) store(out, at + c, fmaf(totals[c], scale, bias ? bias[c] : 0), type);
}

/* ---- weights: the codes and scales of a tile; channels beyond `channels` are zeros. Returns 1 if a weight is
 * infinite or NaN; its group is then zeros ---- */

typedef int Quantize(const void *weight, int type, long channels, long width, long padded, long group, int bits,
                      uint8_t *codes, uint16_t *scales);

/* A power of two for a group with this largest value. Multiplied by it, neither the squares of the group's sums nor the
 * inverse of its scale overflow a float. A power of two changes no digits. */
INLINE float factor_of(float largest) { return largest > 0x1p46f ? 0x1p-87f : largest < 0x1p-46f ? 0x1p97f : 1; }

/* The scale of a group in 4 bits: of several candidates the one with the least squared error. The largest value becomes
 * code 0 or a code near it, since -8 is further from zero than 7. Sums have the same number of parts on every CPU, so
 * the codes are identical, also to those of quantized.py. */
#define LANES 8
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
        float inverse = -ends[i] / extreme, product = 0, square = 0, products[LANES] = {0}, squares[LANES] = {0};
        for (long k = 0; k < group; k += LANES) {
            SIMD()
            for (int j = 0; j < LANES; j++) {
                float code = clamp(rintf(values[k + j] * inverse), -8, 7);
                products[j] += values[k + j] * code;
                squares[j] += code * code;
            }
        }
        for (int j = 0; j < LANES; j++) product += products[j], square += squares[j];
        /* The best scale for these codes is product / square. It reduces the squared error by product^2 / square. */
        if (product * product > best * square) best = product * product / square, scale = product / square;
    }
    return scale;
}

INLINE int quantize_typed(const void *weight, const int type, long channels, long width, long padded, long group,
                           int bits, uint8_t *codes, uint16_t *scales) {
    const int zero = 1 << (bits - 1);
    int is_poisoned = 0;
    memset(codes, bits == 8 ? 0x80 : 0x88, padded * TILE * bits / 8);
    memset(scales, 0, padded / group * TILE * 2);
    for (long c = 0; c < channels; c++)
        for (long g = 0; g < padded / group; g++) {
            float values[group], largest = 0, poison = 0;
            uint8_t code[group];
            long known = width - g * group < group ? width - g * group : group;
            SIMD(reduction(max : largest) reduction(+ : poison))
            for (long k = 0; k < known; k++) {
                float value = load(weight, c * width + g * group + k, type), size = fabsf(value);
                largest = size > largest ? size : largest;
                poison += value - value; /* 0, unless the value is infinite or NaN */
                values[k] = value;
            }
            if (poison != 0) {
                is_poisoned = 1;
                continue;
            }
            float factor = factor_of(largest);
            SIMD()
            for (long k = 0; k < known; k++) values[k] *= factor;
            for (long k = known; k < group; k++) values[k] = 0;
            float scale = bits == 8 ? largest / 127 : scale_of_group(values, group) / factor;
            scale = from_bfloat16(to_bfloat16(scale));
            float inverse = scale != 0 ? 1 / (scale * factor) : 0, first = bits == 8 ? -127 : -8, last = zero - 1;
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
    return is_poisoned;
}

/* ---- products with byte dot products, and with AVX2 ---- */

#if IS_X86

VNNI INLINE __m512i four_bytes(const int8_t *bytes) {
    int32_t four;
    memcpy(&four, bytes, 4);
    return _mm512_set1_epi32(four);
}

/* The instruction needs one unsigned operand, so codes are multiplied as they are; the initial value of the sums
 * accounts for the zero point. A register holds 16 channels of 4 inputs each. */
VNNI INLINE void rows_vnni(const int8_t *planes, const int32_t *sums, long padded, long plane, long group,
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

/* AVX2 multiplies and adds pairs: of bytes into 16 bits, which two codes of 8 bits would overflow, and of 16 bits into
 * 32. So codes of 8 bits are multiplied in 16 bits, the first and third byte of four, then the second and fourth. Codes
 * of 4 bits are multiplied as bytes, low halves, then high halves: over 32 inputs a sum is at most 8 * 2 * 15 * 127,
 * which fits into 16 bits. There are registers for the sums of 16 channels of one row, or 8 channels of four rows; 32
 * inputs of a tile are processed in such parts. */
#define ADD_PRODUCT(sum, codes, x) \
    sum = bits == 8 ? _mm256_add_epi32(sum, _mm256_madd_epi16(codes, x)) \
                    : _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x))
AVX2 INLINE void rows_avx2(const int8_t *planes, const int32_t *sums, long padded, long plane, long group,
                           const int rows, const int bits, const uint8_t *codes, const uint16_t *scales, float *out) {
    const long groups = padded / group;
    const int wide = rows == 1 ? 2 : 1; /* registers of 8 channels */
    const __m256i mask = bits == 8 ? _mm256_set1_epi16(255) : _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256 total[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) total[r][c] = _mm256_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m256i sum[ROWS][2][4];
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < 2; p++)
                for (int c = 0; c < 4; c++)
                    sum[r][p][c] = _mm256_set1_epi32(-(1 << (bits - 1)) * sums[(r * 2 + p) * groups + g]);
        for (long k = g * group; k < (g + 1) * group; k += 32) {
            const long left = ((g + 1) * group - k) / 4, steps = bits == 4 ? 4 : left < 8 ? left : 8;
            const uint8_t *bytes = codes + k * bits / 32 * TILE * 4;
            int32_t x[ROWS][2][2][8]; /* groups of four activations, in two parts */
            for (int r = 0; r < rows; r++)
                for (int p = 0; p < 2; p++) {
                    __m256i all = _mm256_loadu_si256((const __m256i *)(planes + p * plane + r * padded + k));
                    __m256i first = bits == 8 ? _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8) : all;
                    __m256i second = bits == 8 ? _mm256_srai_epi16(all, 8) : _mm256_srli_epi64(all, 32);
                    _mm256_storeu_si256((__m256i *)x[r][p][0], first);
                    _mm256_storeu_si256((__m256i *)x[r][p][1], second);
                }
            for (int c = 0; c < 4; c += wide) {
                __m256i part[ROWS][2][2];
                for (int r = 0; r < rows; r++)
                    for (int p = 0; p < 2; p++)
                        for (int w = 0; w < wide; w++) part[r][p][w] = _mm256_setzero_si256();
                PRAGMA(GCC unroll 1) /* one step after another is what there are registers for */
                for (int j = 0; j < steps; j++) {
                    const uint8_t *here = bytes + (j * 4 + c) * 32;
                    if (c % 2 == 0) _mm_prefetch((const char *)here + AHEAD, _MM_HINT_T0);
                    __m256i first[2], second[2];
                    for (int w = 0; w < wide; w++) {
                        __m256i both = _mm256_loadu_si256((const __m256i *)here + w);
                        first[w] = _mm256_and_si256(both, mask);
                        second[w] = bits == 8 ? _mm256_srli_epi16(both, 8)
                                              : _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
                    }
                    for (int r = 0; r < rows; r++)
                        for (int p = 0; p < 2; p++) {
                            const int at = bits == 8 ? j : 2 * j;
                            __m256i a = _mm256_set1_epi32(x[r][p][0][at]), b = _mm256_set1_epi32(x[r][p][1][at]);
                            for (int w = 0; w < wide; w++) {
                                ADD_PRODUCT(part[r][p][w], first[w], a);
                                ADD_PRODUCT(part[r][p][w], second[w], b);
                            }
                        }
                }
                for (int r = 0; r < rows; r++)
                    for (int p = 0; p < 2; p++)
                        for (int w = 0; w < wide; w++) {
                            __m256i few = part[r][p][w];
                            if (bits == 4) few = _mm256_madd_epi16(few, ones);
                            sum[r][p][c + w] = _mm256_add_epi32(sum[r][p][c + w], few);
                        }
            }
        }
        for (int c = 0; c < 4; c++) {
            __m128i half = _mm_loadu_si128((const __m128i *)(scales + g * TILE + c * 8));
            __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
            for (int r = 0; r < rows; r++) {
                __m256 both = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][0][c]), _mm256_set1_ps(254),
                                              _mm256_cvtepi32_ps(sum[r][1][c]));
                total[r][c] = _mm256_fmadd_ps(both, scale, total[r][c]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) _mm256_storeu_ps(out + r * TILE + c * 8, total[r][c]);
}

#define ROWS_OF(name, rows, bits) rows_##name(planes, sums, padded, plane, group, rows, bits, codes, scales, out)
#define PRODUCT(name, target) \
    target static void product_##name(const int8_t *planes, const int32_t *sums, long padded, long plane, long group, \
                                      int rows, int bits, const uint8_t *codes, const uint16_t *scales, float *out) { \
        switch (rows * 8 + bits) { /* a separate loop for each, with everything in registers */ \
            case 1 * 8 + 4: ROWS_OF(name, 1, 4); break; \
            case 2 * 8 + 4: ROWS_OF(name, 2, 4); break; \
            case 3 * 8 + 4: ROWS_OF(name, 3, 4); break; \
            case 4 * 8 + 4: ROWS_OF(name, 4, 4); break; \
            case 1 * 8 + 8: ROWS_OF(name, 1, 8); break; \
            case 2 * 8 + 8: ROWS_OF(name, 2, 8); break; \
            case 3 * 8 + 8: ROWS_OF(name, 3, 8); break; \
            default: ROWS_OF(name, 4, 8); \
        } \
    }
PRODUCT(avx2, AVX2)
PRODUCT(vnni, VNNI)

#endif

/* ---- single tokens ---- */

/* e^x with a relative error below 1e-7: 2^n times a polynomial of the remainder, whose absolute value is at most
 * ln(2) / 2. */
INLINE float exponential(float x) {
    x = clamp(x, -87, 88);
    float n = rintf(x * 1.44269504f), left = x - n * 0.693145752f - n * 1.42860677e-6f; /* the first is exact */
    float value = 1.9875691500e-4f;
    value = value * left + 1.3981999507e-3f;
    value = value * left + 8.3334519073e-3f;
    value = value * left + 4.1665795894e-2f;
    value = value * left + 1.6666665459e-1f;
    value = value * left + 5.0000001201e-1f;
    value = value * left * left + left + 1;
    uint32_t power = (uint32_t)((int)n + 127) << 23;
    float two_to_n;
    memcpy(&two_to_n, &power, 4);
    return value * two_to_n;
}

INLINE void attend_head(const void *query, long at_q, const void *keys, long at_k, long step_k, const void *values,
                        long at_v, long step_v, const void *mask, long at_m, long step_m, int mask_kind,
                        const int type, long length, long size, float scale, float cap, float *scores, void *out,
                        long at_out) {
    float *asked = scores + length, *sum = asked + size, most = -INFINITY, total = 0;
    SIMD()
    for (long d = 0; d < size; d++) asked[d] = load(query, at_q + d, type) * scale, sum[d] = 0;
    for (long s = 0; s < length; s++) {
        float score = 0;
        SIMD(reduction(+ : score))
        for (long d = 0; d < size; d++) score += asked[d] * load(keys, at_k + s * step_k + d, type);
        if (cap > 0) score = cap * tanhf(score / cap);
        if (mask_kind == 1) score += load(mask, at_m + s * step_m, type);
        if (mask_kind == 2 && !((const uint8_t *)mask)[at_m + s * step_m]) score = -INFINITY;
        scores[s] = score;
        most = score > most ? score : most;
    }
    SIMD(reduction(+ : total))
    for (long s = 0; s < length; s++) {
        float weight = scores[s] == -INFINITY ? 0 : exponential(scores[s] - most);
        scores[s] = weight;
        total += weight;
    }
    for (long s = 0; s < length; s++) {
        if (scores[s] == 0) continue;
        SIMD()
        for (long d = 0; d < size; d++) sum[d] += scores[s] * load(values, at_v + s * step_v + d, type);
    }
    SIMD()
    for (long d = 0; d < size; d++) store(out, at_out + d, sum[d] / total, type);
}

typedef void Attend(const void *query, long at_q, const void *keys, long at_k, long step_k, const void *values,
                    long at_v, long step_v, const void *mask, long at_m, long step_m, int mask_kind, int type,
                    long length, long size, float scale, float cap, float *scores, void *out, long at_out);

/* With an offset of the weights (Gemma) the multiplication comes before any rounding. */
INLINE void rms_norm_row(const void *x, const void *weight, const int type, long at, long width, float eps,
                         float offset, void *out) {
    float square = 0;
    SIMD(reduction(+ : square))
    for (long d = 0; d < width; d++) square += load(x, at + d, type) * load(x, at + d, type);
    float scale = 1 / sqrtf(square / width + eps);
    SIMD()
    for (long d = 0; d < width; d++) {
        float normed = load(x, at + d, type) * scale;
        if (type == BFLOAT16 && offset == 0) normed = from_bfloat16(to_bfloat16(normed));
        store(out, at + d, normed * (load(weight, d, type) + offset), type);
    }
}

/* ---- activation functions between the products of a feed-forward layer ---- */

/* GELU, x * (1/2 + erf(x / sqrt(2)) / 2), by a quotient of polynomials fitted to an error below 2e-7 times x. */
INLINE float gelu(float x) {
    float at = clamp(x, -5.5f, 5.5f), s = at * at, above = 2.2915927e-8f, below = 1.2000953e-6f;
    above = above * s + 6.3214025e-6f, below = below * s + 7.261424e-5f;
    above = above * s + 0.00016576196f, below = below * s + 0.0018671553f;
    above = above * s + 0.0046585454f, below = below * s + 0.028477507f;
    above = above * s + 0.033562798f, below = below * s + 0.25079563f;
    above = above * s + 0.39894226f, below = below * s + 1;
    return x < -5.5f ? 0 : x * (0.5f + at * above / below);
}

enum { RELU, SILU, GELU, GELU_TANH };

INLINE float activated(float x, const int function) {
    if (function == RELU) return x < 0 ? 0 : x;
    if (function == SILU) return x / (1 + exponential(-x));
    if (function == GELU) return gelu(x);
    float inner = 0.797884561f * (x + 0.044715f * x * x * x);
    return x * (1 - 1 / (exponential(2 * inner) + 1));
}

/* Applied to some numbers of a row. With a gate (at_up >= 0) the results are multiplied by the numbers at at_up. */
typedef void Activate(const void *x, long at, long at_up, int function, long some, int type, void *out, long at_out);

INLINE void activate_typed(const void *x, long at, long at_up, const int function, long some, const int type, void *out,
                           long at_out) {
    SIMD()
    for (long d = 0; d < some; d++) {
        float value = activated(load(x, at + d, type), function);
        if (at_up >= 0) {
            if (type == BFLOAT16) value = from_bfloat16(to_bfloat16(value));
            value *= load(x, at_up + d, type);
        }
        store(out, at_out + d, value, type);
    }
}

/* ---- the same functions for each kind of CPU, compiled with its instructions ---- */

typedef struct {
    Split *split;
    Product *product;
    Finish *finish;
    Quantize *quantize;
    Attend *attend;
    Activate *activate;
} Kernels;

#define SPLIT(type) split_typed(row, type, width, padded, group, high, low, sums)
#define FINISH(type) finish_typed(totals, scale, bias, some, out, at, type)
#define QUANTIZE(type) quantize_typed(weight, type, channels, width, padded, group, bits, codes, scales)
#define ATTEND(type) \
    attend_head(query, at_q, keys, at_k, step_k, values, at_v, step_v, mask, at_m, step_m, mask_kind, type, length, \
                size, scale, cap, scores, out, at_out)
#define ACTIVATED(function, type) activate_typed(x, at, at_up, function, some, type, out, at_out)
#define KERNELS(name, target) \
    target static float split_##name(const void *row, int type, long width, long padded, long group, int8_t *high, \
                                     int8_t *low, int32_t *sums) { \
        return type == BFLOAT16 ? SPLIT(BFLOAT16) : SPLIT(FLOAT32); \
    } \
    target static void finish_##name(const float *totals, float scale, const float *bias, long some, void *out, \
                                     long at, int type) { \
        if (type == BFLOAT16) FINISH(BFLOAT16); \
        else FINISH(FLOAT32); \
    } \
    target static int quantize_##name(const void *weight, int type, long channels, long width, long padded, \
                                      long group, int bits, uint8_t *codes, uint16_t *scales) { \
        return type == BFLOAT16 ? QUANTIZE(BFLOAT16) : QUANTIZE(FLOAT32); \
    } \
    target static void attend_##name(const void *query, long at_q, const void *keys, long at_k, long step_k, \
                                     const void *values, long at_v, long step_v, const void *mask, long at_m, \
                                     long step_m, int mask_kind, int type, long length, long size, float scale, \
                                     float cap, float *scores, void *out, long at_out) { \
        if (type == BFLOAT16) ATTEND(BFLOAT16); \
        else ATTEND(FLOAT32); \
    } \
    target static void activate_##name(const void *x, long at, long at_up, int function, long some, int type, \
                                       void *out, long at_out) { \
        switch (function * 2 + type) { \
            case RELU * 2 + FLOAT32: ACTIVATED(RELU, FLOAT32); break; \
            case RELU * 2 + BFLOAT16: ACTIVATED(RELU, BFLOAT16); break; \
            case SILU * 2 + FLOAT32: ACTIVATED(SILU, FLOAT32); break; \
            case SILU * 2 + BFLOAT16: ACTIVATED(SILU, BFLOAT16); break; \
            case GELU * 2 + FLOAT32: ACTIVATED(GELU, FLOAT32); break; \
            case GELU * 2 + BFLOAT16: ACTIVATED(GELU, BFLOAT16); break; \
            case GELU_TANH * 2 + FLOAT32: ACTIVATED(GELU_TANH, FLOAT32); break; \
            default: ACTIVATED(GELU_TANH, BFLOAT16); \
        } \
    } \
    static const Kernels name = { \
        split_##name, product_##name, finish_##name, quantize_##name, attend_##name, activate_##name, \
    };

KERNELS(plain, )
#if IS_X86
KERNELS(avx2, AVX2)
KERNELS(vnni, VNNI)
#endif

/* ---- functions called from Python ---- */

static const Kernels *kernels = &plain;

/* Choose the code for this CPU, up to a level: 0 for any CPU, 1 for AVX2, 2 for byte dot products. Returns the level
 * chosen. */
int blip2_prepare(int most) {
    int level = 0;
    kernels = &plain;
#if IS_X86
    if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels = &avx2, level = 1;
    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        kernels = &vnni, level = 2;
#endif
    (void)most;
    return level;
}

/* Quantises weight[channels][width] to codes and scales, for `padded` inputs, a whole number of groups. Returns 1 if a
 * weight is infinite or NaN, which has no code. */
int blip2_quantize(const void *weight, int type, long channels, long width, long padded, long group, int bits,
                   uint8_t *codes, uint16_t *scales, int threads) {
    int is_poisoned = 0;
#pragma omp parallel for num_threads(threads) reduction(| : is_poisoned)
    for (long c = 0; c < channels; c += TILE)
        is_poisoned |= kernels->quantize(
            (const char *)weight + c * width * (type == BFLOAT16 ? 2 : 4), type, channels - c < TILE ? channels - c : TILE,
            width, padded, group, bits, codes + c * padded * bits / 8, scales + c * (padded / group));
    return is_poisoned;
}

/* Bytes of the planes, steps and sums of this many rows. */
INLINE long planes_bytes(long rows, long padded, long group) {
    /* 32 more: the last activations of the last row are read as a whole block */
    return (2 * rows * padded + rows * 4 + 2 * rows * (padded / group) * 4 + 32 + 63) / 64 * 64;
}

/* out[rows][channels] = x[rows][width] times the weights, plus bias (or NULL). `planes` is memory of planes_bytes. */
typedef struct {
    const void *x;
    long type, rows, width, padded, group, bits, channels;
    const uint8_t *codes;
    const uint16_t *scales;
    const float *bias;
    void *out;
    int8_t *planes;
} Multiplication;

/* First step: quantise some rows to their planes. */
static void split_rows(const Multiplication *m, long begin, long end) {
    long plane = m->rows * m->padded, groups = m->padded / m->group;
    float *steps = (float *)(m->planes + 2 * plane);
    int32_t *sums = (int32_t *)(steps + m->rows); /* [rows][2][groups] */
    for (long r = begin; r < end; r++)
        steps[r] = kernels->split((const char *)m->x + r * m->width * (m->type == BFLOAT16 ? 2 : 4), (int)m->type,
                                  m->width, m->padded, m->group, m->planes + r * m->padded,
                                  m->planes + plane + r * m->padded, sums + r * 2 * groups);
}

/* Second step: multiply all rows by a tile of weights, which stays in the cache meanwhile. */
static void multiply_tile(const Multiplication *m, long tile) {
    long plane = m->rows * m->padded, groups = m->padded / m->group, c = tile * TILE;
    const float *steps = (float *)(m->planes + 2 * plane);
    const int32_t *sums = (int32_t *)(steps + m->rows);
    long some = m->channels - c < TILE ? m->channels - c : TILE;
    for (long r = 0; r < m->rows; r += ROWS) {
        int few = m->rows - r < ROWS ? (int)(m->rows - r) : ROWS;
        float totals[ROWS * TILE];
        kernels->product(m->planes + r * m->padded, sums + r * 2 * groups, m->padded, plane, m->group, few,
                         (int)m->bits, m->codes + c * m->padded * m->bits / 8, m->scales + c * groups, totals);
        for (int i = 0; i < few; i++)
            kernels->finish(totals + i * TILE, steps[r + i] / 254, m->bias ? m->bias + c : NULL, some, m->out,
                            (r + i) * m->channels + c, (int)m->type);
    }
}

INLINE long tiles_of(long channels) { return (channels + TILE - 1) / TILE; }

/* Both steps, for Python. Returns 1 if there is not enough memory. */
int blip2_linear(const void *x, int type, long rows, long width, long padded, long group, int bits,
                 const uint8_t *codes, const uint16_t *scales, const float *bias, long channels, void *out,
                 int threads) {
    int8_t *planes = aligned_alloc(64, planes_bytes(rows, padded, group));
    if (!planes) return 1;
    const Multiplication m = {x, type, rows, width, padded, group, bits, channels, codes, scales, bias, out, planes};
#pragma omp parallel for num_threads(threads) if (rows > 4)
    for (long r = 0; r < rows; r++) split_rows(&m, r, r + 1);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long tile = 0; tile < tiles_of(channels); tile++) multiply_tile(&m, tile);
    free(planes);
    return 0;
}

/* ---- images: with so many rows the time is that of the arithmetic. Activations are quantised to 7 bits, one plane,
 * and a band of rows is multiplied by one tile at a time. There is only code for CPUs with byte dot products; others
 * are as fast in float32, see quantized.py ---- */

#define BAND 13 /* rows whose sums fill the registers; 257, the tokens of a picture, are 20 bands but for 3 rows */
#define BANDS 32 /* that all tiles pass by, one after the other: what they read stays in the cache */

#if IS_X86

typedef struct {
    long width, padded, channels;
    const uint8_t *codes;
    const uint16_t *scales;
    const float *bias;
    int type, has_gelu;
} Layer;

/* Quantises a row to codes, in groups of four that are BAND groups apart, and writes their sum; returns the step. */
VNNI INLINE float round_typed(const void *row, const int type, long width, long padded, int8_t *fours, int32_t *sum) {
    float largest = 0, poison = 0;
    int32_t total = 0;
    int8_t codes[padded];
    SIMD(reduction(max : largest) reduction(+ : poison))
    for (long k = 0; k < width; k++) {
        float x = load(row, k, type), size = fabsf(x);
        largest = size > largest ? size : largest;
        poison += x - x;
    }
    float inverse = poison == 0 && largest > LEAST ? 127 / largest : 0;
    memset(codes, 0, padded);
    if (poison == 0) {
        SIMD(reduction(+ : total))
        for (long k = 0; k < width; k++) {
            int code = (int)rintf(load(row, k, type) * inverse);
            codes[k] = (int8_t)code;
            total += code;
        }
    }
    for (long k = 0; k < padded; k += 4) memcpy(fours + k * BAND, codes + k, 4);
    *sum = total;
    return poison != 0 ? poison : largest / 127;
}

VNNI static float round_row(const void *row, int type, long width, long padded, int8_t *fours, int32_t *sum) {
    return type == BFLOAT16 ? round_typed(row, BFLOAT16, width, padded, fours, sum)
                            : round_typed(row, FLOAT32, width, padded, fours, sum);
}

VNNI static void multiply_band(const int8_t *fours, const uint8_t *codes, long padded, int32_t sums[BAND][TILE]) {
    __m512i left_sums[BAND], right_sums[BAND];
    PRAGMA(GCC unroll 16)
    for (int r = 0; r < BAND; r++) left_sums[r] = right_sums[r] = _mm512_setzero_si512();
    for (long k = 0; k < padded; k += 4, fours += BAND * 4, codes += TILE * 4) {
        __m512i left = _mm512_loadu_si512(codes), right = _mm512_loadu_si512(codes + 64);
        PRAGMA(GCC unroll 16)
        for (int r = 0; r < BAND; r++) {
            __m512i four = four_bytes(fours + r * 4);
            left_sums[r] = _mm512_dpbusd_epi32(left_sums[r], left, four);
            right_sums[r] = _mm512_dpbusd_epi32(right_sums[r], right, four);
        }
    }
    PRAGMA(GCC unroll 16)
    for (int r = 0; r < BAND; r++) {
        _mm512_storeu_si512(sums[r], left_sums[r]);
        _mm512_storeu_si512(sums[r] + 16, right_sums[r]);
    }
}

VNNI INLINE void finish_band(const Layer *layer, int32_t sums[BAND][TILE], const int32_t *row_sums, const float *steps,
                             long rows, long channel, void *out, const int type, const int has_gelu) {
    long some = layer->channels - channel < TILE ? layer->channels - channel : TILE;
    float scales[TILE], bias[TILE] = {0};
    for (int c = 0; c < TILE; c++) scales[c] = from_bfloat16(layer->scales[channel + c]);
    if (layer->bias) memcpy(bias, layer->bias + channel, some * sizeof *bias);
    for (long r = 0; r < rows; r++) {
        float values[TILE], step = steps[r];
        uint32_t zero = 128 * (uint32_t)row_sums[r]; /* sums may wrap around before the subtraction, not after it */
        SIMD()
        for (int c = 0; c < TILE; c++) {
            float value = (float)(int32_t)((uint32_t)sums[r][c] - zero) * scales[c] * step + bias[c];
            values[c] = has_gelu ? gelu(value) : value;
        }
        SIMD()
        for (long c = 0; c < some; c++) store(out, r * layer->channels + channel + c, values[c], type);
    }
}

#define FINISH_BAND(type, has_gelu) finish_band(layer, sums, row_sums, steps, rows, channel, out, type, has_gelu)
VNNI static void band_vnni(const Layer *layer, const int8_t *fours, const int32_t *row_sums, const float *steps,
                           long rows, long channel, void *out) {
    int32_t sums[BAND][TILE];
    multiply_band(fours, layer->codes + channel * layer->padded, layer->padded, sums);
    if (layer->type == BFLOAT16) {
        if (layer->has_gelu) FINISH_BAND(BFLOAT16, 1);
        else FINISH_BAND(BFLOAT16, 0);
    } else {
        if (layer->has_gelu) FINISH_BAND(FLOAT32, 1);
        else FINISH_BAND(FLOAT32, 0);
    }
}
#endif

/* out[rows][channels] = x[rows][width] in 8 bits times weights of 8 bits, plus bias (or NULL), optionally followed by a
 * GELU. Returns 1 if there is not enough memory, 2 if this CPU lacks the instructions. */
int blip2_linear_of_many(const void *x, int type, long rows, long width, long padded, const uint8_t *codes,
                         const uint16_t *scales, const float *bias, long channels, int has_gelu, void *out,
                         int threads) {
#if IS_X86
    if (kernels != &vnni) return 2;
    const Layer layer = {width, padded, channels, codes, scales, bias, type, has_gelu};
    const long bands = (rows + BAND - 1) / BAND, size = type == BFLOAT16 ? 2 : 4;
    int8_t *fours = aligned_alloc(64, (bands * BAND * (padded + 8) + 63) / 64 * 64);
    if (!fours) return 1;
    float *steps = (float *)(fours + bands * BAND * padded);
    int32_t *sums = (int32_t *)(steps + bands * BAND);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < bands; b++) {
        int8_t *band = fours + b * BAND * padded;
        if ((b + 1) * BAND > rows) memset(band, 0, BAND * padded);
        for (long r = b * BAND; r < rows && r < (b + 1) * BAND; r++)
            steps[r] = round_row((const char *)x + r * width * size, type, width, padded, band + r % BAND * 4, sums + r);
    }
    const long tiles = (channels + TILE - 1) / TILE;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic, 2)
    for (long first = 0; first < bands; first += BANDS)
        for (long t = 0; t < tiles; t++)
            for (long b = first; b < bands && b < first + BANDS; b++) {
                long r = b * BAND;
                band_vnni(&layer, fours + r * padded, sums + r, steps + r, rows - r < BAND ? rows - r : BAND,
                          t * TILE, (char *)out + r * channels * size);
            }
    free(fours);
    return 0;
#else
    return 2;
#endif
}

/* The attention of one new token for each row and head, computed in float32 for every type.
 *
 * query, keys, values: `rows` x `heads` x (1 or `length`) x `size` elements of a type; strides in elements, the last
 * one 1. mask: none (kind 0), added to the scores (kind 1, of the type), or bytes, 0 for a masked slot (kind 2);
 * its strides may be 0. out[rows][heads * size]. Returns 1 if there is not enough memory. */
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
        kernels->attend(query, row * q[0] + head * q[1], keys, row * k[0] + head * k[1], k[2], values,
               row * v[0] + head * v[1], v[2], mask, row * m[0] + head * m[1], m[2], mask_kind, type, length, size,
               scale, 0, scores, out, pair * size);
        free(scores);
    }
    return failed;
}

/* Root-mean-square norm of rows: out = weight * (x / rms(x)), rounded to the type before multiplying, as in T5. */
void blip2_rms_norm(const void *x, const void *weight, int type, long rows, long width, float eps, void *out) {
    for (long r = 0; r < rows; r++) {
        if (type == BFLOAT16) rms_norm_row(x, weight, BFLOAT16, r * width, width, eps, 0, out);
        else rms_norm_row(x, weight, FLOAT32, r * width, width, eps, 0, out);
    }
}

#include "program.c"

/* ---- search: vectors in half precision are read once, at the speed of the memory ---- */

#if IS_X86
/* Read from the CPU itself: __builtin_cpu_supports only knows the name "f16c" in new compilers. */
static int has_half_precision(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

__attribute__((target("avx2,fma,f16c"))) static float product_of_halves(const uint16_t *row, const float *query,
                                                                       long length) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    long k = 0;
    for (; k + 32 <= length; k += 32)
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + k + 8 * i))),
                                      _mm256_loadu_ps(query + k + 8 * i), sums[i]);
    float parts[8], sum = 0;
    _mm256_storeu_ps(parts, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    for (int i = 0; i < 8; i++) sum += parts[i];
    for (; k < length; k++) sum += _cvtsh_ss(row[k]) * query[k];
    return sum;
}
#endif

/* out[rows]: each row has `several` vectors of `length` in half precision; the largest product of one of them with the
 * query, or NaN if a product is NaN. Returns 1 if this CPU lacks the instructions. */
int blip2_greatest(const uint16_t *vectors, const float *query, long rows, long several, long length, float *out,
                   int threads) {
#if IS_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_half_precision()) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
        for (long r = 0; r < rows; r++) {
            float greatest = -INFINITY;
            for (long i = 0; i < several; i++) {
                float product = product_of_halves(vectors + (r * several + i) * length, query, length);
                if (product > greatest || product != product) greatest = product;
            }
            out[r] = greatest;
        }
        return 0;
    }
#endif
    return 1;
}

/* ---- checksums: CRC-32, as in zlib ---- */

#if IS_X86
/* Bit by bit, for the remaining bytes at the end of a row. */
static uint32_t checksum_of_few(uint32_t sum, const uint8_t *bytes, long count) {
    for (long i = 0; i < count; i++) {
        sum ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) sum = sum >> 1 ^ (0xedb88320u & -(sum & 1));
    }
    return sum;
}

/* Bytes before other bytes may be replaced by their remainder at that distance, which is a carry-less product: V. Gopal
 * and others, "Fast CRC computation for generic polynomials using PCLMULQDQ" (Intel, 2009), whose constants
 * for this polynomial are the remainders of x^(512 + 64), x^512 and x^(128 + 64), x^128, bits reversed. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t checksum_of_row(const uint8_t *bytes, long count) {
    uint32_t sum = 0xffffffff;
    if (count >= 64) {
        const __m128i four = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), one = _mm_set_epi64x(0xccaa009e, 0x1751997d0);
#define BLOCK(at) _mm_loadu_si128((const __m128i *)(bytes + (at)))
#define MOVED(block, by) _mm_xor_si128(_mm_clmulepi64_si128(block, by, 0x00), _mm_clmulepi64_si128(block, by, 0x11))
        __m128i blocks[4] = {_mm_xor_si128(BLOCK(0), _mm_cvtsi32_si128((int)sum)), BLOCK(16), BLOCK(32), BLOCK(48)};
        long at = 64;
        for (; at + 64 <= count; at += 64)
            for (int i = 0; i < 4; i++) blocks[i] = _mm_xor_si128(MOVED(blocks[i], four), BLOCK(at + 16 * i));
        for (int i = 1; i < 4; i++) blocks[i] = _mm_xor_si128(MOVED(blocks[i - 1], one), blocks[i]);
        uint8_t left[16];
        _mm_storeu_si128((__m128i *)left, blocks[3]);
#undef BLOCK
#undef MOVED
        sum = checksum_of_few(0, left, 16);
        bytes += at, count -= at;
    }
    return ~checksum_of_few(sum, bytes, count);
}
#endif

/* out[rows]: the checksum of each row of `width` bytes. Returns 1 if this CPU lacks the instructions. */
int blip2_checksums(const uint8_t *content, long rows, long width, uint32_t *out) {
#if IS_X86
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        for (long r = 0; r < rows; r++) out[r] = checksum_of_row(content + r * width, width);
        return 0;
    }
#endif
    return 1;
}

/* Identifies this file and the compiler options, so that an outdated library is recognised: see build.py. */
uint32_t blip2_source(void) { return BLIP2_SOURCE; }
