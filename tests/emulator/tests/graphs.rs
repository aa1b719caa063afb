//! Stream capture and graphs through cudarc.
mod common;
use common::*;
use cudarc::driver::{CudaGraph, DevicePtr, DevicePtrMut, PushKernelArg, result, sys};

#[test]
fn graph_replayed_three_times() {
    let g = Gpu::new();
    let x = noise(8, 13);
    let xd = g.upload(&x);
    let mut pos = g.upload(&[2i32]);
    let mut out = g.stream.alloc_zeros::<f32>(8).unwrap();
    let graph = g
        .capture(|| {
            launch!(g, "t_step", grid(1, 1, 32, 0), &mut out, &xd, &pos).unwrap();
            launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap();
        })
        .unwrap()
        .unwrap();
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [2], "capture must run nothing");
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [5]);
    let got = g.stream.clone_dtoh(&out).unwrap();
    assert_eq!(got, [0.0, 0.0, 2.0 * x[2], 2.0 * x[3], 2.0 * x[4], 0.0, 0.0, 0.0]);
}

/// The one node of a graph.
fn only_node(graph: &CudaGraph) -> sys::CUgraphNode {
    let (mut node, mut n) = (std::ptr::null_mut(), 1);
    // SAFETY: the graph is alive and there is room for the one node asked for.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), &mut node, &mut n) }.result().unwrap();
    assert_eq!(n, 1);
    node
}

#[test]
fn node_parameters_can_be_changed() {
    let g = Gpu::new();
    let mut pos = g.upload(&[0i32]);
    let mut other = g.upload(&[10i32]);
    let graph = g.capture(|| launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap()).unwrap().unwrap();
    graph.launch().unwrap();
    let p = other.device_ptr_mut(&g.stream).0;
    let mut params = [arg(&p)];
    // SAFETY: the node is a kernel of one pointer, and params holds the address of one.
    unsafe {
        let mut kp: sys::CUDA_KERNEL_NODE_PARAMS = std::mem::zeroed();
        sys::cuGraphKernelNodeGetParams_v2(only_node(&graph), &mut kp).result().unwrap();
        kp.kernelParams = params.as_mut_ptr();
        sys::cuGraphExecKernelNodeSetParams_v2(graph.cu_graph_exec(), only_node(&graph), &kp).result().unwrap();
    }
    graph.launch().unwrap();
    assert_eq!((g.stream.clone_dtoh(&pos).unwrap()[0], g.stream.clone_dtoh(&other).unwrap()[0]), (1, 11));
}

/// A forked capture: a copy in from page-locked memory on one stream, a kernel on another, a copy out after the join.
#[test]
fn fork_join_copies_and_update() {
    let g = Gpu::new();
    let side = g.ctx.new_stream().unwrap();
    let (fork, join) = (g.ctx.new_event(None).unwrap(), g.ctx.new_event(None).unwrap());
    let f = g.func("t_advance");
    // SAFETY: numbers, written before they are read.
    let (mut from, mut to) = unsafe {
        (g.ctx.alloc_pinned_with_flags::<i32>(1, 0).unwrap(), g.ctx.alloc_pinned_with_flags::<i32>(1, 0).unwrap())
    };
    from.as_mut_slice().unwrap()[0] = 1;
    to.as_mut_slice().unwrap()[0] = -1;
    let mut pos = g.stream.alloc_zeros::<i32>(1).unwrap();
    let d = pos.device_ptr_mut(&g.stream).0;
    let (input, output) = (from.as_mut_ptr().unwrap(), to.as_mut_ptr().unwrap());
    let enqueue = || {
        // SAFETY: both pointers name one number each that outlives the graph; t_advance takes one pointer.
        unsafe {
            let input = std::slice::from_raw_parts(input, 1);
            result::memcpy_htod_async(d, input, g.stream.cu_stream()).unwrap();
            fork.record(&g.stream).unwrap();
            side.wait(&fork).unwrap();
            side.launch_builder(&f).arg(&d).launch(grid(1, 1, 32, 0)).unwrap();
            join.record(&side).unwrap();
            g.stream.wait(&join).unwrap();
            let output = std::slice::from_raw_parts_mut(output, 1);
            result::memcpy_dtoh_async(output, d, g.stream.cu_stream()).unwrap();
        }
    };
    let graph = g.capture(enqueue).unwrap().unwrap();
    graph.upload().unwrap();
    // SAFETY: nothing else uses the two numbers while the stream is idle.
    let replay = |value: i32| unsafe {
        input.write_volatile(value);
        graph.launch().unwrap();
        g.stream.synchronize().unwrap();
        output.read_volatile()
    };
    assert_eq!((replay(9), replay(20)), (10, 21), "both copies use page-locked memory at replay");
    let edges = edges(&graph); // the wait adds to what the stream depends on, so the copy out may depend on both
    assert!(edges.contains(&(0, 1, 0, 0)) && edges.contains(&(1, 2, 0, 0)), "{edges:?}");
    // a second capture of the same topology becomes the executable graph
    g.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    enqueue();
    // SAFETY: the stream is capturing; the graph is destroyed once; info is plain data.
    unsafe {
        let again = result::stream::end_capture(g.stream.cu_stream()).unwrap();
        let mut info: sys::CUgraphExecUpdateResultInfo = std::mem::zeroed();
        sys::cuGraphExecUpdate_v2(graph.cu_graph_exec(), again, &mut info).result().unwrap();
        result::graph::destroy(again).unwrap();
    }
    assert_eq!(replay(30), 31);
    g.ctx.check_err().unwrap();
}

