//! The host's side of bringing weights to a device: every byte arrives, through few buffers, and faults are reported.

use aoji::{
    Config, Dtype, Error, Result, Tensor, Weights,
    weights::reader::{self, BUFFERS, CHUNK, Part, Sink},
};
use half::{bf16, f16};
use serde_json::{Map, json};
use std::{
    fs,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Embedding and head are larger than a buffer, the norms tiny, the rows of odd length.
fn config() -> Config {
    let json = json!({
        "model_type": "llama", "hidden_size": 510, "intermediate_size": 33, "num_hidden_layers": 5, "head_dim": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 2501
    });
    Config::from_json(Path::new("config.json"), &json.to_string(), None).unwrap()
}

/// Writes a checkpoint of random bits in `files` files, each tensor of the type that `dtype` gives its number; `shift`
/// moves the data off its alignment.
fn write(dir: &Path, config: &Config, files: usize, shift: usize, dtype: impl Fn(usize) -> Dtype) -> Weights {
    let mut tensors = Vec::new();
    Weights::table(config, |name, shape| {
        tensors.push((name, shape.to_vec()));
        Ok(())
    })
    .unwrap();
    tensors.sort();
    let mut map = Map::new();
    let mut word = 0x2545_F491_4F6C_DD1Du64;
    for (f, part) in tensors.chunks(tensors.len().div_ceil(files)).enumerate() {
        let file = format!("model-{f}.safetensors");
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (i, (name, shape)) in part.iter().enumerate() {
            let (dtype, begin) = (dtype(i), data.len());
            for _ in 0..(shape.iter().product::<usize>() * dtype.bytes()).div_ceil(8) {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                data.extend(word.to_le_bytes());
            }
            data.truncate(begin + shape.iter().product::<usize>() * dtype.bytes());
            let format =
                ["BF16", "F16", "F32"][[Dtype::Bf16, Dtype::F16, Dtype::F32].iter().position(|d| *d == dtype).unwrap()];
            header.insert(name.clone(), json!({"dtype": format, "shape": shape, "data_offsets": [begin, data.len()]}));
            map.insert(name.clone(), file.clone().into());
        }
        let mut header = serde_json::to_string(&header).unwrap();
        header += &" ".repeat(8 - header.len() % 8 + shift);
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        fs::write(dir.join(file), bytes).unwrap();
    }
    fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    Weights::open(dir, config).unwrap()
}

/// The bytes that the device must have for a tensor.
fn expected(t: &Tensor) -> Vec<u8> {
    let bf16s: Vec<bf16> = match t.dtype() {
        Dtype::Bf16 => return t.bytes().to_vec(),
        Dtype::F16 => t.bytes().as_chunks().0.iter().map(|b| bf16::from_f32(f16::from_le_bytes(*b).to_f32())).collect(),
        Dtype::F32 => t.bytes().as_chunks().0.iter().map(|b| bf16::from_f32(f32::from_le_bytes(*b))).collect(),
    };
    bf16s.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A device that is a `Vec`, and fails after this many chunks.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    fails_after: usize,
    sent: AtomicUsize,
    buffers: Mutex<Vec<usize>>,
}

impl Memory {
    fn new(len: usize, fails_after: usize) -> Memory {
        let (sent, buffers) = (AtomicUsize::new(0), Mutex::default());
        Memory { bytes: Mutex::new(vec![0xAA; len]), fails_after, sent, buffers }
    }
}

impl Sink for Memory {
    type Buffer = Vec<u8>;
    fn buffer(&self, len: usize) -> Result<Vec<u8>> {
        self.buffers.lock().unwrap().push(len);
        Ok(vec![0; len])
    }
    fn bytes<'b>(&self, buffer: &'b mut Vec<u8>) -> Result<&'b mut [u8]> {
        Ok(buffer)
    }
    fn send(&self, buffer: &mut Vec<u8>, parts: &[Part]) -> Result<()> {
        if self.sent.fetch_add(1, Ordering::Relaxed) >= self.fails_after {
            return Err(Error::Memory("the device is gone".into()));
        }
        let mut bytes = self.bytes.lock().unwrap();
        for p in parts {
            bytes[p.to as usize..][..p.from.len()].copy_from_slice(&buffer[p.from.clone()]);
        }
        Ok(())
    }
}

