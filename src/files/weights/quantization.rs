//! Reads `quantization_config` of `config.json`: which tensors a quantized checkpoint has in place of a matrix.
//!
//! Most of it (bits, groups, whether there are zero points) is read from the shapes of the tensors; the configuration
//! adds what no shape tells. A matrix that is present under its own name, not quantized, is taken as it is: methods
//! have several ways to name the modules that they leave alone.

use super::{
    Entry, Found, Shard, Tensor,
    stored::{Piece, Stored},
};
use crate::{
    error::{Error, Result},
    files::{
        config::Dtype,
        format::{Format, Grouped, Layout},
        json,
    },
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

const SUPPORTED: &str = "supported: compressed-tensors (float-quantized, int-quantized, pack-quantized), gptq (4 and 8 bits), \
                         awq (gemm), fbgemm_fp8, fp8, and GGUF files";

/// A quantization method with its settings.
pub(super) struct Quantization {
    path: PathBuf,
    method: Method,
}

enum Method {
    /// compressed-tensors; the rows and columns that share a scale, where scales are for blocks.
    Compressed(Option<[usize; 2]>),
    /// fp8 and fbgemm_fp8; the rows and columns that share a scale, where scales are for blocks.
    Fp8(Option<[usize; 2]>),
    /// Bits, columns of a group, and the number to add to a stored zero point.
    Gptq { bits: u32, group: Option<usize>, zero: u32 },
    /// Columns of a group.
    Awq { group: Option<usize> },
}

impl Quantization {
    /// What the `config.json` in `dir` says, where it says anything.
    pub fn of(dir: &Path) -> Result<Option<Quantization>> {
        let path = dir.join("config.json");
        let Some(text) = json::read_optional(&path)? else { return Ok(None) }; // weights alone
        // Config::from_json has already reported malformed JSON
        let json: Value = json::parse(&text).unwrap_or_default();
        let Some(key) = quantization_key(&json) else { return Ok(None) };
        let settings = Settings { path: &path, key, config: &json[key] };
        Ok(Some(Quantization { method: settings.method()?, path }))
    }

    /// The matrix `name`, if it is quantized.
    pub fn bind(&self, found: &mut Found, name: &str, shape: [usize; 2]) -> Result<Option<Tensor>> {
        let module = name.strip_suffix("weight").unwrap_or(name);
        let mut of = Module { found, module, name, shape };
        match self.method {
            Method::Compressed(_) if of.has("weight_packed") => of.packed().map(Some),
            Method::Compressed(tile) | Method::Fp8(tile) => of.bytes(tile),
            Method::Gptq { bits, group, zero } if of.has("qweight") => {
                of.words(Layout::Gptq { bits, zero }, group).map(Some)
            }
            Method::Awq { group } if of.has("qweight") => of.words(Layout::Awq, group).map(Some),
            Method::Gptq { .. } | Method::Awq { .. } => Ok(None),
        }
    }

    /// Leaves out what has no meaning for weights: scales of activations and of the cache, and GPTQ's biases that are all zero.
    pub fn drop_ignored(&self, tensors: &mut BTreeMap<String, (Arc<Shard>, Entry)>) {
        const ENDS: [&str; 8] = [
            ".input_scale",
            ".input_scale_ub",
            ".input_zero_point",
            ".output_scale",
            ".output_zero_point",
            ".k_scale",
            ".v_scale",
            ".activation_scale",
        ];
        let zeros = |shard: &Shard, entry: &Entry| shard.bytes()[entry.range.clone()].iter().all(|b| *b == 0);
        tensors.retain(|name, (shard, entry)| {
            let bias = matches!(self.method, Method::Gptq { .. }) && name.ends_with("_proj.bias");
            !(ENDS.iter().any(|end| name.ends_with(end)) || bias && zeros(shard, entry))
        });
    }
}

impl std::fmt::Debug for Quantization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "quantization of {}", self.path.display())
    }
}

/// The key of the settings in a `config.json`, if it has any. `compression_config` is the older name, used by
/// compressed-tensors; the newer one counts, as in transformers.
pub(in crate::files) fn quantization_key(config: &Value) -> Option<&'static str> {
    ["quantization_config", "compression_config"].into_iter().find(|key| !config[*key].is_null())
}

/// The name of the matrix to which a tensor of this name belongs.
pub(super) fn matrix(part: &str) -> Option<String> {
    const PARTS: [&str; 10] = [
        "weight_packed",
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    ];
    let (module, part) = part.rsplit_once('.')?;
    PARTS.contains(&part).then(|| format!("{module}.weight"))
}

/// The settings as JSON; errors name the file and the key.
struct Settings<'a> {
    path: &'a Path,
    key: &'static str,
    config: &'a Value,
}

