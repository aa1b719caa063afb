//! The embedded kernels, and what ptxas said of them.

/// One `kernels/<stem>.cu`.
pub struct Module {
    /// Its file's name.
    pub stem: &'static str,
    /// The fatbin.
    pub image: &'static [u8],
    /// Output of `ptxas -v` for all architectures.
    pub ptxas: &'static str,
}

/// All kernels; none in a build with `AOJI_SKIP_KERNELS`.
pub static MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// What one kernel needs on one architecture.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage {
    /// Name of the `extern "C"` function.
    pub kernel: String,
    /// `sm_90a`.
    pub arch: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread.
    pub stack: u32,
    /// Bytes of spilled registers, stored and loaded.
    pub spills: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
}

impl Module {
    /// Resources of each kernel on each architecture.
    pub fn usage(&self) -> Vec<Usage> {
        let mut v: Vec<Usage> = Vec::new();
        for line in self.ptxas.lines() {
            // the number before `unit`
            let number = |unit: &str| -> u32 {
                let before = line.find(unit).map(|i| line[..i].trim_end());
                before.and_then(|b| b.rsplit([' ', ',']).next()?.parse().ok()).unwrap_or(0)
            };
            if let Some(rest) = line.split("Compiling entry function '").nth(1) {
                let mut quoted = rest.split('\'');
                let (kernel, arch) = (quoted.next().unwrap_or_default(), quoted.nth(1).unwrap_or_default());
                v.push(Usage { kernel: kernel.into(), arch: arch.into(), ..Usage::default() });
            } else if let Some(u) = v.last_mut() {
                if line.contains("bytes spill stores") {
                    u.stack = number(" bytes stack frame");
                    u.spills = number(" bytes spill stores") + number(" bytes spill loads");
                }
                if line.contains("Used ") {
                    u.registers = number(" registers");
                    u.shared = number(" bytes smem");
                }
            }
        }
        v
    }
}
