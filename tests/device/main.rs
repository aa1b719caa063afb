//! Models and their parts on the emulated device, or with `AOJI_TEST_GPU=1` on the GPU, beside the CPU. They are one program, so
//! that the tests of all files run beside each other.

#[path = "../common/gguf.rs"]
mod gguf_file;
#[macro_use]
#[path = "../common/ptx.rs"]
mod ptx;
#[path = "../common/tiny.rs"]
mod tiny;
#[path = "../common/tiny_gguf.rs"]
mod tiny_gguf;

mod batch;
mod decode;
mod kv;
mod lockstep;
mod memory;
mod packed;
mod prefill;
mod quantized;
mod sampler;
mod session;
mod train;
