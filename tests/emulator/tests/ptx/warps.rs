//! What the lanes of a warp do together: shuffles, votes, matrices, barriers, branches.

use crate::{check, common::grid, launch, module, results};

fn lanes(f: impl Fn(u64) -> u64) -> Vec<Vec<u64>> {
    (0..32).map(|i| vec![f(i)]).collect()
}

#[test]
fn shuffles() {
    let x = lanes(|i| i * 10);
    let all = |instruction: &str, want: &dyn Fn(u64) -> u64| {
        let got = results(instruction, &x);
        assert!((0..32).all(|i| got[i as usize] == want(i)), "{instruction}: {got:?}");
    };
    // c: the clamp in the low five bits, above bit 8 which bits of the lane are the segment's
    all("shfl.sync.bfly.b32 %w, %r0, 1, 31, -1", &|i| (i ^ 1) * 10);
    all("shfl.sync.bfly.b32 %w, %r0, 16, 31, -1", &|i| (i ^ 16) * 10);
    all("shfl.sync.up.b32 %w, %r0, 1, 0, -1", &|i| if i > 0 { (i - 1) * 10 } else { 0 });
    all("shfl.sync.down.b32 %w, %r0, 3, 31, -1", &|i| if i + 3 <= 31 { (i + 3) * 10 } else { i * 10 });
    all("shfl.sync.idx.b32 %w, %r0, 5, 31, -1", &|_| 50);
    // segments of eight: mask 0x18, of the clamp the segment's own bits count
    all("shfl.sync.idx.b32 %w, %r0, 2, 0x181f, -1", &|i| (i / 8 * 8 + 2) * 10);
    all("shfl.sync.down.b32 %w, %r0, 1, 0x181f, -1", &|i| if i % 8 < 7 { (i + 1) * 10 } else { i * 10 });
    all("shfl.sync.up.b32 %w, %r0, 2, 0x1800, -1", &|i| if i % 8 >= 2 { (i - 2) * 10 } else { i * 10 });
    // the predicate: whether the source was in range
    all("shfl.sync.up.b32 %w|%p, %r0, 1, 0, -1; selp.u32 %w, 1, 0, %p", &|i| u64::from(i > 0));
    all("shfl.sync.idx.b32 %w|%p, %r0, 5, 31, -1; selp.u32 %w, 1, 0, %p", &|_| 1);
    all("shfl.sync.bfly.b32 %w|%p, %r0, 8, 0x1807, -1; selp.u32 %w, 1, 0, %p", &|i| u64::from(i & 8 != 0));
}

#[test]
fn votes_and_reductions() {
    let odd = lanes(|i| i % 2);
    let same = |instruction: &str, x: &[Vec<u64>], want: u64| {
        let got = results(instruction, x);
        assert!(got.iter().all(|g| *g == want), "{instruction}: {got:x?}");
    };
    same("vote.sync.ballot.b32 %w, %q0, -1", &odd, 0xaaaa_aaaa);
    same("vote.sync.ballot.b32 %w, !%q0, -1", &odd, 0x5555_5555);
    same("vote.sync.any.pred %p, %q0, -1", &odd, 1);
    same("vote.sync.all.pred %p, %q0, -1", &odd, 0);
    same("vote.sync.uni.pred %p, %q0, -1", &lanes(|_| 0), 1);
    same("redux.sync.add.s32 %w, %r0, -1", &lanes(|i| i), 496);
    same("redux.sync.max.u32 %w, %r0, -1", &lanes(|i| i), 31);
    same("redux.sync.min.s32 %w, %r0, -1", &lanes(|i| i.wrapping_sub(5)), 0xffff_fffb);
    same("redux.sync.or.b32 %w, %r0, -1", &lanes(|i| 1 << (i % 8)), 0xff);
    let got = results("match.any.sync.b32 %w, %r0, -1", &lanes(|i| i / 16));
    assert!((0..32).all(|i| got[i] == if i < 16 { 0xffff } else { 0xffff_0000 }), "{got:x?}");
    same("bar.warp.sync -1; mov.u32 %w, 1", &odd, 1);
}

