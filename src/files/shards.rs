//! Plans safetensors files that are to be written: which tensor lies in which file, their headers and their index.

use super::model_files::SINGLE;
use safetensors::tensor::TensorInfo;
use serde_json::json;
use std::collections::BTreeMap;

/// Size limit of a file unless asked otherwise: that of transformers, which made the published checkpoints.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub name: String,
    pub dtype: safetensors::Dtype,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

impl Item {
    /// A tensor of this shape.
    pub fn new(name: String, dtype: safetensors::Dtype, shape: &[usize]) -> Item {
        let bytes = shape.iter().product::<usize>() as u64 * dtype.bitsize() as u64 / 8;
        Item { name, dtype, shape: shape.to_vec(), bytes }
    }
}

/// Names of the files and what lies in each. As in transformers, tensors go to a file in their order until one does not
/// fit; then the next file begins.
pub(super) fn split<T>(tensors: Vec<T>, shard_bytes: u64, item: fn(&T) -> &Item) -> Vec<(String, Vec<T>)> {
    let (mut files, mut last, mut room) = (Vec::new(), Vec::new(), shard_bytes);
    for tensor in tensors {
        let bytes = item(&tensor).bytes;
        if bytes > room && !last.is_empty() {
            files.push(std::mem::take(&mut last));
            room = shard_bytes;
        }
        room = room.saturating_sub(bytes);
        last.push(tensor);
    }
    files.push(last);
    let n = files.len();
    let name = |i: usize| match n {
        1 => SINGLE.to_string(),
        _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    };
    files.into_iter().enumerate().map(|(i, tensors)| (name(i), tensors)).collect()
}

/// Everything before the data of tensors that lie one after the other, in the bytes that the Python library writes: length, JSON,
/// padding to 8 bytes.
pub(super) fn header<'a>(items: impl Iterator<Item = &'a Item>) -> Vec<u8> {
    header_with(r#"{"format":"pt"}"#, items)
}

/// The same with other metadata: the JSON of a map of strings.
pub(super) fn header_with<'a>(metadata: &str, items: impl Iterator<Item = &'a Item>) -> Vec<u8> {
    let mut json = format!(r#"{{"__metadata__":{metadata}"#);
    let mut end = 0;
    for item in items {
        let start = end;
        end += item.bytes as usize;
        let info = TensorInfo { dtype: item.dtype, shape: item.shape.clone(), data_offsets: (start, end) };
        let info = serde_json::to_string(&info).expect("a struct of numbers");
        json += &format!(r#","{}":{info}"#, item.name); // tensor names need no escapes
    }
    json.push('}');
    let padded = json.len().next_multiple_of(8);
    let mut header = (padded as u64).to_le_bytes().to_vec();
    header.extend(json.bytes());
    header.resize(8 + padded, b' ');
    header
}

/// The text of `model.safetensors.index.json`, of tensors with their files.
pub(super) fn index_json<'a>(placed: impl Iterator<Item = (&'a Item, &'a str)>) -> String {
    let mut total = 0;
    let file = |(item, file): (&'a Item, &'a str)| {
        total += item.bytes;
        (item.name.as_str(), file)
    };
    let weight_map: BTreeMap<&str, &str> = placed.map(file).collect();
    format!("{:#}\n", json!({"metadata": {"total_size": total}, "weight_map": weight_map}))
}
