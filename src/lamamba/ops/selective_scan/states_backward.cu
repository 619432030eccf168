// The backward kernel of the scan with several states for bfloat16, in CUDA C++, compiled at run time; see README.md.
//
// A warp walks one path of one image, or a segment of it, for 32 channels, one per lane. The warps of a block walk
// the same path for other channels, and share B, C and the low-rank step sizes. While a tile of TILE steps is computed,
// the inputs of the next tile are copied to shared memory. Triton does not let us place these copies. The Triton
// kernels hold the values in registers instead, so fewer of their warps fit on a multiprocessor.

constexpr int WEIGHTS = 2 * STATES * TILE;   // B and C of a tile, (n, 2, 16)
constexpr int STEP_ROW = 36;                 // floats between the steps of a warp in shared memory
constexpr int OWN = WEIGHTS > TILE * STEP_ROW ? WEIGHTS : TILE * STEP_ROW;
constexpr bool WHOLE = CHANNELS % THREADS == 0;

// Pointers to the inputs of a block. They are kept in shared memory to save registers.
struct Sources {
    const bf16 *x, *low, *grad_y, *states, *expansion;
    const float* weights;
};

struct Shared {
    Sources sources;
    float weights[2][WEIGHTS];
    bf16 x[2][TILE][THREADS];
    bf16 low[2][TILE][LOW_ROW];
    int pixels[4][TILE];    // of a tile and of the next two
    float own[WARPS][OWN];  // of a warp: the step sizes before softplus, (16, 36); then its sums for dB and dC, (n, 2, 16)
    float A[STATES][THREADS];
    float bias[THREADS];
    float carried[STATES][THREADS];  // between tiles: the gradient of the state times a[t + 1]
    bf16 grad_y[2][TILE][THREADS];
    bf16 starts[2][STATES][THREADS];  // the states before a tile
    float grad_A[STATES][THREADS];
    float D[THREADS], grad_D[THREADS], grad_bias[THREADS];
};
static_assert(sizeof(Shared) == SHARED, "SHARED is not the size of Shared: correct backward_bytes in states_cuda.py");

// Start to copy the inputs of a tile, whose pixels `find_pixel` has stored.
DEVICE void begin_copy(Shared& shared, int tile) {
    const int thread = threadIdx.x, buffer = tile & 1, steps = min(LENGTH - tile * TILE, TILE);
    const int* pixels = shared.pixels[tile & 3];
    const Sources& sources = shared.sources;
    copy_channels<THREADS, THREADS>(&shared.x[buffer][0][0], sources.x, pixels, steps);
    copy_channels<THREADS, THREADS>(&shared.grad_y[buffer][0][0], sources.grad_y, pixels, steps);
    copy_low<RANK, LOW_ROW>(&shared.low[buffer][0][0], sources.low, pixels, steps);
    constexpr int PIECES = THREADS / 8;  // of 16 bytes: the channels of a state
    const int first_channel = blockIdx.x * THREADS;
#pragma unroll
    for (int first = 0; first < STATES * PIECES; first += THREADS) {
        const int state = (first + thread) / PIECES, channel = (first + thread) % PIECES * 8;
        const bool is_there = WHOLE || first_channel + channel < CHANNELS;
        const i64 place = is_there ? ((i64)tile * STATES + state) * CHANNELS + first_channel + channel : 0;
        if (state < STATES)
            copy_later<16>(&shared.starts[buffer][state][channel], sources.states + place, is_there ? 16 : 0);
    }
    for (int place = 4 * thread; place < WEIGHTS; place += 4 * THREADS)
        copy_later<16>(&shared.weights[buffer][place], sources.weights + (i64)tile * WEIGHTS + place, 16);
}

