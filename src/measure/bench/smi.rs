//! What `nvidia-smi` says about a GPU while it is measured: clocks, temperature, power, other processes.
//!
//! Each question starts one process, which is cheap enough for twice a run. Without nvidia-smi the answers are absent. A GPU is named
//! by its PCI address, because nvidia-smi numbers GPUs differently from the driver.

use crate::error::{Error, Result};
use serde::Serialize;
use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// nvidia-smi counts as hung when it takes longer than this.
const LIMIT: Duration = Duration::from_secs(20);
const PROGRAM: &str = "nvidia-smi";

/// What does not change while a program runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Board {
    /// `580.95.05`
    pub driver_version: Option<String>,
    /// `Enabled`: a part of the memory and its bandwidth is used for error correction, unless the memory has its own.
    pub ecc: Option<String>,
    /// Highest clock of the multiprocessors.
    pub max_sm_mhz: Option<f64>,
    /// Highest clock of the memory.
    pub max_memory_mhz: Option<f64>,
    /// Power that the GPU may take.
    pub power_limit_w: Option<f64>,
}

/// What changes from moment to moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Running {
    /// Clock of the multiprocessors.
    pub sm_mhz: Option<f64>,
    /// Clock of the memory.
    pub memory_mhz: Option<f64>,
    /// Power.
    pub power_w: Option<f64>,
    /// Temperature of the chip.
    pub temperature_c: Option<f64>,
}

impl Board {
    /// Asks about the GPU at a PCI address; `None` if nothing can be learned.
    pub fn of(pci: &str) -> Option<Board> {
        Board::by(PROGRAM, pci)
    }

    fn by(program: &str, pci: &str) -> Option<Board> {
        let fields = "driver_version,ecc.mode.current,clocks.max.sm,clocks.max.mem,power.limit";
        let mut child = ask(program, pci, fields)?;
        let begin = Instant::now();
        while child.try_wait().ok()?.is_none() {
            std::thread::sleep(Duration::from_millis(5));
            if begin.elapsed() > LIMIT {
                let _ = child.kill();
            }
        }
        Board::parse(&answer(child)?)
    }

    fn parse(line: &str) -> Option<Board> {
        let [driver_version, ecc, max_sm, max_memory, power_limit] = values(line)?;
        Some(Board {
            driver_version,
            ecc,
            max_sm_mhz: number(max_sm),
            max_memory_mhz: number(max_memory),
            power_limit_w: number(power_limit),
        })
    }
}

impl Running {
    /// Asks about the GPU at a PCI address while `load` runs, again and again; `None` if nothing can be learned.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn during(pci: &str, load: impl FnMut() -> Result<()>) -> Result<Option<Running>> {
        Running::during_by(PROGRAM, pci, load)
    }

    fn during_by(program: &str, pci: &str, mut load: impl FnMut() -> Result<()>) -> Result<Option<Running>> {
        let fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu";
        let Some(mut child) = ask(program, pci, fields) else { return Ok(None) };
        let begin = Instant::now();
        let failed = |source| Error::Io { path: program.into(), source };
        while child.try_wait().map_err(failed)?.is_none() {
            if let Err(e) = load() {
                let _ = (child.kill(), child.wait());
                return Err(e);
            }
            if begin.elapsed() > LIMIT {
                let _ = child.kill();
            }
        }
        Ok(answer(child).and_then(|line| Running::parse(&line)))
    }

    fn parse(line: &str) -> Option<Running> {
        let [sm, memory, power, temperature] = values(line)?;
        Some(Running {
            sm_mhz: number(sm),
            memory_mhz: number(memory),
            power_w: number(power),
            temperature_c: number(temperature),
        })
    }
}

/// `None` where there is none to ask.
fn ask(program: &str, pci: &str, fields: &str) -> Option<Child> {
    let args = [&format!("--query-gpu={fields}"), "--format=csv,noheader,nounits", "--id", pci];
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().ok()
}

fn answer(child: Child) -> Option<String> {
    let output = child.wait_with_output().ok().filter(|o| o.status.success())?;
    String::from_utf8(output.stdout).ok()
}

/// The values of the first line, without those that this GPU does not know.
fn values<const N: usize>(text: &str) -> Option<[Option<String>; N]> {
    let known = |v: &str| Some(v.trim()).filter(|v| !v.is_empty() && !v.starts_with('[')).map(String::from);
    text.lines().next()?.split(',').map(known).collect::<Vec<_>>().try_into().ok()
}

fn number(value: Option<String>) -> Option<f64> {
    value?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_there_is() {
        let board = Board::parse("580.95.05, Enabled, 1980, 2619, 700.00\n").unwrap();
        assert_eq!((board.driver_version.as_deref(), board.ecc.as_deref()), (Some("580.95.05"), Some("Enabled")));
        assert_eq!((board.max_sm_mhz, board.power_limit_w), (Some(1980.0), Some(700.0)));
        let board = Board::parse("570.1, [N/A], 2100, 9501, [Not Supported]").unwrap();
        assert_eq!((board.ecc, board.power_limit_w), (None, None));
        let running = Running::parse("345, 2619, 112.53, 29\n").unwrap();
        assert_eq!((running.sm_mhz, running.temperature_c), (Some(345.0), Some(29.0)));
        assert_eq!(Running::parse("No devices were found"), None);
        assert_eq!(Board::parse(""), None);
    }

    /// A program that answers as nvidia-smi does, after a while.
    #[cfg(unix)]
    #[test]
    fn asks_while_the_load_runs() {
        use std::{fs, os::unix::fs::PermissionsExt};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("smi");
        let text = "#!/bin/sh\ncase \"$*\" in *clocks.max*) echo 580.1, Enabled, 1980, 2619, 700;; \
                    *'--id 00:1B'*) sleep 0.05; echo 1755, 2619, 300.5, 40;; *) exit 1;; esac\n";
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let program = path.to_str().unwrap();
        assert_eq!(Board::by(program, "00:1B").unwrap().max_memory_mhz, Some(2619.0));
        let mut runs = 0;
        let mut load = || {
            runs += 1;
            Ok(())
        };
        let running = Running::during_by(program, "00:1B", &mut load).unwrap().unwrap();
        assert_eq!((running.sm_mhz, running.power_w), (Some(1755.0), Some(300.5)));
        assert!(runs > 0);
        let failing = || Err(Error::Input("the load".into()));
        assert!(Running::during_by(program, "00:1B", failing).is_err());
        assert_eq!(Running::during_by(program, "other", || Ok(())).unwrap(), None, "it refused");
        assert_eq!(Board::by("/nowhere", "00:1B"), None);
    }
}
