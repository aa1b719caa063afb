//! The kernels, which a thread of their own loads while weights are copied.

use super::{Info, background::Background, kernels::MODULES, lab::Variant, launch::Kernel};
use crate::{
    error::{Error, Result},
    files::Startup,
};
use cudarc::{
    driver::{CudaContext, CudaModule},
    nvrtc::Ptx,
};
use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

/// All kernels of this binary, loaded or being loaded.
pub(super) struct Modules(Background<Result<Loaded, String>>);

struct Loaded {
    kernels: HashMap<String, Kernel>,
    /// Unloaded when dropped.
    _modules: Vec<Arc<CudaModule>>,
}

impl Modules {
    /// Begins to load.
    pub fn load(context: &Arc<CudaContext>, info: &Info, variants: &[&'static Variant], startup: &Startup) -> Modules {
        let (context, info, startup) = (context.clone(), info.clone(), startup.clone());
        let variants = variants.to_vec();
        let bytes = MODULES.iter().map(|m| m.image.len() as u64).sum();
        let loading = Background::default();
        loading.begin(move || startup.time("kernels", bytes, || load(&context, &info, &variants)));
        Modules(loading)
    }

    /// The kernels by name; waits until they are loaded.
    pub fn get(&self) -> Result<&HashMap<String, Kernel>> {
        match self.0.get_or(|| Err("nobody loads them".into())) {
            Ok(loaded) => Ok(&loaded.kernels),
            Err(cause) => Err(Error::Cuda { what: "loading the kernels".into(), cause: cause.clone() }),
        }
    }
}

fn load(context: &Arc<CudaContext>, info: &Info, variants: &[&Variant]) -> Result<Loaded, String> {
    let (mut kernels, mut modules) = (HashMap::new(), Vec::new());
    for m in MODULES {
        let module = context.load_module(Ptx::from_binary(m.image.to_vec())).map_err(|e| {
            let (a, b) = info.capability;
            format!("kernels/{}.cu on {} (sm_{a}{b}): {e}; aoji needs Ampere (sm_80) or newer", m.stem, info.name)
        })?;
        for name in m.usage().into_iter().map(|u| u.kernel) {
            if let Entry::Vacant(place) = kernels.entry(name) {
                let kernel = Kernel::load(&module, place.key())?;
                place.insert(kernel);
            }
        }
        modules.push(module);
    }
    for v in variants {
        modules.push(v.load(context, &mut kernels)?);
    }
    Ok(Loaded { kernels, _modules: modules })
}