/// Small integers in bf16 as the ISA's tables place them: a row-major 16 x 16, b column-major 16 x 8, c and d 16 x 8.
#[test]
fn mma_m16n8k16() {
    let a = |row: usize, col: usize| ((row * 3 + col * 5) % 7) as f32 - 3.0;
    let b = |row: usize, col: usize| ((row * 2 + col) % 5) as f32 - 2.0;
    let c = |row: usize, col: usize| (row * 8 + col) as f32;
    let bf16 = |x: f32| u64::from(x.to_bits() >> 16);
    let mut input = Vec::new();
    for lane in 0..32 {
        let (group, in_group) = (lane / 4, lane % 4);
        // a: row = group for i 0, 1, 4, 5, else group + 8; col = in_group * 2 + (i & 1), + 8 from i = 4 on
        let at_a =
            |i: usize| a(group + if i & 2 == 0 { 0 } else { 8 }, in_group * 2 + (i & 1) + if i >= 4 { 8 } else { 0 });
        // b: row = in_group * 2 + (i & 1), + 8 from i = 2 on; col = group
        let at_b = |i: usize| b(in_group * 2 + (i & 1) + if i >= 2 { 8 } else { 0 }, group);
        // c: row = group for i 0, 1, else group + 8; col = in_group * 2 + (i & 1)
        let at_c = |i: usize| c(group + if i < 2 { 0 } else { 8 }, in_group * 2 + (i & 1));
        let pair = |f: &dyn Fn(usize) -> f32, i: usize| bf16(f(2 * i)) | bf16(f(2 * i + 1)) << 16;
        let words: Vec<u64> = (0..4)
            .map(|i| pair(&at_a, i))
            .chain((0..2).map(|i| pair(&at_b, i)))
            .chain((0..4).map(|i| at_c(i).to_bits().into()))
            .collect();
        input.extend(words.chunks(2).map(|w| w[0] | w[1] << 32));
    }
    let body = ".reg .b64 %o; .reg .b32 %a<4>, %b<2>; .reg .f32 %c<4>, %d<4>; mul.wide.u32 %o, %tid, 40; add.s64 %o, %o, %in;
        ld.global.v2.u32 {%a0, %a1}, [%o]; ld.global.v2.u32 {%a2, %a3}, [%o+8]; ld.global.v2.u32 {%b0, %b1}, [%o+16]; ld.global.v2.f32 {%c0, %c1}, [%o+24]; ld.global.v2.f32 {%c2, %c3}, [%o+32];
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1, %c2, %c3};
        mul.wide.u32 %o, %tid, 16; add.s64 %o, %o, %out; st.global.v4.f32 [%o], {%d0, %d1, %d2, %d3};";
    let out = launch(&module(body, ""), grid(1, 1, 32, 0), &input, 64).unwrap();
    let out: Vec<f32> = out.iter().flat_map(|w| [*w as u32, (*w >> 32) as u32]).map(f32::from_bits).collect();
    for lane in 0..32 {
        for i in 0..4 {
            let (row, col) = (lane / 4 + if i < 2 { 0 } else { 8 }, lane % 4 * 2 + (i & 1));
            let want = c(row, col) + (0..16).map(|k| a(row, k) * b(k, col)).sum::<f32>();
            assert_eq!(out[lane * 4 + i], want, "row {row}, column {col}");
        }
    }
}

/// Matrix `i` is at byte 128 `i`; element (row, col) of it holds `i * 64 + row * 8 + col`.
#[test]
fn ldmatrix() {
    let words: Vec<u64> = (0..64u64).map(|w| (0..4).map(|k| (w * 4 + k) << (16 * k)).sum()).collect();
    for (n, trans) in [(4, false), (4, true), (2, false), (2, true), (1, false)] {
        let registers = ["%r0, %r1, %r2, %r3", "", "%r0, %r1", "%r0"][4 - n];
        let t = if trans { ".trans" } else { "" };
        // lane i of the first 8 n gives the address of row i % 8 of matrix i / 8; the others' do not count
        let body = format!(
            ".reg .b64 %o, %l; .reg .b32 %r<4>, %s; .reg .pred %p; mul.wide.u32 %o, %tid, 16; add.s64 %o, %o, %in;
             mov.u32 %s, m; shl.b32 %r0, %tid, 4; add.s32 %s, %s, %r0; ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%o]; st.shared.v4.u32 [%s], {{%r0, %r1, %r2, %r3}}; bar.sync 0;
             setp.ge.u32 %p, %tid, {}; @%p mov.u32 %s, 0x7ffffff0; mov.u32 %r0, 0; mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0;
             ldmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16 {{{registers}}}, [%s];
             mul.wide.u32 %o, %tid, 16; add.s64 %o, %o, %out; st.global.v4.u32 [%o], {{%r0, %r1, %r2, %r3}};",
            8 * n
        );
        let out = launch(&module(&body, ".shared .align 128 .b8 m[512];"), grid(1, 1, 32, 0), &words, 64);
        let out = out.unwrap_or_else(|e| panic!("x{n}{t}: {e}: {:?}", cuda_emulator::last_fault()));
        let got: Vec<u64> = out.iter().flat_map(|w| [w & 0xffff_ffff, w >> 32]).collect();
        for lane in 0..32 {
            for i in 0..n {
                // two neighbours of a row, or with .trans of a column: the low half is the first
                let (major, minor) = (lane / 4, lane % 4 * 2);
                let element = |k| (i * 64 + if trans { (minor + k) * 8 + major } else { major * 8 + minor + k }) as u64;
                assert_eq!(got[lane * 4 + i], element(0) | element(1) << 16, "x{n}{t} lane {lane} register {i}");
            }
        }
    }
}

