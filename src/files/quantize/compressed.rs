//! Writes a quantized model as a directory in the format of compressed-tensors.

use super::{BATCH, Options, Report, adapted, indivisible, is_matrix, module, read_row};
use crate::{
    error::{Error, Result},
    files::{
        checkpoint::ModelFiles,
        config::Dtype,
        format::{Format, Grouped, Layout},
        json,
        model_files::{CONFIG, INDEX},
        output::{Output, Target},
        shards::{self, Item, SHARD_BYTES},
        synth,
        weights::Tensor,
    },
};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};

/// A tensor to be written, and what it is made from.
struct Planned<'a> {
    item: Item,
    part: Part<'a>,
}

enum Part<'a> {
    /// A tensor that is not changed.
    Plain(&'a Tensor),
    Codes(&'a Tensor, Grouped),
    Scales(&'a Tensor),
    /// Its size.
    Shape(&'a Tensor),
}

pub(super) fn write(
    files: &ModelFiles,
    dir: &Path,
    layout: Layout,
    options: &Options,
    mut output: Output,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report> {
    // The readers of this format take a tied head for a linear layer too, so it is always listed as left alone.
    let (mut planned, mut ignore, mut report) = (Vec::new(), vec!["lm_head"], Report::default());
    let mut matrices = Vec::new();
    for t in files.weights.tensors() {
        let Format::Grouped(grouped) = options.format(&files.weights, t)? else {
            if is_linear(t) {
                ignore.push(module(t));
            }
            if is_matrix(t) {
                *report.matrices.entry(t.format().to_string()).or_default() += 1;
            }
            let shape = if is_matrix(t) { vec![t.rows(), t.cols()] } else { vec![t.cols()] };
            let item = Item::new(t.name().to_string(), t.dtype().safetensors(), &shape);
            planned.push(Planned { item, part: Part::Plain(t) });
            continue;
        };
        *report.matrices.entry(Format::Grouped(grouped).to_string()).or_default() += 1;
        matrices.push((t, grouped));
        let mut add = |end: &str, dtype, shape: &[usize], part| {
            planned.push(Planned { item: Item::new(format!("{}.{end}", module(t)), dtype, shape), part });
        };
        add("weight_scale", safetensors::Dtype::BF16, &[t.rows(), t.cols() / grouped.group[1]], Part::Scales(t));
        if layout == Layout::E4m3 {
            add("weight", safetensors::Dtype::F8_E4M3, &[t.rows(), t.cols()], Part::Codes(t, grouped));
        } else {
            let words = t.cols() * layout.bits() as usize / 32;
            add("weight_packed", safetensors::Dtype::I32, &[t.rows(), words], Part::Codes(t, grouped));
            add("weight_shape", safetensors::Dtype::I64, &[2], Part::Shape(t));
        }
    }
    report.bytes = planned.iter().map(|p| p.item.bytes).sum();

    let total = 2 * matrices.iter().map(|(t, _)| (t.rows() * t.cols()) as u64).sum::<u64>();
    let mut done = 0;
    let mut add = |n: u64| {
        done += n;
        progress(done, total);
    };
    let mut scales = BTreeMap::new();
    for (t, grouped) in &matrices {
        let inputs = options.inputs.of(t)?;
        scales.insert(t.name(), fit(&adapted(&files.lora, t, Dtype::F32), *grouped, inputs)?);
        add((t.rows() * t.cols()) as u64);
    }
    synth::copy_small(dir, &mut output)?;
    let mut placed = shards::split(planned, SHARD_BYTES, |p| &p.item);
    for (file, planned) in &mut placed {
        // Tensors with the widest elements come first: then each begins at a multiple of its element's size, as readers
        // demand.
        planned.sort_by_key(|p| std::cmp::Reverse(p.item.dtype.bitsize()));
        let mut target = output.create(file)?;
        target.write(&shards::header(planned.iter().map(|p| &p.item)))?;
        for p in planned.iter() {
            match p.part {
                Part::Plain(t) => target.write(adapted(&files.lora, t, t.dtype()).bytes())?,
                Part::Shape(t) => target.write(&[t.rows() as u64, t.cols() as u64].map(u64::to_le_bytes).concat())?,
                Part::Scales(t) => target.write(&scales[t.name()])?,
                Part::Codes(t, grouped) => {
                    write_codes(
                        &adapted(&files.lora, t, Dtype::F32),
                        grouped,
                        &scales[t.name()],
                        &mut target,
                        &mut add,
                    )?;
                }
            }
        }
    }
    if placed.len() > 1 {
        let items = placed.iter().flat_map(|(file, planned)| planned.iter().map(|p| (&p.item, file.as_str())));
        output.write(INDEX, shards::index_json(items).as_bytes())?;
    }
    output.write(CONFIG, config(dir, layout, options.columns(), &ignore)?.as_bytes())?;
    output.finish()?;
    Ok(report)
}

/// The embedding is no linear layer, and the format's readers take the head to stay as it is.
fn is_linear(t: &Tensor) -> bool {
    is_matrix(t) && t.name().starts_with("model.layers.")
}

/// What a matrix becomes.
pub(super) fn format(t: &Tensor, layout: Layout, group: Option<usize>) -> Result<Format> {
    if !is_linear(t) {
        return Ok(Format::Plain(t.dtype()));
    }
    let wide = group.unwrap_or(t.cols());
    if !t.cols().is_multiple_of(wide) {
        return Err(indivisible(t, wide, "those of a group"));
    }
    if layout.row_bytes(t.cols()).is_none() || !(t.cols() * layout.bits() as usize).is_multiple_of(32) {
        return Err(indivisible(t, 32 / layout.bits() as usize, "the codes of a word"));
    }
    Ok(Format::Grouped(Grouped { layout, scale: Dtype::Bf16, group: [1, wide] }))
}

/// The scales of a matrix; `inputs` are those of its columns.
pub(super) fn fit(t: &Tensor, grouped: Grouped, inputs: Option<&[f32]>) -> Result<Vec<u8>> {
    let width = t.cols() / grouped.group[1] * grouped.scale.bytes();
    let mut scales = vec![0; t.rows() * width];
    let one = |values: &mut Vec<f32>, (i, scales): (usize, &mut [u8])| {
        values.resize(t.cols(), 0.0);
        read_row(t, i, values)?;
        grouped.fit(values, inputs, scales);
        Ok(())
    };
    scales.par_chunks_exact_mut(width).enumerate().try_for_each_init(Vec::new, one)?;
    Ok(scales)
}

fn write_codes(
    t: &Tensor,
    grouped: Grouped,
    scales: &[u8],
    target: &mut Target,
    done: &mut dyn FnMut(u64),
) -> Result<()> {
    let (cols, scale) = (t.cols(), scales.len() / t.rows());
    let width = cols * grouped.layout.bits() as usize / 8;
    let batch = (BATCH / cols).max(1);
    let mut out = Vec::new();
    for first in (0..t.rows()).step_by(batch) {
        let rows = batch.min(t.rows() - first);
        out.resize(rows * width, 0);
        encode(t, grouped, &scales[first * scale..(first + rows) * scale], first, &mut out)?;
        target.write(&out)?;
        done((rows * cols) as u64);
    }
    Ok(())
}

/// The codes of as many rows as `out` holds, from row `first` on, with their scales.
pub(super) fn encode(t: &Tensor, grouped: Grouped, scales: &[u8], first: usize, out: &mut [u8]) -> Result<()> {
    let width = t.cols() * grouped.layout.bits() as usize / 8;
    let scale = t.cols() / grouped.group[1] * grouped.scale.bytes();
    let one = |values: &mut Vec<f32>, (i, (out, scales)): (usize, (&mut [u8], &[u8]))| {
        values.resize(t.cols(), 0.0);
        read_row(t, first + i, values)?;
        grouped.encode(values, scales, out);
        Ok(())
    };
    let parts = out.par_chunks_exact_mut(width).zip(scales.par_chunks_exact(scale));
    parts.enumerate().try_for_each_init(Vec::new, one)
}

/// The model's `config.json` with a description of the quantization, as compressed-tensors writes it.
fn config(dir: &Path, layout: Layout, group: Option<usize>, ignore: &[&str]) -> Result<String> {
    let path = dir.join(CONFIG);
    let mut config: Value = json::parse(&json::read(&path)?).map_err(|e| Error::file(&path, e.to_string()))?;
    let (format, kind) = match layout {
        Layout::E4m3 => ("float-quantized", "float"),
        _ => ("pack-quantized", "int"),
    };
    let weights = json!({
        "num_bits": layout.bits(), "type": kind, "symmetric": true, "group_size": group, "dynamic": false, "actorder": null,
        "strategy": if group.is_some() { "group" } else { "channel" }, "block_structure": null, "observer": "mse",
    });
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": weights, "input_activations": null, "output_activations": null,
        }},
        "ignore": ignore,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
    });
    Ok(format!("{config:#}\n"))
}