impl Settings<'_> {
    fn unsupported<T>(&self, what: String) -> Result<T> {
        let what = format!("{} has {what}; {SUPPORTED}", self.key);
        Err(Error::Unsupported { path: self.path.to_path_buf(), what })
    }

    fn method(&self) -> Result<Method> {
        let Some(method) = self.config["quant_method"].as_str() else {
            return self.unsupported(format!("quant_method {}", self.config["quant_method"]));
        };
        if has_content(&self.config["is_marlin_format"]) {
            return self.unsupported("is_marlin_format (an order for one program's kernels)".into());
        }
        match method {
            "compressed-tensors" => self.compressed(),
            "fp8" | "fbgemm_fp8" => Ok(Method::Fp8(self.tile(&self.config["weight_block_size"])?)),
            "gptq" => {
                let zero = match self.config["checkpoint_format"].as_str().unwrap_or("gptq") {
                    "gptq" => 1,
                    "gptq_v2" => 0,
                    other => return self.unsupported(format!("checkpoint_format {other:?} of gptq")),
                };
                let bits = match self.config["bits"].as_u64() {
                    Some(bits @ (4 | 8)) => bits as u32,
                    _ => return self.unsupported(format!("bits {} of gptq", self.config["bits"])),
                };
                Ok(Method::Gptq { bits, group: self.group(&["group_size"])?, zero })
            }
            "awq" => {
                let either =
                    |a: &str, b: &str| if self.config[a].is_null() { &self.config[b] } else { &self.config[a] };
                let (bits, version) = (either("bits", "w_bit"), self.config["version"].as_str().unwrap_or("gemm"));
                if bits.as_u64() != Some(4) || !version.eq_ignore_ascii_case("gemm") {
                    return self.unsupported(format!("awq of version {version:?} and {bits} bits"));
                }
                Ok(Method::Awq { group: self.group(&["group_size", "q_group_size"])? })
            }
            other => self.unsupported(format!("quant_method {other:?}")),
        }
    }

    fn compressed(&self) -> Result<Method> {
        // Rotations have to be undone while the model computes: without that, the weights are another model's.
        let transforms = &self.config["transform_config"];
        if has_content(&transforms["config_groups"]) || !transforms.is_object() && has_content(transforms) {
            return self.unsupported("a transform_config (rotated weights)".into());
        }
        let sparsity = self.config["sparsity_config"]["format"].as_str().unwrap_or("dense");
        if sparsity != "dense" {
            return self.unsupported(format!("sparsity_config of format {sparsity:?}"));
        }
        let groups = || self.config["config_groups"].as_object().into_iter().flat_map(|map| map.values());
        let formats = groups().map(|group| &group["format"]).filter(|format| !format.is_null());
        for format in formats.chain([&self.config["format"]]) {
            match format.as_str() {
                Some(
                    "float-quantized" | "int-quantized" | "pack-quantized" | "naive-quantized" | "mixed-precision",
                ) => {}
                _ => return self.unsupported(format!("format {format} of compressed-tensors")),
            }
        }
        let mut tile = None;
        for weights in groups().map(|group| &group["weights"]).filter(|weights| !weights.is_null()) {
            let (bits, kind) = (weights["num_bits"].as_u64(), weights["type"].as_str().unwrap_or("int"));
            if !matches!((bits, kind), (Some(4 | 8), "int") | (Some(8), "float")) {
                return self.unsupported(format!("weights of type {kind:?} with num_bits {}", weights["num_bits"]));
            }
            tile = self.tile(&weights["block_structure"])?.or(tile);
        }
        Ok(Method::Compressed(tile))
    }

    /// `[rows, columns]` that share a scale.
    fn tile(&self, value: &Value) -> Result<Option<[usize; 2]>> {
        let size = |n: &Value| n.as_u64().filter(|n| (1..1 << 24).contains(n)).map(|n| n as usize);
        match value.as_array().map(|list| list.iter().map(size).collect::<Vec<_>>()).as_deref() {
            None if value.is_null() => Ok(None),
            Some(&[Some(rows), Some(cols)]) => Ok(Some([rows, cols])),
            _ => Err(Error::file(self.path, format!("a block of scales is {value}, expected [rows, columns]"))),
        }
    }

    /// Columns of a group; `None` for -1: all.
    fn group(&self, names: &[&str]) -> Result<Option<usize>> {
        let value = names.iter().map(|name| &self.config[*name]).find(|v| !v.is_null()).unwrap_or(&Value::Null);
        match value.as_i64() {
            Some(-1) => Ok(None),
            Some(n @ 1..=0xFF_FFFF) => Ok(Some(n as usize)),
            _ => Err(Error::file(self.path, format!("{} is {value}, expected a number of columns, or -1", names[0]))),
        }
    }
}

