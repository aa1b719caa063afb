//! Integer arithmetic, logic, shifts, bit fields, comparisons and selections.

use crate::check;

const MIN: u32 = 1 << 31;
const NEG: u32 = u32::MAX; // -1
const MIN64: u64 = 1 << 63;

#[test]
fn sums_and_products_wrap() {
    for t in ["s32", "u32"] {
        check!(&format!("add.{t} %w, %r0, %r1"); [1, 2] => 3, [NEG, 1] => 0, [0x7fff_ffffu32, 1] => MIN);
        check!(&format!("sub.{t} %w, %r0, %r1"); [1, 2] => NEG, [MIN, 1] => 0x7fff_ffffu32);
        check!(&format!("mul.lo.{t} %w, %r0, %r1"); [7, 6] => 42, [NEG, NEG] => 1, [0x10001u32, 0x10001u32] => 0x20001);
        check!(&format!("mad.lo.{t} %w, %r0, %r1, %r2"); [7, 6, 5] => 47, [NEG, 3, 1] => 0xffff_fffeu32);
    }
    for t in ["s64", "u64"] {
        check!(&format!("add.{t} %l, %a0, %a1"); [u64::MAX, 2] => 1);
        check!(&format!("sub.{t} %l, %a0, %a1"); [0, 1] => u64::MAX);
        check!(&format!("mul.lo.{t} %l, %a0, %a1"); [1u64 << 33, 1u64 << 30] => 1u64 << 63, [1u64 << 33, 1u64 << 31] => 0);
        check!(&format!("mad.lo.{t} %l, %a0, %a1, %a2"); [1u64 << 40, 3, 5] => (3u64 << 40) + 5);
    }
    check!("add.s16 %s, %h0, %h1"; [0xffff, 2] => 1);
    check!("sub.s16 %s, %h0, %h1"; [0, 1] => 0xffff);
    check!("mul.lo.s16 %s, %h0, %h1"; [0x101, 0x101] => 0x0201);
    check!("neg.s32 %w, %r0"; [1] => NEG, [MIN] => MIN);
    check!("neg.s64 %l, %a0"; [1] => u64::MAX);
    check!("abs.s32 %w, %r0"; [NEG] => 1, [5] => 5);
    check!("abs.s64 %l, %a0"; [u64::MAX] => 1);
}

#[test]
fn high_and_wide_products() {
    check!("mul.hi.u32 %w, %r0, %r1"; [NEG, NEG] => 0xffff_fffeu32, [1 << 16, 1 << 16] => 1);
    check!("mul.hi.s32 %w, %r0, %r1"; [NEG, NEG] => 0, [NEG, 1] => NEG, [MIN, 2] => NEG);
    check!("mul.hi.u64 %l, %a0, %a1"; [u64::MAX, u64::MAX] => u64::MAX - 1);
    check!("mul.hi.s64 %l, %a0, %a1"; [u64::MAX, 5] => u64::MAX);
    check!("mad.hi.u32 %w, %r0, %r1, %r2"; [1 << 16, 1 << 16, 9] => 10);
    check!("mad.hi.s32 %w, %r0, %r1, %r2"; [NEG, 1, 9] => 8);
    check!("mul.wide.u32 %l, %r0, %r1"; [NEG, NEG] => 0xffff_fffe_0000_0001u64);
    check!("mul.wide.s32 %l, %r0, %r1"; [NEG, NEG] => 1, [NEG, 3] => (-3i64));
    check!("mad.wide.u32 %l, %r0, %r1, %a2"; [NEG, 2, 2] => 0x2_0000_0000u64);
    check!("mad.wide.s32 %l, %r0, %r1, %a2"; [NEG, 2, 1] => (-1i64));
    check!("mul.wide.u16 %w, %h0, %h1"; [0xffff, 0xffff] => 0xfffe_0001u32);
    check!("mul.wide.s16 %w, %h0, %h1"; [0xffff, 2] => 0xffff_fffeu32);
}

