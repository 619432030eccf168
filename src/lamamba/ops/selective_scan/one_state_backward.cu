// The backward kernel of the scan with one state for bfloat16, in CUDA C++, compiled at run time; see README.md.
//
// A warp walks one path of one image, or a segment of it, for 64 channels, two per lane. The warps of a block walk
// the same path for other channels. While a tile of TILE steps is computed, the inputs of the next tile are copied to
// shared memory. The gradients of x and of z, the step sizes before softplus, pass through shared memory too: each lane
// computes them for its channels, then tensor cores and stores read them with the lanes in another order.
//
// With FUSED, the kernel also computes the products of the gradient of z, which are the gradients of low and of the
// expansion. Then it does not write the gradient of z.

constexpr int OF_WARP = 64, BLOCK_CHANNELS = OF_WARP * WARPS;
constexpr int PATH = RANK + 2;  // a path's values of low of a pixel: step sizes, B, C
constexpr int STEP_ROW = 20;    // floats between the channels of a warp's step sizes
constexpr int TURNED = 79 * 8;  // values of 8 steps of a warp's results; see `turned`
constexpr bool WHOLE = CHANNELS % BLOCK_CHANNELS == 0;
constexpr int SUMS = FUSED ? PATH : 2;
constexpr int EIGHTS = FUSED ? ROW / 8 : 1;  // of ranks

struct Shared {
    bf16 x[2][TILE][BLOCK_CHANNELS];
    bf16 grad_y[2][TILE][BLOCK_CHANNELS];
    bf16 low[2][TILE][LOW_ROW];
    float starts[2][BLOCK_CHANNELS];  // the states before a tile
    bf16 expansion[BLOCK_CHANNELS][LOW_ROW];  // rows in the order of `channel_of`
    int pixels[4][TILE];                      // of a tile and of the next two
    float weights[WARPS][2 * TILE];           // of a warp: B ln(2) and C of a tile
    float own[WARPS][OF_WARP * STEP_ROW];     // of a warp: step sizes before softplus; then the gradients of x and z
    float sums[2][WARPS][TILE][SUMS];         // of a warp, for the gradient of low
};
static_assert(sizeof(Shared) == SHARED, "SHARED is not the size of Shared: correct one_state_bytes in states_cuda.py");
static_assert(2 * 2 * TURNED * sizeof(bf16) <= OF_WARP * STEP_ROW * sizeof(float), "own is too small");

// The channel of a row among the 64 of a warp. A lane has the rows `lane` and `lane` + 32, whose channels are neighbors.
DEVICE int channel_of(int row) { return row % 32 * 2 + row / 32; }

// Set the values `k` and `k` + 1 of a row of low to zero if they are not step sizes.
DEVICE unsigned only_steps(unsigned pair, int k, int last_k) {
    if (last_k < RANK) return pair;
    return k + 1 < RANK ? pair : k < RANK ? pair & 0xffffu : 0u;
}

// Start to copy the rows of a path's matrix that expands step sizes, (CHANNELS, ROW), in the order of `channel_of`.
DEVICE void copy_expansion(bf16 (&rows)[BLOCK_CHANNELS][LOW_ROW], const bf16* expansion) {
    for (int place = threadIdx.x; place < BLOCK_CHANNELS * 2 * DEPTHS; place += THREADS) {
        const int row = place / (2 * DEPTHS), k = place % (2 * DEPTHS) * 8;
        const int channel = blockIdx.x * BLOCK_CHANNELS + row / OF_WARP * OF_WARP + channel_of(row % OF_WARP);
        const bool is_there = k < ROW && (WHOLE || channel < CHANNELS);
        copy_later<16>(&rows[row][k], expansion + (is_there ? channel * ROW + k : 0), is_there ? 16 : 0);
    }
}

// Store B ln(2) and C of a tile, (2, 16), for the warp.
DEVICE void find_weights(const bf16 (&low)[TILE][LOW_ROW], float (&weights)[2 * TILE]) {
    const int lane = threadIdx.x % 32;
    weights[lane] = widened(low[lane % TILE][RANK + lane / TILE]) * (lane < TILE ? LN_2 : 1.0f);
}

