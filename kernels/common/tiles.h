// Every number that a kernel and its launch code both need. build.rs turns each line into a Rust constant of crate::tiles,
// so a number appears on both sides only through this file. One `#define NAME integer` a line, nothing else.
#pragma once
#define NORM_THREADS 256         // rms_norm: threads of the block that owns a row
#define DECODE_ROWS 8            // most rows of gemv and attn_decode
#define ARGMAX_BLOCKS 64         // argmax: blocks, each with one partial result of two words in scratch
#define ARGMAX_THREADS 256       // argmax: threads of a block
#define SAMPLE_THREADS 1024      // sample: most threads of its one block
#define SAMPLE_MAX_VOCAB 8388608 // sample: 2^23 weights of at most 2^40 add up to less than 2^64
#define SAMPLE_PARAMS 20         // sample: words of its parameters
#define LOG_PROB_THREADS 512     // log_prob: threads of the block that owns a row
#define OUTBOX 8                 // argmax, sample: tokens of a sequence on their way to the host, more than are ever in flight
#define ATTN_TILE 64             // attn_decode: keys that a block takes at a time
#define ATTN_SPLITS 32           // attn_decode: most blocks that share the keys of a row and head
#define ATTN_GROUP 8             // attn_decode: most query heads of a kv head
#define ATTN_THREADS 128         // attn_decode: threads of a block
#define VECTOR_THREADS 128       // embed, rope, kv_append, swiglu: threads of a block, each with 8 elements of a row
#define GEMM_LARGE_SIDE 128      // gemm, large tile: rows and columns of out
#define GEMM_LARGE_DEPTH 32      // columns of k a stage
#define GEMM_LARGE_THREADS 256   // threads of a block
#define GEMM_SMALL_SIDE 64       // gemm, small tile: rows and columns of out
#define GEMM_SMALL_DEPTH 64      // columns of k a stage
#define GEMM_SMALL_THREADS 128   // threads of a block
#define GEMM_STAGES 3            // gemm: stages of either tile
#define PREFILL_ROWS 64          // attn_prefill: query rows of a block, 16 a warp
#define PREFILL_KEYS 64          // attn_prefill: keys of a tile, at fixed positions
#define GEMV_TILE 16             // gemv and the fused products: rows of w of one block
#define GEMV_WARPS 4             // warps that share them
#define GEMV_STAGE 64            // columns of w and x that a warp takes at a time
#define GEMV_STAGES 4            // stages of a warp's ring in shared memory
#define GEMV_BLOCKS 5            // blocks of an SM that shared memory and registers must allow with one row of x
#define STREAM_THREADS 256       // stream_read: threads of a block
#define STREAM_LOADS 8           // stream_read: loads of 16 bytes that a thread has in flight
