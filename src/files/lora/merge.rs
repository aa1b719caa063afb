//! A checkpoint with adapters added to its weights, written.

use super::adapter::merged;
use crate::{
    error::{Error, Result},
    files::{
        checkpoint::ModelFiles,
        synth,
        weights::{INDEX, Tensor},
    },
};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    path::Path,
};

/// Writes the model with its adapters added to the directory `out`, which must be absent or empty: the files of the base model,
/// in which only the adapted tensors are other bytes, of the same type. `progress` gets `(tensors done, tensors in all)`.
///
/// # Errors
/// `Input` when `out` is not empty, or the model is the embedded one; `Io` when writing fails.
pub fn merge_checkpoint(files: &ModelFiles, out: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
    let Some(dir) = &files.dir else {
        return Err(Error::Input("the demo model has no files to merge into: name a model directory".into()));
    };
    synth::new_directory(out)?;
    let place = |file: &Path| file.file_name().map(|name| out.join(name)).unwrap_or_else(|| out.into());
    let tensors: Vec<&Tensor> = files.weights.tensors().collect();
    let mut opened: BTreeMap<&Path, File> = BTreeMap::new();
    for (done, t) in tensors.iter().enumerate() {
        progress(done, tensors.len());
        let (from, to) = (t.file(), place(t.file()));
        if !opened.contains_key(from) {
            fs::copy(from, &to).map_err(Error::io(from))?;
            opened.insert(from, OpenOptions::new().write(true).open(&to).map_err(Error::io(&to))?);
        }
        let Some(bytes) = merged(&files.lora, t, t.dtype()) else { continue };
        let file = opened.get_mut(from).expect("opened above");
        let written = file.seek(SeekFrom::Start(t.offset() as u64)).and_then(|_| file.write_all(&bytes));
        written.map_err(Error::io(&to))?;
    }
    let index = dir.join(INDEX);
    if opened.len() > 1 {
        fs::copy(&index, place(&index)).map_err(Error::io(&index))?;
    }
    synth::copy_tokenizer(dir, out)?;
    let config = dir.join("config.json"); // last: an interrupted run leaves nothing that looks like a model
    fs::copy(&config, place(&config)).map_err(Error::io(&config))?;
    Ok(())
}