// Compute m, from which the step sizes follow (see README.md), for a tile and the thread's channel.
DEVICE void compute_steps(Shared& shared, int tile, float (&m)[TILE]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, place = lane % 4 * 2;
    const bf16(&low)[TILE][LOW_ROW] = shared.low[tile & 1];
    float* own = shared.own[warp];
    const bf16* expansions = shared.sources.expansion;
#pragma unroll
    for (int eight = 0; eight < 32; eight += 8) {
        const int channel = (int)blockIdx.x * THREADS + 32 * warp + eight + row;
        const bool is_there = WHOLE || channel < CHANNELS;
        const bf16* expansion = expansions + (is_there ? channel * ROW : 0);
        float sums[4] = {};
#pragma unroll
        for (int depth = 0; depth < DEPTHS; ++depth) {
            const int k = 16 * depth + place;
            const unsigned operand[4] = {
                *(const unsigned*)&low[row][k], *(const unsigned*)&low[row + 8][k],
                *(const unsigned*)&low[row][k + 8], *(const unsigned*)&low[row + 8][k + 8]};
            add_product(sums, operand, is_there && k < ROW ? __ldg((const unsigned*)(expansion + k)) : 0u,
                        is_there && k + 8 < ROW ? __ldg((const unsigned*)(expansion + k + 8)) : 0u);
        }
        *(float2*)&own[row * STEP_ROW + eight + place] = make_float2(sums[0], sums[1]);
        *(float2*)&own[(row + 8) * STEP_ROW + eight + place] = make_float2(sums[2], sums[3]);
    }
    __syncwarp();
    const float bias = shared.bias[threadIdx.x] * LOG2_E;
#pragma unroll
    for (int t = 0; t < TILE; ++t) m[t] = softplus(fmaf(own[t * STEP_ROW + lane], LOG2_E, bias));
    __syncwarp();
}

