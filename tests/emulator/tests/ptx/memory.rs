//! Loads, stores, addresses, atomics, asynchronous copies.

use crate::{check, common::grid, launch, module};

const SHARED: &str = ".shared .align 128 .b8 s[1024];";

/// A block of 32 threads; `out` and `in` are addresses of 64 words, of which `in` holds `i * 0x0101010101010101`.
fn run(registers: &str, body: &str, shared: &str) -> Vec<u64> {
    let input: Vec<u64> = (0..64u64).map(|i| i * 0x0101_0101_0101_0101).collect();
    let text = module(&format!("{registers}\n{body}"), shared);
    launch(&text, grid(1, 1, 32, 4096), &input, 64)
        .unwrap_or_else(|e| panic!("{body}: {e}: {:?}", cuda_emulator::last_fault()))
}

#[test]
fn sizes_and_signs() {
    check!("ld.global.u8 %w, [%at]"; [0x1_82] => 0x82);
    check!("ld.global.s8 %w, [%at]"; [0x1_82] => 0xffff_ff82u32);
    check!("ld.global.u16 %s, [%at+0]"; [0x8_8003] => 0x8003);
    check!("ld.global.s16 %w, [%at]"; [0x8003] => 0xffff_8003u32);
    check!("ld.global.u32 %w, [%at+4]"; [0x7_0000_0009u64] => 7);
    check!("ld.global.s32 %l, [%at]"; [0x8000_0000u32] => 0xffff_ffff_8000_0000u64);
    check!("ld.global.u64 %l, [%at]"; [1u64 << 40] => 1u64 << 40);
    check!("ld.global.f32 %v, [%at]"; [0x3f80_0000] => 0x3f80_0000);
    check!("ld.global.f64 %x, [%at]"; [1u64 << 62] => 1u64 << 62);
    check!("ld.u32 %w, [%at]"; [7] => 7);
    check!("ld.global.cg.u8 %w, [%at]"; [0x1_82] => 0x82);
    for how in [
        "ld.global.cg.u32",
        "ld.global.ca.u32",
        "ld.global.nc.u32",
        "ld.volatile.global.u32",
        "ld.relaxed.gpu.global.u32",
        "ld.acquire.gpu.global.u32",
        "ld.global.L1::evict_last.u32",
    ] {
        check!(&format!("{how} %w, [%at]"); [7] => 7);
    }
}

/// The parameters of a launch lie one after the other, each at a multiple of its size.
#[test]
fn parameters() {
    let text = ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 out, .param .u64 .ptr .global .align 8 in, .param .u8 a,
        .param .f32 b, .param .u16 c, .param .s32 d, .param .u32 e, .param .u64 f) {
        .reg .b64 %out, %f; .reg .b32 %a, %d, %e; .reg .f32 %b; .reg .b16 %c;
        ld.param.u64 %out, [out]; ld.param.u8 %a, [a]; ld.param.f32 %b, [b]; ld.param.u16 %c, [c]; ld.param.s32 %d, [d]; ld.param.u32 %e, [e]; ld.param.u64 %f, [f];
        st.global.u32 [%out], %a; st.global.f32 [%out+4], %b; st.global.u16 [%out+8], %c; st.global.s32 [%out+16], %d; st.global.u32 [%out+20], %e;
        st.global.u64 [%out+24], %f; ld.param.u32 %a, [f+4]; st.global.u32 [%out+32], %a; }";
    let g = crate::open();
    let kernel = g.ctx.load_module(cudarc::nvrtc::Ptx::from_src(text)).unwrap().load_function("k").unwrap();
    let mut out = g.stream.alloc_zeros::<u64>(5).unwrap();
    let x = g.upload(&[0u64]);
    use cudarc::driver::PushKernelArg;
    let mut b = g.stream.launch_builder(&kernel);
    b.arg(&mut out).arg(&x).arg(&7u8).arg(&1.5f32).arg(&300u16).arg(&-2i32).arg(&9u32).arg(&0x5_0000_0006u64);
    // SAFETY: the kernel's parameters in order and of their types.
    unsafe { b.launch(grid(1, 1, 1, 0)) }.unwrap();
    let want = [7 | u64::from(1.5f32.to_bits()) << 32, 300, 0xffff_fffe | 9 << 32, 0x5_0000_0006, 5];
    assert_eq!(g.stream.clone_dtoh(&out).unwrap(), want);
}

