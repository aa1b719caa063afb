//! Into a GGUF file.

use super::{BATCH, Options, Report, adapted, indivisible, is_matrix, is_named, read_row};
use crate::{
    error::Result,
    files::{
        checkpoint::ModelFiles,
        config::Dtype,
        format::{BLOCKS, Block, Format},
        gguf::{ROPE_FREQS, Writer, export, gguf_name},
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
    /// Rows of a head whose halves are to be made neighbours.
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
    let planned = files.weights.tensors().map(|t| plan(files, t, block, options)).collect::<Result<Vec<_>>>()?;
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
        write_tensor(files, p, &mut file, &mut |n| {
            done += n;
            progress(done, total);
        })?;
    }
    drop(file);
    output.finish()?;
    Ok(report)
}

/// What a tensor becomes. As with llama.cpp's files, the matrix that makes the logits is Q6_K where the others have 4 bits, and a
/// matrix whose rows are no whole blocks of 256 is of the next larger type with blocks of 32.
fn plan<'a>(files: &ModelFiles, t: &'a Tensor, block: &'static Block, options: &Options) -> Result<Planned<'a>> {
    let is_head = t.name() == files.weights.lm_head.name();
    let format = if !is_matrix(t) {
        Format::Plain(Dtype::F32)
    } else if options.ignore.iter().any(|name| is_named(t, name)) {
        Format::Plain(t.dtype())
    } else {
        let wanted = if is_head && block.bits == 4 { "Q6_K" } else { block.name };
        let smaller = match wanted {
            "Q6_K" => "Q8_0",
            "Q4_K" => "Q5_0",
            other => other,
        };
        let of = |name: &str| BLOCKS.into_iter().find(|b| b.name == name && t.cols().is_multiple_of(b.weights));
        let found = of(wanted).or_else(|| of(smaller));
        Format::Block(found.ok_or_else(|| indivisible(t, 32, "the smallest blocks"))?)
    };
    let bytes = format.row_bytes(t.cols()).map_or(0, |row| row as u64 * t.rows() as u64);
    let rotates = ["q_proj.weight", "k_proj.weight"].iter().any(|end| t.name().ends_with(end));
    let head = rotates.then_some(files.config.head_dim);
    let name = gguf_name(t.name()).unwrap_or_else(|| t.name().to_string());
    Ok(Planned { tensor: t, name, format, head, bytes })
}

/// The row that is row `i` of the file; see [`Stored`](crate::files::weights::Stored) for the way back.
fn row(head: Option<usize>, i: usize) -> usize {
    let Some(head) = head else { return i };
    let (first, i) = (i / head * head, i % head);
    first + i / 2 + i % 2 * (head / 2)
}

fn write_tensor(files: &ModelFiles, p: &Planned, file: &mut Target, done: &mut dyn FnMut(u64)) -> Result<()> {
    let t = adapted(files, p.tensor, Dtype::F32);
    let (cols, width) = (t.cols(), (p.bytes / t.rows() as u64) as usize);
    let batch = (BATCH / cols).max(1);
    let mut out = Vec::new();
    for first in (0..t.rows()).step_by(batch) {
        let rows = batch.min(t.rows() - first);
        out.resize(rows * width, 0);
        let one = |values: &mut Vec<f32>, (i, out): (usize, &mut [u8])| {
            values.resize(cols, 0.0);
            read_row(&t, row(p.head, first + i), values)?;
            match p.format {
                Format::Block(block) => block.encode(values, out),
                Format::Plain(dtype) => dtype.round(values, out),
                Format::Grouped(_) => unreachable!("no GGUF type"),
            }
            Ok(())
        };
        out.par_chunks_exact_mut(width).enumerate().try_for_each_init(Vec::new, one)?;
        file.write(&out)?;
        done((rows * cols) as u64);
    }
    file.write(&vec![0; Writer::padding(p.bytes)])
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
