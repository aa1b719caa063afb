"""How pip builds the wheel: maturin makes the module, and the command `aoji` of the same build goes beside it.

AOJI_PROFILE is cargo's profile [default: release]; `dev` is quicker to build where `cargo build` has built already.
"""
import json
import os
import pathlib
import shutil
import subprocess

import maturin
from maturin import get_requires_for_build_wheel, prepare_metadata_for_build_wheel  # noqa: F401 what a front end asks for

HERE = pathlib.Path(__file__).resolve().parent
PROFILE = os.environ.get("AOJI_PROFILE", "release")
SCRIPTS = HERE / "aoji.data/scripts"  # maturin puts what is in it into the wheel
SCRIPTS.mkdir(parents=True, exist_ok=True)  # and wants it for the metadata too


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    shutil.copy(program(), SCRIPTS)
    if PROFILE != "release":  # maturin's own default
        os.environ["MATURIN_PEP517_ARGS"] = f"--profile {PROFILE} " + os.environ.get("MATURIN_PEP517_ARGS", "")
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def program():
    """Builds the command; its path, which cargo says."""
    command = ["cargo", "build", "--profile", PROFILE, "--bin", "aoji", "--message-format", "json-render-diagnostics"]
    built = subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in built.splitlines()]
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "aoji")