/// Gives each tensor a place, three bytes after the one before; also returns how many bytes all need.
fn places(weights: &Weights) -> (Vec<(&Tensor, u64)>, usize) {
    let mut end = 3;
    let place = |t| {
        let at = end;
        end += expected(t).len() as u64 + 3;
        (t, at)
    };
    (weights.tensors().map(place).collect(), end as usize)
}

/// With 128 TiB for the stack of a thread, none starts, and the caller reads.
#[cfg(target_os = "linux")]
#[test]
fn without_threads_every_tensor_arrives_too() {
    let mut run = std::process::Command::new(std::env::current_exe().unwrap());
    run.args(["--exact", "reader::every_tensor_arrives_as_it_is_in_its_file"]);
    let out = run.env("RUST_MIN_STACK", (1u64 << 47).to_string()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn every_tensor_arrives_as_it_is_in_its_file() {
    use Dtype::{Bf16, F16, F32};
    let config = config();
    let mixed = [F32, Bf16, F16, F16, F32, Bf16, Bf16];
    for (files, shift, types) in
        [(1, 0, &[Bf16][..]), (3, 1, &[Bf16]), (1, 1, &[F16]), (2, 3, &[F32]), (4, 1, &mixed), (1, 2, &mixed)]
    {
        let dir = tempfile::tempdir().unwrap();
        let weights = write(dir.path(), &config, files, shift, |i| types[i % types.len()]);
        let (places, len) = places(&weights);
        let mut image = vec![0xAA; len]; // what lies between the tensors is nobody's
        places.iter().for_each(|(t, at)| image[*at as usize..][..expected(t).len()].copy_from_slice(&expected(t)));
        assert!(weights.embed.bytes().len() > CHUNK);

        let memory = Memory::new(len, usize::MAX);
        let mut done = 0;
        reader::read_all(places, &memory, &mut |bytes| done += bytes).unwrap();
        assert!(*memory.bytes.lock().unwrap() == image, "{files} files, shift {shift}, {types:?}");
        assert_eq!(done, weights.bytes());
        let buffers = memory.buffers.into_inner().unwrap();
        assert!(!buffers.is_empty() && buffers.len() <= reader::readers() * BUFFERS, "{} buffers", buffers.len());
        assert!(buffers.iter().all(|len| *len <= CHUNK), "{buffers:?}");
        // tensors that lie next to each other are read together
        let most = weights.bytes() as usize / CHUNK + 2 * files + 2;
        assert!(memory.sent.into_inner() <= most, "more than {most} chunks");
    }
}

#[test]
fn a_file_that_was_cut_short_meanwhile_is_an_error() {
    let (config, dir) = (config(), tempfile::tempdir().unwrap());
    let weights = write(dir.path(), &config, 2, 0, |_| Dtype::Bf16);
    let (places, len) = places(&weights);
    let path = dir.path().join("model-1.safetensors");
    let left = fs::metadata(&path).unwrap().len() - 1000;
    fs::File::options().write(true).open(&path).unwrap().set_len(left).unwrap();
    match reader::read_all(places, &Memory::new(len, usize::MAX), &mut |_| {}) {
        Err(Error::File { path: named, what }) => {
            assert_eq!(named, path);
            assert!(
                what.starts_with(&format!("ends at byte {left}, data was expected up to {}", left + 1000)),
                "{what}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_error_of_the_device_ends_all_readers() {
    let (config, dir) = (config(), tempfile::tempdir().unwrap());
    let weights = write(dir.path(), &config, 1, 0, |_| Dtype::F32);
    for fails_after in [0, 1, 3] {
        let (places, len) = places(&weights);
        let memory = Memory::new(len, fails_after);
        let mut done = 0;
        let error = reader::read_all(places, &memory, &mut |bytes| done += bytes).unwrap_err();
        assert_eq!(error.to_string(), "the device is gone");
        assert!(done < weights.bytes());
        let chunks = memory.sent.into_inner();
        assert!(chunks <= fails_after + reader::readers(), "{chunks} chunks were sent after the error");
    }
}

#[test]
fn nothing_to_read_is_nothing_to_do() {
    reader::read_all(Vec::new(), &Memory::new(0, 0), &mut |_| panic!("no bytes")).unwrap();
}
