//! `aoji tune --bench`: how fast steps are, and what limits them.

use crate::common;
use aoji::{
    Result,
    bench::{self, Peak, Speed},
    ops::Cost,
    train::{Place, Tuner},
};
use serde_json::json;

/// Measured micro-batches and updates.
const RUNS: usize = 5;

/// Measures, and prints a table or JSON.
pub fn print(place: &Place, tuner: &Tuner, as_json: bool) -> Result<()> {
    let (speed, peak) = bench::tune(place, tuner, RUNS)?;
    let of = Limits::of(&speed, &peak);
    if as_json {
        let op = |(op, (calls, c)): (&&str, &(u64, Cost))| {
            let (read, write, flops, floor_ms) = (c.read, c.write, c.flops, peak.floor_ms(*c));
            json!({ "op": op, "calls": calls, "read": read, "write": write, "flops": flops, "floor_ms": floor_ms })
        };
        let ops: Vec<_> = speed.costs[0].0.iter().map(op).collect();
        let text = json!({
            "speed": speed, "peak": peak, "ops_of_step": ops, "step_ms": of.step_ms, "floor_ms": of.floor_ms,
            "tflops": of.tflops, "utilisation": of.utilisation,
        });
        return common::print(&format!("{text:#}\n"));
    }
    let Speed { device, tokens, documents, labels, micro_batches, .. } = &speed;
    let mut text = format!(
        "{device}\na step: {micro_batches} micro-batches of {tokens} tokens in {documents} rows, {labels} learned\n\
         {:.0} tokens a second: {:.2} ms a micro-batch, {:.2} ms an update; least possible {:.2} ms a step of {:.2} ms\n\
         {:.2} TFLOP/s",
        speed.tokens_per_second, speed.pass_ms, speed.update_ms, of.floor_ms, of.step_ms, of.tflops
    );
    match (of.utilisation, peak.matmul_tflops) {
        (Some(share), Some(best)) => {
            text += &format!(
                ", {:.1}% of the {best:.0} of a large product here (what is computed again is not counted)\n",
                100.0 * share
            );
        }
        _ => text += "\n",
    }
    text += &format!("\n{:20}{:>8}{:>12}{:>12}\n", "op, in a step", "calls", "GFLOP", "least ms");
    let mut ops: Vec<_> = speed.costs[0].0.iter().map(|(op, (calls, c))| (op, calls, c, peak.floor_ms(*c))).collect();
    ops.sort_by(|a, b| b.3.total_cmp(&a.3));
    for (op, calls, c, ms) in ops {
        text += &format!("{op:20}{calls:8}{:12.2}{ms:12.3}\n", c.flops as f64 / 1e9);
    }
    if !speed.kernels.is_empty() {
        text += &format!("\n{:32}{:>8}{:>12}\n", "kernel, in a micro-batch", "calls", "ms");
        let mut kernels: Vec<_> = speed.kernels.iter().collect();
        kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        for k in kernels {
            text += &format!("{:32}{:8}{:12.3}\n", k.kernel, k.calls, k.ms);
        }
    }
    common::print(&text)
}

/// What follows from the rates of the device.
struct Limits {
    step_ms: f64,
    floor_ms: f64,
    tflops: f64,
    utilisation: Option<f64>,
}

impl Limits {
    fn of(speed: &Speed, peak: &Peak) -> Limits {
        let step_ms = speed.micro_batches as f64 * speed.pass_ms + speed.update_ms;
        let floor_ms = speed.costs[0].0.values().map(|(_, c)| peak.floor_ms(*c)).sum();
        let Cost { flops, .. } = speed.costs[1].total();
        let tflops = flops as f64 / (step_ms * 1e9);
        Limits { step_ms, floor_ms, tflops, utilisation: peak.matmul_tflops.map(|best| tflops / best) }
    }
}