#[test]
fn quotients_go_to_zero_and_remainders_take_the_dividend_s_sign() {
    check!("div.s32 %w, %r0, %r1"; [7, 2] => 3, [-7i32 as u32, 2] => -3i32 as u32, [7, -2i32 as u32] => -3i32 as u32);
    check!("rem.s32 %w, %r0, %r1"; [7, -2i32 as u32] => 1, [-7i32 as u32, 2] => NEG);
    check!("div.u32 %w, %r0, %r1"; [NEG, 2] => 0x7fff_ffffu32);
    check!("rem.u32 %w, %r0, %r1"; [NEG, 16] => 15);
    check!("div.s64 %l, %a0, %a1"; [-9i64, 2] => (-4i64));
    check!("div.u64 %l, %a0, %a1"; [u64::MAX, 1u64 << 32] => 0xffff_ffffu32);
    check!("rem.u64 %l, %a0, %a1"; [1u64 << 40, 1000] => (1u64 << 40) % 1000);
    check!("rem.s64 %l, %a0, %a1"; [-9i64, 2] => (-1i64));
}

#[test]
fn extremes() {
    check!("min.s32 %w, %r0, %r1"; [NEG, 1] => NEG);
    check!("max.s32 %w, %r0, %r1"; [NEG, 1] => 1);
    check!("min.u32 %w, %r0, %r1"; [NEG, 1] => 1);
    check!("max.u32 %w, %r0, %r1"; [NEG, 1] => NEG);
    check!("min.s64 %l, %a0, %a1"; [u64::MAX, 1] => u64::MAX);
    check!("max.s64 %l, %a0, %a1"; [u64::MAX, 1] => 1);
    check!("min.u64 %l, %a0, %a1"; [u64::MAX, 1] => 1);
    check!("max.u64 %l, %a0, %a1"; [u64::MAX, 1] => u64::MAX);
}

#[test]
fn bits_and_shifts_that_clamp() {
    check!("and.b32 %w, %r0, %r1"; [12, 10] => 8);
    check!("or.b32 %w, %r0, %r1"; [12, 10] => 14);
    check!("xor.b32 %w, %r0, %r1"; [12, 10] => 6);
    check!("not.b32 %w, %r0"; [0] => NEG);
    check!("cnot.b32 %w, %r0"; [0] => 1, [7] => 0);
    check!("and.b64 %l, %a0, %a1"; [MIN64 | 3, MIN64 | 5] => MIN64 | 1);
    check!("or.b64 %l, %a0, %a1"; [MIN64, 5] => MIN64 | 5);
    check!("xor.b64 %l, %a0, %a1"; [u64::MAX, 5] => !5u64);
    check!("not.b64 %l, %a0"; [0] => u64::MAX);
    check!("and.b16 %s, %h0, %h1"; [0xff0f, 0x0fff] => 0x0f0f);
    check!("or.b16 %s, %h0, %h1"; [0xff00, 0x00f0] => 0xfff0);
    check!("xor.b16 %s, %h0, %h1"; [0xffff, 1] => 0xfffe);
    check!("not.b16 %s, %h0"; [1] => 0xfffe);
    check!("shl.b32 %w, %r0, %r1"; [1, 31] => MIN, [1, 32] => 0, [1, 300] => 0);
    check!("shr.u32 %w, %r0, %r1"; [MIN, 31] => 1, [MIN, 32] => 0);
    check!("shr.b32 %w, %r0, %r1"; [MIN, 31] => 1);
    check!("shr.s32 %w, %r0, %r1"; [MIN, 31] => NEG, [MIN, 99] => NEG, [4, 1] => 2);
    check!("shl.b64 %l, %a0, %r1"; [1, 63] => MIN64, [1, 64] => 0);
    check!("shr.u64 %l, %a0, %r1"; [MIN64, 63] => 1, [MIN64, 64] => 0);
    check!("shr.s64 %l, %a0, %r1"; [MIN64, 64] => u64::MAX);
    check!("shl.b16 %s, %h0, %r1"; [1, 15] => 0x8000, [1, 16] => 0);
    check!("shr.u16 %s, %h0, %r1"; [0x8000, 15] => 1);
    check!("shf.l.wrap.b32 %w, %r0, %r1, %r2"; [0x8000_0000u32, 1, 1] => 3, [5, 7, 32] => 7);
    check!("shf.l.clamp.b32 %w, %r0, %r1, %r2"; [5, 7, 40] => 5);
    check!("shf.r.wrap.b32 %w, %r0, %r1, %r2"; [2, 1, 1] => 0x8000_0001u32, [5, 7, 32] => 5);
    check!("shf.r.clamp.b32 %w, %r0, %r1, %r2"; [5, 7, 40] => 7);
}

