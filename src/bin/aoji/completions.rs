//! `aoji completions`: what a shell needs to complete the command line.

use crate::{Cli, common};
use aoji::Result;
use clap::CommandFactory;
use clap_complete::Shell;

/// Arguments of `aoji completions`.
#[derive(clap::Args)]
#[command(after_help = "Example: aoji completions bash > ~/.local/share/bash-completion/completions/aoji")]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Prints the script.
pub fn run(args: Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "aoji", &mut script);
    common::print(&String::from_utf8_lossy(&script))
}