// Compute m, from which the step sizes follow (see README.md), for a tile and the lane's two channels.
DEVICE void compute_steps(Shared& shared, int tile, const float (&bias)[2], float (&m)[2][TILE]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
    float* own = shared.own[warp];
    unsigned steps[DEPTHS][4];
#pragma unroll
    for (int depth = 0; depth < DEPTHS; ++depth) {
        load_operand(steps[depth], &shared.low[tile & 1][lane / 16 * 8 + lane % 8][16 * depth + lane / 8 % 2 * 8]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int first = 16 * depth + i % 2 * 8;
            steps[depth][i] = only_steps(steps[depth][i], first + 2 * q, first + 7);
        }
    }
#pragma unroll
    for (int row = 0; row < OF_WARP; row += 16) {
        float z[2][4] = {};  // of 16 rows and 8 steps each
#pragma unroll
        for (int depth = 0; depth < DEPTHS; ++depth) {
            unsigned rows[4];
            load_operand(rows, &shared.expansion[OF_WARP * warp + row + lane % 16][16 * depth + lane / 16 * 8]);
            add_product(z[0], rows, steps[depth][0], steps[depth][1]);
            add_product(z[1], rows, steps[depth][2], steps[depth][3]);
        }
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
            float* to = &own[(row + r) * STEP_ROW + 8 * eight + 2 * q];
            *(float2*)to = make_float2(z[eight][0], z[eight][1]);
            *(float2*)(to + 8 * STEP_ROW) = make_float2(z[eight][2], z[eight][3]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int four = 0; four < TILE; four += 4) {
            float z[4];
            unpack(&own[(lane + 32 * c) * STEP_ROW + four], z);
#pragma unroll
            for (int i = 0; i < 4; ++i) m[c][four + i] = softplus(fmaf(z[i], LOG2_E, bias[c]));
        }
    __syncwarp();
}

// Load the lane's two channels of a step.
DEVICE void load_pair(const bf16* of_step, float (&values)[2]) {
    const unsigned pair = *(const unsigned*)&of_step[OF_WARP * (threadIdx.x / 32) + threadIdx.x % 32 * 2];
    values[0] = __uint_as_float(pair << 16), values[1] = __uint_as_float(pair & 0xffff0000u);
}

// Where 8 steps of a row begin in a warp's results. This avoids bank conflicts.
DEVICE int turned(int row, int eight) { return eight * TURNED + (row + row / 8 * 2 + row / 32) * 8; }

// Put pairs of 8 steps of the lane's channel `c` where `store_turned` reads them.
DEVICE void turn(bf16* own, int c, int eight, const unsigned (&pairs)[4]) {
    *(uint4*)(own + turned(threadIdx.x % 32 + 32 * c, eight)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Store a warp's results of a tile, which `own` holds in the order of `turned`. `to` points to the first channel that the
// lane stores, `first_channel`, in the plane of the image.
DEVICE void store_turned(const int (&pixels)[TILE], int tile, const bf16* own, bf16* to, int first_channel) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
        const int t = 8 * eight + lane / 4;
        bf16* of_step = to + (unsigned)pixels[t] * CHANNELS;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // Lane 4 t + q gets the channels 8 q to 8 q + 7.
            unsigned channels[4];
            load_transposed(channels, own + turned(lane % 2 * 32 + 16 * half + lane % 8 / 2 * 4 + lane / 8, eight));
            const bool is_there = WHOLE || first_channel + 32 * half < CHANNELS;
            if (is_there && (ENDS_WITH_TILE || tile * TILE + t < LENGTH)) store(of_step + 32 * half, channels);
        }
    }
}

