//! Writes a quantized model as a GGUF file.

use super::{BATCH, Options, Report, adapted, indivisible, is_matrix, read_row};
use crate::{
    error::Result,
    files::{
        checkpoint::ModelFiles,
        config::Dtype,
        format::{BLOCKS, Block, Format},
        gguf::{ROPE_FREQS, Writer, export, gguf_name, pairs},
        output::{Output, Target},
        weights::Tensor,
    },
};
use rayon::prelude::*;
use std::path::Path;

/// A tensor and what becomes of it.
struct Planned<'a> {
    tensor: &'a Tensor,
    name: String,
    format: Format,
    /// Rows, or elements of a vector, of a head whose halves are to be made neighbours.
    head: Option<usize>,
    bytes: u64,
}

pub(super) fn write(
    files: &ModelFiles,
    dir: &Path,
    block: &'static Block,
    options: &Options,
    mut output: Output,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report> {
    let planned = files.weights.tensors().map(|t| plan(files, t, options)).collect::<Result<Vec<_>>>()?;
    let (mut w, factors) = export(files, dir, file_type(block))?;
    let rope: Vec<u8> = factors.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    if let Some(factors) = &factors {
        w.tensor(ROPE_FREQS, &[factors.len()], type_id(Format::Plain(Dtype::F32)), rope.len() as u64);
    }
    let mut report = Report::default();
    for p in &planned {
        let [rows, cols] = [p.tensor.rows(), p.tensor.cols()];
        let shape = if is_matrix(p.tensor) { vec![rows, cols] } else { vec![cols] };
        w.tensor(&p.name, &shape, type_id(p.format), p.bytes);
        report.bytes += p.bytes;
        if is_matrix(p.tensor) {
            *report.matrices.entry(p.format.to_string()).or_default() += 1;
        }
    }
    let name = output.single().unwrap_or("model.gguf").to_string();
    let mut file = output.create(&name)?;
    file.write(&w.header())?;
    file.write(&rope)?;
    file.write(&vec![0; Writer::padding(rope.len() as u64)])?;
    let total = planned.iter().map(|p| (p.tensor.rows() * p.tensor.cols()) as u64).sum();
    let mut done = 0;
    for p in &planned {
        write_tensor(files, p, options.inputs.of(p.tensor)?, &mut file, &mut |n| {
            done += n;
            progress(done, total);
        })?;
    }
    drop(file);
    output.finish()?;
    Ok(report)
}

/// What a matrix becomes. As in llama.cpp's files, the matrix that makes the logits is Q6_K where the others have 4
/// bits, and a matrix whose rows are not whole blocks of 256 weights gets the next larger type with blocks of 32.
pub(super) fn format(t: &Tensor, block: &'static Block, is_head: bool) -> Result<&'static Block> {
    let wanted = if is_head && block.bits == 4 { "Q6_K" } else { block.name };
    let smaller = match wanted {
        "Q6_K" => "Q8_0",
        "Q4_K" => "Q5_0",
        other => other,
    };
    let of = |name: &str| BLOCKS.into_iter().find(|b| b.name == name && t.cols().is_multiple_of(b.weights));
    of(wanted).or_else(|| of(smaller)).ok_or_else(|| indivisible(t, 32, "the smallest blocks"))
}

/// A tensor and what becomes of it; vectors are F32.
fn plan<'a>(files: &ModelFiles, t: &'a Tensor, options: &Options) -> Result<Planned<'a>> {
    let format = if is_matrix(t) { options.format(&files.weights, t)? } else { Format::Plain(Dtype::F32) };
    let bytes = format.row_bytes(t.cols()).map_or(0, |row| row as u64 * t.rows() as u64);
    let head = pairs(&files.config, t.name()).then_some(files.config.head_dim);
    let name = gguf_name(t.name()).unwrap_or_else(|| t.name().to_string());
    Ok(Planned { tensor: t, name, format, head, bytes })
}

/// Which row of the model goes to row `i` of the file; [`Stored`](crate::files::weights::Stored) does the opposite.
fn row(head: Option<usize>, i: usize) -> usize {
    let Some(head) = head else { return i };
    let (first, i) = (i / head * head, i % head);
    first + i / 2 + i % 2 * (head / 2)
}

fn write_tensor(
    files: &ModelFiles,
    p: &Planned,
    inputs: Option<&[f32]>,
    file: &mut Target,
    done: &mut dyn FnMut(u64),
) -> Result<()> {
    let t = adapted(&files.lora, p.tensor, Dtype::F32);
    let (cols, width) = (t.cols(), (p.bytes / t.rows() as u64) as usize);
    let batch = (BATCH / cols).max(1);
    let mut out = Vec::new();
    for first in (0..t.rows()).step_by(batch) {
        let rows = batch.min(t.rows() - first);
        out.resize(rows * width, 0);
        encode(&t, p.format, inputs, |i| row(p.head, first + i), &mut out)?;
        file.write(&out)?;
        done((rows * cols) as u64);
    }
    file.write(&vec![0; Writer::padding(p.bytes)])
}

/// As many rows as `out` holds, `row(i)` of the tensor in place `i`; of a vector, its elements. `inputs` are those of its columns.
pub(super) fn encode(
    t: &Tensor,
    format: Format,
    inputs: Option<&[f32]>,
    row: impl Fn(usize) -> usize + Sync,
    out: &mut [u8],
) -> Result<()> {
    let width = format.row_bytes(t.cols()).expect("whole blocks: that was checked");
    let one = |values: &mut Vec<f32>, (i, out): (usize, &mut [u8])| {
        values.resize(t.cols(), 0.0);
        if is_matrix(t) {
            read_row(t, row(i), values)?;
        } else {
            let own = t.to_f32();
            values.iter_mut().enumerate().for_each(|(i, x)| *x = own[row(i)]);
        }
        match format {
            Format::Block(block) => block.encode(values, inputs, out),
            Format::Plain(dtype) => dtype.round(values, out),
            Format::Grouped(_) => unreachable!("no GGUF type"),
        }
        Ok(())
    };
    out.par_chunks_exact_mut(width).enumerate().try_for_each_init(Vec::new, one)
}

/// GGUF's number of a type.
fn type_id(format: Format) -> u32 {
    match format {
        Format::Plain(Dtype::F32) => 0,
        Format::Plain(Dtype::F16) => 1,
        Format::Plain(Dtype::Bf16) => 30,
        Format::Block(block) => block.id,
        Format::Grouped(_) => unreachable!("no GGUF type"),
    }
}

/// What llama.cpp calls files of mostly this type, by number.
fn file_type(block: &Block) -> u32 {
    match block.name {
        "Q4_0" => 2,
        "Q8_0" => 7,
        "Q4_K" => 14, // "small": without larger types for some layers
        _ => 18,      // Q6_K
    }
}
