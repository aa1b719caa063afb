//! Writes a checkpoint with adapters added to its weights.

use super::adapter::merged;
use crate::{
    error::{Error, Result},
    files::{
        checkpoint::ModelFiles,
        model_files::CONFIG,
        output::{Output, Target},
        synth,
        weights::{Layout, Tensor},
    },
};
use std::{fs::File, io::Seek};

/// Writes the model with its adapters added, and finishes the output. The files are copies of the base model's, in
/// which only the bytes of the adapted tensors differ. `progress` gets `(tensors done, tensors in all)`.
///
/// # Errors
/// `Input` when the model is the embedded one, `Unsupported` for a GGUF file; `Io` when reading or writing fails.
pub fn merge_checkpoint(files: &ModelFiles, mut output: Output, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
    let Some(dir) = &files.dir else {
        return Err(Error::Input("the demo model has no files to merge into: name a model directory".into()));
    };
    if dir.is_file() {
        let what = "is a GGUF file; an adapter is merged into a model directory in Hugging Face layout";
        return Err(Error::Unsupported { path: dir.clone(), what: what.into() });
    }
    let layout = Layout::of(dir)?;
    let (mut done, all) = (0, files.weights.tensors().count());
    for from in &layout.files {
        let mut tensors: Vec<&Tensor> = files.weights.tensors().filter(|t| t.file() == from).collect();
        tensors.sort_by_key(|t| t.offset());
        let name = from.file_name().and_then(|n| n.to_str()).ok_or_else(|| Error::file(from, "has no name"))?;
        let (mut file, mut to) = (File::open(from).map_err(Error::io(from))?, output.create(name)?);
        for t in tensors {
            progress(done, all);
            done += 1;
            write(files, t, &mut file, &mut to)?;
        }
        to.copy(from, &mut file, u64::MAX)?;
    }
    if let Some(index) = &layout.index {
        output.copy(index)?;
    }
    synth::copy_small(dir, &mut output)?;
    output.copy(&dir.join(CONFIG))?;
    output.finish()
}

/// Writes from where `file` is to the end of a tensor.
fn write(files: &ModelFiles, t: &Tensor, file: &mut File, to: &mut Target) -> Result<()> {
    let io = || Error::io(t.file());
    let at = file.stream_position().map_err(io())?;
    let (begin, len) = (t.offset() as u64, t.bytes().len() as u64);
    match merged(&files.lora, t, t.dtype()) {
        None => to.copy(t.file(), file, begin + len - at),
        Some(bytes) => {
            to.copy(t.file(), file, begin - at)?;
            to.write(&bytes)?;
            file.seek_relative(len as i64).map_err(io())
        }
    }
}