// Start to copy the inputs of a tile, whose pixels `find_pixel` has stored.
DEVICE void begin_copy(
    Shared& shared, int tile, const bf16* x, const bf16* low, const bf16* grad_y, const float* states
) {
    const int thread = threadIdx.x, buffer = tile & 1, steps = min(LENGTH - tile * TILE, TILE);
    const int* pixels = shared.pixels[tile & 3];
    copy_channels<BLOCK_CHANNELS, BLOCK_CHANNELS>(&shared.x[buffer][0][0], x, pixels, steps);
    copy_channels<BLOCK_CHANNELS, BLOCK_CHANNELS>(&shared.grad_y[buffer][0][0], grad_y, pixels, steps);
    copy_low<PATH, LOW_ROW>(&shared.low[buffer][0][0], low, pixels, steps);
    const int channel = blockIdx.x * BLOCK_CHANNELS + 4 * thread;
    const bool is_there = WHOLE || channel < CHANNELS;
    if (4 * thread < BLOCK_CHANNELS)
        copy_later<16>(&shared.starts[buffer][4 * thread], states + (is_there ? tile * (i64)CHANNELS + channel : 0),
                       is_there ? 16 : 0);
}

// Add up the sums of the warps, and write them for the pixels of a tile.
DEVICE void write_sums(const Shared& shared, int tile, bf16* grad_low, float* grad_BC) {
    constexpr int PAIRS = FUSED ? LOW / 8 : 1;
#pragma unroll 1
    for (int place = threadIdx.x; place < TILE * PAIRS; place += THREADS) {
        const int t = place / PAIRS, column = place % PAIRS * 2;
        float2 sum = make_float2(0.0f, 0.0f);  // what fills up a path's part of low
        if (column < SUMS)
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) {
                const float2 own = *(const float2*)&shared.sums[tile & 1][warp][t][column];
                sum.x += own.x, sum.y += own.y;
            }
        if (!ENDS_WITH_TILE && tile * TILE + t >= LENGTH) continue;
        const unsigned pixel = shared.pixels[tile & 3][t];
        if (FUSED) *(unsigned*)(grad_low + pixel * LOW + column) = pack(sum.x, sum.y);
        else *(float2*)(grad_BC + pixel * 8) = sum;
    }
}

// `scan_backward_kernel` of kernels.py, with these differences: a block has 64 WARPS channels. With FUSED,
// `grad_low` has a plane for each block of channels, and `grad_z` and `grad_BC` are not written. Then
// `grad_shared` also has the gradient of the expansion after the others, (ROW, 4, e).
KERNEL one_state_backward(
    const bf16* x, const bf16* low, const bf16* expansion, const float* bias, const float* A_log, const float* D,
    const bf16* grad_y, const float* states, const float* carry, const float* decay,
    bf16* grad_x, bf16* grad_z, bf16* grad_low, float* grad_BC, float* grad_shared,
    int plane, int batch, int first_image, int tiles_per_segment, int num_segments
) {
    SHARED_MEMORY;
    Shared& shared = *(Shared*)shared_memory;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, r = lane / 4, q = lane % 4;
    const int path = blockIdx.y % 4, segment = blockIdx.y / 4, own_image = blockIdx.z;
    const i64 image = first_image + own_image;
    const int first_channel = blockIdx.x * BLOCK_CHANNELS, d = first_channel + 2 * thread, o_path = path * CHANNELS + d;
    const bool is_there = WHOLE || d < CHANNELS;
    x += image * LENGTH * CHANNELS, grad_y += image * LENGTH * CHANNELS + path * (i64)plane;
    low += image * LENGTH * LOW + path * (LOW / 4);
    states += (image * 4 + path) * NUM_TILES * CHANNELS;
    const int first_stored = first_channel + OF_WARP * warp + 8 * q;
    const i64 o_plane = (path * (i64)batch + image) * LENGTH * CHANNELS + first_stored;
    grad_x += o_plane, grad_z += o_plane;
    grad_low += ((i64)blockIdx.x * batch + image) * LENGTH * LOW + path * (LOW / 4);
    grad_BC += (((i64)blockIdx.x * batch + image) * LENGTH * 4 + path) * 2;
    grad_shared += ((i64)own_image * num_segments + segment) * (3 + (FUSED ? ROW : 0)) * 4 * CHANNELS + path * CHANNELS;

    float of_bias[2], of_D[2], A[2], g[2], grad_A[2] = {}, grad_D[2] = {}, grad_bias[2] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        of_bias[c] = is_there ? bias[o_path + c] * LOG2_E : 0.0f;
        of_D[c] = is_there ? D[o_path + c] : 0.0f;
        A[c] = is_there ? -exp2_fast(A_log[o_path + c] * LOG2_E) : 0.0f;
        g[c] = 0.0f;  // the gradient of the state times a[t + 1]; at first, what the segments after this one pass back
        for (int other = num_segments - 1; other > segment; --other) {
            const i64 place = (((i64)own_image * 4 + path) * num_segments + other) * CHANNELS + d + c;
            if (is_there) g[c] = fmaf(decay[place], g[c], carry[place]);
        }
    }
    float grad_expansion[4][EIGHTS][4] = {};  // of 16 rows and 8 ranks each
    const Picks picks = make_picks();
    // Columns of low that are not copied are multiplied by zeros, so they must be numbers.
    for (int place = thread; place < 2 * TILE * LOW_ROW; place += THREADS) (&shared.low[0][0][0])[place] = 0;
    copy_expansion(shared.expansion, expansion + (i64)path * CHANNELS * ROW);
    __syncthreads();
    const int first = segment * tiles_per_segment, last = min(first + tiles_per_segment, NUM_TILES);
    begin(shared, last - 1, last - 2, x, low, grad_y, states);
