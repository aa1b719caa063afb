// Every number that a kernel and its launch code both need. build.rs turns each line into a Rust constant of crate::tiles,
// so a number appears on both sides only through this file. One `#define NAME integer` a line, nothing else.
#pragma once
#define NORM_THREADS 256         // rms_norm: threads of the block that owns a row
#define DECODE_ROWS 16           // most rows of gemv and attn_decode
#define BEST_WORDS 4             // argmax, norm_head_argmax, sample: words of scratch a row, for the best of all blocks
#define ARGMAX_BLOCKS 64         // argmax: most blocks of a row
#define ARGMAX_THREADS 256       // argmax: threads of a block
#define SAMPLE_THREADS 256       // sample: threads of a block, one for each bin of a digit
#define SAMPLE_TILE 1024         // sample: ids of a block
#define SAMPLE_BINS 2048         // sample: bins of the histogram of logits, of two words and one word
#define SAMPLE_STATE 16          // sample: words that say where the filters end
#define SAMPLE_MAX_VOCAB 8388608 // sample: 2^23 weights of at most 2^40 add up to less than 2^64
#define SAMPLE_PARAMS 20         // sample: words of its parameters
#define LOG_PROB_THREADS 512     // log_prob: threads of the block that owns a row
#define OUTBOX 32                // argmax, sample: tokens of a sequence on their way to the host, more than are ever in flight
#define ATTN_TILE 64             // attn_decode: keys that a block takes at a time
#define ATTN_SPLITS 48           // attn_decode: most blocks that share the keys of a row and head
#define ATTN_GROUP 8             // attn_decode: most query heads of a kv head
#define ATTN_THREADS 128         // attn_decode: threads of a block
#define VECTOR_THREADS 128       // embed, rope, kv_append, swiglu: threads of a block, each with 8 elements of a row
#define GEMM_LARGE_SIDE 128      // gemm, large tile: rows and columns of out
#define GEMM_LARGE_DEPTH 32      // columns of k a stage
#define GEMM_SMALL_SIDE 64       // gemm, small tile: rows and columns of out
#define GEMM_SMALL_DEPTH 64      // columns of k a stage
#define GEMM_THREADS 128         // gemm: threads of a block, four warps that have a quarter of the tile each
#define GEMM_PARTS 4             // gemm: most parts of k that are summed on their own
#define GEMM_BLOCKS 256          // gemm: blocks that the small tile's parts are to make of up to 64 rows
#define GEMM_PART_DEPTH 256      // gemm: least columns of a part
#define GEMM_STAGES 3            // gemm: stages of either tile
#define PREFILL_ROWS 128         // attn_prefill: query rows of a block
#define PREFILL_THREADS 128      // attn_prefill: threads of a block, four warps that have 32 rows each
#define PREFILL_KEYS 32          // attn_prefill: keys of a tile
#define PREFILL_STAGES 3         // attn_prefill: tiles of keys and values in shared memory
#define GEMV_TILE 16             // gemv and the fused products: rows of w of one block
#define GEMV_WARPS 4             // warps that share them
#define GEMV_STAGE 64            // columns of w and x that a warp takes at a time
#define GEMV_STAGES 4            // stages of a warp's ring in shared memory
#define GEMV_DEEP_STAGES 8       // those of the deep ring: one row of x, where an SM holds GEMV_DEEP_BLOCKS such blocks
#define GEMV_NARROW_STAGES 12    // those of one row and weights of 4 bits, which a warp takes two stages at a time
#define GEMV_BLOCKS 5            // blocks of an SM with 228 KB that the ring and registers must allow with one row of x
#define GEMV_DEEP_BLOCKS 3       // the same of the deep ring
#define GEMV_TRIGGER 9           // gemv: stages of a deep ring before its end at which the next kernel may start; 0: at once
#define QKV_TRIGGER 9            // norm_qkv_rope_append: likewise
#define GATE_UP_TRIGGER 9        // norm_gate_up: likewise
#define HEAD_TRIGGER 9           // norm_head, norm_head_argmax: likewise
#define WIDEN_THREADS 256        // gemm, widen: threads of a block, a warp for each record
#define STREAM_THREADS 256       // stream_read: threads of a block
#define STREAM_LOADS 8           // stream_read: loads of 16 bytes that a thread has in flight
#define LORA_THREADS 128         // lora_down, lora_up, lora_dx, lora_grad: threads of a block
#define LORA_ROWS 64             // rows of activations of a block, 16 a warp
#define LORA_RANKS 32            // ranks of a block, and ranks that a sum over ranks takes at a time
#define LORA_DEPTH 32            // lora_down, lora_grad: columns of x a stage
#define LORA_STAGES 4            // their stages
#define LORA_COLS 64             // lora_up, lora_dx: columns of a block
#define LORA_GRAD_COLS 128       // lora_grad, gradients of factors: columns of a block, a quarter of them a warp
#define LORA_GRAD_DEPTH 32       // rows a stage
#define LORA_GRAD_STAGES 3       // stages
#define LORA_GRAD_PART 1024      // rows that are summed on their own
#define PACKED_THREADS 128       // attn_packed, attn_bwd: threads of a block, four warps that have 16 rows each
#define PACKED_ROWS 64           // attn_packed, attn_bwd: rows of a block, of queries or of keys
#define PACKED_TILE 32           // rows of the other side that it takes at a time
#define PACKED_STAGES 2          // tiles of them in shared memory
#define CE_THREADS 512           // linear_ce: threads of the block that owns a row of logits
#define GRAD_NORM_THREADS 256    // grad_norm: threads of a block
#define GRAD_NORM_PART 4096      // grad_norm: elements of a block
#define ADAMW_THREADS 256        // adamw: threads of a block, each with 4 parameters
