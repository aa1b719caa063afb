//! The kernel lab: files `kernels/lab/<op>_<name>.cu` with variants of shipped kernels, to be compared with them.
//!
//! For each shipped kernel that it replaces, a variant has a kernel `<shipped>__<name>` with the same parameters.
//! Variants are in the binary, and are loaded only when asked for. A line `// launch:` of the file may change the
//! launch; its grammar is in `geometry.rs`.

pub use super::kernels::{LAB, Variant};
use super::{geometry::Geometry, launch::Kernel};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, CudaModule};
use cudarc::nvrtc::Ptx;
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

/// The variants of one op (with `None`, of all ops); with `name`, only the one with this name or stem.
///
/// # Errors
/// `Input` when there is none.
pub fn select(op: Option<&str>, name: Option<&str>) -> Result<Vec<&'static Variant>> {
    let named = |v: &&Variant| name.is_none_or(|n| n == v.name || n == v.module.stem);
    let found: Vec<_> = LAB.iter().filter(|v| op.is_none_or(|op| op == v.op)).filter(named).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let (what, of) =
        (name.map_or(String::new(), |n| format!(" {n:?}")), op.map_or(String::new(), |o| format!(" of {o}")));
    let all: Vec<&str> = LAB.iter().map(|v| v.module.stem).collect();
    let all = if all.is_empty() { "nothing".into() } else { all.join(", ") };
    Err(Error::Input(format!("there is no variant{what}{of}: kernels/lab holds {all}; one of gemv is gemv_NAME.cu")))
}

/// The variants that `AOJI_LAB` names by their stems, separated by commas.
pub(super) fn from_env() -> Result<Vec<&'static Variant>> {
    let stems = std::env::var("AOJI_LAB").unwrap_or_default();
    let stems = stems.split(',').map(str::trim).filter(|s| !s.is_empty());
    stems.map(|s| select(None, Some(s))).collect::<Result<Vec<_>>>().map(|v| v.concat())
}

impl Variant {
    /// Names of its kernels.
    pub fn kernels(&self) -> BTreeSet<String> {
        self.module.usage().into_iter().map(|u| u.kernel).collect()
    }

    /// Puts its kernels in the place of the shipped ones.
    pub(super) fn load(
        &self,
        context: &Arc<CudaContext>,
        kernels: &mut HashMap<String, Kernel>,
    ) -> Result<Arc<CudaModule>, String> {
        let wrong = |what: String| format!("kernels/lab/{}.cu: {what}", self.module.stem);
        let geometry = Geometry::parse(self.launch).map_err(wrong)?;
        let module = context.load_module(Ptx::from_binary(self.module.image.to_vec()));
        let module = module.map_err(|e| wrong(e.to_string()))?;
        let names = self.kernels();
        if names.is_empty() {
            return Err(wrong(format!("it has no kernel; expected extern \"C\" <shipped kernel>__{}", self.name)));
        }
        for name in names {
            let shipped = name.strip_suffix(self.name).and_then(|s| s.strip_suffix("__"));
            let Some(place) = shipped.and_then(|shipped| kernels.get_mut(shipped)) else {
                let ours = kernels.keys().filter(|k| k.starts_with(self.op)).map(String::as_str);
                let ours = ours.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ");
                return Err(wrong(format!("{name} is no <shipped kernel>__{}; {} has {ours}", self.name, self.op)));
            };
            if Some(place.name.as_str()) != shipped {
                return Err(wrong(format!("{name}: {} already replaces that kernel", place.name)));
            }
            let kernel = Kernel::load(&module, &name).map_err(wrong)?;
            *place = Kernel { geometry: geometry.clone(), ..kernel };
        }
        Ok(module)
    }
}