#[test]
fn a_fork_must_be_joined() {
    let g = Gpu::new();
    let side = g.ctx.new_stream().unwrap();
    let fork = g.ctx.new_event(None).unwrap();
    let (f, mut pos) = (g.func("t_advance"), g.upload(&[0i32]));
    let e = g.capture(|| {
        fork.record(&g.stream).unwrap();
        side.wait(&fork).unwrap();
        // SAFETY: t_advance takes one pointer.
        unsafe { side.launch_builder(&f).arg(&mut pos).launch(grid(1, 1, 32, 0)) }.unwrap();
    });
    assert_eq!(e.err().unwrap().0, sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [0]);
}

/// Each edge as (from, to, from port, type), nodes by their position.
fn edges(graph: &CudaGraph) -> Vec<(usize, usize, u8, u8)> {
    let (mut n_nodes, mut n) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: null arrays ask for the counts; the arrays have that length, and CUgraphEdgeData is plain data.
    unsafe {
        sys::cuGraphGetNodes(graph.cu_graph(), none, &mut n_nodes).result().unwrap();
        let mut nodes = vec![std::ptr::null_mut(); n_nodes];
        sys::cuGraphGetNodes(graph.cu_graph(), nodes.as_mut_ptr(), &mut n_nodes).result().unwrap();
        sys::cuGraphGetEdges_v2(graph.cu_graph(), none, none, std::ptr::null_mut(), &mut n).result().unwrap();
        let (mut from, mut to) = (vec![std::ptr::null_mut(); n], vec![std::ptr::null_mut(); n]);
        let mut data: Vec<sys::CUgraphEdgeData> = vec![std::mem::zeroed(); n];
        sys::cuGraphGetEdges_v2(graph.cu_graph(), from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr(), &mut n)
            .result()
            .unwrap();
        let at = |node| nodes.iter().position(|&x| x == node).unwrap();
        (0..n).map(|i| (at(from[i]), at(to[i]), data[i].from_port, data[i].type_)).collect()
    }
}

/// A captured programmatic launch has a programmatic edge from the kernel before it, and a plain one has a full edge.
#[test]
fn programmatic_edges() {
    let g = Gpu::new();
    let n = 128i32;
    let (x, w) = (g.upload(&vec![1f32; 128]), g.upload(&vec![3f32; 128]));
    let y = g.stream.alloc_zeros::<f32>(128).unwrap();
    let [x, w, y] = [&x, &w, &y].map(|s| s.device_ptr(&g.stream).0);
    let graph = g
        .capture(|| {
            g.launch_pdl("t_pdl", 1, 128, &mut [arg(&y), arg(&x), arg(&w), arg(&n)]);
            g.launch_pdl("t_pdl", 1, 128, &mut [arg(&y), arg(&x), arg(&w), arg(&n)]);
            launch!(g, "t_pdl", grid(1, 1, 128, 0), &y, &x, &w, &n).unwrap();
            g.launch_pdl("t_pdl", 1, 128, &mut [arg(&y), arg(&x), arg(&w), arg(&n)]);
        })
        .unwrap()
        .unwrap();
    assert_eq!(edges(&graph), [(0, 1, 1, 1), (1, 2, 0, 0), (2, 3, 1, 1)]);
    graph.launch().unwrap();
    g.stream.synchronize().unwrap();
}