#[test]
fn barriers() {
    // two warps that give each other their numbers
    let body = |wait: &str| {
        format!(".reg .b64 %o, %l; .reg .b32 %s, %r<3>; .reg .pred %p, %q; mul.wide.u32 %o, %tid, 8; add.s64 %o, %o, %out; mov.u32 %s, m; shl.b32 %r0, %tid, 2; add.s32 %s, %s, %r0;
            st.shared.u32 [%s], %tid; setp.lt.u32 %p, %tid, 8; {wait} mov.u32 %s, m; xor.b32 %r0, %r0, 128; add.s32 %s, %s, %r0; ld.shared.u32 %r1, [%s]; {{ .reg .b32 %hidden; mov.u32 %hidden, %r1;
            cvt.u64.u32 %l, %hidden; }} st.global.u64 [%o], %l;")
    };
    for wait in [
        "bar.sync 0;",
        "bar.sync 3, 64;",
        "barrier.sync 1;",
        "barrier.sync.aligned 1, 64;",
        "bar.cta.sync 0;",
        "bar.sync 0; bar.sync 0;",
        "bar.red.popc.u32 %r2, 0, %p; setp.ne.u32 %q, %r2, 8; @%q trap;",
        "bar.red.and.pred %q, 0, %p; @%q trap;",
        "bar.red.or.pred %q, 0, %p; @!%q trap;",
    ] {
        let got = launch(&module(&body(wait), ".shared .align 128 .b8 m[256];"), grid(1, 1, 64, 0), &[0], 64);
        let got = got.unwrap_or_else(|e| panic!("{wait}: {e}: {:?}", cuda_emulator::last_fault()));
        assert!((0..64).all(|i| got[i] == (i ^ 32) as u64), "{wait}: {got:?}");
    }
    // one arrives and does not wait
    let one_way = "setp.lt.u32 %q, %tid, 32; @%q bra A; bar.sync 2, 64; bra B; A: bar.arrive 2, 64; mov.u32 %r1, 7; bra C; B: mov.u32 %s, m; ld.shared.u32 %r1, [%s]; C:";
    let text = format!(".reg .b64 %o, %l; .reg .b32 %s, %r<3>; .reg .pred %p, %q; mul.wide.u32 %o, %tid, 8; add.s64 %o, %o, %out; mov.u32 %s, m; setp.eq.u32 %p, %tid, 0; @%p st.shared.u32 [%s], 5;
        {one_way} cvt.u64.u32 %l, %r1; st.global.u64 [%o], %l;");
    let got = launch(&module(&text, ".shared .align 128 .b8 m[256];"), grid(1, 1, 64, 0), &[0], 64).unwrap();
    assert_eq!([got[0], got[31], got[32], got[63]], [7, 7, 5, 5]);
}

#[test]
fn branches() {
    check!("mov.u32 %w, 1; @%q0 bra THERE; mov.u32 %w, 2; THERE:"; [0] => 2, [1] => 1, [0] => 2);
    // as many times round as the case says, and all meet again before the vote
    check!("mov.u32 %w, 0; ROUND: add.u32 %w, %w, 3; sub.u32 %r0, %r0, 1; setp.ne.s32 %p, %r0, 0; @%p bra ROUND; vote.sync.ballot.b32 %r1, 1, 7; add.u32 %w, %w, %r1";
        [1] => 10, [5] => 22, [2] => 13);
    check!("@%q0 bra.uni THERE; mov.u32 %w, 2; bra.uni END; THERE: mov.u32 %w, 1; END:"; [0] => 2, [0] => 2);
    check!("LIST: .branchtargets ZERO, ONE; brx.idx %r0, LIST; ZERO: mov.u32 %w, 10; bra END; ONE: mov.u32 %w, 11; END:"; [0] => 10, [1] => 11, [0] => 10);
    check!("mov.u32 %w, 1; @%q0 bra AWAY; bra END; AWAY: mov.u64 %l, 9; st.global.u64 [%at], %l; ret; END:"; [0] => 1, [0] => 1);
    // it does not go back, and is not always the same
    check!("mov.u64 %a0, %globaltimer; mov.u64 %a1, %globaltimer; setp.ge.u64 %p, %a1, %a0"; [0] => 1);
    check!("mov.u64 %a0, %globaltimer; AGAIN: mov.u64 %a1, %globaltimer; setp.eq.u64 %p, %a1, %a0; @%p bra AGAIN; mov.u32 %w, 1"; [0] => 1);
    check!("mov.u32 %w, %smid; shr.u32 %w, %w, 16"; [0] => 0);
    check!("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.u32 %w, 4"; [0] => 4);
}
