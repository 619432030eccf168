// The forward kernel of the scan with several states for bfloat16, in CUDA C++, compiled at run time; see README.md.
//
// A warp walks one path of one image, or a segment of it, for 16 channels and all states. Its states are matrices
// (16 channels, 8 states), laid out over the lanes like the results of a tensor core product. So tensor cores can
// compute the products of B with the inputs, which are added to the states, and the sums of the states times C.
//
// Lane 4 r + q has the channels of rows r and r + 8, and of each matrix the columns 2 q and 2 q + 1. Values of eight
// steps at a time (an octet) are matrices (16 channels, 8 steps) in the same layout.

constexpr int ROWS = 16, OCTET = 8, BLOCK_CHANNELS = ROWS * WARPS;
constexpr int MATRICES = (STATES + 7) / 8;
constexpr int X_ROW = BLOCK_CHANNELS + 8;            // rows in shared memory, without bank conflicts
constexpr int PATH = RANK + 2 * STATES;              // a path's values of low of a pixel: step sizes, B, C
constexpr int PATH_ROW = (PATH + 7) / 16 * 16 + 8;
constexpr int QUADS = 20;                            // floats between rows of step sizes

struct Shared {
    bf16 x[2][TILE][X_ROW];
    bf16 low[2][TILE][PATH_ROW];
    bf16 expansion[BLOCK_CHANNELS][LOW_ROW];
    int pixels[4][TILE];          // of a tile and of the next two
    float own[WARPS][8 * QUADS];  // of a warp: m of an octet, for each pair of rows four pairs of steps
};
static_assert(sizeof(Shared) == SHARED, "SHARED is not the size of Shared: correct forward_bytes in states_cuda.py");

// The channel of a row. After a transposition, a lane then has four channels side by side.
DEVICE int channel_of(int row) { return row % 8 / 2 * 4 + row / 8 * 2 + row % 2; }

// Start to copy the rows of a path's matrix that expands step sizes, (CHANNELS, ROW).
DEVICE void copy_expansion(Shared& shared, const bf16* expansion) {
    for (int place = threadIdx.x; place < BLOCK_CHANNELS * 2 * DEPTHS; place += THREADS) {
        const int row = place / (2 * DEPTHS), k = place % (2 * DEPTHS) * 8;
        const int d = blockIdx.x * BLOCK_CHANNELS + row / ROWS * ROWS + channel_of(row % ROWS);
        const bool is_there = k < ROW && d < CHANNELS;
        copy_later<16>(&shared.expansion[row][k], expansion + (is_there ? d * ROW + k : 0), is_there ? 16 : 0);
    }
}

// Start to copy the inputs of a tile, whose pixels `find_pixel` has stored.
DEVICE void begin_copy(Shared& shared, int tile, const bf16* x, const bf16* low) {
    const int steps = min(LENGTH - tile * TILE, TILE);
    const int* pixels = shared.pixels[tile & 3];
    copy_channels<BLOCK_CHANNELS, X_ROW>(&shared.x[tile & 1][0][0], x, pixels, steps);
    copy_low<PATH, PATH_ROW>(&shared.low[tile & 1][0][0], low, pixels, steps);
}

// The state of a column. If matrices come in pairs, the states of a lane in both are side by side.
DEVICE int state_of(int matrix, int column) {
    return STATES % 16 == 0 ? matrix / 2 * 16 + column / 2 * 4 + matrix % 2 * 2 + column % 2 : 8 * matrix + column;
}

// Load C for a lane's states in two matrices, from the row of low of a step; zeros for states that do not exist.
DEVICE void load_C(const bf16* low, int matrix, int q, unsigned& first, unsigned& second) {
    const bf16* C = low + RANK + STATES;
    if constexpr (STATES % 16 == 0 && RANK % 4 == 0) {
        const uint2 four = *(const uint2*)(C + 16 * (matrix / 2) + 4 * q);
        first = four.x, second = four.y;
    } else {
        unsigned values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = state_of(matrix + i / 2, 2 * q + i % 2);
            values[i] = n < STATES ? C[n] : 0;
        }
        first = values[0] | values[1] << 16, second = values[2] | values[3] << 16;
    }
}

// Load the low-rank step sizes k and k + 1 from a row of low, side by side; zeros beyond the rank.
DEVICE unsigned load_low(const bf16* low, int k, int last_k) {
    return last_k < RANK || k < RANK ? *(const unsigned*)(low + k) : 0u;
}