#pragma unroll 1
    for (int tile = last - 1; tile >= first; --tile) {
        turn_to_tile(shared, tile - 1, tile - 2, tile == first, x, low, grad_y, states);
        if (tile < last - 1) write_sums(shared, tile + 1, grad_low, grad_BC);
        const int buffer = tile & 1;
        float(&weights)[2 * TILE] = shared.weights[warp];
        find_weights(shared.low[buffer], weights);
        float m[2][TILE], a[2][TILE], h[2][TILE + 1];
        compute_steps(shared, tile, of_bias, m);
        const float2 start = *(const float2*)&shared.starts[buffer][2 * thread];
        h[0][0] = start.x, h[1][0] = start.y;
#pragma unroll
        for (int four = 0; four < TILE; four += 4) {
            float B[4];
            unpack(weights + four, B);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int t = four + i;
                float x_t[2];
                load_pair(shared.x[buffer][t], x_t);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    a[c][t] = exp2_fast(A[c] * m[c][t]);
                    h[c][t + 1] = fmaf(a[c][t], h[c][t], B[i] * m[c][t] * x_t[c]);
                }
            }
        }
        bf16 *turned_x = (bf16*)shared.own[warp], *turned_z = turned_x + 2 * TURNED;
        float grad_B[4] = {}, grad_C[4] = {};  // of four steps, as partial sums in eight lanes
#pragma unroll
        for (int half = 1; half >= 0; --half) {
            unsigned products_B[4], products_C[4], pairs_x[2][4], pairs_z[2][4];
#pragma unroll
            for (int two = 3; two >= 0; --two) {
                float of_B[2] = {}, of_C[2] = {}, of_x[2][2], of_z[2][2];
                const int first_step = 8 * half + 2 * two;
                const float2 B = *(const float2*)(weights + first_step), C = *(const float2*)(weights + TILE + first_step);
#pragma unroll
                for (int i = 1; i >= 0; --i) {
                    const int t = first_step + i;
                    const float B_t = i ? B.y : B.x, C_t = i ? C.y : C.x;
                    float x_t[2], grad_y_t[2];
                    load_pair(shared.x[buffer][t], x_t);
                    load_pair(shared.grad_y[buffer][t], grad_y_t);
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const float m_t = m[c][t];
                        g[c] = fmaf(C_t, grad_y_t[c], g[c]);
                        of_C[i] = fmaf(h[c][t + 1], grad_y_t[c], of_C[i]);
                        const float of_drive = g[c] * m_t, of_step = g[c] * B_t * x_t[c];
                        of_B[i] = fmaf(of_drive, x_t[c], of_B[i]);
                        of_x[c][i] = fmaf(of_drive, B_t, of_D[c] * grad_y_t[c]);
                        g[c] *= a[c][t];
                        const float exponent = g[c] * h[c][t];
                        grad_A[c] = fmaf(exponent, m_t, grad_A[c]);
                        const float slope = LOG2_E - LOG2_E * exp2_fast(-m_t);  // of m with respect to z
                        of_z[c][i] = fmaf(exponent, A[c] * LN_2, of_step) * slope;
                        grad_D[c] = fmaf(grad_y_t[c], x_t[c], grad_D[c]);
                        grad_bias[c] += of_z[c][i];
                    }
                }
                products_B[two] = pack(of_B[0], of_B[1]);
                products_C[two] = pack(of_C[0], of_C[1]);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    pairs_x[c][two] = pack(of_x[c][0], of_x[c][1]);
                    pairs_z[c][two] = pack(of_z[c][0], of_z[c][1]);
                }
            }
            add_product(grad_B, products_B, picks.of_half[half][0], picks.of_half[half][1]);
            add_product(grad_C, products_C, picks.of_half[half][0], picks.of_half[half][1]);
