//! KoBEST as lm-evaluation-harness runs it: the same requests, few-shot examples, metrics and standard errors.
//!
//! [`documents`] makes the requests of a task from its files, [`run`] asks the model, and [`TaskResult::of`] adds up.
//! The context of a document is computed once for all its choices, and the beginning that it shares with the context
//! before is not computed again. Therefore the documents of a task run in the order of their tokens.

mod kobest;
mod metrics;
mod random;
mod run;

pub use kobest::{Document, Task, documents};
pub use metrics::{TaskResult, macro_f1, stderr};
pub use random::PythonRandom;
pub use run::{Progress, Sample, run};
