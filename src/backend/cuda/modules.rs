//! The kernels, loaded by a thread of their own while weights are on their way.

use super::{Info, kernels::MODULES, lab::Variant, launch::Kernel};
use crate::{
    error::{Error, Result},
    files::Startup,
};
use cudarc::{
    driver::{CudaContext, CudaModule, sys},
    nvrtc::Ptx,
};
use std::{
    collections::{HashMap, hash_map::Entry},
    panic,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread::{self, JoinHandle},
};

/// All kernels of this binary, or soon.
pub(super) struct Modules {
    loaded: OnceLock<Result<Loaded, String>>,
    /// Taken by who waits for it.
    loading: Mutex<Option<JoinHandle<Result<Loaded, String>>>>,
}

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
        let loading = thread::spawn(move || startup.time("kernels", bytes, || load(&context, &info, &variants)));
        Modules { loaded: OnceLock::new(), loading: Mutex::new(Some(loading)) }
    }

    /// By name, when they are loaded.
    pub fn get(&self) -> Result<&HashMap<String, Kernel>> {
        match self.loaded.get_or_init(|| self.wait().expect("one waits for the thread, once")) {
            Ok(loaded) => Ok(&loaded.kernels),
            Err(cause) => Err(Error::Cuda { what: "loading the kernels".into(), cause: cause.clone() }),
        }
    }

    fn wait(&self) -> Option<Result<Loaded, String>> {
        let thread = self.loading.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(thread.join().unwrap_or_else(|e| panic::resume_unwind(e)))
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        self.wait(); // the thread must not call a driver that the end of the process closes
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
                let name = place.key();
                let function = module.load_function(name).map_err(|e| format!("{name}: {e}"))?;
                // SAFETY: a function of a loaded module, in the context that load_function made this thread's. Left to
                // itself the driver puts a kernel on the device when it is launched first, and the first token would
                // wait for that.
                let on_device = unsafe { sys::cuFuncLoad(function.cu_function()) }.result();
                on_device.map_err(|e| format!("{name}: {e}"))?;
                let kernel = Kernel::new(function, name.clone());
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