#[test]
fn vectors() {
    let registers = ".reg .b64 %o, %i, %a, %b; .reg .b32 %r<4>; .reg .b16 %h<4>; .reg .f32 %f<4>;";
    let at = "mul.wide.u32 %o, %tid, 16; add.s64 %i, %o, %in; add.s64 %o, %o, %out;\n";
    let input = |i: u64| i * 0x0101_0101_0101_0101;
    let same: Vec<u64> = (0..64).map(input).collect();
    for body in [
        "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%i]; st.global.v4.u32 [%o], {%r0, %r1, %r2, %r3};",
        "ld.global.nc.L1::no_allocate.v4.u32 {%r0, %r1, %r2, %r3}, [%i]; st.global.v4.b32 [%o], {%r0, %r1, %r2, %r3};",
        "ld.global.cg.v4.u32 {%r0, %r1, %r2, %r3}, [%i]; st.v4.u32 [%o], {%r0, %r1, %r2, %r3};",
        "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%i]; st.global.v4.f32 [%o], {%f0, %f1, %f2, %f3};",
        "ld.global.v2.u64 {%a, %b}, [%i]; st.global.v2.u64 [%o], {%a, %b};",
        "ld.global.v2.f32 {%f0, %f1}, [%i]; st.global.v2.f32 [%o], {%f0, %f1}; ld.global.u64 %a, [%i+8]; st.global.u64 [%o+8], %a;",
        "ld.global.v4.u16 {%h0, %h1, %h2, %h3}, [%i]; st.global.v4.u16 [%o], {%h0, %h1, %h2, %h3}; ld.global.u64 %a, [%i+8]; st.relaxed.sys.global.u64 [%o+8], %a;",
    ] {
        assert_eq!(run(registers, &format!("{at}{body}"), ""), same, "{body}");
    }
    // through shared memory
    for body in [
        "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%i]; st.shared.v4.f32 [%r0], {%f0, %f1, %f2, %f3}; ld.shared.v4.f32 {%f0, %f1, %f2, %f3}, [%r0]; st.global.v4.f32 [%o], {%f0, %f1, %f2, %f3};",
        "ld.global.v2.u64 {%a, %b}, [%i]; st.shared.u64 [%r0], %a; st.shared.u64 [%r0+8], %b; ld.shared.u64 %b, [%r0+8]; ld.shared.u64 %a, [%r0]; st.global.u64 [%o], %a; st.global.u64 [%o+8], %b;",
        "ld.global.v2.f32 {%f0, %f1}, [%i]; st.shared.f32 [%r0], %f0; ld.shared.f32 %f2, [%r0]; st.global.f32 [%o], %f2; st.global.f32 [%o+4], %f1; ld.global.u64 %a, [%i+8]; st.global.u64 [%o+8], %a;",
        "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%i]; st.shared.v2.f32 [%r0], {%f0, %f1}; st.shared.v2.f32 [%r0+8], {%f2, %f3}; ld.shared.v2.f32 {%f2, %f3}, [%r0]; ld.shared.v2.f32 {%f0, %f1}, [%r0+8]; st.global.v2.f32 [%o], {%f2, %f3}; st.global.v2.f32 [%o+8], {%f0, %f1};",
        "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%i]; st.global.v2.u32 [%o], {%r0, %r1}; st.global.v2.u32 [%o+8], {%r2, %r3};",
        "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%i]; st.shared.v4.f32 [%r0], {%f0, %f1, %f2, %f3}; ld.shared.v2.u32 {%r1, %r2}, [%r0]; ld.shared.v2.u32 {%r3, %r0}, [%r0+8]; st.global.v2.u32 [%o], {%r1, %r2}; st.global.v2.u32 [%o+8], {%r3, %r0};",
    ] {
        let address = "mov.u32 %r0, s; shl.b32 %r1, %tid, 4; add.s32 %r0, %r0, %r1;";
        assert_eq!(run(registers, &format!("{at}{address}{body}"), SHARED), same, "{body}");
    }
    // one byte of a register
    let out = run(
        registers,
        &format!(
            "{at} mov.u32 %r0, 0x1234; st.global.u8 [%o+1], %r0; st.global.u16 [%o+8], %r0; st.release.gpu.global.u32 [%o+12], %r0;"
        ),
        "",
    );
    assert_eq!(out[..2], [0x3400, 0x1234_0000_1234]);
    // two bytes of shared memory, each in a register of its own
    let bytes =
        "mov.u32 %r0, s; shl.b32 %r1, %tid, 4; add.s32 %r0, %r0, %r1; mov.u32 %r2, 0x1234; add.s32 %r3, %tid, 7;
        st.shared.u8 [%r0], %r3; st.shared.u8 [%r0+1], %r2;
        ld.shared.v2.u8 {%h0, %h1}, [%r0]; st.global.u16 [%o], %h0; st.global.u16 [%o+2], %h1;";
    let out = run(registers, &format!("{at}{bytes}"), SHARED);
    assert_eq!([out[0], out[10], out[62]], [7, 12, 38].map(|low| low | 0x34 << 16));
}

