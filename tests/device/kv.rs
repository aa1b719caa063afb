//! A cache of fp8: what holds for one in the type of activations holds for it, and it says nearly the same.

use crate::{
    batch::{Heard, OPTIONS, alone, drawn, greedy, job},
    ptx,
    session::all_agree,
    tiny::{self, CONFIG, EVERYTHING, engines, engines_with, prompt},
};
use aoji::{BatchOptions, Device, Engine, KvDtype, ModelFiles, Options};

fn in_fp8(config: &str) -> Vec<Engine> {
    engines_with(config, &Options { kv: KvDtype::Fp8, ..Options::default() })
}

#[test]
fn fp8_keeps_every_promise_on_every_backend() {
    for config in [CONFIG, EVERYTHING] {
        let engines = in_fp8(config);
        // the emulated device is slow: it has those of one model
        for engine in engines.iter().filter(|e| config == EVERYTHING || !e.is_gpu()) {
            let report = aoji::invariance::invariance(engine, 18).unwrap();
            report.verdict().unwrap_or_else(|e| panic!("{e}\n{report}"));
        }
        all_agree(&engines);
    }
}

#[test]
fn compiled_kernels_keep_them_too() {
    ptx::with_ptx(90, || all_agree(&in_fp8(CONFIG)));
}

#[test]
fn every_op_agrees_with_the_cpu() {
    for config in [CONFIG, EVERYTHING] {
        drop(engines()); // the emulated device is there
        let dir = tempfile::tempdir().unwrap();
        tiny::write_of(config, dir.path());
        let files = ModelFiles::open(dir.path().to_str().unwrap()).unwrap();
        aoji::verify::lockstep(files, 0, KvDtype::Fp8, 40, 6).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Jobs whose prompts begin alike share pages, from inside a page on a copy of it.
#[test]
fn jobs_get_the_same_bits_beside_others() {
    for engine in in_fp8(CONFIG) {
        let prefix = prompt(70, 1);
        let with = |salt| [&prefix[..], &prompt(20, salt)].concat();
        let jobs = [|| greedy(prompt(70, 1), 6), || job(prompt(9, 4), 8, drawn(3), None)];
        let branch = || greedy(prompt(70, 1).into_iter().chain(prompt(20, 2)).collect(), 6);
        let mut batch = engine.batch(&BatchOptions { sequences: 3, ..OPTIONS }).unwrap();
        let ids: Vec<_> = jobs.iter().map(|job| batch.submit(job()).unwrap()).collect();
        let (mut heard, last) = (Heard::default(), batch.submit(branch()).unwrap());
        heard.steps(&mut batch, usize::MAX);
        assert_eq!(branch().prompt, with(2));
        for (id, job) in ids.iter().zip(jobs) {
            assert_eq!(heard.bits(*id), alone(&engine, job()), "{id:?} on {}", engine.device());
        }
        assert_eq!(heard.bits(last), alone(&engine, branch()), "the branch on {}", engine.device());
        assert!(heard.finish(last).timings.reused_tokens >= 64, "on {}", engine.device());
    }
}

/// It is a format of its own, and nearly as good.
#[test]
fn fp8_is_near_to_bf16() {
    for (fp8, auto) in in_fp8(CONFIG).iter().zip(engines()) {
        let logits = |engine: &Engine| {
            let mut session = engine.session(100).unwrap();
            session.sync(&prompt(75, 1)).unwrap();
            session.logits().unwrap()
        };
        let (a, b) = (logits(fp8), logits(&auto));
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        let d = norm(&a.iter().zip(&b).map(|(a, b)| a - b).collect::<Vec<_>>()) / norm(&b);
        println!("{}: {d}", fp8.device());
        assert!(d > 0.0 && d < 0.15, "{}: {d}", fp8.device());
        let (fp8, auto) = (fp8.plan().kv, auto.plan().kv);
        assert_eq!(fp8 * 128, auto * 65, "65 bytes for 128");
    }
}

/// Activations in f32, on the CPU alone: the cache is read as f32.
#[test]
fn fp8_beside_f32() {
    let dir = tempfile::tempdir().unwrap();
    tiny::write_model(dir.path());
    let open = |kv| {
        let activations = aoji::Activations::F32;
        let options = Options { device: Device::Cpu, activations, kv, ..Options::default() };
        Engine::open(dir.path().to_str().unwrap(), &options).unwrap()
    };
    let [auto, fp8] = KvDtype::ALL.map(open);
    assert_eq!(fp8.plan().kv * 256, auto.plan().kv * 65, "65 bytes for 256");
    all_agree(std::slice::from_ref(&fp8));
    let path = dir.path().join("a.session");
    let mut session = fp8.session(80).unwrap();
    session.sync(&prompt(70, 2)).unwrap();
    session.save(&path, "").unwrap();
    let error = auto.session(80).unwrap().load(&path).unwrap_err().to_string();
    assert!(error.contains("another format of keys and values: fp8, and this is auto"), "{error}");
    let mut other = fp8.session(80).unwrap();
    other.load(&path).unwrap();
    let next = |s: &mut aoji::Session| {
        s.step(7).unwrap();
        s.logits().unwrap()
    };
    assert_eq!(next(&mut other), next(&mut session));
}
