//! Kernels as nvcc compiled them, then damaged at random (always in the same way). They may load or not and run or not, but a
//! failure is a CUDA error that names the kernel and the line, and the process survives.

use crate::{common::*, launch_buffer, open};
use cudarc::{driver::sys::CUresult as R, nvrtc::Ptx};

const CASES: usize = 600;

struct Random(u64);

impl Random {
    /// A number below `n`.
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }
}

/// One kernel of a module.
#[derive(Clone)]
struct Kernel {
    name: String,
    /// The text before the module's kernels.
    head: String,
    /// The text from its name on.
    body: String,
    /// Bytes of each parameter.
    sizes: Vec<usize>,
}

fn kernels() -> Vec<Kernel> {
    let dir = cuda_emulator::own_ptx().expect("made when there was nvcc").join("90a");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    let texts = files.iter().filter(|f| f.extension().is_some_and(|e| e == "ptx"));
    let texts = texts.map(|f| std::fs::read_to_string(f).unwrap()).collect::<Vec<_>>();
    let of = |text: &String| -> Vec<Kernel> {
        let mut parts = text.split(".visible .entry ");
        let head = parts.next().unwrap().to_string();
        // .file, which comes after the last kernel, is for all
        let kernel = |part: &str| {
            let (name, rest) = part.split_once('(').unwrap();
            let sizes = rest.split(')').next().unwrap().split(',').filter_map(size).collect();
            let end = part.find("\n}\n").unwrap() + 3;
            Kernel { name: name.into(), head: head.clone(), body: part[..end].into(), sizes }
        };
        parts.map(kernel).collect()
    };
    texts.iter().flat_map(of).collect()
}

/// Bytes of a declared parameter: `.param .u64 .ptr .align 1 k_param_0`, `.param .align 64 .b8 k_param_1[128]`.
fn size(declaration: &str) -> Option<usize> {
    let ty =
        declaration.split_whitespace().find(|w| w.len() > 2 && w[2..].parse::<usize>().is_ok_and(|bits| bits >= 8))?;
    let array = declaration.split_once('[').and_then(|(_, n)| n.split_once(']')).map_or(1, |(n, _)| n.parse().unwrap());
    Some(ty[2..].parse::<usize>().unwrap() / 8 * array)
}

/// The words of a text, and the single characters between them.
fn tokens(text: &str) -> Vec<String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || "_.$%".contains(c);
    let mut tokens: Vec<String> = Vec::new();
    for c in text.chars() {
        match tokens.last_mut() {
            Some(t) if is_word(c) && t.chars().all(is_word) => t.push(c),
            _ => tokens.push(c.into()),
        }
    }
    tokens
}

fn damage(text: &str, r: &mut Random) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    let line = r.below(lines.len());
    match r.below(8) {
        0 => return text.chars().take(r.below(text.len())).collect(),
        1 => drop(lines.remove(line)),
        2 => lines.insert(r.below(lines.len()), lines[line]),
        3 => lines.swap(line, r.below(text.lines().count())),
        4 => {
            let at = r.below(text.len());
            return text.chars().enumerate().filter(|(i, _)| *i != at).map(|(_, c)| c).collect();
        }
        how => {
            let mut all = tokens(text);
            let words: Vec<usize> = (0..all.len()).filter(|i| !all[*i].trim().is_empty()).collect();
            let (a, b) = (words[r.below(words.len())], words[r.below(words.len())]);
            match how {
                5 => all.swap(a, b),
                6 => all[a] = all[b].clone(),
                _ => {
                    let extreme =
                        ["0", "-1", "4294967295", "4294967296", "18446744073709551615", "99999999999999999999"];
                    let numbers: Vec<usize> = words.into_iter().filter(|i| all[*i].parse::<u64>().is_ok()).collect();
                    if let Some(n) = numbers.len().checked_sub(1) {
                        all[numbers[r.below(n + 1)]] = extreme[r.below(extreme.len())].into();
                    }
                }
            }
            return all.concat();
        }
    }
    lines.join("\n")
}

