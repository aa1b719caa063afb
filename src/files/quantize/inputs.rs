//! What the columns of matrices are multiplied with.

use crate::{
    error::{Error, Result},
    files::weights::Tensor,
};
use std::collections::BTreeMap;

/// For matrices of a model, the mean square of each column's input on some text, as [`calibrate`](crate::calibration::calibrate)
/// measures it. The error of a weight changes an output by the error times the input, so its square counts that much.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inputs(BTreeMap<String, Vec<f32>>);

impl Inputs {
    /// Those of the tensor `name`, one for each of its columns, none negative.
    pub fn insert(&mut self, name: &str, mean_squares: Vec<f32>) {
        self.0.insert(name.into(), mean_squares);
    }

    /// Those of a tensor of this name.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.0.get(name).map(Vec::as_slice)
    }

    /// Those of a tensor.
    ///
    /// # Errors
    /// `Tensor` when they are of another model: not one for each column.
    pub(super) fn of(&self, t: &Tensor) -> Result<Option<&[f32]>> {
        match self.get(t.name()) {
            Some(inputs) if inputs.len() != t.cols() => {
                let found = format!("{} columns: they were measured with another model", t.cols());
                Err(Error::tensor(t.file(), t.name(), format!("{} columns, as its inputs have", inputs.len()), found))
            }
            inputs => Ok(inputs),
        }
    }
}
