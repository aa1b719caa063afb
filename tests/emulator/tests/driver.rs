//! The driver API as a program uses it through cudarc: device, memory, streams, events, functions.
mod common;
use common::*;
use cudarc::{
    driver::{DevicePtr, result, sys},
    nvrtc::Ptx,
};
use std::{sync::Barrier, thread, time::Instant};

#[test]
fn device() {
    use sys::{CUdevice_attribute::*, CUfunction_attribute::*};
    let g = Gpu::new();
    assert_eq!(g.ctx.compute_capability().unwrap(), (9, 0));
    assert_eq!(g.ctx.name().unwrap(), "CUDA emulator");
    assert_eq!(g.ctx.uuid().unwrap().bytes.map(|c| c as u8), *b"cuda-emulator-00");
    let get = |a| g.ctx.attribute(a).unwrap();
    assert_eq!(get(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT), 4);
    assert_eq!(get(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE), 50 << 20);
    assert_eq!(get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK), 48 << 10);
    assert_eq!(get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN), 227 << 10);
    assert_eq!(get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR), 228 << 10);
    // of each capability, its own: CUDA C++ programming guide, "Technical Specifications per Compute Capability"
    for (capability, kilobytes, threads, blocks) in
        [(80, 164, 2048, 32), (86, 100, 1536, 16), (87, 164, 1536, 16), (89, 100, 1536, 24), (90, 228, 2048, 32)]
            .into_iter()
            .chain([(100, 228, 2048, 32), (110, 228, 1536, 24), (120, 100, 1536, 24)])
    {
        let of_sm = cuda_emulator::with_code(cuda_emulator::Code::Host, Some(capability), || {
            let f = g.func("t_gemv");
            let most = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            f.set_attribute(most, (kilobytes - 1) << 10).unwrap();
            assert!(f.set_attribute(most, kilobytes << 10).is_err(), "{capability}");
            [
                CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
                CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR,
                CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR,
            ]
            .map(get)
        });
        assert_eq!(of_sm, [kilobytes << 10, (kilobytes - 1) << 10, threads, blocks], "{capability}");
    }
    assert!(get(CU_DEVICE_ATTRIBUTE_CLOCK_RATE) > 0 && get(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) > 0);
    assert!(get(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) > 0);
}

#[test]
fn device_memory() {
    let g = Gpu::new();
    assert!(g.ctx.has_async_alloc());
    let (free, total) = g.ctx.mem_get_info().unwrap();
    assert!(free <= total && total == g.ctx.total_mem().unwrap());
    let out = g.stream.alloc_zeros::<u8>(total + 1).err().unwrap();
    assert_eq!(out.0, sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    let x = g.stream.alloc_zeros::<u8>(100 << 20).unwrap();
    assert!(g.ctx.mem_get_info().unwrap().0 <= total - (100 << 20));
    drop(x); // cuMemFreeAsync: memory comes back when the stream gets there
    g.stream.synchronize().unwrap();
    // other tests allocate at the same time, but little
    assert!(g.ctx.mem_get_info().unwrap().0 > total - (100 << 20));
}

#[test]
fn memory_pool() {
    use sys::CUmemPool_attribute::*;
    let g = Gpu::new();
    let (mut keep, mut got, mut used) = (u64::MAX, 0u64, 0u64);
    let x = g.upload(&[1f32; 1000]);
    // SAFETY: the device exists; each attribute is a 64-bit number and gets the address of one.
    unsafe {
        let pool = result::device::get_default_mem_pool(g.ctx.cu_device()).unwrap();
        let at = |v: &mut u64| (v as *mut u64).cast();
        result::mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, at(&mut keep)).unwrap();
        result::mem_pool::get_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, at(&mut got)).unwrap();
        result::mem_pool::get_attribute(pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, at(&mut used)).unwrap();
    }
    assert_eq!(got, u64::MAX);
    assert!(used >= x.num_bytes() as u64);
}

#[test]
fn page_locked_memory() {
    let g = Gpu::new();
    // SAFETY: freed once, and not used.
    let most = unsafe {
        let memory = result::malloc_host(5 << 20, 0).unwrap();
        let (now, most) = cuda_emulator::page_locked();
        assert!(now >= 5 << 20 && most >= now);
        result::free_host(memory).unwrap();
        most
    };
    // other tests page-lock at the same time, but little
    let (now, most_then) = cuda_emulator::page_locked();
    assert!(now < 5 << 20 && most_then >= most);
    // SAFETY: an array of numbers, written before it is read.
    let mut pinned = unsafe { g.ctx.alloc_pinned_with_flags::<f32>(4, 0) }.unwrap();
    pinned.as_mut_slice().unwrap().copy_from_slice(&[1.0, 2.0, 3.0, 4.0]);
    let mut f = g.stream.alloc_zeros::<f32>(4).unwrap();
    g.stream.memcpy_htod(&pinned, &mut f).unwrap();
    assert_eq!(g.stream.clone_dtoh(&f).unwrap(), [1.0, 2.0, 3.0, 4.0]);
    // a copy into it is asynchronous: nothing has happened before the stream is waited for
    pinned.as_mut_slice().unwrap().fill(0.0);
    let p = pinned.as_mut_ptr().unwrap();
    // SAFETY: p names four floats that live until the end of the test; they are read only after the copy is done, or
    // through this pointer.
    unsafe {
        let host = std::slice::from_raw_parts_mut(p, 4);
        result::memcpy_dtoh_async(host, f.device_ptr(&g.stream).0, g.stream.cu_stream()).unwrap();
        assert_eq!(p.read_volatile(), 0.0);
        g.stream.synchronize().unwrap();
        assert_eq!(p.read_volatile(), 1.0);
    }
}

