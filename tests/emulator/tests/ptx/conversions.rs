//! mov and cvt.

use crate::check;

const NEG: u32 = u32::MAX;

fn b(x: f32) -> u64 {
    x.to_bits().into()
}

fn d(x: f64) -> u64 {
    x.to_bits()
}

#[test]
fn moves_and_pieces() {
    check!("mov.u32 %w, %r0"; [7] => 7);
    check!("mov.b32 %w, %r0"; [7] => 7);
    check!("mov.s32 %w, -5"; [0] => -5i32 as u32);
    check!("mov.f32 %v, 0f3FC00000"; [0] => b(1.5));
    check!("mov.f64 %x, 0d3FF8000000000000"; [0] => d(1.5));
    check!("mov.u64 %l, %a0"; [1u64 << 40] => 1u64 << 40);
    check!("mov.u16 %s, %h0"; [0x1_2345] => 0x2345);
    check!("mov.b16 %s, 0x1234"; [0] => 0x1234);
    // the first piece is the lowest
    check!("mov.b64 %l, {%r0, %r1}"; [1, 2] => 0x2_0000_0001u64);
    check!("mov.b64 {%w, %r1}, %a0"; [0x2_0000_0001u64] => 1);
    check!("mov.b64 {%r1, %w}, %a0"; [0x2_0000_0001u64] => 2);
    check!("mov.b64 {_, %w}, %a0"; [0x2_0000_0001u64] => 2);
    check!("mov.b32 %w, {%h0, %h1}"; [1, 2] => 0x2_0001);
    check!("mov.b32 {%h1, %s}, %r0"; [0x2_0001] => 2);
    check!("mov.u32 %w, %laneid"; [0] => 0, [0] => 1);
    check!("mov.u32 %w, %ntid.x"; [0] => 2, [0] => 2);
    check!("mov.u32 %w, %ctaid.x"; [0] => 0);
    check!("mov.u32 %w, %nctaid.x"; [0] => 1);
    check!("mov.u32 %w, %lanemask_lt"; [0] => 0, [0] => 1, [0] => 3);
}

#[test]
fn between_integers() {
    check!("cvt.u64.u32 %l, %r0"; [NEG] => NEG);
    check!("cvt.s64.s32 %l, %r0"; [NEG] => u64::MAX);
    check!("cvt.u32.u64 %w, %a0"; [0x5_0000_0007u64] => 7);
    check!("cvt.u16.u32 %s, %r0"; [0x12345] => 0x2345);
    check!("cvt.u32.u16 %w, %h0"; [0xffff] => 0xffff);
    check!("cvt.s32.s16 %w, %h0"; [0xffff] => NEG);
    check!("cvt.s16.s8 %s, %h0"; [0x80] => 0xff80);
    check!("cvt.u16.u8 %s, %h0"; [0x180] => 0x80);
    check!("cvt.s32.s8 %w, %r0"; [0x80] => -128i32 as u32); // the low bits of a wider register
    check!("cvt.sat.u8.s32 %w, %r0"; [300] => 255, [-1i32 as u32] => 0);
    check!("cvt.sat.s8.s32 %w, %r0"; [300] => 127, [-300i32 as u32] => -128i32 as u32);
    check!("cvt.s64.s16 %l, %h0"; [0x8000] => (-32768i64));
    check!("cvt.u64.u16 %l, %h0"; [0x8000] => 0x8000);
}

#[test]
fn to_integers_they_saturate() {
    check!("cvt.rzi.s32.f32 %w, %f0"; [b(-1.9)] => NEG, [b(1.9)] => 1, [b(3e9)] => 0x7fff_ffffu32, [b(-3e9)] => 0x8000_0000u32, [b(f32::NAN)] => 0);
    check!("cvt.rzi.u32.f32 %w, %f0"; [b(-1.9)] => 0, [b(3e9)] => 3_000_000_000u32, [b(5e9)] => NEG, [b(f32::NAN)] => 0);
    check!("cvt.rni.s32.f32 %w, %f0"; [b(0.5)] => 0, [b(1.5)] => 2, [b(2.5)] => 2);
    check!("cvt.rmi.s32.f32 %w, %f0"; [b(-0.5)] => NEG);
    check!("cvt.rpi.s32.f32 %w, %f0"; [b(0.5)] => 1);
    check!("cvt.rzi.s64.f32 %l, %f0"; [b(-1e30)] => i64::MIN, [b(f32::NAN)] => i64::MIN);
    check!("cvt.rzi.u64.f32 %l, %f0"; [b(1e30)] => u64::MAX, [b(f32::NAN)] => (1u64 << 63));
    check!("cvt.rzi.s32.f64 %w, %d0"; [d(-7.7)] => -7i32 as u32);
}

