//! How a step of decoding is recorded: with programmatic edges if the GPU has them and nobody switched them off.

use super::emulated;
use ::aoji::cuda::kernels::{IMAGES, image_for};

/// `(nodes, programmatic, edges)` of the graph of a step, which is recorded while three tokens are generated.
fn recorded(environment: &[(&str, &str)]) -> (usize, usize, usize) {
    let mut c = emulated(&["generate", "-vv", "--device", "cuda", "--max-tokens", "3", "--tokens", "1,2,3"]);
    c.envs(environment.iter().copied());
    let o = c.output().unwrap();
    let log = String::from_utf8(o.stderr).unwrap();
    assert!(o.status.success(), "{c:?}: {log}");
    let line = log.lines().find(|l| l.contains("recorded a step")).unwrap_or_else(|| panic!("no step: {log}"));
    let numbers: Vec<usize> = line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    let [.., nodes, programmatic, edges] = numbers[..] else { panic!("three numbers: {line}") };
    (nodes, programmatic, edges)
}

#[test]
fn a_step_is_a_chain_with_programmatic_edges_from_hopper_on() {
    if image_for(IMAGES, (8, 6)).is_none() {
        return println!("skipped: built without kernels for Ampere");
    }
    let (nodes, programmatic, edges) = recorded(&[]);
    assert_eq!((edges, programmatic), (nodes - 1, nodes - 1));
    // Ampere and Ada have the same kernels and plain edges; AOJI_PDL=0 is the same on any GPU
    assert_eq!(recorded(&[("CUDA_EMULATOR_CC", "86")]), (nodes, 0, edges));
    assert_eq!(recorded(&[("AOJI_PDL", "0")]), (nodes, 0, edges));
}

#[test]
fn a_gpu_older_than_ampere_is_refused_at_once() {
    if IMAGES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let ask = |device| {
        let mut c = emulated(&["generate", "--device", device, "--max-tokens", "1", "--tokens", "1", "--json"]);
        c.env("CUDA_EMULATOR_CC", "75").output().unwrap()
    };
    let o = ask("cuda");
    let said = String::from_utf8(o.stderr).unwrap();
    assert!(!o.status.success() && said.contains("compute capability 7.5") && said.contains("Ampere"), "{said}");
    assert!(ask("auto").status.success(), "the CPU takes its place");
}