// Compute 2^x for x <= 0 on the ordinary arithmetic units, with a relative error of 3e-6; x below -126 counts as -126.
DEVICE float exp2_by_polynomial(float x) {
    x = fmaxf(x, -126.0f);
    const float shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds x, and leaves the whole part in the last bits
    const float f = x - (shifted - 12582912.0f);
    const float power = fmaf(f, fmaf(f, fmaf(f, fmaf(f, 0.0095828529f, 0.0559064262f), 0.2402409911f), 0.6931241751f), 1.0f);
    return __uint_as_float(__float_as_uint(power) + (__float_as_uint(shifted) << 23));
}

// Split a value into its first bits and the rest, both in bfloat16. Their sum has a relative error of 2^-16.
DEVICE unsigned split(float value) {
    const float first = __uint_as_float(__float_as_uint(value) & 0xffff0000u);
    return pack(first, value - first);
}

// Store a matrix (16 channels, 8 columns), whose rows r and r + 8 a lane has in pairs, with the channels side by side.
DEVICE void store_transposed(bf16* to, unsigned first, unsigned second, bool is_there) {
    const uint2 channels = make_uint2(transpose(first), transpose(second));
    if (is_there) store(to, channels);
}

// The arguments are those of `states_forward_kernel` in states_kernels.py, except that B and C are read from low.
// `saves` corresponds to SAVE there.
KERNEL states_forward(
    const bf16* x, const bf16* low, const bf16* expansion, const float* bias, const float* rates, const float* D,
    bf16* y, bf16* saved, const float* carry, const float* decay,
    int saves, int batch, int tiles_per_segment, int num_segments
) {
    SHARED_MEMORY;
    Shared& shared = *(Shared*)shared_memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4, path = blockIdx.y % 4;
    const i64 image = blockIdx.z;
    const int segment = is_reversed(path) ? num_segments - 1 - (int)blockIdx.y / 4 : blockIdx.y / 4;
    const int first_channel = blockIdx.x * BLOCK_CHANNELS + ROWS * warp;
    const i64 o_tiles = (image * 4 + path) * NUM_TILES;
    // A lane stores the channels 4 q to 4 q + 3 of its warp.
    const bool stores = CHANNELS % ROWS == 0 && CHANNELS % BLOCK_CHANNELS == 0 || first_channel + 4 * q < CHANNELS;
    y += (path * (i64)batch + image) * LENGTH * CHANNELS + first_channel + 4 * q;
    saved += (o_tiles * STATES + state_of(0, r)) * CHANNELS + first_channel + 4 * q;
    x += image * LENGTH * CHANNELS, low += image * LENGTH * LOW + path * (LOW / 4);

    float bias_of[2], D_of[2], A[MATRICES][4], h[MATRICES][4];
    unsigned rounded[MATRICES][2];  // h, the pairs of rows r and r + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int d = first_channel + channel_of(r + 8 * half), o_path = path * CHANNELS + min(d, CHANNELS - 1);
        const bool is_there = d < CHANNELS;
        bias_of[half] = is_there ? bias[o_path] * LOG2_E : 0.0f;
        D_of[half] = is_there ? D[o_path] : 0.0f;
#pragma unroll
        for (int matrix = 0; matrix < MATRICES; ++matrix)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = state_of(matrix, 2 * q + i);
                const bool has_state = is_there && n < STATES;
                float start = 0.0f;  // the state after the segments before this one
                for (int other = 0; other < segment; ++other) {
                    const i64 place = (((image * 4 + path) * num_segments + other) * STATES + n) * CHANNELS + d;
                    if (has_state) start = fmaf(decay[place], start, carry[place]);
                }
                h[matrix][2 * half + i] = start;
                A[matrix][2 * half + i] = has_state ? -rates[((i64)path * STATES + n) * CHANNELS + d] : 0.0f;
            }
    }
#pragma unroll
    for (int matrix = 0; matrix < MATRICES; ++matrix)
