//! Sets of vector instructions, and which of them this CPU has.

use crate::error::{Error, Result};
use std::{fmt, sync::OnceLock};

/// A set of instructions that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every CPU has.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F and BW.
    Avx512,
    /// The same, and products of bf16.
    Avx512Bf16,
}

impl Level {
    /// All there are, the best last.
    pub const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16];

    /// As `AOJI_CPU` names it.
    pub fn name(self) -> &'static str {
        ["portable", "avx2", "avx512", "avx512bf16"][self as usize]
    }

    /// Whether this CPU has it.
    pub fn is_here(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let here = match self {
            Level::Portable => true,
            Level::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            Level::Avx512 => {
                Level::Avx2.is_here() && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
            }
            Level::Avx512Bf16 => Level::Avx512.is_here() && is_x86_feature_detected!("avx512bf16"),
        };
        #[cfg(not(target_arch = "x86_64"))]
        let here = self == Level::Portable;
        here
    }

    /// Those that this CPU has, the best last.
    pub fn here() -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(|level| level.is_here())
    }

    /// The best that this CPU has.
    pub fn best() -> Level {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Level::here().max().unwrap_or(Level::Portable))
    }

    /// The one that `AOJI_CPU` names, else the best.
    ///
    /// # Errors
    /// `Input` for what is no level or one that this CPU does not have.
    pub fn chosen() -> Result<Level> {
        match std::env::var_os("AOJI_CPU") {
            None => Ok(Level::best()),
            Some(name) => Level::named(&name.to_string_lossy()),
        }
    }

    /// The one of a name.
    ///
    /// # Errors
    /// As [`Level::chosen`].
    pub fn named(name: &str) -> Result<Level> {
        Level::here().find(|level| level.name() == name).ok_or_else(|| {
            let here: Vec<&str> = Level::here().map(Level::name).collect();
            Error::Input(format!("AOJI_CPU is {name:?}, allowed on this CPU is {}", here.join(", ")))
        })
    }

    /// The level for products of f32 activations: there are no better instructions for them.
    pub fn of_f32(self) -> Level {
        self.min(Level::Avx512)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