#[test]
fn addresses() {
    let registers = ".reg .b64 %o, %a, %b; .reg .b32 %r<4>; .reg .pred %p;";
    let out = "mul.wide.u32 %o, %tid, 8; add.s64 %o, %o, %out;";
    // a shared array's own addresses, as 32-bit and as generic ones
    for (store, load) in [
        (
            "mov.u32 %r1, s; shl.b32 %r2, %tid, 2; add.s32 %r1, %r1, %r2; st.shared.u32 [%r1+8], %tid;",
            "ld.shared.u32 %r3, [%r1+8];",
        ),
        (
            "mov.u32 %r1, s; cvt.u64.u32 %a, %r1; cvta.shared.u64 %b, %a; mul.wide.u32 %a, %tid, 4; add.s64 %b, %b, %a; st.u32 [%b], %tid;",
            "ld.u32 %r3, [%b];",
        ),
        (
            "mov.u64 %a, s; cvta.shared.u64 %b, %a; cvta.to.shared.u64 %a, %b; cvt.u32.u64 %r1, %a; shl.b32 %r2, %tid, 2; add.s32 %r1, %r1, %r2; st.shared.u32 [%r1], %tid;",
            "ld.volatile.shared.u32 %r3, [%r1];",
        ),
        (
            "mov.u32 %r1, d; shl.b32 %r2, %tid, 2; add.s32 %r1, %r1, %r2; st.shared.u32 [%r1+2048], %tid;",
            "ld.shared.u32 %r3, [%r1+2048];",
        ),
    ] {
        let shared = format!("{SHARED}\n.extern .shared .align 1024 .b8 d[];");
        let got = run(
            registers,
            &format!("{out}{store} bar.warp.sync -1; {load} cvt.u64.u32 %a, %r3; st.global.u64 [%o], %a;"),
            &shared,
        );
        assert!((0..32).all(|i| got[i] == i as u64), "{store}: {got:?}");
    }
    let got = run(registers, &format!("{out} cvta.to.global.u64 %a, %out; cvta.global.u64 %a, %a; isspacep.global %p, %a; selp.u64 %b, 1, 0, %p;
        mov.u64 %a, s; cvta.shared.u64 %a, %a; isspacep.shared %p, %a; selp.u64 %a, 2, 0, %p; add.s64 %a, %a, %b; st.global.u64 [%o], %a;"), SHARED);
    assert_eq!(got[0], 3);
    // a thread's own memory
    let got = run(registers, &format!(".local .align 8 .b8 depot[64]; {out} mov.u64 %a, depot; cvta.local.u64 %b, %a; st.local.u32 [%a+4], %tid; ld.u32 %r1, [%b+4];
        cvt.u64.u32 %a, %r1; st.global.u64 [%o], %a;"), "");
    assert!((0..32).all(|i| got[i] == i as u64), "{got:?}");
    // hints do nothing
    run(
        registers,
        "prefetch.global.L2 [%in]; prefetch.global.L1 [%in]; membar.gl; membar.cta; fence.acq_rel.gpu; fence.proxy.async.shared::cta;",
        "",
    );
}

#[test]
fn atomics() {
    let registers = ".reg .b64 %o, %a, %b; .reg .b32 %r<4>; .reg .f32 %f; .reg .b32 %s0; mov.u32 %s0, s;";
    let each = |op: &str| {
        format!("mul.wide.u32 %o, %tid, 8; add.s64 %o, %o, %out; add.s32 %r1, %tid, 1; cvt.u64.u32 %a, %r1; {op}")
    };
    let sum = 32 * 33 / 2;
    // lanes come one after another, in any order: the sum of what they saw before is not told, but the end is
    for (op, want) in [
        ("red.global.add.u32 [%out], %r1;", sum),
        ("red.release.gpu.global.add.u32 [%out], %r1;", sum),
        ("atom.acq_rel.gpu.global.add.u32 %r2, [%out], %r1;", sum),
        ("atom.global.add.u32 %r2, [%out], %r1;", sum),
        ("atom.global.add.u64 %b, [%out], %a;", sum),
        ("atom.global.max.u64 %b, [%out], %a;", 32),
        ("atom.global.max.u32 %r2, [%out], %r1;", 32),
        ("atom.global.min.s32 %r2, [%out], -4;", 0xffff_fffc),
        ("atom.global.max.s32 %r2, [%out], -4;", 0),
        ("atom.global.or.b32 %r2, [%out], %r1;", 63),
        ("atom.global.xor.b32 %r2, [%out], 1;", 0),
        ("atom.global.exch.b64 %b, [%out], 77;", 77),
        ("atom.global.exch.b32 %r2, [%out], 77;", 77),
        ("atom.global.cas.b32 %r2, [%out], 0, 5;", 5),
        ("atom.global.cas.b64 %b, [%out], 1, 5;", 0),
        ("atom.global.inc.u32 %r2, [%out], 9;", 2), // 0 to 9 and again: 32 steps
        ("atom.global.dec.u32 %r2, [%out], 9;", 8),
        ("cvt.rn.f32.u32 %f, %r1; atom.global.add.f32 %f, [%out], %f;", u64::from((sum as f32).to_bits())),
        ("atom.add.u32 %r2, [%out], %r1;", sum),
    ] {
        assert_eq!(run(registers, &each(op), SHARED)[0], want, "{op}");
    }
    // in shared memory, and what was there before comes back
    let body = "mul.wide.u32 %o, %tid, 8; add.s64 %o, %o, %out; shl.b32 %r1, %tid, 2; add.s32 %r1, %r1, %s0; st.shared.u32 [%r1], %tid; bar.sync 0;
        atom.shared.add.u32 %r2, [%r1], 5; ld.shared.u32 %r3, [%r1]; mov.b64 %a, {%r2, %r3}; st.global.u64 [%o], %a;";
    let got = run(registers, body, SHARED);
    assert!((0..32u64).all(|i| got[i as usize] == i | (i + 5) << 32), "{got:?}");
}

#[test]
fn asynchronous_copies() {
    let registers = ".reg .b64 %o, %i, %a; .reg .b32 %r<4>, %to, %n; .reg .pred %p;";
    let at = "mul.wide.u32 %o, %tid, 16; add.s64 %i, %o, %in; add.s64 %o, %o, %out; mov.u32 %to, s; shl.b32 %r0, %tid, 4; add.s32 %to, %to, %r0;";
    let back = "cp.async.commit_group; cp.async.wait_group 0; ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%to]; st.global.v4.u32 [%o], {%r0, %r1, %r2, %r3};";
    let input = |i: u64| i * 0x0101_0101_0101_0101;
    for op in [
        "cp.async.cg.shared.global [%to], [%i], 16;",
        "cp.async.ca.shared.global [%to], [%i], 16;",
        "mov.u32 %n, 16; cp.async.cg.shared.global [%to], [%i], 16, %n;",
        "cp.async.cg.shared.global.L2::128B [%to], [%i], 16;",
        "cp.async.cg.shared.global.L2::256B [%to], [%i], 16;",
        "createpolicy.fractional.L2::evict_first.b64 %a, 1.0; cp.async.cg.shared.global.L2::cache_hint [%to], [%i], 16, %a;",
        "createpolicy.fractional.L2::evict_first.b64 %a; mov.u32 %n, 16; cp.async.cg.shared.global.L2::cache_hint [%to], [%i], 16, %n, %a;",
    ] {
        let got = run(registers, &format!("{at}{op}{back}"), SHARED);
        assert!((0..64).all(|i| got[i as usize] == input(i)), "{op}: {got:x?}");
    }
    // fewer bytes than are written: the rest is zero; none: nothing is read at all
    let got =
        run(registers, &format!("{at} mov.u32 %n, 8; cp.async.cg.shared.global [%to], [%i], 16, %n; {back}"), SHARED);
    assert!((0..64).all(|i| got[i as usize] == if i % 2 == 0 { input(i) } else { 0 }), "{got:x?}");
    let got = run(
        registers,
        &format!("{at} mov.u64 %i, 16; mov.u32 %n, 0; cp.async.cg.shared.global [%to], [%i], 16, %n; {back}"),
        SHARED,
    );
    assert_eq!(got, [0; 64]);
    let got = run(registers, &format!("{at} cp.async.ca.shared.global [%to], [%i], 4; cp.async.ca.shared.global [%to+8], [%i+8], 8; cp.async.wait_all;
        ld.shared.u32 %r0, [%to]; ld.shared.u32 %r2, [%to+8]; mov.b64 %a, {{%r0, %r2}}; st.global.u64 [%o], %a;"), SHARED);
    assert_eq!(got[2], 0x0303_0303_0202_0202);
    // the second group may still be on its way
    run(registers, &format!("{at} cp.async.ca.shared.global [%to], [%i], 16; cp.async.commit_group; cp.async.ca.shared.global [%to+512], [%i], 16; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.u32 %r0, [%to]; cp.async.wait_group 0;"), SHARED);
}
