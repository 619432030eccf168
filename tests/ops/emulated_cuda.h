// Runs a CUDA kernel on a CPU, one block after the other. It has what the kernels of states.cuh use, and fills shared
// memory with NaN before each block. The threads of a block take turns: each runs until it waits for others.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define EMULATED
#define DEVICE inline
#define KERNEL extern "C" void
#define SHARED_MEMORY
#define __syncthreads() block_barrier->arrive_and_wait()
#define __syncwarp() warps[threadIdx.x / 32].barrier.arrive_and_wait()

using std::min;
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { int x, y, z; };

static Index threadIdx, blockIdx;
alignas(16) static unsigned char shared_memory[1 << 18];

// Copies are done at the end of waiting for them, as late as the GPU may do them.
struct Copy { void* to; const void* from; int bytes, size; };

// A thread of the block, with a stack of its own.
constexpr int STACK = 1 << 18;
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    std::vector<Copy> copies;
    bool is_done = false;
};
static std::vector<std::unique_ptr<Thread>> block;
static bool backward;  // whether threads take turns from the last to the first

inline void let_others_run() {
    const int own = threadIdx.x, number = block.size();
    do threadIdx.x = (threadIdx.x + (backward ? number - 1 : 1)) % number;
    while (block[threadIdx.x]->is_done && threadIdx.x != own);
    if (threadIdx.x != own) swapcontext(&block[own]->context, &block[threadIdx.x]->context);
}

struct Barrier {
    int number, arrived = 0, turn = 0;
    void arrive_and_wait() {
        const int own_turn = turn;
        if (++arrived == number) arrived = 0, ++turn;
        while (turn == own_turn) let_others_run();
    }
};

struct Warp {
    Barrier barrier{32};
    unsigned operands[32][6];
    const unsigned short* rows[32];
};
static std::vector<Warp> warps;
static std::unique_ptr<Barrier> block_barrier;

inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline unsigned __ldg(const unsigned* from) { return *from; }
inline float exp2_fast(float x) { return std::exp2(x); }

inline unsigned rounded(float x) {  // to nearest even
    const unsigned bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned pack(float first, float second) { return rounded(first) | rounded(second) << 16; }
inline float half_of(unsigned bits, int index) { return __uint_as_float(index ? bits & 0xffff0000u : bits << 16); }
template <class T> T* computed(T* pointer) { return pointer; }
inline void store(unsigned short* to, float value) { *to = rounded(value); }
static bool misaligned;
inline void store(unsigned short* to, uint2 values) {
    if ((size_t)to % 8) misaligned = true;
    std::memcpy(to, &values, 8);
}
inline void store(unsigned short* to, const unsigned (&values)[4]) {
    if ((size_t)to % 16) misaligned = true;
    std::memcpy(to, &values, 16);
}
template <int BYTES> void copy_later(void* to, const void* from, int size) {
    if ((size_t)to % BYTES || (size && (size_t)from % BYTES)) misaligned = true;
    block[threadIdx.x]->copies.push_back({to, from, BYTES, size});
}
inline void wait_for_copies() {
    std::vector<Copy>& copies = block[threadIdx.x]->copies;
    for (const Copy& copy : copies) {
        std::memset(copy.to, 0, copy.bytes);
        std::memcpy(copy.to, copy.from, copy.size);
    }
    copies.clear();
}

inline void load_operand(unsigned (&a)[4], const unsigned short* row) {
    Warp& warp = warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    if ((size_t)row % 16) misaligned = true;
    warp.rows[lane] = row;
    warp.barrier.arrive_and_wait();
    for (int i = 0; i < 4; ++i) std::memcpy(&a[i], warp.rows[8 * i + lane / 4] + lane % 4 * 2, 4);
    warp.barrier.arrive_and_wait();
}

inline unsigned transpose(unsigned pair) {
    Warp& warp = warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32, first = lane % 4 * 8 + lane / 8, half = lane / 4 % 2;
    warp.operands[lane][0] = pair;
    warp.barrier.arrive_and_wait();
    const unsigned bits = pack(half_of(warp.operands[first][0], half), half_of(warp.operands[first + 4][0], half));
    warp.barrier.arrive_and_wait();
    return bits;
}

inline void load_transposed(unsigned (&a)[4], const unsigned short* row) {
    load_operand(a, row);
    for (unsigned& matrix : a) matrix = transpose(matrix);
}

// mma.m16n8k16: where values lie is section "Matrix Fragments for mma.m16n8k16" of the PTX manual.
inline void add_product(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    Warp& warp = warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    const unsigned all[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::copy(all, all + 6, warp.operands[lane]);
    warp.barrier.arrive_and_wait();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const unsigned* of_row = warp.operands[row % 8 * 4 + k % 8 / 2];
            const unsigned* of_column = warp.operands[column * 4 + k % 8 / 2];
            d[i] += half_of(of_row[row / 8 + k / 8 * 2], k % 2) * half_of(of_column[4 + k / 8], k % 2);
        }
    }
    warp.barrier.arrive_and_wait();
}

// mma.m16n8k8: the first half of the operands of mma.m16n8k16.
inline void add_narrow_product(float (&d)[4], const unsigned (&a)[2], unsigned b) {
    add_product(d, {a[0], a[1], 0, 0}, b, 0);
}

static const std::function<void()>* running;
static ucontext_t caller;

inline void run_thread() {
    (*running)();
    block[threadIdx.x]->is_done = true;
    const auto is_done = [](const std::unique_ptr<Thread>& thread) { return thread->is_done; };
    if (std::all_of(block.begin(), block.end(), is_done)) setcontext(&caller);
    let_others_run();
}

// Run `kernel` for each thread of each block, and return whether all copies were aligned. Every other block lets its
// threads take turns backward, so a result that depends on their order is likely to be wrong.
inline bool launch(int threads, const int* grid, const std::function<void()>& kernel) {
    misaligned = false;
    running = &kernel;
    for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) {
                std::memset(shared_memory, 0xff, sizeof shared_memory);
                warps.assign(threads / 32, Warp{});
                block_barrier = std::make_unique<Barrier>(Barrier{threads});
                block.clear();
                backward = (blockIdx.x + blockIdx.y + blockIdx.z) % 2;
                for (int thread = 0; thread < threads; ++thread) {
                    block.push_back(std::make_unique<Thread>());
                    ucontext_t& context = block.back()->context;
                    getcontext(&context);
                    context.uc_stack.ss_sp = block.back()->stack.get();
                    context.uc_stack.ss_size = STACK;
                    makecontext(&context, run_thread, 0);
                }
                threadIdx.x = backward ? threads - 1 : 0;
                swapcontext(&caller, &block[threadIdx.x]->context);
            }
    return !misaligned;
}