#[test]
fn registered_memory() {
    let g = Gpu::new();
    let mut host = vec![41i32; 1000];
    let (p, n) = (host.as_mut_ptr(), size_of_val(&host[..]));
    // SAFETY: host outlives its registration.
    unsafe { sys::cuMemHostRegister_v2(p.cast(), n, 0) }.result().unwrap();
    // SAFETY: as above; the second registration must fail.
    let twice = unsafe { sys::cuMemHostRegister_v2(p.cast(), n, 0) };
    assert_eq!(twice, sys::CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    // a kernel may use it by its own address
    launch!(g, "t_advance", grid(1, 1, 32, 0), &(p as u64)).unwrap();
    g.stream.synchronize().unwrap();
    // SAFETY: p is what was registered; the kernel is done.
    let (value, free) = unsafe { (p.read_volatile(), sys::cuMemHostUnregister(p.cast())) };
    assert_eq!((value, free), (42, sys::CUresult::CUDA_SUCCESS));
    // and no longer
    launch!(g, "t_advance", grid(1, 1, 32, 0), &(p as u64)).unwrap();
    assert_eq!(g.stream.synchronize().unwrap_err().0, sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
}

#[test]
fn streams_and_timed_events() {
    let g = Gpu::new();
    let x = noise(1000, 1);
    let d = g.upload(&x);
    let mut e = g.stream.alloc_zeros::<f32>(1000).unwrap();
    assert_eq!(g.stream.clone_dtoh(&e).unwrap(), vec![0.0; 1000]);
    let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let a = g.stream.record_event(timed).unwrap();
    g.stream.memcpy_dtod(&d, &mut e).unwrap();
    launch!(g, "t_gemv", grid(1, 1, 256, 0), &g.uninit::<bf16>(8), &d, &d, &8i32, &64i32).unwrap();
    let b = g.stream.record_event(timed).unwrap();
    let took = a.elapsed_ms(&b).unwrap(); // waits for both
    assert!(took > 0.0 && took < 10_000.0, "{took}");
    assert_eq!(g.stream.clone_dtoh(&e).unwrap(), x);
    // another stream waits for this one
    let other = g.ctx.new_stream().unwrap();
    g.stream.memset_zeros(&mut e).unwrap();
    other.join(&g.stream).unwrap();
    assert_eq!(other.clone_dtoh(&e).unwrap(), vec![0.0; 1000]);
    assert_eq!(cuda_emulator::last_fault(), None);
}

/// Kernels of two streams run at the same time if two threads wait for them: each of these waits for the other.
#[test]
fn streams_of_two_threads_run_at_once() {
    let g = Gpu::new();
    let meet = || {
        let flags = g.stream.alloc_zeros::<u32>(2).unwrap();
        g.stream.synchronize().unwrap();
        let (first, together) = (flags.device_ptr(&g.stream).0, Barrier::new(2));
        let run = |mine: u64, other: u64| {
            let g = Gpu::open();
            launch!(g, "t_meet", grid(1, 1, 32, 0), &mine, &other).unwrap();
            together.wait();
            g.stream.synchronize().is_ok()
        };
        thread::scope(|s| {
            let other = s.spawn(|| run(first + 4, first));
            run(first, first + 4) & other.join().unwrap()
        })
    };
    // the emulator gives up on a kernel that waits for long, and a busy machine may hold one of the threads back
    assert!((0..20).any(|_| meet()));
}

/// Streams run lazily, so polling alone must make them run; and a host that polls too early must be told so.
#[test]
fn polling_makes_progress() {
    let g = Gpu::new();
    let mut pos = g.upload(&[0i32]);
    let mut enqueue = || {
        for _ in 0..3 {
            launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap();
        }
        g.stream.record_event(None).unwrap()
    };
    let event = enqueue();
    let mut polls = 0;
    while !event.try_is_complete().unwrap() {
        polls += 1;
        assert!(polls < 100, "polling an event does not run its stream");
    }
    assert!(polls > 0, "the event was complete before anything waited");
    enqueue();
    polls = 0;
    // SAFETY: the stream is alive.
    while unsafe { sys::cuStreamQuery(g.stream.cu_stream()) } == sys::CUresult::CUDA_ERROR_NOT_READY {
        polls += 1;
        assert!(polls < 100, "polling a stream does not run it");
    }
    assert!(polls > 0);
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [6]);
}

/// cudarc's own event tracking on, two streams: every argument waits for and records events.
#[test]
fn event_tracking() {
    use cudarc::driver::{CudaContext, PushKernelArg};
    cuda_emulator::install();
    let ctx = CudaContext::new(0).unwrap();
    let (a, b) = (ctx.new_stream().unwrap(), ctx.new_stream().unwrap());
    let f = ctx.load_module(cudarc::nvrtc::Ptx::from_binary(vec![0])).unwrap().load_function("t_advance").unwrap();
    let mut pos = a.clone_htod(&[5i32]).unwrap();
    for s in [&a, &b, &b, &a] {
        // SAFETY: t_advance takes one pointer to an i32.
        unsafe { s.launch_builder(&f).arg(&mut pos).launch(grid(1, 1, 32, 0)) }.unwrap();
    }
    assert_eq!(b.clone_dtoh(&pos).unwrap(), [9]);
    let s = ctx.default_stream();
    // SAFETY: as above.
    unsafe { s.launch_builder(&f).arg(&mut pos).launch(grid(1, 1, 32, 0)) }.unwrap();
    assert_eq!(s.clone_dtoh(&pos).unwrap(), [10]);
    ctx.synchronize().unwrap();
}

#[test]
fn functions_and_occupancy() {
    use sys::CUfunction_attribute_enum::*;
    let g = Gpu::new();
    let module = g.ctx.load_module(Ptx::from_binary(vec![0])).unwrap();
    assert_eq!(module.load_function("no_such_kernel").err().unwrap().0, sys::CUresult::CUDA_ERROR_NOT_FOUND);
    let f = module.load_function("t_gemv").unwrap();
    // SAFETY: a function of a loaded module, and no function.
    unsafe {
        sys::cuFuncLoad(f.cu_function()).result().unwrap();
        assert!(sys::cuFuncLoad(std::ptr::null_mut()).result().is_err());
    }
    assert_eq!((f.num_regs().unwrap(), f.max_threads_per_block().unwrap()), (0, 1024));
    assert_eq!(f.get_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).unwrap(), 48 << 10);
    f.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 200 << 10).unwrap();
    assert_eq!(f.get_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).unwrap(), 200 << 10);
    assert!(f.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 228 << 10).is_err());
    let blocks = |threads, smem| f.occupancy_max_active_blocks_per_multiprocessor(threads, smem, None).unwrap();
    assert_eq!(blocks(256, 0), 8); // by threads
    assert_eq!(blocks(256, 100 << 10), 2); // by shared memory
    assert_eq!(blocks(32, 0), 32); // by blocks
    assert_eq!(f.occupancy_available_dynamic_smem_per_block(2, 256).unwrap(), 113 << 10);
    extern "C" fn per_thread(threads: std::ffi::c_int) -> usize {
        threads as usize * 100
    }
    let (grid, block) = f.occupancy_max_potential_block_size(per_thread, 0, 1024, None).unwrap();
    assert_eq!((grid, block), (8, 1024)); // two blocks of 100 KiB on each of 4 multiprocessors
    // cuModuleLoadDataEx takes options
    let mut raw = std::ptr::null_mut();
    // SAFETY: the image is readable, no options are passed; the module is unloaded at once.
    unsafe {
        let none = (std::ptr::null_mut(), std::ptr::null_mut());
        sys::cuModuleLoadDataEx(&mut raw, [0u8; 4].as_ptr().cast(), 0, none.0, none.1).result().unwrap();
        sys::cuModuleUnload(raw).result().unwrap();
    }
}