#[test]
fn from_integers() {
    check!("cvt.rn.f32.s32 %v, %r0"; [NEG] => b(-1.0), [16_777_217] => b(16_777_216.0), [16_777_219] => b(16_777_220.0));
    check!("cvt.rn.f32.u32 %v, %r0"; [NEG] => b(4_294_967_296.0));
    check!("cvt.rz.f32.u32 %v, %r0"; [NEG] => b(4_294_967_040.0));
    check!("cvt.rp.f32.s32 %v, %r0"; [16_777_217] => b(16_777_218.0));
    check!("cvt.rn.f32.u64 %v, %a0"; [1u64 << 40] => b(1_099_511_627_776.0));
    check!("cvt.rn.f32.s64 %v, %a0"; [-2i64] => b(-2.0));
    check!("cvt.rn.f64.s32 %x, %r0"; [NEG] => d(-1.0));
    check!("cvt.rn.f32.u16 %v, %h0"; [65535] => b(65535.0));
}

#[test]
fn between_floats() {
    check!("cvt.sat.f32.f32 %v, %f0"; [b(2.0)] => b(1.0), [b(-2.0)] => b(0.0), [b(0.25)] => b(0.25), [b(f32::NAN)] => 0);
    check!("cvt.rmi.f32.f32 %v, %f0"; [b(-0.5)] => b(-1.0), [b(1.5)] => b(1.0));
    check!("cvt.rni.f32.f32 %v, %f0"; [b(2.5)] => b(2.0), [b(-0.4)] => b(-0.0));
    check!("cvt.rzi.f32.f32 %v, %f0"; [b(-1.5)] => b(-1.0));
    check!("cvt.rpi.f32.f32 %v, %f0"; [b(1.1)] => b(2.0));
    check!("cvt.f64.f32 %x, %f0"; [b(0.1)] => d(f64::from(0.1f32)));
    check!("cvt.rn.f32.f64 %v, %d0"; [d(0.1)] => b(0.1));
}

#[test]
fn small_formats() {
    // to nearest even: 0x3f80_8000 is a tie between 0x3f80 and 0x3f81
    check!("cvt.rn.bf16.f32 %s, %f0"; [0x3f80_8000u32] => 0x3f80, [0x3f81_8000u32] => 0x3f82, [0x3f80_8001u32] => 0x3f81, [b(f32::NAN)] => 0x7fff,
        [b(f32::MAX)] => 0x7f80);
    check!("cvt.rn.bf16x2.f32 %w, %f0, %f1"; [b(1.0), b(2.0)] => 0x3f80_4000u32); // the first into the upper half
    check!("cvt.f32.bf16 %v, %h0"; [0xc000] => b(-2.0));
    check!("cvt.f32.f16 %v, %h0"; [0x3c00] => b(1.0), [0xc500] => b(-5.0), [0x0001] => b(2f32.powi(-24)), [0x7c00] => b(f32::INFINITY));
    check!("cvt.rn.f16.f32 %s, %f0"; [b(1.0)] => 0x3c00, [b(-5.0)] => 0xc500, [b(65519.0)] => 0x7bff, [b(65520.0)] => 0x7c00, [b(2f32.powi(-25))] => 0,
        [b(1.0 + 2f32.powi(-11))] => 0x3c00, [b(1.0 + 3.0 * 2f32.powi(-11))] => 0x3c02);
    check!("cvt.rn.f16x2.f32 %w, %f0, %f1"; [b(1.0), b(2.0)] => 0x3c00_4000u32);
    // e4m3: bias 7, largest 448, no infinity; e5m2: bias 15
    check!("cvt.rn.f16x2.e4m3x2 %w, %h0"; [0x387e] => 0x3c00_5f00u32, [0x0180] => 0x1800_8000u32);
    check!("cvt.rn.f16x2.e5m2x2 %w, %h0"; [0x3c40] => 0x3c00_4000u32);
    check!("cvt.rn.satfinite.e4m3x2.f32 %s, %f0, %f1"; [b(1.0), b(1000.0)] => 0x387e, [b(-448.0), b(2f32.powi(-9))] => 0xfe01, [b(f32::NAN), b(1.0625)] => 0x7f38,
        [b(1.1875), b(0.0)] => 0x3a00);
    check!("cvt.rn.satfinite.e5m2x2.f32 %s, %f0, %f1"; [b(1.0), b(1e6)] => 0x3c7b);
}
