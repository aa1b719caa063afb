//! The embedded kernels, both shipped ones and variants of the lab, and what ptxas reported about them.

/// One `kernels/<stem>.cu`.
pub struct Module {
    /// Its file's name.
    pub stem: &'static str,
    /// Hash of its source and of the common headers, in hexadecimal: it tells to which version a result belongs.
    pub hash: &'static str,
    /// The fatbin.
    pub image: &'static [u8],
    /// Output of `ptxas -v` for all architectures.
    pub ptxas: &'static str,
}

/// All kernels; none in a build with `AOJI_SKIP_KERNELS`.
pub static MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// One file of the lab.
#[derive(Debug)]
pub struct Variant {
    /// Stem of the op whose kernels it replaces.
    pub op: &'static str,
    /// The rest of its file's name.
    pub name: &'static str,
    /// What its line `// launch:` says; empty without one.
    pub launch: &'static str,
    /// Its code; the stem is the file's, `<op>_<name>`.
    pub module: Module,
}

/// All variants; none in a build with `AOJI_SKIP_KERNELS`.
pub static LAB: &[Variant] = include!(concat!(env!("OUT_DIR"), "/lab.rs"));

/// What each fatbin holds, separated by commas: machine code (`90`) and PTX (`ptx90`). Empty in a build without kernels.
pub const IMAGES: &str = match option_env!("AOJI_KERNEL_IMAGES") {
    Some(images) => images,
    None => "",
};

/// Version of the compiler that made them.
pub const NVCC: &str = match option_env!("AOJI_NVCC_VERSION") {
    Some(version) => version,
    None => "",
};

/// Which of `images` a GPU of this compute capability runs: machine code for its own generation, if there is any (code
/// for `90a` and the like runs only on exactly that capability), else PTX that the driver compiles. `None`: it cannot
/// run them.
pub fn image_for(images: &str, (major, minor): (i32, i32)) -> Option<&str> {
    let capability = |digits: &str| digits.parse::<i32>().ok().map(|n| (n / 10, n % 10));
    let code = |image: &&str| match image.strip_suffix('a') {
        Some(exact) => capability(exact) == Some((major, minor)),
        None => capability(image).is_some_and(|(a, b)| a == major && b <= minor),
    };
    let ptx =
        |image: &&str| image.strip_prefix("ptx").and_then(capability).is_some_and(|(a, b)| (a, b) <= (major, minor));
    let digits = |image: &&str| image.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0u32);
    let newest = |fits: &dyn Fn(&&str) -> bool| images.split(',').filter(|i| fits(i)).max_by_key(digits);
    newest(&code).or_else(|| newest(&ptx))
}

/// Whether the code for a GPU of this capability has the instruction `griddepcontrol.wait`: code compiled for 9.0 and
/// newer has it.
pub(super) fn waits_for_predecessor(capability: (i32, i32)) -> bool {
    let digits = |image: &str| image.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0u32);
    capability.0 >= 9 && image_for(IMAGES, capability).is_some_and(|image| digits(image) >= 90)
}

/// What a kernel needs on one architecture (`sm_90`); `None` where it was not compiled for it.
pub fn usage(kernel: &str, arch: &str) -> Option<Usage> {
    let modules = MODULES.iter().chain(LAB.iter().map(|v| &v.module));
    modules.flat_map(Module::usage).find(|u| u.kernel == kernel && u.arch == arch)
}

/// What one kernel needs on one architecture.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Usage {
    /// Name of the `extern "C"` function.
    pub kernel: String,
    /// `sm_90`.
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

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.stem, self.hash)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_fit_as_the_driver_chooses() {
        let images = "80,86,89,90,100,120,ptx90";
        for (capability, expected) in [
            ((8, 0), Some("80")),
            ((8, 7), Some("86")), // the newest of its generation that is not newer than it
            ((8, 9), Some("89")),
            ((9, 0), Some("90")),
            ((10, 3), Some("100")),
            ((11, 0), Some("ptx90")), // a generation without machine code
            ((12, 1), Some("120")),
            ((7, 5), None),
        ] {
            assert_eq!(image_for(images, capability), expected, "{capability:?}");
        }
        if !IMAGES.is_empty() && image_for(IMAGES, (11, 0)) == Some("ptx90") {
            assert!(waits_for_predecessor((11, 0)), "PTX of 9.0 runs there");
        }
        assert!(!waits_for_predecessor((8, 9)));
        assert_eq!(image_for("90a", (10, 0)), None); // `a` runs nowhere else
        assert_eq!(image_for("", (9, 0)), None);
    }
}
