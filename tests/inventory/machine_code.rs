//! The machine code of the kernels in this binary, as cuobjdump and nvdisasm print it.

use aoji::cuda::kernels::Module;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

/// One instruction.
pub struct Instruction {
    pub address: u32,
    pub text: String,
}

impl Instruction {
    /// `LDG.E.128` of `@P0 LDG.E.128 R4, [R2.64]`.
    pub fn name(&self) -> &str {
        self.text.split_whitespace().find(|w| !w.starts_with('@')).unwrap_or_default()
    }

    pub fn is(&self, name: &str) -> bool {
        self.name().split('.').next() == Some(name)
    }

    pub fn is_16_bytes(&self) -> bool {
        self.name().split('.').any(|part| part == "128")
    }

    /// The address to which a branch goes.
    pub fn target(&self) -> Option<u32> {
        let address = self.text.rsplit_once(" 0x").filter(|_| self.is("BRA"))?.1;
        u32::from_str_radix(address, 16).ok()
    }
}

/// Instructions by kernel.
pub type Code = BTreeMap<String, Vec<Instruction>>;

/// What cuobjdump prints: a line `Function : NAME`, then lines `/*address*/ instruction ; /* encoding */`.
pub fn parse(text: &str) -> Code {
    let instruction = |line: &str| -> Option<Instruction> {
        let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/ ")?;
        let text = rest.split(';').next().unwrap_or_default().trim();
        Some(Instruction { address: u32::from_str_radix(address, 16).ok()?, text: text.into() })
    };
    let kernel = |text: &str| {
        let name = text.lines().next().unwrap_or_default().trim().to_owned();
        (name, text.lines().filter_map(instruction).collect())
    };
    text.split("Function : ").skip(1).map(kernel).collect()
}

/// The disassembler, beside the compiler; `None`, with the reason printed, where it is not installed.
pub fn cuobjdump() -> Option<PathBuf> {
    let tool = option_env!("AOJI_NVCC").map(|nvcc| Path::new(nvcc).with_file_name("cuobjdump"));
    let there = tool.filter(|t| t.is_file() && t.with_file_name("nvdisasm").is_file());
    if there.is_none() {
        println!("skipped: no cuobjdump and nvdisasm beside nvcc: .venv/bin/pip install -r requirements-cuda.txt");
    }
    there
}

/// The code of a file's kernels for an architecture (`90`). Each file is disassembled once for all tests, as that
/// takes half a second.
pub fn of(module: &Module, arch: &str) -> Option<Arc<Code>> {
    type Cell = Arc<OnceLock<Arc<Code>>>;
    static KNOWN: Mutex<BTreeMap<String, Cell>> = Mutex::new(BTreeMap::new());
    let tool = cuobjdump()?;
    let name = format!("{} for sm_{arch}", module.stem);
    let cell = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).entry(name.clone()).or_default().clone();
    let code = cell.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let fatbin = dir.path().join("fatbin");
        std::fs::write(&fatbin, module.image).unwrap();
        let path = format!("{}:{}", tool.parent().unwrap().display(), std::env::var("PATH").unwrap_or_default()); // it runs nvdisasm
        let mut command = Command::new(&tool);
        let output = command.args(["-sass", "-arch", &format!("sm_{arch}")]).arg(&fatbin).env("PATH", path).output();
        let o = output.expect("cuobjdump runs");
        assert!(o.status.success(), "cuobjdump of {name}: {}", String::from_utf8_lossy(&o.stderr));
        Arc::new(parse(&String::from_utf8(o.stdout).expect("UTF-8")))
    });
    Some(code.clone())
}