#[test]
fn fields_and_counts() {
    check!("brev.b32 %w, %r0"; [1] => MIN, [0x8000_0001u32] => 0x8000_0001u32, [0xf] => 0xf000_0000u32);
    check!("brev.b64 %l, %a0"; [1] => MIN64);
    check!("popc.b32 %w, %r0"; [0] => 0, [NEG] => 32);
    check!("popc.b64 %w, %a0"; [u64::MAX] => 64);
    check!("clz.b32 %w, %r0"; [0] => 32, [1] => 31);
    check!("clz.b64 %w, %a0"; [0] => 64, [1] => 63);
    check!("bfind.u32 %w, %r0"; [0] => NEG, [1] => 0, [MIN] => 31);
    check!("bfind.shiftamt.u32 %w, %r0"; [0] => NEG, [1] => 31, [MIN] => 0);
    check!("bfind.s32 %w, %r0"; [NEG] => NEG, [1] => 0, [0xffff_fffdu32] => 1);
    check!("bfind.u64 %w, %a0"; [MIN64] => 63);
    // a into b at c for d bits
    check!("bfi.b32 %w, %r0, %r1, 8, 4"; [0xff, 0] => 0xf00, [0, NEG] => 0xffff_f0ffu32);
    check!("bfi.b32 %w, %r0, %r1, %r2, 40"; [0xff, 0xf, 4] => 0xfff, [5, 9, 99] => 9);
    check!("bfi.b64 %l, %a0, %a1, 32, 32"; [7, 9] => (7u64 << 32) + 9);
    check!("bfe.u32 %w, %r0, %r1, %r2"; [0xabcd, 4, 8] => 0xbc, [MIN, 31, 9] => 1, [MIN, 31, 0] => 0);
    check!("bfe.s32 %w, %r0, %r1, %r2"; [0xabcd, 4, 8] => 0xffff_ffbcu32, [MIN, 31, 9] => NEG, [0x40, 5, 2] => 0xffff_fffeu32);
    check!("bfe.u64 %l, %a0, %r1, %r2"; [MIN64, 60, 4] => 8);
    // a nibble of the selector for each byte: 0-3 of a, 4-7 of b; with the top bit the byte's sign
    check!("prmt.b32 %w, %r0, %r1, %r2";
        [0x4433_2211u32, 0x8877_6655u32, 0x7531] => 0x8866_4422u32, [0x4433_2211u32, 0x8877_6655u32, 0x3210] => 0x4433_2211u32,
        [0x80ff_007fu32, 0, 0xba98] => 0xffff_0000u32);
    // the table's bit a * 4 + b * 2 + c, for each bit
    check!("dp2a.lo.u32.u32 %w, %r0, %r1, %r2";
        [0xffff_0003u32, 0x0908_ff05u32, 7] => (7 + 3 * 5 + 0xffff * 0xff), [2, 3, NEG] => 5);
    check!("dp2a.hi.u32.u32 %w, %r0, %r1, %r2"; [0x0002_0003, 0x0405_0607, 1] => (1 + 3 * 5 + 2 * 4));
    check!("lop3.b32 %w, %r0, %r1, %r2, 0x96"; [12, 10, 9] => (12 ^ 10 ^ 9));
    check!("lop3.b32 %w, %r0, %r1, %r2, 0xea"; [12, 10, 1] => ((12 & 10) | 1));
}

