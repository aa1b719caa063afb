//! Vector instructions and threads: all that is `unsafe` on the CPU.
//!
//! Two loops for all instruction sets ([`dot`], [`weighted`]), whose registers are a trait ([`lanes`]), for all [`formats`] of weights; loops over rows that the compiler
//! makes vectors of ([`each_level`]); threads that wait for the next op awake ([`pool`]). The same bits on every CPU: the order of all sums is written
//! down, and nothing is left to a mathematical library.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod coded;
mod dot;
mod formats;
mod lanes;
pub mod pool;
mod portable;
mod weighted;

pub use coded::{Coded, Kind};
pub use dot::{DIRECT, Product, Rows, room};
pub use weighted::Weighted;

use super::{level::Level, weight::Elements};
use lanes::{Dot, Fma};
#[cfg(target_arch = "x86_64")]
use {avx2::Avx2, avx512::DpBf16, std::arch::x86_64::__m512};

/// A line of the cache: what prepared rows are whole numbers of.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct Line(pub(super) [u32; 16]);

/// Lines of a prepared row of `k` values: in bf16 or in f32, filled up to 32.
pub fn lines(level: Level, k: usize) -> usize {
    k.div_ceil(32) * if level == Level::Avx512Bf16 { 1 } else { 2 }
}

/// Work that is compiled once for each level.
trait Kernel {
    /// Does it.
    ///
    /// # Safety
    /// The CPU has the instructions of `D`.
    unsafe fn run<D: Dot>(self);
}

/// Rows and columns of the portable tile. On x86 it is for CPUs of before 2013, and each of its multiply-adds is a call: a larger
/// tile would only be more to compile.
const PORTABLE: usize = if cfg!(target_arch = "x86_64") { 1 } else { 2 };

/// Does it with the instructions of a level.
fn run(level: Level, kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2(kernel: impl Kernel) {
        // SAFETY: who calls this has the instructions.
        unsafe { kernel.run::<Fma<Avx2, 2>>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn avx512(kernel: impl Kernel) {
        // SAFETY: the same.
        unsafe { kernel.run::<Fma<__m512, 4>>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn avx512_bf16(kernel: impl Kernel) {
        // SAFETY: the same.
        unsafe { kernel.run::<DpBf16>() }
    }
    // SAFETY: a level is only made where the CPU has its instructions.
    unsafe {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => avx512_bf16(kernel),
            _ => kernel.run::<Fma<[f32; 16], PORTABLE>>(),
        }
    }
}

/// A function whose body is compiled once for each level, and the choice between them.
macro_rules! each_level {
    ($(#[$doc:meta])* pub fn $name:ident<$($g:ident: $bound:ident),*>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        pub fn $name<$($g: $bound),*>(level: Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw")]
            fn avx512<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            match level {
                // SAFETY: a level is only made where the CPU has its instructions.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: the same.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}

pub(super) use each_level;