// `states_backward_kernel` of states_kernels.py, with the same arguments. Only `grad_weights` differs: it has a plane
// for each block.
KERNEL states_backward(
    const bf16* x, const bf16* low, const float* weights, const bf16* expansion, const float* bias,
    const float* rates, const float* D, const bf16* grad_y, const bf16* states, const float* carry, const float* decay,
    bf16* grad_x, bf16* grad_z, bf16* grad_weights, float* grad_shared,
    int plane, int batch, int first_image, int tiles_per_segment, int num_segments
) {
    SHARED_MEMORY;
    Shared& shared = *(Shared*)shared_memory;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int path = blockIdx.y % 4, segment = blockIdx.y / 4, own_image = blockIdx.z;
    const i64 image = first_image + own_image;
    const int first_channel = blockIdx.x * THREADS, d = first_channel + thread, o_path = path * CHANNELS + d;
    const bool is_there = WHOLE || d < CHANNELS;
    shared.bias[thread] = is_there ? bias[o_path] : 0.0f;
    shared.D[thread] = is_there ? D[o_path] : 0.0f;
    shared.grad_D[thread] = shared.grad_bias[thread] = 0.0f;
    const i64 o_image = image * LENGTH * CHANNELS, o_tiles = (image * 4 + path) * NUM_TILES;
    const i64 o_grad = (path * (i64)batch + image) * LENGTH * CHANNELS + d;
    grad_weights += (((i64)blockIdx.x * batch + image) * 4 + path) * NUM_TILES * WEIGHTS;
    grad_shared += ((i64)own_image * num_segments + segment) * (STATES + 2) * 4 * CHANNELS + o_path;
    if (thread == 0) shared.sources = {
        x + o_image, low + image * LENGTH * LOW + path * (LOW / 4), grad_y + o_image + path * (i64)plane,
        states + o_tiles * STATES * CHANNELS, expansion + (i64)path * CHANNELS * ROW, weights + o_tiles * WEIGHTS};

    for (int n = 0; n < STATES; ++n) {
        float g = 0.0f;  // the gradient that the segments after this one pass back
        for (int other = num_segments - 1; other > segment; --other) {
            const i64 place = ((((i64)own_image * 4 + path) * num_segments + other) * STATES + n) * CHANNELS + d;
            if (is_there) g = fmaf(decay[place], g, carry[place]);
        }
        shared.A[n][thread] = is_there ? -rates[((i64)path * STATES + n) * CHANNELS + d] : 0.0f;
        shared.carried[n][thread] = g;
        shared.grad_A[n][thread] = 0.0f;
    }
    const Picks picks = make_picks();
    const int first = segment * tiles_per_segment, last = min(first + tiles_per_segment, NUM_TILES);
    // Columns of low that are not copied are multiplied by zeros, so they must be numbers.
    for (int place = thread; place < 2 * TILE * LOW_ROW; place += THREADS) (&shared.low[0][0][0])[place] = 0;
    __syncthreads();
    begin(shared, last - 1, last - 2);
    for (int tile = last - 1; tile >= first; --tile) {
        turn_to_tile(shared, tile - 1, tile - 2, tile == first);
        const int buffer = tile & 1;
        float* own = shared.own[warp];
        float m[TILE], inputs[TILE], grad_ys[TILE];
        float drives[TILE], exponents[TILE];  // over the states: g B, and the gradient of the exponent times A
        compute_steps(shared, tile, m);
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            inputs[t] = m[t] * widened(shared.x[buffer][t][thread]) * LN_2;
            grad_ys[t] = widened(shared.grad_y[buffer][t][thread]);
            drives[t] = exponents[t] = 0.0f;
        }
#pragma unroll 1
        for (int n = 0; n < STATES; ++n) {
            const float A = shared.A[n][thread], *B = &shared.weights[buffer][n * 2 * TILE], *C = B + TILE;
            float a[TILE], h[TILE + 1];
            h[0] = widened(shared.starts[buffer][n][thread]);
#pragma unroll
            for (int four = 0; four < TILE; four += 4) {
                float of_B[4];
                unpack(B + four, of_B);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int t = four + i;
                    a[t] = exp2_fast(A * m[t]);
                    h[t + 1] = fmaf(a[t], h[t], of_B[i] * inputs[t]);
                }
            }
            float g = shared.carried[n][thread], grad_A = shared.grad_A[n][thread];
            float grad_B[4] = {}, grad_C[4] = {};  // of four steps, as partial sums in eight lanes
#pragma unroll
            for (int half = 1; half >= 0; --half) {
                unsigned products_B[4], products_C[4];
#pragma unroll
                for (int quarter = 1; quarter >= 0; --quarter) {
                    const int four = 8 * half + 4 * quarter;
                    float of_B[4], of_C[4], products[4];
                    unpack(B + four, of_B);
                    unpack(C + four, of_C);
#pragma unroll
                    for (int i = 3; i >= 0; --i) {
                        const int t = four + i;
                        g = fmaf(of_C[i], grad_ys[t], g);
                        products[i] = g * inputs[t];
                        drives[t] = fmaf(g, of_B[i], drives[t]);
                        g *= a[t];
                        const float exponent = g * h[t];
                        exponents[t] = fmaf(exponent, A, exponents[t]);
                        grad_A = fmaf(exponent, m[t], grad_A);
                    }
#pragma unroll
                    for (int pair = 0; pair < 2; ++pair) {
                        const int i = 2 * pair, t = four + i;
                        products_B[2 * quarter + pair] = pack(products[i], products[i + 1]);
                        products_C[2 * quarter + pair] = pack(h[t + 1] * grad_ys[t], h[t + 2] * grad_ys[t + 1]);
                    }
                }
                add_product(grad_B, products_B, picks.of_half[half][0], picks.of_half[half][1]);
                add_product(grad_C, products_C, picks.of_half[half][0], picks.of_half[half][1]);
            }
            shared.carried[n][thread] = g;
            shared.grad_A[n][thread] = grad_A;
            own[n * 2 * TILE + lane % 2 * TILE + summed_step()] = sum_partials(grad_B, grad_C, picks);
        }

        bf16 *to_x = computed(grad_x + o_grad), *to_z = computed(grad_z + o_grad);
        float grad_D = shared.grad_D[thread], grad_bias = shared.grad_bias[thread];
        const float D_d = shared.D[thread];
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            const unsigned pixel = shared.pixels[tile & 3][t];
            const float x_t = widened(shared.x[buffer][t][thread]), drive = drives[t] * LN_2;
            const float slope = LOG2_E - LOG2_E * exp2_fast(-m[t]);  // of m with respect to z
            const float of_z = fmaf(exponents[t], LN_2, drive * x_t) * slope;
            const float of_x = fmaf(drive, m[t], D_d * grad_ys[t]);
            grad_D = fmaf(grad_ys[t], x_t, grad_D);
            grad_bias += of_z;
            if (is_there && (ENDS_WITH_TILE || tile * TILE + t < LENGTH)) {
                store(to_x + pixel * CHANNELS, of_x);
                store(to_z + pixel * CHANNELS, of_z);
            }
        }
        shared.grad_D[thread] = grad_D;
        shared.grad_bias[thread] = grad_bias;
        __syncthreads();
        for (int place = thread; place < WEIGHTS; place += THREADS) {
            float sum = shared.own[0][place];
#pragma unroll
            for (int other = 1; other < WARPS; ++other) sum += shared.own[other][place];
            grad_weights[(i64)tile * WEIGHTS + place] = narrowed(sum);
        }
    }
    if (is_there) {
        for (int n = 0; n < STATES; ++n)
            grad_shared[(i64)n * 4 * CHANNELS] = shared.grad_A[n][thread] * shared.A[n][thread] * LN_2;
        grad_shared[(i64)STATES * 4 * CHANNELS] = shared.grad_D[thread];
        grad_shared[(i64)(STATES + 1) * 4 * CHANNELS] = shared.grad_bias[thread];
    }
}
