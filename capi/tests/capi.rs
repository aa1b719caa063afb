//! The C interface: its header is current, and programs in C that are built against the library do what they should.
#![cfg(target_os = "linux")]

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Standard output of a command that must succeed.
fn ok(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = run(command);
    let text = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {status}\n{text}");
    String::from_utf8(stdout).unwrap()
}

/// The root of the workspace.
fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The directory of libaoji.so and libaoji.a. For a test cargo builds only what Rust can link, so it is asked once more: aoji
/// itself is there already.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let test = env::current_exe().unwrap(); // target/PROFILE/deps/capi-HASH
        let built = test.ancestors().nth(2).unwrap();
        let profile = match built.file_name().unwrap().to_str().unwrap() {
            "debug" => "dev",
            other => other,
        };
        let mut cargo = Command::new(env!("CARGO"));
        // What cargo has told this test of its package is nothing to the packages below: ring looks at it, and would be built anew,
        // and with it aoji.
        let of_this_package =
            |name: &str| ["CARGO_PKG_", "CARGO_MANIFEST_", "OUT_DIR"].iter().any(|p| name.starts_with(p));
        for (name, _) in env::vars_os().filter(|(name, _)| of_this_package(&name.to_string_lossy())) {
            cargo.env_remove(name);
        }
        cargo.current_dir(root()).args(["build", "--quiet", "-p", "aoji-capi", "--profile", profile, "--target-dir"]);
        ok(cargo.arg(built.parent().unwrap()));
        built.to_path_buf()
    })
}

/// Compiles a program in C and links it as `link` says.
fn program(source: &str, link: &[&str]) -> PathBuf {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(Path::new(source).file_stem().unwrap());
    let mut cc = Command::new("cc");
    cc.current_dir(root()).args(["-std=c11", "-g", "-Wall", "-Wextra", "-Werror", "-Icapi/include", source]);
    ok(cc.args(link).args(["-lpthread", "-ldl", "-lm", "-o"]).arg(&out));
    out
}

#[test]
fn the_header_is_current() {
    let config = cbindgen::Config::from_file(root().join("capi/cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_config(config).with_src(root().join("capi/src/lib.rs"));
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let (made, path) = (String::from_utf8(made).unwrap(), root().join("capi/include/aoji.h"));
    if env::var_os("AOJI_WRITE_HEADER").is_some() {
        fs::write(&path, &made).unwrap();
    }
    assert!(fs::read_to_string(path).unwrap_or_default() == made, "AOJI_WRITE_HEADER=1 cargo test -p aoji-capi header");
}

#[test]
fn the_library_exports_what_the_header_declares() {
    let header = fs::read_to_string(root().join("capi/include/aoji.h")).unwrap();
    let code = header.lines().filter(|line| !line.trim_start().starts_with("//"));
    let words = code.flat_map(|line| line.split_inclusive('(').filter_map(|part| part.strip_suffix('(')));
    let names = words
        .filter_map(|part| part.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("aoji_") && !name.ends_with(')'));
    let declared: BTreeSet<&str> = names.collect();
    let symbols = ok(Command::new("nm").args(["-D", "--defined-only"]).arg(library().join("libaoji.so")));
    let exported: BTreeSet<&str> = symbols.lines().filter_map(|line| line.split(' ').nth(2)).collect();
    assert!(declared.len() > 15, "{declared:?}");
    assert_eq!(declared, exported);
}

#[test]
fn the_header_is_also_for_cpp() {
    let mut cpp = Command::new("c++");
    ok(cpp.current_dir(root()).args([
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-x",
        "c++",
        "capi/include/aoji.h",
    ]));
}

/// Built with the shared library, by the commands in its first lines.
#[test]
fn the_example_answers() {
    let lib = library().to_str().unwrap();
    let example = program("examples/c/generate.c", &[&format!("-L{lib}"), "-laoji", &format!("-Wl,-rpath,{lib}")]);
    let answer = ok(Command::new(&example).args(["demo", "넌 누구니?", "cpu"]));
    assert!(answer.contains("데모 모델") && answer.ends_with('\n'), "{answer}");
    let failed = run(Command::new(&example).arg("/nonexistent/model"));
    let text = String::from_utf8(failed.stderr).unwrap();
    assert_eq!((failed.status.code(), failed.stdout.len()), (Some(1), 0), "{text}");
    assert!(text.starts_with("error: model \"/nonexistent/model\" not found"), "{text}");
}

/// Built with the static library; run once by itself and once under valgrind, if it is installed.
#[test]
fn use_and_misuse() {
    let check = program("capi/tests/check.c", &[library().join("libaoji.a").to_str().unwrap()]);
    let dir = env!("CARGO_TARGET_TMPDIR");
    ok(Command::new(&check).arg(dir));
    if Command::new("valgrind").arg("--version").output().is_err() {
        return println!("skipped: no valgrind here (apt-get install valgrind)");
    }
    // What is still reachable at the end belongs to the pool of worker threads, which lives as long as the process.
    let leaks = ["--leak-check=full", "--errors-for-leak-kinds=definite,indirect", "--error-exitcode=1"];
    ok(Command::new("valgrind").args(leaks).arg(check).arg(dir));
}