#pragma unroll
            for (int c = 0; c < 2; ++c) turn(turned_x, c, half, pairs_x[c]), turn(turned_z, c, half, pairs_z[c]);
        }
        __syncwarp();
        store_turned(shared.pixels[tile & 3], tile, turned_x, grad_x, first_stored);
        float(&sums)[TILE][SUMS] = shared.sums[tile & 1][warp];
        if constexpr (FUSED) {
            unsigned of_low[DEPTHS][4];
#pragma unroll
            for (int depth = 0; depth < DEPTHS; ++depth)
                load_transposed(of_low[depth], &shared.low[buffer][lane % 16][16 * depth + lane / 16 * 8]);
            float grad_steps[EIGHTS][4] = {};
#pragma unroll
            for (int quarter = 0; quarter < 4; ++quarter) {
                const int row = 16 * quarter;
                unsigned by_step[4], by_row[4];
                load_transposed(by_step, turned_z + turned(row + lane / 16 * 8 + lane % 8, lane / 8 % 2));
                load_operand(by_row, turned_z + turned(row + lane % 16, lane / 16));
#pragma unroll
                for (int eight = 0; eight < EIGHTS; ++eight) {
                    unsigned rows[4];
                    load_transposed(rows, &shared.expansion[OF_WARP * warp + row / 32 * 32 + lane][8 * eight]);
                    add_product(grad_steps[eight], by_step, rows[quarter % 2 * 2], rows[quarter % 2 * 2 + 1]);
                    const unsigned(&of_eight)[4] = of_low[eight / 2];
                    add_product(grad_expansion[quarter][eight], by_row, of_eight[eight % 2 * 2], of_eight[eight % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int eight = 0; eight < EIGHTS; ++eight)
                if (8 * eight + 2 * q < RANK) {
                    *(float2*)&sums[r][8 * eight + 2 * q] = make_float2(grad_steps[eight][0], grad_steps[eight][1]);
                    *(float2*)&sums[r + 8][8 * eight + 2 * q] = make_float2(grad_steps[eight][2], grad_steps[eight][3]);
                }
        } else {
            store_turned(shared.pixels[tile & 3], tile, turned_z, grad_z, first_stored);
        }
        const float total = sum_partials(grad_B, grad_C, picks);
        sums[summed_step()][(FUSED ? RANK : 0) + lane % 2] = lane & 1 ? total : total * LN_2;
    }
    __syncthreads();
    write_sums(shared, first, grad_low, grad_BC);
    if (is_there)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            grad_shared[d + c] = grad_A[c] * A[c] * LN_2;
            grad_shared[4 * CHANNELS + d + c] = grad_D[c];
            grad_shared[8 * CHANNELS + d + c] = grad_bias[c];
        }
    if constexpr (FUSED) {
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter)
#pragma unroll
            for (int eight = 0; eight < EIGHTS; ++eight)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int k = 8 * eight + 2 * q + i % 2;
                    const int channel = first_channel + OF_WARP * warp + channel_of(16 * quarter + r + i / 2 * 8);
                    if (WHOLE || channel < CHANNELS)
                        grad_shared[(i64)(3 + k) * 4 * CHANNELS + channel] = k < RANK ? grad_expansion[quarter][eight][i] : 0.0f;
                }
    }
}
