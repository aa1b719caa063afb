//! The trace event format of Chrome and Perfetto: tracks of kernels and of multiprocessors.

use super::{Report, label};
use serde::Serialize;
use serde_json::{Value, json};

const KERNELS: u32 = 1;
const MULTIPROCESSORS: u32 = 2;
/// Lanes that a multiprocessor's track can have: blocks that are on it at the same time.
const LANES: u32 = 64;

/// A complete event; times in microseconds.
#[derive(Serialize)]
struct Event {
    name: String,
    ph: &'static str,
    pid: u32,
    tid: u32,
    ts: f64,
    dur: f64,
    args: Value,
}

/// Slices of one track must not overlap, so events at the same time go to different lanes, each to the first that is
/// free.
#[derive(Default)]
struct Lanes(Vec<f64>);

impl Lanes {
    fn take(&mut self, begin: f64, end: f64) -> u32 {
        let free = self.0.iter().position(|busy_until| *busy_until <= begin);
        let lane = free.unwrap_or_else(|| {
            self.0.push(0.0);
            self.0.len() - 1
        });
        self.0[lane] = end;
        lane as u32
    }
}

/// The file.
pub fn trace(r: &Report) -> String {
    let mut events = Vec::new();
    let mut kernels = Lanes::default();
    for (i, l) in r.timeline.launches.iter().enumerate() {
        let args = json!({"launch": i, "case": l.case, "blocks": l.blocks, "bytes": l.bytes, "ready_us": l.ready_us,
            "gap_us": l.gap_us, "run_us": l.run_us, "gb_per_s": l.gb_per_s});
        let (ts, dur) = (l.begin_us, l.end_us - l.begin_us);
        let tid = kernels.take(ts, l.end_us);
        events.push(Event { name: l.kernel.clone(), ph: "X", pid: KERNELS, tid, ts, dur, args });
    }
    let mut blocks: Vec<_> =
        r.timeline.launches.iter().enumerate().flat_map(|(i, l)| (0..l.blocks).map(move |b| (i, l, b))).collect();
    blocks.sort_by_key(|(_, l, b)| l.spans[*b].begin);
    let start = blocks.first().map_or(0, |(_, l, b)| l.spans[*b].begin);
    let us = |ns: u64| (ns - start) as f64 / 1e3;
    let mut sms: Vec<Lanes> = r.timeline.sms.iter().map(|_| Lanes::default()).collect();
    for (i, l, b) in blocks {
        let s = l.spans[b];
        let (ts, end) = (us(s.begin), us(s.end));
        let tid = s.sm * LANES + sms[s.sm as usize].take(ts, end).min(LANES - 1);
        let args = json!({"launch": i, "block": b, "ready_us": us(s.ready)});
        events.push(Event { name: l.kernel.clone(), ph: "X", pid: MULTIPROCESSORS, tid, ts, dur: end - ts, args });
    }
    let mut names = vec![name("process_name", KERNELS, 0, "kernels"), name("process_name", MULTIPROCESSORS, 0, "SMs")];
    names.extend((0..kernels.0.len() as u32).map(|lane| name("thread_name", KERNELS, lane, "kernels")));
    for (sm, lanes) in sms.iter().enumerate() {
        let tids = (0..lanes.0.len() as u32).map(|lane| sm as u32 * LANES + lane.min(LANES - 1));
        names.extend(tids.map(|tid| name("thread_name", MULTIPROCESSORS, tid, &format!("SM {sm}"))));
    }
    let about = json!({"header": r.header, "model": r.model, "depth": r.timeline.depth,
        "kernels": super::groups(&r.timeline).iter().map(|g| label(g.first)).collect::<Vec<_>>()});
    let events = serde_json::to_string(&events).expect("numbers and texts");
    let names = serde_json::to_string(&names).expect("texts");
    format!(
        "{{\"displayTimeUnit\": \"ns\", \"otherData\": {about},\n\"traceEvents\": [{},\n{}]}}\n",
        &names[1..names.len() - 1],
        &events[1..events.len() - 1]
    )
}

fn name(what: &str, pid: u32, tid: u32, name: &str) -> Value {
    json!({"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_has_lanes_of_its_own() {
        let mut lanes = Lanes::default();
        let times = [(0.0, 3.0), (1.0, 2.0), (2.0, 5.0), (2.5, 4.0), (4.0, 6.0)];
        assert_eq!(times.map(|(begin, end)| lanes.take(begin, end)), [0, 1, 1, 2, 0]);
    }
}