/// Neither null nor empty.
fn has_content(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

/// One matrix, and the tensors that a checkpoint may have for it.
struct Module<'a> {
    found: &'a mut Found,
    /// Ends with a dot.
    module: &'a str,
    name: &'a str,
    shape: [usize; 2],
}

impl Module<'_> {
    fn has(&self, part: &str) -> bool {
        self.found.tensors.contains_key(&format!("{}{part}", self.module))
    }

    fn wrong<T>(&self, part: &str, shard: &Shard, expected: String, found: String) -> Result<T> {
        Err(Error::tensor(&shard.path, format!("{}{part}", self.module), expected, found))
    }

    /// Takes a tensor that must be there.
    fn take(&mut self, part: &str) -> Result<(Arc<Shard>, Entry)> {
        let name = format!("{}{part}", self.module);
        let missing = || {
            let expected = format!("it, since {} is quantized", self.name);
            Error::tensor(&self.found.home, &name, expected, "no such tensor")
        };
        self.found.tensors.remove(&name).ok_or_else(missing)
    }

    /// Takes a tensor that must have this shape and element type.
    fn exact(&mut self, part: &str, dtype: safetensors::Dtype, shape: &[usize]) -> Result<Piece> {
        let (shard, entry) = self.take(part)?;
        if entry.dtype != dtype || entry.shape != shape {
            let [rows, cols] = self.shape;
            let expected = format!("{dtype:?} {shape:?} for a matrix [{rows}, {cols}]");
            return self.wrong(part, &shard, expected, format!("{:?} {:?}", entry.dtype, entry.shape));
        }
        Ok(Piece { shard, range: entry.range })
    }

    /// Takes scales, and says what they are.
    fn scales(&mut self, part: &str) -> Result<(Piece, Dtype, Vec<usize>)> {
        let (shard, entry) = self.take(part)?;
        let dtype = match Dtype::of(entry.dtype) {
            Ok(dtype) => dtype,
            Err([expected, found]) => return self.wrong(part, &shard, expected, found),
        };
        Ok((Piece { shard, range: entry.range }, dtype, entry.shape))
    }

    fn tensor(&self, codes: Piece, grouped: Grouped, beside: [Option<Piece>; 3]) -> Tensor {
        let [scales, zeros, groups] = beside;
        let stored = Stored { scales, zeros, groups, ..Stored::of(Format::Grouped(grouped)) };
        Tensor::new(codes.shard, self.name.to_string(), self.shape, codes.range, stored)
    }

    /// A matrix with a byte for each weight, under its own name; `None` when it is not quantized.
    fn bytes(&mut self, tile: Option<[usize; 2]>) -> Result<Option<Tensor>> {
        let layout = match self.found.tensors.get(self.name).map(|(_, entry)| entry.dtype) {
            Some(safetensors::Dtype::F8_E4M3) => Layout::E4m3,
            Some(safetensors::Dtype::I8) => Layout::Int8,
            _ => return Ok(None),
        };
        let [rows, cols] = self.shape;
        let dtype = if layout == Layout::E4m3 { safetensors::Dtype::F8_E4M3 } else { safetensors::Dtype::I8 };
        let codes = self.exact("weight", dtype, &[rows, cols])?;
        let part = if self.has("weight_scale_inv") { "weight_scale_inv" } else { "weight_scale" };
        let (scales, scale, shape) = self.scales(part)?;
        let tiles = |[high, wide]: [usize; 2]| [rows.div_ceil(high), cols.div_ceil(wide)];
        let group = match *shape {
            [] | [1] | [1, 1] => [rows, cols],
            [n] | [n, 1] if n == rows => [1, cols],
            [a, b] if tile.is_some_and(|tile| tiles(tile) == [a, b]) => tile.expect("some"),
            [n, groups] if n == rows && groups > 0 && cols % groups == 0 => [1, cols / groups],
            _ => {
                let blocks = tile.map_or(String::new(), |tile| format!(", or {:?} of blocks {tile:?}", tiles(tile)));
                let expected = format!("a scale for all, one a row [{rows}, 1], or of groups [{rows}, n]{blocks}");
                return self.wrong(part, &scales.shard, expected, format!("shape {shape:?}"));
            }
        };
        let zeros = match layout {
            Layout::Int8 if self.has("weight_zero_point") => {
                Some(self.exact("weight_zero_point", safetensors::Dtype::I8, &shape)?)
            }
            _ => None,
        };
        // symmetric ones are written as well, by some versions
        if layout == Layout::E4m3 && self.has("weight_zero_point") {
            self.take("weight_zero_point")?;
        }
        Ok(Some(self.tensor(codes, Grouped { layout, scale, group }, [Some(scales), zeros, None])))
    }

    /// A matrix in compressed-tensors' 32-bit words.
    fn packed(&mut self) -> Result<Tensor> {
        let [rows, cols] = self.shape;
        let (shard, entry) = self.take("weight_packed")?;
        let words = |bits: usize| [rows, cols * bits / 32];
        let fits = |bits: &usize| (cols * bits).is_multiple_of(32) && entry.shape == words(*bits);
        let (true, Some(bits)) = (entry.dtype == safetensors::Dtype::I32, [4, 8].into_iter().find(fits)) else {
            let expected = format!("I32 {:?} or {:?} for a matrix [{rows}, {cols}]", words(4), words(8));
            return self.wrong("weight_packed", &shard, expected, format!("{:?} {:?}", entry.dtype, entry.shape));
        };
        let codes = Piece { shard, range: entry.range };
        let (scales, scale, shape) = self.scales("weight_scale")?;
        let groups = match *shape {
            [n, groups] if n == rows && groups > 0 && cols % groups == 0 => groups,
            _ => {
                let expected = format!("shape [{rows}, n], n groups of the {cols} columns");
                return self.wrong("weight_scale", &scales.shard, expected, format!("shape {shape:?}"));
            }
        };
        let zeros = match self.has("weight_zero_point") {
            true => {
                let shape = [rows.div_ceil(32 / bits), groups];
                Some(self.exact("weight_zero_point", safetensors::Dtype::I32, &shape)?)
            }
            false => None,
        };
        let group = match self.has("weight_g_idx") {
            true => self.groups("weight_g_idx", cols / groups, groups)?,
            false => None,
        };
        if self.has("weight_shape") {
            let (shard, entry) = self.take("weight_shape")?;
            let bytes = &shard.bytes()[entry.range.clone()];
            let found: Vec<u64> = bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
            if entry.dtype != safetensors::Dtype::I64 || found != [rows as u64, cols as u64] {
                let found = format!("{:?} {found:?}", entry.dtype);
                return self.wrong("weight_shape", &shard, format!("I64 [{rows}, {cols}]"), found);
            }
        }
        let grouped = Grouped { layout: Layout::Packed { bits: bits as u32 }, scale, group: [1, cols / groups] };
        Ok(self.tensor(codes, grouped, [Some(scales), zeros, group]))
    }

    /// A matrix in GPTQ's or AWQ's 32-bit words.
    fn words(&mut self, layout: Layout, group: Option<usize>) -> Result<Tensor> {
        let [rows, cols] = self.shape;
        let per_word = 32 / layout.bits() as usize;
        let group = group.unwrap_or(cols);
        let groups = cols.div_ceil(group);
        if !rows.is_multiple_of(per_word) || !cols.is_multiple_of(per_word) {
            let found = format!("[{rows}, {cols}] by config.json");
            let home = &self.found.home;
            return Err(Error::tensor(home, self.name, format!("rows and columns in multiples of {per_word}"), found));
        }
        let shape = if layout == Layout::Awq { [cols, rows / 8] } else { [cols / per_word, rows] };
        let codes = self.exact("qweight", safetensors::Dtype::I32, &shape)?;
        let (scales, scale, shape) = self.scales("scales")?;
        if shape != [groups, rows] {
            let expected = format!("shape [{groups}, {rows}] for groups of {group}");
            return self.wrong("scales", &scales.shard, expected, format!("shape {shape:?}"));
        }
        let zeros = self.exact("qzeros", safetensors::Dtype::I32, &[groups, rows / per_word])?;
        let of = match self.has("g_idx") {
            true => self.groups("g_idx", group, groups)?,
            false => None,
        };
        let grouped = Grouped { layout, scale, group: [1, group] };
        Ok(self.tensor(codes, grouped, [Some(scales), Some(zeros), of]))
    }

    /// The group of each column, checked; `None` when the groups are consecutive columns, as without such a tensor.
    fn groups(&mut self, part: &str, group: usize, groups: usize) -> Result<Option<Piece>> {
        let piece = self.exact(part, safetensors::Dtype::I32, &[self.shape[1]])?;
        let of = || piece.bytes().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b));
        if let Some((column, g)) = of().enumerate().find(|(_, g)| !(0..groups as i32).contains(g)) {
            let expected = format!("a group below {groups} for each column");
            return self.wrong(part, &piece.shard, expected, format!("{g} for column {column}"));
        }
        let side_by_side = of().enumerate().all(|(column, g)| column / group == g as usize);
        Ok((!side_by_side).then_some(piece))
    }
}
