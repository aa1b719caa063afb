//! What the driver says of its GPUs.

use super::{driver_version, failed};
use crate::error::Result;
use cudarc::driver::{CudaContext, DriverError, result::device, sys};

/// What the driver says of a GPU.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Info {
    /// `NVIDIA H200`
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Bytes.
    pub l2_bytes: u64,
    /// Most bytes of shared memory that a block can ask for.
    pub shared_per_block: u32,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_sm: u32,
    /// Bytes.
    pub memory: u64,
    /// CUDA version of the driver; 13000 is 13.0.
    pub driver: i32,
    /// Its PCI address, as nvidia-smi writes it: `00000000:1B:00.0`.
    pub pci: String,
}

impl Info {
    /// Asks about GPU `ordinal`; nothing is loaded and no memory is taken.
    pub(super) fn of(ordinal: usize, driver: i32) -> Result<Info, DriverError> {
        use sys::CUdevice_attribute as A;
        let device = device::get(ordinal as i32)?;
        // SAFETY: `device` is a device that the driver just gave.
        let attribute = |a| unsafe { device::get_attribute(device, a) };
        Ok(Info {
            name: device::get_name(device)?,
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            sm_count: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            l2_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u64,
            shared_per_block: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
            shared_per_sm: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)? as u32,
            // SAFETY: as above.
            memory: unsafe { device::total_mem(device)? } as u64,
            driver,
            pci: format!(
                "{:08X}:{:02X}:{:02X}.0",
                attribute(A::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?
            ),
        })
    }

    /// Whether it is not a GPU but the emulator that runs the kernels on the CPU: its times mean nothing.
    pub fn is_emulated(&self) -> bool {
        self.name == "CUDA emulator"
    }
}

/// The GPUs that the driver shows.
///
/// # Errors
/// `NoGpu` without a driver, `Cuda` when the driver does not answer.
pub fn devices() -> Result<Vec<Info>> {
    let driver = driver_version()?;
    let all = || -> Result<Vec<Info>, DriverError> {
        let count = match CudaContext::device_count() {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE | sys::CUresult::CUDA_ERROR_STUB_LIBRARY)) => 0,
            count => count? as usize,
        };
        (0..count).map(|i| Info::of(i, driver)).collect()
    };
    all().map_err(failed(|| "asking the driver for its GPUs".into()))
}