#pragma unroll
        for (int half = 0; half < 2; ++half) rounded[matrix][half] = pack(h[matrix][2 * half], h[matrix][2 * half + 1]);
    const int first = segment * tiles_per_segment, last = min(first + tiles_per_segment, NUM_TILES);
    float* own = shared.own[warp];
    // Lanes point to the rows of four matrices (8, 8) for `load_operand`.
    const bf16* of_rows = &shared.expansion[ROWS * warp + lane % 16][lane / 16 * 8];
    copy_expansion(shared, expansion + (i64)path * CHANNELS * ROW);
    begin(shared, first, first + 1, x, low);
    saved += (i64)first * STATES * CHANNELS;
    for (int tile = first; tile < last; ++tile) {
        turn_to_tile(shared, tile + 1, tile + 2, tile + 1 == last, x, low);
        const int buffer = tile & 1;
        if (saves)
#pragma unroll
            for (int matrix = 0; matrix < MATRICES; ++matrix)
                store_transposed(saved + (state_of(matrix, 0) - state_of(0, 0)) * CHANNELS, rounded[matrix][0],
                                 rounded[matrix][1], stores && (STATES % 8 == 0 || state_of(matrix, r) < STATES));
        saved += STATES * CHANNELS;
#pragma unroll
        for (int start = 0; start < TILE; start += OCTET) {
            const bf16* low_r = shared.low[buffer][start + r];
            float z[4] = {};
#pragma unroll
            for (int depth = 0; depth < DEPTHS; ++depth) {
                unsigned rows[4];
                load_operand(rows, of_rows + 16 * depth);
                const int k = 16 * depth + 2 * q;
                add_product(z, rows, load_low(low_r, k, 16 * depth + 7), load_low(low_r, k + 8, 16 * depth + 15));
            }
            // Values i are of row r + i / 2 * 8 and step 2 q + i % 2.
            float m[4], ys[4];
            unsigned inputs[2][2];  // of steps 2 q and 2 q + 1: left operands for the products with B
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2, step = i % 2;
                const float x_t = widened(shared.x[buffer][start + 2 * q + step][ROWS * warp + channel_of(r + 8 * half)]);
                m[i] = softplus(fmaf(z[i], LOG2_E, bias_of[half]));
                inputs[step][half] = split(m[i] * x_t * LN_2);
                ys[i] = D_of[half] * x_t;
            }
            __syncwarp();
            *(float4*)&own[QUADS * r + 4 * q] = make_float4(m[0], m[2], m[1], m[3]);
            __syncwarp();
            unsigned B[2][MATRICES];  // of steps 2 q and 2 q + 1, twice side by side
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int matrix = 0; matrix < MATRICES; ++matrix) {
                    const int n = state_of(matrix, r);
                    const unsigned value = n < STATES ? shared.low[buffer][start + 2 * q + step][RANK + n] : 0;
                    B[step][matrix] = value | value << 16;
                }
#pragma unroll
            for (int t = 0; t < OCTET; ++t) {
                const int pair = t / 2, step = t % 2;
                const float2 m_t = *(const float2*)&own[QUADS * r + 4 * pair + 2 * step];
                float sums[4] = {};  // all columns are y of this step
#pragma unroll
                for (int matrix = 0; matrix < MATRICES; ++matrix) {
                    // The inputs of the other steps are multiplied by zeros. So if one is infinite, this is NaN.
                    float drive[4] = {};
                    add_narrow_product(drive, inputs[step], q == pair ? B[step][matrix] : 0u);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float x = A[matrix][i] * (i < 2 ? m_t.x : m_t.y);
                        // The special function unit is the busiest, so one in 16 exponentials uses a polynomial.
                        const bool elsewhere = matrix % 2 == 1 && i == 3 && step == 1;
                        h[matrix][i] = fmaf(elsewhere ? exp2_by_polynomial(x) : exp2_fast(x), h[matrix][i], drive[i]);
                    }
                    rounded[matrix][0] = pack(h[matrix][0], h[matrix][1]);
                    rounded[matrix][1] = pack(h[matrix][2], h[matrix][3]);
                }
#pragma unroll
                for (int matrix = 0; matrix < MATRICES; matrix += 2) {
                    const int other = matrix + 1 < MATRICES ? matrix + 1 : matrix;
                    const unsigned pair_of[4] = {
                        rounded[matrix][0], rounded[matrix][1], rounded[other][0], rounded[other][1]};
                    unsigned C[2];
                    load_C(shared.low[buffer][start + t], matrix, q, C[0], C[1]);
                    add_product(sums, pair_of, C[0], C[1]);
                }
                if (q == pair) ys[step] += sums[0], ys[2 + step] += sums[2];
            }
            const int t = start + r;
            const bool is_there = stores && (ENDS_WITH_TILE || tile * TILE + t < LENGTH);
            store_transposed(y + (unsigned)(is_there ? shared.pixels[tile & 3][t] : 0) * CHANNELS,
                             pack(ys[0], ys[1]), pack(ys[2], ys[3]), is_there);
        }
    }
}