#[test]
fn comparisons() {
    for (t, word) in [("s32", "%r"), ("s64", "%a")] {
        let minus: u64 = if t == "s32" { NEG.into() } else { u64::MAX };
        for (c, want) in [
            ("eq", [0, 1, 0]),
            ("ne", [1, 0, 1]),
            ("lt", [1, 0, 0]),
            ("le", [1, 1, 0]),
            ("gt", [0, 0, 1]),
            ("ge", [0, 1, 1]),
        ] {
            check!(&format!("setp.{c}.{t} %p, {word}0, {word}1"); [minus, 1] => want[0], [7, 7] => want[1], [1, minus] => want[2]);
            let u = t.replace('s', "u");
            let flipped = if "lt le gt ge".contains(c) { [want[2], want[1], want[0]] } else { want };
            check!(&format!("setp.{c}.{u} %p, {word}0, {word}1"); [minus, 1] => flipped[0], [7, 7] => flipped[1], [1, minus] => flipped[2]);
        }
    }
    for (c, want) in [("lo", [0, 1]), ("ls", [0, 1]), ("hi", [1, 0]), ("hs", [1, 0])] {
        check!(&format!("setp.{c}.u32 %p, %r0, %r1"); [NEG, 1] => want[0], [1, NEG] => want[1]);
    }
    check!("setp.eq.s16 %p, %h0, %h1"; [0x1_0005u64, 5] => 1, [4, 5] => 0);
    check!("setp.ne.s16 %p, %h0, %h1"; [4, 5] => 1);
    check!("setp.eq.b32 %p, %r0, %r1"; [5, 5] => 1);
    check!("setp.eq.b64 %p, %a0, %a1"; [1u64 << 40, 0] => 0);
    check!("setp.lt.and.s32 %p, %r0, %r1, %q2"; [1, 2, 0] => 0, [1, 2, 1] => 1, [2, 1, 1] => 0);
    check!("setp.lt.or.s32 %p, %r0, %r1, !%q2"; [2, 1, 0] => 1, [2, 1, 1] => 0);
    check!("setp.lt.xor.s32 %p, %r0, %r1, %q2"; [1, 2, 1] => 0, [1, 2, 0] => 1);
    // the second result is that of the complement, each combined
    check!("setp.lt.and.s32 %q0|%p, %r0, %r1, %q2"; [1, 2, 1] => 0, [2, 1, 1] => 1, [2, 1, 0] => 0);
}

#[test]
fn predicates_and_selection() {
    check!("and.pred %p, %q0, %q1"; [1, 1] => 1, [1, 0] => 0);
    check!("or.pred %p, %q0, %q1"; [0, 1] => 1, [0, 0] => 0);
    check!("xor.pred %p, %q0, !%q1"; [1, 1] => 1, [1, 0] => 0);
    check!("not.pred %p, %q0"; [1] => 0, [0] => 1);
    check!("mov.pred %p, %q0"; [1] => 1, [0] => 0);
    for t in ["b32", "u32", "s32"] {
        check!(&format!("selp.{t} %w, %r0, %r1, %q2"); [5, 6, 1] => 5, [5, 6, 0] => 6);
    }
    for t in ["b64", "u64", "s64"] {
        check!(&format!("selp.{t} %l, %a0, %a1, !%q2"); [5, 6, 1] => 6, [5, 6, 0] => 5);
    }
    check!("selp.f32 %v, %f0, %f1, %q2"; [1f32.to_bits(), 2f32.to_bits(), 0] => 2f32.to_bits());
    check!("selp.u16 %s, %h0, %h1, %q2"; [5, 6, 1] => 5);
    check!("selp.b16 %s, %h0, %h1, %q2"; [5, 6, 0] => 6);
    // under a predicate: the others keep what they had
    check!("mov.u32 %w, 9; @%q0 mov.u32 %w, 1"; [1] => 1, [0] => 9);
    check!("mov.u32 %w, 9; @!%q0 mov.u32 %w, 1"; [1] => 9, [0] => 1);
}