/// Loads and runs the text with parameters for `kernel`.
fn run(kernel: &Kernel, text: &str) -> Result<(), (R, String)> {
    let g = open();
    cuda_emulator::clear_faults();
    let said = |e: cudarc::driver::DriverError| (e.0, cuda_emulator::last_fault().unwrap_or_default());
    let f = g.ctx.load_module(Ptx::from_src(text)).and_then(|m| m.load_function(&kernel.name)).map_err(said)?;
    let (mut buffer, mut kept) = (Vec::<u8>::new(), Vec::new());
    for size in &kernel.sizes {
        buffer.resize(buffer.len().next_multiple_of(*size.min(&8)), 0);
        let value = match size {
            8 => {
                let memory = g.stream.alloc_zeros::<u8>(16 << 10).unwrap();
                let address = cudarc::driver::DevicePtr::device_ptr(&memory, &g.stream).0;
                kept.push(memory);
                address.to_le_bytes().to_vec()
            }
            4 => 3u32.to_le_bytes().to_vec(),
            other => vec![0; *other],
        };
        buffer.extend(value);
    }
    g.stream.synchronize().unwrap();
    launch_buffer(&g, &f, grid(2, 1, 64, 16 << 10), &buffer, buffer.len()).map_err(said)?;
    g.stream.synchronize().map_err(said)
}

#[test]
fn damaged_kernels_are_errors_that_name_kernel_and_line() {
    if cuda_emulator::own_ptx().is_none() || std::env::var_os("AOJI_TEST_GPU").is_some() {
        return println!("skipped: it takes PTX of this crate's kernels, and the emulator");
    }
    let whole = |k: &Kernel| format!("{}.visible .entry {}", k.head, k.body);
    // without damage: all but those with what the emulator does not have (mbarrier, wgmma, cooperative grids)
    let refused = |k: &Kernel| matches!(run(k, &whole(k)), Err((R::CUDA_ERROR_INVALID_PTX, _)));
    let kernels: Vec<Kernel> = kernels().into_iter().filter(|k| !refused(k)).collect();
    assert!(kernels.len() > 30, "{}", kernels.len());
    let mut r = Random(0x9E37_79B9_7F4A_7C15);
    let (mut refused, mut faults, mut fine) = (0, 0, 0);
    for case in 0..CASES {
        let kernel = &kernels[case % kernels.len()];
        let mut text = whole(kernel);
        if case >= kernels.len() {
            for _ in 0..1 + r.below(3) {
                let at = if r.below(8) == 0 { 0 } else { kernel.head.len().min(text.len() / 2) };
                text = text[..at].to_string() + &damage(&text[at..], &mut r);
            }
        }
        if let Some(dir) = std::env::var_os("DAMAGED_PTX") {
            std::fs::write(std::path::Path::new(&dir).join(format!("{case}.ptx")), &text).unwrap();
        }
        let Err((code, said)) = run(kernel, &text) else {
            fine += 1;
            continue;
        };
        let line = said.split_once("image:").is_some_and(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()));
        match code {
            R::CUDA_ERROR_INVALID_PTX => {
                refused += 1;
                // before the kernel begins, or where nothing but a kernel may stand, it has no name
                let number =
                    said.split_once("image:").and_then(|(_, rest)| rest.split(':').next()?.parse::<usize>().ok());
                let begin = text.lines().position(|l| l.contains(".entry ")).unwrap_or(usize::MAX);
                let before = number.is_some_and(|n| n <= begin)
                    || ["expected a directive", "expected a kernel's name", "ends too early"]
                        .iter()
                        .any(|m| said.contains(m));
                assert!(
                    case >= kernels.len() && line && (before || said.contains("kernel ")),
                    "case {case}: {code:?}: {said}"
                );
            }
            R::CUDA_ERROR_NOT_FOUND => assert!(said.contains(&kernel.name), "case {case}: {said}"),
            R::CUDA_ERROR_INVALID_VALUE => {
                assert!(said.contains(&format!("launching {}", kernel.name)), "case {case}: {said}")
            }
            _ => {
                faults += 1;
                assert!(line && said.contains(&kernel.name), "case {case}: {code:?}: {said}");
            }
        }
    }
    println!("{CASES} texts: {refused} refused, {faults} faults, {fine} without");
    assert!(refused > CASES / 5 && faults > CASES / 20 && fine > CASES / 20, "{refused} {faults} {fine}");
}