/// With kernels switched off, a launch is still checked and queued, but does nothing.
#[test]
fn kernels_off() {
    let g = Gpu::new();
    let mut pos = g.upload(&[5i32]);
    let graph = g.capture(|| launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap()).unwrap().unwrap();
    cuda_emulator::set_kernels(false);
    let start = Instant::now();
    for _ in 0..1000 {
        launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap();
    }
    graph.launch().unwrap();
    println!("enqueuing a launch takes {:?}", start.elapsed() / 1000);
    assert!(launch!(g, "t_advance", grid(1, 1, 1025, 0), &mut pos).is_err());
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [5]);
    cuda_emulator::set_kernels(true);
    graph.launch().unwrap();
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [6]);
}

#[test]
fn whole_process_by_library_path() {
    let out = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", cuda_emulator::library_dir())
        .env("CUDA_EMULATOR_SM_COUNT", "7")
        .env("CUDA_EMULATOR_KERNELS_OFF", "0")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success() && text.contains("child: 7 SMs, 42"),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
#[ignore = "run by whole_process_by_library_path"]
fn child_process() {
    let g = Gpu::open(); // no install(): found through LD_LIBRARY_PATH
    let sms = g.ctx.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).unwrap();
    let mut pos = g.upload(&[41i32]);
    launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap();
    println!("child: {sms} SMs, {}", g.stream.clone_dtoh(&pos).unwrap()[0]);
}
