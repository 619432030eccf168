// Code that the kernels of the scan in CUDA C++ share: sizes, instructions, and copies to shared memory.
//
// The caller defines these macros at the top of the source:
//   HEIGHT, WIDTH, CONTINUOUS, CHANNELS, LOW, RANK, STATES: as in the Triton kernels.
//   FUSED: see one_state_backward.cu.
//   WARPS: warps in a block.
//   BLOCKS: blocks that run at once on a multiprocessor, which limits the registers of a thread.
//   SHARED: bytes of shared memory in a block.

constexpr int TILE = 16, LENGTH = HEIGHT * WIDTH, NUM_TILES = (LENGTH + TILE - 1) / TILE;
constexpr int THREADS = 32 * WARPS;
constexpr int ROW = (RANK + 7) / 8 * 8;      // of the matrix that expands step sizes, padded with zeros
constexpr int DEPTHS = (RANK + 15) / 16;     // matrix products that expand the step sizes of a tile
constexpr int LOW_ROW = 16 * DEPTHS + 8;     // values between rows of low in shared memory; this avoids bank conflicts
constexpr bool ENDS_WITH_TILE = LENGTH % TILE == 0;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

typedef unsigned short bf16;  // its bits
typedef long long i64;

#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define SHARED_MEMORY extern __shared__ __align__(16) unsigned char shared_memory[]

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Round to bfloat16, and put two of them side by side.
DEVICE unsigned pack(float first, float second) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}
// d += a b for matrices a (16, 16) and b (16, 8). The PTX manual shows which lane holds which values.
DEVICE void add_product(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d += a b for matrices a (16, 8) and b (8, 8).
DEVICE void add_narrow_product(float (&d)[4], const unsigned (&a)[2], unsigned b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
// Load a left operand (16, 16) from shared memory. Lane i points to row i % 8 of the matrix (8, 8) that becomes a[i / 8].
DEVICE void load_operand(unsigned (&a)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}
// The same with each matrix transposed.
DEVICE void load_transposed(unsigned (&a)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}
// Transpose a matrix (8, 8): lane i has the values 2 i and 2 i + 1 of 64.
DEVICE unsigned transpose(unsigned pair) {
    unsigned bits;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(bits) : "r"(pair));
    return bits;
}
// Start to copy `size` bytes to shared memory, without waiting. The rest of the BYTES bytes there becomes zeros.
template <int BYTES> DEVICE void copy_later(void* to, const void* from, int size) {
    const unsigned place = (unsigned)__cvta_generic_to_shared(to);
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;"
                     ::"r"(place), "l"(from), "r"(size), "n"(BYTES) : "memory");
}
// Make the compiler compute a pointer here, once. Otherwise it adds up the parts of the pointer before each store.
template <class T> DEVICE T* computed(T* pointer) {
    asm("" : "+l"(pointer));
    return pointer;
}
DEVICE void store(bf16* to, float value) {
    asm volatile("st.global.b16 [%0], %1;" ::"l"(to), "h"((bf16)pack(value, 0.0f)) : "memory");
}
DEVICE void store(bf16* to, uint2 values) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(values.x), "r"(values.y) : "memory");
}
DEVICE void store(bf16* to, const unsigned (&values)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
        ::"l"(to), "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3]) : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

DEVICE float widened(bf16 bits) { return __uint_as_float((unsigned)bits << 16); }
DEVICE bf16 narrowed(float x) { return (bf16)pack(x, 0.0f); }
DEVICE void unpack(const float* from, float (&to)[4]) {
    const float4 quad = *(const float4*)from;
    to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
}

// Right operands of `add_product` for sums over channels. Each lane of the left operand has the values of 8 steps.
struct Picks {
    unsigned of_half[2][2];  // sum them over four lanes, into columns 0 to 3 or 4 to 7
    unsigned all[2];         // sum the first half of each row into even columns, and the second half into odd columns
};
DEVICE Picks make_picks() {
    const int r = threadIdx.x % 32 / 4;
    const unsigned ones = 0x3f803f80u;  // 1 in bfloat16, twice
    Picks picks = {{}, {r % 2 ? 0u : ones, r % 2 ? ones : 0u}};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const int column = r - 4 * half - 2 * pair;
            picks.of_half[half][pair] = column == 0 ? 0x00003f80u : column == 1 ? 0x3f800000u : 0u;
        }
    return picks;
}

// Add up the partial sums of a tile for dB and dC, which eight lanes have for the same four steps. Even lanes get a dB, and
// odd lanes a dC, of the step `summed_step`.
DEVICE float sum_partials(const float (&of_B)[4], const float (&of_C)[4], const Picks& picks) {
    const int lane = threadIdx.x % 32;
    const unsigned partial[4] = {
        transpose(pack(of_B[0], of_B[1])), transpose(pack(of_B[2], of_B[3])),
        transpose(pack(of_C[0], of_C[1])), transpose(pack(of_C[2], of_C[3]))};
    float sums[4] = {};
    add_product(sums, partial, picks.all[0], picks.all[1]);
    const float of_first = lane & 1 ? sums[1] : sums[0], of_second = lane & 1 ? sums[3] : sums[2];
    return lane & 2 ? of_second : of_first;
}
DEVICE int summed_step() {
    const int lane = threadIdx.x % 32;
    return lane / 8 * 4 + lane / 4 % 2 + lane % 4 / 2 * 2;
}

DEVICE bool is_reversed(int path) { return CONTINUOUS ? path % 2 == 1 : path >= 2; }

// The row-major pixel that a path reads at a step; see `lamamba.ops.grid`.
DEVICE int pixel_of(int t, int path) {
    const bool columns = CONTINUOUS ? path >= 2 : path % 2 == 1;
    if (is_reversed(path)) t = LENGTH - 1 - t;
    const int row = t / WIDTH, column = t / HEIGHT;
    int right = t % WIDTH, down = t % HEIGHT;
    if (CONTINUOUS && row % 2 == 1) right = WIDTH - 1 - right;
    if (CONTINUOUS && column % 2 == 0) down = HEIGHT - 1 - down;
    return columns ? down * WIDTH + column : row * WIDTH + right;
}

// m = softplus(z) log2(e) from z log2(e), with the polynomial of `_softplus` in kernels.py.
DEVICE float softplus(float z) {
    const float u = exp2_fast(-fabsf(z));
    return fmaxf(z, 0.0f) + u * fmaf(u, fmaf(u, fmaf(u, -0.10725511f, 0.36648198f), -0.70174807f), 1.44212821f);
}

// Store the pixel of a step in `shared.pixels`, for the copy of its tile; do nothing if the path has no such step.
template <class Shared> DEVICE void find_pixel(Shared& shared, int tile, int step) {
    const int t = tile * TILE + step;
    if (t >= 0 && t < LENGTH) shared.pixels[tile & 3][step] = pixel_of(t, blockIdx.y % 4);
}

// Start to copy the first NUMBER values of each step's row of low to the rows of shared memory at `to`.
template <int NUMBER, int TO_ROW> DEVICE void copy_low(bf16* to, const bf16* low, const int* pixels, int steps) {
    constexpr int VALUES = LOW / 4 % 8 == 0 ? 8 : LOW / 4 % 4 == 0 ? 4 : 2, OF_STEP = (NUMBER + VALUES - 1) / VALUES;
#pragma unroll
    for (int first = 0; first < TILE * OF_STEP; first += THREADS) {
        const int step = (first + (int)threadIdx.x) / OF_STEP, value = (first + (int)threadIdx.x) % OF_STEP * VALUES;
        const bool is_there = step < TILE && (ENDS_WITH_TILE || step < steps);
        const bf16* from = low + (is_there ? (i64)pixels[step] * LOW + value : 0);
        if (step < TILE)
            copy_later<2 * VALUES>(to + step * TO_ROW + value, from, is_there ? 2 * min(VALUES, NUMBER - value) : 0);
    }
}

// Start to copy a tile of channels, from (pixels, CHANNELS), to the rows of shared memory at `to`.
template <int NUMBER, int TO_ROW> DEVICE void copy_channels(bf16* to, const bf16* from, const int* pixels, int steps) {
    constexpr int PIECES = NUMBER / 8;  // of 16 bytes
    const int first_channel = blockIdx.x * NUMBER;
#pragma unroll
    for (int first = 0; first < TILE * PIECES; first += THREADS) {
        const int step = (first + (int)threadIdx.x) / PIECES, channel = (first + (int)threadIdx.x) % PIECES * 8;
        const bool is_there =
            (ENDS_WITH_TILE || step < steps) && (CHANNELS % NUMBER == 0 || first_channel + channel < CHANNELS);
        const int place = is_there ? pixels[step] * CHANNELS + first_channel + channel : 0;
        copy_later<16>(to + step * TO_ROW + channel, from + place, is_there ? 16 : 0);
    }
}

// Prepare shared memory for the first two tiles, and start to copy the inputs of the first.
template <class Shared, class... Inputs> DEVICE void begin(Shared& shared, int tile, int next, Inputs... inputs) {
    const int thread = threadIdx.x;
    for (int step = thread; step < 2 * TILE; step += THREADS)
        find_pixel(shared, step < TILE ? tile : next, step % TILE);
    __syncthreads();
    begin_copy(shared, tile, inputs...);
}

// Wait for the inputs of a tile, start to copy those of the tile `next`, and find the pixels of the tile `after` it.
template <class Shared, class... Inputs>
DEVICE void turn_to_tile(Shared& shared, int next, int after, bool is_last, Inputs... inputs) {
    wait_for_copies();
    __syncthreads();  // the copies of other threads have arrived, and no thread uses the previous tile's buffers
    if (!is_last) begin_copy(shared, next, inputs...);
    if (threadIdx.x < TILE) find_pixel(shared, after, threadIdx.x);
}
